from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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

OP = torch.ops.gemma2_ext.geglu.default
OUT_OP = torch.ops.gemma2_ext.geglu_out.default
BACKWARD_OP = torch.ops.gemma2_ext.geglu_backward.default
BACKWARD_OUT_OP = torch.ops.gemma2_ext.geglu_backward_out.default


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 8, 41, 111, 1023, 1024, 1025, 2304])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_value(isa: str, dtype: torch.dtype, columns: int, rows: int) -> None:
    gate, up = torch.randn(rows, columns).mul(3).to(dtype), torch.randn(rows, columns).to(dtype)
    assert_accurate(ops.geglu(gate, up), reference.geglu, gate, up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("intermediate_size", [9216, 14336, 36864])
def test_production_shapes(isa: str, dtype: torch.dtype, intermediate_size: int) -> None:
    gate_up = torch.randn(3, 2 * intermediate_size).to(dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    assert_accurate(ops.geglu(gate, up), reference.geglu, gate, up)
    assert_accurate(ops.geglu(gate[1:2], up[1:2]), reference.geglu, gate[1:2], up[1:2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_magnitude(isa: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    gate = torch.cat((torch.linspace(-12, 12, 4001), torch.logspace(-30, 4, 1001)))
    gate = torch.cat((gate, -gate)).to(dtype)
    one = torch.ones_like(gate)
    assert_accurate(ops.geglu(gate, one), reference.geglu, gate, one)
    ends = torch.tensor([largest, -largest, 0.0, -0.0, 60000.0, -60000.0]).to(dtype)
    assert torch.equal(ops.geglu(ends, torch.ones_like(ends)), ends.clamp(min=0))


def test_relative_error_far_below_zero(isa: str) -> None:
    # Where 1 + tanh would cancel to nothing in float32.
    gate = torch.linspace(-9.0, -1.0, 1001)
    actual = ops.geglu(gate, torch.ones_like(gate)).double()
    exact = reference.geglu(gate.double(), torch.ones_like(gate).double())
    # Down to -4.5 the truth holds too: there 1 + tanh is 4e-6, known to 3e-11 in float64. The error
    # is that of the exponent, 12.4 there, after three roundings.
    error = ((actual - exact).abs() / exact.abs())[gate > -4.5]
    assert error.max() <= 12.4 * 3 * 2**-24 + 2**-21
    assert (actual <= 0).all()


def test_not_a_number(isa: str) -> None:
    gate = torch.tensor([math.nan, 1.0, math.inf] * 5)
    up = torch.tensor([1.0, math.nan, 1.0] * 5)
    actual = ops.geglu(gate, up)
    assert torch.equal(actual.isnan(), torch.tensor([True, True, False] * 5))
    assert (actual[2::3] == math.inf).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(isa: str, dtype: torch.dtype, layout: str) -> None:
    gate, up = torch.randn(3, 5, 41).to(dtype), torch.randn(3, 5, 41).to(dtype)
    expected = ops.geglu(gate, up)
    assert torch.equal(ops.geglu(with_strides(gate, layout), with_strides(up, layout)), expected)
    assert torch.equal(ops.geglu(gate, with_strides(up, layout)), expected)
    swapped = ops.geglu(gate.transpose(0, 1), up.transpose(0, 1))
    assert torch.equal(swapped, expected.transpose(0, 1))
    expanded = up[:1].expand_as(up)
    assert torch.equal(ops.geglu(gate, expanded), ops.geglu(gate, expanded.contiguous()))


def test_halves_are_not_copied() -> None:
    gate, up = torch.randn(64, 2 * 9216).chunk(2, dim=-1)
    out = torch.empty(64, 9216)
    with torch.profiler.profile(profile_memory=True) as profile:
        OUT_OP(gate, up, out)
    assert not [e.key for e in profile.key_averages() if e.key.startswith("aten::")]


def test_every_element_is_written(isa: str) -> None:
    gate, up = torch.randn(7, 1041), torch.randn(7, 1041)
    out = torch.full_like(gate, float("nan"))
    OUT_OP(gate, up, out)
    assert torch.equal(out, ops.geglu(gate, up))


@pytest.mark.parametrize("rows", [1, 77])
def test_independent_of_threads(isa: str, rows: int) -> None:
    gate, up = torch.randn(rows, 36864 if rows == 1 else 3333).repeat(2, 1, 1)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.geglu(gate, up))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@settings(max_examples=50, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    columns=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(shape: list[int], columns: int, dtype: torch.dtype) -> None:
    gate, up = torch.randn(2, *shape, columns).to(dtype)
    assert_accurate(ops.geglu(gate, up), reference.geglu, gate, up)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    gate, up = torch.randn(2, 3, 5, 16).to(dtype)
    opcheck(OP, (gate, up))
    opcheck(OUT_OP, (gate, up, torch.empty_like(gate)))


def test_compile_without_graph_breaks() -> None:
    gate_up = torch.randn(5, 64)

    def halves(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return ops.geglu(gate, up) * 2

    compiled = torch.compile(halves, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(gate_up), halves(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (7, 41), (3, 1031), (2, 2, 16)])
def test_gradients(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gate, up = torch.randn(2, *shape).mul(2).to(dtype)
    assert_gradients_accurate(ops.geglu, reference.geglu, gate, up, roundings=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_at_every_magnitude(isa: str, dtype: torch.dtype) -> None:
    gate = torch.cat((torch.linspace(-12, 12, 2001), torch.logspace(-30, 4, 501)))
    gate = torch.cat((gate, -gate)).to(dtype)
    assert_gradients_accurate(ops.geglu, reference.geglu, gate, torch.ones_like(gate))
    largest = torch.finfo(dtype).max
    ends = torch.tensor([largest, 1e4, -1e4, -largest]).to(dtype)
    one = torch.ones_like(ends)
    grad_gate, grad_up = gradients(ops.geglu, (ends, one), one)
    assert torch.equal(grad_gate.float(), torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert torch.equal(grad_up, ends.clamp(min=0))


def test_gradients_of_not_a_number(isa: str) -> None:
    gate = torch.tensor([math.nan, 1.0] * 9)
    for grad in gradients(ops.geglu, (gate, torch.ones(18)), torch.ones(18)):
        assert torch.equal(grad.isnan(), gate.isnan())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_strided_tensors(isa: str, layout: str) -> None:
    gate, up, grad_out = torch.randn(3, 3, 5, 41)
    expected = gradients(ops.geglu, (gate, up), grad_out)
    strided = [with_strides(t, layout) for t in (gate, up, grad_out)]
    assert all(map(torch.equal, gradients(ops.geglu, strided[:2], strided[2]), expected))
    ones = gradients(ops.geglu, (gate, up), torch.ones(3, 5, 41))
    summed = gradients(lambda *t: ops.geglu(*t).sum(), (gate, up), torch.tensor(1.0))
    assert all(map(torch.equal, summed, ones))


def test_every_element_of_the_gradients_is_written(isa: str) -> None:
    grad_out, gate, up = torch.randn(3, 7, 1041)
    grads = torch.full_like(gate, math.nan), torch.full_like(up, math.nan)
    BACKWARD_OUT_OP(grad_out, gate, up, *grads)
    assert all(map(torch.equal, grads, gradients(ops.geglu, (gate, up), grad_out)))


def test_gradients_independent_of_threads(isa: str) -> None:
    grad_out, gate, up = torch.randn(3, 77, 3333)
    assert_independent_of_threads(lambda: gradients(ops.geglu, (gate, up), grad_out))


def test_gradcheck() -> None:
    gate, up = torch.randn(3, 2, 11).double() * 2, torch.randn(3, 2, 11).double()
    torch.testing.assert_close(ops.geglu(gate, up), reference.geglu(gate, up))
    assert torch.autograd.gradcheck(ops.geglu, (gate.requires_grad_(), up.requires_grad_()))


def test_backward_opcheck() -> None:
    gate, up = torch.randn(2, 3, 5, 16)
    opcheck(OP, (gate.clone().requires_grad_(), up.clone().requires_grad_()))
    opcheck(BACKWARD_OP, (gate, gate, up))
    opcheck(BACKWARD_OUT_OP, (gate, gate, up, gate.clone(), up.clone()))


def test_backward_under_transforms() -> None:
    gate, up = torch.randn(2, 5, 64)
    assert_same_gradients_compiled(ops.geglu, gate, up)
    assert_no_second_derivative(ops.geglu, gate, up)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.geglu(gate.bfloat16(), up), ops.geglu(gate.bfloat16().float(), up))


def test_errors() -> None:
    gate, up = torch.randn(5, 64), torch.randn(5, 64)
    with pytest.raises(TypeError, match=r"geglu: gate must be a torch\.Tensor, got int"):
        ops.geglu(1, up)  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match="geglu: up must be float32, bfloat16 or float16, got torch.int32"
    ):
        ops.geglu(gate, up.int())
    with pytest.raises(
        ValueError, match=r"geglu: up must have gate's shape \(5, 64\), got \(64,\)"
    ):
        ops.geglu(gate, up[0])
    with pytest.raises(ValueError, match="geglu: up must have gate's dtype Float, got BFloat16"):
        ops.geglu(gate, up.bfloat16())
    with pytest.raises(ValueError, match="geglu: gate must have shape .*, got a scalar"):
        ops.geglu(torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(ValueError, match="geglu: out must have gate's shape"):
        OUT_OP(gate, up, torch.empty(5, 63))
    with pytest.raises(ValueError, match="geglu: out must be contiguous"):
        OUT_OP(gate, up, torch.empty(64, 5).t())
    with pytest.raises(ValueError, match="geglu_backward: grad_out must have gate's shape"):
        BACKWARD_OP(gate[1:], gate, up)
