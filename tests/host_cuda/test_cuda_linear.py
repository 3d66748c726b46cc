from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from common import assert_accurate, with_strides
from gemma2_ext import reference
from host_cuda.emulator import assert_needed, check_schedules, guarded, launch, places

DTYPES = (torch.bfloat16, torch.float16)


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    softcap: float = 0.0,
    geglu: bool = False,
    out_dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[Tensor]:
    out_features = weight.shape[0] // (2 if geglu else 1)
    out = guarded((x.shape[0], out_features), out_dtype or x.dtype)
    launch(
        "linear",
        x=x,
        x_stride=x.stride(0),
        weight=weight,
        weight_stride=weight.stride(0),
        out=out,
        out_stride=out.stride(0),
        rows=x.shape[0],
        in_features=x.shape[1],
        out_features=out_features,
        softcap=softcap,
        dtype=x.dtype,
        out_dtype=out.dtype,
        geglu=geglu,
        **options,
    )
    return (out,)


def tensors(
    rows: int, in_features: int, out_features: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    weight = torch.randn(out_features, in_features) * in_features**-0.5
    return torch.randn(rows, in_features).to(dtype), weight.to(dtype)


def exact(x: Tensor, weight: Tensor) -> Tensor:
    return reference.linear(x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16])
def test_rows(dtype: torch.dtype, rows: int) -> None:
    x, weight = tensors(rows, 264, 41, dtype)
    (out,) = check_schedules(lambda **options: linear(x, weight, **options))
    assert_accurate(out, exact, x, weight)


@pytest.mark.parametrize(
    ("in_features", "out_features"), [(1, 1), (7, 15), (31, 17), (41, 33), (1032, 16), (2304, 48)]
)
def test_any_size(in_features: int, out_features: int) -> None:
    x, weight = tensors(3, in_features, out_features, torch.bfloat16)
    assert_accurate(linear(x, weight)[0], exact, x, weight)


def test_a_row_does_not_depend_on_the_others() -> None:
    x, weight = tensors(16, 328, 40, torch.bfloat16)
    (out,) = linear(x, weight)
    for rows in (1, 8, 9):
        assert torch.equal(linear(x[:rows], weight)[0], out[:rows])


EARLY = {"early": True, "shared_bytes": 227 * 1024}


@pytest.mark.parametrize("rows", [1, 8, 9])
@pytest.mark.parametrize(
    ("in_features", "out_features"), [(8, 1), (264, 41), (1032, 600), (4104, 48), (2300, 48)]
)
def test_an_early_start_gives_the_same(rows: int, in_features: int, out_features: int) -> None:
    """On Hopper: its ring goes on through several tiles a block, and round several times."""
    x, weight = tensors(rows, in_features, out_features, torch.bfloat16)
    (expected,) = linear(x, weight)
    (out,) = check_schedules(lambda **options: linear(x, weight, **EARLY, **options))
    assert torch.equal(out, expected)
    if out_features % 2 == 0:
        (expected,) = linear(x, weight, geglu=True)
        assert torch.equal(linear(x, weight, geglu=True, **EARLY)[0], expected)


@pytest.mark.parametrize("layout", ["sliced", "unaligned"])
def test_strides(layout: str) -> None:
    x, weight = tensors(5, 72, 24, torch.bfloat16)
    (expected,) = linear(x, weight)
    assert torch.equal(linear(with_strides(x, layout), weight)[0], expected)
    assert torch.equal(linear(x, with_strides(weight, layout))[0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_capped_logits(dtype: torch.dtype) -> None:
    x, weight = tensors(2, 72, 33, dtype)
    x = x * 20
    (out,) = linear(x, weight, softcap=30.0, out_dtype=torch.float32)
    product = x.double() @ weight.double().T
    assert product.abs().max() > 30
    error = (out.double() - 30 * torch.tanh(product / 30)).abs().max().item()
    assert error < 2e-5


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("out_features", [1, 8, 41])
def test_geglu(rows: int, out_features: int) -> None:
    x, weight = tensors(rows, 104, 2 * out_features, torch.bfloat16)
    (out,) = check_schedules(lambda **options: linear(x, weight, geglu=True, **options))

    def geglu(x: Tensor, weight: Tensor) -> Tensor:
        gate, up = reference.linear(x, weight).chunk(2, dim=-1)
        return reference.geglu(gate, up)

    assert_accurate(out, geglu, x, weight)


def test_soft_cap_alone() -> None:
    x = torch.randn(1037) * 50
    out = guarded(x.shape, x.dtype)
    out.copy_(x)
    launch("soft_cap", x=out, size=x.numel(), softcap=30.0)
    torch.testing.assert_close(out, 30 * torch.tanh(x / 30))


def test_every_barrier_is_needed() -> None:
    x, weight = tensors(9, 2048, 48, torch.bfloat16)
    run = lambda **options: linear(x, weight, max_blocks=1, **options)  # noqa: E731
    assert len(places(run)) == 2
    for place in places(run):
        assert_needed(run, place)


def test_every_barrier_of_an_early_start_is_needed() -> None:
    x, weight = tensors(3, 2048, 700, torch.bfloat16)
    run = lambda **options: linear(x, weight, max_blocks=1, **EARLY, **options)  # noqa: E731
    assert len(places(run)) == 2
    for place in places(run):
        assert_needed(run, place)
