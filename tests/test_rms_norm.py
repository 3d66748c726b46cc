from __future__ import annotations

import pytest
import torch
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

OP = torch.ops.gemma2_ext.rms_norm.default
OUT_OP = torch.ops.gemma2_ext.rms_norm_out.default
BACKWARD_OP = torch.ops.gemma2_ext.rms_norm_backward.default
BACKWARD_OUT_OP = torch.ops.gemma2_ext.rms_norm_backward_out.default


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [1, 7, 8, 41, 111, 256, 2304])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_value(isa: str, dtype: torch.dtype, hidden_size: int, rows: int) -> None:
    x = torch.randn(rows, hidden_size).to(dtype)
    weight = torch.randn(hidden_size).to(dtype)
    assert_accurate(ops.rms_norm(x, weight), reference.rms_norm, x, weight)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(isa: str, layout: str) -> None:
    x, weight = torch.randn(3, 5, 41), torch.randn(41)
    expected = ops.rms_norm(x, weight)
    actual = ops.rms_norm(with_strides(x, layout), with_strides(weight, layout))
    assert torch.equal(actual, expected)
    assert torch.equal(ops.rms_norm(x.transpose(0, 1), weight), expected.transpose(0, 1))


def test_weight_of_another_dtype(isa: str) -> None:
    x, weight = torch.randn(5, 64).bfloat16(), torch.randn(64)
    assert_accurate(ops.rms_norm(x, weight), lambda a, w: reference.rms_norm(a, w), x, weight)


def test_one_plus_weight_in_float32() -> None:
    # In bfloat16 1 + 2^-9 is 1; the product must still see it.
    x = torch.full((1, 64), 3.0)
    weight = torch.full((64,), 2.0**-9).bfloat16()
    assert ops.rms_norm(x, weight)[0, 0] > 1.0015


def test_every_element_is_written(isa: str) -> None:
    x, weight = torch.randn(7, 41), torch.randn(41)
    out = torch.full_like(x, float("nan"))
    OUT_OP(x, weight, 1e-6, out)
    assert torch.equal(out, ops.rms_norm(x, weight))


def test_independent_of_threads(isa: str) -> None:
    x, weight = torch.randn(513, 333), torch.randn(333)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.rms_norm(x, weight))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 5, 16).to(dtype), torch.randn(16).to(dtype)
    opcheck(OP, (x, weight, 1e-6))
    opcheck(OUT_OP, (x, weight, 1e-6, torch.empty_like(x)))


def test_compile_without_graph_breaks() -> None:
    x, weight = torch.randn(5, 64), torch.randn(64)
    compiled = torch.compile(lambda x: ops.rms_norm(x, weight) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(x), ops.rms_norm(x, weight) * 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [5, 8, 41, 513, 2304, 4609])
@pytest.mark.parametrize("rows", [0, 1, 7, 9])
def test_gradients(isa: str, dtype: torch.dtype, hidden_size: int, rows: int) -> None:
    x, weight = torch.randn(rows, hidden_size).to(dtype), torch.randn(hidden_size).to(dtype)
    assert_gradients_accurate(ops.rms_norm, reference.rms_norm, x, weight, roundings=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_many_rows(isa: str, dtype: torch.dtype) -> None:
    # More rows than kNormMostBlocks blocks of 8, so that blocks are longer.
    x, weight = torch.randn(1500, 24).to(dtype), torch.randn(24).to(dtype)
    assert_gradients_accurate(ops.rms_norm, reference.rms_norm, x, weight)


def test_gradient_of_one_column(isa: str) -> None:
    # The norm of a single number is its sign: what remains of the gradient is eps / x^2.
    x, weight = torch.linspace(2, 9, 7)[:, None], torch.randn(1)
    grad_x, _ = gradients(ops.rms_norm, (x, weight), torch.ones(7, 1))
    assert (grad_x.abs() < 1e-6).all()


def test_gradient_of_a_weight_of_another_dtype(isa: str) -> None:
    x, weight = torch.randn(5, 64).bfloat16(), torch.randn(64)
    assert_gradients_accurate(ops.rms_norm, reference.rms_norm, x, weight)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_strided_tensors(isa: str, layout: str) -> None:
    x, weight, grad_out = torch.randn(3, 5, 41), torch.randn(41), torch.randn(3, 5, 41)
    expected = gradients(ops.rms_norm, (x, weight), grad_out)
    strided = [with_strides(t, layout) for t in (x, weight, grad_out)]
    actual = gradients(ops.rms_norm, strided[:2], strided[2])
    assert all(map(torch.equal, actual, expected))
    # A sum's gradient is one number, expanded.
    ones = gradients(ops.rms_norm, (x, weight), torch.ones(3, 5, 41))
    summed = gradients(lambda *t: ops.rms_norm(*t).sum(), (x, weight), torch.tensor(1.0))
    assert all(map(torch.equal, summed, ones))


def test_every_element_of_the_gradients_is_written(isa: str) -> None:
    grad_out, x, weight = torch.randn(7, 41), torch.randn(7, 41), torch.randn(41)
    grads = torch.full_like(x, float("nan")), torch.full_like(weight, float("nan"))
    BACKWARD_OUT_OP(grad_out, x, weight, 1e-6, *grads)
    expected = gradients(ops.rms_norm, (x, weight), grad_out)
    assert all(map(torch.equal, grads, expected))


def test_gradients_independent_of_threads(isa: str) -> None:
    x, weight, grad_out = torch.randn(2100, 70), torch.randn(70), torch.randn(2100, 70)
    assert_independent_of_threads(lambda: gradients(ops.rms_norm, (x, weight), grad_out))


def test_gradcheck() -> None:
    x, weight = torch.randn(3, 2, 11).double(), torch.randn(11).double()
    torch.testing.assert_close(ops.rms_norm(x, weight), reference.rms_norm(x, weight))
    assert torch.autograd.gradcheck(ops.rms_norm, (x.requires_grad_(), weight.requires_grad_()))


def test_backward_opcheck() -> None:
    x, weight = torch.randn(3, 5, 16), torch.randn(16)
    opcheck(OP, (x.clone().requires_grad_(), weight.clone().requires_grad_(), 1e-6))
    opcheck(BACKWARD_OP, (x, x, weight, 1e-6))
    opcheck(BACKWARD_OUT_OP, (x, x, weight, 1e-6, x.clone(), weight.clone()))


def test_backward_under_transforms() -> None:
    x, weight = torch.randn(5, 64), torch.randn(64)
    assert_same_gradients_compiled(ops.rms_norm, x, weight)
    assert_no_second_derivative(ops.rms_norm, x, weight)
    with torch.autocast("cpu", torch.bfloat16):  # in the dtype that it is given
        assert torch.equal(ops.rms_norm(x, weight), ops.rms_norm(x.clone(), weight))
        assert ops.rms_norm(x.bfloat16(), weight).dtype == torch.bfloat16


def test_errors() -> None:
    x, weight = torch.randn(5, 64), torch.randn(64)
    with pytest.raises(TypeError, match=r"rms_norm: x must be a torch\.Tensor, got list"):
        ops.rms_norm([1.0], weight)  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match="rms_norm: x must be float32, bfloat16 or float16, got torch.int64"
    ):
        ops.rms_norm(x.long(), weight)
    with pytest.raises(TypeError, match=r"rms_norm: x must be strided, not torch\.sparse_coo"):
        ops.rms_norm(x.to_sparse(), weight)
    with pytest.raises(
        ValueError, match=r"weight must have shape \(hidden_size,\) = \(64,\), got \(63,\)"
    ):
        ops.rms_norm(x, weight[1:])
    with pytest.raises(ValueError, match="got a scalar"):
        ops.rms_norm(torch.tensor(1.0), weight)
    with pytest.raises(ValueError, match="eps must be at least 0"):
        ops.rms_norm(x, weight, eps=-1.0)
    with pytest.raises(ValueError, match="out must have x's shape"):
        OUT_OP(x, weight, 1e-6, torch.empty(5, 63))
    with pytest.raises(ValueError, match="weight must have x's dtype Double, got Float"):
        ops.rms_norm(x.double(), weight)
    with pytest.raises(ValueError, match=r"rms_norm_backward: grad_out must have x's shape"):
        BACKWARD_OP(x[1:], x, weight, 1e-6)
