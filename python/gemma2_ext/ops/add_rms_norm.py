"""add_rms_norm: r = residual + norm(x; post_weight), and norm(r; pre_weight)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common import backward_op, check_tensor, differentiable, new_like, promote

_out_op = torch.ops.gemma2_ext.add_rms_norm_out.default


def add_rms_norm(
    x: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`r = residual + norm(x; post_weight)`, and `norm(r; pre_weight)`.

    `norm(x; w) = x * rsqrt(mean(x**2, -1) + eps) * (1 + w)`, in float32. The first norm and r are
    each rounded to x's dtype, and the second norm is of the rounded r, as in transformers.

    Args:
        x: (..., hidden_size), a sub-layer's output; float32, bfloat16 or float16, any strides.
            (float64, slow, for checks of gradients.)
        residual: x's shape and dtype, the stream that it is added to, any strides. Under autocast
            the dtypes may differ: both are widened to the wider one.
        post_weight: (hidden_size,), of the norm behind the sub-layer, any of those dtypes; with
            float64 the same.
        pre_weight: (hidden_size,), of the norm before the next one, post_weight's dtype.
        eps: of both norms, at least 0.

    Returns:
        (r, normed r), contiguous tensors of x's shape and dtype (or the wider one).

    Raises:
        TypeError: an argument is not a floating tensor of those dtypes.
        ValueError: shapes, dtypes or devices do not fit, or eps is negative.
        NotImplementedError: a second derivative is asked for.

    Source: Gemma 2 (arXiv 2408.00118); transformers `models/gemma2`, Gemma2DecoderLayer.
    """
    tensors = {
        "x": x,
        "residual": residual,
        "post_weight": post_weight,
        "pre_weight": pre_weight,
    }
    for name, tensor in tensors.items():
        check_tensor("add_rms_norm", name, tensor, float64=True)
    x, residual = promote(x, residual)
    return _form(x, residual, post_weight, pre_weight)(x, residual, post_weight, pre_weight, eps)


def _run(
    x: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    residual_out, out = new_like(x), new_like(x)
    _out_op(x, residual, post_weight, pre_weight, eps, residual_out, out)
    return residual_out, out


@torch.library.register_fake("gemma2_ext::add_rms_norm")
def _(
    x: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.register_fake("gemma2_ext::add_rms_norm_out")
def _(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    pre_weight: Tensor,
    eps: float,
    residual_out: Tensor,
    out: Tensor,
) -> None:
    return None


def _allocate(
    grad_residual_out: Tensor,
    grad_out: Tensor,
    x: Tensor,
    residual_out: Tensor,
    post_weight: Tensor,
    pre_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return new_like(x), new_like(x), new_like(post_weight), new_like(pre_weight)


_backward_op = backward_op("add_rms_norm", _allocate)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, post_weight, pre_weight, ctx.eps = inputs
    ctx.save_for_backward(x, output[0], post_weight, pre_weight)


def _backward(ctx: Any, grad_residual_out: Tensor, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward_op(grad_residual_out, grad_out, *ctx.saved_tensors, ctx.eps), None


_form = differentiable("add_rms_norm", _run, _setup_context, _backward)
