"""attention: softmax(mask(softcap * tanh(scale * q k^T / softcap))) v."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import check_integers, check_tensor, refuse_backward, through_dispatcher

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
            head_dim a multiple of 8 from 8 to 256.
        k: (batch, seqlen_k, num_kv_heads, head_dim), q's dtype, num_kv_heads a divisor of
            num_heads.
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

    Raises:
        TypeError: q, k or v is not a floating tensor of those dtypes, or lengths are no tensor.
        ValueError: shapes, dtypes or devices do not fit; scale or softcap is no positive number;
            window is below 1 or goes with causal=False; lengths or starts are out of range.
        NotImplementedError: a gradient is asked for.

    Source: FlashAttention-2 (arXiv 2307.08691); transformers `models/gemma2`,
    eager_attention_forward.
    """
    check_tensor("attention", "q", q)
    check_tensor("attention", "k", k)
    check_tensor("attention", "v", v)
    check_integers("attention", "key_lengths", key_lengths)
    check_integers("attention", "key_starts", key_starts)
    if through_dispatcher(q, k, v):
        out, lse = _op(
            q,
            k,
            v,
            key_lengths,
            key_starts,
            scale=scale,
            softcap=softcap,
            window=window,
            causal=causal,
            return_lse=return_lse,
        )
        return (out, lse) if return_lse else out
    out = q.new_empty(q.shape)
    lse = None
    if return_lse:
        lse = q.new_empty(_lse_shape(q), dtype=torch.float32)
    _out_op(
        q,
        k,
        v,
        key_lengths,
        key_starts,
        scale=scale,
        softcap=softcap,
        window=window,
        causal=causal,
        out=out,
        lse=lse,
    )
    return out if lse is None else (out, lse)


def _lse_shape(q: Tensor) -> tuple[int, ...]:
    return (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (0,)


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
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


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


refuse_backward("attention")
