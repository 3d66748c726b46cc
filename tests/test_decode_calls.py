"""A step's ready calls give what the public ops give, to the bit, and never outlive a change."""

from __future__ import annotations

import _thread
import copy
import gc
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from gemma2_ext import _C, Gemma2, KVCache, decode_calls, ops
from gemma2_ext import model as model_module


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every step that is made of ready calls."""
    counted: list[int] = []
    run = decode_calls.DecodeCalls.run

    def counting(self: Any, *args: Tensor) -> Tensor:
        counted.append(1)
        return run(self, *args)

    monkeypatch.setattr(decode_calls.DecodeCalls, "run", counting)
    return counted


def one_by_one(model: Gemma2, ids: Tensor, cache: KVCache, **options: Any) -> Tensor:
    """The model's logits by the public ops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module, "calls_for", lambda *args: None)
        return model(ids, cache=cache, **options)


def models() -> Iterator[Gemma2]:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny.small_model(dtype=dtype)
        yield model
        for format in ("int8", "int4"):
            packed = copy.deepcopy(model)
            for module in packed.modules():
                if isinstance(module, model_module.Weight) and module.weight.dim() == 2:
                    weight = ops.quantize(module.weight.detach(), format)
                    del module.weight
                    module.weight = weight
            yield packed


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
@torch.no_grad()
def test_equal_to_the_bit(index: int, cache_dtype: torch.dtype | None, runs: list[int]) -> None:
    model = list(models())[index]
    ids = tiny.random_ids(model.config, 3, 60)
    mask = torch.ones(3, 60, dtype=torch.int64)
    mask[1, :7], mask[2, 20:31], mask[0, 41:50] = 0, 0, 0
    ready, plain = (model.new_cache(3, 100, cache_dtype) for _ in range(2))
    begin = 0
    for seqlen in (31, 1, 1, 3, 1, 2, 21):
        now = slice(begin, begin + seqlen)
        begin += seqlen
        actual = model(ids[:, now], mask[:, now], cache=ready)
        expected = one_by_one(model, ids[:, now], plain, attention_mask=mask[:, now])
        assert torch.equal(actual, expected)
    assert len(runs) >= 6


@torch.no_grad()
def test_caches_and_lengths_in_turns(runs: list[int]) -> None:
    model = tiny.small_model()
    ids = tiny.random_ids(model.config, 2, 12)
    caches = [model.new_cache(1, 32) for _ in range(2)]
    whole = [model(row[None]) for row in ids]
    for begin in range(0, 12, 3):
        for row, cache in enumerate(caches):
            part = ids[row : row + 1, begin : begin + 3]
            logits = torch.cat(
                [model(part[:, :1], cache=cache), model(part[:, 1:], cache=cache)], 1
            )
            torch.testing.assert_close(logits, whole[row][:, begin : begin + 3])
    assert len(runs) == 16


@torch.no_grad()
def test_a_changed_model_is_seen() -> None:
    model = tiny.small_model()
    ids = tiny.random_ids(model.config, 1, 1)

    def check() -> None:
        cache.reset()
        actual = model(ids, cache=cache)
        assert torch.equal(actual, one_by_one(model, ids, model.new_cache(1, 8)))
        seen.append(actual)

    cache, seen = model.new_cache(1, 8), []
    check()
    model.layers[1].o_proj.weight = nn.Parameter(model.layers[1].o_proj.weight * 2)
    check()
    model.layers[0].down_proj.weight.mul_(2)
    check()
    model.layers[0].qkv_proj.weight.data = model.layers[0].qkv_proj.weight * 2
    check()
    model.layers[0].gate_up_proj = model_module.Weight(model.layers[1].gate_up_proj.weight * 2)
    check()
    model.layers[0], model.layers[2] = model.layers[2], model.layers[0]
    check()
    weight = ops.quantize(model.layers[1].down_proj.weight.detach(), "int8")
    del model.layers[1].down_proj.weight
    model.layers[1].down_proj.weight = weight
    check()
    weight.scales = weight.scales * 2
    check()
    model.load_state_dict(tiny.small_model(seed=1).state_dict(), strict=False)
    check()
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))
    # Another model of the same sizes, over the same cache.
    model = tiny.small_model(seed=2)
    check()


@torch.no_grad()
def test_they_go_with_their_cache() -> None:
    gc.collect()
    before = len(decode_calls._made)
    model = tiny.small_model()
    cache = model.new_cache(1, 8)
    model(torch.ones(1, 1, dtype=torch.int64), cache=cache)
    assert len(decode_calls._made) == before + 1
    twin = copy.deepcopy(cache)
    one = model(torch.ones(1, 1, dtype=torch.int64), cache=cache)
    assert torch.equal(one, model(torch.ones(1, 1, dtype=torch.int64), cache=twin))
    del cache, twin
    gc.collect()
    assert len(decode_calls._made) == before


def test_where_they_are_not_used(runs: list[int]) -> None:
    model = tiny.small_model()
    ids = torch.ones(1, 1, dtype=torch.int64)
    model(ids, cache=model.new_cache(1, 8))  # autograd may ask
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            half = tiny.small_model(dtype=torch.bfloat16)
            half(ids, cache=half.new_cache(1, 8))
        model(ids.expand(65, 1), cache=model.new_cache(65, 8))
        assert not runs
        model(ids, cache=model.new_cache(1, 8))
        model(ids.expand(64, 1), cache=model.new_cache(64, 8))
    with torch.inference_mode():
        cache = model.new_cache(1, 8)
        model(ids, cache=cache)
    with torch.no_grad():
        model(ids, cache=cache)
    assert len(runs) == 4


@torch.no_grad()
def test_errors_are_the_same() -> None:
    model = tiny.small_model()
    cache = model.new_cache(1, 4)
    for _ in range(4):
        model(torch.ones(1, 1, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="row 0 holds 4 tokens and is given 1 more"):
        model(torch.ones(1, 1, dtype=torch.int64), cache=cache)
    assert cache.lengths.tolist() == [4]


def test_hold() -> None:
    one, other = object(), object()
    dicts = {"a": one, "b": None}, {"a": other}
    keys, values = ("a", "b", "a"), (one, None, other)
    of = (dicts[0], dicts[0], dicts[1])
    assert _C.hold(of, keys, values)
    assert _C.hold((), (), ())
    assert not _C.hold(of, keys, (one, None, one))
    assert not _C.hold(of, ("a", "c", "a"), values)
    with pytest.raises(ValueError, match="must be as many"):
        _C.hold(of, keys, values[:2])


def made_as_ops(model: Gemma2, ids: Tensor, cache: KVCache) -> dict[str, int]:
    """How often a step calls each op of this package, as torch's profiler sees it."""
    with torch.profiler.profile() as profile:
        model(ids, cache=cache)
    return {e.key: e.count for e in profile.key_averages() if e.key.startswith("gemma2_ext::")}


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += op.namespace == "gemma2_ext"
        return op(*args, **(kwargs or {}))


@torch.no_grad()
def test_who_watches_sees_torch_ops() -> None:
    model, ids = tiny.small_model(), torch.ones(1, 1, dtype=torch.int64)
    cache = model.new_cache(1, 16)
    layers = model.config.num_hidden_layers
    for watched in range(3):  # the first step and later ones
        counts = made_as_ops(model, ids, cache)
        assert counts["gemma2_ext::attention_cache_out"] == layers, watched
        assert counts["gemma2_ext::linear_out"] == 4 * layers
        with Counting() as counting:
            model(ids, cache=cache)
        assert counting.calls > 9 * layers
        model(ids, cache=cache)  # not watched


@torch.no_grad()
def test_later_steps_are_not_made_of_ops() -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an op was called")

    model, ids = tiny.small_model(), torch.ones(1, 1, dtype=torch.int64)
    cache, plain = model.new_cache(1, 16), model.new_cache(1, 16)
    for step in range(4):
        actual = model(ids, cache=cache)
        assert torch.equal(actual, one_by_one(model, ids, plain)), step
        calls = decode_calls.calls_for(model, cache, ids)
        assert calls is not None
        calls._calls = [(fail, (), {})] * len(calls._calls)
    with Counting(), pytest.raises(AssertionError, match="an op was called"):
        model(ids, cache=cache)


@torch.no_grad()
def test_a_step_under_a_mode_that_answers_itself_is_not_noted() -> None:
    class Refusing(Counting):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return None if "geglu" in str(op) else op(*args, **(kwargs or {}))

    model, ids = tiny.small_model(), torch.ones(1, 1, dtype=torch.int64)
    cache = model.new_cache(1, 16)
    with Refusing():
        model(ids, cache=cache)
    cache.reset()
    assert torch.equal(model(ids, cache=cache), one_by_one(model, ids, model.new_cache(1, 16)))


def test_calls_made_again() -> None:
    x, y = torch.randn(2, 5, 8)
    out = torch.empty(5, 8)
    calls = _C.Calls()
    geglu_out = torch.ops.gemma2_ext.geglu_out.default
    calls.record()
    geglu_out(x, y, out)
    other = threading.Thread(target=geglu_out, args=(x, y, out))
    other.start()
    other.join()
    with pytest.raises(ValueError, match="up must have"):
        geglu_out(x, y[:3], out)  # a call that failed fails again
    calls.stop()
    geglu_out(x, y, out)
    assert len(calls) == 2  # not the other thread's, nor the last one
    x.mul_(2)
    expected = ops.geglu(x, y)
    del x, y  # their memory is held
    with pytest.raises(ValueError, match="geglu: up must have gate's shape"):
        calls.run()
    assert torch.equal(out, expected)


def test_ctrl_c_ends_calls_in_between() -> None:
    x, out = torch.randn(64, 512), torch.empty(64, 512)
    calls = _C.Calls()
    calls.record()
    for _ in range(20_000):
        torch.ops.gemma2_ext.geglu_out.default(x, x, out)
    calls.stop()
    with pytest.raises(KeyboardInterrupt):
        threading.Timer(0.02, _thread.interrupt_main).start()
        for _ in range(1000):
            calls.run()
