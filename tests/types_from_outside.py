"""What a user's mypy sees of the package: `make lint` checks these types, nothing runs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from typing_extensions import assert_type

import gemma2_ext
from gemma2_ext import Gemma2, Gemma2Config, KVCache, nn, ops


def of_ops(x: Tensor) -> None:
    assert_type(ops.rms_norm(x, x), Tensor)
    assert_type(ops.add_rms_norm(x, x, x, x), tuple[Tensor, Tensor])
    assert_type(ops.geglu(x, x), Tensor)
    assert_type(ops.rope(x, x, x), tuple[Tensor, Tensor])
    assert_type(ops.logits(x, x, 30.0), Tensor)
    assert_type(ops.linear_cross_entropy(x, x, x), Tensor)
    assert_type(ops.attention_cache(x, x, x, x, scale=1.0, softcap=50.0, window=4096), Tensor)


def of_the_model(folder: str, ids: Tensor) -> None:
    config = Gemma2Config.gemma2_2b()
    assert_type(config, Gemma2Config)
    model = Gemma2.from_pretrained(folder, dtype=torch.bfloat16)
    assert_type(model, Gemma2)
    assert_type(model.new_cache(batch_size=1, max_length=8192), KVCache)
    assert_type(model.generate(ids, max_new_tokens=64), Tensor)
    assert_type(model.stream(ids, max_new_tokens=64), Iterator[int])
    assert_type(gemma2_ext.build_info(), dict[str, object])
    assert_type(gemma2_ext.keep_freed_memory(), bool)


def of_modules(x: Tensor, config: Gemma2Config) -> None:
    assert_type(nn.RMSNorm(256).forward(x), Tensor)
    assert_type(nn.MLP(config).forward(x), Tensor)
    assert_type(nn.Attention(config, layer_idx=0).forward(x), Tensor)
