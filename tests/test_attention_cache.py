from __future__ import annotations

import ctypes
import functools
import mmap
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from attention_common import int8_rows, random_qkv, reference_of
from common import DTYPES, LAYOUTS, assert_accurate, by_both_ways, with_strides
from gemma2_ext import ops

OP = torch.ops.gemma2_ext.attention_cache.default
OUT_OP = torch.ops.gemma2_ext.attention_cache_out.default
NAN = float("nan")
INFINITY = float("inf")


def ring(linear: Tensor, lengths: list[int], capacity: int) -> Tensor:
    """A cache after row b's first lengths[b] positions of `linear` (batch, seqlen, heads, dim) were
    written; NaN in slots without one."""
    cache = torch.full((linear.shape[0], capacity, *linear.shape[2:]), NAN, dtype=linear.dtype)
    for b, length in enumerate(lengths):
        positions = torch.arange(max(0, length - capacity), length)
        cache[b, positions % capacity] = linear[b, positions]
    return cache


def check(
    seqlen_q: int,
    lengths: list[int],
    capacity: int,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> None:
    """attention_cache over a ring against attention over the positions in their order."""
    q, k, v = random_qkv(len(lengths), seqlen_q, max(lengths), heads, head_dim, dtype)
    key_lengths = torch.tensor(lengths)
    caches = ring(k, lengths, capacity), ring(v, lengths, capacity)
    actual = ops.attention_cache(q, *caches, key_lengths, scale=0.2, **options)
    # Of few elements the reference's own error is a matter of luck: over 300 draws of a row of 32
    # the largest error was 0.8 times that at the median, 3 times at most.
    roundings = 2 if q.numel() < 100 else 1
    reference = reference_of(scale=0.2, key_lengths=key_lengths, **options)
    assert_accurate(actual, reference, q, k, v, roundings=roundings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 40, 256])
@pytest.mark.parametrize("seqlen_q", [1, 3, 30])
def test_full_cache(isa: str, dtype: torch.dtype, head_dim: int, seqlen_q: int) -> None:
    check(seqlen_q, [30, 299, 300], 300, head_dim=head_dim, dtype=dtype, softcap=50.0)


@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (8, 1), (6, 2), (16, 1)])
@pytest.mark.parametrize("seqlen_q", [1, 2, 5, 20])
def test_groups(isa: str, heads: tuple[int, int], seqlen_q: int) -> None:
    check(seqlen_q, [97, 20], 100, heads)
    check(seqlen_q, [197, 20], 50, heads, window=30)


@pytest.mark.parametrize("window", [1, 16, 17])
@pytest.mark.parametrize("seqlen_q", [1, 4, 40])
def test_ring_at_every_length(isa: str, window: int, seqlen_q: int) -> None:
    # From an empty ring through several wraps, window - 1, window and window + 1 keys included.
    capacity = window + seqlen_q - 1
    lengths = [*range(1, 3 * capacity + 2), 1000 * capacity + 3]
    lengths = [
        *lengths[:: max(1, len(lengths) // 40)],
        capacity - 1,
        capacity,
        capacity + 1,
        window + 1,
    ]
    lengths = [n for n in lengths if n < 500]
    check(seqlen_q, lengths, capacity, (2, 1), 16, window=window)
    check(seqlen_q, lengths, capacity + 7, (2, 1), 16, window=window, softcap=2.0)


@pytest.mark.parametrize("seqlen_q", [1, 40])
def test_ring_longer_than_a_split(isa: str, seqlen_q: int) -> None:
    check(seqlen_q, [2500, 3001, 1200], 1300, (2, 1), 16, window=1261)


def test_random_writes_past_several_wraps(isa: str) -> None:
    # As the model uses it: chunks of random size are written, then read at once.
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    window, slack, total = 24, 12, 400
    capacity = window + slack
    q, k, v = random_qkv(2, total, total, (4, 2), 16)
    k_cache, v_cache = (torch.full((2, capacity, 2, 16), NAN) for _ in range(2))
    expected = ops.attention(q, k, v, scale=0.2, softcap=5.0, window=window)
    assert isinstance(expected, Tensor)
    begin = 0
    while begin < total:
        end = min(total, begin + int(torch.randint(1, slack + 2, (), generator=generator)))
        slots = torch.arange(begin, end) % capacity
        k_cache[:, slots], v_cache[:, slots] = k[:, begin:end], v[:, begin:end]
        lengths = torch.full((2,), end)
        actual = ops.attention_cache(
            q[:, begin:end], k_cache, v_cache, lengths, scale=0.2, softcap=5.0, window=window
        )
        torch.testing.assert_close(actual, expected[:, begin:end])
        begin = end


@pytest.mark.parametrize("seqlen_q", [2, 12])
def test_negative_positions_are_zero(isa: str, seqlen_q: int) -> None:
    # A row of a batch with fewer new tokens than the others, and an empty one.
    q, k, v = random_qkv(3, seqlen_q, 20)
    lengths = torch.tensor([20, 1, 0])
    caches = ring(k, [20, 1, 0], 20), ring(v, [20, 1, 0], 20)
    out = ops.attention_cache(q, *caches, lengths, scale=0.2)
    assert torch.isfinite(out).all()
    assert torch.equal(out[1, :-1], torch.zeros_like(out[1, :-1]))
    torch.testing.assert_close(out[1, -1], v[1, 0].repeat_interleave(2, dim=0))
    assert torch.equal(out[2], torch.zeros_like(out[2]))


@pytest.mark.parametrize("seqlen_q", [1, 30])
def test_slots_behind_the_window_are_not_read(isa: str, seqlen_q: int) -> None:
    q, k, v = random_qkv(1, seqlen_q, 90)
    lengths = torch.tensor([90])
    k[:, : 90 - seqlen_q + 1 - 20] = NAN
    v[:, : 90 - seqlen_q + 1 - 20] = NAN
    caches = ring(k, [90], 64), ring(v, [90], 64)
    assert torch.isfinite(ops.attention_cache(q, *caches, lengths, scale=0.2, window=20)).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seqlen_q", [1, 15])
def test_strides(isa: str, layout: str, seqlen_q: int) -> None:
    q, k, v = random_qkv(2, seqlen_q, 70, head_dim=40, dtype=torch.bfloat16)
    lengths = torch.tensor([100, 69])
    expected = ops.attention_cache(q, k, v, lengths, scale=0.1, window=50)
    strided = [with_strides(t, layout) for t in (q, k, v)]
    assert torch.equal(ops.attention_cache(*strided, lengths, scale=0.1, window=50), expected)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(ops.attention_cache(*heads_first, lengths, scale=0.1, window=50), expected)
    every_second = torch.tensor([100, -1, 69, -1], dtype=torch.int32)[::2]
    assert torch.equal(ops.attention_cache(q, k, v, every_second, scale=0.1, window=50), expected)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1), (4, 1), (5, 1)])
@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("capacity", [512, 777])
def test_heads_first_changes_nothing(
    isa: str, heads: tuple[int, int], head_dim: int, window: int | None, capacity: int
) -> None:
    # Then some blocks of keys go together, unless the ring ends within.
    lengths = [63, 64, 320, capacity, 1000 if window else 500]
    q, k, v = random_qkv(len(lengths), 1, 1000, heads, head_dim, torch.bfloat16)
    caches = [ring(t, lengths, capacity) for t in (k, v)]
    options = {"scale": 0.1, "softcap": 20.0, "window": window}
    key_lengths = torch.tensor(lengths)
    expected = ops.attention_cache(q, *caches, key_lengths, **options)
    caches = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in caches]
    assert torch.equal(ops.attention_cache(q, *caches, key_lengths, **options), expected)


def before_a_wall(t: Tensor) -> Tensor:
    """A copy in memory behind which nothing can be read."""
    size = -(-t.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=size - t.nbytes)
    end, no_access = ctypes.c_void_p(copy.data_ptr() + t.nbytes), 0
    assert ctypes.CDLL(None).mprotect(end, ctypes.c_size_t(mmap.PAGESIZE), no_access) == 0
    return copy.view(t.shape).copy_(t)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [40, 128, 256])
@pytest.mark.parametrize("seqlen_q", [1, 2, 3, 30])
@pytest.mark.parametrize("capacity", [256, 333])
def test_nothing_behind_the_cache_is_read(
    isa: str, dtype: torch.dtype, head_dim: int, seqlen_q: int, capacity: int
) -> None:
    if isa == "cuda":
        pytest.skip("memory of the host")
    q, k, v = random_qkv(1, seqlen_q, capacity, (4, 2), head_dim, dtype)
    walled = [before_a_wall(t.transpose(1, 2).contiguous()).transpose(1, 2) for t in (k, v)]
    for length in (capacity, capacity + 100):
        call = functools.partial(
            ops.attention_cache, key_lengths=torch.tensor([length]), scale=0.1, window=220
        )
        expected = call(q, k, v)
        for actual in by_both_ways(isa, functools.partial(call, q, *walled)):
            assert torch.equal(actual, expected)


def test_every_element_is_written(isa: str) -> None:
    q, k, v = random_qkv(2, 2, 700)
    lengths = torch.tensor([700, 3])
    out = torch.full_like(q, NAN)
    OUT_OP(q, k, v, lengths, None, None, scale=0.1, softcap=None, window=None, out=out)
    assert torch.equal(out, ops.attention_cache(q, k, v, lengths, scale=0.1))


@pytest.mark.parametrize("seqlen_q", [1, 4, 50])
def test_independent_of_threads(isa: str, seqlen_q: int) -> None:
    q, k, v = random_qkv(2, seqlen_q, 1500, (4, 2), 32)
    lengths = torch.tensor([2000, 1400])
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.attention_cache(q, k, v, lengths, scale=0.1, window=1300))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 40, 256])
@pytest.mark.parametrize("seqlen_q", [1, 3, 30])
def test_int8(isa: str, dtype: torch.dtype, head_dim: int, seqlen_q: int) -> None:
    # A whole cache, and a ring that has wrapped: its keys in the order of their positions.
    for lengths, options in (([29, 299, 300], {}), ([700, 317, 31], {"window": 250})):
        k8, k_scales = int8_rows(lengths, 300, 2, head_dim)
        v8, v_scales = int8_rows(lengths, 300, 2, head_dim)
        q = (torch.randn(3, seqlen_q, 4, head_dim) * 2).to(dtype)
        key_lengths = torch.tensor(lengths)
        actual = ops.attention_cache(
            *(q, k8, v8, key_lengths),
            **{"scale": 0.2, "softcap": 5.0, "k_scales": k_scales, "v_scales": v_scales},
            **options,
        )
        k, v = (torch.zeros(3, max(lengths), 2, head_dim, dtype=dtype) for _ in range(2))
        for b, length in enumerate(lengths):
            positions = torch.arange(max(0, length - 300), length)
            slots = positions % 300
            k[b, positions] = (k8[b, slots] * k_scales[b, slots, :, None]).to(dtype)
            v[b, positions] = (v8[b, slots] * v_scales[b, slots, :, None]).to(dtype)
        reference = reference_of(scale=0.2, softcap=5.0, key_lengths=key_lengths, **options)
        # Scores and weights are multiplied by the scales: a rounding each.
        assert_accurate(actual, reference, q, k, v, roundings=3)


@pytest.mark.parametrize("seqlen_q", [1, 15, 30])
def test_int8_strides_splits_and_threads(isa: str, seqlen_q: int) -> None:
    q = torch.randn(2, seqlen_q, 4, 40).bfloat16()
    lengths = [1400, 2100]
    k8, k_scales = int8_rows([2000, 2000], 1500, 2, 40)
    v8, v_scales = int8_rows([2000, 2000], 1500, 2, 40)
    key_lengths = torch.tensor(lengths)
    options: dict[str, Any] = {"scale": 0.1, "window": 1300}

    def run(*tensors: Tensor) -> Tensor:
        q, k, v, k_scales, v_scales = tensors
        scales = {"k_scales": k_scales, "v_scales": v_scales}
        return ops.attention_cache(q, k, v, key_lengths, **scales, **options)

    expected = run(q, k8, v8, k_scales, v_scales)
    wide = ops.attention_cache(
        q.float(), k8 * k_scales[..., None], v8 * v_scales[..., None], key_lengths, **options
    )
    torch.testing.assert_close(expected.float(), wide, rtol=1.6e-2, atol=1e-3)
    tensors = (q, k8, v8, k_scales, v_scales)
    assert torch.equal(run(*(t.contiguous() for t in tensors)), expected)
    for layout in LAYOUTS:
        assert torch.equal(run(*(with_strides(t, layout) for t in tensors)), expected)
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(run(*tensors), expected)
    torch.set_num_threads(before)


@pytest.mark.parametrize("seqlen_q", [1, 30])
def test_int8_hides_what_is_not_seen(isa: str, seqlen_q: int) -> None:
    q = torch.randn(1, seqlen_q, 4, 64)
    k8, k_scales = int8_rows([90], 90, 2, 64)
    v8, v_scales = int8_rows([90], 90, 2, 64)
    unseen = slice(0, 90 - seqlen_q + 1 - 20)
    k_scales[:, unseen], v_scales[:, unseen] = NAN, NAN
    options: dict[str, Any] = {"scale": 0.1, "window": 20}

    def run() -> Tensor:
        scales = {"k_scales": k_scales, "v_scales": v_scales}
        return ops.attention_cache(q, k8, v8, torch.tensor([90]), **scales, **options)

    assert torch.isfinite(run()).all()
    k_scales[:, 89, 0] = NAN  # of one key head, seen by the last query
    out = run()
    assert out[:, -1, :2].isnan().all()
    assert torch.isfinite(out[:, -1, 2:]).all()
    assert torch.isfinite(out[:, :-1]).all()


@pytest.mark.parametrize("seqlen_q", [1, 5, 30])
@pytest.mark.parametrize("factor", [-1.0, 2.0**-110, 0.0])
def test_int8_any_scales(isa: str, seqlen_q: int, factor: float) -> None:
    # Such as no cache has that rope_append_cache wrote. Scales of a whole block of keys and more,
    # with others after them.
    k8, k_scales = int8_rows([200], 200, 2, 72)
    v8, v_scales = int8_rows([200], 200, 2, 72)
    v_scales[:, :150] *= factor
    k_scales[:, 100:] *= factor
    q = torch.randn(1, seqlen_q, 4, 72).bfloat16()
    scales = {"k_scales": k_scales, "v_scales": v_scales}
    for length in (130, 200):
        key_lengths = torch.tensor([length])
        actual = ops.attention_cache(q, k8, v8, key_lengths, scale=0.2, **scales)
        k, v = ((x * s[..., None]).bfloat16() for x, s in ((k8, k_scales), (v8, v_scales)))
        reference = reference_of(scale=0.2, key_lengths=key_lengths)
        assert_accurate(actual, reference, q, k[:, :length], v[:, :length], roundings=3)


@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_int8_rows_are_apart(isa: str, value: float) -> None:
    # A query that is not finite does not touch what others give, to the bit.
    k8, k_scales = int8_rows([150], 150, 1, 64)
    v8, v_scales = int8_rows([150], 150, 1, 64)
    q = torch.randn(1, 1, 2, 64).bfloat16()
    scales = {"k_scales": k_scales, "v_scales": v_scales}

    def run() -> Tensor:
        return ops.attention_cache(q, k8, v8, torch.tensor([150]), scale=0.1, **scales)

    expected = run()
    q[:, :, 1, 3] = value
    out = run()
    assert torch.equal(out[:, :, 0], expected[:, :, 0])
    assert not torch.isfinite(out[:, :, 1]).any()


@pytest.mark.parametrize("shape", [(0, 1, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(isa: str, shape: tuple[int, int, int]) -> None:
    q, k, v = random_qkv(*shape)
    out = ops.attention_cache(q, k, v, torch.zeros(shape[0], dtype=torch.int64), scale=0.1)
    assert torch.equal(out, torch.zeros_like(q))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    q, k, v = random_qkv(2, 5, 30, head_dim=16, dtype=dtype)
    lengths = torch.tensor([70, 25])
    options = {"scale": 0.1, "softcap": 5.0, "window": 26}
    opcheck(OP, (q, k, v, lengths), options)
    opcheck(OUT_OP, (q, k, v, lengths, None, None), {**options, "out": torch.empty_like(q)})
    (k8, k_scales), (v8, v_scales) = (int8_rows([30, 25], 30, 2, 16) for _ in range(2))
    int8 = (q, k8, v8, lengths, k_scales, v_scales)
    opcheck(OP, int8, options)
    opcheck(OUT_OP, int8, {**options, "out": torch.empty_like(q)})


def test_compile_without_graph_breaks() -> None:
    q, k, v = random_qkv(2, 5, 30)
    lengths = torch.tensor([29, 25])

    def f(q: Tensor) -> Tensor:
        return ops.attention_cache(q, k, v, lengths, scale=0.1, softcap=5.0, window=4) * 2

    torch.testing.assert_close(torch.compile(f, fullgraph=True)(q), f(q))
    (k, k_scales), (v, v_scales) = (int8_rows([30, 25], 30, 2, 64) for _ in range(2))

    def g(q: Tensor) -> Tensor:
        scales = {"k_scales": k_scales, "v_scales": v_scales}
        return ops.attention_cache(q, k, v, lengths, scale=0.1, **scales) * 2

    torch.testing.assert_close(torch.compile(g, fullgraph=True)(q), g(q))


def test_backward_refuses() -> None:
    q, k, v = random_qkv(1, 2, 3)
    with pytest.raises(NotImplementedError, match="attention_cache has no backward"):
        ops.attention_cache(q.requires_grad_(), k, v, torch.tensor([3]), scale=0.1).sum().backward()


def test_errors() -> None:
    q, k, v = random_qkv(2, 3, 5)
    lengths = torch.tensor([5, 4])

    def error(match: str, *args: Any, kind: type[Exception] = ValueError, **options: Any) -> None:
        with pytest.raises(kind, match="gemma2_ext::attention_cache: " + match):
            ops.attention_cache(*args, **{"scale": 0.1, **options})

    error(r"k_cache must be a torch\.Tensor, got NoneType", q, None, v, lengths, kind=TypeError)
    error(r"key_lengths must be a torch\.Tensor, got NoneType", q, k, v, None, kind=TypeError)
    error("key_lengths must be int32 or int64", q, k, v, lengths.float(), kind=TypeError)
    error(r"q must have shape \(batch, seqlen_q, num_heads, head_dim\)", q[0], k, v, lengths)
    k_shape = r"k_cache must have shape \(batch, capacity, num_kv_heads, head_dim\) = "
    error(k_shape + r"\(2, \*, \*, 64\), got \(1, 5, 2, 64\)", q, k[:1], v, lengths)
    error(r"v_cache must have k_cache's shape \(2, 5, 2, 64\)", q, k, v[:, 1:], lengths)
    error("v_cache must have q's dtype Float, got Half", q, k, v.half(), lengths)
    error(
        "num_heads must be a positive multiple of num_kv_heads = 2, got 3",
        q[:, :, :3],
        k,
        v,
        lengths,
    )
    error(r"key_lengths must have shape \(batch,\) = \(2,\), got \(1,\)", q, k, v, lengths[:1])
    error(r"key_lengths\[1\] must be at least 0, got -1", q, k, v, torch.tensor([5, -1]))
    error(
        r"key_lengths\[0\] must be at most capacity = 5 where there is no window "
        r"\(older keys are overwritten\), got 6",
        *(q, k, v, lengths + 1),
    )
    error(
        r"key_lengths\[0\] must be at most capacity = 5 where window \+ seqlen_q - 1 = 4 \+ 3 - 1 "
        r"exceeds it \(older keys are overwritten\), got 6",
        *(q, k, v, lengths + 1),
        window=4,
    )
    error("key_lengths.0. must be at most capacity", q, k, v, lengths + 1, window=2**63 - 1)
    ops.attention_cache(q, k, v, lengths + 1, scale=0.1, window=3)
    error("scale must be finite, got nan", q, k, v, lengths, scale=NAN)
    error("softcap must be positive and finite, got nan", q, k, v, lengths, softcap=NAN)
    error("window must be at least 1, got 0", q, k, v, lengths, window=0)
    with pytest.raises(ValueError, match="attention_cache: out must have q's shape"):
        out = q[:1].clone()
        OUT_OP(q, k, v, lengths, None, None, scale=0.1, softcap=None, window=None, out=out)
    (k8, k_scales), (v8, v_scales) = (int8_rows([5, 5], 5, 2, 64) for _ in range(2))
    both = {"k_scales": k_scales, "v_scales": v_scales}
    needed = "k_scales and v_scales must be given with caches of int8, and only with them, got "
    error(needed + "no k_scales, no v_scales and a k_cache of Char", q, k8, v8, lengths)
    error(needed + "k_scales, no v_scales", q, k8, v8, lengths, k_scales=k_scales)
    error(needed + "k_scales, v_scales and a k_cache of Float", q, k, v, lengths, **both)
    error("v_cache must have k_cache's dtype Char, got Float", q, k8, v, lengths, **both)
    error("v_cache must have k_cache's shape", q, k8, v8[:, 1:], lengths, **both)
    error(
        r"v_scales must have shape \(batch, capacity, num_kv_heads\) = .*, got \(2, 4, 2\)",
        *(q, k8, v8, lengths),
        k_scales=k_scales,
        v_scales=v_scales[:, 1:],
    )
    error(
        "k_scales must be float32, got Half",
        *(q, k8, v8, lengths),
        k_scales=k_scales.half(),
        v_scales=v_scales,
    )
    error(
        r"v_scales must be a torch\.Tensor, got int",
        *(q, k8, v8, lengths),
        k_scales=k_scales,
        v_scales=1,
        kind=TypeError,
    )
