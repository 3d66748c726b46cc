"""logits: the head over the whole vocabulary, soft-capped."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from .. import ops
from ..quantize import QuantizedWeight
from ._common import Setting, checker, peer
from ._harness import Case
from .linear import packed_checker, unpacked


def cases(setting: Setting) -> Iterator[Case]:
    """Decoding: bound by reading the embedding, which is larger than any cache."""
    config = setting.config
    if setting.phase != "decode":
        return
    softcap = config.final_logit_softcapping
    rows_and_columns = config.vocab_size, config.hidden_size
    scale = config.hidden_size**-0.5
    weight: Tensor | QuantizedWeight
    if setting.quantize:
        (weight,) = setting.packed_weights(setting.quantize, 1, *rows_and_columns, scale=scale)
    else:
        (weight,) = setting.weights(1, *rows_and_columns, scale=scale)

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = (hidden @ weight.T).float()
        return logits if softcap is None else softcap * (logits / softcap).tanh()

    for rows in (1, 4):
        hidden = [setting.randn(rows, config.hidden_size, scale=30.0) for _ in range(2)]
        if isinstance(weight, QuantizedWeight):
            packed = [(h, weight) for h in hidden]
            peers = {"torch eager": unpacked(setting, plain, packed)}
            check = packed_checker(plain, packed[0])
        else:
            inputs = [(h, weight) for h in hidden]
            peers = {
                "torch eager": peer(plain, inputs),
                "torch.compile": peer(plain, inputs, compile=True),
            }
            check = checker(plain, inputs[0], setting.dtype)

        def ours(i: int, hidden: list[Tensor] = hidden) -> Tensor:
            return ops.logits(hidden[i], weight, softcap)

        yield Case(
            op="logits",
            shape=f"{rows} x {config.hidden_size} -> {config.vocab_size}",
            **setting.facts,
            ours=ours,
            peers=peers,
            check=check,
            sets=2,
            reads=weight.nbytes,
            writes=rows * config.vocab_size * 4,
            operations=2 * rows * config.vocab_size * config.hidden_size,
            arithmetic=setting.arithmetic,
        )
