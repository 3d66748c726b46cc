from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from common import DTYPES, LAYOUTS, with_strides
from gemma2_ext import ops

OP = torch.ops.gemma2_ext.attention_append_cache.default
OUT_OP = torch.ops.gemma2_ext.attention_append_cache_out.default
OPTIONS: dict[str, Any] = {"scale": 0.0625, "softcap": 50.0, "window": None}


def problem(
    lengths: list[int],
    seqlen: int,
    capacity: int,
    dtype: torch.dtype,
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    int8: bool = False,
) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, v of one projection, filled caches and lengths; the scales of caches of int8."""
    batch = len(lengths)
    qkv = torch.randn(batch, seqlen, heads[0] + 2 * heads[1], head_dim).to(dtype)
    q, k, v = qkv.split((heads[0], heads[1], heads[1]), dim=2)
    shape = (batch, capacity, heads[1], head_dim)
    key_lengths, scales = torch.tensor(lengths, dtype=torch.int64), {}
    if int8:
        caches = [torch.randint(-127, 128, shape, dtype=torch.int8) for _ in "kv"]
        scales = {f"{n}_scales": torch.rand(shape[:3]) / 100 for n in "kv"}
    else:
        caches = [torch.randn(shape).to(dtype) for _ in "kv"]
    return [q, k, v, *caches, key_lengths], scales


def in_two_calls(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    key_lengths: Tensor,
    theta: float = 10000.0,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    **scales: Tensor,
) -> Tensor:
    positions = (key_lengths.long() - q.shape[1])[:, None] + torch.arange(q.shape[1])
    q = ops.rope_append_cache(q, k, v, positions, k_cache, v_cache, theta, **scales)
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "window": window, **scales}
    return ops.attention_cache(q, k_cache, v_cache, key_lengths, **options)


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in tensors.items()}


def check(inputs: list[Tensor], scales: dict[str, Tensor], *args: float, **options: Any) -> None:
    """The result and the caches are equal to the bit."""
    options = {**OPTIONS, **options}
    results = []
    for op in (ops.attention_append_cache, in_two_calls):
        given, own = [*inputs[:3], *(t.clone() for t in inputs[3:])], copies(scales)
        results.append([op(*given, *args, **options, **own), *given[3:5], *own.values()])
    assert results[0][0].is_contiguous()
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 64, 72, 128, 256])
@pytest.mark.parametrize("seqlen", [1, 3])
def test_equal_to_two_calls(isa: str, dtype: torch.dtype, head_dim: int, seqlen: int) -> None:
    check(*problem([3, 40, 17, 64], seqlen, 64, dtype, head_dim=head_dim))
    check(*problem([1, 2, 0], seqlen, 64, dtype, head_dim=head_dim), 500.0)


@pytest.mark.parametrize("heads", [(1, 1), (16, 1), (17, 1), (6, 2)])
@pytest.mark.parametrize("seqlen", [1, 2, 9])
def test_groups(isa: str, heads: tuple[int, int], seqlen: int) -> None:
    check(*problem([20, 9], seqlen, 32, torch.bfloat16, heads=heads))


@pytest.mark.parametrize("seqlen", [1, 5])
def test_ring(isa: str, seqlen: int) -> None:
    lengths = [5, 35, 36, 40, 41, 80, 8191]
    given = problem(lengths, seqlen, 40, torch.bfloat16, head_dim=128)
    check(*given, window=36)
    check(*given, window=7, softcap=None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen", [1, 4])
def test_int8(isa: str, dtype: torch.dtype, seqlen: int) -> None:
    check(*problem([4, 30, 48], seqlen, 48, dtype, head_dim=128, int8=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(isa: str, layout: str) -> None:
    inputs, scales = problem([3, 17], 1, 20, torch.bfloat16)
    for i in range(3):
        inputs[i] = with_strides(inputs[i], layout)
    check(inputs, scales)
    for i in (3, 4):  # heads before slots, as the model's caches lie; and off 16 bytes
        inputs[i] = inputs[i].transpose(1, 2).contiguous().transpose(1, 2)
    check(inputs, scales)
    wide = [torch.cat((t[..., :1], t, t[..., :1]), dim=-1) for t in inputs[3:5]]
    expected = in_two_calls(*inputs[:3], *(t.clone() for t in inputs[3:]), **OPTIONS)
    actual = ops.attention_append_cache(
        *inputs[:3], *(t[..., 1:-1] for t in wide), inputs[5], **OPTIONS
    )
    assert torch.equal(actual, expected)
    assert torch.equal(wide[0][1, 16, :, 1:-1], in_cache(inputs)[0][1, 16])


def in_cache(inputs: list[Tensor]) -> list[Tensor]:
    caches = [t.clone() for t in inputs[3:5]]
    in_two_calls(*inputs[:3], *caches, inputs[5], **OPTIONS)
    return caches


def test_step_by_step(isa: str) -> None:
    """Tokens one at a time give what all at once do."""
    seqlen = 24
    inputs, _ = problem([seqlen], seqlen, seqlen, torch.float32)
    whole = ops.attention_append_cache(*inputs, **OPTIONS)
    single, _ = problem([seqlen], seqlen, seqlen, torch.float32)
    for i in range(seqlen):
        token = [t[:, i : i + 1] for t in inputs[:3]]
        out = ops.attention_append_cache(*token, *single[3:5], torch.tensor([i + 1]), **OPTIONS)
        torch.testing.assert_close(out, whole[:, i : i + 1])
    for cache, all_at_once in zip(single[3:5], inputs[3:5], strict=True):
        assert torch.equal(cache, all_at_once)


@pytest.mark.parametrize("shape", [(0, 1, 4), (2, 0, 4)])
def test_empty(isa: str, shape: tuple[int, int, int]) -> None:
    batch, seqlen, capacity = shape
    inputs, _ = problem([3] * batch, seqlen, capacity, torch.bfloat16)
    before = [t.clone() for t in inputs[3:5]]
    assert ops.attention_append_cache(*inputs, **OPTIONS).shape == inputs[0].shape
    for t, same in zip(inputs[3:5], before, strict=True):
        assert torch.equal(t, same)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    options = {"theta": 10000.0, **OPTIONS}
    inputs, _ = problem([3, 9], 1, 12, dtype)
    opcheck(OP, tuple(inputs), options)
    outs = {
        "rotated": torch.empty(2, 1, 4, 64).to(dtype),
        "out": torch.empty(2, 1, 4, 64).to(dtype),
    }
    opcheck(OUT_OP, (*inputs, None, None), {**options, **outs})
    inputs, scales = problem([3, 9], 2, 12, dtype, int8=True)
    opcheck(OP, (*inputs, *scales.values()), options)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_without_graph_breaks(backend: str) -> None:
    inputs, _ = problem([3, 9], 1, 12, torch.bfloat16)

    def step(*inputs: Tensor) -> Tensor:
        return ops.attention_append_cache(*inputs, **OPTIONS) * 2

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    caches = [t.clone() for t in inputs[3:5]]
    expected = 2 * ops.attention_append_cache(*inputs, **OPTIONS)
    assert torch.equal(compiled(*inputs[:3], *caches, inputs[5]), expected)
    for t, same in zip(caches, inputs[3:5], strict=True):
        assert torch.equal(t, same)


@pytest.mark.parametrize("which", range(3))
def test_gradients_are_refused(which: int) -> None:
    inputs, _ = problem([3, 9], 1, 12, torch.float32)
    inputs[which] = inputs[which].clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="no backward"):
        ops.attention_append_cache(*inputs, **OPTIONS)
    with torch.no_grad():
        ops.attention_append_cache(*inputs, **OPTIONS)


def test_errors() -> None:
    inputs, _ = problem([3, 9], 2, 12, torch.float32)

    def fails(error: type[Exception], message: str, at: int, value: Any, **options: Any) -> None:
        changed = [*inputs[:at], value, *inputs[at + 1 :]]
        before = [t.clone() for t in inputs[3:5]]
        with pytest.raises(error, match=message):
            ops.attention_append_cache(*changed, **{**OPTIONS, **options})
        for t, same in zip(inputs[3:5], before, strict=True):
            assert torch.equal(t, same), "refused after something was written"

    q, k, v, k_cache, v_cache, lengths = inputs
    name = "attention_append_cache"
    fails(TypeError, f"{name}: q must be a", 0, None)
    fails(TypeError, f"{name}: v must be float32", 2, v.long())
    fails(TypeError, f"{name}: key_lengths must be int32 or int64", 5, lengths.float())
    fails(ValueError, f"{name}: k must have shape", 1, k[:, :1])
    fails(ValueError, f"{name}: v must have", 2, v[..., :32])
    fails(ValueError, f"{name}: k_cache must have shape", 3, k_cache[:, :, :1])
    fails(ValueError, f"{name}: v_cache must have", 4, v_cache[:, :5])
    fails(ValueError, "v_cache must have k.s dtype Float", 4, v_cache.bfloat16())
    fails(ValueError, r"key_lengths must have shape \(batch,\)", 5, lengths[:1])
    fails(ValueError, r"key_lengths\[1\] must be at least 0", 5, torch.tensor([3, -1]))
    fails(ValueError, r"key_lengths\[0\] must be at most capacity", 5, torch.tensor([13, 9]))
    fails(ValueError, "scale must be finite", 0, q, scale=float("inf"))
    fails(ValueError, "theta must be positive", 0, q, theta=0.0)
    fails(ValueError, "num_heads must be a positive multiple", 0, q[:, :, :3])
    fails(ValueError, "k_scales", 0, q, k_scales=torch.ones(2, 12, 2))
    short = [t[:, :1] for t in (k_cache, v_cache)]
    with pytest.raises(ValueError, match="seqlen must be at most capacity = 1, got 2"):
        ops.attention_append_cache(q, k, v, *short, torch.tensor([1, 1]), **OPTIONS)
