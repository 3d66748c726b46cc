"""What the public functions of all ops share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(op: str, name: str, value: object, *, float64: bool = False) -> None:
    """Raises TypeError unless `value` is a tensor of float32, bfloat16 or float16.

    `float64` is for the ops that also have kernels in float64, slow ones for checks of gradients.
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f"gemma2_ext::{op}: {name} must be a torch.Tensor, got {type(value).__name__}"
        )
    if value.dtype not in FLOATS and not (float64 and value.dtype == torch.float64):
        raise TypeError(
            f"gemma2_ext::{op}: {name} must be float32, bfloat16 or float16, got {value.dtype}"
        )


def check_integers(op: str, name: str, value: object, *, required: bool = False) -> None:
    """Raises TypeError unless `value` is a tensor of int32 or int64, or None where not required."""
    if value is None and not required:
        return
    if not isinstance(value, Tensor):
        raise TypeError(
            f"gemma2_ext::{op}: {name} must be a torch.Tensor, got {type(value).__name__}"
        )
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"gemma2_ext::{op}: {name} must be int32 or int64, got {value.dtype}")


def through_dispatcher(*tensors: Tensor) -> bool:
    """Whether a call has to go through the functional op: being traced, or asked for a gradient.

    Otherwise the public function allocates the output and calls the `_out` op, which is cheaper
    and leaves an out-of-memory error to torch.
    """
    return torch.compiler.is_compiling() or needs_gradient(*tensors)


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd records a call with these tensors."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def promote(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, tensors of several dtypes in the widest of them, as torch's own ops do it.

    Otherwise the tensors as they are: an op computes in the dtype that it is given.
    """
    dtype = tensors[0].dtype
    if all(t.dtype == dtype for t in tensors) or not _autocast(tensors[0]):
        return tensors
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return tuple(t.to(dtype) for t in tensors)


def narrow(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, float32 tensors in autocast's dtype: the rule for matrix products."""
    if all(t.dtype != torch.float32 for t in tensors) or not _autocast(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t.to(dtype) if t.dtype == torch.float32 else t for t in tensors)


def _autocast(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)


# Kept for the life of the process, as its registrations are.
_library = torch.library.Library("gemma2_ext", "FRAGMENT")


def register_backward(
    op: str,
    allocate: Callable[..., tuple[Tensor, ...]],
    setup_context: Callable[..., None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> None:
    """Makes `op` differentiable, and `<op>_backward` an op of the same two forms.

    Args:
        op: whose schema, `<op>_backward` and `<op>_backward_out` are declared.
        allocate: from `<op>_backward`'s arguments to new tensors for its results. As that happens
            in Python, running out of memory is torch's own error.
        setup_context, backward: as of torch.library.register_autograd; they call
            `<op>_backward`, never its `_out` form, so that a compiler can trace it.
    """
    out_op = getattr(torch.ops.gemma2_ext, f"{op}_backward_out").default

    def call(*args: Any) -> tuple[Tensor, ...]:
        grads = allocate(*args)
        out_op(*args, *grads)
        return grads

    _library.impl(f"{op}_backward", call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gemma2_ext::{op}_backward", allocate)
    torch.library.register_fake(f"gemma2_ext::{op}_backward_out", lambda *args: None)
    torch.library.register_autograd(f"gemma2_ext::{op}", backward, setup_context=setup_context)

    def second(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(f"gemma2_ext::{op} has no second derivative")

    torch.library.register_autograd(f"gemma2_ext::{op}_backward", second)


def refuse_backward(op: str) -> None:
    """Registers a backward that raises, so that a gradient is never silently missing."""

    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(
            f"gemma2_ext::{op} has no backward yet; run it under torch.no_grad()"
        )

    torch.library.register_autograd(f"gemma2_ext::{op}", backward)


def refuse_gradient(op: str) -> None:
    """As refuse_backward, for an op that writes into its arguments: the call itself raises.

    torch.library.register_autograd takes no such op.
    """
    overload = getattr(torch.ops.gemma2_ext, op).default

    def autograd(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            raise NotImplementedError(
                f"gemma2_ext::{op} has no backward; run it under torch.no_grad()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    _library.impl(op, autograd, "Autograd", with_keyset=True)
