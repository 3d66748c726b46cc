from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import gemma2_ext  # noqa: F401  its ops
from host_cuda.emulator import SCHEDULES, assert_needed, launch, places

# With clusters of blocks and without.
DEVICES = pytest.mark.parametrize("compute_capability", [80, 90])


def argmax(x: Tensor, **options: Any) -> tuple[Tensor]:
    out = torch.full((len(x),), -1)
    launch(
        "argmax",
        x=x,
        x_stride=x.stride(0),
        rows=x.shape[0],
        columns=x.shape[1],
        out=out,
        **options,
    )
    return (out,)


@DEVICES
@pytest.mark.parametrize("columns", [1, 3, 31, 1023, 4096, 4097, 40000])
def test_as_torch(compute_capability: int, columns: int) -> None:
    x = torch.randn(2, columns)
    for given in (x, x.round(), torch.full_like(x, 2.0), -x.round().abs()):
        for schedule in SCHEDULES:
            options = {"compute_capability": compute_capability, "schedule": schedule}
            assert torch.equal(argmax(given, **options)[0], given.argmax(-1))


@DEVICES
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number(compute_capability: int, special: float) -> None:
    for place in (0, 7, 1024, 4095, 4096, 4999):
        x = torch.randn(2, 5000)
        x[1, place:] = special
        x[0, place] = special
        (out,) = argmax(x, compute_capability=compute_capability)
        assert torch.equal(out, x.argmax(-1)), place


def test_zeros_of_both_signs_are_equal() -> None:
    x = torch.full((1, 50), -1.0)
    x[0, 20], x[0, 30] = -0.0, 0.0
    assert argmax(x)[0].item() == 20


def test_rows_off_vectors() -> None:
    x = torch.randn(3, 5001)
    assert torch.equal(argmax(x)[0], x.argmax(-1))
    assert torch.equal(argmax(x[:, 3:])[0], x[:, 3:].argmax(-1))


@DEVICES
def test_every_barrier_is_needed(compute_capability: int) -> None:
    x = torch.zeros(1, 40000)
    for i in range(9, 40000, 997):  # so that the largest is not the first to come
        x[0, i] = i
    run = lambda **options: argmax(x, compute_capability=compute_capability, **options)  # noqa: E731
    assert len(places(run)) == (3 if compute_capability == 90 else 1)
    for place in places(run):
        assert_needed(run, place)
