"""attention: eager, SDPA (which has no soft-cap), flex_attention compiled with soft-cap and window;
the decode of keys in pages, against copying them together for eager, and of a cache of int8, which
has no peer.

Prefill: a causal sequence. Decode: one query over a long cache. Inputs are drawn so that scores
pass the soft-cap: a peer that drops it is wrong, and called so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops, reference
from ..cache import cache_room
from ._common import Setting, forward_backward, number_of_sets, peer
from ._harness import Case, Unavailable, compare_tensors

LENGTHS = {"decode": (8192,), "prefill": (1024, 4096), "training": (1024,)}
PAGE_SIZE = 16
SAMPLED_ROWS = 64  # queries whose result is compared with the reference


@dataclass(frozen=True)
class Shape:
    """One problem: `queries` at the end of `keys`."""

    queries: int
    keys: int
    window: int | None

    def visible_pairs(self) -> int:
        """Query-key pairs that the mask leaves."""
        first = self.keys - self.queries
        limit = self.window or self.keys
        return sum(min(first + i + 1, limit) for i in range(self.queries))


def cases(setting: Setting) -> Iterator[Case]:
    """One layer of each kind. Long prompts are bound by arithmetic, decoding by memory."""
    config = setting.config
    for length in LENGTHS[setting.phase]:
        for window in (None, config.sliding_window if length > config.sliding_window else 512):
            queries = 1 if setting.phase == "decode" else length
            yield _case(setting, Shape(queries, length, window))
        if setting.phase == "decode" and setting.device == "cpu":
            yield _paged_case(setting, length)
            yield _int8_case(setting, length)


def _heads(setting: Setting) -> tuple[int, int, int]:
    """Query heads, key heads, head_dim."""
    config = setting.config
    return config.num_attention_heads, config.num_key_value_heads, config.head_dim


def _scores(setting: Setting) -> dict[str, Any]:
    """How scores come from products."""
    config = setting.config
    return {"scale": config.softmax_scale, "softcap": config.attn_logit_softcapping}


def _case(setting: Setting, shape: Shape) -> Case:
    heads, kv_heads, head_dim = _heads(setting)
    facts = {**_scores(setting), "window": shape.window}

    seen = min(shape.keys, (shape.window or shape.keys) + shape.queries - 1)
    reads = (shape.queries * heads + 2 * seen * kv_heads) * head_dim * setting.dtype.itemsize
    writes = shape.queries * heads * head_dim * setting.dtype.itemsize
    sets = number_of_sets(reads)
    if setting.phase == "decode":
        caches = [t.normal_() for t in _caches(setting, shape.keys, 2 * sets, setting.dtype)]
    else:
        caches = [setting.randn(1, shape.keys, kv_heads, head_dim) for _ in range(2 * sets)]
    queries = [setting.randn(1, shape.queries, heads, head_dim, scale=24.0) for _ in range(sets)]
    inputs = list(zip(queries, caches[::2], caches[1::2], strict=True))
    training = setting.phase == "training"
    products = 2 if not training else 2 + 5
    what = f"window {shape.window}" if shape.window else "global"

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ops.attention(q, k, v, **facts)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return reference.attention(q, k, v, **facts)

    return Case(
        op="attention",
        shape=f"{shape.queries} x {shape.keys}, {heads}/{kv_heads} heads of {head_dim}, {what}",
        **setting.facts,
        ours=forward_backward(ours, inputs),
        peers={
            "torch eager": peer(eager, inputs),
            "SDPA": lambda: forward_backward(_sdpa(setting, shape), inputs),
            "flex_attention": lambda: forward_backward(_flex(setting, shape), inputs),
        },
        check=_checker(eager, inputs[0], setting),
        sets=sets,
        reads=reads if not training else 4 * reads,
        writes=writes if not training else reads,
        operations=products * 2 * shape.visible_pairs() * heads * head_dim,
        arithmetic=setting.arithmetic,
    )


def _caches(setting: Setting, keys: int, count: int, dtype: torch.dtype) -> list[Tensor]:
    """Room for keys or values, placed as KVCache has them."""
    _, kv_heads, head_dim = _heads(setting)
    shape = (1, kv_heads, keys, head_dim)
    room = cache_room([math.prod(shape)] * count, dtype, torch.device(setting.device))
    return [flat.view(shape).transpose(1, 2) for flat in room]


def _paged_case(setting: Setting, length: int) -> Case:
    """One query of a global layer over keys in pages of random order."""
    heads, kv_heads, head_dim = _heads(setting)
    facts = _scores(setting)
    reads = 2 * length * kv_heads * head_dim * setting.dtype.itemsize
    sets = number_of_sets(reads)
    shape = (-(-length // PAGE_SIZE), PAGE_SIZE, kv_heads, head_dim)
    room = cache_room([math.prod(shape)] * 2 * sets, setting.dtype, torch.device(setting.device))
    pages = [flat.normal_().view(shape) for flat in room]
    table = torch.randperm(shape[0]).view(1, -1).int()
    lengths = torch.tensor([length])
    queries = [setting.randn(1, 1, heads, head_dim, scale=24.0) for _ in range(sets)]
    inputs = list(zip(queries, pages[::2], pages[1::2], strict=True))

    def ours(i: int) -> Tensor:
        return ops.attention_paged(*inputs[i], table, lengths, **facts)

    def eager(q: Tensor, *pages: Tensor) -> Any:
        k, v = (t[table].flatten(1, 2)[:, :length] for t in pages)
        return reference.attention(q, k, v, **facts)

    return Case(
        op="attention",
        shape=f"1 x {length}, {heads}/{kv_heads} heads of {head_dim}, global, pages of {PAGE_SIZE}",
        **setting.facts,
        ours=ours,
        peers={"torch eager": peer(eager, inputs)},
        check=_checker(eager, inputs[0], setting),
        sets=sets,
        reads=reads,
        writes=heads * head_dim * setting.dtype.itemsize,
        operations=4 * length * heads * head_dim,
        arithmetic=setting.arithmetic,
    )


def _int8_case(setting: Setting, length: int) -> Case:
    """One query of a global layer over a cache of int8."""
    heads, kv_heads, head_dim = _heads(setting)
    facts = _scores(setting)
    reads = 2 * length * kv_heads * (head_dim + 4)
    sets = number_of_sets(reads)
    lengths = torch.tensor([length])
    wide = [t.normal_() for t in _caches(setting, length, 2 * sets, setting.dtype)]
    narrow = _caches(setting, length, 2 * sets, torch.int8)
    scales = [torch.zeros(1, kv_heads, length).transpose(1, 2) for _ in range(2 * sets)]
    queries = [setting.randn(1, 1, heads, head_dim, scale=24.0) for _ in range(sets)]
    for i in range(0, 2 * sets, 2):
        (k, v), (k8, v8), (k_scales, v_scales) = (t[i : i + 2] for t in (wide, narrow, scales))
        ops.rope_append_cache(k, k, v, torch.arange(length), k8, v8, 10000.0, k_scales, v_scales)

    def ours(i: int) -> Tensor:
        k, v = narrow[2 * i : 2 * i + 2]
        k_scales, v_scales = scales[2 * i : 2 * i + 2]
        return ops.attention_cache(
            queries[i], k, v, lengths, k_scales=k_scales, v_scales=v_scales, **facts
        )

    def check(result: Tensor) -> str | None:
        k, v = (narrow[i].float() * scales[i][..., None] for i in range(2))
        answer = reference.attention(queries[0].float(), k, v, **facts)
        assert isinstance(answer, Tensor)
        return compare_tensors(result, answer, setting.dtype)

    return Case(
        op="attention",
        shape=f"1 x {length}, {heads}/{kv_heads} heads of {head_dim}, global, int8 cache",
        **setting.facts,
        ours=ours,
        peers={},
        check=check,
        sets=sets,
        reads=reads,
        writes=heads * head_dim * setting.dtype.itemsize,
        operations=4 * length * heads * head_dim,
        arithmetic=setting.arithmetic,
    )


def _checker(
    eager: Callable[..., Any], arguments: tuple[Tensor, ...], setting: Setting
) -> Callable[[Any], str | None]:
    """Compares the last queries, whose scores against all keys fit into memory at any length."""
    if setting.phase == "training":
        from ._common import checker

        return checker(eager, arguments, setting.dtype)
    q, k, v = (t.detach().float() for t in arguments)
    answers: list[Tensor] = []

    def check(result: Any) -> str | None:
        if not answers:
            answers.append(eager(q[:, -SAMPLED_ROWS:], k, v))
        return compare_tensors(result[:, -SAMPLED_ROWS:], answers[0], setting.dtype)

    return check


def _sdpa(setting: Setting, shape: Shape) -> Callable[..., Tensor]:
    if shape.window:
        raise Unavailable("SDPA takes a window only as a mask of all scores")
    scale = setting.config.softmax_scale

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        causal = shape.queries > 1
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2)

    return sdpa


def _flex(setting: Setting, shape: Shape) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    config = setting.config
    if setting.phase == "training" and setting.device == "cpu":
        raise Unavailable("flex_attention has no backward on the CPU")
    softcap, scale = config.attn_logit_softcapping, config.softmax_scale
    offset, window = shape.keys - shape.queries, shape.window or shape.keys

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        position = i + offset
        return (j <= position) & (j > position - window)

    block_mask = create_block_mask(
        mask_mod, None, None, shape.queries, shape.keys, device=setting.device
    )
    torch._dynamo.reset()
    run = torch.compile(flex_attention, dynamic=False)

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = run(
            q,
            k,
            v,
            score_mod=score_mod,
            block_mask=block_mask,
            scale=scale,
            enable_gqa=True,
        )
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    return flex
