"""What the public functions of all ops share."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(op: str, name: str, value: object, *, float64: bool = False) -> None:
    """Raises TypeError unless `value` is a tensor of float32, bfloat16 or float16, or float64
    where that is allowed."""
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
    """Whether a call has to go through the functional op: traced, cast, or asked for a gradient.

    Otherwise the public function allocates the output and calls the `_out` op, which is cheaper
    and leaves an out-of-memory error to torch.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(tensors[0].device.type):
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def refuse_backward(op: str) -> None:
    """Registers a backward that raises, so that a gradient is never silently missing."""

    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(
            f"gemma2_ext::{op} has no backward yet; run it under torch.no_grad()"
        )

    torch.library.register_autograd(f"gemma2_ext::{op}", backward)


# Kept for the life of the process, as its registrations are.
_library = torch.library.Library("gemma2_ext", "FRAGMENT")


def cast_under_autocast(op: str, *positions: int) -> None:
    """Registers that autocast casts the arguments at `positions` to its dtype, as it does those of
    torch's own products; float64 stays."""
    overload = getattr(torch.ops.gemma2_ext, op).default

    def register(device: str, key: str) -> None:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def autocast(*args: Any, **kwargs: Any) -> Any:
            dtype = torch.get_autocast_dtype(device)
            cast = tuple(
                a.to(dtype) if i in positions and a.dtype in FLOATS else a
                for i, a in enumerate(args)
            )
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return overload(*cast, **kwargs)

        _library.impl(op, autocast, key)

    register("cpu", "AutocastCPU")
    register("cuda", "AutocastCUDA")


def refuse_gradient(op: str, message: str | None = None) -> None:
    """As refuse_backward, for an op that writes into its arguments: the call itself raises.

    torch.library.register_autograd takes no such op. The message says what is missing.
    """
    overload = getattr(torch.ops.gemma2_ext, op).default

    def autograd(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            raise NotImplementedError(
                message or f"gemma2_ext::{op} has no backward; run it under torch.no_grad()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    _library.impl(op, autograd, "Autograd", with_keyset=True)
