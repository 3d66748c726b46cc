from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from attention_common import random_qkv, reference_of
from common import DTYPES, LAYOUTS, assert_accurate, assert_independent_of_threads, with_strides
from gemma2_ext import ops

OP = torch.ops.gemma2_ext.attention_paged.default
OUT_OP = torch.ops.gemma2_ext.attention_paged_out.default
NAN = float("nan")
NO_PAGE = 2**30


def in_pages(
    k: Tensor, v: Tensor, lengths: list[int], page_size: int, seen_from: list[int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """k's and v's first lengths[b] positions in pages of random order, and the table of them.

    NaN in places without a position, and NO_PAGE in the table wherever no page is needed: behind
    the length, and for pages that end before seen_from[b]."""
    entries = max(-(-max(lengths) // page_size), 1) + 1
    order = torch.randperm(len(lengths) * entries, device="cpu").tolist()
    shape = (len(order), page_size, *k.shape[2:])
    k_pages, v_pages = (torch.full(shape, NAN, dtype=k.dtype) for _ in range(2))
    table = torch.full((len(lengths), entries), NO_PAGE, dtype=torch.int32)
    for b, length in enumerate(lengths):
        for begin in range(0, length, page_size):
            end = min(begin + page_size, length)
            if seen_from is not None and end <= seen_from[b]:
                continue
            page = order.pop()
            table[b, begin // page_size] = page
            k_pages[page, : end - begin] = k[b, begin:end]
            v_pages[page, : end - begin] = v[b, begin:end]
    return k_pages, v_pages, table


def check(
    seqlen_q: int,
    lengths: list[int],
    page_size: int,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> None:
    q, k, v = random_qkv(len(lengths), seqlen_q, max(lengths), heads, head_dim, dtype)
    key_lengths = torch.tensor(lengths)
    window = options.get("window")
    seen_from = None if window is None else [n - seqlen_q - window + 1 for n in lengths]
    pages = in_pages(k, v, lengths, page_size, seen_from)
    actual = ops.attention_paged(q, *pages, key_lengths, scale=0.2, **options)
    # As in test_attention.py; of few elements as in test_attention_cache.py.
    roundings = 2 if q.numel() < 100 or (q.is_cuda and dtype == torch.float32) else 1
    reference = reference_of(scale=0.2, key_lengths=key_lengths, **options)
    assert_accurate(actual, reference, q, k, v, roundings=roundings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 40, 256])
@pytest.mark.parametrize("seqlen_q", [1, 3, 30])
@pytest.mark.parametrize("page_size", [16, 256])
def test_value(isa: str, dtype: torch.dtype, head_dim: int, seqlen_q: int, page_size: int) -> None:
    lengths = [30, page_size, page_size + 1, 299]
    lengths = [max(n, seqlen_q) for n in lengths]
    check(seqlen_q, lengths, page_size, head_dim=head_dim, dtype=dtype, softcap=50.0)


@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (8, 1), (6, 2), (16, 1)])
@pytest.mark.parametrize("seqlen_q", [1, 2, 20])
def test_groups(isa: str, heads: tuple[int, int], seqlen_q: int) -> None:
    check(seqlen_q, [97, 20], 8, heads)


@pytest.mark.parametrize("page_size", [1, 4, 64])
@pytest.mark.parametrize("window", [1, 16, 17])
@pytest.mark.parametrize("seqlen_q", [1, 4, 40])
def test_window(isa: str, page_size: int, window: int, seqlen_q: int) -> None:
    # Pages before the first query's window are named by no entry of the table.
    lengths = [seqlen_q, seqlen_q + window - 1, seqlen_q + window, 200, 255]
    check(seqlen_q, lengths, page_size, (2, 1), 16, window=window, softcap=2.0)


def test_as_attention_cache(isa: str) -> None:
    q, k, v = random_qkv(2, 5, 1300, (4, 2), 64, torch.bfloat16)
    lengths = torch.tensor([1300, 700])
    pages = in_pages(k, v, lengths.tolist(), 32)
    options = {"scale": 0.1, "softcap": 20.0}
    expected = ops.attention_cache(q, k, v, lengths, **options)
    assert torch.equal(ops.attention_paged(q, *pages, lengths, **options), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 8, 32, 128])
@pytest.mark.parametrize("seqlen_q", [1, 7, 30])
@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("heads_first", [False, True])
def test_pages_change_nothing(
    isa: str,
    dtype: torch.dtype,
    page_size: int,
    seqlen_q: int,
    window: int | None,
    heads_first: bool,
) -> None:
    # To the bit, wherever pages lie and however their heads do.
    if isa == "cuda":
        pytest.skip("there keys are split by what the table has room for")
    lengths = torch.tensor([400, 299])
    q, k, v = random_qkv(2, seqlen_q, 400, (8, 4), 72, dtype)
    options = {"scale": 0.1, "softcap": 20.0, "window": window}
    expected = ops.attention(q, k, v, key_lengths=lengths, **options)
    seen_from = None if window is None else [n - seqlen_q - window + 1 for n in lengths.tolist()]
    k, v, table = in_pages(k, v, lengths.tolist(), page_size, seen_from)
    if heads_first:
        k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
    assert torch.equal(ops.attention_paged(q, k, v, table, lengths, **options), expected)


@pytest.mark.parametrize("seqlen_q", [2, 12])
def test_negative_positions_are_zero(isa: str, seqlen_q: int) -> None:
    q, k, v = random_qkv(3, seqlen_q, 20)
    pages = in_pages(k, v, [20, 1, 0], 8)
    out = ops.attention_paged(q, *pages, torch.tensor([20, 1, 0]), scale=0.2)
    assert torch.isfinite(out).all()
    assert torch.equal(out[1, :-1], torch.zeros_like(out[1, :-1]))
    torch.testing.assert_close(out[1, -1], v[1, 0].repeat_interleave(2, dim=0))
    assert torch.equal(out[2], torch.zeros_like(out[2]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seqlen_q", [1, 15])
def test_strides(isa: str, layout: str, seqlen_q: int) -> None:
    q, k, v = random_qkv(2, seqlen_q, 70, head_dim=40, dtype=torch.bfloat16)
    lengths = torch.tensor([70, 69])
    k_pages, v_pages, table = in_pages(k, v, [70, 69], 16)
    expected = ops.attention_paged(q, k_pages, v_pages, table, lengths, scale=0.1, window=50)
    q, k_pages, v_pages = (with_strides(t, layout) for t in (q, k_pages, v_pages))
    wide = torch.full((2, table.shape[1], 3), NO_PAGE, dtype=torch.int32)
    wide[..., 1] = table
    every_second = torch.tensor([70, -1, 69, -1], dtype=torch.int32)[::2]
    actual = ops.attention_paged(
        q, k_pages, v_pages, wide[..., 1], every_second, scale=0.1, window=50
    )
    assert torch.equal(actual, expected)


def test_every_element_is_written(isa: str) -> None:
    q, k, v = random_qkv(2, 2, 700)
    pages, lengths = in_pages(k, v, [700, 3], 64), torch.tensor([700, 3])
    out = torch.full_like(q, NAN)
    OUT_OP(q, *pages, lengths, scale=0.1, softcap=None, window=None, out=out)
    assert torch.equal(out, ops.attention_paged(q, *pages, lengths, scale=0.1))


@pytest.mark.parametrize("seqlen_q", [1, 50])
def test_independent_of_threads(isa: str, seqlen_q: int) -> None:
    q, k, v = random_qkv(2, seqlen_q, 1500, (4, 2), 32)
    pages, lengths = in_pages(k, v, [1500, 1400], 64), torch.tensor([1500, 1400])
    assert_independent_of_threads(lambda: [ops.attention_paged(q, *pages, lengths, scale=0.1)])


@pytest.mark.parametrize("shape", [(0, 1, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(isa: str, shape: tuple[int, int, int]) -> None:
    q, k, _ = random_qkv(*shape)
    lengths = torch.zeros(shape[0], dtype=torch.int64)
    table = torch.zeros(shape[0], 0 if shape[2] == 0 else 1, dtype=torch.int32)
    pages = torch.zeros(0 if shape[2] == 0 else 1, 4, *k.shape[2:])
    out = ops.attention_paged(q, pages, pages, table, lengths, scale=0.1)
    assert torch.equal(out, torch.zeros_like(q))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    q, k, v = random_qkv(2, 5, 30, head_dim=16, dtype=dtype)
    arguments = (q, *in_pages(k, v, [30, 25], 8), torch.tensor([30, 25]))
    options = {"scale": 0.1, "softcap": 5.0, "window": 26}
    opcheck(OP, arguments, options)
    opcheck(OUT_OP, arguments, {**options, "out": torch.empty_like(q)})


def test_compile_without_graph_breaks() -> None:
    q, k, v = random_qkv(2, 5, 30)
    pages, lengths = in_pages(k, v, [29, 25], 8), torch.tensor([29, 25])

    def f(q: Tensor) -> Tensor:
        return ops.attention_paged(q, *pages, lengths, scale=0.1, softcap=5.0, window=4) * 2

    torch.testing.assert_close(torch.compile(f, fullgraph=True)(q), f(q))


def test_backward_refuses() -> None:
    q, k, v = random_qkv(1, 2, 3)
    pages = in_pages(k, v, [3], 4)
    with pytest.raises(NotImplementedError, match="attention_paged has no backward"):
        ops.attention_paged(
            q.requires_grad_(), *pages, torch.tensor([3]), scale=0.1
        ).sum().backward()


def test_errors() -> None:
    q, k, v = random_qkv(2, 3, 5)
    lengths = torch.tensor([5, 4])
    k, v, table = in_pages(k, v, [5, 4], 4)

    def error(match: str, *args: Any, kind: type[Exception] = ValueError, **options: Any) -> None:
        with pytest.raises(kind, match="gemma2_ext::attention_paged: " + match):
            ops.attention_paged(*args, **{"scale": 0.1, **options})

    not_a_tensor = r" must be a torch\.Tensor, got NoneType"
    error("k_pages" + not_a_tensor, q, None, v, table, lengths, kind=TypeError)
    error("block_table" + not_a_tensor, q, k, v, None, lengths, kind=TypeError)
    error("key_lengths" + not_a_tensor, q, k, v, table, None, kind=TypeError)
    error("block_table must be int32 or int64", q, k, v, table.float(), lengths, kind=TypeError)
    error("block_table must be int32, got Long", q, k, v, table.long(), lengths)
    error(r"q must have shape \(batch, seqlen_q, num_heads, head_dim\)", q[0], k, v, table, lengths)
    shape = r"k_pages must have shape \(pages, page_size, num_kv_heads, head_dim\) = "
    error(shape + r"\(\*, \*, \*, 64\), got \(6, 4, 2, 32\)", q, k[..., :32], v, table, lengths)
    error("v_pages must have k_pages's shape", q, k, v[1:], table, lengths)
    error("v_pages must have q's dtype Float, got Half", q, k, v.half(), table, lengths)
    error("num_heads must be a positive multiple", q[:, :, :3], k, v, table, lengths)
    error(
        r"block_table must have shape \(batch, pages of a row\) = \(2, \*\), got \(1, 3\)",
        *(q, k, v, table[:1], lengths),
    )
    error(r"key_lengths must have shape \(batch,\) = \(2,\)", q, k, v, table, lengths[:1])
    error(
        r"page_size must be a power of two up to 2\^20, got 3",
        *(q, k[:, :3], v[:, :3], table, lengths),
    )
    error(
        r"key_lengths\[0\] must be from 0 to pages of a row \* page_size = 12, got 13",
        *(q, k, v, table, lengths + 8),
    )
    error(r"key_lengths\[1\] must be from 0 to", q, k, v, table, torch.tensor([5, -1]))
    for entry in (-1, 6, NO_PAGE):
        wrong = table.clone()
        wrong[1, 0] = entry
        error(
            rf"block_table\[1, 0\] must be from 0 to pages - 1 = 5, got {entry}",
            *(q, k, v, wrong, lengths),
        )
    error("scale must be finite, got nan", q, k, v, table, lengths, scale=NAN)
    error("softcap must be positive and finite", q, k, v, table, lengths, softcap=NAN)
    error("window must be at least 1, got 0", q, k, v, table, lengths, window=0)
    with pytest.raises(ValueError, match="attention_paged: out must have q's shape"):
        OUT_OP(q, k, v, table, lengths, scale=0.1, softcap=None, window=None, out=q[:1].clone())
