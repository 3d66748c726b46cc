"""NaN of any bit pattern comes out as NaN: rounding to 16 bits must not make a number of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common import DTYPES, gradients
from gemma2_ext import ops

COLUMNS = 300


def every_nan(dtype: torch.dtype) -> Tensor:
    """NaN patterns of dtype, both signs: all of 16 bits, some of float32's."""
    if dtype == torch.float32:
        tails = (1, 0x7FFF, 0x8000, 0xFFFF, 0x3FFFFF, 0x400000, 0x7F7FFF, 0x7F8000, 0x7FFFFF)
        bits = torch.tensor([0x7F800000 | tail for tail in tails])
        return torch.cat((bits, bits - 2**31)).int().view(dtype)
    infinity, most = (0x7F80, 0x7FFF) if dtype == torch.bfloat16 else (0x7C00, 0x7FFF)
    bits = torch.arange(infinity + 1, most + 1)
    return torch.cat((bits, bits - 2**15)).short().view(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_the_input(isa: str, dtype: torch.dtype) -> None:
    nan = every_nan(dtype)
    x = torch.randn(len(nan), COLUMNS).to(dtype)
    column = torch.arange(len(nan)) % COLUMNS
    x[torch.arange(len(nan)), column] = nan
    weight, ones = torch.randn(COLUMNS).to(dtype), torch.ones_like(x)
    assert ops.rms_norm(x, weight).isnan().all()
    r, out = ops.add_rms_norm(x, ones, weight, weight)
    assert r.isnan().all() and out.isnan().all()
    r, out = ops.add_rms_norm(ones, x, weight, weight)
    assert torch.equal(r.isnan(), x.isnan()) and out.isnan().all()
    assert torch.equal(ops.geglu(x, ones).isnan(), x.isnan())
    assert torch.equal(ops.geglu(ones, x).isnan(), x.isnan())
    for grad in gradients(ops.geglu, (ones, ones), x):
        assert torch.equal(grad.isnan(), x.isnan())
    grad_x, grad_weight = gradients(ops.rms_norm, (ones, weight), x)
    assert grad_x.isnan().all() and grad_weight[column].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_of_the_weight(isa: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    nan = every_nan(weight_dtype)[-COLUMNS // 2 :]
    weight = torch.randn(COLUMNS).to(weight_dtype)
    weight[: 2 * len(nan) : 2] = nan
    x = torch.randn(3, COLUMNS).to(dtype)
    expected = weight.isnan().expand(3, -1)
    assert torch.equal(ops.rms_norm(x, weight).isnan(), expected)
    number = torch.zeros_like(weight)
    r, out = ops.add_rms_norm(x, x, weight, number)
    assert torch.equal(r.isnan(), expected) and out.isnan().all()
    r, out = ops.add_rms_norm(x, x, number, weight)
    assert not r.isnan().any() and torch.equal(out.isnan(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_a_head(isa: str, dtype: torch.dtype) -> None:
    nan = every_nan(dtype)
    q = torch.ones(1, len(nan), 1, 64, dtype=dtype)
    q[0, :, 0, 0] = nan
    positions = torch.arange(1, len(nan) + 1)[None]
    for rotated in ops.rope(q, q, positions):
        assert rotated[..., [0, 32]].isnan().all()
        assert rotated.isnan().sum() == 2 * len(nan)
