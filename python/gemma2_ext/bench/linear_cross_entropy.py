"""linear_cross_entropy over the whole vocabulary, forward and backward: eager, torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import ops, reference
from ._common import Setting, checker, forward_backward, needs, needs_cuda, peer
from ._harness import Call, Case

TOKENS = {"cpu": 256, "cuda": 8192}


def cases(setting: Setting) -> Iterator[Case]:
    """Loss and gradients; bound by three products of tokens, vocabulary and hidden size."""
    if setting.phase != "training":
        return
    config, tokens = setting.config, TOKENS[setting.device]
    softcap = config.final_logit_softcapping
    weight = setting.randn(config.vocab_size, config.hidden_size, scale=config.hidden_size**-0.5)
    target = torch.randint(config.vocab_size, (tokens,), device=setting.device)
    inputs: list[tuple[Any, ...]] = [
        (setting.randn(tokens, config.hidden_size, scale=20.0), weight, target)
    ]

    def ours(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return ops.linear_cross_entropy(hidden, weight, target, softcap=softcap)

    def plain(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return reference.linear_cross_entropy(hidden, weight, target, softcap=softcap)

    def cut() -> Call:
        needs_cuda(setting, "cut-cross-entropy")
        function = needs("cut_cross_entropy").linear_cross_entropy
        return forward_backward(lambda h, w, t: function(h, w, t, softcap=softcap), inputs)

    def liger() -> Call:
        needs_cuda(setting, "Liger")
        module = needs("liger_kernel.transformers")
        loss = module.LigerFusedLinearCrossEntropyLoss(softcap=softcap)
        return forward_backward(lambda h, w, t: loss(w, h, t), inputs)

    yield Case(
        op="linear_cross_entropy",
        shape=f"{tokens} x {config.hidden_size} -> {config.vocab_size}",
        **setting.facts,
        ours=forward_backward(ours, inputs),
        peers={
            "torch eager": peer(plain, inputs),
            "torch.compile": peer(plain, inputs, compile=True),
            "cut-cross-entropy": cut,
            "Liger": liger,
        },
        check=checker(plain, inputs[0], setting.dtype),
        sets=1,
        reads=weight.nbytes,
        writes=weight.nbytes,
        operations=3 * 2 * tokens * weight.numel(),
        arithmetic=setting.arithmetic,
    )
