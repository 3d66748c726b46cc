"""Sampling against probabilities worked out by hand; stops, batches, streams, interrupts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from gemma2_ext import Gemma2, decode_calls
from gemma2_ext.generate import Sampler

DRAWS = 20_000


def frequencies(logits: list[float], **options: Any) -> Tensor:
    """How often each of the ids comes up."""
    sampler = Sampler(**options, generator=torch.Generator().manual_seed(0))
    ids = sampler(torch.tensor(logits).expand(DRAWS, -1))
    assert ids.shape == (DRAWS,)
    assert ids.dtype == torch.int64
    return torch.bincount(ids, minlength=len(logits)) / DRAWS


def check(logits: list[float], expected: list[float], **options: Any) -> None:
    """Each frequency within five standard deviations of its probability; 0 exactly."""
    actual = frequencies(logits, **options)
    for frequency, p in zip(actual.tolist(), expected, strict=True):
        assert abs(frequency - p) <= 5 * math.sqrt(p * (1 - p) / DRAWS)


LOGITS = [math.log(p) for p in (0.05, 0.5, 0.15, 0.3)]


def test_temperature() -> None:
    check(LOGITS, [0.05, 0.5, 0.15, 0.3], temperature=1.0)
    squares = [p * p for p in (0.05, 0.5, 0.15, 0.3)]
    check(LOGITS, [s / sum(squares) for s in squares], temperature=0.5)
    check(LOGITS, [0, 1, 0, 0], temperature=0.0)
    check(LOGITS, [0, 1, 0, 0], temperature=1e-30)  # no inf - inf
    check(LOGITS, [0.25] * 4, temperature=1e6)


def test_top_k() -> None:
    check(LOGITS, [0, 1, 0, 0], temperature=1.0, top_k=1)
    check(LOGITS, [0, 0.5 / 0.8, 0, 0.3 / 0.8], temperature=1.0, top_k=2)
    check(LOGITS, [0.05, 0.5, 0.15, 0.3], temperature=1.0, top_k=4)
    check(LOGITS, [0.05, 0.5, 0.15, 0.3], temperature=1.0, top_k=1000)


def test_top_p() -> None:
    check(LOGITS, [0, 1, 0, 0], temperature=1.0, top_p=0.4)
    check(LOGITS, [0, 0.5 / 0.8, 0, 0.3 / 0.8], temperature=1.0, top_p=0.6)
    check(LOGITS, [0, 0.5 / 0.95, 0.15 / 0.95, 0.3 / 0.95], temperature=1.0, top_p=0.9)
    check(LOGITS, [0.05, 0.5, 0.15, 0.3], temperature=1.0, top_p=1.0)
    check(LOGITS, [0, 1, 0, 0], temperature=1.0, top_p=1e-9)  # at least one


def test_min_p() -> None:
    check(LOGITS, [0, 0.5 / 0.8, 0, 0.3 / 0.8], temperature=1.0, min_p=0.5)
    check(LOGITS, [0, 1, 0, 0], temperature=1.0, min_p=1.0)
    check(LOGITS, [0.05, 0.5, 0.15, 0.3], temperature=1.0, min_p=0.0)
    check(LOGITS, [0, 0.5 / 0.8, 0, 0.3 / 0.8], temperature=1.0, min_p=0.5, top_k=3)


def test_filters_in_turn() -> None:
    """top_p counts what top_k left: of 0.5, 0.3 and 0.15 the first two carry 0.84."""
    check(LOGITS, [0, 0.5 / 0.8, 0, 0.3 / 0.8], temperature=1.0, top_k=3, top_p=0.84)


def test_top_p_of_a_flat_large_vocabulary() -> None:
    ids = Sampler(temperature=1.0, top_p=0.99)(torch.zeros(4000, 5000))
    assert len(ids.unique()) > 2000


@pytest.mark.parametrize(
    ("scale", "low", "high"),
    [(7.0, 1, 128), (4.6, 129, 1024), (2.0, 1025, 16383), (1.0, 16385, 32_000)],
)
def test_top_p_whatever_number_of_tokens_it_takes(scale: float, low: int, high: int) -> None:
    """Each draw is one of the tokens that count, and the same beside other rows."""
    logits = scale * torch.randn(20, 32_000)
    logits[3] *= 7 / scale
    falling, order = (logits / 1.3).softmax(-1).sort(-1, descending=True)
    taken = (falling.cumsum(-1) < 0.9).sum(-1) + 1
    assert ((low <= taken) & (taken <= high))[torch.arange(20) != 3].all()
    sampler = Sampler(temperature=1.3, top_p=0.9)
    keys = sampler.keys(20)
    drawn = sampler(logits, keys)
    assert all(token in row[:n] for token, row, n in zip(drawn, order, taken, strict=True))
    assert torch.equal(
        torch.cat([sampler(logits[i : i + 1], keys[i : i + 1]) for i in range(20)]), drawn
    )


def test_top_p_of_a_flat_vocabulary_keeps_the_distribution() -> None:
    """A chi-squared test over 16 groups of the tokens that count."""
    logits = 1.5 * torch.randn(20_000)
    falling, order = logits.softmax(-1).sort(descending=True)
    count = int((falling.cumsum(0) < 0.8).sum()) + 1
    assert count > 1000
    ids = Sampler(temperature=1.0, top_p=0.8)(logits.expand(3000, -1))
    place = torch.empty(20_000, dtype=torch.int64)
    place[order] = torch.arange(20_000)
    assert int(place[ids].max()) <= count  # one for rounding
    share = falling[:count].cumsum(0) / falling[:count].sum()
    group = (16 * share).ceil().clamp(1, 16).long() - 1
    expected = torch.bincount(group, weights=falling[:count], minlength=16) * 3000
    expected /= falling[:count].sum()
    drawn = torch.bincount(group[place[ids].clamp(max=count - 1)], minlength=16)
    assert float(((drawn - expected) ** 2 / expected).sum()) < 50  # 15 degrees: p = 1e-5


def test_top_p_of_one_is_none() -> None:
    logits = torch.randn(50, 20_000)
    plain = Sampler(temperature=1.0)
    keys = plain.keys(50)
    assert torch.equal(Sampler(temperature=1.0, top_p=1.0)(logits, keys), plain(logits, keys))


def test_top_p_and_min_p_as_transformers_does() -> None:
    from transformers import MinPLogitsWarper, TopPLogitsWarper

    logits = 3 * torch.randn(40, 300)
    for options, warper in (
        ({"top_p": 0.7}, TopPLogitsWarper(0.7)),
        ({"min_p": 0.1}, MinPLogitsWarper(0.1)),
    ):
        allowed = torch.isfinite(warper(None, logits))
        for row in range(40):
            sampler = Sampler(temperature=1.0, **options)
            ids = sampler(logits[row].expand(2000, -1))
            assert allowed[row][ids].all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0, got -0.1"),
        ({"temperature": math.nan}, "temperature must be at least 0, got nan"),
        ({"temperature": math.inf}, "temperature must be at least 0, got inf"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1.1"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\], got -0.1"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
        ({"seed": 2**64}, "seed must have 64 bits, got 18446744073709551616"),
    ],
)
def test_option_errors(options: dict[str, Any], match: str) -> None:
    model = tiny.small_model()
    ids = torch.ones(1, 3, dtype=torch.int64)
    for call in (model.generate, model.stream):
        with pytest.raises(ValueError, match=match):
            call(ids, **options)


def test_call_errors() -> None:
    model = tiny.small_model(max_position_embeddings=32)
    for call in (model.generate, model.stream):
        with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
            call(torch.ones(1, 3, dtype=torch.int64), max_new_tokens=2.5)  # type: ignore[arg-type]
        for wrong in (1, ["a"], [1.5]):
            with pytest.raises(TypeError, match="stop_ids must be integers, got"):
                call(torch.ones(1, 3, dtype=torch.int64), stop_ids=wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="33 tokens exceed the context"):
            call(torch.ones(1, 33, dtype=torch.int64))
        with pytest.raises(ValueError, match="at least one token"):
            call(torch.ones(1, 0, dtype=torch.int64))
        with pytest.raises(ValueError, match="row 0 holds 0 tokens and is given 9 more"):
            call(torch.ones(1, 9, dtype=torch.int64), cache=model.new_cache(1, 8))
    with pytest.raises(ValueError, match="stream: one prompt at a time, got 2 rows"):
        model.stream(torch.ones(2, 3, dtype=torch.int64))


def test_seed_repeats_a_result() -> None:
    model = tiny.small_model()
    ids = tiny.random_ids(model.config, 2, 8)
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.0, "stop_ids": ()}
    first = model.generate(ids, seed=5, **options)
    assert torch.equal(model.generate(ids, seed=5, **options), first)
    assert not torch.equal(model.generate(ids, seed=6, **options), first)
    torch.manual_seed(0)
    unseeded = model.generate(ids, **options)
    assert not torch.equal(model.generate(ids, **options), unseeded)


def test_numbers_of_new_tokens() -> None:
    model = tiny.small_model()
    ids = tiny.random_ids(model.config, 2, 8).int()
    nothing = model.generate(ids, max_new_tokens=0)
    assert torch.equal(nothing, ids)
    assert nothing.data_ptr() != ids.data_ptr()
    one = model.generate(ids, max_new_tokens=1, stop_ids=())
    assert one.dtype == torch.int32
    assert torch.equal(one[:, :8], ids)
    assert one[:, 8].tolist() == model(ids)[:, -1].argmax(-1).tolist()
    assert list(model.stream(ids[:1], max_new_tokens=0)) == []


def test_the_context_ends_a_text() -> None:
    model = tiny.small_model(max_position_embeddings=20)
    ids = tiny.random_ids(model.config, 1, 12)
    # The token drawn behind the last position needs no place of its own.
    assert model.generate(ids, max_new_tokens=100, stop_ids=()).shape == (1, 21)


def test_rows_stop_each_on_their_own() -> None:
    model = tiny.small_model()
    ids = tiny.random_ids(model.config, 3, 8)
    free = model.generate(ids, max_new_tokens=30, stop_ids=())[:, 8:]
    stop = int(free[0, 4])
    actual = model.generate(ids, max_new_tokens=30, stop_ids=[stop])[:, 8:]
    for row in range(3):
        hits = (free[row] == stop).nonzero()[:, 0]
        end = int(hits[0]) + 1 if len(hits) else 30
        assert actual[row, :end].tolist() == free[row, :end].tolist()
        assert not actual[row, end:].any()


def test_stream_is_generate() -> None:
    model = tiny.small_model()
    ids = tiny.random_ids(model.config, 1, 8)
    for options in ({}, {"temperature": 1.0, "top_k": 20, "seed": 3}):
        expected = model.generate(ids, max_new_tokens=50, stop_ids=(), **options)[0, 8:]
        tokens = list(model.stream(ids, max_new_tokens=50, stop_ids=(), **options))
        assert tokens == expected.tolist()
        assert all(type(token) is int for token in tokens)


def test_a_stream_that_is_left_leaves_the_cache_usable() -> None:
    model = tiny.small_model()
    ids = tiny.random_ids(model.config, 1, 8)
    whole = model.generate(ids, max_new_tokens=30, stop_ids=())
    cache = model.new_cache(1, 64)
    stream = model.stream(ids, max_new_tokens=30, stop_ids=(), cache=cache)
    seen = [next(stream) for _ in range(10)]
    stream.close()  # type: ignore[attr-defined]
    assert seen == whole[0, 8:18].tolist()
    assert cache.length == 17  # all but the last one drawn
    rest = model.generate(whole[:, 17:18], max_new_tokens=20, stop_ids=(), cache=cache)
    assert rest[0, 1:].tolist() == whole[0, 18:].tolist()


def test_an_interrupt_in_the_middle_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.small_model()
    ids = tiny.random_ids(model.config, 1, 8)
    whole = model.generate(ids, max_new_tokens=12, stop_ids=())
    cache = model.new_cache(1, 64)
    stream = model.stream(ids, max_new_tokens=12, stop_ids=(), cache=cache)
    seen = [next(stream) for _ in range(4)]
    with monkeypatch.context() as patch:

        def interrupted(*args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

        with torch.inference_mode():
            calls = decode_calls.calls_for(model, cache, ids[:, :1])
        assert calls is not None
        broken = [*calls._calls[:7], (interrupted, (), {}), *calls._calls[8:]]
        patch.setattr(calls, "_calls", broken)
        patch.setattr(calls, "_noted", None)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert cache.length == 11  # the step that broke off does not count
    rest = model.generate(torch.tensor([seen[-1:]]), max_new_tokens=8, stop_ids=(), cache=cache)
    assert rest[0, 1:].tolist() == whole[0, 12:].tolist()


def test_modes_do_not_leak_out_of_a_stream() -> None:
    model: Gemma2 = tiny.small_model()
    for _ in model.stream(tiny.random_ids(model.config, 1, 8), max_new_tokens=3, stop_ids=()):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
