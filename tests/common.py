"""The rule by which an op's error is judged, and inputs that exercise it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import gemma2_ext

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = gemma2_ext._C.supported_cpu_isas()

# rtol and atol that no result may exceed, whatever the reference's own error is.
TOLERANCE = {
    torch.float32: (1.3e-6, 1e-5),
    torch.float16: (1e-3, 1e-3),
    torch.bfloat16: (1.6e-2, 1e-3),
}


def assert_accurate(
    actual: Tensor,
    reference: Callable[..., Tensor],
    *tensors: Tensor,
    loosen: float = 1.0,
    roundings: int = 1,
) -> None:
    """Asserts that `actual` is as near the truth as `reference` run in its dtype.

    The truth is `reference(*tensors)` in float64, on inputs already rounded to the tested dtype.
    The largest error may be twice that of the reference run in the dtype, plus `roundings` of the
    largest value (more than one where few elements make the reference's own error a matter of
    luck); and every element is within TOLERANCE (times `loosen`, which needs its derivation where
    it is used).
    """
    exact = reference(*(t.double() if t.is_floating_point() else t for t in tensors))
    plain = reference(*tensors)
    assert actual.shape == plain.shape
    assert actual.dtype == plain.dtype
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all()
    error = (actual.double() - exact).abs().max().item()
    allowed = 2 * (plain.double() - exact).abs().max().item()
    allowed += roundings * torch.finfo(actual.dtype).eps * exact.abs().max().item()
    assert error <= allowed, f"error {error:.3e}, the reference's own allows {allowed:.3e}"
    rtol, atol = TOLERANCE[actual.dtype]
    torch.testing.assert_close(
        actual.double(), exact, rtol=rtol * loosen, atol=max(atol * loosen, allowed)
    )


def with_strides(t: Tensor, kind: str) -> Tensor:
    """The values of `t` in another layout: "contiguous", "sliced" (a part of wider rows),
    "strided" (a last dimension with stride 2), "unaligned" (one element past alignment)."""
    if kind == "contiguous" or t.dim() == 0:
        return t.contiguous()
    if kind == "sliced":
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 5), float("nan"), dtype=t.dtype)
        view = wide[..., 2 : 2 + t.shape[-1]]
    elif kind == "strided":
        view = torch.full((*t.shape, 2), float("nan"), dtype=t.dtype)[..., 0]
    elif kind == "unaligned":
        flat = torch.full((t.numel() + 1,), float("nan"), dtype=t.dtype)
        view = flat[1:].view(t.shape)
    else:
        raise ValueError(kind)
    return view.copy_(t)


LAYOUTS = ("contiguous", "sliced", "strided", "unaligned")
