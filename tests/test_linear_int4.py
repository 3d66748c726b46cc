from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from common import DTYPES, LAYOUTS, with_strides
from gemma2_ext import ops, reference
from packed_ops import ROWS, SHAPES, assert_close, assert_exact, exact_x, packed

OP = torch.ops.gemma2_ext.linear_int4.default
OUT_OP = torch.ops.gemma2_ext.linear_int4_out.default


@pytest.mark.parametrize("shape", SHAPES)
def test_value(isa: str, shape: tuple[int, int]) -> None:
    weight = packed(*shape, "int4")
    for rows in ROWS:
        x = exact_x(rows, shape[1])
        assert_exact(ops.linear_int4(x, weight.data, weight.scales), x, weight)
        x = torch.randn(rows, shape[1])
        assert_close(ops.linear_int4(x, weight.data, weight.scales), x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(isa: str, dtype: torch.dtype) -> None:
    weight = packed(50, 100, "int4")
    for rows in (1, 20):
        x = exact_x(rows, 100, dtype)
        actual = ops.linear(x, weight)
        assert actual.dtype == dtype
        assert_exact(actual, x, weight)
    assert ops.linear(x.view(4, 5, 100), weight).shape == (4, 5, 50)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 70),
    in_features=st.integers(0, 200),
    out_features=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(rows: int, in_features: int, out_features: int, dtype: torch.dtype) -> None:
    weight = packed(out_features, in_features, "int4")
    x = exact_x(rows, in_features, dtype)
    assert_exact(ops.linear(x, weight), x, weight)


def test_the_reference(isa: str) -> None:
    weight, x = packed(40, 75, "int4"), exact_x(3, 75)
    args = (x, weight.data, weight.scales)
    torch.testing.assert_close(ops.linear_int4(*args), reference.linear_int4(*args))


@pytest.mark.parametrize("rows", [512, 513, 1100])
def test_slices_of_rows(isa: str, rows: int) -> None:
    weight, x = packed(19, 70, "int4"), exact_x(rows, 70, torch.bfloat16)
    beside = torch.zeros(rows, 3, dtype=x.dtype)
    assert_exact(ops.linear(torch.cat([x, beside], dim=1)[:, :70], weight), x, weight)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(isa: str, layout: str) -> None:
    weight, x = packed(30, 41, "int4"), torch.randn(2, 3, 41)
    expected = ops.linear(x, weight)
    assert torch.equal(ops.linear(with_strides(x, layout), weight), expected)
    assert torch.equal(ops.linear(x.transpose(0, 1), weight), expected.transpose(0, 1))
    assert torch.equal(ops.linear(x[:, :1].expand(2, 3, 41), weight)[:, 2], expected[:, 0])


@pytest.mark.parametrize("rows", [1, 7, 70])
def test_every_element_is_written(isa: str, rows: int) -> None:
    weight, x = packed(35, 50, "int4"), torch.randn(rows, 50)
    out = torch.full((rows, 35), float("nan"))
    OUT_OP(x, weight.data, weight.scales, out)
    assert torch.equal(out, ops.linear(x, weight))


def test_independent_of_threads_and_of_rows_beside(isa: str) -> None:
    weight, x = packed(1000, 333, "int4"), torch.randn(80, 333)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.linear(x, weight))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    for rows in (1, 2, 5, 16, 64, 65) if isa != "cuda" else ():  # float32 is cuBLAS's there
        assert torch.equal(ops.linear(x[:rows], weight), results[0][:rows])


def test_not_finite_x(isa: str) -> None:
    weight, x = packed(20, 70, "int4"), torch.randn(4, 70)
    expected = ops.linear(x, weight)
    x[1, 3], x[3, 69] = float("nan"), float("inf")
    actual = ops.linear(x, weight)
    assert actual[1].isnan().all()
    # On the CPU a row's largest magnitude is the step of its 8 bits.
    assert not actual[3].isfinite().any() if isa == "cuda" else actual[3].isnan().all()
    assert torch.equal(actual[::2], expected[::2])


@pytest.mark.parametrize("factor", [0.0, 1e-20, 1e20])
def test_magnitudes_of_x(isa: str, factor: float) -> None:
    weight, x = packed(20, 70, "int4"), torch.randn(4, 70)
    actual = ops.linear(x * factor, weight)
    torch.testing.assert_close(
        actual, ops.linear(x, weight) * factor, atol=1e-6 * factor, rtol=1e-3
    )


def test_largest_values(isa: str) -> None:
    """No sum of products overflows on the way."""
    for sign in (1, -1):
        weight = ops.quantize(torch.full((33, 2304), 1.0), "int4")
        x = torch.full((3, 2304), float(sign))
        torch.testing.assert_close(ops.linear(x, weight), x @ weight.dequantize().T)
        weight = ops.quantize(torch.full((33, 2304), -1.0), "int4")
        torch.testing.assert_close(ops.linear(x, weight), x @ weight.dequantize().T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    weight, x = packed(10, 16, "int4"), torch.randn(6, 16).to(dtype)
    opcheck(OP, (x.view(2, 3, 16), weight.data, weight.scales))
    opcheck(OUT_OP, (x, weight.data, weight.scales, x.new_empty(6, 10)))


def test_compile_without_graph_breaks() -> None:
    weight, x = packed(33, 64, "int4"), torch.randn(5, 64)
    compiled = torch.compile(lambda x: ops.linear(x, weight) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(x), ops.linear(x, weight) * 2)


def test_gradient_of_x() -> None:
    weight = packed(40, 70, "int4")
    x = torch.randn(2, 3, 70, requires_grad=True)
    out, grad = ops.linear(x, weight), torch.randn(2, 3, 40)
    out.backward(grad)
    torch.testing.assert_close(x.grad, grad @ weight.dequantize())
    half = x.detach().bfloat16().requires_grad_()
    ops.linear(half, weight).backward(grad.bfloat16())
    assert half.grad is not None and half.grad.dtype == torch.bfloat16


def test_errors() -> None:
    weight, x = packed(33, 64, "int4"), torch.randn(5, 64)
    data, scales = weight.data, weight.scales
    with pytest.raises(TypeError, match=r"linear_int4: x must be a torch\.Tensor, got list"):
        ops.linear_int4([1.0], data, scales)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"linear_int4: data must be a torch\.Tensor, got int"):
        ops.linear_int4(x, 3, scales)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"linear: x must have .* \(\.\.\., 64\) for Quant"):
        ops.linear(x[:, :63], weight)
    with pytest.raises(
        ValueError, match=r"linear_int4: data must have shape .* for in_features = 96, got \(33"
    ):
        ops.linear_int4(torch.randn(5, 96), data, scales)
    with pytest.raises(ValueError, match=r"linear_int4: data must be (Char|Byte), got Float"):
        ops.linear_int4(x, data.float(), scales)
    with pytest.raises(ValueError, match=r"linear_int4: scales must be (BFloat16|Char), got Float"):
        ops.linear_int4(x, data, scales.float())
    with pytest.raises(ValueError, match=r"linear_int4: scales must have shape .* got \(32, "):
        ops.linear_int4(x, data, scales[1:])
    with pytest.raises(ValueError, match=r"data must be contiguous"):
        ops.linear_int4(x, data.T.contiguous().T, scales)
    with pytest.raises(ValueError, match="x must have shape .* got a scalar"):
        ops.linear_int4(torch.tensor(1.0), data, scales)
    with pytest.raises(ValueError, match=r"out must have shape .*\(5, 64\), got \(5, 32\)"):
        OUT_OP(x, data, scales, torch.empty(5, 32))
    with pytest.raises(ValueError, match="out must be Float, got Half"):
        OUT_OP(x, data, scales, torch.empty(5, 33).half())
