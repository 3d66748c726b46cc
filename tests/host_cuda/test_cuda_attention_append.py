"""Attention that rotates a row's query and puts its token into the cache, in one kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gemma2_ext import reference
from host_cuda import attention_launches
from host_cuda.emulator import ROOT, Refused, assert_needed, check_schedules, launch, places

NAN = float("nan")
# Around a warp's 16 keys, a run of 64 and the ring; 0: a row without a token.
LENGTHS = [0, 1, 2, 16, 17, 64, 65, 96, 97, 130]
CAPACITY, WINDOW = 97, 60
DEVICES = pytest.mark.parametrize(
    "device",
    [
        {"multiprocessors": 4},
        {"multiprocessors": 132, "compute_capability": 80},
        {"multiprocessors": 132, "compute_capability": 90},
    ],
    ids=["one split", "splits", "clusters"],
)


def problem(
    dtype: torch.dtype, head_dim: int, group: int = 2, kv_heads: int = 2, *, ring: bool = True
) -> dict[str, Any]:
    """What both ways get: q, k and v of a token a row, caches of the tokens before, lengths."""
    lengths = torch.tensor(LENGTHS)
    capacity = CAPACITY if ring else max(LENGTHS)
    # Of one projection, as in the model.
    qkv = torch.randn(len(LENGTHS), 1, (group + 2) * kv_heads, head_dim).to(dtype)
    q, k, v = qkv.split((group * kv_heads, kv_heads, kv_heads), dim=2)
    caches = [torch.full((len(LENGTHS), capacity, kv_heads, head_dim), NAN).to(dtype) for _ in "kv"]
    for b, length in enumerate(LENGTHS):
        for cache in caches:
            earlier = torch.arange(max(0, length - capacity), max(0, length - 1))
            cache[b, earlier % capacity] = torch.randn(len(earlier), kv_heads, head_dim).to(dtype)
    return {
        "new": (q, k, v),
        "caches": caches,
        "key_lengths": lengths,
        "capacity": capacity,
        "scale": 256**-0.5,
        "softcap": 50.0,
        "window": WINDOW if ring else None,
    }


def frequencies(q: Tensor) -> Tensor:
    return reference.rope_frequencies(q.shape[-1], 10000.0)


def together(
    new: tuple[Tensor, ...], caches: list[Tensor], capacity: int, **options: Any
) -> tuple[Tensor, ...]:
    """(out, lse) and the caches behind it."""
    q, k, v = new
    caches = [cache.clone() for cache in caches]
    out, lse = attention_launches.run(
        q,
        *caches,
        new_k=k,
        new_v=v,
        inv_freq=frequencies(q),
        capacity=capacity,
        seqlen_k=capacity,
        **options,
    )
    return out, lse, *caches


def one_after_the_other(
    new: tuple[Tensor, ...],
    caches: list[Tensor],
    capacity: int,
    key_lengths: Tensor,
    **options: Any,
) -> tuple[Tensor, ...]:
    q, k, v = new
    caches = [cache.clone() for cache in caches]
    rotated = torch.empty(q.shape, dtype=q.dtype)
    launch(
        "rope",
        q=q,
        k=k,
        v=v,
        q_out=rotated,
        k_cache=caches[0],
        v_cache=caches[1],
        capacity=capacity,
        key_lengths=key_lengths,
        inv_freq=frequencies(q),
        batch=q.shape[0],
        seqlen=1,
        num_heads=q.shape[2],
        num_kv_heads=k.shape[2],
        head_dim=q.shape[3],
        dtype=q.dtype,
    )
    options = {"capacity": capacity, "seqlen_k": capacity, "key_lengths": key_lengths, **options}
    out, lse = attention_launches.run(rotated, *caches, **options)
    return out, lse, *caches


def assert_same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    for t, u in zip(one, other, strict=True):
        assert torch.equal(t.nan_to_num(12345.0), u.nan_to_num(12345.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@DEVICES
def test_equal_to_the_bit(dtype: torch.dtype, head_dim: int, device: dict[str, int]) -> None:
    for ring in (True, False):
        given = problem(dtype, head_dim, ring=ring)
        out, *rest = together(**given, **device)
        assert_same((out, *rest), one_after_the_other(**given, **device))
        assert torch.isfinite(out).all()
        assert not out[0].any()


@pytest.mark.parametrize(("group", "kv_heads"), [(1, 1), (16, 1), (3, 2)])
def test_groups(group: int, kv_heads: int) -> None:
    given = problem(torch.bfloat16, 128, group, kv_heads)
    assert_same(together(**given), one_after_the_other(**given))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@DEVICES
def test_values_that_are_not_finite_stay_with_those_who_see_them(
    head_dim: int, device: dict[str, int]
) -> None:
    """A row whose weight 0 would meet them is computed anew, with its query rotated once more."""
    given = problem(torch.bfloat16, head_dim, ring=False)
    given["window"] = 20
    for b in range(len(LENGTHS)):
        given["caches"][1][b, : max(0, LENGTHS[b] - 20)] = NAN  # of keys before the window
    out, *_ = together(**given, **device)
    assert torch.isfinite(out).all()
    given["new"][2][3] = NAN  # a token's own value
    out, *_ = together(**given, **device)
    assert out[3].isnan().all()
    assert torch.isfinite(out[4:]).all()


@DEVICES
def test_every_schedule_gives_the_same(device: dict[str, int]) -> None:
    given = problem(torch.bfloat16, 256)
    check_schedules(lambda **options: together(**given, **device, **options)[:1])


def test_every_barrier_is_needed() -> None:
    given = problem(torch.bfloat16, 256, ring=False)
    run = lambda **options: together(**given, **options)[:1]  # noqa: E731
    found = places(run)
    assert len(found) == 7
    for place in found:
        name, line = place.split(":")
        source = (ROOT / "csrc" / "cuda" / name).read_text().splitlines()
        # In the emulation ldmatrix, which comes next, brings the lanes of a warp together as well.
        if "__syncwarp" not in source[int(line) - 1]:
            assert_needed(run, place)


def test_what_cannot_be_appended_is_refused() -> None:
    for dtype, head_dim, group in (
        (torch.float32, 64, 2),
        (torch.bfloat16, 72, 2),
        (torch.bfloat16, 64, 17),
    ):
        given = problem(dtype, head_dim, group)
        with pytest.raises(Refused, match="has to be appended first"):
            together(**given)
