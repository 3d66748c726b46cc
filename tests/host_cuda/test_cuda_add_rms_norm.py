from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from common import DTYPES, assert_accurate, with_strides
from gemma2_ext import reference
from host_cuda.emulator import assert_needed, check_schedules, guarded, launch, places


def add_rms_norm(
    x: Tensor, residual: Tensor, post: Tensor, pre: Tensor, offset: int = 0, **options: Any
) -> tuple[Tensor, Tensor]:
    outs = guarded(x.shape, x.dtype, offset=offset), guarded(x.shape, x.dtype, offset=offset)
    launch(
        "add_rms_norm",
        x=x,
        x_stride=x.stride(0),
        residual=residual,
        residual_stride=residual.stride(0),
        post_weight=post,
        pre_weight=pre,
        residual_out=outs[0],
        out=outs[1],
        rows=x.shape[0],
        hidden_size=x.shape[1],
        eps=1e-6,
        dtype=x.dtype,
        weight_dtype=post.dtype,
        **options,
    )
    return outs


def tensors(rows: int, size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    shapes = ((rows, size), (rows, size), (size,), (size,))
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [1, 7, 8, 41, 111, 2304])
@pytest.mark.parametrize("rows", [3, 33])  # few and, for the emulated device, many
def test_value(dtype: torch.dtype, hidden_size: int, rows: int) -> None:
    x, residual, post, pre = tensors(rows, hidden_size, dtype)
    r, out = check_schedules(lambda **options: add_rms_norm(x, residual, post, pre, **options))
    assert_accurate(r, lambda *t: reference.add_rms_norm(*t)[0], x, residual, post, pre)
    # The second norm is of the rounded sum.
    assert_accurate(out, reference.rms_norm, r, pre)


@pytest.mark.parametrize("rows", [2, 33])
def test_rows_beyond_the_registers(rows: int) -> None:
    x, residual, post, pre = tensors(rows, 20000, torch.float32)
    r, out = add_rms_norm(x, residual, post, pre)
    assert_accurate(r, lambda *t: reference.add_rms_norm(*t)[0], x, residual, post, pre)
    assert_accurate(out, reference.rms_norm, r, pre)


@pytest.mark.parametrize("layout", ["sliced", "unaligned"])
def test_strides(layout: str) -> None:
    given = tensors(5, 72, torch.bfloat16)
    expected = add_rms_norm(*given)
    for i in range(4):
        moved = [with_strides(t, layout) if i == j else t for j, t in enumerate(given)]
        for out, right in zip(add_rms_norm(*moved), expected, strict=True):
            assert torch.equal(out, right)
    for out, right in zip(add_rms_norm(*given, offset=1), expected, strict=True):
        assert torch.equal(out, right)


def test_every_barrier_is_needed() -> None:
    given = tensors(3, 600, torch.float32)
    run = lambda **options: add_rms_norm(*given, max_blocks=1, **options)  # noqa: E731
    assert len(places(run)) == 1
    for place in places(run):
        assert_needed(run, place)
