"""Hopper's kernels for attention's gradients, on an emulated device that has them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_common import random_qkv
from host_cuda import emulator
from host_cuda.attention_launches import run, run_backward
from host_cuda.emulator import SCHEDULES
from host_cuda.test_cuda_attention_backward import check

NAN = float("nan")
HALVES = (torch.bfloat16, torch.float16)
HOPPER = {"shared_bytes": 227 << 10}


@pytest.fixture(autouse=True)
def by_these_kernels() -> Any:
    """They serve the last launch of every test here."""
    torch.manual_seed(12)
    yield
    assert "attention_backward_wgmma.cu:" in emulator.library().emulation_places().decode()


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [*((torch.bfloat16, d) for d in (72, 128, 256)), *((torch.float16, d) for d in (128, 200))],
)
@pytest.mark.parametrize("seqlens", [(1, 1), (70, 140), (140, 70), (129, 129)])
def test_value(dtype: torch.dtype, head_dim: int, seqlens: tuple[int, int]) -> None:
    q, k, v = random_qkv(1, *seqlens, (4, 2), head_dim, dtype)
    check(q, k, v, HOPPER, scale=head_dim**-0.5, softcap=50.0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (8, 1)])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_groups(dtype: torch.dtype, heads: tuple[int, int], head_dim: int) -> None:
    check(*random_qkv(2, 70, 70, heads, head_dim, dtype), HOPPER, scale=0.1)


@pytest.mark.parametrize("window", [1, 63, 64, 100])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_window(window: int, head_dim: int) -> None:
    q, k, v = random_qkv(1, 150, 200, (2, 1), head_dim, torch.bfloat16)
    check(q, k, v, HOPPER, scale=0.1, window=window, softcap=3.0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("softcap", [50.0, 5.0])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_soft_cap_bites(dtype: torch.dtype, softcap: float, head_dim: int) -> None:
    q, k, v = random_qkv(1, 70, 100, (2, 1), head_dim, dtype, q_scale=30.0)
    check(q, k, v, HOPPER, scale=head_dim**-0.5, softcap=softcap)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_padding(causal: bool, head_dim: int) -> None:
    q, k, v = random_qkv(4, 70, 140, (2, 1), head_dim, torch.bfloat16)
    starts, lengths = torch.tensor([0, 3, 70, 140]), torch.tensor([140, 100, 70, 140])
    check(q, k, v, HOPPER, scale=0.1, causal=causal, key_lengths=lengths, key_starts=starts)


@pytest.mark.parametrize("head_dim", [128, 256])
def test_what_stands_behind_keys_and_rows_does_not_leak(head_dim: int) -> None:
    """NaN beyond the lengths, and in a row's q and grad_out for keys that it does not see."""
    q, k, v = random_qkv(3, 150, 150, (2, 1), head_dim, torch.bfloat16)
    options = {"scale": 0.1, "window": 30, "key_lengths": torch.tensor([150, 130, 129]), **HOPPER}
    options["key_starts"] = torch.tensor([0, 3, 64])
    out, lse = run(q, k, v, **options)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    expected = run_backward(q, k, v, out, lse, grad_out, grad_lse, **options)
    for b in range(3):
        for t in (k, v):
            t[b, : options["key_starts"][b]] = NAN
            t[b, options["key_lengths"][b] :] = NAN
    actual = run_backward(q, k, v, out, lse, grad_out, grad_lse, **options)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
    row = 100  # of sequence 0: it sees keys 71 to 100
    q[0, row], grad_out[0, row] = NAN, NAN
    actual = run_backward(q, k, v, out, lse, grad_out, grad_lse, **options)
    assert actual[0][0, row].isnan().all()
    others = torch.arange(150) != row
    assert torch.equal(actual[0][:, others], expected[0][:, others])
    unseen = (torch.arange(150) < row - 29) | (torch.arange(150) > row)
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert torch.equal(a[1:], e[1:])
        # A row that a block of keys meets is a factor of 0 for those that it does not see.
        size = {128: 128, 256: 64}[head_dim]  # of a block of keys
        blocks = torch.arange(150) // size != row // size
        assert torch.equal(a[0][unseen & blocks], e[0][unseen & blocks])


# By bulk tensor copies; and rows of three heads, which are no box.
HEADS = ((2, 1), (3, 1))


def attend(head_dim: int, heads: tuple[int, int], **how: Any) -> tuple[Tensor, ...]:
    torch.manual_seed(5)
    q, k, v = random_qkv(1, 200, 300, heads, head_dim, torch.bfloat16)
    options = {"scale": 1 / 16, "softcap": 20.0, "window": 250, **HOPPER}
    out, lse = run(q, k, v, **options)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    return run_backward(q, k, v, out, lse, grad_out, grad_lse, **options, **how)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("head_dim", [128, 256])
def test_every_schedule_gives_the_same(head_dim: int, heads: tuple[int, int]) -> None:
    results = [attend(head_dim, heads, schedule=schedule) for schedule in SCHEDULES]
    for result in results:
        for t, first in zip(result, results[0], strict=True):
            assert torch.isfinite(t).all()
            assert torch.equal(t, first)


# Waits that the emulation may do without, by function and line: lanes come together in products
# beside __syncwarp; both warpgroups clear a tail with the same zeros; the block's own tiles are
# announced before the first of the others; a copy waited for later is announced later, that is
# all; and what comes behind the others waits by itself.
FREE = {
    ("clear_tail", "named_barrier_sync(barrier, kGroupThreads);"),
    ("release_a", "__syncwarp();"),
    ("release_b", "__syncwarp();"),
    ("wait_b", "mbarrier_wait(full_b(i), i / S::kStagesB & 1);"),
    ("produce", "if (pending) cp_async_wait<1>(), announce();"),
    *((f"consume_{name}", "wgmma_wait<1>();") for name in ("rows", "for_k", "for_v")),
    *((f"consume_{n}", "mbarrier_wait(M::full_mine(), 0);") for n in ("rows", "keys")),
    *((f"consume_{n}", "mbarrier_wait(M::full_mine(), 0);") for n in ("for_k", "for_v")),
    ("consume_keys", "wgmma_wait<0>();"),
}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("head_dim", [128, 256])
def test_waits_are_needed(head_dim: int, heads: tuple[int, int]) -> None:
    """Of tiles, products and what one warpgroup hands to the other."""

    def run_it(**how: Any) -> tuple[Tensor, ...]:
        return attend(head_dim, heads, **how)

    run_it()
    places = emulator.library().emulation_places().decode().split()
    needed, free = [], []
    for place in places:
        file, number = place.split(":")[0], int(place.split(":")[1])
        above = (emulator.ROOT / "csrc" / "cuda" / file).read_text().splitlines()[:number]
        pattern = r"GEMMA2_DEVICE (?:static )?[\w ]+[ *]+(\w+)\("
        which = re.findall(pattern, "\n".join(above))[-1], above[-1].strip()
        (needed if emulator.is_needed(run_it, place) else free).append(which)
    if heads == (3, 1):  # no bulk copy is to see the barriers
        free.remove(("prepare", "fence_mbarrier_init();"))
    assert set(free) <= FREE
    assert len(needed) >= {128: 11, 256: 17}[head_dim], needed
