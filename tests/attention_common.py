"""What the tests of the three attention ops share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gemma2_ext import reference


def random_qkv(
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    q_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of standard normal elements, q times `q_scale`, rounded to `dtype`."""
    q = torch.randn(batch, seqlen_q, heads[0], head_dim) * q_scale
    k = torch.randn(batch, seqlen_k, heads[1], head_dim)
    v = torch.randn(batch, seqlen_k, heads[1], head_dim)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def int8_rows(lengths: list[int], capacity: int, heads: int, head_dim: int) -> tuple[Tensor, ...]:
    """A ring of int8 and its scales, each head's slots contiguous as KVCache has them; scales are
    powers of two, so that the products are exact in every dtype, and NaN in slots never written."""
    shape = (len(lengths), heads, capacity)
    data = torch.randint(-127, 128, (*shape, head_dim), dtype=torch.int8).transpose(1, 2)
    scales = torch.ldexp(torch.ones(shape), torch.randint(-9, -5, shape)).transpose(1, 2)
    for b, length in enumerate(lengths):
        scales[b, length:] = float("nan")
    return data, scales


def reference_of(**options: Any) -> Callable[..., Tensor]:
    """reference.attention with these options; the truth for `assert_accurate`."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = reference.attention(q, k, v, **options)
        assert isinstance(out, Tensor)
        return out

    return attend


def gradient_noise(q: Tensor, k: Tensor, v: Tensor, scale: float) -> float:
    """Rounding noise of attention's gradients, for gradients of the output of normal elements.

    A score's gradient is P (grad_out . v_j - grad_out . out), which all but cancels where a row
    sees few keys, or one: both are sums of head_dim products with a standard deviation of |v|, so
    up to five of that, with a few roundings of 2^-24 each. It is multiplied by the scale and by
    an element of k or q.
    """
    if 0 in (q.numel(), k.numel()):
        return 0.0
    largest = max(q.double().abs().max().item(), k.double().abs().max().item())
    return 4 * 2.0**-24 * 5 * v.double().norm(dim=-1).max().item() * abs(scale) * largest


def assert_lse_accurate(actual: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    """Against the reference in float64: -inf in the same places, elsewhere within 1e-5 or 2e-6
    relative, which is float32's rounding of a score made of 256 products."""
    exact = reference.attention(q.double(), k.double(), v.double(), return_lse=True, **options)[1]
    assert actual.dtype == torch.float32
    # On a GPU 16-bit scores are capped by a tanh with an absolute error of 3e-7, times 50.
    atol = 2.5e-5 if q.is_cuda and q.element_size() == 2 else 1e-5
    torch.testing.assert_close(actual.double(), exact, rtol=2e-6, atol=atol)
