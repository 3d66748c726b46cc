"""rms_norm: x * rsqrt(mean(x^2) + eps) * (1 + weight)."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import check_tensor, refuse_backward, through_dispatcher

_op = torch.ops.gemma2_ext.rms_norm.default
_out_op = torch.ops.gemma2_ext.rms_norm_out.default


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """`x * rsqrt(mean(x**2, -1) + eps) * (1 + weight)`, computed in float32 and rounded once.

    Args:
        x: (..., hidden_size), float32, bfloat16 or float16, any strides.
        weight: (hidden_size,), any of those dtypes.
        eps: added to the mean of squares, at least 0.

    Returns:
        A contiguous tensor of x's shape and dtype.

    Raises:
        TypeError: x or weight is not a floating tensor of those dtypes.
        ValueError: weight's shape is not (hidden_size,), eps is negative, or devices differ.

    Source: Gemma 2 (arXiv 2408.00118); transformers `models/gemma2`, Gemma2RMSNorm.
    """
    check_tensor("rms_norm", "x", x)
    check_tensor("rms_norm", "weight", weight)
    if through_dispatcher(x, weight):
        return _op(x, weight, eps)
    out = x.new_empty(x.shape)
    _out_op(x, weight, eps, out)
    return out


@torch.library.register_fake("gemma2_ext::rms_norm")
def _(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("gemma2_ext::rms_norm_out")
def _(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    return None


refuse_backward("rms_norm")
