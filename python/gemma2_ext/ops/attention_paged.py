"""attention_paged: causal attention over keys and values in pages."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import check_integers, check_tensor, new_like, refuse_backward, through_dispatcher

_op = torch.ops.gemma2_ext.attention_paged.default
_out_op = torch.ops.gemma2_ext.attention_paged_out.default


def attention_paged(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    key_lengths: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """`softmax(mask(softcap * tanh(scale * q k^T / softcap))) v` over keys in pages.

    Position p of row b is in page `block_table[b, p // page_size]`, at place `p % page_size`. Query
    i stands at position `key_lengths[b] - seqlen_q + i` and sees key j if j <= position and, with a
    window, j > position - window. Pages that no query sees, and their entries in the table, are
    never read. Pages are read where they lie.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), float32, bfloat16 or float16, any strides;
            head_dim a multiple of 8 from 8 to 256.
        k_pages: (pages, page_size, num_kv_heads, head_dim), q's dtype, page_size a power of two,
            num_kv_heads a divisor of num_heads.
        v_pages: k_pages' shape and dtype.
        block_table: (batch, pages of a row), int32, the row's pages in the order of positions.
        key_lengths: (batch,) int32 or int64, positions written so far, q's own included.
        scale: of the scores, query_pre_attn_scalar ** -0.5 in Gemma 2.
        softcap: bound of the scaled scores, or None.
        window: number of keys that a query sees, itself included, or None for all.

    Returns:
        A contiguous tensor of q's shape and dtype; 0 where a position is negative (padding).

    Raises:
        TypeError: q or the pages are not floating tensors of those dtypes, or key_lengths or
            block_table is no tensor of integers.
        ValueError: shapes, dtypes or devices do not fit; scale or softcap is no positive number;
            window is below 1; page_size is no power of two; key_lengths exceeds what block_table
            has room for, or an entry that is needed is none of the pages (neither is checked on a
            GPU, where lengths are clamped and entries must be right).
        NotImplementedError: a gradient is asked for.

    Source: PagedAttention (arXiv 2309.06180), in FlashAttention's interface.
    """
    check_tensor("attention_paged", "q", q)
    check_tensor("attention_paged", "k_pages", k_pages)
    check_tensor("attention_paged", "v_pages", v_pages)
    check_integers("attention_paged", "block_table", block_table, required=True)
    check_integers("attention_paged", "key_lengths", key_lengths, required=True)
    if through_dispatcher(q, k_pages, v_pages):
        return _op(
            q,
            k_pages,
            v_pages,
            block_table,
            key_lengths,
            scale=scale,
            softcap=softcap,
            window=window,
        )
    out = new_like(q)
    _out_op(
        q,
        k_pages,
        v_pages,
        block_table,
        key_lengths,
        scale=scale,
        softcap=softcap,
        window=window,
        out=out,
    )
    return out


@torch.library.register_fake("gemma2_ext::attention_paged")
def _(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    key_lengths: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.register_fake("gemma2_ext::attention_paged_out")
def _(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    key_lengths: Tensor,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    out: Tensor,
) -> None:
    return None


refuse_backward("attention_paged")
