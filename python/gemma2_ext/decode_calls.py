"""Decoding on the CPU: the calls of a step, made ready once.

A step of few rows is some 240 calls of ops. Called by their public functions, each costs ten
microseconds of checks, attribute look-ups and allocations before it begins, while memory, which
decoding waits for, stands idle. Here every call's arguments stand ready, buffers included; a step
puts ids, positions and lengths into place and makes the calls of the `_out` forms one after
another. They are those of `model.run_layer`, in its order: results are equal to the bit.

The first step makes them as torch ops; the extension notes them, and later steps make them again
from there, without the interpreter and torch's dispatcher, whose code and data a step's weights
have driven out of the caches each time. Where someone watches torch's calls (a profiler, a mode)
they are torch ops again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from . import _C
from .cache import KVCache
from .quantize import QuantizedWeight, embedding_op

if TYPE_CHECKING:
    from .model import Gemma2

# Rows (batch * seqlen) up to which the calls' own cost shows.
MOST_ROWS = 64

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
# Of each cache, by the tokens of a row; gone with the cache.
_made: WeakKeyDictionary[KVCache, dict[int, DecodeCalls]] = WeakKeyDictionary()


def calls_for(model: Gemma2, cache: KVCache, input_ids: Tensor) -> DecodeCalls | None:
    """The calls of a step of input_ids' shape.

    None where ops have to go through their public functions: on a GPU, with many rows, while
    traced, under autocast, with gradients, or over tensors of a subclass.
    """
    if (
        torch.compiler.is_compiling()  # before what would become a guard
        or input_ids.numel() > MOST_ROWS
        or type(input_ids) is not Tensor
        or input_ids.device.type != "cpu"
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    made = _made.setdefault(cache, {})
    seqlen = input_ids.shape[1]
    calls = made.get(seqlen)
    if calls is None or not calls.are_of(model, cache):
        if not all(type(t) in (Tensor, nn.Parameter) for _, _, t in _parts(model, Tensor)):
            return None
        calls = made[seqlen] = DecodeCalls(model, cache, seqlen)
    return calls


def _parts(model: nn.Module, kind: type) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Every tensor or module of the model with the place that it stands in."""
    for module in model.modules():
        for owner in (module._parameters, module._buffers, module._modules):
            for name, part in owner.items():
                if isinstance(part, kind):
                    yield owner, name, part


def _watched() -> bool:
    """Whether calls of torch ops are seen by someone."""
    return bool(
        torch.autograd._profiler_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
    )


class DecodeCalls:
    """A step of `seqlen` tokens for every row of `cache`; see this module.

    Args:
        model: on the CPU.
        cache: of the model; its tensors are held, itself it is not.
        seqlen: tokens of a row.
    """

    def __init__(self, model: Gemma2, cache: KVCache, seqlen: int) -> None:
        self._config = model.config
        self._owners, self._names, self._parts = zip(*_parts(model, object), strict=True)
        self._keys = cache.keys
        # What is written later must not be an inference tensor.
        with torch.inference_mode(False), torch.no_grad():
            self._calls = list(self._make(model, cache, seqlen))
        self._noted: _C.Calls | None = None

    def are_of(self, model: Gemma2, cache: KVCache) -> bool:
        """Whether model and cache are still made of the same tensors."""
        return (
            model.config is self._config
            and cache.keys is self._keys
            and model._modules is self._owners[0]
            and _C.hold(self._owners, self._names, self._parts)
        )

    def run(
        self,
        model: Gemma2,
        input_ids: Tensor,
        positions: Sequence[Sequence[int]],
        key_lengths: Sequence[int],
    ) -> Tensor:
        """The embedding, the layers and the final norm.

        Args:
            model: whose calls these are.
            input_ids: (batch, seqlen).
            positions: (batch, seqlen), -1 where there is padding.
            key_lengths: (batch,), tokens that the cache then holds.

        Returns:
            (batch, seqlen, hidden_size), overwritten by the next step.
        """
        # By numpy, whose assignments take a fraction of torch's.
        self._ids[...] = input_ids.numpy()
        self._positions[...] = positions
        self._key_lengths[...] = key_lengths
        if not self._embeds:
            self._residual.copy_(model._embed(input_ids))
        if self._noted is None or _watched():
            self._call_ops()
        else:
            self._noted.run()
        return self._hidden

    def _call_ops(self) -> None:
        noted = _C.Calls()
        noted.record()
        try:
            for op, args, options in self._calls:
                op(*args, **options)
        finally:
            noted.stop()
        if len(noted) == len(self._calls):  # a mode may have answered in an op's place
            self._noted = noted

    def _make(self, model: Gemma2, cache: KVCache, seqlen: int) -> Iterator[Call]:
        config, batch, ops = model.config, cache.batch_size, torch.ops.gemma2_ext
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        head_dim, inner, eps = config.head_dim, config.intermediate_size, config.rms_norm_eps

        def buffer(*shape: int) -> Tensor:
            return torch.empty(batch, seqlen, *shape, dtype=model.dtype, device="cpu")

        ids, positions = torch.empty(2, batch, seqlen, dtype=torch.int64, device="cpu")
        residual, middle, hidden, projected = (buffer(config.hidden_size) for _ in range(4))
        qkv, rotated = buffer(heads + 2 * kv_heads, head_dim), buffer(heads, head_dim)
        attended, gate_up, mlp = buffer(heads, head_dim), buffer(2 * inner), buffer(inner)
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=2)
        key_lengths = torch.empty(batch, dtype=torch.int64, device="cpu")
        self._residual, self._hidden = residual, hidden
        self._ids, self._positions, self._key_lengths = (
            t.numpy() for t in (ids, positions, key_lengths)
        )

        def linear(x: Tensor, weight: Tensor | QuantizedWeight, out: Tensor) -> Call:
            x, out = x.flatten(2), out.flatten(2)
            if isinstance(weight, Tensor):
                return ops.linear_out.default, (x, weight, out), {}
            op = ops.linear_int8_out if weight.format == "int8" else ops.linear_int4_out
            return op.default, (x, weight.data, weight.scales, out), {}

        embedding = model.embed_tokens.weight
        self._embeds = isinstance(embedding, QuantizedWeight)
        if isinstance(embedding, QuantizedWeight):
            scale = config.embedding_scale(model.dtype)
            packed = embedding.data, embedding.scales
            yield embedding_op(embedding.format), (ids, *packed, scale, residual), {}
        layers: Any = list(model.layers)
        norm = ops.add_rms_norm_out.default
        yield (
            ops.rms_norm_out.default,
            (residual, layers[0].input_layernorm.weight, eps, hidden),
            {},
        )
        for i, layer in enumerate(layers):
            following = layers[i + 1].input_layernorm if i + 1 < len(layers) else model.norm
            caches = cache.keys[i], cache.values[i]
            scales = cache.scales(i)
            both = scales.get("k_scales"), scales.get("v_scales")
            yield linear(hidden, layer.qkv_proj.weight, qkv)
            yield (
                ops.rope_append_cache_out.default,
                (q, k, v, positions, *caches, config.rope_theta, *both, rotated),
                {},
            )
            yield (
                ops.attention_cache_out.default,
                (rotated, *caches, key_lengths, *both),
                {
                    "scale": config.softmax_scale,
                    "softcap": config.attn_logit_softcapping,
                    "window": config.sliding_window if config.is_local(i) else None,
                    "out": attended,
                },
            )
            yield linear(attended, layer.o_proj.weight, projected)
            weights = (
                layer.post_attention_layernorm.weight,
                layer.pre_feedforward_layernorm.weight,
            )
            yield norm, (projected, residual, *weights, eps, middle, hidden), {}
            yield linear(hidden, layer.gate_up_proj.weight, gate_up)
            yield ops.geglu_out.default, (gate_up[..., :inner], gate_up[..., inner:], mlp), {}
            yield linear(mlp, layer.down_proj.weight, projected)
            weights = layer.post_feedforward_layernorm.weight, following.weight
            yield norm, (projected, middle, *weights, eps, residual, hidden), {}
