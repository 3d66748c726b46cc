"""Drives CMake for `gemma2_ext._C`; everything else about the package is in pyproject.toml.

Environment: GEMMA2_EXT_TORCH_DIR (torch to build against), GEMMA2_EXT_CUDA (AUTO, ON, OFF),
GEMMA2_EXT_CUDA_ARCHS, GEMMA2_EXT_CPU_ISAS (e.g. "scalar" or "scalar;avx2"), GEMMA2_EXT_BUILD_TYPE,
CMAKE (the program), MAX_JOBS.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CMAKE_VARIABLES = ("GEMMA2_EXT_CUDA", "GEMMA2_EXT_CUDA_ARCHS", "GEMMA2_EXT_CPU_ISAS")


def torch_facts() -> tuple[Path, str, str]:
    """Folder, version and CUDA version ("" without) of torch, read without importing it."""
    folder = os.environ.get("GEMMA2_EXT_TORCH_DIR")
    if not folder:
        spec = importlib.util.find_spec("torch")
        if not spec or not spec.origin:
            sys.exit(
                "gemma2_ext: torch is not installed in this environment; install torch >= 2.11."
            )
        folder = os.path.dirname(spec.origin)
    facts: dict = {}
    exec((Path(folder) / "version.py").read_text(), facts)
    return Path(folder), facts["__version__"], facts.get("cuda") or ""


def cmake_program() -> str:
    program = os.environ.get("CMAKE") or shutil.which("cmake")
    if program:
        return program
    try:
        from cmake import CMAKE_BIN_DIR  # (`import cmake` would find the folder beside this file)
    except ImportError:
        sys.exit("gemma2_ext: cmake was not found; install it (`pip install cmake`).")
    return os.path.join(CMAKE_BIN_DIR, "cmake")


def ninja_arguments() -> list[str]:
    program = shutil.which("ninja")
    if not program:
        # Of the package, which itself looks in this Python's own folder of programs only: one that
        # sees another Python's packages finds it by the list of its files.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            for file in importlib.metadata.files("ninja") or ():
                path = str(file.locate())
                if file.name == "ninja" and os.access(path, os.X_OK) and os.path.isfile(path):
                    program = os.path.abspath(path)
    return ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={program}"] if program else []


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        torch_dir, torch_version, torch_cuda = torch_facts()
        tag = re.sub("[^0-9A-Za-z.]", "_", torch_version)
        build = (
            ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-torch{tag}"
        )
        cache = build / "CMakeCache.txt"
        if cache.exists():
            # An isolated build leaves the path of a ninja that is gone: configure anew then.
            program = re.search(r"^CMAKE_MAKE_PROGRAM:[^=]*=(.*)$", cache.read_text(), re.M)
            if program and not os.path.exists(program.group(1)):
                cache.unlink()
        arguments = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTORCH_DIR={torch_dir}",
            f"-DTORCH_VERSION={torch_version}",
            f"-DTORCH_CUDA={torch_cuda}",
            f"-DCMAKE_BUILD_TYPE={os.environ.get('GEMMA2_EXT_BUILD_TYPE', 'Release')}",
            # What the environment no longer says is forgotten: then a new version's default holds.
            *(
                f"-D{name}={os.environ[name]}" if os.environ.get(name) else f"-U{name}"
                for name in CMAKE_VARIABLES
            ),
            *([] if cache.exists() else ninja_arguments()),  # a generator is chosen once
        ]
        cmake = cmake_program()
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        try:
            subprocess.check_call([cmake, "-S", str(ROOT), "-B", str(build), *arguments])
            subprocess.check_call([cmake, "--build", str(build), "--target", "_C", "-j", jobs])
        except subprocess.CalledProcessError as error:
            sys.exit(f"gemma2_ext: the build failed (exit code {error.returncode}), see above")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # Copy beside, then rename: a process that has the old library mapped keeps it.
        fresh = target.with_suffix(".new")
        shutil.copy2(next(build.glob("_C*.so")), fresh)
        os.replace(fresh, target)


setup(
    license="Apache-2.0",  # not in pyproject.toml: before setuptools 77 it takes no SPDX expression
    ext_modules=[Extension("gemma2_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
