"""attention_append_cache: rope_append_cache and attention_cache in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import (
    check_cache,
    check_integers,
    check_tensor,
    new_like,
    refuse_gradient,
    through_dispatcher,
)

_op = torch.ops.gemma2_ext.attention_append_cache.default
_out_op = torch.ops.gemma2_ext.attention_append_cache_out.default


def attention_append_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    key_lengths: Tensor,
    theta: float = 10000.0,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """`cache[position % capacity] = (rope(k), v)`, then attention of `rope(q)` over the cache.

    What `attention_cache(rope_append_cache(q, k, v, positions, ...), ...)` gives, where the tokens
    of a row stand at the positions from `key_lengths[b] - seqlen` to `key_lengths[b] - 1`; of them
    below 0 is padding. On a GPU one kernel does it for one token a row, up to 16 query heads for a
    key head, bfloat16 or float16 and head_dim 64, 128 or 256.

    Args:
        q: (batch, seqlen, num_heads, head_dim), float32, bfloat16 or float16, any strides, not yet
            rotated; head_dim a multiple of 8 from 8 to 256.
        k: (batch, seqlen, num_kv_heads, head_dim), q's dtype, any strides; num_kv_heads a divisor
            of num_heads.
        v: k's shape and dtype, any strides.
        k_cache: (batch, capacity, num_kv_heads, head_dim), k's dtype or int8; written in place;
            the last dimension contiguous.
        v_cache: like k_cache.
        key_lengths: (batch,) int32 or int64, positions written so far, these tokens included.
        theta: base of the frequencies.
        scale: of the scores, query_pre_attn_scalar ** -0.5 in Gemma 2.
        softcap: bound of the scaled scores, or None.
        window: number of keys that a query sees, itself included, or None for all.
        k_scales: (batch, capacity, num_kv_heads) float32, any strides, written in place; for a
            cache of int8 only, see `rope_append_cache`.
        v_scales: like k_scales.

    Returns:
        A contiguous tensor of q's shape and dtype; 0 where a position is negative (padding).

    Raises:
        TypeError: q, k, v or a cache is not a floating tensor of those dtypes, or key_lengths is
            none.
        ValueError: where `rope_append_cache` or `attention_cache` has one, or seqlen exceeds the
            capacity.
        NotImplementedError: a gradient is asked for.

    Source: transformers, apply_rotary_pos_emb and Cache.update; FlashAttention-2 (arXiv
    2307.08691).
    """
    name = "attention_append_cache"
    for label, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, label, tensor)
    check_cache(name, k_cache, v_cache, k_scales, v_scales)
    check_integers(name, "key_lengths", key_lengths, required=True)
    inputs = (q, k, v, k_cache, v_cache, key_lengths, k_scales, v_scales)
    options = {"theta": theta, "scale": scale, "softcap": softcap, "window": window}
    if through_dispatcher(q, k, v, k_cache, v_cache):
        return _op(*inputs, **options)
    out = new_like(q)
    _out_op(*inputs, **options, rotated=new_like(q), out=out)
    return out


@torch.library.register_fake("gemma2_ext::attention_append_cache")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    key_lengths: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    *,
    theta: float = 10000.0,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.register_fake("gemma2_ext::attention_append_cache_out")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    key_lengths: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    *,
    theta: float,
    scale: float,
    softcap: float | None,
    window: int | None,
    rotated: Tensor,
    out: Tensor,
) -> None:
    return None


refuse_gradient("attention_append_cache")
