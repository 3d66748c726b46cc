"""linear: x @ weight^T."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantize import QuantizedWeight
from ._common import check_in_features, check_tensor, refuse_backward, through_dispatcher
from .linear_int4 import linear_int4
from .linear_int8 import linear_int8

_op = torch.ops.gemma2_ext.linear.default
_out_op = torch.ops.gemma2_ext.linear_out.default


def linear(x: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    """`x @ weight.T`, summed in float32 and rounded once.

    Up to 16 rows a row's result does not depend on the rows beside it, and none depends on the
    number of threads. On processors with AVX512_BF16, bfloat16 from 32 rows on goes through
    torch's GEMM, which promises neither.

    Args:
        x: (..., in_features), float32, bfloat16 or float16, any strides.
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
    check_tensor("linear", "x", x)
    check_tensor("linear", "weight", weight)
    if through_dispatcher(x, weight) or x.dim() < 1 or weight.dim() != 2:
        return _op(x, weight)
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    _out_op(x, weight, out)
    return out


@torch.library.register_fake("gemma2_ext::linear")
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("gemma2_ext::linear_out")
def _(x: Tensor, weight: Tensor, out: Tensor) -> None:
    return None


refuse_backward("linear")
