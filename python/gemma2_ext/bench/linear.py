"""linear: the four products of a layer, with torch's own and torch.compile's; over packed weights
with torch's own over the same weights unpacked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops, reference
from ..quantize import Format, QuantizedWeight, packed_bytes
from ._common import ROWS, Setting, checker, forward_backward, number_of_sets, peer
from ._harness import Call, Case


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
    if setting.quantize:
        yield from _packed_cases(setting, setting.quantize)
        return
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


def _packed_cases(setting: Setting, format: Format) -> Iterator[Case]:
    rows_of = {"decode": (1, 4, 8, 16), "prefill": (32, 512)}
    for rows in rows_of.get(setting.phase, ()):
        for name, (out_features, in_features) in shapes(setting).items():
            size = packed_bytes(format, (out_features, in_features))
            sets = number_of_sets(size) if rows <= 16 else 2
            scale = in_features**-0.5
            weights = setting.packed_weights(format, sets, out_features, in_features, scale=scale)
            inputs = [(setting.randn(rows, in_features), weight) for weight in weights]
            activations = rows * (in_features + out_features) * setting.dtype.itemsize
            yield Case(
                op="linear",
                shape=f"{name}: {rows} x {in_features} -> {out_features}",
                **setting.facts,
                ours=forward_backward(ops.linear, inputs),
                peers={"torch eager": unpacked(setting, F.linear, inputs)},
                check=packed_checker(reference.linear, inputs[0]),
                sets=sets,
                reads=size + activations,
                writes=activations,
                operations=2 * rows * out_features * in_features,
                arithmetic=setting.arithmetic,
            )


def unpacked(
    setting: Setting,
    function: Callable[[Tensor, Tensor], Any],
    inputs: list[tuple[Tensor, QuantizedWeight]],
) -> Callable[[], Call]:
    """A peer's callable over the same weights in the setting's dtype."""

    def make() -> Call:
        dense = [(x, weight.dequantize(setting.dtype)) for x, weight in inputs]
        return forward_backward(function, dense)

    return make


def packed_checker(
    exact: Callable[[Tensor, Tensor], Any], arguments: tuple[Tensor, QuantizedWeight]
) -> Callable[[Any], str | None]:
    """As `checker`, with room for x in 8 bits."""

    def answer(x: Tensor, weight: QuantizedWeight) -> Any:
        return exact(x, weight.dequantize())

    return checker(answer, arguments, torch.float16)
