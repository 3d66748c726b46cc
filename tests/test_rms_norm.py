from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from common import DTYPES, LAYOUTS, assert_accurate, with_strides
from gemma2_ext import ops, reference

OP = torch.ops.gemma2_ext.rms_norm.default
OUT_OP = torch.ops.gemma2_ext.rms_norm_out.default


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


def test_backward_refuses() -> None:
    x = torch.randn(5, 64, requires_grad=True)
    with pytest.raises(NotImplementedError, match="rms_norm has no backward"):
        ops.rms_norm(x, torch.randn(64)).sum().backward()


def test_errors() -> None:
    x, weight = torch.randn(5, 64), torch.randn(64)
    with pytest.raises(TypeError, match=r"rms_norm: x must be a torch\.Tensor, got list"):
        ops.rms_norm([1.0], weight)  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match="rms_norm: x must be float32, bfloat16 or float16, got torch.int64"
    ):
        ops.rms_norm(x.long(), weight)
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
