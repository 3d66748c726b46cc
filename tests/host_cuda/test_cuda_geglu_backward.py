from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from common import DTYPES, assert_accurate, with_strides
from gemma2_ext import reference
from host_cuda.emulator import check_schedules, guarded, launch


def geglu_backward(
    grad_out: Tensor, gate: Tensor, up: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    outs = guarded(gate.shape, gate.dtype), guarded(gate.shape, gate.dtype)
    launch(
        "geglu_backward",
        grad_out=grad_out,
        grad_out_stride=grad_out.stride(0),
        gate=gate,
        gate_stride=gate.stride(0),
        up=up,
        up_stride=up.stride(0),
        grad_gate=outs[0],
        grad_up=outs[1],
        rows=gate.shape[0],
        columns=gate.shape[1],
        dtype=gate.dtype,
        **options,
    )
    return outs


def expected(which: int, grad_out: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    inputs = gate.clone().requires_grad_(), up.clone().requires_grad_()
    return torch.autograd.grad(reference.geglu(*inputs), inputs, grad_out)[which]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 41, 1544])
def test_value(dtype: torch.dtype, columns: int) -> None:
    grad_out, gate, up = (2 * torch.randn(3, 3, columns)).to(dtype)
    outs = check_schedules(lambda **options: geglu_backward(grad_out, gate, up, **options))
    for which, out in enumerate(outs):
        assert_accurate(
            out, lambda *t, which=which: expected(which, *t), grad_out, gate, up, roundings=2
        )


def test_strides() -> None:
    grad_out, gate, up = torch.randn(3, 5, 72).bfloat16()
    right = geglu_backward(grad_out, gate, up)
    for layout in ("sliced", "unaligned"):
        moved = (with_strides(t, layout) for t in (grad_out, gate, up))
        for out, same in zip(geglu_backward(*moved), right, strict=True):
            assert torch.equal(out, same)
