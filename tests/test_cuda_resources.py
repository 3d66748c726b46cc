"""What the compiler says of the CUDA kernels: `scripts/cuda_check.sh` leaves its report."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
REPORTS = ROOT / "build" / "cuda_check"


def promised(source: Path) -> dict[str, tuple[int, int]]:
    """Registers, and bytes spilled (mostly none), that the header allows each kernel of a file."""
    pattern = r"^// (\w+): at most (\d+) registers(?: \((\d+) bytes spilled\))?"
    found = re.findall(pattern, source.read_text(), re.M)
    return {name: (int(count), int(spilled or 0)) for name, count, spilled in found}


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_every_kernel_states_its_resources(source: Path) -> None:
    # A kernel's name comes after __launch_bounds__(...) where it has those.
    bounds = r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)"
    text = re.sub(bounds, "", source.read_text())
    for header in re.findall(r'#include "(\w+\.cuh)"', text):
        text += re.sub(bounds, "", (source.parent / header).read_text())
    kernels = set(re.findall(r"__global__\s+void\s+(\w+)\(", text))
    assert kernels
    assert promised(source).keys() == kernels


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_no_spills_and_no_more_registers_than_stated(source: Path) -> None:
    report = REPORTS / f"{source.stem}.cu.o.resources"
    if not report.exists():
        pytest.skip("scripts/cuda_check.sh has not compiled the kernels here")
    text = report.read_text()
    entries = re.findall(
        r"Compiling entry function '(\w+)' for '(sm_\w+)'.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
        text,
        re.S,
    )
    assert len(entries) == text.count("Compiling entry function") > 0
    # ptxas says so where it waits for each product of a warpgroup, as their registers are touched.
    assert "Potential Performance Loss" not in text
    limits = promised(source)
    for mangled, architecture, stores, loads, registers, rest in entries:
        (kernel,) = [name for name in limits if f"{len(name)}{name}" in mangled]
        where = f"{kernel} on {architecture} ({mangled})"
        most, spilled = limits[kernel]
        assert max(int(stores), int(loads)) <= spilled, f"{where} spills"
        assert int(registers) <= most, f"{where}: {registers} registers"
        assert "smem" not in rest, f"{where}: shared memory that ptx.cuh does not hand out"
