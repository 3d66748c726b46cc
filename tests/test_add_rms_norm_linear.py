from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from common import DTYPES, LAYOUTS, assert_accurate, with_strides
from gemma2_ext import ops, reference

OP = torch.ops.gemma2_ext.add_rms_norm_linear.default
OUT_OP = torch.ops.gemma2_ext.add_rms_norm_linear_out.default


def tensors(rows: int, size: int, out: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    shapes = ((rows, size), (rows, size), (size,), (size,), (out, size))
    scales = (1, 1, 1, 1, size**-0.5)
    return tuple((torch.randn(n) * s).to(dtype) for n, s in zip(shapes, scales, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geglu", [False, True])
@pytest.mark.parametrize(("rows", "size", "out"), [(0, 8, 4), (1, 128, 40), (7, 41, 6)])
def test_value(
    isa: str, dtype: torch.dtype, geglu: bool, rows: int, size: int, out: int
) -> None:
    given = tensors(rows, size, out, dtype)
    r, product = ops.add_rms_norm_linear(*given, geglu=geglu)
    assert_accurate(r, lambda *t: reference.add_rms_norm_linear(*t)[0], *given)
    # The second norm is of the rounded sum.
    normed = lambda r, pre, w: reference.linear(reference.rms_norm(r, pre), w)  # noqa: E731
    if geglu:
        normed = lambda r, pre, w: reference.linear_geglu(reference.rms_norm(r, pre), w)  # noqa: E731
    assert_accurate(product, normed, r, given[3], given[4], roundings=2)


@pytest.mark.parametrize("geglu", [False, True])
@pytest.mark.parametrize("shape", [(64,), (1, 1, 64), (2, 3, 64)])
def test_the_same_as_its_parts(isa: str, geglu: bool, shape: tuple[int, ...]) -> None:
    x, residual = torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()
    _, _, post, pre, weight = tensors(1, 64, 24, torch.bfloat16)
    r, hidden = ops.add_rms_norm(x, residual, post, pre, 1e-5)
    product = (ops.linear_geglu if geglu else ops.linear)(hidden, weight)
    actual = ops.add_rms_norm_linear(x, residual, post, pre, weight, 1e-5, geglu)
    assert torch.equal(actual[0], r)
    assert torch.equal(actual[1], product)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(isa: str, layout: str) -> None:
    given = tensors(6, 41, 4, torch.float32)
    expected = ops.add_rms_norm_linear(*given, geglu=True)
    actual = ops.add_rms_norm_linear(*(with_strides(t, layout) for t in given), geglu=True)
    for out, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(out, right)


@pytest.mark.parametrize("geglu", [False, True])
def test_opcheck(geglu: bool) -> None:
    given = tensors(3, 16, 10, torch.float32)
    opcheck(OP, given, {"geglu": geglu})
    outs = torch.empty(3, 16), torch.empty(3, 5 if geglu else 10)
    opcheck(OUT_OP, (*given, 1e-6, geglu, *outs))


def test_compile_without_graph_breaks() -> None:
    given = tensors(3, 16, 10, torch.float32)
    f = lambda *t: ops.add_rms_norm_linear(*t)[1] * 2  # noqa: E731
    torch.testing.assert_close(torch.compile(f, fullgraph=True)(*given), f(*given))


def test_errors() -> None:
    x, residual, post, pre, weight = tensors(3, 16, 10, torch.float32)
    with pytest.raises(TypeError, match="add_rms_norm_linear: pre_weight must be a torch.Tensor"):
        ops.add_rms_norm_linear(x, residual, post, None, weight)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"residual must have .* shape \(3, 16\), got \(2, 16\)"):
        ops.add_rms_norm_linear(x, residual[:2], post, pre, weight)
    with pytest.raises(ValueError, match=r"linear: weight must have shape .* got \(10, 15\)"):
        ops.add_rms_norm_linear(x, residual, post, pre, weight[:, 1:])
    with pytest.raises(ValueError, match=r"must have an even number of rows, got \(9, 16\)"):
        ops.add_rms_norm_linear(x, residual, post, pre, weight[:9], geglu=True)
    with pytest.raises(ValueError, match="eps must be at least 0"):
        ops.add_rms_norm_linear(x, residual, post, pre, weight, -1.0)
    with pytest.raises(NotImplementedError, match="add_rms_norm_linear has no backward"):
        ops.add_rms_norm_linear(x.requires_grad_(), residual, post, pre, weight)[1].sum().backward()
