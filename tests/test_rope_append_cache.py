from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from common import DTYPES, LAYOUTS, assert_accurate, with_strides
from gemma2_ext import ops, reference

OP = torch.ops.gemma2_ext.rope_append_cache.default
OUT_OP = torch.ops.gemma2_ext.rope_append_cache_out.default
NAN = float("nan")


def inputs(
    batch: int, seqlen: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as parts of one projection."""
    qkv = torch.randn(batch, seqlen, heads + 2 * kv_heads, head_dim).to(dtype)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=2)
    return q, k, v


def new_caches(k: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Full of NaN: a slot that should not be written shows, and one that should be does too."""
    shape = (k.shape[0], capacity, *k.shape[2:])
    return torch.full(shape, NAN, dtype=k.dtype), torch.full(shape, NAN, dtype=k.dtype)


def composed(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """What the op does, out of `ops.rope` (held to the reference elsewhere) and indexing."""
    positions = positions.expand(q.shape[:2])
    rotated_q, rotated_k = ops.rope(q, k, positions)
    for b, i in (positions >= 0).nonzero().tolist():
        slot = positions[b, i] % k_cache.shape[1]
        k_cache[b, slot] = rotated_k[b, i]
        v_cache[b, slot] = v[b, i]
    return torch.where((positions >= 0)[..., None, None], rotated_q, q)


def check(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, capacity: int) -> None:
    actual, expected = new_caches(k, capacity), new_caches(k, capacity)
    out = ops.rope_append_cache(q, k, v, positions, *actual)
    assert torch.equal(out, composed(q, k, v, positions, *expected))
    assert out.is_contiguous()
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 8, 22, 128, 256, 600])
def test_value(isa: str, dtype: torch.dtype, head_dim: int) -> None:
    q, k, v = inputs(2, 5, 4, 2, head_dim, dtype)
    check(q, k, v, torch.arange(5), 5)
    check(q, k, v, torch.arange(5) + 3, 6)
    check(q, k, v, torch.tensor([[0, 1, 2, 3, 4], [8187, 8188, 8189, 8190, 8191]]), 4096)


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_the_reference(isa: str, dtype: torch.dtype) -> None:
    q, k, v = inputs(2, 5, 4, 2, 64, dtype)
    k_cache, v_cache = new_caches(k, 8)
    positions = torch.arange(6, 11)
    out = ops.rope_append_cache(q, k, v, positions, k_cache, v_cache, 500.0)
    for i, actual in enumerate((out, k_cache[:, positions % 8])):
        assert_accurate(actual, lambda q, k, i=i: reference.rope(q, k, positions, 500.0)[i], q, k)
    assert torch.equal(v_cache[:, positions % 8], v)


def test_ring_wraps_token_by_token(isa: str) -> None:
    q, k, v = inputs(2, 23, 2, 1, 16, torch.float32)
    whole, single = new_caches(k, 7), new_caches(k, 7)
    for begin in range(0, 23, 7):
        part = slice(begin, begin + 7)
        positions = torch.arange(23)[part]
        ops.rope_append_cache(q[:, part], k[:, part], v[:, part], positions, *whole)
    for p in range(23):
        now = slice(p, p + 1)
        ops.rope_append_cache(q[:, now], k[:, now], v[:, now], torch.tensor([p]), *single)
    _, rotated_k = ops.rope(q, k, torch.arange(23))
    for p in range(16, 23):
        assert torch.equal(whole[0][:, p % 7], rotated_k[:, p])
        assert torch.equal(whole[1][:, p % 7], v[:, p])
    assert torch.equal(whole[0], single[0])
    assert torch.equal(whole[1], single[1])


def test_padding_is_not_written(isa: str) -> None:
    q, k, v = inputs(3, 4, 2, 1, 16, torch.bfloat16)
    positions = torch.tensor([[-1, -1, 0, 1], [5, -7, 6, -1], [-1, -1, -1, -1]])
    k_cache, v_cache = new_caches(k, 8)
    k[2], v[2] = NAN, NAN
    out = ops.rope_append_cache(q, k, v, positions, k_cache, v_cache)
    for cache in (k_cache, v_cache):
        written = ~cache.isnan().flatten(2).any(-1)
        assert written.tolist() == [
            [True, True] + [False] * 6,
            [False] * 5 + [True, True, False],
            [False] * 8,
        ]
    assert torch.equal(out[positions < 0], q[positions < 0])
    check(q[:2], k[:2], v[:2], positions[:2], 8)


def test_more_columns_than_slots_with_padding(isa: str) -> None:
    q, k, v = inputs(2, 9, 2, 1, 16, torch.float32)
    positions = torch.full((2, 9), -1)
    positions[0, 6:], positions[1, 5:] = torch.arange(3), torch.arange(4)
    check(q, k, v, positions, 4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(isa: str, dtype: torch.dtype, layout: str) -> None:
    q, k, v = inputs(2, 5, 4, 2, 22, dtype)
    laid_out = [with_strides(t, layout) for t in (q, k, v)]
    check(*laid_out, torch.arange(3, 8), 6)  # type: ignore[call-arg]
    check(q, k, v, torch.arange(20)[3:13:2], 10)
    check(q, k, v, torch.arange(3, 8, dtype=torch.int32), 6)
    # Caches with gaps between slots and heads, and in (batch, heads, capacity, head_dim) order.
    expected = new_caches(k, 6)
    ops.rope_append_cache(q, k, v, torch.arange(3, 8), *expected)
    wide = [torch.full((2, 6, 3, 30), NAN, dtype=dtype)[:, :, :2, 5:27] for _ in range(2)]
    swapped = [torch.full((2, 2, 6, 22), NAN, dtype=dtype).transpose(1, 2) for _ in range(2)]
    for caches in (wide, swapped):
        ops.rope_append_cache(q, k, v, torch.arange(3, 8), *caches)
        for a, e in zip(caches, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)


def test_every_element_is_written(isa: str) -> None:
    q, k, v = inputs(2, 5, 4, 2, 22, torch.float32)
    positions = torch.tensor([[-1, 0, 1, 2, 3], [4, 5, 6, 7, 8]])
    q_out = torch.full(q.shape, NAN)
    OUT_OP(q, k, v, positions, *new_caches(k, 5), 10000.0, None, None, q_out)
    assert torch.equal(q_out, ops.rope_append_cache(q, k, v, positions, *new_caches(k, 5)))


def test_empty(isa: str) -> None:
    q, k, v = inputs(2, 0, 4, 2, 22, torch.float32)
    caches = new_caches(k, 5)
    assert ops.rope_append_cache(q, k, v, torch.arange(0), *caches).shape == q.shape
    assert caches[0].isnan().all()


def test_independent_of_threads(isa: str) -> None:
    q, k, v = inputs(2, 333, 4, 2, 64, torch.float32)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        caches = new_caches(k, 333)
        out = ops.rope_append_cache(q, k, v, torch.arange(100, 433), *caches)
        results.append(torch.cat((out, *caches), dim=2))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def int8_caches(k: Tensor, capacity: int) -> tuple[list[Tensor], list[Tensor]]:
    """Caches of int8 and their scales, each head's slots contiguous; 99 and NaN where unwritten."""
    shape = (k.shape[0], k.shape[2], capacity, k.shape[3])
    caches = [torch.full(shape, 99, dtype=torch.int8).transpose(1, 2) for _ in range(2)]
    scales = [torch.full(shape[:3], NAN).transpose(1, 2) for _ in range(2)]
    return caches, scales


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 8, 22, 130, 256])
def test_int8(isa: str, dtype: torch.dtype, head_dim: int) -> None:
    q, k, v = inputs(2, 5, 4, 2, head_dim, dtype)
    k[0, 1, 0] *= 1000  # a row's scale is its own
    v[1, 2, 1] = 0
    positions = torch.tensor([[-1, 5, 6, 7, 8], [3, 4, 5, 6, 7]])
    caches, scales = int8_caches(k, 7)
    out = ops.rope_append_cache(q, k, v, positions, *caches, 500.0, *scales)
    rotated = [reference.rope(t.float(), t.float(), positions.clamp(0), 500.0)[0] for t in (q, k)]
    assert torch.equal(out, ops.rope_append_cache(q, k, v, positions, *new_caches(k, 7), 500.0))
    written = torch.zeros(2, 7, dtype=torch.bool)
    for b, i in (positions >= 0).nonzero().tolist():
        slot = int(positions[b, i]) % 7
        written[b, slot] = True
        for cache, scale, row in zip(caches, scales, (rotated[1], v.float()), strict=True):
            expected = row[b, i].abs().amax(-1) / 127
            torch.testing.assert_close(scale[b, slot], expected, rtol=1e-5, atol=1e-9)
            # Half a step, and the rounding of what is rounded.
            error = (cache[b, slot] * scale[b, slot, :, None] - row[b, i]).abs()
            assert (error <= 0.5001 * expected[:, None]).all()
    for cache, scale in zip(caches, scales, strict=True):
        assert (cache[~written] == 99).all()
        assert scale[~written].isnan().all()
        assert scale[written].isfinite().all()
    assert scales[1][1, 5, 1] == 0


def test_int8_error_of_a_row() -> None:
    # What docs/quantization.md says: 0.70 % of normal rows, 1.3 % of ones with heavy tails.
    normal = torch.randn(1, 1024, 4, 256)
    heavy = normal / (torch.randn(4, *normal.shape) ** 2).mean(0).sqrt()  # Student t, 4 degrees
    for v, least, most in ((normal, 0.0068, 0.0072), (heavy, 0.012, 0.014)):
        caches, scales = int8_caches(v, 1024)
        ops.rope_append_cache(v, v, v, torch.arange(1024), *caches, 10000.0, *scales)
        error = (caches[1] * scales[1][..., None] - v).norm() / v.norm()
        assert least < error < most


def test_int8_of_rows_that_are_not_finite(isa: str) -> None:
    q, k, v = inputs(1, 4, 2, 1, 40, torch.float32)
    k[0, 0, 0, 39], k[0, 1, 0, 3], v[0, 2, 0, 7] = NAN, float("inf"), -float("inf")
    v[0, 3] = 1e-40
    caches, scales = int8_caches(k, 4)
    ops.rope_append_cache(q, k, v, torch.arange(4), *caches, 10000.0, *scales)
    assert scales[0][0, :, 0].isnan().tolist() == [True, True, False, False]
    assert scales[1][0, :, 0].isnan().tolist() == [False, False, True, False]
    assert scales[1][0, 3, 0] == 0


def test_int8_token_by_token_and_by_any_layout(isa: str) -> None:
    q, k, v = inputs(2, 23, 2, 1, 16, torch.bfloat16)
    whole, whole_scales = int8_caches(k, 7)
    single, single_scales = int8_caches(k, 7)
    gaps = [torch.zeros(2, 7, 3, 30, dtype=torch.int8)[:, :, 1:2, 5:21] for _ in range(2)]
    gap_scales = [torch.zeros(2, 7, 2, 2)[:, :, :1, 1] for _ in range(2)]
    for begin in range(0, 23, 7):
        part = slice(begin, begin + 7)
        pieces = (q[:, part], k[:, part], v[:, part], torch.arange(23)[part])
        ops.rope_append_cache(*pieces, *whole, 10000.0, *whole_scales)
        ops.rope_append_cache(*pieces, *gaps, 10000.0, *gap_scales)
    for p in range(23):
        now = slice(p, p + 1)
        pieces = (q[:, now], k[:, now], v[:, now], torch.tensor([p]))
        ops.rope_append_cache(*pieces, *single, 10000.0, *single_scales)
    results = (*whole, *whole_scales), (*single, *single_scales), (*gaps, *gap_scales)
    for a, b, c in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4)),
    half=st.integers(1, 40),
    start=st.integers(0, 100),
    slack=st.integers(0, 5),
    padding=st.integers(0, 9),
)
def test_any_shape(
    sizes: tuple[int, int, int, int], half: int, start: int, slack: int, padding: int
) -> None:
    q, k, v = inputs(*sizes, 2 * half, torch.float32)
    positions = torch.arange(sizes[1]) - padding
    positions[positions >= 0] += start
    check(q, k, v, positions, sizes[1] + slack)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    q, k, v = inputs(2, 3, 4, 2, 16, dtype)
    caches = [torch.zeros(2, 8, 2, 16, dtype=dtype) for _ in range(2)]
    opcheck(OP, (q, k, v, torch.arange(3), *caches, 10000.0))
    q_out = torch.empty(q.shape, dtype=dtype)
    opcheck(OUT_OP, (q, k, v, torch.arange(3), *caches, 10000.0, None, None, q_out))
    caches, scales = int8_caches(k, 8)
    opcheck(OP, (q, k, v, torch.arange(3), *caches, 10000.0, *scales))
    opcheck(OUT_OP, (q, k, v, torch.arange(3), *caches, 10000.0, *scales, q_out))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_without_graph_breaks(backend: str) -> None:
    q, k, v = inputs(2, 3, 4, 2, 16, torch.float32)
    positions = torch.arange(3)

    def step(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        out = ops.rope_append_cache(q * 2, k, v, positions, k_cache, v_cache)
        return out + k_cache[:, :3].sum() + v_cache[:, :3].sum()

    eager, compiled = new_caches(k, 8), new_caches(k, 8)
    expected = step(q, k, v, *eager)
    actual = torch.compile(step, fullgraph=True, backend=backend)(q, k, v, *compiled)
    torch.testing.assert_close(actual, expected)
    for c, e in zip(compiled, eager, strict=True):
        torch.testing.assert_close(c, e, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_int8_compiles_without_graph_breaks(backend: str) -> None:
    q, k, v = inputs(2, 3, 4, 2, 16, torch.float32)
    (caches, scales), (expected, expected_scales) = int8_caches(k, 8), int8_caches(k, 8)
    positions = torch.arange(3)

    def step(k: Tensor, caches: list[Tensor], scales: list[Tensor]) -> Tensor:
        out = ops.rope_append_cache(q, k * 2, v, positions, *caches, 10000.0, *scales)
        return out + scales[0][:, :3].sum()

    eager = step(k, expected, expected_scales)
    actual = torch.compile(step, fullgraph=True, backend=backend)(k, caches, scales)
    torch.testing.assert_close(actual, eager)
    for a, e in zip((*caches, *scales), (*expected, *expected_scales), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("which", range(5))
def test_gradients_are_refused(which: int) -> None:
    q, k, v = (t.clone() for t in inputs(2, 3, 4, 2, 16, torch.float32))
    tensors = [q, k, v, *new_caches(k, 8)]
    tensors[which].requires_grad_()
    q, k, v, *caches = tensors
    for op in (ops.rope_append_cache, OP):
        with pytest.raises(NotImplementedError, match="rope_append_cache has no backward"):
            op(q, k, v, torch.arange(3), *caches)
    with torch.no_grad():
        out = ops.rope_append_cache(q, k, v, torch.arange(3), *caches)
        assert torch.equal(OP(q, k, v, torch.arange(3), *caches), out)
    with torch.inference_mode():
        assert torch.equal(OP(q, k, v, torch.arange(3), *caches), out)


def test_errors() -> None:
    q, k, v = inputs(2, 3, 4, 2, 16, torch.float32)
    k_cache, v_cache = new_caches(k, 8)
    positions = torch.arange(3)
    call = ops.rope_append_cache
    with pytest.raises(TypeError, match=r"rope_append_cache: v must be a torch\.Tensor, got int"):
        call(q, k, 0, positions, k_cache, v_cache)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="k_cache must be float32, .*, got torch.uint8"):
        call(q, k, v, positions, k_cache.to(torch.uint8), v_cache)
    with pytest.raises(TypeError, match="positions must be int32 or int64, got torch.bool"):
        call(q, k, v, positions > 0, k_cache, v_cache)
    with pytest.raises(ValueError, match="v_cache must have k's dtype Float, got BFloat16"):
        call(q, k, v, positions, k_cache, v_cache.bfloat16())
    with pytest.raises(ValueError, match=r"v must have k's shape \(2, 3, 2, 16\), got"):
        call(q, k, v[:, :, :1], positions, k_cache, v_cache)
    with pytest.raises(
        ValueError,
        match=r"k_cache must have shape \(batch, capacity, num_kv_heads, head_dim\) = "
        r"\(2, \*, 2, 16\), got \(1, 8, 2, 16\)",
    ):
        call(q, k, v, positions, k_cache[:1], v_cache)
    with pytest.raises(ValueError, match="v_cache must have k_cache's shape"):
        call(q, k, v, positions, k_cache, v_cache[:, :7])
    with pytest.raises(
        ValueError, match="k_cache must be contiguous in its last dimension, got stride 2"
    ):
        call(q, k, v, positions, with_strides(k_cache, "strided"), v_cache)
    with pytest.raises(ValueError, match="k_cache must have at least one slot"):
        call(q, k, v, positions, k_cache[:, :0], v_cache[:, :0])
    with pytest.raises(ValueError, match="rope_append_cache: head_dim must be even, got 15"):
        call(q[..., 1:], k[..., 1:], v[..., 1:], positions, k_cache, v_cache)
    with pytest.raises(ValueError, match=r"positions must have shape .*, got \(2,\)"):
        call(q, k, v, positions[1:], k_cache, v_cache)
    caches, scales = int8_caches(k, 8)
    needed = "k_scales and v_scales must be given with caches of int8, and only with them, got "
    with pytest.raises(ValueError, match=needed + "no k_scales, no v_scales and a k_cache of Char"):
        call(q, k, v, positions, *caches)
    with pytest.raises(ValueError, match=needed + "k_scales, v_scales and a k_cache of Float"):
        call(q, k, v, positions, k_cache, v_cache, 10000.0, *scales)
    with pytest.raises(ValueError, match="v_cache must have k_cache's dtype Char, got Float"):
        call(q, k, v, positions, caches[0], v_cache, 10000.0, *scales)
    with pytest.raises(ValueError, match=r"k_scales must have shape .* = \(2, 8, 2\), got"):
        call(q, k, v, positions, *caches, 10000.0, scales[0][:, 1:], scales[1])
    with pytest.raises(ValueError, match="v_scales must be float32, got Double"):
        call(q, k, v, positions, *caches, 10000.0, scales[0], scales[1].double())
    q, k, v = inputs(1, 1, 2, 1, 258, torch.float32)
    caches, scales = int8_caches(k, 1)
    with pytest.raises(ValueError, match="head_dim must be at most 256 with an int8 cache, got 25"):
        call(q, k, v, torch.arange(1), *caches, 10000.0, *scales)


def test_two_tokens_never_share_a_slot() -> None:
    q, k, v = inputs(2, 3, 4, 2, 16, torch.float32)
    caches = new_caches(k, 8)
    rule = r"must increase and span at most capacity = 8 slots"
    for row, got in (([0, 1, 8], "8 after 0"), ([4, 4, 5], "4 after 4"), ([3, 2, 4], "2 after 3")):
        with pytest.raises(ValueError, match=f"positions of row 0 {rule}, got {got}"):
            ops.rope_append_cache(q, k, v, torch.tensor(row), *caches)
        positions = torch.tensor([[0, 1, 2], row])
        with pytest.raises(ValueError, match=f"positions of row 1 {rule}, got {got}"):
            ops.rope_append_cache(q, k, v, positions, *caches)
    with pytest.raises(ValueError, match=r"capacity = 2 slots, got 2 after 0"):
        ops.rope_append_cache(q, k, v, torch.arange(3), *new_caches(k, 2))
    assert caches[0].isnan().all(), "a refused call writes nothing"
