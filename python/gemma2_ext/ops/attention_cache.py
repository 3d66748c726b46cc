"""attention_cache: causal attention over a full or ring cache of keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import (
    check_cache,
    check_integers,
    check_tensor,
    new_like,
    refuse_backward,
    through_dispatcher,
)

_op = torch.ops.gemma2_ext.attention_cache.default
_out_op = torch.ops.gemma2_ext.attention_cache_out.default


def attention_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    key_lengths: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """`softmax(mask(softcap * tanh(scale * q k^T / softcap))) v` over the keys of a cache.

    Position p of a row is in slot `p % capacity`, so the last `capacity` positions exist. Query i
    stands at position `key_lengths[b] - seqlen_q + i` and sees key j if j <= position and, with a
    window, j > position - window. Slots that no query sees are never read.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), float32, bfloat16 or float16, any strides;
            head_dim a multiple of 8 from 8 to 256.
        k_cache: (batch, capacity, num_kv_heads, head_dim), q's dtype or int8 as
            `rope_append_cache` writes it; num_kv_heads a divisor of num_heads.
        v_cache: k_cache's shape and dtype.
        key_lengths: (batch,) int32 or int64, positions written so far, q's own included.
        scale: of the scores, query_pre_attn_scalar ** -0.5 in Gemma 2.
        softcap: bound of the scaled scores, or None.
        window: number of keys that a query sees, itself included, or None for all.
        k_scales: (batch, capacity, num_kv_heads) float32, any strides, what the rows of an int8
            k_cache are multiplied by; None otherwise.
        v_scales: likewise of v_cache.

    Returns:
        A contiguous tensor of q's shape and dtype; 0 where a position is negative (padding).

    Raises:
        TypeError: q or a cache is not a floating tensor of those dtypes, or key_lengths is none.
        ValueError: shapes, dtypes or devices do not fit; scale or softcap is no positive number;
            window is below 1; key_lengths is negative, or exceeds the capacity where there is no
            window or window + seqlen_q - 1 exceeds it too, as keys that are seen are overwritten
            (not checked on a GPU: the last `capacity` keys are all that a query sees); scales are
            missing or too many.
        NotImplementedError: a gradient is asked for.

    Source: FlashAttention-2 (arXiv 2307.08691); Flash-Decoding for the split over keys.
    """
    check_tensor("attention_cache", "q", q)
    check_cache("attention_cache", k_cache, v_cache, k_scales, v_scales)
    check_integers("attention_cache", "key_lengths", key_lengths, required=True)
    inputs = (q, k_cache, v_cache, key_lengths, k_scales, v_scales)
    if through_dispatcher(q, k_cache, v_cache):
        return _op(*inputs, scale=scale, softcap=softcap, window=window)
    out = new_like(q)
    _out_op(*inputs, scale=scale, softcap=softcap, window=window, out=out)
    return out


@torch.library.register_fake("gemma2_ext::attention_cache")
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    key_lengths: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.register_fake("gemma2_ext::attention_cache_out")
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    key_lengths: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    out: Tensor,
) -> None:
    return None


refuse_backward("attention_cache")
