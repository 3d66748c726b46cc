from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_common import assert_lse_accurate, random_qkv, reference_of
from common import DTYPES, assert_accurate
from gemma2_ext import reference
from host_cuda import emulator
from host_cuda.attention_launches import run
from host_cuda.emulator import SCHEDULES, assert_needed

NAN = float("nan")
HALVES = (torch.bfloat16, torch.float16)
KIB = 1 << 10


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    device: dict[str, Any] | None = None,
    noise: float = 0.0,
    **options: Any,
) -> None:
    """Against the reference, on this device."""
    out, lse = run(q, k, v, **options, **(device or {}))
    assert_accurate(out, reference_of(**options), q, k, v, noise=noise)
    assert_lse_accurate(lse, q, k, v, **options)


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [
        *((torch.bfloat16, head_dim) for head_dim in (8, 64, 128, 256)),
        *((torch.float16, head_dim) for head_dim in (72, 256)),
        (torch.float32, 200),
    ],
)
@pytest.mark.parametrize("seqlens", [(1, 1), (1, 239), (39, 1), (73, 143), (7, 65)])
def test_value(dtype: torch.dtype, head_dim: int, seqlens: tuple[int, int]) -> None:
    if dtype == torch.float32:
        seqlens = min(seqlens[0], 7), seqlens[1]
    q, k, v = random_qkv(1, *seqlens, (4, 2), head_dim, dtype)
    check(q, k, v, scale=head_dim**-0.5, softcap=50.0)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (8, 1), (6, 2), (5, 1)])
@pytest.mark.parametrize(
    ("dtype", "seqlen_q"),
    [(torch.bfloat16, 1), (torch.float16, 3), (torch.bfloat16, 40), (torch.float32, 2)],
)
def test_groups(dtype: torch.dtype, heads: tuple[int, int], seqlen_q: int) -> None:
    q, k, v = random_qkv(1, seqlen_q, 50, heads, 24, dtype)
    check(q, k, v, scale=0.2)


@pytest.mark.parametrize("window", [1, 15, 16, 17, 64, 65])
@pytest.mark.parametrize("seqlens", [(1, 16), (5, 66), (50, 50), (33, 100)])
def test_window(window: int, seqlens: tuple[int, int]) -> None:
    q, k, v = random_qkv(1, *seqlens, (2, 1), 16, torch.bfloat16)
    check(q, k, v, scale=0.25, window=window)
    if seqlens[0] < 10:
        check(q.float(), k.float(), v.float(), scale=0.25, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen_q", [1, 20])
@pytest.mark.parametrize("softcap", [50.0, 5.0, 0.5])
def test_soft_cap_bites(dtype: torch.dtype, seqlen_q: int, softcap: float) -> None:
    q, k, v = random_qkv(1, seqlen_q, 40, (4, 2), 64, dtype, q_scale=30.0)
    # A score near the cap has two roundings of its size behind it, tanh and the product; a weight
    # is off by as much of itself.
    noise = torch.finfo(torch.float32).eps * softcap * v.abs().max().item()
    check(q, k, v, scale=0.125, softcap=softcap, noise=noise)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, -0.3])
@pytest.mark.parametrize("seqlen_q", [1, 20])
def test_any_scale(dtype: torch.dtype, scale: float, seqlen_q: int) -> None:
    q, k, v = random_qkv(1, seqlen_q, 40, dtype=dtype)
    check(q, k, v, scale=scale)
    check(q, k, v, scale=scale, softcap=2.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlens", [(3, 90), (40, 90), (40, 30)])
def test_not_causal(dtype: torch.dtype, seqlens: tuple[int, int]) -> None:
    q, k, v = random_qkv(2, *seqlens, (2, 1), dtype=dtype)
    if dtype == torch.float32:
        q = q[:, :6]
    check(q, k, v, scale=0.1, softcap=30.0, causal=False)
    check(q, k, v, scale=0.1, causal=False, key_lengths=torch.tensor([seqlens[1], 7]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seqlen_q", [1, 2, 40])
@pytest.mark.parametrize("window", [None, 9])
def test_padding_on_both_sides(dtype: torch.dtype, seqlen_q: int, window: int | None) -> None:
    if dtype == torch.float32:
        seqlen_q = min(seqlen_q, 6)
    q, k, v = random_qkv(5, seqlen_q, 70, (2, 1), dtype=dtype)
    starts = torch.tensor([0, 3, 10, 20, 70])
    lengths = torch.tensor([70, 60, 11, 20, 70])
    options = {"scale": 0.1, "window": window, "key_lengths": lengths, "key_starts": starts}
    expected = run(q, k, v, **options)
    for b in range(5):
        for t in (k, v):
            t[b, : starts[b]] = NAN
            t[b, lengths[b] :] = NAN
    for actual, right in zip(run(q, k, v, **options), expected, strict=True):
        assert torch.equal(actual, right)
    assert_accurate(expected[0], reference_of(**options), q, k, v)
    assert_lse_accurate(expected[1], q, k, v, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen_q", [1, 3, 40])
def test_rows_without_keys_are_zero(dtype: torch.dtype, seqlen_q: int) -> None:
    q, k, v = random_qkv(2, seqlen_q, 40, dtype=dtype)
    out, lse = run(q, k, v, scale=0.1, key_starts=torch.tensor([40, 39]))
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert torch.equal(out[1, :-1], torch.zeros_like(out[1, :-1]))
    assert (lse[0] == -math.inf).all()
    assert (lse[1, :, :-1] == -math.inf).all()
    assert torch.isfinite(lse[1, :, -1]).all()
    torch.testing.assert_close(out[1, -1], v[1, -1].repeat_interleave(2, dim=0))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("seqlen_q", [4, 60])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("poison", [NAN, math.inf])
def test_unseen_keys_do_not_leak(
    dtype: torch.dtype, seqlen_q: int, window: int | None, poison: float
) -> None:
    # Key 70 is seen by some queries of a block and hidden from others: 0 times its NaN value must
    # not reach those.
    q, k, v = random_qkv(1, seqlen_q, 100, dtype=dtype)
    key = 98 if seqlen_q == 4 else 70
    options = {"scale": 0.1, "window": window}
    expected, expected_lse = run(q, k, v, **options)
    k[0, key], v[0, key] = NAN, poison
    actual, lse = run(q, k, v, **options)
    position = torch.arange(100 - seqlen_q, 100)
    sees = (position >= key) & (position < key + (window or 1000))
    # Computed anew with weights that are not rounded to 16 bits: by half a unit of bfloat16 each.
    torch.testing.assert_close(actual[0, ~sees], expected[0, ~sees], rtol=1.6e-2, atol=5e-3)
    torch.testing.assert_close(lse[0, :, ~sees], expected_lse[0, :, ~sees])
    assert actual[0, sees].isnan().all()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_output_that_is_not_in_pieces_of_16_bytes(head_dim: int) -> None:
    q, k, v = random_qkv(2, 70, 90, (4, 2), head_dim, torch.bfloat16)
    options = {"scale": 0.1, "softcap": 30.0, "multiprocessors": 1}
    expected, _ = run(q, k, v, **options)
    memory = torch.full((expected.numel() + 1,), NAN, dtype=q.dtype)
    out = memory[1:].view(expected.shape)
    run(q, k, v, into=out, **options)
    assert torch.equal(out, expected)


def ring(linear: Tensor, lengths: list[int], capacity: int) -> Tensor:
    """A cache after row b's first lengths[b] positions of `linear` were written, NaN elsewhere."""
    cache = torch.full((linear.shape[0], capacity, *linear.shape[2:]), NAN, dtype=linear.dtype)
    for b, length in enumerate(lengths):
        positions = torch.arange(max(0, length - capacity), length)
        cache[b, positions % capacity] = linear[b, positions]
    return cache


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen_q", [1, 4, 40])
@pytest.mark.parametrize("slack", [0, 7])
def test_ring(dtype: torch.dtype, seqlen_q: int, slack: int) -> None:
    if dtype == torch.float32:
        seqlen_q = min(seqlen_q, 6)
    window = 33
    capacity = window + seqlen_q - 1 + slack
    lengths = [1, window - 1, window, window + 1, capacity, capacity + 1, 2 * capacity + 5, 300]
    q, k, v = random_qkv(len(lengths), seqlen_q, max(lengths), (2, 1), 16, dtype)
    options = {"scale": 0.2, "softcap": 5.0, "window": window, "key_lengths": torch.tensor(lengths)}
    caches = ring(k, lengths, capacity), ring(v, lengths, capacity)
    out, _ = run(q, *caches, **options, capacity=capacity, seqlen_k=capacity)
    assert_accurate(out, reference_of(**options), q, k, v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen_q", [1, 30])
@pytest.mark.parametrize("page_shift", [0, 3, 7])
def test_pages(dtype: torch.dtype, seqlen_q: int, page_shift: int) -> None:
    if dtype == torch.float32:
        seqlen_q = min(seqlen_q, 4)
    page, lengths = 1 << page_shift, [150, 40]
    q, k, v = random_qkv(2, seqlen_q, 150, (2, 1), 40, dtype)
    options = {"scale": 0.2, "window": 100, "key_lengths": torch.tensor(lengths)}
    table = torch.full((2, 160 // page + 1), 2**30, dtype=torch.int32)  # never to be followed
    order = torch.randperm(2 * table.shape[1]).int()
    k_pages, v_pages = (torch.full((len(order), page, 1, 40), NAN, dtype=dtype) for _ in "kv")
    used = 0
    for b, length in enumerate(lengths):
        for i in range(0, length, page):
            at = order[used]
            table[b, i // page], used = at, used + 1
            for pages, rows in ((k_pages, k), (v_pages, v)):
                pages[at, : min(page, length - i)] = rows[b, i : min(i + page, length)]
    expected = run(q, k, v, **options)
    actual = run(
        *(q, k_pages, v_pages),
        **options,
        seqlen_k=150,
        block_table=table,
        block_table_stride=table.shape[1],
        page_shift=page_shift,
    )
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def varlen(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """q (total_q, heads, dim) and so on; the bounds are the ends' own."""
    batch = len(q_ends) - 1
    longest = [
        min(int((ends[1:] - ends[:-1]).max()), t.shape[0]) for ends, t in ((q_ends, q), (k_ends, k))
    ]
    shared = [t[None].expand(batch, *t.shape) for t in (q, k, v)]
    out, lse = run(
        *shared,
        **options,
        out_shape=(1, *q.shape),
        lse_batch_stride=0,
        seqlen_q=longest[0],
        seqlen_k=longest[1],
        cu_seqlens_q=q_ends,
        cu_seqlens_k=k_ends,
        total_q=q.shape[0],
        total_k=k.shape[0],
    )
    return out[0], lse[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "lengths",
    [
        ([5, 1, 50], [5, 1, 50]),
        ([1, 1, 1], [200, 3, 1]),
        ([3, 0, 40], [90, 10, 40]),
        ([10, 20], [5, 0]),
    ],
)
def test_varlen(dtype: torch.dtype, lengths: tuple[list[int], list[int]]) -> None:
    ends = [torch.tensor([0, *accumulate(n)], dtype=torch.int32) for n in lengths]
    behind = 3  # rows of no sequence
    q = torch.randn(sum(lengths[0]) + behind, 4, 40).to(dtype)
    k, v = (torch.randn(sum(lengths[1]), 2, 40).to(dtype) for _ in "kv")
    options: dict[str, Any] = {"scale": 0.2, "softcap": 20.0, "window": 30}

    def truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention_varlen(q, k, v, *ends, 0, 0, **options)

    out, lse = varlen(q, k, v, *ends, **options)
    assert_accurate(out, truth, q, k, v, roundings=2)
    assert (lse[:, -behind:] == -math.inf).all()
    for b in range(len(lengths[0])):
        rows, keys = (slice(e[b], e[b + 1]) for e in ends)
        assert_lse_accurate(
            lse[None, :, rows], q[None, rows], k[None, keys], v[None, keys], **options
        )


@pytest.mark.parametrize("seqlen_q", [1, 40])
def test_lengths_out_of_range_are_clamped(seqlen_q: int) -> None:
    # The emulation fails where anything outside of the tensors is touched.
    q, k, v = random_qkv(3, seqlen_q, 50, dtype=torch.bfloat16)
    out, lse = run(
        *(q, k, v),
        scale=0.1,
        key_lengths=torch.tensor([10**9, -7, 50]),
        key_starts=torch.tensor([-5, 3, 10**9]),
    )
    whole = run(q, k, v, scale=0.1)
    assert torch.equal(out[0], whole[0][0])
    assert torch.equal(out[1:], torch.zeros_like(out[1:]))
    assert (lse[1:] == -math.inf).all()
    ends = torch.tensor([-3, 20, 10, 10**9], dtype=torch.int32)
    out, _ = varlen(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), ends, ends, scale=0.1)
    assert out[:20].isfinite().all()


# ---- schedules, barriers, devices

# seqlen_q, head_dim and device: each of the kernels, with and without splits.
KERNELS = {
    "decode 64": (1, 64, {"compute_capability": 80}),
    "decode 64 clusters": (1, 64, {}),
    "decode 256": (3, 256, {"multiprocessors": 1}),
    "tile 64": (70, 64, {}),
    "tile 128": (70, 128, {"multiprocessors": 1}),
    "tile 256": (70, 256, {"multiprocessors": 1}),
    "tile 256 large": (70, 256, {"shared_bytes": 163 * KIB, "multiprocessors": 1}),
    "plain": (3, 40, {"multiprocessors": 1}),
}


def runner(kernel: str) -> Callable[..., tuple[Tensor, Tensor]]:
    seqlen_q, head_dim, device = KERNELS[kernel]
    dtype = torch.float32 if kernel == "plain" else torch.bfloat16
    q, k, v = random_qkv(1, seqlen_q, 330, (2, 1), head_dim, dtype)

    def attend(**options: Any) -> tuple[Tensor, Tensor]:
        return run(q, k, v, scale=0.1, softcap=20.0, window=250, **device, **options)

    return attend


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_schedule_gives_the_same(kernel: str) -> None:
    torch.manual_seed(3)
    attend = runner(kernel)
    results = [attend(schedule=schedule) for schedule in SCHEDULES]
    for result in results:
        for t, first in zip(result, results[0], strict=True):
            assert torch.isfinite(t).all()
            assert torch.equal(t, first)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_barrier_is_needed(kernel: str) -> None:
    torch.manual_seed(3)
    attend = runner(kernel)
    attend()
    places = emulator.library().emulation_places().decode().split()
    count = {"decode": 4, "tile": 4, "plain": 0}[kernel.split()[0]]
    # Where keys are divided, their sum has one; rows that come to a block's end have one instead.
    split = kernel in ("plain", "decode 64")
    assert len(places) == count + split + 2 * kernel.endswith("clusters"), places
    for place in places:
        # In the emulation ldmatrix, which comes next, brings the lanes of a warp together as well.
        if "__syncwarp" not in emulator.line_of(place):
            assert_needed(attend, place)


@pytest.mark.parametrize("kib", [99, 163, 227])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_tile_fits(kib: int, head_dim: int) -> None:
    """sm_86, 89, 120; sm_80; sm_90, 100: a launch with more shared memory is refused."""
    for seqlen_q in (1, 20):
        q, k, v = random_qkv(1, seqlen_q, 20, (1, 1), head_dim, torch.bfloat16)
        check(q, k, v, {"shared_bytes": kib * KIB, "multiprocessors": 1}, scale=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlens", [(1, 700), (20, 700)])
def test_splits(dtype: torch.dtype, seqlens: tuple[int, int]) -> None:
    """However many multiprocessors there are to be filled; splits past a short row's keys too."""
    if dtype == torch.float32:
        seqlens = (min(seqlens[0], 4), 300)
    q, k, v = random_qkv(2, *seqlens, (2, 1), 64, dtype)
    for multiprocessors, compute_capability in itertools.product((1, 7, 132), (80, 90)):
        device = {"multiprocessors": multiprocessors, "compute_capability": compute_capability}
        check(q, k, v, device, scale=0.1, key_lengths=torch.tensor([seqlens[1], 21]))


def test_too_many_rows() -> None:
    q, k, v = random_qkv(1, 1, 1, (1, 1), 8, torch.bfloat16)
    with pytest.raises(emulator.Refused, match="attention: too many rows for CUDA: "):
        run(q, k, v, scale=1.0, seqlen_q=2**31)
