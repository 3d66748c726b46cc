"""rope: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), angle = position * inv_freq."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common import (
    backward_op,
    check_integers,
    check_tensor,
    differentiable,
    new_like,
    promote,
)

_out_op = torch.ops.gemma2_ext.rope_out.default


def rope(q: Tensor, k: Tensor, positions: Tensor, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Rotates halves: `(x1 cos - x2 sin, x2 cos + x1 sin)`, angle = position * inv_freq.

    `inv_freq = 1 / theta ** (arange(0, head_dim, 2) / head_dim)`. Frequencies and angles are
    rounded to float32 as in transformers; the rest is in float32 and rounded once.

    Args:
        q: (batch, seqlen, num_heads, head_dim), float32, bfloat16 or float16, any strides;
            head_dim even. (float64, slow, for checks of gradients.)
        k: (batch, seqlen, num_kv_heads, head_dim), q's dtype, any strides. Under autocast the
            dtypes may differ: both are widened to the wider one.
        positions: (seqlen,) or (batch, seqlen), int64 or int32, any sign.
        theta: base of the frequencies.

    Returns:
        (q, k) rotated, new contiguous tensors of the same shapes and dtype.

    Raises:
        TypeError: q or k is not a floating tensor of those dtypes, or positions not an integer one.
        ValueError: shapes, dtypes or devices do not fit, head_dim is odd, or theta not positive.
        NotImplementedError: a second derivative is asked for.

    Source: Su et al. (arXiv 2104.09864), half-split form; transformers, apply_rotary_pos_emb.
    """
    check_tensor("rope", "q", q, float64=True)
    check_tensor("rope", "k", k, float64=True)
    q, k = promote(q, k)
    check_integers("rope", "positions", positions, required=True)
    return _form(q, k)(q, k, positions, theta)


def _run(q: Tensor, k: Tensor, positions: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    q_out, k_out = new_like(q), new_like(k)
    _out_op(q, k, positions, theta, q_out, k_out)
    return q_out, k_out


@torch.library.register_fake("gemma2_ext::rope")
def _(q: Tensor, k: Tensor, positions: Tensor, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.register_fake("gemma2_ext::rope_out")
def _(q: Tensor, k: Tensor, positions: Tensor, theta: float, q_out: Tensor, k_out: Tensor) -> None:
    return None


def _allocate(
    grad_q_out: Tensor, grad_k_out: Tensor, positions: Tensor, theta: float
) -> tuple[Tensor, Tensor]:
    return new_like(grad_q_out), new_like(grad_k_out)


_backward_op = backward_op("rope", _allocate)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    positions, ctx.theta = inputs[2:]
    ctx.save_for_backward(positions)


def _backward(ctx: Any, grad_q_out: Tensor, grad_k_out: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward_op(grad_q_out, grad_k_out, *ctx.saved_tensors, ctx.theta), None, None


_form = differentiable("rope", _run, _setup_context, _backward)
