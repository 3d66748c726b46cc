"""rope_append_cache: rope of q, and of k on its way into a cache together with v."""

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

_op = torch.ops.gemma2_ext.rope_append_cache.default
_out_op = torch.ops.gemma2_ext.rope_append_cache_out.default


def rope_append_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    theta: float = 10000.0,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """`cache[position % capacity] = (rope(k), v)`; returns `rope(q)`.

    The token at position p of a row goes into slot `p % capacity` of that row, in a cache that
    holds every position or in a ring. A position below 0 is padding: nothing is written for it,
    and its q is returned as it was.

    Caches of int8 hold each head's row of a token as `round(x / s)` with s, its largest magnitude
    over 127, in `k_scales` and `v_scales`; k is rotated in float32 and rounded once. A row that is
    not finite has s = NaN, so that what reads it is NaN too.

    Args:
        q: (batch, seqlen, num_heads, head_dim), float32, bfloat16 or float16, any strides;
            head_dim even.
        k: (batch, seqlen, num_kv_heads, head_dim), q's dtype, any strides.
        v: k's shape and dtype, any strides.
        positions: (seqlen,) or (batch, seqlen), int64 or int32; those of a row that are not
            padding increase and span at most `capacity`, so that no two share a slot.
        k_cache: (batch, capacity, num_kv_heads, head_dim), k's dtype or, for a
            head_dim up to 256, int8; written in place; the last dimension contiguous.
        v_cache: like k_cache.
        theta: base of the frequencies.
        k_scales: (batch, capacity, num_kv_heads) float32, any strides, written in place; for a
            cache of int8 only.
        v_scales: like k_scales.

    Returns:
        q rotated, a new contiguous tensor.

    Raises:
        TypeError: an argument is not a floating tensor of those dtypes, or positions not an
            integer one.
        ValueError: shapes, dtypes or devices do not fit, head_dim is odd, theta is not positive,
            two positions of a row would share a slot, or scales are missing or too many.
        NotImplementedError: a gradient is asked for.

    Source: transformers, apply_rotary_pos_emb and Cache.update.
    """
    check_tensor("rope_append_cache", "q", q)
    check_tensor("rope_append_cache", "k", k)
    check_tensor("rope_append_cache", "v", v)
    check_cache("rope_append_cache", k_cache, v_cache, k_scales, v_scales)
    check_integers("rope_append_cache", "positions", positions, required=True)
    if through_dispatcher(q, k, v, k_cache, v_cache):
        return _op(q, k, v, positions, k_cache, v_cache, theta, k_scales, v_scales)
    q_out = new_like(q)
    _out_op(q, k, v, positions, k_cache, v_cache, theta, k_scales, v_scales, q_out)
    return q_out


@torch.library.register_fake("gemma2_ext::rope_append_cache")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    theta: float = 10000.0,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.register_fake("gemma2_ext::rope_append_cache_out")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    theta: float,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    q_out: Tensor,
) -> None:
    return None


refuse_gradient("rope_append_cache")
