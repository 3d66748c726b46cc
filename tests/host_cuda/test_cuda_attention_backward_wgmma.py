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
from host_cuda.emulator import SCHEDULES, assert_needed
from host_cuda.test_cuda_attention_backward import check

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


def attend(head_dim: int, **how: Any) -> tuple[Tensor, ...]:
    torch.manual_seed(5)
    q, k, v = random_qkv(1, 200, 300, (2, 1), head_dim, torch.bfloat16)
    options = {"scale": 1 / 16, "softcap": 20.0, "window": 250, **HOPPER}
    out, lse = run(q, k, v, **options)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    return run_backward(q, k, v, out, lse, grad_out, grad_lse, **options, **how)


@pytest.mark.parametrize("head_dim", [128, 256])
def test_every_schedule_gives_the_same(head_dim: int) -> None:
    results = [attend(head_dim, schedule=schedule) for schedule in SCHEDULES]
    for result in results:
        for t, first in zip(result, results[0], strict=True):
            assert torch.isfinite(t).all()
            assert torch.equal(t, first)


# Waits that the emulation can do without, by function and line: lanes come together in products
# beside __syncwarp; the block's own tiles are announced before the first of the others; a copy
# waited for later is announced later, that is all; what comes behind the others waits by itself.
FREE = {
    ("release_a", "__syncwarp();"),
    ("release_b", "__syncwarp();"),
    ("produce", "if (pending) cp_async_wait<1>(), announce();"),
    *((f"consume_{name}", "mbarrier_wait(M::full_mine(), 0);") for name in ("rows", "keys")),
    *((f"consume_for_{name}", "mbarrier_wait(M::full_mine(), 0);") for name in "kv"),
    *((f"consume_for_{name}", "wgmma_wait<1>();") for name in "kv"),
    ("consume_keys", "wgmma_wait<0>();"),
}
FREE_OF_128 = {*FREE, ("wait_b", "mbarrier_wait(full_b(i), i / S::kStagesB & 1);")}


@pytest.mark.parametrize("head_dim", [128, 256])
def test_waits_are_needed(head_dim: int) -> None:
    """Of tiles, products and what one warpgroup hands to the other."""
    attend(head_dim)
    places = emulator.library().emulation_places().decode().split()
    source = (emulator.ROOT / "csrc/cuda/attention_backward_wgmma.cu").read_text().splitlines()
    needed = 0
    for place in places:
        number = int(place.split(":")[1])
        above = "\n".join(source[:number])
        function = re.findall(r"GEMMA2_DEVICE (?:static )?[\w ]+[ *]+(\w+)\(", above)[-1]
        if (function, source[number - 1].strip()) in (FREE_OF_128 if head_dim == 128 else FREE):
            continue
        assert_needed(lambda **how: attend(head_dim, **how), place)
        needed += 1
    assert needed == {128: 12, 256: 18}[head_dim]
