"""Modules against transformers' of the same name, by their state_dict."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tiny
from gemma2_ext import nn

CONFIG = tiny.small_config()


def counterpart(kind: str, **changes: Any) -> tuple[Any, Any]:
    """transformers' module in float32 with weights that matter, and its configuration."""
    pytest.importorskip("transformers")
    from transformers import Gemma2Config
    from transformers.models.gemma2 import modeling_gemma2 as stock

    config = Gemma2Config(**{**tiny.small_config(**changes).to_dict()})
    config._attn_implementation = "eager"
    if kind == "RMSNorm":
        module: Any = stock.Gemma2RMSNorm(config.hidden_size, eps=1e-5)
    elif kind == "MLP":
        module = stock.Gemma2MLP(config)
    else:
        module = stock.Gemma2Attention(config, int(kind[-1]))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module, config


def causal_mask(seqlen: int, window: int | None) -> Tensor:
    distance = torch.arange(seqlen)[:, None] - torch.arange(seqlen)
    seen = (distance >= 0) & (distance < (window or seqlen))
    return torch.where(seen, 0.0, -torch.inf)[None, None]


def attend(module: Any, config: Any, hidden: Tensor) -> Tensor:
    """transformers' attention module over whole rows."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RotaryEmbedding

    positions = torch.arange(hidden.shape[1])[None]
    embeddings = Gemma2RotaryEmbedding(config=config)(hidden, positions)
    mask = causal_mask(hidden.shape[1], module.sliding_window)
    return module(hidden, position_embeddings=embeddings, attention_mask=mask)[0]


@pytest.mark.parametrize("kind", ["RMSNorm", "MLP", "Attention0", "Attention1"])
def test_equal_to_transformers(kind: str) -> None:
    """Output and every gradient, with transformers' weights by their names."""
    theirs, config = counterpart(kind)
    mine: Any = {
        "RMSNorm": lambda: nn.RMSNorm(config.hidden_size, eps=1e-5),
        "MLP": lambda: nn.MLP(config),
        "Attention0": lambda: nn.Attention(config, 0),
        "Attention1": lambda: nn.Attention(config, 1),
    }[kind]()
    assert list(mine.state_dict()) == list(theirs.state_dict())
    mine.load_state_dict(theirs.state_dict())
    hidden = torch.randn(2, 2 * CONFIG.sliding_window + 1, config.hidden_size)
    inputs = [hidden.clone().requires_grad_() for _ in range(2)]
    expected = attend(theirs, config, inputs[0]) if "Att" in kind else theirs(inputs[0])
    actual = mine(inputs[1])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    actual.backward(grad)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, msg=lambda m: name + m)  # noqa: B023


@torch.no_grad()
def test_attention_with_padding_and_with_a_cache() -> None:
    module = nn.Attention(CONFIG, 0)
    seqlen, capacity = 40, CONFIG.sliding_window + 8
    hidden = torch.randn(2, seqlen, CONFIG.hidden_size)
    whole = module(hidden)
    starts = torch.tensor([0, 9])
    padded = module(torch.cat((hidden[1:, :9] + 1, hidden[1:, 9:]), dim=1), key_starts=starts[1:])
    torch.testing.assert_close(padded[:, 9:], module(hidden[1:, 9:]), rtol=1e-5, atol=1e-5)

    shape = (2, capacity, CONFIG.num_key_value_heads, CONFIG.head_dim)
    cache = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    parts = []
    for begin in range(0, seqlen, 5):
        positions = torch.arange(begin, begin + 5)
        parts.append(module(hidden[:, begin : begin + 5], positions, cache=cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="positions are needed with a cache"):
        module(hidden, cache=cache)
    behind = torch.tensor([[0, 1, 2], [0, 1, -1]])
    with pytest.raises(ValueError, match="padding must be on the left"):
        module(hidden[:, :3], behind, cache=cache)
    with pytest.raises(ValueError, match="key_starts do not go with a cache"):
        module(hidden, torch.arange(seqlen), cache=cache, key_starts=starts)


def test_geglu() -> None:
    gate, up = torch.randn(2, 5, 7)
    expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
    torch.testing.assert_close(nn.GeGLU()(gate, up), expected)
    assert not list(nn.GeGLU().parameters())


def test_dtype_device_and_copies() -> None:
    for module in (
        nn.RMSNorm(8, device="meta", dtype=torch.bfloat16),
        nn.MLP(CONFIG, device="meta", dtype=torch.bfloat16),
        nn.Attention(CONFIG, 0, device="meta", dtype=torch.bfloat16),
    ):
        for parameter in copy.deepcopy(module).parameters():
            assert parameter.is_meta and parameter.dtype == torch.bfloat16
    assert "window=16, softcap=5.0" in repr(nn.Attention(CONFIG, 0))
    assert "window=None" in repr(nn.Attention(CONFIG, 1))
    assert "44, eps=1e-06" in repr(nn.RMSNorm(44))


def test_refused_configurations() -> None:
    _, config = counterpart("Attention0")
    for field in ("attention_bias", "use_bidirectional_attention"):
        changed = copy.deepcopy(config)
        setattr(changed, field, True)
        with pytest.raises(NotImplementedError, match=f"{field} must be False"):
            nn.Attention(changed, 0)
    changed.attention_bias = changed.use_bidirectional_attention = False
    changed.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(NotImplementedError, match="rope_type must be 'default': 'linear'"):
        nn.Attention(changed, 0)


class Layer(torch.nn.Module):
    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.norm, self.mlp_norm = (nn.RMSNorm(CONFIG.hidden_size) for _ in range(2))
        self.attention, self.mlp = nn.Attention(CONFIG, layer_idx), nn.MLP(CONFIG)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.mlp_norm(x))


def compare_in_one_of_two_processes(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    layers = torch.nn.Sequential(*(Layer(i) for i in range(2)))
    for parameter in layers.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(4, 10, CONFIG.hidden_size)
    sharded = copy.deepcopy(layers)
    for layer in sharded:
        fully_shard(layer)
    fully_shard(sharded)
    replicated = DistributedDataParallel(copy.deepcopy(layers))
    layers(x).square().mean().backward()
    for parallel in (sharded, replicated):
        parallel(x[2 * rank : 2 * rank + 2]).square().mean().backward()
        for parameter, whole in zip(parallel.parameters(), layers.parameters(), strict=True):
            grad: Any = parameter.grad
            if parallel is sharded:
                grad = grad.full_tensor()
            torch.testing.assert_close(grad, whole.grad)
    # The group's threads end with what holds it: one that lets go of Python's objects while the
    # interpreter ends aborts.
    del parallel, sharded, replicated, layer
    gc.collect()
    torch.distributed.destroy_process_group()


def test_ddp_and_fsdp2(tmp_path: Path) -> None:
    """Gradients of two processes with half of a batch each are those of the whole batch."""
    torch.multiprocessing.spawn(compare_in_one_of_two_processes, (str(tmp_path / "store"),), 2)
