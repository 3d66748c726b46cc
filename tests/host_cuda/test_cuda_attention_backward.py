from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attention_common import gradient_noise, random_qkv
from common import DTYPES, assert_gradients_accurate
from gemma2_ext import reference
from host_cuda import emulator
from host_cuda.attention_launches import run, run_backward
from host_cuda.emulator import SCHEDULES, assert_needed

HALVES = (torch.bfloat16, torch.float16)


class Emulated(torch.autograd.Function):
    """(out, lse) of the emulated kernels, with their gradients."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: Any) -> tuple[Tensor, Tensor]:
        out, lse = run(q, k, v, **options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = options
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> Any:
        grads = run_backward(
            *ctx.saved_tensors, grad_out.contiguous(), grad_lse.contiguous(), **ctx.options
        )
        return *grads, None


def check(
    q: Tensor, k: Tensor, v: Tensor, device: dict[str, Any] | None = None, **options: Any
) -> None:
    """Against autograd of the reference in float64, for random gradients of out and lse."""

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return Emulated.apply(q, k, v, {**options, **(device or {})})

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return reference.attention(q, k, v, return_lse=True, **options)

    noise = gradient_noise(q, k, v, options["scale"])
    assert_gradients_accurate(ours, theirs, q, k, v, roundings=2, noise=noise)


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(torch.bfloat16, 64), (torch.bfloat16, 256), (torch.float16, 72), (torch.float32, 40)],
)
@pytest.mark.parametrize("seqlens", [(1, 1), (5, 70), (40, 70), (40, 30)])
def test_value(dtype: torch.dtype, head_dim: int, seqlens: tuple[int, int]) -> None:
    if dtype == torch.float32:
        seqlens = min(seqlens[0], 6), min(seqlens[1], 20)
    q, k, v = random_qkv(1, *seqlens, (4, 2), head_dim, dtype)
    check(q, k, v, scale=head_dim**-0.5, softcap=50.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2)])
def test_groups(dtype: torch.dtype, heads: tuple[int, int]) -> None:
    seqlen = 6 if dtype == torch.float32 else 30
    check(*random_qkv(2, seqlen, seqlen, heads, 24, dtype), scale=0.2)


@pytest.mark.parametrize("window", [1, 16, 33])
def test_window(window: int) -> None:
    q, k, v = random_qkv(1, 40, 90, (2, 1), 16, torch.bfloat16)
    check(q, k, v, scale=0.25, window=window, softcap=3.0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("softcap", [50.0, 5.0])
def test_soft_cap_bites(dtype: torch.dtype, softcap: float) -> None:
    check(*random_qkv(1, 20, 40, (4, 2), 64, dtype, q_scale=30.0), scale=0.125, softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_padding(dtype: torch.dtype, causal: bool) -> None:
    seqlen_q = 4 if dtype == torch.float32 else 40
    q, k, v = random_qkv(4, seqlen_q, 70, (2, 1), dtype=dtype)
    starts, lengths = torch.tensor([0, 3, 20, 70]), torch.tensor([70, 60, 20, 70])
    check(q, k, v, scale=0.1, causal=causal, key_lengths=lengths, key_starts=starts)


def attend(**how: Any) -> tuple[Tensor, ...]:
    torch.manual_seed(5)
    q, k, v = random_qkv(1, 50, 70, (2, 1), 64, torch.bfloat16)
    options = {"scale": 0.1, "softcap": 20.0, "window": 60}
    out, lse = run(q, k, v, **options)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    return run_backward(q, k, v, out, lse, grad_out, grad_lse, **options, **how)


def test_every_schedule_gives_the_same() -> None:
    results = [attend(schedule=schedule) for schedule in SCHEDULES]
    for result in results:
        for t, first in zip(result, results[0], strict=True):
            assert torch.isfinite(t).all()
            assert torch.equal(t, first)


def test_every_barrier_is_needed() -> None:
    attend()
    places = emulator.library().emulation_places().decode().split()
    assert len(places) == 3, places
    for place in places:
        assert_needed(attend, place)
