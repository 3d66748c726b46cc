from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from common import DTYPES, LAYOUTS, assert_accurate, with_strides
from gemma2_ext import reference
from host_cuda.emulator import assert_needed, check_schedules, guarded, launch, places


def rms_norm(x: Tensor, weight: Tensor, offset: int = 0, **options: Any) -> tuple[Tensor]:
    out = guarded(x.shape, x.dtype, offset=offset)
    launch(
        "rms_norm",
        x=x,
        x_stride=x.stride(0),
        weight=weight,
        out=out,
        rows=x.shape[0],
        hidden_size=x.shape[1],
        eps=1e-6,
        dtype=x.dtype,
        weight_dtype=weight.dtype,
        **options,
    )
    return (out,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [1, 7, 8, 41, 111, 2304])
@pytest.mark.parametrize("rows", [3, 33])  # few and, for the emulated device, many
def test_value(dtype: torch.dtype, hidden_size: int, rows: int) -> None:
    x, weight = torch.randn(rows, hidden_size).to(dtype), torch.randn(hidden_size).to(dtype)
    (out,) = check_schedules(lambda **options: rms_norm(x, weight, **options))
    assert_accurate(out, reference.rms_norm, x, weight)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str) -> None:
    x, weight = torch.randn(5, 72).bfloat16(), torch.randn(72).bfloat16()
    expected = rms_norm(x, weight)[0]
    if layout != "strided":
        assert torch.equal(rms_norm(with_strides(x, layout), weight)[0], expected)
        assert torch.equal(rms_norm(x, with_strides(weight, layout))[0], expected)
    assert torch.equal(rms_norm(x, weight, offset=1)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_weight_of_another_dtype(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 64).to(dtype), torch.randn(64).to(weight_dtype)
    assert_accurate(rms_norm(x, weight)[0], reference.rms_norm, x, weight)


@pytest.mark.parametrize("rows", [2, 33])
def test_rows_beyond_the_registers(rows: int) -> None:
    x, weight = torch.randn(rows, 20000), torch.randn(20000)
    assert_accurate(rms_norm(x, weight)[0], reference.rms_norm, x, weight)


def test_every_barrier_is_needed() -> None:
    x, weight = torch.randn(3, 600), torch.randn(600)
    run = lambda **options: rms_norm(x, weight, max_blocks=1, **options)  # noqa: E731
    assert len(places(run)) == 2
    for place in places(run):
        assert_needed(run, place)
