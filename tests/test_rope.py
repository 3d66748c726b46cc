from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from common import (
    DTYPES,
    LAYOUTS,
    assert_accurate,
    assert_gradients_accurate,
    assert_independent_of_threads,
    assert_no_second_derivative,
    assert_same_gradients_compiled,
    gradients,
    with_strides,
)
from gemma2_ext import ops, reference

OP = torch.ops.gemma2_ext.rope.default
OUT_OP = torch.ops.gemma2_ext.rope_out.default
BACKWARD_OP = torch.ops.gemma2_ext.rope_backward.default
BACKWARD_OUT_OP = torch.ops.gemma2_ext.rope_backward_out.default


def inputs(
    batch: int, seqlen: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    qkv = torch.randn(batch, seqlen, heads + kv_heads, head_dim).to(dtype)
    q, k = qkv.split((heads, kv_heads), dim=2)
    return q, k


def check(q: Tensor, k: Tensor, positions: Tensor, theta: float = 10000.0) -> None:
    actual = ops.rope(q, k, positions, theta)
    for i in (0, 1):
        assert actual[i].is_contiguous()
        assert_accurate(
            actual[i], lambda q, k, p, i=i: reference.rope(q, k, p, theta)[i], q, k, positions
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 6, 8, 64, 72, 128, 250, 256, 600])
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (3, 0)])
def test_value(isa: str, dtype: torch.dtype, head_dim: int, shape: tuple[int, int]) -> None:
    check(*inputs(*shape, 2, 1, head_dim, dtype), torch.arange(shape[1]) + 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(8, 4, 256), (16, 8, 256), (32, 16, 128)])
def test_production_shapes(isa: str, dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    check(*inputs(1, 8, *heads, dtype), torch.arange(8184, 8192))


@pytest.mark.parametrize("dtype", DTYPES)
def test_positions_of_each_row(isa: str, dtype: torch.dtype) -> None:
    q, k = inputs(3, 5, 2, 1, 16, dtype)
    positions = torch.randint(-3, 8192, (3, 5))
    check(q, k, positions)
    check(q, k, positions.int())
    check(q, k, positions.t().contiguous().t())
    check(q, k, positions[:1].expand(3, 5))


@pytest.mark.parametrize("theta", [500.0, 1e4, 1e5, 160000.0, 1e6])
def test_frequencies_are_transformers_to_the_bit(isa: str, theta: float) -> None:
    # At position p an inv_freq that is off by one bit turns an angle a by up to 2^-24 a: past a few
    # hundred radians that is beyond the error of the cosine. Position 2^20 keeps products exact.
    position = 2**20
    for head_dim in range(8, 257, 8):
        half = head_dim // 2
        q = torch.zeros(1, 1, 1, head_dim)
        q[..., :half] = 1
        out = ops.rope(q, q, torch.tensor([position]), theta)[0].flatten().double()
        exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
        angle = (position * (1.0 / theta**exponent)).double().to(out.device)
        torch.testing.assert_close(out[:half], angle.cos(), rtol=0, atol=2e-7)
        torch.testing.assert_close(out[half:], angle.sin(), rtol=0, atol=2e-7)


def test_angles_are_rounded_to_float32() -> None:
    # transformers multiplies in float32; positions beyond 2^24 are rounded before that.
    positions = torch.tensor([123_457, 2**24 + 1, 2**31 + 7, 2**40 + 12345, -987_654_321])
    q = torch.randn(1, 5, 1, 64)
    check(q, q, positions)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(isa: str, dtype: torch.dtype, layout: str) -> None:
    q, k = inputs(2, 3, 4, 2, 22, dtype)
    positions = torch.randint(0, 100, (2, 3))
    expected = ops.rope(q.contiguous(), k.contiguous(), positions)
    laid_out = with_strides(q, layout), with_strides(k, layout)
    results = [
        ops.rope(q, k, positions),  # two parts of one tensor
        ops.rope(*laid_out, with_strides(positions.float(), layout).long()),
        ops.rope(q.transpose(1, 2).contiguous().transpose(1, 2), laid_out[1], positions),
    ]
    for result in results:
        for i in (0, 1):
            assert torch.equal(result[i], expected[i])


def test_strided_positions(isa: str) -> None:
    q, k = inputs(2, 3, 4, 2, 22, torch.float32)
    positions = torch.randint(0, 100, (2, 6))
    expected = ops.rope(q, k, positions[:, ::2].contiguous())
    for strided in (positions[:, ::2], positions.int()[:, ::2]):
        for actual, wanted in zip(ops.rope(q, k, strided), expected, strict=True):
            assert torch.equal(actual, wanted)


def test_parts_of_a_projection_are_not_copied() -> None:
    q, k = inputs(1, 64, 8, 4, 256, torch.bfloat16)
    positions = torch.arange(64)
    outs = torch.empty(q.shape, dtype=q.dtype), torch.empty(k.shape, dtype=k.dtype)
    OUT_OP(q, k, positions, 10000.0, *outs)
    with torch.profiler.profile() as profile:
        OUT_OP(q, k, positions, 10000.0, *outs)
    assert not [e.key for e in profile.key_averages() if e.key.startswith("aten::")]


def test_every_element_is_written(isa: str) -> None:
    q, k = inputs(2, 7, 4, 2, 22, torch.float32)
    outs = torch.full(q.shape, float("nan")), torch.full(k.shape, float("nan"))
    OUT_OP(q, k, torch.arange(7), 10000.0, *outs)
    for out, expected in zip(outs, ops.rope(q, k, torch.arange(7)), strict=True):
        assert torch.equal(out, expected)


def test_heads_may_be_missing(isa: str) -> None:
    q, k = inputs(2, 3, 4, 2, 8, torch.float32)
    rotated_q, rotated_k = ops.rope(q, k, torch.arange(3))
    none_q, only_k = ops.rope(q[:, :, :0], k, torch.arange(3))
    only_q, none_k = ops.rope(q, k[:, :, :0], torch.arange(3))
    assert none_q.shape == (2, 3, 0, 8) and none_k.shape == (2, 3, 0, 8)
    assert torch.equal(only_k, rotated_k) and torch.equal(only_q, rotated_q)


def test_independent_of_threads(isa: str) -> None:
    q, k = inputs(2, 333, 4, 2, 64, torch.float32)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(torch.cat(ops.rope(q, k, torch.arange(333)), dim=2))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(1, 4), st.integers(1, 4)),
    half=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(sizes: tuple[int, int, int, int], half: int, dtype: torch.dtype) -> None:
    q, k = inputs(*sizes, 2 * half, dtype)
    check(q, k, torch.randint(0, 8192, sizes[:2]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    q, k = inputs(2, 3, 4, 2, 16, dtype)
    opcheck(OP, (q, k, torch.arange(3), 10000.0))
    outs = torch.empty(q.shape, dtype=dtype), torch.empty(k.shape, dtype=dtype)
    opcheck(OUT_OP, (q, k, torch.arange(3), 10000.0, *outs))


def test_compile_without_graph_breaks() -> None:
    q, k = inputs(2, 3, 4, 2, 16, torch.float32)

    def scores(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
        q, k = ops.rope(q, k, positions)
        return torch.einsum("bshd,bthd->bst", q[:, :, :2], k)

    compiled = torch.compile(scores, fullgraph=True, backend="aot_eager")
    arguments = (q, k, torch.arange(3))
    torch.testing.assert_close(compiled(*arguments), scores(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 6, 72, 256])
def test_gradients(isa: str, dtype: torch.dtype, head_dim: int) -> None:
    q, k = inputs(2, 7, 4, 2, head_dim, dtype)
    positions = torch.randint(0, 8192, (2, 7))
    assert_gradients_accurate(ops.rope, reference.rope, q, k, positions)
    assert_gradients_accurate(ops.rope, reference.rope, q[:, :0], k[:, :0], positions[:, :0])


def test_gradients_of_strided_tensors(isa: str) -> None:
    q, k = inputs(2, 3, 4, 2, 22, torch.float32)
    positions = torch.arange(3)
    grad_q, grad_k = torch.randn(q.shape), torch.randn(k.shape)
    expected = gradients(ops.rope, (q, k, positions), grad_q, grad_k)
    for layout in LAYOUTS:
        strided = with_strides(grad_q, layout), with_strides(grad_k, layout)
        actual = gradients(ops.rope, (q, k, positions), *strided)
        assert all(map(torch.equal, actual, expected))


def test_gradient_of_one_output(isa: str) -> None:
    q, k = inputs(2, 3, 4, 2, 22, torch.float32)
    positions, grad = torch.arange(3), torch.randn(q.shape)
    expected = gradients(ops.rope, (q, k, positions), grad, torch.zeros(k.shape))
    grads = gradients(lambda q, k: ops.rope(q, k, positions)[0], (q, k), grad)
    assert all(map(torch.equal, grads, expected))


def test_every_element_of_the_gradients_is_written(isa: str) -> None:
    q, k = inputs(2, 7, 4, 2, 22, torch.float32)
    grads = torch.full(q.shape, float("nan")), torch.full(k.shape, float("nan"))
    BACKWARD_OUT_OP(q, k, torch.arange(7), 10000.0, *grads)
    # The rotation by the negative angle.
    for grad, expected in zip(grads, ops.rope(q, k, -torch.arange(7)), strict=True):
        torch.testing.assert_close(grad, expected)


def test_gradients_independent_of_threads(isa: str) -> None:
    q, k = inputs(2, 333, 4, 2, 64, torch.float32)
    assert_independent_of_threads(lambda: gradients(ops.rope, (q, k, torch.arange(333)), q, k))


def test_gradcheck() -> None:
    q, k = (t.double().requires_grad_() for t in inputs(2, 3, 2, 1, 6, torch.float32))
    positions = torch.tensor([3, 100, 8000])
    for actual, exact in zip(
        ops.rope(q, k, positions), reference.rope(q, k, positions), strict=True
    ):
        torch.testing.assert_close(actual, exact)
    assert torch.autograd.gradcheck(ops.rope, (q, k, positions))


def test_backward_opcheck() -> None:
    q, k = inputs(2, 3, 4, 2, 16, torch.float32)
    opcheck(OP, (q.clone().requires_grad_(), k.clone().requires_grad_(), torch.arange(3), 10000.0))
    opcheck(BACKWARD_OP, (q, k, torch.arange(3), 10000.0))
    grads = torch.empty(q.shape), torch.empty(k.shape)
    opcheck(BACKWARD_OUT_OP, (q, k, torch.arange(3), 10000.0, *grads))


def test_backward_under_transforms() -> None:
    q, k = inputs(2, 3, 4, 2, 16, torch.float32)
    assert_same_gradients_compiled(ops.rope, q, k, torch.arange(3))
    assert_no_second_derivative(ops.rope, q, k, torch.arange(3))
    with torch.autocast("cpu", torch.bfloat16):
        rotated = ops.rope(q, k.bfloat16(), torch.arange(3))
    assert [t.dtype for t in rotated] == [torch.float32, torch.float32]


def test_errors() -> None:
    q, k = inputs(2, 3, 4, 2, 16, torch.float32)
    positions = torch.arange(3)
    with pytest.raises(TypeError, match=r"rope: k must be a torch\.Tensor, got NoneType"):
        ops.rope(q, None, positions)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rope: q must be float32, .*, got torch.int64"):
        ops.rope(q.long(), k, positions)
    with pytest.raises(TypeError, match="positions must be int32 or int64, got torch.float32"):
        ops.rope(q, k, positions.float())
    with pytest.raises(TypeError, match=r"positions must be a torch\.Tensor, got list"):
        ops.rope(q, k, [0, 1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k must have q's dtype Float, got Half"):
        ops.rope(q, k.half(), positions)
    with pytest.raises(
        ValueError,
        match=r"q must have shape \(batch, seqlen, num_heads, head_dim\), got \(3, 4, 16\)",
    ):
        ops.rope(q[0], k, positions)
    with pytest.raises(
        ValueError,
        match=r"k must have shape \(batch, seqlen, num_kv_heads, head_dim\) = \(2, 3, \*, 16\), "
        r"got \(2, 2, 2, 16\)",
    ):
        ops.rope(q, k[:, 1:], positions)
    with pytest.raises(ValueError, match="rope: head_dim must be even, got 15"):
        ops.rope(q[..., 1:], k[..., 1:], positions)
    with pytest.raises(
        ValueError,
        match=r"positions must have shape \(seqlen,\) = \(3,\) or \(batch, seqlen\) = \(2, 3\), "
        r"got \(4,\)",
    ):
        ops.rope(q, k, torch.arange(4))
    with pytest.raises(ValueError, match=r"positions must have shape .*, got \(1, 3\)"):
        ops.rope(q, k, positions[None])
    with pytest.raises(ValueError, match="positions must be int64 or int32, got Float"):
        OP(q, k, positions.float())
    for theta in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="theta must be positive and finite"):
            ops.rope(q, k, positions, theta)
    with pytest.raises(ValueError, match="k_out must have k's shape"):
        OUT_OP(q, k, positions, 10000.0, torch.empty(q.shape), torch.empty(q.shape))
