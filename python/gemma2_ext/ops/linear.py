"""linear: x @ weight^T."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..quantize import QuantizedWeight
from ._common import (
    cast_under_autocast,
    check_in_features,
    check_tensor,
    differentiable,
    refuse_gradient,
)
from .linear_int4 import linear_int4
from .linear_int8 import linear_int8

_op = torch.ops.gemma2_ext.linear.default
_out_op = torch.ops.gemma2_ext.linear_out.default
_backward_op = torch.ops.gemma2_ext.linear_backward_out.default


def linear(x: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    """`x @ weight.T`, summed in float32 and rounded once.

    A row's result depends neither on the rows beside it, up to 16 of them and from 17 on, nor on
    the number of threads; the same holds for the gradients `grad_x = grad weight` and
    `grad_weight = grad^T x`. Torch's GEMM, which promises neither, serves the gradients of
    bfloat16 where the processor has AVX512_BF16 and is not Intel's.

    Args:
        x: (..., in_features), float32, bfloat16 or float16, any strides; float64, to check
            gradients with, goes through torch's product.
        weight: (out_features, in_features), x's dtype, rows at any distance. Where the last
            dimension is strided, it is copied at every call. Or a QuantizedWeight: then this is
            `linear_int8` or `linear_int4`.

    Returns:
        A contiguous tensor (..., out_features) of x's dtype.

    Raises:
        TypeError: x or weight is not a floating tensor of those dtypes.
        ValueError: weight's shape does not fit x's, or dtypes or devices differ.

    Source: torch.nn.functional.linear, without bias (Gemma 2 has none).
    """
    if isinstance(weight, QuantizedWeight):
        check_in_features("linear", "x", x, weight)
        op = linear_int8 if weight.format == "int8" else linear_int4
        return op(x, weight.data, weight.scales)
    check_tensor("linear", "x", x, float64=True)
    check_tensor("linear", "weight", weight, float64=True)
    if x.dim() < 1 or weight.dim() != 2:
        return _op(x, weight)  # which tells
    return _form(x, weight)(x, weight)


def _run(x: Tensor, weight: Tensor) -> Tensor:
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    _out_op(x, weight, out)
    return out


@torch.library.register_fake("gemma2_ext::linear")
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("gemma2_ext::linear_out")
def _(x: Tensor, weight: Tensor, out: Tensor) -> None:
    return None


@torch.library.register_fake("gemma2_ext::linear_backward_out")
def _(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    return None


def linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and weight that are needed; grad in x's dtype or float32."""
    grad_x = x.new_empty(x.shape) if need_x else None
    grad_weight = weight.new_empty(weight.shape) if need_weight else None
    _backward_op(grad, x, weight, grad_x, grad_weight)
    return grad_x, grad_weight


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    return linear_backward(grad, *ctx.saved_tensors, *ctx.needs_input_grad[:2])


_form = differentiable("linear", _run, _setup_context, _backward)
refuse_gradient("linear_backward_out", "gemma2_ext::linear has no second derivative")
cast_under_autocast("linear", 0, 1)
