"""The choice of an instruction set, at import and by call, and what the build says of itself."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import gemma2_ext
from common import ISAS

LEVELS = ("scalar", "avx2", "avx512", "avx512_bf16", "avx512_vnni")


def run(value: str, code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "GEMMA2_EXT_CPU_ISA": value}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("isa", ISAS)
def test_environment_forces_a_level(isa: str) -> None:
    result = run(isa, "import gemma2_ext; print(gemma2_ext._C.cpu_isa())")
    assert (result.returncode, result.stdout.strip()) == (0, isa), result.stderr


@pytest.mark.parametrize("value", ["avx3", "AVX2", " ", "amx"])
def test_unknown_level_is_named(value: str) -> None:
    result = run(value, "import gemma2_ext")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "GEMMA2_EXT_CPU_ISA" in last
    assert value in last
    assert "scalar" in last


def test_level_that_the_machine_lacks_is_refused() -> None:
    lacking = [level for level in LEVELS if level not in ISAS]
    if not lacking:
        pytest.skip("this machine has all of them")
    with pytest.raises(ValueError, match=lacking[-1]):
        gemma2_ext._C.set_cpu_isa(lacking[-1])
    assert run(lacking[-1], "import gemma2_ext").returncode == 1


def test_levels_are_a_prefix_and_the_best_is_taken() -> None:
    assert tuple(ISAS) == LEVELS[: len(ISAS)] or "scalar" in ISAS
    result = run("", "import gemma2_ext; print(gemma2_ext._C.cpu_isa())")
    assert result.stdout.strip() == ISAS[-1]


def test_set_cpu_isa_takes_effect_at_once() -> None:
    before = gemma2_ext._C.cpu_isa()
    for isa in ISAS:
        gemma2_ext._C.set_cpu_isa(isa)
        assert gemma2_ext.build_info()["cpu_isa"] == isa
        assert torch.isfinite(gemma2_ext.ops.geglu(torch.ones(9), torch.ones(9))).all()
    gemma2_ext._C.set_cpu_isa(before)


@pytest.mark.skipif("avx512_vnni" not in ISAS, reason="Intel's, with AVX512_BF16")
def test_avx512_vnni_has_floats_from_avx512_and_packed_weights_from_avx512_bf16() -> None:
    before = gemma2_ext._C.cpu_isa()
    x, weight = torch.randn(3, 64).bfloat16(), torch.randn(40, 64).bfloat16()
    packed = gemma2_ext.ops.quantize(weight, "int8")
    results: dict[str, list[torch.Tensor]] = {}
    for isa in ("avx512", "avx512_bf16", "avx512_vnni"):
        gemma2_ext._C.set_cpu_isa(isa)
        results[isa] = [gemma2_ext.ops.linear(x, w) for w in (weight, packed)]
    gemma2_ext._C.set_cpu_isa(before)
    assert torch.equal(results["avx512_vnni"][0], results["avx512"][0])
    assert torch.equal(results["avx512_vnni"][1], results["avx512_bf16"][1])


def test_build_info() -> None:
    info = gemma2_ext.build_info()
    assert info["version"] == gemma2_ext.__version__
    assert info["torch"] == torch.__version__
    assert info["supported_cpu_isas"] == list(ISAS)
    assert {"built_with_torch", "compiler", "cuda", "cpu_isa"} <= info.keys()
