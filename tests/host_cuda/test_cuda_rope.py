from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from common import DTYPES, assert_accurate
from gemma2_ext import reference
from host_cuda.emulator import assert_needed, check_schedules, guarded, launch, places

BATCH, SEQLEN, HEADS, KV_HEADS = 2, 3, 4, 2
# Many tokens have a kernel of their own; how many that is hangs on the device.
FEW_AND_MANY = pytest.mark.parametrize("multiprocessors", [4, 0], ids=["few", "many"])


def inputs(head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [(BATCH, SEQLEN, heads, head_dim) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (torch.randn(shape).to(dtype) for shape in shapes)
    return q, k, v


def fields(q: Tensor, k: Tensor, positions: Tensor) -> dict[str, Any]:
    return {
        "q": q,
        "k": k,
        "positions": positions,
        "positions_batch_stride": positions.stride(0) if positions.dim() == 2 else 0,
        "inv_freq": reference.rope_frequencies(q.shape[-1], 10000.0),
        "batch": q.shape[0],
        "seqlen": q.shape[1],
        "num_heads": q.shape[2],
        "num_kv_heads": k.shape[2],
        "head_dim": q.shape[3],
        "dtype": q.dtype,
    }


def rope(
    q: Tensor, k: Tensor, positions: Tensor, offset: int = 0, **options: Any
) -> tuple[Tensor, Tensor]:
    outs = guarded(q.shape, q.dtype, offset=offset), guarded(k.shape, k.dtype, offset=offset)
    launch("rope", **fields(q, k, positions), q_out=outs[0], k_out=outs[1], **options)
    return outs


def rope_append_cache(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, capacity: int, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    q_out = guarded(q.shape, q.dtype)
    shape = (q.shape[0], capacity, *k.shape[2:])
    caches = guarded(shape, q.dtype), guarded(shape, q.dtype)
    for cache in caches:
        cache.fill_(7.0)
    launch(
        "rope",
        **fields(q, k, positions),
        q_out=q_out,
        v=v,
        k_cache=caches[0],
        v_cache=caches[1],
        capacity=capacity,
        **options,
    )
    return q_out, *caches


@FEW_AND_MANY
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 6, 18, 64, 256, 2056])
def test_value(dtype: torch.dtype, head_dim: int, multiprocessors: int) -> None:
    q, k, _ = inputs(head_dim, dtype)
    positions = torch.tensor([[0, 1, 8191], [-5, 100000, 4097]])
    q_out, k_out = check_schedules(
        lambda **options: rope(q, k, positions, multiprocessors=multiprocessors, **options)
    )
    assert_accurate(q_out, lambda q, k, p: reference.rope(q, k, p)[0], q, k, positions)
    assert_accurate(k_out, lambda q, k, p: reference.rope(q, k, p)[1], q, k, positions)


@FEW_AND_MANY
@pytest.mark.parametrize("dtype", DTYPES)
def test_full_cache_and_ring(dtype: torch.dtype, multiprocessors: int) -> None:
    q, k, v = inputs(64, dtype)
    positions = torch.tensor([[-1, 6, 7], [3, 4, 5]])  # padding in row 0
    right_q, right_k = rope(q, k, positions)
    for capacity in (8, 4):
        q_out, k_cache, v_cache = check_schedules(
            lambda capacity=capacity, **options: rope_append_cache(
                q, k, v, positions, capacity, multiprocessors=multiprocessors, **options
            )
        )
        assert torch.equal(q_out[0, 0], q[0, 0])
        assert torch.equal(q_out[0, 1:], right_q[0, 1:])
        assert torch.equal(q_out[1], right_q[1])
        expected_k, expected_v = torch.full_like(k_cache, 7.0), torch.full_like(v_cache, 7.0)
        for b in range(BATCH):
            for i in range(SEQLEN):
                if positions[b, i] >= 0:
                    slot = int(positions[b, i]) % capacity
                    expected_k[b, slot], expected_v[b, slot] = right_k[b, i], v[b, i]
        assert torch.equal(k_cache, expected_k)
        assert torch.equal(v_cache, expected_v)


@FEW_AND_MANY
def test_the_inverse_takes_it_back(multiprocessors: int) -> None:
    q, k, _ = inputs(64, torch.float32)
    positions = torch.tensor([[0, 1, 8191], [-5, 1000, 4097]])
    options = {"multiprocessors": multiprocessors}
    outs = rope(*rope(q, k, positions, **options), positions, inverse=True, **options)
    torch.testing.assert_close(outs[0], q)
    torch.testing.assert_close(outs[1], k)


@FEW_AND_MANY
def test_strides(multiprocessors: int) -> None:
    options = {"multiprocessors": multiprocessors}
    stacked = torch.randn(BATCH, SEQLEN, HEADS + 2 * KV_HEADS, 64).bfloat16()
    q, k, _ = stacked.split((HEADS, KV_HEADS, KV_HEADS), dim=2)
    positions = torch.arange(SEQLEN)
    expected = rope(q.contiguous(), k.contiguous(), positions, **options)
    moved = torch.randn(q.numel() + 1).bfloat16()[1:].view(q.shape).copy_(q)
    for outs in (
        rope(q, k, positions, **options),
        rope(moved, k, positions, **options),
        rope(q, k, positions, offset=1, **options),
        rope(q.transpose(1, 2).contiguous().transpose(1, 2), k, positions, **options),
    ):
        assert torch.equal(outs[0], expected[0])
        assert torch.equal(outs[1], expected[1])


def test_many_tokens_in_steps_of_the_grid() -> None:
    q, k, _ = inputs(256, torch.bfloat16)
    q, k = (t.repeat(1, 7, 1, 1) for t in (q, k))
    positions = torch.arange(21)
    expected = rope(q, k, positions, multiprocessors=100)  # by the kernel for few
    for outs in (
        rope(q, k, positions, multiprocessors=0, max_blocks=2),
        check_schedules(lambda **options: rope(q, k, positions, multiprocessors=0, **options)),
    ):
        assert torch.equal(outs[0], expected[0])
        assert torch.equal(outs[1], expected[1])


def test_every_barrier_is_needed() -> None:
    q, k, _ = inputs(256, torch.float32)
    positions = torch.tensor([[1, 2, 3], [4, 5, 6]])
    run = lambda **options: rope(q, k, positions, max_blocks=1, **options)  # noqa: E731
    assert len(places(run)) == 2
    for place in places(run):
        assert_needed(run, place)
