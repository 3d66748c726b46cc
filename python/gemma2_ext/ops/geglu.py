"""geglu: gelu_tanh(gate) * up."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import check_tensor, refuse_backward, through_dispatcher

_op = torch.ops.gemma2_ext.geglu.default
_out_op = torch.ops.gemma2_ext.geglu_out.default


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """`gelu_tanh(gate) * up`, gelu_tanh(g) = g/2 (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3))).

    Computed in float32 and rounded once. Two halves of one wider tensor are read where they are.

    Args:
        gate: (..., intermediate_size), float32, bfloat16 or float16, any strides.
        up: gate's shape and dtype, any strides.

    Returns:
        A contiguous tensor of gate's shape and dtype.

    Raises:
        TypeError: gate or up is not a floating tensor of those dtypes.
        ValueError: shapes, dtypes or devices differ, or gate is a scalar.

    Source: Gemma 2 (arXiv 2408.00118); transformers `models/gemma2`, Gemma2MLP.
    """
    check_tensor("geglu", "gate", gate)
    check_tensor("geglu", "up", up)
    if through_dispatcher(gate, up):
        return _op(gate, up)
    out = gate.new_empty(gate.shape)
    _out_op(gate, up, out)
    return out


@torch.library.register_fake("gemma2_ext::geglu")
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.register_fake("gemma2_ext::geglu_out")
def _(gate: Tensor, up: Tensor, out: Tensor) -> None:
    return None


refuse_backward("geglu")
