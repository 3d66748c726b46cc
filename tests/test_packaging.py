"""What a user installs: versions, metadata, the message where torch is missing."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import gemma2_ext
from gemma2_ext.models import shipped_model

ROOT = Path(__file__).resolve().parents[1]


def test_one_version() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    stated = re.search(r'^version = "(.+)"$', text, re.M)
    assert stated
    assert stated[1] == gemma2_ext.__version__ == version("gemma2_ext")
    assert f"\nversion: {stated[1]}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {stated[1]}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_command_is_installed() -> None:
    (script,) = entry_points(group="console_scripts", name="gemma2-ext")
    assert script.value == "gemma2_ext.cli:main"


def test_the_package_is_typed_and_has_its_model() -> None:
    package = Path(gemma2_ext.__file__).parent
    assert (package / "py.typed").exists()
    assert (package / "_C.pyi").exists()
    size = sum(file.stat().st_size for file in shipped_model().iterdir())
    assert 1e6 < size < 8e6
    card = (shipped_model() / "README.md").read_text()
    assert re.search(r"\d\.\d+ bits per byte", card)


def backend(code: str, python: Path | str) -> subprocess.CompletedProcess[str]:
    """Runs the build backend as pip does, in an interpreter without site packages."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "GEMMA2"))}
    environment["PATH"] = "/usr/bin:/bin"
    program = f"import sys; sys.path.insert(0, {str(ROOT / 'build_backend')!r})\n{code}"
    return subprocess.run(
        [str(python), "-S", "-c", program],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of an environment without any package."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin" / "python"


def test_no_torch_is_said_before_anything_is_built(bare_python: Path) -> None:
    result = backend("import gemma2_build; gemma2_build.build_wheel('/nowhere')", bare_python)
    assert result.returncode == 1
    assert "compiles against the PyTorch that you already have, and none was found" in result.stderr
    assert str(bare_python) in result.stderr
    assert "Install PyTorch >= 2.11 first" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_installed_torch_is_found() -> None:
    code = "import gemma2_build; print(gemma2_build.get_requires_for_build_wheel())"
    result = backend(code, sys.executable)
    assert result.returncode == 0, result.stderr
    assert "torch" not in result.stdout


def test_sources_are_in_the_sdist() -> None:
    """Every folder that CMake, setup.py and make read is named in MANIFEST.in."""
    manifest = (ROOT / "MANIFEST.in").read_text()
    for folder in ("csrc", "cmake", "build_backend", "python/gemma2_ext", "tests", "scripts"):
        assert f"graft {folder}" in manifest


def setup(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.sh as make does, in a copy of the repository that holds nothing else."""
    (folder / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", folder / "scripts")
    return subprocess.run(
        ["bash", folder / "scripts" / "setup.sh"],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
    )


def test_setup_names_all_that_the_machine_lacks(tmp_path: Path) -> None:
    result = setup(tmp_path, PYTHON="no-such-python", CXX="no-such-compiler")
    assert result.returncode == 1
    assert "Python >= 3.10: 'no-such-python' was not found" in result.stderr
    assert "a C++17 compiler: 'no-such-compiler' is none" in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_setup_says_when_torch_can_be_had_from_nowhere(tmp_path: Path, bare_python: Path) -> None:
    nowhere = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    result = setup(tmp_path, PYTHON=str(bare_python), **nowhere)
    assert result.returncode == 1
    assert f"'{bare_python}' has no torch >= 2.11, and pip could not install" in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_ninja_is_found_where_its_package_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in an environment that sees another one's packages: the program is in the other's folder.
    program, packages = tmp_path / "bin" / "ninja", tmp_path / "lib" / "site-packages"
    record = packages / "ninja-1.0.dist-info" / "RECORD"
    record.parent.mkdir(parents=True)
    record.write_text("../../bin/ninja,,\nninja/__init__.py,,\nninja/ninja,,\n")
    record.with_name("METADATA").write_text("Name: ninja\nVersion: 1.0\n")
    program.parent.mkdir()
    program.touch(0o755)
    monkeypatch.setattr("setuptools.setup", lambda **arguments: None)
    arguments = runpy.run_path(str(ROOT / "setup.py"))["ninja_arguments"]
    monkeypatch.setattr("sys.path", [str(packages)])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert arguments() == ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={program}"]
    program.unlink()
    assert arguments() == []
    shutil.rmtree(record.parent)
    assert arguments() == []


def cmake_program() -> str | None:
    """On PATH, or of the package that a setup without one installs."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("cmake") or ():
            if file.match("data/bin/cmake"):
                return str(file.locate())
    return shutil.which("cmake")


@pytest.mark.skipif(cmake_program() is None, reason="needs cmake")
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "GEMMA2_EXT_CUDA=ON, but /a/torch is a CPU-only PyTorch"),
        ({"TORCH_CUDA": "12.8"}, "nvcc is CUDA 13.0, but PyTorch was built with CUDA 12.8"),
        (
            {"GEMMA2_EXT_CPU_ISAS": "scalar;avx1024"},
            "has avx1024, which is none of scalar;neon_dot;",
        ),
        ({"GEMMA2_EXT_CPU_ISAS": "scalar;avx2_vnni"}, "which takes kernels of avx2, without avx2"),
        (
            {"GEMMA2_EXT_CUDA": "CHECK", "GEMMA2_EXT_CUDA_ARCHS": "80;75"},
            "has 75, which is no SM version from 80 on",
        ),
        (
            {"GEMMA2_EXT_CUDA": "CHECK", "GEMMA2_EXT_CUDA_ARCHS": "sm_90"},
            "has sm_90, which is no SM version",
        ),
    ],
)
def test_what_cannot_be_built_is_an_error(
    tmp_path: Path, wrong: dict[str, str], message: str
) -> None:
    result = configure(tmp_path, wrong)
    assert result.returncode != 0
    assert message in " ".join(result.stderr.split())


@pytest.mark.skipif(cmake_program() is None, reason="needs cmake")
@pytest.mark.parametrize("architectures", ["80;90;100", "90a", "86"])
def test_hopper_s_kernels_are_not_compiled_empty(tmp_path: Path, architectures: str) -> None:
    """Without its "a" 90 has no wgmma."""
    settings = {"GEMMA2_EXT_CUDA": "CHECK", "GEMMA2_EXT_CUDA_ARCHS": architectures}
    result = configure(tmp_path, settings)
    assert result.returncode == 0, result.stderr
    files = [*(tmp_path / "build").rglob("build.make"), *(tmp_path / "build").glob("*.ninja")]
    commands = "".join(file.read_text() for file in files)
    assert ("sm_90a" in commands) == ("90" in architectures)
    assert not re.search(r"sm_90\b", commands)


def configure(tmp_path: Path, given: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """CMake beside a compiler of CUDA that only says its version."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    settings = {
        "GEMMA2_EXT_CUDA": "ON",
        "GEMMA2_EXT_CPU_ISAS": "scalar",
        "Python_EXECUTABLE": sys.executable,
        "TORCH_DIR": "/a/torch",
        "TORCH_VERSION": "2.13.0",
        "TORCH_CUDA": "",
        **given,
    }
    return subprocess.run(
        [
            str(cmake_program()),
            "-S",
            ROOT,
            "-B",
            tmp_path / "build",
            *(f"-D{k}={v}" for k, v in settings.items()),
        ],
        env={**os.environ, "CUDA_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
