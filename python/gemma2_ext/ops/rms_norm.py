"""rms_norm: x * rsqrt(mean(x^2) + eps) * (1 + weight)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common import backward_op, check_tensor, differentiable, new_like

_out_op = torch.ops.gemma2_ext.rms_norm_out.default


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """`x * rsqrt(mean(x**2, -1) + eps) * (1 + weight)`, computed in float32 and rounded once.

    Args:
        x: (..., hidden_size), float32, bfloat16 or float16, any strides. (float64, slow, for
            checks of gradients.)
        weight: (hidden_size,), any of those dtypes; with float64 the same.
        eps: added to the mean of squares, at least 0.

    Returns:
        A contiguous tensor of x's shape and dtype.

    Raises:
        TypeError: x or weight is not a floating tensor of those dtypes.
        ValueError: weight's shape is not (hidden_size,), eps is negative, or devices differ.
        NotImplementedError: a second derivative is asked for.

    Source: Gemma 2 (arXiv 2408.00118); transformers `models/gemma2`, Gemma2RMSNorm.
    """
    check_tensor("rms_norm", "x", x, float64=True)
    check_tensor("rms_norm", "weight", weight, float64=True)
    return _form(x, weight)(x, weight, eps)


def _run(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = new_like(x)
    _out_op(x, weight, eps, out)
    return out


@torch.library.register_fake("gemma2_ext::rms_norm")
def _(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("gemma2_ext::rms_norm_out")
def _(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    return None


def _allocate(grad_out: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return new_like(x), new_like(weight)


_backward_op = backward_op("rms_norm", _allocate)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    return *_backward_op(grad_out, x, weight, ctx.eps), None


_form = differentiable("rms_norm", _run, _setup_context, _backward)
