"""What the ops over packed weights share."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..quantize import BLOCK_ROWS, Format, dequantize
from ._common import check_tensor, through_dispatcher

# Rows of weight that are float32 at a time in a backward.
BACKWARD_ROWS = 256 * BLOCK_ROWS


def check_packed(op: str, name: str, value: object) -> None:
    """Raises TypeError unless value is a tensor; its dtype and shape are checked by the op."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"gemma2_ext::{op}: {name} must be a torch.Tensor, got {type(value).__name__}"
        )


class Packed(NamedTuple):
    """An op over packed weights and its `_out` form.

    name: of the op; x: what the op calls its input.
    """

    name: str
    x: str
    op: Any
    out_op: Any

    @classmethod
    def named(cls, name: str, x: str) -> Packed:
        """The op of this name."""
        ops = torch.ops.gemma2_ext
        return cls(name, x, getattr(ops, name).default, getattr(ops, f"{name}_out").default)

    def __call__(
        self,
        x: Tensor,
        data: Tensor,
        scales: Tensor,
        *more: Any,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Calls the op, or allocates its output (of x's dtype by default) and calls `_out`."""
        check_tensor(self.name, self.x, x)
        check_packed(self.name, "data", data)
        check_packed(self.name, "scales", scales)
        if through_dispatcher(x) or x.dim() < 1 or data.dim() != 2:
            return cast("Tensor", self.op(x, data, scales, *more))
        out = x.new_empty((*x.shape[:-1], data.shape[0]), dtype=dtype)
        self.out_op(x, data, scales, *more, out)
        return out


def register(format: Format) -> None:
    """Registers fakes of the format's linear and embedding, and linear's gradient to x."""

    @torch.library.register_fake(f"gemma2_ext::linear_{format}")
    def _(x: Tensor, data: Tensor, scales: Tensor) -> Tensor:
        return x.new_empty((*x.shape[:-1], data.shape[0]))

    @torch.library.register_fake(f"gemma2_ext::linear_{format}_out")
    def _(x: Tensor, data: Tensor, scales: Tensor, out: Tensor) -> None:
        return None

    @torch.library.register_fake(f"gemma2_ext::embedding_{format}_out")
    def _(ids: Tensor, data: Tensor, scales: Tensor, scale: float, out: Tensor) -> None:
        return None

    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, data, scales = inputs
        ctx.save_for_backward(data, scales)
        ctx.in_features = x.shape[-1]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        data, scales = ctx.saved_tensors
        return grad_x(format, grad, data, scales, ctx.in_features), None, None

    torch.library.register_autograd(
        f"gemma2_ext::linear_{format}", backward, setup_context=setup_context
    )


def soft_cap_gradient(grad: Tensor, capped: Tensor, softcap: float) -> Tensor:
    """grad times d cap tanh(y / cap) / dy = 1 - tanh^2, from the capped value alone."""
    return grad * (1 - (capped / softcap) ** 2)


def grad_x(format: Format, grad: Tensor, data: Tensor, scales: Tensor, in_features: int) -> Tensor:
    """grad @ weight, with a part of the weight unpacked at a time."""
    total = grad.new_zeros((*grad.shape[:-1], in_features), dtype=torch.float32)
    for first in range(0, data.shape[0], BACKWARD_ROWS):
        rows = slice(first, first + BACKWARD_ROWS)
        weight = dequantize(format, data[rows], scales[rows], in_features)
        total = total + grad[..., rows].float() @ weight
    return total.to(grad.dtype)


def register_logits(format: Format) -> None:
    """Registers fakes of the format's logits, and their gradient to hidden."""

    @torch.library.register_fake(f"gemma2_ext::logits_{format}")
    def _(hidden: Tensor, data: Tensor, scales: Tensor, softcap: float | None = None) -> Tensor:
        return hidden.new_empty((*hidden.shape[:-1], data.shape[0]), dtype=torch.float32)

    @torch.library.register_fake(f"gemma2_ext::logits_{format}_out")
    def _(hidden: Tensor, data: Tensor, scales: Tensor, softcap: float | None, out: Tensor) -> None:
        return None

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        hidden, data, scales, ctx.softcap = inputs
        ctx.in_features, ctx.dtype = hidden.shape[-1], hidden.dtype
        ctx.save_for_backward(data, scales, *([] if ctx.softcap is None else [output]))

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        data, scales, *out = ctx.saved_tensors
        if out:
            grad = soft_cap_gradient(grad, out[0], ctx.softcap)
        return grad_x(format, grad, data, scales, ctx.in_features).to(ctx.dtype), None, None, None

    torch.library.register_autograd(
        f"gemma2_ext::logits_{format}", backward, setup_context=setup_context
    )
