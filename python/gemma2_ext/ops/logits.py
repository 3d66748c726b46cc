"""logits: softcap * tanh(hidden @ weight^T / softcap), in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..quantize import QuantizedWeight
from ._common import cast_under_autocast, check_in_features, check_tensor, through_dispatcher
from ._quantized import soft_cap_gradient
from .linear import linear_backward
from .logits_int4 import logits_int4
from .logits_int8 import logits_int8

_op = torch.ops.gemma2_ext.logits.default
_out_op = torch.ops.gemma2_ext.logits_out.default


def logits(
    hidden: Tensor, weight: Tensor | QuantizedWeight, softcap: float | None = None
) -> Tensor:
    """`softcap * tanh(hidden @ weight.T / softcap)` from float32 sums, never rounded below that.

    Whoever trains on a loss of the logits saves their memory with `linear_cross_entropy` or
    `linear_distillation`.

    Args:
        hidden: (..., hidden_size), float32, bfloat16 or float16, any strides; float64, to check
            gradients with, goes through torch's product and gives float64.
        weight: (vocab_size, hidden_size), hidden's dtype, rows at any distance. Where the last
            dimension is strided, it is copied at every call. Or a QuantizedWeight: then this is
            `logits_int8` or `logits_int4`.
        softcap: positive; None leaves the products as they are.

    Returns:
        A contiguous float32 tensor (..., vocab_size).

    Raises:
        TypeError: hidden or weight is not a floating tensor of those dtypes.
        ValueError: weight's shape does not fit hidden's, dtypes or devices differ, or softcap is
            not positive and finite.

    Source: Gemma 2 (arXiv 2408.00118); transformers `models/gemma2`, Gemma2ForCausalLM, which
    rounds the product to the model's dtype first.
    """
    if isinstance(weight, QuantizedWeight):
        check_in_features("logits", "hidden", hidden, weight)
        op = logits_int8 if weight.format == "int8" else logits_int4
        return op(hidden, weight.data, weight.scales, softcap)
    check_tensor("logits", "hidden", hidden, float64=True)
    check_tensor("logits", "weight", weight, float64=True)
    if through_dispatcher(hidden, weight) or hidden.dim() < 1 or weight.dim() != 2:
        return _op(hidden, weight, softcap)
    out = _new_out(hidden, weight)
    _out_op(hidden, weight, softcap, out)
    return out


def _new_out(hidden: Tensor, weight: Tensor) -> Tensor:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_empty((*hidden.shape[:-1], weight.shape[0]), dtype=dtype)


@torch.library.register_fake("gemma2_ext::logits")
def _(hidden: Tensor, weight: Tensor, softcap: float | None = None) -> Tensor:
    return _new_out(hidden, weight)


@torch.library.register_fake("gemma2_ext::logits_out")
def _(hidden: Tensor, weight: Tensor, softcap: float | None, out: Tensor) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float | None], output: Tensor) -> None:
    hidden, weight, ctx.softcap = inputs
    ctx.save_for_backward(hidden, weight, *([] if ctx.softcap is None else [output]))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    hidden, weight, *out = ctx.saved_tensors
    if out:
        grad = soft_cap_gradient(grad, out[0], ctx.softcap)
    return *linear_backward(grad, hidden, weight, *ctx.needs_input_grad[:2]), None


torch.library.register_autograd("gemma2_ext::logits", _backward, setup_context=_setup_context)
cast_under_autocast("logits", 0, 1)
