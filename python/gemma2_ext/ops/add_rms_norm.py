"""add_rms_norm: r = residual + norm(x; post_weight), and norm(r; pre_weight)."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import check_tensor, refuse_backward, through_dispatcher

_op = torch.ops.gemma2_ext.add_rms_norm.default
_out_op = torch.ops.gemma2_ext.add_rms_norm_out.default


def add_rms_norm(
    x: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`r = residual + norm(x; post_weight)`, and `norm(r; pre_weight)`.

    `norm(x; w) = x * rsqrt(mean(x**2, -1) + eps) * (1 + w)`, in float32. The first norm and r are
    each rounded to x's dtype, and the second norm is of the rounded r, as in transformers.

    Args:
        x: (..., hidden_size), a sub-layer's output; float32, bfloat16 or float16, any strides.
        residual: x's shape and dtype, the stream that it is added to, any strides.
        post_weight: (hidden_size,), of the norm behind the sub-layer, any of those dtypes.
        pre_weight: (hidden_size,), of the norm before the next one, post_weight's dtype.
        eps: of both norms, at least 0.

    Returns:
        (r, normed r), contiguous tensors of x's shape and dtype.

    Raises:
        TypeError: an argument is not a floating tensor of those dtypes.
        ValueError: shapes, dtypes or devices do not fit, or eps is negative.

    Source: Gemma 2 (arXiv 2408.00118); transformers `models/gemma2`, Gemma2DecoderLayer.
    """
    tensors = {
        "x": x,
        "residual": residual,
        "post_weight": post_weight,
        "pre_weight": pre_weight,
    }
    for name, tensor in tensors.items():
        check_tensor("add_rms_norm", name, tensor)
    if through_dispatcher(x, residual, post_weight, pre_weight):
        return _op(x, residual, post_weight, pre_weight, eps)
    residual_out, out = x.new_empty(x.shape), x.new_empty(x.shape)
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


refuse_backward("add_rms_norm")
