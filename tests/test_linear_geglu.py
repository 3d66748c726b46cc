from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from common import DTYPES, LAYOUTS, assert_accurate, with_strides
from gemma2_ext import ops, reference

OP = torch.ops.gemma2_ext.linear_geglu.default
OUT_OP = torch.ops.gemma2_ext.linear_geglu_out.default


def tensors(rows: int, size: int, out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, size).to(dtype), (torch.randn(2 * out, size) / size**0.5).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 7, 17])
@pytest.mark.parametrize(("size", "out"), [(1, 1), (41, 7), (128, 40)])
def test_value(isa: str, dtype: torch.dtype, rows: int, size: int, out: int) -> None:
    x, weight = tensors(rows, size, out, dtype)
    assert_accurate(ops.linear_geglu(x, weight), reference.linear_geglu, x, weight, roundings=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(isa: str, layout: str) -> None:
    x, weight = tensors(6, 41, 5, torch.float32)
    expected = ops.linear_geglu(x, weight)
    actual = ops.linear_geglu(with_strides(x, layout), with_strides(weight, layout))
    torch.testing.assert_close(actual, expected)
    assert ops.linear_geglu(x.view(2, 3, 41), weight).shape == (2, 3, 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [512, 513, 1100])
def test_slices_of_rows(isa: str, dtype: torch.dtype, rows: int) -> None:
    x, weight = tensors(rows, 41, 5, dtype)
    for view in (x, torch.cat([x, x], dim=1)[:, :41]):
        out = ops.linear_geglu(view, weight)
        assert_accurate(out, reference.linear_geglu, view, weight, roundings=2)


def test_the_same_as_its_parts() -> None:
    x, weight = tensors(3, 64, 24, torch.bfloat16)
    gate, up = ops.linear(x, weight).chunk(2, dim=-1)
    assert torch.equal(ops.linear_geglu(x, weight), ops.geglu(gate, up))


def test_no_columns(isa: str) -> None:
    assert torch.equal(ops.linear_geglu(torch.empty(2, 0), torch.empty(6, 0)), torch.zeros(2, 3))
    assert ops.linear_geglu(torch.randn(2, 4), torch.empty(0, 4)).shape == (2, 0)


def test_opcheck() -> None:
    x, weight = tensors(3, 16, 5, torch.float32)
    opcheck(OP, (x, weight))
    opcheck(OUT_OP, (x, weight, torch.empty(3, 5)))


def test_compile_without_graph_breaks() -> None:
    x, weight = tensors(3, 16, 5, torch.float32)
    compiled = torch.compile(lambda x: ops.linear_geglu(x, weight) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(x), ops.linear_geglu(x, weight) * 2)


def test_autocast() -> None:
    x, weight = tensors(3, 16, 5, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = ops.linear_geglu(x.bfloat16(), weight.bfloat16())
        for mixed in ((x, weight), (x.bfloat16(), weight)):
            assert torch.equal(ops.linear_geglu(*mixed), expected)


def test_errors() -> None:
    x, weight = tensors(3, 16, 5, torch.float32)
    with pytest.raises(TypeError, match="linear_geglu: weight must be a torch.Tensor, got None"):
        ops.linear_geglu(x, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weight must have an even number of rows, got \(9, 16\)"):
        ops.linear_geglu(x, weight[:9])
    with pytest.raises(ValueError, match=r"linear_geglu: weight must have shape .* got \(10, 15\)"):
        ops.linear_geglu(x, weight[:, 1:])
    with pytest.raises(ValueError, match=r"out must have shape .* got \(3, 4\)"):
        OUT_OP(x, weight, torch.empty(3, 4))
    with pytest.raises(NotImplementedError, match="linear_geglu has no backward"):
        ops.linear_geglu(x.requires_grad_(), weight).sum().backward()
