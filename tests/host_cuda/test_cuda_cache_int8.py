"""Caches of int8 on an emulated GPU: written by rope, read by attention as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attention_common import int8_rows, reference_of
from common import DTYPES, assert_accurate
from gemma2_ext import reference
from host_cuda import emulator
from host_cuda.attention_launches import run
from host_cuda.emulator import SCHEDULES, assert_needed, guarded, launch

NAN = float("nan")
HALVES = (torch.bfloat16, torch.float16)


def attend(q: Tensor, k: tuple[Tensor, ...], v: tuple[Tensor, ...], **options: Any) -> Tensor:
    (k8, k_scales), (v8, v_scales) = k, v
    fields = {"k_scales": k_scales[..., None], "v_scales": v_scales[..., None]}
    return run(q, k8, v8, **{"scale": 0.1, "capacity": k8.shape[1]}, **fields, **options)[0]


def in_order(rows: tuple[Tensor, ...], lengths: list[int], dtype: torch.dtype) -> Tensor:
    """(batch, longest length, heads, head_dim): the ring's keys by their positions."""
    data, scales = rows
    capacity = data.shape[1]
    out = torch.zeros(data.shape[0], max(lengths), *data.shape[2:], dtype=dtype)
    for b, length in enumerate(lengths):
        positions = torch.arange(max(0, length - capacity), length)
        slots = positions % capacity
        out[b, positions] = (data[b, slots] * scales[b, slots, :, None]).to(dtype)
    return out


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", [16, 48, 64, 112, 128, 144, 256])
@pytest.mark.parametrize("seqlen_q", [1, 3, 8])
def test_value(dtype: torch.dtype, head_dim: int, seqlen_q: int) -> None:
    # A whole cache, and a ring that has wrapped.
    cases: list[tuple[list[int], dict[str, Any]]] = [
        ([9, 149, 150], {}),
        ([350, 157, 15], {"window": 120}),
    ]
    for lengths, options in cases:
        k, v = (int8_rows(lengths, 150, 2, head_dim) for _ in range(2))
        q = (torch.randn(3, seqlen_q, 4, head_dim) * 2).to(dtype)
        options.update(softcap=5.0, key_lengths=torch.tensor(lengths))
        actual = attend(q, k, v, **options)
        wide = [in_order(rows, lengths, dtype) for rows in (k, v)]
        # Scores and weights are multiplied by the scales: a rounding each.
        assert_accurate(actual, reference_of(scale=0.1, **options), q, *wide, roundings=3)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("exponents", [(-100, -90), (-30, -24), (-20, 3), (3, -20), (2, 10)])
def test_scales_of_any_size(dtype: torch.dtype, exponents: tuple[int, int]) -> None:
    """Values far from 1, rising and falling along the keys: weights in 16 bits keep their bits."""
    (k8, k_scales), (v8, v_scales) = (int8_rows([200], 200, 1, 64) for _ in range(2))
    v_scales = -torch.logspace(*exponents, 200, base=2.0)[None, :, None]  # of any sign too
    q = torch.randn(1, 2, 4, 64).to(dtype)
    actual = attend(q, (k8, k_scales), (v8, v_scales), key_lengths=torch.tensor([200]))
    wide = [(t * s[..., None]).double() for t, s in ((k8, k_scales), (v8, v_scales))]
    exact = reference_of(scale=0.1)(q.double(), *wide)
    eps = torch.finfo(dtype).eps
    # Weights and the result are rounded; a result of float16 may be below its normal numbers.
    error = (actual.double() - exact).abs().max().item()
    assert error <= 2 * eps * exact.abs().max().item() + 2.0**-25 * (dtype == torch.float16)


@pytest.mark.parametrize("dtype", HALVES)
def test_factors_of_unseen_keys_do_not_leak(dtype: torch.dtype) -> None:
    q = torch.randn(1, 3, 4, 64).to(dtype)
    k, v = (int8_rows([90], 90, 2, 64) for _ in range(2))
    options: dict[str, Any] = {"window": 20, "key_lengths": torch.tensor([90])}
    expected = attend(q, k, v, **options)
    for poison in (NAN, float("inf")):
        for scales in (k[1], v[1]):
            scales[:, : 90 - 22] = poison
        assert torch.equal(attend(q, k, v, **options), expected)
    for rows in (k, v):
        before = rows[1].clone()
        rows[1][:, 89, 0] = NAN  # of one key head, seen by the last query
        out = attend(q, k, v, **options)
        assert out[:, -1, :2].isnan().all()
        assert torch.equal(out[:, -1, 2:], expected[:, -1, 2:])
        # Computed anew with weights that are not rounded to 16 bits.
        torch.testing.assert_close(out[:, :-1], expected[:, :-1], rtol=1.6e-2, atol=1e-2)
        rows[1].copy_(before)


def test_all_factors_zero() -> None:
    q = torch.randn(1, 1, 2, 64).half()
    (k8, k_scales), (v8, v_scales) = (int8_rows([70], 70, 1, 64) for _ in range(2))
    out = attend(q, (k8, k_scales * 0), (v8, v_scales * 0), key_lengths=torch.tensor([70]))
    assert torch.equal(out, torch.zeros_like(q))


def test_strides() -> None:
    q = torch.randn(2, 2, 4, 64).bfloat16()
    k, v = (int8_rows([90, 80], 90, 2, 64) for _ in range(2))
    options = {"key_lengths": torch.tensor([90, 80])}
    expected = attend(q, k, v, **options)
    assert torch.equal(
        attend(q, *([t.contiguous() for t in rows] for rows in (k, v)), **options), expected
    )
    spread = []
    for data, scales in (k, v):
        wide = torch.zeros(2, 90, 3, 96, dtype=torch.int8)
        wide[:, :, 1:, 16:80] = data
        spread.append((wide[:, :, 1:, 16:80], torch.stack([scales, scales], -1)[..., 1]))
    assert torch.equal(attend(q, *spread, **options), expected)


@pytest.mark.parametrize("case", ["head_dim", "rows", "float32", "alignment", "stride"])
def test_what_has_to_be_widened_is_refused(case: str) -> None:
    head_dim = 24 if case == "head_dim" else 64
    q = torch.randn(1, 9 if case == "rows" else 1, 4, head_dim).bfloat16()
    if case == "float32":
        q = q.float()
    k, v = (int8_rows([40], 40, 2, head_dim) for _ in range(2))
    if case == "alignment":
        v = torch.zeros(1, 40, 2, 68, dtype=torch.int8)[..., 4:], v[1]
    if case == "stride":
        k = torch.zeros(1, 40, 2, 72, dtype=torch.int8)[..., :64], k[1]
    with pytest.raises(emulator.Refused, match="this cache of int8 has to be widened"):
        attend(q, k, v, key_lengths=torch.tensor([40]))


@pytest.mark.parametrize("head_dim", [64, 256])
def test_schedules_and_barriers(head_dim: int) -> None:
    q = torch.randn(1, 3, 2, head_dim).bfloat16()
    k, v = (int8_rows([330], 330, 1, head_dim) for _ in range(2))

    def attention(**options: Any) -> tuple[Tensor, ...]:
        given: dict[str, Any] = {"window": 250, "key_lengths": torch.tensor([330])}
        return (attend(q, k, v, multiprocessors=1, **given, **options),)

    results = [attention(schedule=schedule)[0] for schedule in SCHEDULES]
    assert all(torch.equal(result, results[0]) for result in results)
    attention()
    places = emulator.library().emulation_places().decode().split()
    assert len(places) >= 4, places
    for place in places:
        assert_needed(attention, place)


@pytest.mark.parametrize("multiprocessors", [1, 7, 132])
def test_splits(multiprocessors: int) -> None:
    lengths = [700, 21]
    q = torch.randn(2, 1, 2, 64).bfloat16()
    k, v = (int8_rows(lengths, 700, 1, 64) for _ in range(2))
    options = {"key_lengths": torch.tensor(lengths)}
    wide = [in_order(rows, lengths, q.dtype) for rows in (k, v)]
    for compute_capability in (80, 90):
        device = {"multiprocessors": multiprocessors, "compute_capability": compute_capability}
        actual = attend(q, k, v, **device, **options)
        assert_accurate(actual, reference_of(scale=0.1, **options), q, *wide, roundings=3)


# ---- what writes it


def append(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, capacity: int, **options: Any
) -> tuple[Tensor, ...]:
    """(q_out, k_cache, v_cache, k_scales, v_scales); 99 and NaN where nothing was written."""
    batch, _, kv_heads, head_dim = k.shape
    caches = [
        torch.full((batch, kv_heads, capacity, head_dim), 99, dtype=torch.int8).transpose(1, 2)
        for _ in range(2)
    ]
    scales = [torch.full((batch, kv_heads, capacity), NAN).transpose(1, 2) for _ in range(2)]
    q_out = guarded(q.shape, q.dtype)
    launch(
        "rope",
        q=q,
        k=k,
        v=v,
        q_out=q_out,
        k_cache=caches[0],
        v_cache=caches[1],
        k_scales=scales[0][..., None],
        v_scales=scales[1][..., None],
        positions=positions,
        positions_batch_stride=positions.stride(0),
        inv_freq=reference.rope_frequencies(head_dim, 10000.0),
        batch=batch,
        seqlen=q.shape[1],
        num_heads=q.shape[2],
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        capacity=capacity,
        dtype=q.dtype,
        **options,
    )
    return q_out, *caches, *scales


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 22, 130, 256])
def test_rows_written(dtype: torch.dtype, head_dim: int) -> None:
    q, k, v = (torch.randn(2, 5, heads, head_dim).to(dtype) for heads in (4, 2, 2))
    k[0, 1, 0] *= 1000  # a row's scale is its own
    v[1, 2, 1] = 0
    positions = torch.tensor([[-1, 5, 6, 7, 8], [3, 4, 5, 6, 7]])
    results = [append(q, k, v, positions, 7, schedule=schedule) for schedule in SCHEDULES]
    results.append(append(q, k, v, positions, 7, max_blocks=1))
    for result in results:
        for t, first in zip(result, results[0], strict=True):
            assert torch.equal(t.nan_to_num(-1.0), first.nan_to_num(-1.0))
    q_out, *caches = results[0]
    assert torch.equal(q_out[0, 0], q[0, 0])  # padding
    rotated = [reference.rope(t.float(), t.float(), positions.clamp(0), 10000.0)[0] for t in (q, k)]
    seen = positions >= 0
    torch.testing.assert_close(q_out[seen], rotated[0].to(dtype)[seen])
    written = torch.zeros(2, 7, dtype=torch.bool)
    for b, i in seen.nonzero().tolist():
        slot = int(positions[b, i]) % 7
        written[b, slot] = True
        rows = (rotated[1], v.float())
        for cache, scale, row in zip(caches[:2], caches[2:], rows, strict=True):
            expected = row[b, i].abs().amax(-1) / 127
            torch.testing.assert_close(scale[b, slot], expected, rtol=1e-5, atol=1e-9)
            # Half a step, and the rounding of what is rounded.
            error = (cache[b, slot] * scale[b, slot, :, None] - row[b, i]).abs()
            assert (error <= 0.5001 * expected[:, None]).all()
    for cache, scale in zip(caches[:2], caches[2:], strict=True):
        assert (cache[~written] == 99).all()
        assert scale[~written].isnan().all()
        assert scale[written].isfinite().all()
    assert caches[3][1, 5, 1] == 0


def test_rows_that_are_not_finite() -> None:
    q, k, v = (torch.randn(1, 4, heads, 40) for heads in (2, 1, 1))
    k[0, 0, 0, 39], k[0, 1, 0, 3], v[0, 2, 0, 7] = NAN, float("inf"), -float("inf")
    v[0, 3] = 1e-40
    _, k_cache, v_cache, k_scales, v_scales = append(q, k, v, torch.arange(4)[None], 4)
    assert k_scales[0, :, 0].isnan().tolist() == [True, True, False, False]
    assert v_scales[0, :, 0].isnan().tolist() == [False, False, True, False]
    assert v_scales[0, 3, 0] == 0
    assert (k_cache[0, :2] == 0).all()
    assert (v_cache[0, 2:] == 0).all()


def test_rope_needs_no_barrier() -> None:
    q, k, v = (torch.randn(1, 4, heads, 40) for heads in (2, 1, 1))
    append(q, k, v, torch.arange(4)[None], 4)
    assert emulator.library().emulation_places().decode().split() == []
