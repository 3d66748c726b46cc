"""What the losses over a linear layer share: fakes, autograd."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._common import _library, refuse_gradient

# As csrc/torch/linear_loss.cpp has it.
_KEPT_FLOATS = (128 << 20) // 4
_WORDS, _TOKENS = 96, 16


def _dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def result_like(hidden: Tensor, reduction: str) -> Tensor:
    """An empty result: hidden's leading shape for "none", else a scalar."""
    shape = hidden.shape[:-1] if reduction == "none" else ()
    return hidden.new_empty(shape, dtype=_dtype(hidden))


def check_mask(op: str, mask: object) -> None:
    """Raises TypeError unless `mask` is a tensor of bool or integers, or None."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"gemma2_ext::{op}: mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype not in (torch.bool, torch.uint8, torch.int32, torch.int64):
        raise TypeError(
            f"gemma2_ext::{op}: mask must be bool, uint8, int32 or int64, got {mask.dtype}"
        )


def _kept_like(hidden: Tensor, weight: Tensor, sides: int) -> Tensor:
    """Empty room for the logits that a forward keeps; on CUDA it keeps none."""
    tokens = math.prod(hidden.shape[:-1])
    stride = (tokens + _TOKENS - 1) // _TOKENS * _TOKENS
    words = _KEPT_FLOATS // max(1, sides * stride)
    words = weight.shape[0] if words >= weight.shape[0] else words // _WORDS * _WORDS
    keeps = hidden.device.type == "cpu" and hidden.dtype != torch.float64
    size = sides * words * stride if keeps else 0
    return hidden.new_empty((size,), dtype=torch.float32)


def register_loss(op: str, tensors: tuple[str, ...], options: tuple[str, ...]) -> None:
    """Registers fakes and autograd of a loss whose schema is `tensors`, then `options`.

    The op itself gives the loss alone. Where a gradient is asked for it runs as `{op}_forward`,
    which also gives what `{op}_backward_out` needs: sums of each token, and some logits.
    """
    namespace = torch.ops.gemma2_ext
    overload = getattr(namespace, op).default
    forward_op = getattr(namespace, f"{op}_forward").default
    backward_op = getattr(namespace, f"{op}_backward_out").default
    count = len(tensors)
    reduction = options.index("reduction")
    defaults = {
        a.name: a.default_value for a in overload._schema.arguments if a.has_default_value()
    }
    sides = 2 if "teacher_hidden" in tensors else 1

    @torch.library.register_fake(f"gemma2_ext::{op}")
    def _(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return result_like(hidden, kwargs.get("reduction", defaults["reduction"]))

    @torch.library.register_fake(f"gemma2_ext::{op}_out")
    def _(*args: Any, **kwargs: Any) -> None:
        return None

    @torch.library.register_fake(f"gemma2_ext::{op}_forward")
    def _(hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return (
            result_like(hidden, args[count - 2 + reduction]),
            hidden.new_empty((3, math.prod(hidden.shape[:-1])), dtype=_dtype(hidden)),
            _kept_like(hidden, weight, sides),
        )

    @torch.library.register_fake(f"gemma2_ext::{op}_backward_out")
    def _(*args: Any) -> None:
        return None

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, stats, kept = output
        ctx.mark_non_differentiable(stats, kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:count], stats, kept)
        ctx.options = inputs[count:]

    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (count + len(options) - 2)
        if grad is None:
            return None, None, *nothing
        saved = ctx.saved_tensors  # under checkpointing they can be asked for once
        hidden, weight = saved[:2]
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = hidden.new_empty(hidden.shape) if need_hidden else None
        grad_weight = weight.new_empty(weight.shape) if need_weight else None
        backward_op(grad, *saved, *ctx.options, grad_hidden, grad_weight)
        return grad_hidden, grad_weight, *nothing

    torch.library.register_autograd(
        f"gemma2_ext::{op}_forward", backward, setup_context=setup_context
    )

    refuse_gradient(f"{op}_backward_out", f"gemma2_ext::{op} has no second derivative")

    def autograd(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Tensor:
        if torch.is_grad_enabled() and any(
            isinstance(a, Tensor) and a.requires_grad for a in args[:2]
        ):
            given = dict(zip(tensors, args, strict=False)) | kwargs
            return forward_op(*(given.get(n, defaults.get(n)) for n in tensors + options))[0]
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    _library.impl(op, autograd, "Autograd", with_keyset=True)
