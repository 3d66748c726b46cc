"""add_rms_norm_linear: add_rms_norm, and the product of the normed stream."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import check_tensor, refuse_backward, through_dispatcher

_op = torch.ops.gemma2_ext.add_rms_norm_linear.default
_out_op = torch.ops.gemma2_ext.add_rms_norm_linear_out.default


def add_rms_norm_linear(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    pre_weight: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    geglu: bool = False,
) -> tuple[Tensor, Tensor]:
    """`r, normed = add_rms_norm(x, residual, ...)`, and `linear(normed, weight)`.

    The same numbers as the two ops give one after the other. Of a single row of bfloat16 or
    float16, in a decoding step that is captured on a GPU of compute capability 9.0 or more, one
    kernel; elsewhere the two.

    Args:
        x: (..., hidden_size), a sub-layer's output; float32, bfloat16 or float16, any strides.
        residual: x's shape and dtype, the stream that it is added to.
        post_weight: (hidden_size,), of the norm behind the sub-layer, any of those dtypes.
        pre_weight: (hidden_size,), of the norm before the product, post_weight's dtype.
        weight: (out_features, hidden_size), x's dtype; with `geglu` (2 * out_features,
            hidden_size), gate above up.
        eps: of both norms, at least 0.
        geglu: whether the product is `linear_geglu` instead.

    Returns:
        (r, product): contiguous tensors of x's dtype, of x's shape and (..., out_features).

    Raises:
        TypeError: an argument is not a floating tensor of those dtypes.
        ValueError: shapes, dtypes or devices do not fit, or eps is negative.
        NotImplementedError: a gradient is asked for.

    Source: transformers `models/gemma2`, Gemma2DecoderLayer.
    """
    name = "add_rms_norm_linear"
    tensors = (x, residual, post_weight, pre_weight, weight)
    names = ("x", "residual", "post_weight", "pre_weight", "weight")
    for argument, tensor in zip(names, tensors, strict=True):
        check_tensor(name, argument, tensor)
    odd = geglu and weight.dim() == 2 and weight.shape[0] % 2 != 0
    if through_dispatcher(*tensors) or x.dim() < 1 or weight.dim() != 2 or odd:
        return _op(*tensors, eps, geglu)
    residual_out = x.new_empty(x.shape)
    out = x.new_empty((*x.shape[:-1], weight.shape[0] // (2 if geglu else 1)))
    _out_op(*tensors, eps, geglu, residual_out, out)
    return residual_out, out


@torch.library.register_fake("gemma2_ext::add_rms_norm_linear")
def _(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    pre_weight: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    geglu: bool = False,
) -> tuple[Tensor, Tensor]:
    out_features = weight.shape[0] // (2 if geglu else 1)
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("gemma2_ext::add_rms_norm_linear_out")
def _(
    x: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    pre_weight: Tensor,
    weight: Tensor,
    eps: float,
    geglu: bool,
    residual_out: Tensor,
    out: Tensor,
) -> None:
    return None


refuse_backward("add_rms_norm_linear")
