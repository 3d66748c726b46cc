"""linear_distillation over the whole vocabulary, forward and backward: eager, torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .. import ops, reference
from ..config import Gemma2Config
from ._common import Setting, checker, forward_backward, peer
from ._harness import Case

TOKENS = {"cpu": 256, "cuda": 8192}
TEACHER = {"2b": "9b", "9b": "27b", "27b": "27b"}


def cases(setting: Setting) -> Iterator[Case]:
    """Loss and gradients of a student under the next larger teacher; bound by four products."""
    if setting.phase != "training":
        return
    config, tokens = setting.config, TOKENS[setting.device]
    teacher: Gemma2Config = getattr(Gemma2Config, f"gemma2_{TEACHER[setting.size]}")()
    caps: dict[str, Any] = {
        "softcap": config.final_logit_softcapping,
        "teacher_softcap": teacher.final_logit_softcapping,
    }
    sizes = config.hidden_size, teacher.hidden_size
    weight, teacher_weight = (
        setting.randn(config.vocab_size, size, scale=size**-0.5) for size in sizes
    )
    inputs: list[tuple[Any, ...]] = [
        (
            setting.randn(tokens, sizes[0], scale=20.0),
            weight,
            setting.randn(tokens, sizes[1], scale=20.0).detach(),
            teacher_weight.detach(),
        )
    ]

    def ours(*arguments: Tensor) -> Tensor:
        return ops.linear_distillation(*arguments, **caps)

    def plain(*arguments: Tensor) -> Tensor:
        return reference.linear_distillation(*arguments, **caps)

    yield Case(
        op="linear_distillation",
        shape=f"{tokens} x {sizes[0]} and {sizes[1]} -> {config.vocab_size}",
        **setting.facts,
        ours=forward_backward(ours, inputs),
        peers={
            "torch eager": peer(plain, inputs),
            "torch.compile": peer(plain, inputs, compile=True),
        },
        check=checker(plain, inputs[0], setting.dtype),
        sets=1,
        reads=weight.nbytes + teacher_weight.nbytes,
        writes=weight.nbytes,
        operations=2 * tokens * (3 * weight.numel() + teacher_weight.numel()),
        arithmetic=setting.arithmetic,
    )
