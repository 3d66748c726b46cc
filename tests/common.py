"""The rule by which an op's error is judged, and inputs that exercise it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
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
    noise: float = 0.0,
) -> None:
    """Asserts that `actual` is as near the truth as `reference` run in its dtype.

    The truth is `reference(*tensors)` in float64, on inputs already rounded to the tested dtype.
    The largest error may be twice that of the reference run in the dtype, plus `roundings` of the
    largest value (more than one where few elements make the reference's own error a matter of
    luck); and every element is within TOLERANCE (times `loosen`, which needs its derivation where
    it is used). `noise` is added to what is allowed, for a result that is a difference of larger
    terms; it needs its derivation too.
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
    allowed += noise + roundings * torch.finfo(actual.dtype).eps * exact.abs().max().item()
    assert error <= allowed, f"error {error:.3e}, the reference's own allows {allowed:.3e}"
    rtol, atol = TOLERANCE[actual.dtype]
    torch.testing.assert_close(
        actual.double(), exact, rtol=rtol * loosen, atol=max(atol * loosen, allowed)
    )


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal to the bit; on a GPU, where cuBLAS chooses its order of summing by shapes and strides,
    within what an order of summing is worth."""
    if actual.is_cuda:
        torch.testing.assert_close(actual, expected)
    else:
        assert torch.equal(actual, expected)


def gradients(f: Callable[..., Any], inputs: Sequence[Tensor], *grad_outs: Tensor) -> list[Tensor]:
    """Gradients of f's outputs, weighed by `grad_outs`, to its floating inputs."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    outs = f(*leaves)
    outs = (outs,) if isinstance(outs, Tensor) else outs
    return list(torch.autograd.grad(outs, [t for t in leaves if t.requires_grad], grad_outs))


def assert_gradients_accurate(
    op: Callable[..., Any], reference: Callable[..., Any], *inputs: Tensor, **how: Any
) -> None:
    """assert_accurate of every gradient, for random gradients of the outputs."""
    with torch.no_grad():
        outs = op(*inputs)
    outs = (outs,) if isinstance(outs, Tensor) else outs
    grad_outs = [torch.randn(out.shape).to(out.dtype) for out in outs]
    n = len(inputs)
    for i, actual in enumerate(gradients(op, inputs, *grad_outs)):
        truth = functools.partial(lambda i, *t: gradients(reference, t[:n], *t[n:])[i], i)
        assert_accurate(actual, truth, *inputs, *grad_outs, **how)


def assert_same_gradients_compiled(op: Callable[..., Any], *inputs: Tensor) -> None:
    """A function with `op` in it: compiled, and checkpointed, as eager, to the bit."""

    def f(*tensors: Tensor) -> Any:
        outs = op(*tensors)
        return outs if isinstance(outs, Tensor) else torch.cat([out.flatten() for out in outs])

    def checkpointed(*tensors: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(f, *tensors, use_reentrant=False)

    grad_out = torch.randn_like(f(*inputs))
    expected = gradients(f, inputs, grad_out)
    torch._dynamo.reset()
    for other in (torch.compile(f, fullgraph=True, backend="aot_eager"), checkpointed):
        for actual, wanted in zip(gradients(other, inputs, grad_out), expected, strict=True):
            assert torch.equal(actual, wanted)


def assert_no_second_derivative(op: Callable[..., Any], *inputs: Tensor) -> None:
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    outs = op(*leaves)
    outs = (outs,) if isinstance(outs, Tensor) else outs
    (grad,) = torch.autograd.grad(
        sum(out.square().sum() for out in outs), leaves[0], create_graph=True
    )
    with pytest.raises(NotImplementedError, match=f"{op.__name__} has no second derivative"):
        grad.sum().backward()


def assert_independent_of_threads(f: Callable[[], Sequence[Tensor]]) -> None:
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(f())
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def with_strides(t: Tensor, kind: str) -> Tensor:
    """The values of `t` in another layout: "contiguous", "sliced" (a part of wider rows),
    "strided" (a last dimension with stride 2), "unaligned" (one element past alignment)."""
    if kind == "contiguous" or t.dim() == 0:
        return t.contiguous()
    unused = float("nan") if t.is_floating_point() else 77
    if kind == "sliced":
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 5), unused, dtype=t.dtype)
        view = wide[..., 2 : 2 + t.shape[-1]]
    elif kind == "strided":
        view = torch.full((*t.shape, 2), unused, dtype=t.dtype)[..., 0]
    elif kind == "unaligned":
        flat = torch.full((t.numel() + 1,), unused, dtype=t.dtype)
        view = flat[1:].view(t.shape)
    else:
        raise ValueError(kind)
    return view.copy_(t)


LAYOUTS = ("contiguous", "sliced", "strided", "unaligned")


def by_both_ways(isa: str, call: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """As memory suits a Zen 4, and as it suits others."""
    level, zen4 = gemma2_ext._C.cpu_isa(), gemma2_ext._C.is_zen4()
    try:
        gemma2_ext._C.set_cpu_isa(isa)
        gemma2_ext._C.set_zen4(True)
        on_zen4 = call()
        gemma2_ext._C.set_zen4(False)
        return on_zen4, call()
    finally:
        gemma2_ext._C.set_cpu_isa(level)
        gemma2_ext._C.set_zen4(zen4)
