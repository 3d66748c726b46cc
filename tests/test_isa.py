"""The choice of an instruction set, at import and by call, and what the build says of itself."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest
import torch

import gemma2_ext
from common import ISAS, by_both_ways

LEVELS = (
    "scalar",
    "neon_dot",
    "neon_bf16",
    "avx2",
    "avx2_vnni",
    "avx512",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_amx",
)


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


def test_levels_are_in_order_and_the_best_is_taken() -> None:
    assert list(ISAS) == [level for level in LEVELS if level in ISAS]
    result = run("", "import gemma2_ext; print(gemma2_ext._C.cpu_isa())")
    best = result.stdout.strip()
    # Intel's products of bfloat16 pairs are slower than those of floats.
    assert best == ISAS[-1] or (ISAS[-1], best) == ("avx512_bf16", "avx512_vnni")


def test_set_cpu_isa_takes_effect_at_once() -> None:
    before = gemma2_ext._C.cpu_isa()
    for isa in ISAS:
        gemma2_ext._C.set_cpu_isa(isa)
        assert gemma2_ext.build_info()["cpu_isa"] == isa
        assert torch.isfinite(gemma2_ext.ops.geglu(torch.ones(9), torch.ones(9))).all()
    gemma2_ext._C.set_cpu_isa(before)


# Levels with ways of their own for a Zen 4; the others share them, or have none.
of_products = pytest.mark.parametrize("isa", [i for i in ISAS if i in ("avx512", "avx512_bf16")])
of_packed = pytest.mark.parametrize("isa", [i for i in ISAS if i in ("avx512_vnni", "avx512_bf16")])
of_pairs = pytest.mark.parametrize("isa", [i for i in ISAS if i == "avx512_bf16"])


@of_products
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_features", [1, 100, 2304, 9217])
def test_one_row_of_linear_is_the_same_on_a_zen4(
    isa: str, dtype: torch.dtype, in_features: int
) -> None:
    x = torch.randn(1, in_features).to(dtype)
    weight = torch.randn(61, in_features).to(dtype)
    assert torch.equal(*by_both_ways(isa, lambda: gemma2_ext.ops.linear(x, weight)))


@of_products
@pytest.mark.parametrize(
    ("dtype", "rows"),
    [
        *((torch.float32, rows) for rows in (2, 7, 8, 12, 16)),
        *((torch.bfloat16, rows) for rows in (2, 5, 7, 8, 10, 16)),
        *((torch.float16, rows) for rows in (2, 6, 7, 16)),
    ],
)
def test_few_rows_of_linear_are_the_same_on_a_zen4(isa: str, dtype: torch.dtype, rows: int) -> None:
    x, weight = torch.randn(rows, 2304).to(dtype), torch.randn(1201, 2304).to(dtype)
    assert weight.nbytes > 4 << 20  # some levels split 7 to 10 rows of such
    assert torch.equal(*by_both_ways(isa, lambda: gemma2_ext.ops.linear(x, weight)))


@of_packed
@pytest.mark.parametrize("target", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("in_features", [1, 33, 2304])
def test_packed_linear_is_the_same_on_a_zen4(
    isa: str, target: str, rows: int, in_features: int
) -> None:
    weight = gemma2_ext.quantize.quantize(torch.randn(167, in_features), target)
    x = torch.randn(rows, in_features)
    assert torch.equal(*by_both_ways(isa, lambda: gemma2_ext.ops.linear(x, weight)))


@of_pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head_dim", [64, 104, 128, 256])
@pytest.mark.parametrize("seqlen_q", [1, 2, 3])
def test_attention_of_few_rows_is_the_same_on_a_zen4(
    isa: str, dtype: torch.dtype, packed: bool, head_dim: int, seqlen_q: int
) -> None:
    # As KVCache lays them out: a head's slots behind each other.
    k, v = torch.randn(2, 1, 2, 333, head_dim).to(dtype).transpose(2, 3)
    q = torch.randn(1, seqlen_q, 4, head_dim).to(dtype)
    scales = {}
    if packed:
        k, v = (t.mul(20).clamp(-127, 127).to(torch.int8) for t in (k, v))
        scales = {name: torch.rand(1, 2, 333).mT for name in ("k_scales", "v_scales")}
    call = functools.partial(
        gemma2_ext.ops.attention_cache, q, k, v, torch.tensor([333]), scale=0.1, **scales
    )
    assert torch.equal(*by_both_ways(isa, call))


@pytest.mark.skipif("avx512_vnni" not in ISAS, reason="AVX-512 with VNNI")
def test_avx512_vnni_has_products_of_floats_from_avx512() -> None:
    before = gemma2_ext._C.cpu_isa()
    x, weight = torch.randn(3, 64).bfloat16(), torch.randn(40, 64).bfloat16()
    results = []
    for isa in ("avx512", "avx512_vnni"):
        gemma2_ext._C.set_cpu_isa(isa)
        results.append(gemma2_ext.ops.linear(x, weight))
    gemma2_ext._C.set_cpu_isa(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("isa", [level for level in ISAS if level not in ("scalar", "avx2")])
@pytest.mark.parametrize("target", ["int8", "int4"])
@pytest.mark.parametrize("in_features", [1, 16, 33, 1100])
@pytest.mark.parametrize("out_features", [1, 16, 40, 129])
def test_packed_products_are_those_of_the_lowest_level(
    isa: str, target: str, in_features: int, out_features: int
) -> None:
    # Sums of integers are exact, and those of floats go in the same order. (x86's scalar level has
    # no fused multiply-add, so AVX2's is the lowest there.) Few rows, more than that, tiles that
    # are full and not.
    lowest = "scalar" if isa.startswith("neon") else "avx2"
    before = gemma2_ext._C.cpu_isa()
    weight = gemma2_ext.ops.quantize(torch.randn(out_features, in_features), target)
    xs = [torch.randn(rows, in_features).bfloat16() for rows in (1, 2, 8, 9, 16, 17, 70, 530)]
    xs[3][2, 0] = torch.nan
    results = []
    for level in (lowest, isa):
        gemma2_ext._C.set_cpu_isa(level)
        results.append([gemma2_ext.ops.linear(x, weight) for x in xs])
    gemma2_ext._C.set_cpu_isa(before)
    for y, right in zip(*results, strict=True):
        assert torch.equal(y.nan_to_num(9.0), right.nan_to_num(9.0))
        assert torch.equal(y.isnan(), right.isnan())


@pytest.mark.skipif("avx512_amx" not in ISAS, reason="AMX, or its emulation")
@pytest.mark.parametrize("in_features", [1, 2, 31, 32, 33, 255, 256, 257, 600])
def test_avx512_amx_has_zeros_behind_the_ends_of_tiles(in_features: int) -> None:
    # What fills up a tile is 0: with NaN in the neighbours' rows and behind the views, a sum of
    # ones is still the number of them.
    before = gemma2_ext._C.cpu_isa()
    gemma2_ext._C.set_cpu_isa("avx512_amx")
    x = torch.full((40, in_features + 3), torch.nan).bfloat16()
    weight = torch.full((37, in_features + 5), torch.nan).bfloat16()
    x[:, :in_features] = 1
    weight[:, :in_features] = 1
    out = gemma2_ext.ops.linear(x[:, :in_features], weight[:, :in_features])
    gemma2_ext._C.set_cpu_isa(before)
    assert torch.equal(out, torch.full((40, 37), float(in_features)).bfloat16())


def test_build_info() -> None:
    info = gemma2_ext.build_info()
    assert info["version"] == gemma2_ext.__version__
    assert info["torch"] == torch.__version__
    assert info["supported_cpu_isas"] == list(ISAS)
    assert {"built_with_torch", "compiler", "cuda", "cpu_isa"} <= info.keys()
