"""linear: the four products of a layer, with torch's own and torch.compile's."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .. import ops, reference
from ._common import ROWS, Setting, checker, forward_backward, number_of_sets, peer
from ._harness import Case


def shapes(setting: Setting) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of a layer's products by name."""
    config = setting.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
    return {
        "qkv": ((heads + 2 * kv_heads) * config.head_dim, hidden_size),
        "o": (hidden_size, heads * config.head_dim),
        "gate_up": (2 * intermediate_size, hidden_size),
        "down": (hidden_size, intermediate_size),
    }


def cases(setting: Setting) -> Iterator[Case]:
    """Few rows are bound by reading the weight, many by arithmetic."""
    rows_of = {"decode": (1, 4, 8), "prefill": (32, 512), "training": (512,)}
    for rows in rows_of.get(setting.phase, ROWS[setting.phase]):
        for name, (out_features, in_features) in shapes(setting).items():
            weight_size = out_features * in_features * setting.dtype.itemsize
            sets = number_of_sets(weight_size) if rows <= 16 else 2
            # Weights are rotated through, so that they come from memory.
            scale = in_features**-0.5
            weights = setting.weights(sets, out_features, in_features, scale=scale)
            inputs = [(setting.randn(rows, in_features), weight) for weight in weights]
            training = setting.phase == "training"
            activations = rows * (in_features + out_features) * setting.dtype.itemsize
            yield Case(
                op="linear",
                shape=f"{name}: {rows} x {in_features} -> {out_features}",
                **setting.facts,
                ours=forward_backward(ops.linear, inputs),
                peers={
                    "torch eager": peer(torch.nn.functional.linear, inputs),
                    "torch.compile": peer(torch.nn.functional.linear, inputs, compile=True),
                },
                check=checker(reference.linear, inputs[0], setting.dtype),
                sets=sets,
                reads=weight_size * (2 if training else 1) + activations,
                writes=activations + (weight_size if training else 0),
                operations=2 * rows * out_features * in_features * (3 if training else 1),
                arithmetic=setting.arithmetic,
            )
