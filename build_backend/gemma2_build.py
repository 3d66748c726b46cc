"""In-tree PEP 517/660 backend: build against the torch that is already installed.

pip runs a backend in an isolated environment, yet with the interpreter of the environment that is
installed into; only PYTHONPATH and a sitecustomize hide that environment's packages. So this
backend starts the same interpreter without them, asks what it has, requests only the build tools
that it lacks, makes its packages importable behind the isolated ones, and hands over to setuptools.
Standard library only until then.
"""

import json
import os
import shutil
import subprocess
import sys

BUILD_TOOLS = {
    "setuptools": "setuptools>=70.1",  # the first that makes wheels by itself
    "ninja": "ninja",
    "cmake": "cmake>=3.22",
}
# What serves in place of a package where it is on PATH.
PROGRAMS = {"ninja": ("ninja", "make"), "cmake": ("cmake",)}

_PROBE = """
import importlib.util, json, os, sys
found = {"path": [p for p in sys.path[1:] if p], "tag": sys.implementation.cache_tag}
for name in ("torch", "setuptools", "ninja", "cmake"):
    spec = importlib.util.find_spec(name)
    found[name] = os.path.dirname(spec.origin) if spec and spec.origin else None
from importlib.metadata import version
try:
    found["setuptools_version"] = version("setuptools")
except Exception:
    found["setuptools_version"] = "0.0"
print(json.dumps(found))
"""

_NO_TORCH = """
gemma2_ext compiles against the PyTorch that you already have, and none was found.
Looked in:
  {tried}
Install PyTorch >= 2.11 first (https://pytorch.org/get-started/locally/), then run `pip install .`
again. If your front end builds in a fresh environment of its own, use `--no-build-isolation`, or
set GEMMA2_EXT_PYTHON to the python that has torch.
"""


def _candidates():
    """(reason, interpreter) pairs in which torch may be installed, most telling first."""
    yield "GEMMA2_EXT_PYTHON", os.environ.get("GEMMA2_EXT_PYTHON")
    yield "this interpreter", sys.executable
    # `uv pip` and `python -m build` create an empty environment, with the activated one on PATH.
    seen = {os.path.realpath(sys.prefix)}
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        prefix = os.path.realpath(os.path.dirname(folder))
        python = os.path.join(folder, "python")
        is_environment = os.path.exists(os.path.join(prefix, "pyvenv.cfg")) or os.path.isdir(
            os.path.join(prefix, "conda-meta")
        )
        if prefix not in seen and is_environment and os.path.exists(python):
            seen.add(prefix)
            yield "on PATH", python


def _probe():
    """What the first interpreter with torch has; exits with a message where there is none."""
    tried = []
    for reason, python in _candidates():
        if not python:
            continue
        # Not `-I`: that would hide a torch in the user site too.
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        try:
            run = subprocess.run(
                [python, "-c", _PROBE],
                env=env,
                cwd=os.path.dirname(python),
                capture_output=True,
                text=True,
                check=True,
            )
            found = json.loads(run.stdout.splitlines()[-1])
        except (OSError, subprocess.CalledProcessError, ValueError, IndexError) as error:
            tried.append(f"{python} ({reason}): {error}")
            continue
        if found["tag"] != sys.implementation.cache_tag:
            tried.append(
                f"{python} ({reason}): it is {found['tag']}, this build is for "
                f"{sys.implementation.cache_tag}"
            )
        elif found["torch"]:
            return found
        else:
            tried.append(f"{python} ({reason}): no torch")
    raise SystemExit(_NO_TORCH.format(tried="\n  ".join(tried)))


def on_path(name):
    """Whether a program on PATH serves in place of this package."""
    return any(shutil.which(program) for program in PROGRAMS.get(name, ()))


def _requires(config_settings=None):
    found = _probe()
    if [int(part) for part in found["setuptools_version"].split(".")[:2]] < [70, 1]:
        found["setuptools"] = None
    return [
        requirement
        for name, requirement in BUILD_TOOLS.items()
        if not found[name] and not on_path(name)
    ]


def _setuptools():
    found = _probe()
    sys.path.extend(p for p in found["path"] if p not in sys.path)
    os.environ["GEMMA2_EXT_TORCH_DIR"] = found["torch"]
    from setuptools import build_meta

    return build_meta


get_requires_for_build_wheel = _requires
get_requires_for_build_editable = _requires
get_requires_for_build_sdist = _requires


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    return _setuptools().prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    return _setuptools().prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    return _setuptools().build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    return _setuptools().build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory, config_settings=None):
    return _setuptools().build_sdist(sdist_directory, config_settings)
