"""Operands for the ops over packed weights, and how far a product with them may be off."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma2_ext import QuantizedWeight, ops
from gemma2_ext.quantize import Format
from products import product_bound

# One row, chunks and their remainders.
ROWS = [0, 1, 2, 3, 7, 16, 17, 64, 65, 130]
# Blocks of 16 rows and pieces of 32 columns, and their edges; the last in several parts.
SHAPES = [
    *[(1, 1), (1, 40), (15, 32), (16, 31), (17, 33), (48, 64), (100, 111), (33, 2304)],
    (48, 6530),
]


def packed(out_features: int, in_features: int, format: Format) -> QuantizedWeight:
    weight = torch.randn(out_features, in_features) / max(in_features, 1) ** 0.5
    return ops.quantize(weight, format)


def exact_x(rows: int, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """x whose values 8 bits hold exactly: integers, 127 the first of every 32, times a power of 2.
    (bfloat16 and float16 hold them too.)"""
    x = torch.randint(-127, 128, (rows, in_features)).float()
    x[:, ::32] = torch.where(torch.rand(rows, -(-in_features // 32)) < 0.5, -127.0, 127.0)
    return (x / 64).to(dtype)


def assert_exact(
    actual: Tensor, x: Tensor, weight: QuantizedWeight, softcap: float | None = None
) -> None:
    """Asserts that `actual` is x @ weight.T within float32's roundings, for x of `exact_x`."""
    wide, dense = x.double(), weight.dequantize().double()
    if x.is_cuda and x.dtype != torch.float32 and len(x) > 16:  # unpacked into x's dtype
        dense = weight.dequantize(x.dtype).double()
    expected = wide @ dense.T
    bound = product_bound(wide, dense)
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
        bound += 4 * 2.0**-23 * expected.abs()
    eps = torch.finfo(actual.dtype).eps
    bound += (eps / 2 + 2.0**-20) * expected.abs() + 2.0**-24
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs()
    assert (error <= bound).all(), f"{(error / bound).max().item():.2f} of the bound"


def assert_close(actual: Tensor, x: Tensor, weight: QuantizedWeight) -> None:
    """Asserts that `actual` is x @ weight.T but for x's rounding to 8 bits: half a step of the
    largest of 32 at most for each x, and in the mean 2.1 / 127 / 12 ** 0.5 = 0.5 %."""
    wide, dense = x.double(), weight.dequantize().double()
    expected = wide @ dense.T
    padded = torch.nn.functional.pad(wide, (0, -x.shape[-1] % 32)).abs()
    largest = padded.unfold(1, 32, 32).amax(-1)
    steps = largest.repeat_interleave(32, 1)[:, : x.shape[-1]] / 127
    eps = torch.finfo(actual.dtype).eps
    bound = 0.501 * steps @ dense.abs().T + eps * expected.abs() + 1e-30
    error = (actual.double() - expected).abs()
    assert actual.shape == expected.shape
    assert (error <= bound + product_bound(wide, dense)).all()
    if actual.numel() >= 500 and x.shape[-1] >= 64:
        assert error.square().mean().sqrt() <= 0.006 * expected.square().mean().sqrt() + eps


def assert_logits_gradient(weight: QuantizedWeight, hidden: Tensor, softcap: float | None) -> None:
    """Asserts that the gradient of `ops.logits` to hidden is within float32's roundings and one to
    hidden's dtype. The soft-cap's slope 1 - (out / softcap)^2 is at most 1 and takes four."""
    leaf = hidden.requires_grad_()
    out = ops.logits(leaf, weight, softcap)
    grad = torch.randn_like(out)
    (actual,) = torch.autograd.grad(out, leaf, grad)
    assert actual.dtype == hidden.dtype
    wide, dense = grad.double(), weight.dequantize().double()
    if softcap is not None:
        wide = wide * (1 - (out.detach().double() / softcap) ** 2)
    expected = wide @ dense
    bound = product_bound(wide, dense.T) + 4 * 2.0**-24 * (grad.double().abs() @ dense.abs())
    bound += torch.finfo(actual.dtype).eps / 2 * expected.abs()
    bound += torch.finfo(actual.dtype).smallest_normal
    error = (actual.double() - expected).abs()
    assert (error <= bound).all(), f"{(error / bound).max().item():.2f} of the bound"
