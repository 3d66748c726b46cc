from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from common import DTYPES, assert_accurate, with_strides
from gemma2_ext import reference
from host_cuda.emulator import assert_needed, check_schedules, guarded, launch, places

MOST_BLOCKS, LEAST_ROWS = 128, 8  # csrc/params.h, norm_block_rows


def rms_norm_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, added: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    outs = guarded(x.shape, x.dtype), guarded(weight.shape, weight.dtype)
    rows = max(LEAST_ROWS, -(-x.shape[0] // MOST_BLOCKS))
    partial = torch.full((-(-x.shape[0] // rows), x.shape[1]), float("nan"))
    launch(
        "rms_norm_backward",
        grad_out=grad_out,
        grad_out_stride=grad_out.stride(0),
        x=x,
        x_stride=x.stride(0),
        weight=weight,
        grad_x=outs[0],
        grad_weight=outs[1],
        partial=partial,
        rows=x.shape[0],
        hidden_size=x.shape[1],
        eps=1e-6,
        dtype=x.dtype,
        weight_dtype=weight.dtype,
        **({} if added is None else {"added": added, "added_stride": added.stride(0)}),
        **options,
    )
    return outs


def expected(which: int, grad_out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
    return torch.autograd.grad(reference.rms_norm(*inputs), inputs, grad_out)[which]


def tensors(rows: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((rows, size), (rows, size), (size,))
    grad_out, x, weight = (torch.randn(shape).to(dtype) for shape in shapes)
    return grad_out, x, weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [7, 41, 2304])
@pytest.mark.parametrize("rows", [1, 21])
def test_value(dtype: torch.dtype, hidden_size: int, rows: int) -> None:
    given = tensors(rows, hidden_size, dtype)
    outs = check_schedules(lambda **options: rms_norm_backward(*given, **options))
    for which, out in enumerate(outs):
        # grad_x is a difference: where hidden_size is small its terms nearly cancel.
        assert_accurate(
            out, lambda *t, which=which: expected(which, *t), *given, roundings=8, loosen=4
        )


def test_no_rows() -> None:
    grad_x, grad_weight = rms_norm_backward(*tensors(0, 41, torch.bfloat16))
    assert grad_x.shape == (0, 41)
    assert torch.equal(grad_weight, torch.zeros_like(grad_weight))


def test_one_column() -> None:
    """grad_x is s (g - g x^2 / (x^2 + eps)): all but eps / x^2 of its terms cancels."""
    grad_out, x, weight = tensors(21, 1, torch.float32)
    grad_x, grad_weight = rms_norm_backward(grad_out, x, weight)
    exact = expected(0, grad_out.double(), x.double(), weight.double())
    terms = grad_out * (1 + weight) * (x * x + 1e-6).rsqrt()
    assert ((grad_x.double() - exact).abs() <= 8 * 2**-23 * terms.abs()).all()
    assert_accurate(grad_weight, lambda *t: expected(1, *t), grad_out, x, weight, roundings=8)


def test_another_gradient_is_added() -> None:
    given, added = tensors(5, 72, torch.float32), torch.randn(5, 72)
    alone, _ = rms_norm_backward(*given)
    both, _ = rms_norm_backward(*given, added=added)
    torch.testing.assert_close(both, alone + added)


def test_rows_beyond_the_registers() -> None:
    given = tensors(9, 9000, torch.float32)
    for which, out in enumerate(rms_norm_backward(*given)):
        assert_accurate(out, lambda *t, which=which: expected(which, *t), *given, roundings=8)


def test_strides() -> None:
    given = tensors(5, 72, torch.bfloat16)
    right = rms_norm_backward(*given)
    for layout in ("sliced", "unaligned"):
        moved = (with_strides(t, layout) for t in given)
        for out, same in zip(rms_norm_backward(*moved), right, strict=True):
            assert torch.equal(out, same)


def test_every_barrier_is_needed() -> None:
    given = tensors(10, 600, torch.float32)
    run = lambda **options: rms_norm_backward(*given, **options)  # noqa: E731
    assert len(places(run)) == 2
    for place in places(run):
        assert_needed(run, place)
