"""Gemma 2 over the fused ops.

    x = embedding * sqrt(hidden_size)
    every layer:  x += post_attention_norm(attention(input_norm(x)))
                  x += post_feedforward_norm(mlp(pre_feedforward_norm(x)))
    logits = softcap * tanh(norm(x) @ embedding^T / softcap)

Each "norm, add, next norm" is one op, so a layer is: linear (q, k, v as one product), rope with the
cache write, attention, linear, add_rms_norm, linear (gate and up as one), geglu, linear,
add_rms_norm.
Source: arXiv 2408.00118; transformers `models/gemma2`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import generate as _generate
from . import ops
from .cache import KVCache
from .config import Gemma2Config
from .decode_calls import MOST_ROWS, calls_for
from .device import check_device
from .packed import load_checkpoint
from .quantize import Format, QuantizedWeight
from .weights import check_fused, format_of, parameter_shapes, save_weights

Weights = Mapping[str, Tensor] | Mapping[str, Tensor | QuantizedWeight]


class Weight(nn.Module):
    """A parameter named `weight`, so that parameters carry their checkpoint's names.

    Or a QuantizedWeight, whose data and scales are buffers below that name.
    """

    weight: Any

    def __init__(self, weight: Tensor | QuantizedWeight) -> None:
        super().__init__()
        if isinstance(weight, Tensor):
            weight = nn.Parameter(weight, requires_grad=False)
        self.weight = weight


class Layer(nn.Module):
    """One layer's weights; the computation stands in Gemma2._layers."""

    qkv_proj: Weight
    o_proj: Weight
    gate_up_proj: Weight
    down_proj: Weight
    input_layernorm: Weight
    post_attention_layernorm: Weight
    pre_feedforward_layernorm: Weight
    post_feedforward_layernorm: Weight

    def __init__(self, weights: Weights, prefix: str) -> None:
        super().__init__()
        for name in Layer.__annotations__:
            setattr(self, name, Weight(weights[f"{prefix}.{name}.weight"]))


class Gemma2(nn.Module):
    """A Gemma 2 model.

    Args:
        config: the model's configuration.
        weights: the fused tensors by name (`weights.parameter_shapes`), all of one dtype; matrices
            may be QuantizedWeight, all in one format, the norms' dtype then being that of
            activations; None: drawn as for training from scratch (norms 0, the rest normal with
            standard deviation 0.02), float32 unless `dtype` says otherwise.
        dtype: of weights that are drawn; must be None where weights are given.

    Parameters do not ask for gradients; `requires_grad_(True)` changes that.

    Attributes:
        config: the configuration.
        cache_dtype: of the caches that `new_cache` makes: None (the activations') or torch.int8.

    Raises:
        ValueError: a weight is missing, unknown, or of another shape or dtype.
    """

    def __init__(
        self,
        config: Gemma2Config,
        weights: Weights | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if weights is None:
            weights = _initial_weights(config, dtype or torch.float32)
        elif dtype is not None:
            raise ValueError("Gemma2: dtype is for weights that are drawn; convert the given ones")
        check_fused(weights, config)
        self.config = config
        self.cache_dtype: torch.dtype | None = None
        self.embed_tokens = Weight(weights["embed_tokens.weight"])
        self.layers = nn.ModuleList(
            Layer(weights, f"layers.{i}") for i in range(config.num_hidden_layers)
        )
        self.norm = Weight(weights["norm.weight"])

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        quantize: Format | None = None,
        *,
        sliding_window: int | None = None,
        cache_dtype: torch.dtype | None = None,
        progress: bool = False,
    ) -> Gemma2:
        """Loads a Hugging Face folder: config.json and model.safetensors, single or in shards.

        Args:
            folder: where they are.
            dtype: of the weights in memory, and of activations; None: that of the file.
            device: "cpu", or "cuda" (Ampere or later). Weights that are not packed go there from
                the file, piece by piece.
            quantize: "int8" or "int4": packs the matrices, embedding included, while they are
                read, some rows at a time. None: as the folder has them, which may be packed
                already (`gemma2-ext quantize`).
            sliding_window: keys that a local layer sees, in place of the configuration's.
            cache_dtype: torch.int8 for KV caches in 8 bits, wherever `new_cache`,
                `generate` or `stream` makes one; None: in the activations' dtype.
            progress: whether to show a progress bar on stderr.

        Raises:
            FileNotFoundError, OSError, ValueError, TypeError, NotImplementedError, MemoryError:
                each names the file, the field or tensor, what was expected and what was found.
        """
        device = check_device(device)
        config = Gemma2Config.from_pretrained(folder)
        if sliding_window is not None:
            config = replace(config, sliding_window=sliding_window)
        weights = load_checkpoint(
            folder, config, dtype=dtype, device=device, quantize=quantize, progress=progress
        )
        model = cls(config, weights)
        model.cache_dtype = cache_dtype
        return model if device.type == "cpu" else model.to(device)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes config.json and safetensors with Hugging Face's names, for transformers too.

        Packed weights are written as `gemma2-ext quantize` does, for `from_pretrained` alone.
        """
        os.makedirs(folder, exist_ok=True)
        weights: dict[str, Tensor | QuantizedWeight] = {
            f"{name}.weight": module.weight.detach()
            if isinstance(module.weight, Tensor)
            else module.weight
            for name, module in self.named_modules()
            if isinstance(module, Weight)
        }
        save_weights(folder, weights, self.config)
        self.config.save_pretrained(folder, quantization=format_of(weights), dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations, and of weights that are not packed."""
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.norm.weight.device

    def new_cache(
        self,
        batch_size: int = 1,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """An empty cache for this model; max_length None: the whole context.

        dtype: torch.int8, or the model's; None: `cache_dtype`, and where that is None the model's.

        Raises:
            ValueError: another dtype; else as `KVCache`.
        """
        dtype = dtype or self.cache_dtype or self.dtype
        if dtype not in (self.dtype, torch.int8):
            raise ValueError(
                f"Gemma2: a cache must have the model's dtype {self.dtype} or int8, got {dtype}"
            )
        return KVCache(self.config, batch_size, max_length, dtype=dtype, device=self.device)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits of the next token at every position.

        Args:
            input_ids: (batch, seqlen), int64 or int32, the tokens that the cache does not hold yet.
            attention_mask: (batch, seqlen), true or 1 where input_ids holds a token, with padding
                left, right or anywhere; None: everywhere. Tokens are at positions 0, 1, ... of
                their row, after those in the cache, not counting padding.
            cache: receives keys and values of the tokens; long input goes through in chunks.
            last_only: only the logits after each row's last token.

        Returns:
            (batch, seqlen, vocab_size), or (batch, 1, vocab_size) with last_only; float32,
            soft-capped; 0 at padding.

        Raises:
            TypeError: input_ids is not an integer tensor.
            ValueError: shapes that do not fit, ids outside the vocabulary, a row without a token,
                or more tokens than the cache or the context holds.
        """
        self._check_input(input_ids, attention_mask, cache)
        batch, seqlen = input_ids.shape
        input_ids = input_ids.to(self.device)
        if attention_mask is None or bool((attention_mask != 0).all()):
            counts = [seqlen] * batch
            order = None
        else:
            # Tokens to the right, padding to the left, order kept: then each row's last column is
            # its last token, and a token's distance to the right end is the same in every view.
            attention_mask = attention_mask.to(self.device) != 0
            counts = attention_mask.sum(-1).tolist()
            if 0 in counts:
                row = counts.index(0)
                raise ValueError(f"Gemma2: row {row} of attention_mask holds no token")
            order = attention_mask.int().argsort(dim=-1, stable=True)[:, -max(counts) :]
            input_ids = input_ids.gather(-1, order)

        if cache is None:
            logits = self._forward_whole(input_ids, torch.tensor(counts), last_only)
        else:
            logits = self._forward_cached(input_ids, counts, cache, last_only)
        if order is None or last_only:
            return logits
        longest = input_ids.shape[1]
        starts = longest - torch.tensor(counts)
        padding = (torch.arange(longest) < starts[:, None]).to(self.device)
        if logits.requires_grad:  # its backward reads what the op returned
            logits = logits.masked_fill(padding[..., None], 0.0)
        else:
            logits.masked_fill_(padding[..., None], 0.0)
        index = order[..., None].expand_as(logits)
        if longest == seqlen:
            return torch.empty_like(logits).scatter_(1, index, logits)
        # Columns without a token of any row were left out.
        return logits.new_zeros((batch, seqlen, logits.shape[2])).scatter_(1, index, logits)

    def _check_input(
        self, input_ids: Tensor, attention_mask: Tensor | None, cache: KVCache | None
    ) -> None:
        _check_integers("input_ids", input_ids)
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise ValueError(
                "Gemma2: input_ids must have shape (batch, seqlen) with at least one token, "
                f"got {tuple(input_ids.shape)}"
            )
        _check_ids(self.config, input_ids)
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"Gemma2: attention_mask must have input_ids' shape {tuple(input_ids.shape)}, "
                f"got {tuple(attention_mask.shape)}"
            )
        if cache is None:
            context, tokens = self.config.max_position_embeddings, input_ids.shape[1]
            if attention_mask is not None and tokens > context:
                tokens = int((attention_mask != 0).sum(-1).max())
            if tokens > context:
                raise ValueError(
                    f"Gemma2: {tokens} tokens exceed the context, "
                    f"max_position_embeddings = {context}"
                )
        if cache is not None:
            if cache.batch_size != input_ids.shape[0]:
                raise ValueError(
                    f"Gemma2: the cache has {cache.batch_size} rows, input_ids {input_ids.shape[0]}"
                )
            known = cache.keys[0].dtype in (self.dtype, torch.int8)
            if not known or len(cache.keys) != len(self.layers):
                raise ValueError("Gemma2: the cache was made for another model")

    def _forward_whole(self, input_ids: Tensor, counts: Tensor, last_only: bool) -> Tensor:
        """Attention over the given tokens alone. Rows are right-aligned, `counts` tokens each."""
        config = self.config
        seqlen = input_ids.shape[1]
        starts = seqlen - counts
        padded = bool((starts > 0).any())
        positions = (
            torch.arange(seqlen)[None, :] - starts[:, None] if padded else torch.arange(seqlen)
        ).to(self.device)
        starts = starts.to(self.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = ops.rope(q, k, positions, config.rope_theta)
            out = ops.attention(
                q,
                k,
                v,
                scale=config.softmax_scale,
                softcap=config.attn_logit_softcapping,
                window=config.sliding_window if config.is_local(layer) else None,
                key_starts=starts if padded else None,
            )
            return cast("Tensor", out)

        return self._logits(self._layers(input_ids, attend), last_only)

    def _forward_cached(
        self, input_ids: Tensor, counts: list[int], cache: KVCache, last_only: bool
    ) -> Tensor:
        """Attention over the cache, in chunks that its rings can take.

        Rows are right-aligned, `counts` tokens each.
        """
        batch, seqlen = input_ids.shape
        logits = None
        for begin, hidden in self._chunks(input_ids, counts, cache):
            end = begin + hidden.shape[1]
            if last_only:
                if end == seqlen:
                    logits = self._logits(hidden, last_only=True)
            elif begin == 0 and end == seqlen:
                logits = self._logits(hidden, last_only=False)
            else:
                if logits is None:
                    vocab_size = self.config.vocab_size
                    logits = torch.empty(
                        batch, seqlen, vocab_size, dtype=torch.float32, device=self.device
                    )
                logits[:, begin:end] = self._logits(hidden, last_only=False)
        assert logits is not None
        return logits

    def _chunks(
        self, input_ids: Tensor, counts: list[int], cache: KVCache
    ) -> Iterator[tuple[int, Tensor]]:
        """Each chunk's first column and hidden states behind the final norm."""
        cache.check_room(counts)  # before the first chunk is written
        seqlen = input_ids.shape[1]
        for begin in range(0, seqlen, cache.chunk_size):
            end = min(begin + cache.chunk_size, seqlen)
            here = [min(max(count - (seqlen - end), 0), end - begin) for count in counts]
            yield begin, self._chunk(input_ids[:, begin:end], here, cache)

    def _chunk(self, input_ids: Tensor, counts: list[int], cache: KVCache) -> Tensor:
        """Runs the layers over a chunk, of whose columns the last `counts` (batch,) are tokens."""
        seqlen = input_ids.shape[1]
        ends = cache.reserve(counts)
        positions = [
            [-1] * (seqlen - count) + list(range(end - count, end))
            for count, end in zip(counts, ends, strict=True)
        ]
        if calls := calls_for(self, cache, input_ids):
            hidden = calls.run(self, input_ids, positions, ends)
        else:
            places, lengths = (_on_device(numbers, self.device) for numbers in (positions, ends))
            groups = [
                self._decode(input_ids[rows], places[rows], lengths[rows], cache, rows)
                for rows in cache.row_groups(seqlen)
            ]
            hidden = torch.cat(groups) if len(groups) > 1 else groups[0]
        cache.commit(counts)
        return hidden

    def _decode(
        self,
        input_ids: Tensor,
        positions: Tensor | None,
        key_lengths: Tensor,
        cache: KVCache,
        rows: slice = slice(None),
    ) -> Tensor:
        """The layers over tokens at these places of the cache's rows; touches nothing on the host.

        Without positions they are the last of each row's key_lengths.
        """
        config, theta = self.config, self.config.rope_theta
        whole = len(input_ids) == cache.batch_size

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values, scales = cache.keys[layer], cache.values[layer], cache.scales(layer)
            if not whole:
                keys, values = keys[rows], values[rows]
                scales = {name: scale[rows] for name, scale in scales.items()}
            options: dict[str, Any] = {
                "scale": config.softmax_scale,
                "softcap": config.attn_logit_softcapping,
                "window": config.sliding_window if config.is_local(layer) else None,
                **scales,
            }
            if positions is None:
                return ops.attention_append_cache(
                    q, k, v, keys, values, key_lengths, theta, **options
                )
            q = ops.rope_append_cache(q, k, v, positions, keys, values, theta, **scales)
            return ops.attention_cache(q, keys, values, key_lengths, **options)

        return self._layers(input_ids, attend)

    def _layers(self, input_ids: Tensor, attend: Any) -> Tensor:
        """All layers and the final norm: (batch, seqlen) -> (batch, seqlen, hidden_size)."""
        config, layers = self.config, cast("list[Layer]", list(self.layers))
        residual = self._embed(input_ids)
        hidden = ops.rms_norm(residual, layers[0].input_layernorm.weight, config.rms_norm_eps)
        for i, layer in enumerate(layers):
            following = layers[i + 1].input_layernorm if i + 1 < len(layers) else self.norm
            residual, hidden = run_layer(
                config, layer, following.weight, residual, hidden, functools.partial(attend, i)
            )
        return hidden

    def _embed(self, input_ids: Tensor) -> Tensor:
        """The scaled rows of the embedding."""
        embedding, scale = self.embed_tokens.weight, self.config.embedding_scale(self.dtype)
        if isinstance(embedding, QuantizedWeight):
            return embedding.rows(input_ids, self.dtype, scale)
        return F.embedding(input_ids, embedding) * scale

    def hidden(self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Hidden states behind the final norm, of sequences packed one behind another.

        `ops.logits(hidden, model.embed_tokens.weight, softcap)` gives the logits; the losses
        `ops.linear_cross_entropy` and `ops.linear_distillation` do without them.

        Args:
            input_ids: (tokens,), int64 or int32.
            cu_seqlens: (sequences + 1,) int64 or int32 from 0, ascending, the last one `tokens`;
                sequence i is input_ids[cu_seqlens[i] : cu_seqlens[i + 1]] and sees itself only.
            max_seqlen: at least the longest sequence, at most the context.

        Returns:
            (tokens, hidden_size), in the weights' dtype.

        Raises:
            TypeError: input_ids or cu_seqlens is not an integer tensor.
            ValueError: shapes that do not fit, ids outside the vocabulary, or a sequence longer
                than max_seqlen or the context.
        """
        _check_packed(self.config, input_ids, cu_seqlens, max_seqlen)
        attend = packed_attention(self.config, cu_seqlens, max_seqlen)
        return self._layers(input_ids[None], attend)[0]

    def _logits(self, hidden: Tensor, last_only: bool) -> Tensor:
        if last_only:
            hidden = hidden[:, -1:]
        softcap = self.config.final_logit_softcapping
        return ops.logits(hidden, self.embed_tokens.weight, softcap)

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        """See `gemma2_ext.generate.generate`."""
        return _generate.generate(self, input_ids, **options)

    def stream(self, input_ids: Tensor, **options: Any) -> Iterator[int]:
        """See `gemma2_ext.generate.stream`."""
        return _generate.stream(self, input_ids, **options)


def _on_device(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """As a tensor; the host does not wait for what a GPU is still at work on."""
    if device.type != "cuda":
        return torch.tensor(numbers, device=device)
    return torch.tensor(numbers).pin_memory().to(device, non_blocking=True)


def _check_integers(name: str, value: object) -> None:
    if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32):
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"Gemma2: {name} must be an int64 or int32 tensor, got {got}")


def _check_ids(config: Gemma2Config, input_ids: Tensor) -> None:
    if input_ids.numel() > MOST_ROWS:
        low, high = (int(x) for x in input_ids.aminmax())
    else:
        ids = input_ids.flatten().tolist()
        low, high = min(ids), max(ids)
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"Gemma2: token ids must be in [0, vocab_size = {config.vocab_size}), "
            f"got {low if low < 0 else high}"
        )


def _check_packed(
    config: Gemma2Config, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> None:
    _check_integers("input_ids", input_ids)
    _check_integers("cu_seqlens", cu_seqlens)
    if input_ids.dim() != 1 or input_ids.numel() == 0:
        raise ValueError(
            "Gemma2: packed input_ids must have shape (tokens,) with at least one token, "
            f"got {tuple(input_ids.shape)}"
        )
    _check_ids(config, input_ids)
    tokens = input_ids.shape[0]
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or int(cu_seqlens[-1]) != tokens:
        raise ValueError(
            f"Gemma2: cu_seqlens must have shape (sequences + 1,) and end with {tokens}, the "
            f"number of tokens, got shape {tuple(cu_seqlens.shape)}"
        )
    if int(cu_seqlens[0]) != 0 or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(f"Gemma2: cu_seqlens must ascend from 0, got {cu_seqlens.tolist()}")
    context = config.max_position_embeddings
    if max_seqlen > context:
        raise ValueError(
            f"Gemma2: max_seqlen must be at most max_position_embeddings = {context}, "
            f"got {max_seqlen}"
        )


def run_layer(
    config: Gemma2Config,
    layer: Any,
    following: Tensor,
    residual: Tensor,
    hidden: Tensor,
    attend: Any,
) -> tuple[Tensor, Tensor]:
    """One layer.

    Args:
        config: the model's.
        layer: a Layer, or anything with its attributes except input_layernorm, which is what
            `following` was to the layer before.
        following: (hidden_size,), weight of the norm behind this layer: the next one's
            input_layernorm, or the final norm.
        residual: (batch, seqlen, hidden_size), the stream.
        hidden: the stream behind input_layernorm.
        attend: (q, k, v), each (batch, seqlen, heads, head_dim) and not yet rotated, to the
            attention's result of q's shape.

    Returns:
        (residual, hidden) for the next layer.
    """
    batch, seqlen = residual.shape[:2]
    eps = config.rms_norm_eps
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    qkv = ops.linear(hidden, layer.qkv_proj.weight)
    qkv = qkv.view(batch, seqlen, heads + 2 * kv_heads, config.head_dim)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=2)
    attended = attend(q, k, v).reshape(batch, seqlen, heads * config.head_dim)
    attended = ops.linear(attended, layer.o_proj.weight)
    residual, hidden = ops.add_rms_norm(
        attended,
        residual,
        layer.post_attention_layernorm.weight,
        layer.pre_feedforward_layernorm.weight,
        eps,
    )
    gate_up_weight = layer.gate_up_proj.weight
    if hidden.is_cuda and isinstance(gate_up_weight, Tensor) and not torch.is_grad_enabled():
        mlp = ops.linear_geglu(hidden, gate_up_weight)
    else:
        gate_up = ops.linear(hidden, gate_up_weight)
        mlp = ops.geglu(*gate_up.split(config.intermediate_size, dim=-1))
    mlp = ops.linear(mlp, layer.down_proj.weight)
    return ops.add_rms_norm(mlp, residual, layer.post_feedforward_layernorm.weight, following, eps)


def packed_attention(
    config: Gemma2Config, cu_seqlens: Tensor, max_seqlen: int
) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
    """Attention inside each of several sequences packed one behind another.

    Args:
        config: the model's.
        cu_seqlens: (sequences + 1,) integers from 0, ascending, the last one the number of tokens.
        max_seqlen: at least the longest sequence.

    Returns:
        (layer, q, k, v) to the result, all (1, tokens, heads, head_dim); it rotates q and k.
    """
    lengths = cu_seqlens.diff()
    starts = torch.repeat_interleave(cu_seqlens[:-1], lengths)
    positions = torch.arange(len(starts), device=cu_seqlens.device) - starts

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = ops.rope(q, k, positions, config.rope_theta)
        out = ops.attention_varlen(
            q[0],
            k[0],
            v[0],
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            scale=config.softmax_scale,
            softcap=config.attn_logit_softcapping,
            window=config.sliding_window if config.is_local(layer) else None,
        )
        return cast("Tensor", out)[None]

    return attend


def _initial_weights(config: Gemma2Config, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: torch.zeros(shape, dtype=dtype)
        if len(shape) == 1
        else torch.empty(shape, dtype=dtype).normal_(0, 0.02)
        for name, shape in parameter_shapes(config).items()
    }
