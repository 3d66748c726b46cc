"""linear_geglu: gelu_tanh(x @ gate^T) * (x @ up^T), for gate and up stacked into one matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import (
    cast_under_autocast,
    check_tensor,
    refuse_backward,
    through_dispatcher,
)

_op = torch.ops.gemma2_ext.linear_geglu.default
_out_op = torch.ops.gemma2_ext.linear_geglu_out.default


def linear_geglu(x: Tensor, weight: Tensor) -> Tensor:
    """`gelu_tanh(x @ gate.T) * (x @ up.T)`, where weight is gate above up.

    On a GPU, for 16 rows of bfloat16 or float16 or fewer, one kernel whose products are never
    rounded; elsewhere `linear` followed by `geglu`.

    Args:
        x: (..., in_features), float32, bfloat16 or float16, any strides.
        weight: (2 * out_features, in_features), x's dtype, rows at any distance. Where the last
            dimension is strided, it is copied at every call.

    Returns:
        A contiguous tensor (..., out_features) of x's dtype.

    Raises:
        TypeError: x or weight is not a floating tensor of those dtypes.
        ValueError: weight's shape does not fit x's, it has an odd number of rows, or dtypes or
            devices differ.
        NotImplementedError: a gradient is asked for.

    Source: transformers `models/gemma2`, Gemma2MLP without its last product.
    """
    check_tensor("linear_geglu", "x", x)
    check_tensor("linear_geglu", "weight", weight)
    if through_dispatcher(x, weight) or x.dim() < 1 or weight.dim() != 2 or weight.shape[0] % 2:
        return _op(x, weight)
    out = x.new_empty((*x.shape[:-1], weight.shape[0] // 2))
    _out_op(x, weight, out)
    return out


@torch.library.register_fake("gemma2_ext::linear_geglu")
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


@torch.library.register_fake("gemma2_ext::linear_geglu_out")
def _(x: Tensor, weight: Tensor, out: Tensor) -> None:
    return None


refuse_backward("linear_geglu")
cast_under_autocast("linear_geglu", 0, 1)
