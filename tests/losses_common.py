"""Comparison of a loss and its gradients with the reference, by the rule of assert_accurate."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common import assert_accurate

Loss = Callable[..., Tensor]


def value_and_gradients(loss: Loss, *tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """The loss and its gradients of the first two tensors. What comes into the backward differs
    from token to token where the loss does."""
    hidden, weight = (t.detach().clone().requires_grad_() for t in tensors[:2])
    value = loss(hidden, weight, *tensors[2:], **options)
    grad = 1 + torch.arange(value.numel()).view(value.shape) % 3
    gradients = torch.autograd.grad(value, (hidden, weight), grad.to(value.dtype))
    return value.detach(), *gradients


def assert_loss(
    loss: Loss, reference: Loss, *tensors: Tensor, roundings: int = 4, **options: Any
) -> None:
    """Asserts that value and gradients are as accurate as assert_accurate demands.

    Four roundings: the largest element of a gradient is a probability's, which carries those of
    the logit, of the denominator's logarithm and of the exponential. A loss is a difference of
    logits, a gradient one of probabilities times rows of the other factor: where they cancel, as
    with few words, what is left carries four roundings of the terms.
    """
    hidden, weight = (t.detach().float() for t in tensors[:2])
    terms = ((hidden @ weight.T).abs(), weight.abs(), hidden.abs())
    noise = [4 * 2.0**-23 * (float(t.max()) if t.numel() else 0.0) for t in terms]
    actual = value_and_gradients(loss, *tensors, **options)
    wide = [t.double() if t.is_floating_point() else t for t in tensors]
    exact = value_and_gradients(reference, *wide, **options)
    plain = value_and_gradients(reference, *tensors, **options)
    for i in range(3):
        assert_accurate(
            actual[i],
            lambda t, i=i: (exact if t.dtype == torch.float64 else plain)[i],
            tensors[0],
            roundings=roundings,
            noise=noise[i],
        )


def assert_same_for_any_threads(loss: Loss, *tensors: Tensor, **options: Any) -> None:
    """Asserts that value and gradients are equal to the bit from run to run and for 1 to 3
    threads."""
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        results.append(value_and_gradients(loss, *tensors, **options))
    torch.set_num_threads(before)
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            assert torch.equal(one, other)


def peak_growth(code: str) -> float:
    """MB by which a process's memory grows at most while `code` calls run().

    `code` sets everything up and defines run(); run() is called once before, on fewer tokens, so
    that neither imports nor threads count.
    """
    script = f"""
import ctypes, torch
from pathlib import Path
from gemma2_ext import ops
{code}
def status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
run(16)
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
before = status("VmRSS")
run(None)
print(status("VmHWM") - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return float(result.stdout)
