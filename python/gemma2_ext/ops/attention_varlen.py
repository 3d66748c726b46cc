"""attention_varlen: attention of each of several sequences packed one behind another."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import check_integers, check_tensor, refuse_backward, through_dispatcher

_op = torch.ops.gemma2_ext.attention_varlen.default
_out_op = torch.ops.gemma2_ext.attention_varlen_out.default


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    causal: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of each of several sequences packed one behind another.

    Sequence b has rows [cu_seqlens_q[b], cu_seqlens_q[b + 1]) of q and the like of k and v; its
    last query stands at its last key, as in `attention`.

    Args:
        q: (total_q, num_heads, head_dim), float32, bfloat16 or float16, any strides; head_dim a
            multiple of 8 from 8 to 256.
        k: (total_k, num_kv_heads, head_dim), q's dtype, num_kv_heads a divisor of num_heads.
        v: k's shape and dtype.
        cu_seqlens_q: (batch + 1,) int32 or int64, from 0, ascending, at most total_q.
        cu_seqlens_k: likewise for k and v, at most total_k.
        max_seqlen_q: at least the longest sequence of q.
        max_seqlen_k: likewise for k.
        scale, softcap, window, causal: as in `attention`.
        return_lse: whether to return the logarithm of the softmax's denominator too.

    Returns:
        A contiguous tensor of q's shape and dtype, 0 in rows that see no key or belong to no
        sequence; with return_lse also lse, (num_heads, total_q), float32, -inf in such rows.

    Raises:
        TypeError: q, k or v is not a floating tensor of those dtypes, or cu_seqlens are no tensor.
        ValueError: shapes, dtypes or devices do not fit; scale or softcap is no positive number;
            window is below 1 or goes with causal=False; cu_seqlens are out of order or range; a
            sequence is longer than max_seqlen_q or max_seqlen_k.
        NotImplementedError: a gradient is asked for.

    Source: FlashAttention-2 (arXiv 2307.08691) and its varlen interface.
    """
    check_tensor("attention_varlen", "q", q)
    check_tensor("attention_varlen", "k", k)
    check_tensor("attention_varlen", "v", v)
    check_integers("attention_varlen", "cu_seqlens_q", cu_seqlens_q, required=True)
    check_integers("attention_varlen", "cu_seqlens_k", cu_seqlens_k, required=True)
    if through_dispatcher(q, k, v):
        out, lse = _op(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
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
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale=scale,
        softcap=softcap,
        window=window,
        causal=causal,
        out=out,
        lse=lse,
    )
    return out if lse is None else (out, lse)


def _lse_shape(q: Tensor) -> tuple[int, ...]:
    return (q.shape[1], q.shape[0]) if q.dim() == 3 else (0,)


@torch.library.register_fake("gemma2_ext::attention_varlen")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    causal: bool = True,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    lse_shape = _lse_shape(q) if return_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


@torch.library.register_fake("gemma2_ext::attention_varlen_out")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    causal: bool,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    return None


refuse_backward("attention_varlen")
