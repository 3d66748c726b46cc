from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from common import DTYPES, assert_accurate, with_strides
from gemma2_ext import reference
from host_cuda.emulator import check_schedules, guarded, launch


def geglu(gate: Tensor, up: Tensor, offset: int = 0, **options: Any) -> tuple[Tensor]:
    out = guarded(gate.shape, gate.dtype, offset=offset)
    launch(
        "geglu",
        gate=gate,
        gate_stride=gate.stride(0),
        up=up,
        up_stride=up.stride(0),
        out=out,
        rows=gate.shape[0],
        columns=gate.shape[1],
        dtype=gate.dtype,
        **options,
    )
    return (out,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 41, 1024, 1544])
def test_value(dtype: torch.dtype, columns: int) -> None:
    gate, up = (3 * torch.randn(3, columns)).to(dtype), torch.randn(3, columns).to(dtype)
    (out,) = check_schedules(lambda **options: geglu(gate, up, **options))
    assert_accurate(out, reference.geglu, gate, up)


def test_where_one_plus_tanh_cancels() -> None:
    gate = torch.linspace(-12, 12, 4096)[None]
    up = torch.ones_like(gate)
    wide = gate.double()
    u = (2 / math.pi) ** 0.5 * (wide + 0.044715 * wide**3)
    exact = wide * torch.sigmoid(2 * u)
    error = (geglu(gate, up)[0].double() - exact).abs()
    # The exponent 2u is rounded a few times, and so is the rest.
    assert (error <= 4 * 2**-24 * (2 * u.abs() + 2) * exact.abs() + 2**-120).all()
    extreme = torch.tensor([[-3e38, -100.0, 0.0, 100.0, 3e38]])
    expected = torch.tensor([[0.0, 0.0, 0.0, 100.0, 3e38]])
    torch.testing.assert_close(geglu(extreme, torch.ones_like(extreme))[0], expected)


@pytest.mark.parametrize("layout", ["sliced", "unaligned"])
def test_strides(layout: str) -> None:
    both = torch.randn(5, 144).bfloat16()
    gate, up = both[:, :72], both[:, 72:]
    (expected,) = geglu(gate.contiguous(), up.contiguous())
    assert torch.equal(geglu(gate, up)[0], expected)
    assert torch.equal(geglu(with_strides(gate, layout), up)[0], expected)
    assert torch.equal(geglu(gate, with_strides(up, layout))[0], expected)
    assert torch.equal(geglu(gate, up, offset=1)[0], expected)


def test_more_rows_than_a_grid_has() -> None:
    gate, up = torch.randn(5, 41), torch.randn(5, 41)
    assert_accurate(geglu(gate, up, max_blocks=2)[0], reference.geglu, gate, up)
