"""logits: softcap * tanh(hidden @ weight^T / softcap), in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantize import QuantizedWeight
from ._common import check_in_features, check_tensor, refuse_backward, through_dispatcher
from .logits_int4 import logits_int4
from .logits_int8 import logits_int8

_op = torch.ops.gemma2_ext.logits.default
_out_op = torch.ops.gemma2_ext.logits_out.default


def logits(
    hidden: Tensor, weight: Tensor | QuantizedWeight, softcap: float | None = None
) -> Tensor:
    """`softcap * tanh(hidden @ weight.T / softcap)` from float32 sums, never rounded below that.

    Args:
        hidden: (..., hidden_size), float32, bfloat16 or float16, any strides.
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
    check_tensor("logits", "hidden", hidden)
    check_tensor("logits", "weight", weight)
    if through_dispatcher(hidden, weight) or hidden.dim() < 1 or weight.dim() != 2:
        return _op(hidden, weight, softcap)
    out = hidden.new_empty((*hidden.shape[:-1], weight.shape[0]), dtype=torch.float32)
    _out_op(hidden, weight, softcap, out)
    return out


@torch.library.register_fake("gemma2_ext::logits")
def _(hidden: Tensor, weight: Tensor, softcap: float | None = None) -> Tensor:
    return hidden.new_empty((*hidden.shape[:-1], weight.shape[0]), dtype=torch.float32)


@torch.library.register_fake("gemma2_ext::logits_out")
def _(hidden: Tensor, weight: Tensor, softcap: float | None, out: Tensor) -> None:
    return None


refuse_backward("logits")
