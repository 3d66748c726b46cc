"""Hopper's kernel for many rows, on an emulated device that has it."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_common import assert_lse_accurate, random_qkv, reference_of
from common import assert_accurate
from gemma2_ext import reference
from host_cuda import emulator
from host_cuda.attention_launches import run
from host_cuda.emulator import SCHEDULES, assert_needed
from host_cuda.test_cuda_attention import check, ring, varlen

NAN = float("nan")
HALVES = (torch.bfloat16, torch.float16)
ROWS = 128  # of a block
HOPPER = {"shared_bytes": 227 << 10, "multiprocessors": 1}  # so that no keys are divided
FULL = {**HOPPER, "multiprocessors": 132}


@pytest.fixture(autouse=True)
def by_this_kernel() -> Any:
    """It serves the last launch of every test here."""
    torch.manual_seed(11)
    yield
    assert "attention_wgmma.cu:" in emulator.library().emulation_places().decode()


@pytest.mark.parametrize("device", [HOPPER, FULL])
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [
        *((torch.bfloat16, head_dim) for head_dim in (72, 128, 256)),
        *((torch.float16, head_dim) for head_dim in (128, 200, 256)),
    ],
)
@pytest.mark.parametrize("seqlens", [(128, 128), (131, 131), (150, 407), (200, 70)])
def test_value(
    dtype: torch.dtype, head_dim: int, seqlens: tuple[int, int], device: dict[str, Any]
) -> None:
    q, k, v = random_qkv(1, *seqlens, (4, 2), head_dim, dtype)
    check(q, k, v, device, scale=head_dim**-0.5, softcap=50.0)


@pytest.mark.parametrize("device", [HOPPER, FULL])
@pytest.mark.parametrize("heads", [(1, 1), (8, 1), (6, 2), (5, 1)])
def test_groups(heads: tuple[int, int], device: dict[str, Any]) -> None:
    """Rows of three and of five heads are no box: they are copied otherwise."""
    q, k, v = random_qkv(2, 260, 260, heads, 128, torch.bfloat16)
    check(q, k, v, device, scale=0.2, softcap=30.0)


@pytest.mark.parametrize("window", [1, 79, 80, 81, 200])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_window(window: int, head_dim: int) -> None:
    q, k, v = random_qkv(1, 140, 300, (2, 1), head_dim, torch.bfloat16)
    check(q, k, v, HOPPER, scale=0.1, window=window)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("softcap", [50.0, 5.0, 0.5])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_soft_cap_bites(dtype: torch.dtype, softcap: float, head_dim: int) -> None:
    q, k, v = random_qkv(1, 130, 200, (4, 2), head_dim, dtype, q_scale=30.0)
    noise = torch.finfo(torch.float32).eps * softcap * v.abs().max().item()
    check(q, k, v, HOPPER, scale=0.125, softcap=softcap, noise=noise)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_any_scale(dtype: torch.dtype, scale: float) -> None:
    q, k, v = random_qkv(1, 128, 200, (2, 1), 128, dtype)
    check(q, k, v, HOPPER, scale=scale)
    check(q, k, v, HOPPER, scale=scale, softcap=2.0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", [128, 256])
def test_the_largest_score_comes_last(dtype: torch.dtype, head_dim: int) -> None:
    """Scores that grow from tile to tile: output so far is scaled, or not if they grow little."""
    q, k, v = random_qkv(1, 128, 700, (2, 1), head_dim, dtype)
    for growth in (1e-3, 3e-2, 0.3):
        steps = torch.arange(700.0)[None, :, None, None]
        k2 = (k.float() * 0.1 + q[:, -1:, :1].float().sign() * steps * growth / head_dim).to(dtype)
        check(q, k2, v, HOPPER, scale=1.0, causal=False)
        check(q, k2, v, HOPPER, scale=1.0, softcap=50.0)


@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 50), (False, None)])
def test_padding_on_both_sides(causal: bool, window: int | None) -> None:
    q, k, v = random_qkv(5, 130, 300, (2, 1), 128, torch.bfloat16)
    starts = torch.tensor([0, 3, 100, 200, 300])
    lengths = torch.tensor([300, 160, 101, 200, 300])
    options = {"scale": 0.1, "causal": causal, "key_lengths": lengths, "key_starts": starts}
    options["window"] = window
    expected = run(q, k, v, **options, **HOPPER)
    for b in range(5):
        for t in (k, v):
            t[b, : starts[b]] = NAN
            t[b, lengths[b] :] = NAN
    for actual, right in zip(run(q, k, v, **options, **HOPPER), expected, strict=True):
        assert torch.equal(actual, right)
    assert_accurate(expected[0], reference_of(**options), q, k, v)
    assert_lse_accurate(expected[1], q, k, v, **options)
    assert torch.equal(expected[0][4], torch.zeros_like(expected[0][4]))
    assert (expected[1][4] == -math.inf).all()


@pytest.mark.parametrize("device", [HOPPER, FULL])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("poison", [NAN, math.inf])
def test_unseen_keys_do_not_leak(
    dtype: torch.dtype, head_dim: int, poison: float, device: dict[str, Any]
) -> None:
    q, k, v = random_qkv(1, 140, 300, (2, 1), head_dim, dtype)
    key = 230
    options = {"scale": 0.1, "window": 100, **device}
    expected, expected_lse = run(q, k, v, **options)
    k[0, key], v[0, key] = NAN, poison
    actual, lse = run(q, k, v, **options)
    position = torch.arange(160, 300)
    sees = (position >= key) & (position < key + 100)
    # Computed anew with weights that are not rounded to 16 bits: by half a unit of bfloat16 each.
    torch.testing.assert_close(actual[0, ~sees], expected[0, ~sees], rtol=1.6e-2, atol=5e-3)
    torch.testing.assert_close(lse[0, :, ~sees], expected_lse[0, :, ~sees])
    assert actual[0, sees].isnan().all()


@pytest.mark.parametrize("head_dim", [128, 256])
def test_rows_beside_each_other_and_apart(head_dim: int) -> None:
    """Strides of views, and an output whose rows are not in pieces of 16 bytes."""
    q, k, v = random_qkv(2, 140, 200, (4, 2), head_dim, torch.bfloat16)
    expected = run(q, k, v, scale=0.1, softcap=30.0, **HOPPER)
    apart = []
    for t in (q, k, v):
        wide = torch.full((*t.shape[:2], t.shape[2] + 1, head_dim + 8), NAN, dtype=t.dtype)
        wide[..., :-1, :head_dim] = t
        apart.append(wide[..., :-1, :head_dim])
    actual = run(*apart, scale=0.1, softcap=30.0, **HOPPER)
    by_head = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    also = run(*by_head, scale=0.1, softcap=30.0, **HOPPER)
    for a, b, e in zip(actual, also, expected, strict=True):
        assert torch.equal(a, e)
        assert torch.equal(b, e)
    memory = torch.full((expected[0].numel() + 1,), NAN, dtype=q.dtype)
    out = memory[1:].view(expected[0].shape)
    run(q, k, v, scale=0.1, softcap=30.0, into=out, **HOPPER)
    assert torch.equal(out, expected[0])


@pytest.mark.parametrize("device", [HOPPER, FULL])
@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize(("window", "slack"), [(133, 0), (133, 7), (300, 200)])
def test_ring(window: int, slack: int, head_dim: int, device: dict[str, Any]) -> None:
    """Keys before and behind the ring's end, with NaN in slots that hold none."""
    seqlen_q = 130
    capacity = window + seqlen_q - 1 + slack
    lengths = [130, window, capacity, capacity + 1, capacity + 79, capacity + 81, capacity + 128]
    lengths += [2 * capacity - 1, 2 * capacity, 2 * capacity + 5]
    q, k, v = random_qkv(len(lengths), seqlen_q, max(lengths), (2, 1), head_dim, torch.bfloat16)
    options = {"scale": 0.2, "softcap": 5.0, "window": window, "key_lengths": torch.tensor(lengths)}
    caches = ring(k, lengths, capacity), ring(v, lengths, capacity)
    out, lse = run(q, *caches, **options, capacity=capacity, seqlen_k=capacity, **device)
    assert_accurate(out, reference_of(**options), q, k, v)
    assert_lse_accurate(lse, q, k, v, **options)


@pytest.mark.parametrize("page_shift", [0, 4, 7])
def test_pages(page_shift: int) -> None:
    page, keys = 1 << page_shift, 300
    q, k, v = random_qkv(1, 140, keys, (2, 1), 128, torch.bfloat16)
    options = {"scale": 0.2, "window": 100, **HOPPER}
    count = -(-keys // page)
    table = torch.randperm(count).int()[None]
    pages = [torch.full((count, page, 1, 128), NAN, dtype=q.dtype) for _ in "kv"]
    for i in range(count):
        for to, rows in zip(pages, (k, v), strict=True):
            part = rows[0, i * page : (i + 1) * page]
            to[table[0, i], : len(part)] = part
    expected = run(q, k, v, **options)
    actual = run(
        *(q, *pages),
        **options,
        seqlen_k=keys,
        key_lengths=torch.tensor([keys]),
        block_table=table,
        block_table_stride=count,
        page_shift=page_shift,
    )
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("heads", [(4, 2), (3, 1)])
@pytest.mark.parametrize(
    "lengths",
    [([150, 1, 50], [150, 1, 50]), ([3, 0, 170], [90, 10, 200]), ([140, 20], [100, 0])],
)
def test_varlen(lengths: tuple[list[int], list[int]], heads: tuple[int, int]) -> None:
    ends = [torch.tensor([0, *accumulate(n)], dtype=torch.int32) for n in lengths]
    behind = 3  # rows of no sequence
    q = torch.randn(sum(lengths[0]) + behind, heads[0], 128).bfloat16()
    k, v = (torch.randn(sum(lengths[1]), heads[1], 128).bfloat16() for _ in "kv")
    options: dict[str, Any] = {"scale": 0.2, "softcap": 20.0, "window": 60}

    def truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention_varlen(q, k, v, *ends, 0, 0, **options)

    out, lse = varlen(q, k, v, *ends, **options, **HOPPER)
    assert_accurate(out, truth, q, k, v, roundings=2)
    assert (lse[:, -behind:] == -math.inf).all()
    for b in range(len(lengths[0])):
        rows, keys = (slice(e[b], e[b + 1]) for e in ends)
        assert_lse_accurate(
            lse[None, :, rows], q[None, rows], k[None, keys], v[None, keys], **options
        )


# ---- schedules and waits

# head_dim, head counts and whether there are pages, which bulk copies do not take, or a ring.
KERNELS = {
    "256": (256, (2, 1), ""),
    "128": (128, (2, 1), ""),
    "queries by all": (256, (3, 1), ""),
    "pages": (256, (2, 1), "pages"),
    "ring": (128, (2, 1), "ring"),
}


def attend(kernel: str, **options: Any) -> tuple[Tensor, Tensor]:
    head_dim, heads, cache = KERNELS[kernel]
    torch.manual_seed(3)
    q, k, v = random_qkv(1, 200, 400, heads, head_dim, torch.bfloat16)
    fields: dict[str, Any] = {"scale": 0.1, "softcap": 20.0, "window": 250, **HOPPER}
    if cache == "ring":
        fields |= {"seqlen_k": 400, "capacity": 400, "window": 180}
        fields["key_lengths"] = torch.tensor([500])
    if cache == "pages":
        fields |= {"seqlen_k": 400, "block_table_stride": 1, "page_shift": 9}
        fields["block_table"] = torch.zeros(1, 1, dtype=torch.int32)
    return run(q, k, v, **fields, **options)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_schedule_gives_the_same(kernel: str) -> None:
    results = [attend(kernel, schedule=schedule) for schedule in SCHEDULES]
    for result in results:
        for t, first in zip(result, results[0], strict=True):
            assert torch.isfinite(t).all()
            assert torch.equal(t, first)


# Lines that the emulation can do without: lanes of a warp come together in the products beside
# these __syncwarp; both warpgroups clear a tail with the same zeros; and output of warps that are
# through may take rows of Q, as here another warp's product reads its own rows only.
FREE = (
    "__syncwarp();",
    "named_barrier_sync(barrier, kGroupThreads);",
    "named_barrier_sync(kGroupBarrier + group, kGroupThreads);",
)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_wait_is_needed(kernel: str) -> None:
    attend(kernel)
    places = emulator.library().emulation_places().decode().split()
    lines = {place: emulator.line_of(place) for place in places}
    assert len([line for line in lines.values() if line.startswith("wgmma_wait")]) == 4
    for place, line in lines.items():
        # Of Q alone, which comes before K in any case; and of barriers that no bulk copy meets.
        in_pages = line in ("mbarrier_wait(full_q, 0);", "fence_mbarrier_init();")
        if line in FREE or (kernel == "pages" and in_pages):
            continue
        assert_needed(lambda **how: attend(kernel, **how), place)
