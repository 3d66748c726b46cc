"""Tiny random Gemma 2 models, here and in transformers with the same weights."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gemma2_ext import Gemma2, Gemma2Config
from gemma2_ext.model import parameter_shapes

# Every multiple of 8 up to 256 is one configuration's head_dim.
NUM_CONFIGS = 32
# Sizes of the prompt and of what follows it: past the window, and round a ring several times.
PROMPT = 40
NEW = 200


@cache
def random_config(seed: int) -> Gemma2Config:
    """A configuration whose every number matters: window < PROMPT, soft-caps that bite, sizes that
    are equal to no other. Group size, depth's parity and head_dim are spread evenly over seeds."""
    draw = random.Random(seed)
    group = (1, 2, 4, 8)[(seed + seed // 8) % 4]
    kv_heads = draw.choice((1, 2)) if group > 2 else draw.choice((1, 2, 3))
    heads = group * kv_heads
    # transformers wants hidden_size to be a multiple of the heads.
    hidden_size = heads * draw.randrange(*((41, 97) if heads < 3 else (9, 33)), 2)
    layers = 2 + (seed // 4) % 3
    kinds = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)]
    if seed % 5 == 4:  # config.json's layer_types wins over the parity
        kinds = [draw.choice(kinds) for _ in kinds]
    return Gemma2Config(
        vocab_size=draw.choice((109, 127, 151, 173, 257, 331)),
        hidden_size=hidden_size,
        intermediate_size=draw.randrange(11, 131),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=8 * (seed % NUM_CONFIGS + 1),
        max_position_embeddings=512,
        rms_norm_eps=draw.choice((1e-6, 1e-5, 1e-3)),
        rope_theta=draw.choice((10000.0, 500.0, 1e6)),
        query_pre_attn_scalar=draw.randrange(17, 300),
        sliding_window=draw.randrange(16, 33),
        layer_types=tuple(kinds),
        attn_logit_softcapping=draw.choice((None, 1.5, 3.0, 5.0)),
        final_logit_softcapping=draw.choice((None, 8.0, 15.0, 30.0)),
    )


def random_weights(
    config: Gemma2Config, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Fused weights under which every part of the model shows in the logits.

    Norm weights are around 0 and no small numbers. Scores are as large as their soft-cap, final
    logits about half as large: past the bend of tanh, short of where it is flat. Embeddings are
    small beside what the layers add, or a greedy choice would only repeat the last token.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...], std: float, mean: float = 0.0) -> Tensor:
        return torch.empty(shape).normal_(mean, std, generator=generator)

    hidden, heads, head_dim = config.hidden_size, config.num_attention_heads, config.head_dim
    weights = {}
    for name, shape in parameter_shapes(config).items():
        if len(shape) == 1:
            weights[name] = normal(shape, 0.3)
        else:
            weights[name] = normal(shape, shape[1] ** -0.5)
        if name.endswith("qkv_proj.weight"):
            scores = config.softmax_scale * math.sqrt(head_dim)
            weights[name][: heads * head_dim] *= (config.attn_logit_softcapping or 2.0) / scores
    weights["embed_tokens.weight"] *= 0.1
    final = 0.4 * (config.final_logit_softcapping or 20.0) / 0.1
    weights["norm.weight"] = normal((hidden,), 0.3 * final, final)
    return {name: weight.to(dtype) for name, weight in weights.items()}


def split(config: Gemma2Config, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's names and matrices from the fused ones."""
    q_rows = config.num_attention_heads * config.head_dim
    kv_rows = config.num_key_value_heads * config.head_dim
    tensors = {}
    for name, weight in weights.items():
        name = f"model.{name}"
        if "qkv_proj" in name:
            for part, rows in zip("qkv", weight.split((q_rows, kv_rows, kv_rows)), strict=True):
                tensors[name.replace("qkv_proj", f"self_attn.{part}_proj")] = rows
        elif "o_proj" in name:
            tensors[name.replace("o_proj", "self_attn.o_proj")] = weight
        elif "gate_up_proj" in name:
            for part, rows in zip(("gate", "up"), weight.chunk(2), strict=True):
                tensors[name.replace("gate_up_proj", f"mlp.{part}_proj")] = rows
        elif "down_proj" in name:
            tensors[name.replace("down_proj", "mlp.down_proj")] = weight
        else:
            tensors[name] = weight
    return tensors


def hugging_face(config: Gemma2Config, weights: Mapping[str, Tensor], **overrides: Any) -> Any:
    """transformers' model with these weights in their dtype, eager attention, no stop token."""
    from transformers import Gemma2Config as HFConfig
    from transformers import Gemma2ForCausalLM

    values = {**config.to_dict(), **overrides}
    # Not model.to(dtype): that would round RoPE's frequencies too, which from_pretrained does not.
    dtype = weights["embed_tokens.weight"].dtype
    model = Gemma2ForCausalLM._from_config(
        HFConfig(**values), attn_implementation="eager", dtype=dtype
    ).eval()
    assert model.dtype == dtype and model.model.rotary_emb.inv_freq.dtype == torch.float32
    missing, unexpected = model.load_state_dict(split(config, weights), strict=False)
    assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.generation_config.eos_token_id = None
    return model


@cache
def trio(seed: int) -> tuple[Gemma2, Any, dict[str, Tensor]]:
    """Ours, transformers' and the weights of the configuration `seed`, in float32."""
    config = random_config(seed)
    weights = random_weights(config, seed)
    return Gemma2(config, weights), hugging_face(config, weights), weights


def small_config(**changes: Any) -> Gemma2Config:
    """A configuration for tests of one thing: local, global, local, and a window of 16."""
    values: dict[str, Any] = {
        "vocab_size": 151,
        "hidden_size": 44,
        "intermediate_size": 61,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "query_pre_attn_scalar": 24,
        "sliding_window": 16,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 20.0,
    }
    return Gemma2Config(**{**values, **changes})


def small_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Gemma2:
    """A model with `small_config(**changes)` and random weights."""
    config = small_config(**changes)
    return Gemma2(config, random_weights(config, seed, dtype))


def random_ids(config: Gemma2Config, batch: int, seqlen: int, seed: int = 0) -> Tensor:
    """(batch, seqlen) token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (batch, seqlen), generator=generator)


def relative_distance(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative to the expected one."""
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).norm()
    return (difference / expected.double().norm()).item()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max()).item()
