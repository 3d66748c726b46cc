"""How far a product of random matrices, summed in float32, may be from the exact one."""

from __future__ import annotations

import torch
from torch import Tensor


def product_bound(x: Tensor, weight: Tensor) -> Tensor:
    """Bound of the error of `x @ weight.T` for inputs of mean 0, element by element, before the
    result is rounded to its dtype.

    With u = 2^-24 and S = sum of (x w)^2, a sum of n terms passes through partial sums of variance
    S k / n, each rounded with a variance of (u s)^2 / 3: a standard deviation of at most
    0.41 u sqrt(n S) after n roundings, whatever the order. Ten of those, for the largest of many
    and for partial sums that wander, and a rounding of each product.
    """
    x, weight = x.double(), weight.double()
    squares = x.square() @ weight.square().T
    return 2.0**-24 * (4 * (x.shape[-1] * squares).sqrt() + 2 * squares.sqrt())


def assert_product(actual: Tensor, x: Tensor, weight: Tensor, softcap: float | None = None) -> None:
    """Asserts that `actual` is `x @ weight.T`, soft-capped, within product_bound and a rounding
    to its dtype. A soft-cap's slope is at most 1, and tanh errs by up to 4 ulp."""
    exact = x.double() @ weight.double().T
    bound = product_bound(x, weight)
    if softcap is not None:
        exact = softcap * torch.tanh(exact / softcap)
        bound += 4 * 2.0**-23 * exact.abs()
    eps = torch.finfo(actual.dtype).eps
    bound += (eps / 2 + 2.0**-22) * exact.abs() + torch.finfo(actual.dtype).smallest_normal
    error = (actual.double() - exact).abs()
    assert actual.shape == exact.shape
    assert (error <= bound).all(), f"{(error / bound).max().item():.2f} of the bound"
