from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from host_cuda.emulator import Refused, assert_needed, check_schedules, guarded, launch, places
from host_cuda.test_cuda_add_rms_norm import add_rms_norm
from host_cuda.test_cuda_add_rms_norm import tensors as norm_tensors
from host_cuda.test_cuda_linear import EARLY, linear


def add_rms_norm_linear(
    x: Tensor,
    residual: Tensor,
    post: Tensor,
    pre: Tensor,
    weight: Tensor,
    *,
    geglu: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    out_features = weight.shape[0] // (2 if geglu else 1)
    residual_out = guarded(x.shape, x.dtype)
    out = guarded((x.shape[0], out_features), x.dtype)
    norm = {
        "x": x,
        "x_stride": x.stride(0),
        "residual": residual,
        "residual_stride": residual.stride(0),
        "post_weight": post,
        "pre_weight": pre,
        "residual_out": residual_out,
        "rows": x.shape[0],
        "hidden_size": x.shape[1],
        "eps": 1e-6,
        "dtype": x.dtype,
        "weight_dtype": post.dtype,
    }
    product = {
        "weight": weight,
        "weight_stride": weight.stride(0),
        "out": out,
        "out_stride": out_features,
        "rows": x.shape[0],
        "in_features": x.shape[1],
        "out_features": out_features,
        "dtype": x.dtype,
        "out_dtype": out.dtype,
        "geglu": geglu,
    }
    launch("add_rms_norm_linear", norm=norm, linear=product, **(EARLY | options))
    return residual_out, out


def tensors(size: int, out: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return *norm_tensors(1, size, dtype), (torch.randn(out, size) * size**-0.5).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("geglu", [False, True])
@pytest.mark.parametrize(("size", "out"), [(8, 2), (264, 42), (2304, 96), (4608, 600), (6144, 40)])
def test_the_same_as_its_parts(dtype: torch.dtype, geglu: bool, size: int, out: int) -> None:
    given = tensors(size, out, dtype)
    run = lambda **options: add_rms_norm_linear(*given, geglu=geglu, **options)  # noqa: E731
    residual, product = check_schedules(run) if size < 1000 else run()
    right_residual, hidden = add_rms_norm(*given[:4])
    assert torch.equal(residual, right_residual)
    assert torch.equal(product, linear(hidden, given[4], geglu=geglu, **EARLY)[0])


def test_what_does_not_fit_is_refused() -> None:
    given = tensors(264, 40, torch.bfloat16)
    with pytest.raises(Refused, match="no kernel for these tensors"):
        add_rms_norm_linear(*given, early=False)
    with pytest.raises(Refused, match="no kernel for these tensors"):
        add_rms_norm_linear(*given, shared_bytes=99 * 1024)
    with pytest.raises(Refused, match="no kernel for these tensors"):
        add_rms_norm_linear(*tensors(6152, 8, torch.bfloat16))
    with pytest.raises(Refused, match="no kernel for these tensors"):
        add_rms_norm_linear(*norm_tensors(2, 264, torch.bfloat16), given[4])


def test_every_barrier_is_needed() -> None:
    given = tensors(4104, 600, torch.bfloat16)
    run = lambda **options: add_rms_norm_linear(*given, max_blocks=1, **options)  # noqa: E731
    assert len(places(run)) == 4
    for place in places(run):
        assert_needed(run, place)
