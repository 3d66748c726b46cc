"""attention: softmax(mask(softcap * tanh(scale * q k^T / softcap))) v."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common import (
    backward_op,
    check_integers,
    check_tensor,
    differentiable,
    narrow,
    needs_gradient,
    new_like,
)

_op = torch.ops.gemma2_ext.attention.default
_out_op = torch.ops.gemma2_ext.attention_out.default


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    causal: bool = True,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`softmax(mask(softcap * tanh(scale * q k^T / softcap))) v`, with grouped queries.

    Row b's valid keys are [key_starts[b], key_lengths[b]); what k and v hold elsewhere is ignored,
    NaN included. Query i stands at position `key_lengths[b] - seqlen_q + i` (seqlen_k where
    key_lengths is None). Causal: it sees key j if j <= position; window: if j > position - window.
    Scores and sums are float32; no score matrix is stored.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), float32, bfloat16 or float16, any strides;
            head_dim a multiple of 8 from 8 to 256. (float64, slow, for checks of gradients.)
        k: (batch, seqlen_k, num_kv_heads, head_dim), q's dtype, num_kv_heads a divisor of
            num_heads. Under autocast q, k and v in float32 are rounded to autocast's dtype.
        v: k's shape and dtype.
        scale: of the scores, query_pre_attn_scalar ** -0.5 in Gemma 2.
        softcap: bound of the scaled scores, or None.
        window: number of keys that a query sees, itself included, or None for all.
        causal: whether a query is kept from later keys.
        key_lengths: (batch,) int32 or int64, end of each row's keys; None: seqlen_k.
        key_starts: (batch,) int32 or int64, start of each row's keys; None: 0.
        return_lse: whether to return the logarithm of the softmax's denominator too.

    Returns:
        A contiguous tensor of q's shape and dtype, 0 in a row that sees no key; with return_lse
        also lse, (batch, num_heads, seqlen_q), float32, natural logarithm, -inf in such a row.
        Both have gradients, which are 0 in a row or a key without its counterpart.

    Raises:
        TypeError: q, k or v is not a floating tensor of those dtypes, or lengths are no tensor.
        ValueError: shapes, dtypes or devices do not fit; scale is not finite, or softcap not
            positive and finite; window is below 1 or goes with causal=False; lengths or starts are
            out of range (on a GPU, where looking at them would wait for it, they are clamped
            instead).
        NotImplementedError: a second derivative is asked for.

    Source: FlashAttention-2 (arXiv 2307.08691); transformers `models/gemma2`,
    eager_attention_forward.
    """
    check_tensor("attention", "q", q, float64=True)
    check_tensor("attention", "k", k, float64=True)
    check_tensor("attention", "v", v, float64=True)
    check_integers("attention", "key_lengths", key_lengths)
    check_integers("attention", "key_starts", key_starts)
    q, k, v = narrow(q, k, v)
    needs = needs_gradient(q, k, v)
    out, lse = _form(q, k, v)(
        q,
        k,
        v,
        key_lengths,
        key_starts,
        scale=scale,
        softcap=softcap,
        window=window,
        causal=causal,
        return_lse=return_lse or needs,  # which the backward reads
    )
    return (out, lse) if return_lse else out


def _run(
    q: Tensor, *others: Tensor | int | None, return_lse: bool, **options: Any
) -> tuple[Tensor, Tensor | None]:
    out = new_like(q)
    lse = q.new_empty(_lse_shape(q), dtype=_lse_dtype(q)) if return_lse else None
    _out_op(q, *others, **options, out=out, lse=lse)
    return out, lse


def _lse_shape(q: Tensor) -> tuple[int, ...]:
    return (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (0,)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@torch.library.register_fake("gemma2_ext::attention")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    causal: bool = True,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    lse_shape = _lse_shape(q) if return_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=_lse_dtype(q))


@torch.library.register_fake("gemma2_ext::attention_out")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    key_starts: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    causal: bool,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    return None


def _allocate(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return new_like(q), new_like(k), new_like(v)


_backward_op = backward_op("attention", _allocate)


def _setup_context(
    ctx: Any,
    inputs: tuple[Any, ...],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, Tensor],
) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.options = keyword_only_inputs


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, key_lengths, key_starts, out, lse = ctx.saved_tensors
    options = ctx.options
    if not options["return_lse"]:
        # The op was called by itself, without what its backward reads.
        with torch.no_grad():
            lse = _op(q, k, v, key_lengths, key_starts, **{**options, "return_lse": True})[1]
        grad_lse = torch.zeros_like(lse)
    grads = _backward_op(
        *(grad_out, grad_lse, q, k, v, out, lse, key_lengths, key_starts),
        options["scale"],
        options["softcap"],
        options["window"],
        options["causal"],
    )
    return *grads, None, None


_form = differentiable("attention", _run, _setup_context, _backward)
