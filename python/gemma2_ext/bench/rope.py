"""rope of q and k: eager and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .. import ops, reference
from . import _common
from ._common import Setting, checker, forward_backward, number_of_sets, peer
from ._harness import Case


def cases(setting: Setting) -> Iterator[Case]:
    """q and k of one sequence; memory is the limit."""
    config = setting.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    for rows in _common.ROWS[setting.phase]:
        passes = 2 if setting.phase == "training" else 1
        size = rows * (heads + kv_heads) * config.head_dim * setting.dtype.itemsize
        sets = number_of_sets(2 * size)

        def make(rows: int = rows) -> tuple:
            q = setting.randn(1, rows, heads, config.head_dim)
            k = setting.randn(1, rows, kv_heads, config.head_dim)
            return q, k, torch.arange(rows, device=setting.device) + 1000

        inputs = _common.sets_of(sets, make)
        yield Case(
            op="rope",
            shape=f"{rows} x ({heads} + {kv_heads}) heads of {config.head_dim}",
            **setting.facts,
            ours=forward_backward(ops.rope, inputs),
            peers={
                "torch eager": peer(reference.rope, inputs),
                "torch.compile": peer(reference.rope, inputs, compile=True),
            },
            check=checker(reference.rope, inputs[0], setting.dtype),
            sets=sets,
            reads=passes * size,
            writes=passes * size,
            operations=0,
            arithmetic="float32",
        )
