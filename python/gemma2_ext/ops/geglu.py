"""geglu: gelu_tanh(gate) * up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common import backward_op, check_tensor, differentiable, new_like, promote

_out_op = torch.ops.gemma2_ext.geglu_out.default


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """`gelu_tanh(gate) * up`, gelu_tanh(g) = g/2 (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3))).

    Computed in float32 and rounded once. Two halves of one wider tensor are read where they are.

    Args:
        gate: (..., intermediate_size), float32, bfloat16 or float16, any strides. (float64, slow,
            for checks of gradients.)
        up: gate's shape and dtype, any strides. Under autocast the dtypes may differ: both are
            widened to the wider one.

    Returns:
        A contiguous tensor of gate's shape and dtype.

    Raises:
        TypeError: gate or up is not a floating tensor of those dtypes.
        ValueError: shapes, dtypes or devices differ, or gate is a scalar.
        NotImplementedError: a second derivative is asked for.

    Source: Gemma 2 (arXiv 2408.00118); transformers `models/gemma2`, Gemma2MLP.
    """
    check_tensor("geglu", "gate", gate, float64=True)
    check_tensor("geglu", "up", up, float64=True)
    gate, up = promote(gate, up)
    return _form(gate, up)(gate, up)


def _run(gate: Tensor, up: Tensor) -> Tensor:
    out = new_like(gate)
    _out_op(gate, up, out)
    return out


@torch.library.register_fake("gemma2_ext::geglu")
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.register_fake("gemma2_ext::geglu_out")
def _(gate: Tensor, up: Tensor, out: Tensor) -> None:
    return None


def _allocate(grad_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return new_like(gate), new_like(up)


_backward_op = backward_op("geglu", _allocate)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, ...]:
    return _backward_op(grad_out, *ctx.saved_tensors)


_form = differentiable("geglu", _run, _setup_context, _backward)
