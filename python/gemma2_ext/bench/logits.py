"""logits: the head over the whole vocabulary, soft-capped."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from .. import ops
from ._common import Setting, checker, forward_backward, peer
from ._harness import Case


def cases(setting: Setting) -> Iterator[Case]:
    """Decoding: bound by reading the embedding, which is larger than any cache."""
    config = setting.config
    if setting.phase != "decode":
        return
    softcap = config.final_logit_softcapping
    shape = config.vocab_size, config.hidden_size
    (weight,) = setting.weights(1, *shape, scale=config.hidden_size**-0.5)
    size = weight.nbytes

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = (hidden @ weight.T).float()
        return logits if softcap is None else softcap * (logits / softcap).tanh()

    for rows in (1, 4):
        inputs = [(setting.randn(rows, config.hidden_size, scale=30.0), weight) for _ in range(2)]
        yield Case(
            op="logits",
            shape=f"{rows} x {config.hidden_size} -> {config.vocab_size}",
            **setting.facts,
            ours=forward_backward(lambda h, w: ops.logits(h, w, softcap), inputs),
            peers={
                "torch eager": peer(plain, inputs),
                "torch.compile": peer(plain, inputs, compile=True),
            },
            check=checker(plain, inputs[0], setting.dtype),
            sets=2,
            reads=size,
            writes=rows * config.vocab_size * 4,
            operations=2 * rows * weight.numel(),
            arithmetic=setting.arithmetic,
        )
