"""The model's own errors, options and presets. Exactness has a file of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from gemma2_ext import Gemma2, Gemma2Config, KVCache, ops


def test_presets_have_the_published_sizes() -> None:
    assert Gemma2Config.gemma2_2b().num_parameters == 2_614_341_888
    assert Gemma2Config.gemma2_9b().num_parameters == 9_241_705_984
    assert Gemma2Config.gemma2_27b().num_parameters == 27_227_128_320


def test_construction_draws_or_takes_weights() -> None:
    config = tiny.small_config()
    drawn = Gemma2(config, dtype=torch.bfloat16)
    assert drawn.dtype == torch.bfloat16
    assert drawn.device == torch.device("cpu")
    assert not any(p.requires_grad for p in drawn.parameters())
    weights = tiny.random_weights(config)
    model = Gemma2(config, weights)
    assert {n for n, _ in model.named_parameters()} == set(weights)
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == weights[name].data_ptr()  # not copied
    with pytest.raises(ValueError, match="dtype is for weights that are drawn"):
        Gemma2(config, weights, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: w.pop("norm.weight"), "norm.weight is missing"),
        (lambda w: w.update(extra=torch.zeros(3)), "extra is not a weight of this model"),
        (lambda w: w.update({"norm.weight": torch.zeros(3)}), r"must have shape \(44,\)"),
        (lambda w: w.update({"norm.weight": torch.zeros(44).half()}), "all the same"),
    ],
)
def test_wrong_weights(change: Any, match: str) -> None:
    config = tiny.small_config()
    weights = tiny.random_weights(config)
    change(weights)
    with pytest.raises(ValueError, match=match):
        Gemma2(config, weights)


def test_input_errors() -> None:
    model = tiny.small_model(max_position_embeddings=32)
    ids = torch.ones(1, 4, dtype=torch.int64)
    for wrong, kind, match in (
        (ids.float(), TypeError, "input_ids must be an int64 or int32 tensor, got torch.float32"),
        ([[1, 2]], TypeError, "got list"),
        (ids[0], ValueError, r"shape \(batch, seqlen\) with at least one token, got \(4,\)"),
        (ids[:, :0], ValueError, r"at least one token, got \(1, 0\)"),
        (ids[:0], ValueError, r"at least one token, got \(0, 4\)"),
        (ids * 151, ValueError, r"token ids must be in \[0, vocab_size = 151\), got 151"),
        (-ids, ValueError, "got -1"),
        (ids.expand(1, 4).repeat(1, 9), ValueError, "36 tokens exceed the context"),
    ):
        with pytest.raises(kind, match=match):
            model(wrong)
    with pytest.raises(ValueError, match=r"attention_mask must have input_ids' shape \(1, 4\)"):
        model(ids, torch.ones(1, 3))
    with pytest.raises(ValueError, match="row 0 of attention_mask holds no token"):
        model(ids, torch.zeros(1, 4))


def test_cache_errors() -> None:
    model = tiny.small_model(max_position_embeddings=32)
    ids = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="the cache has 2 rows, input_ids 1"):
        model(ids, cache=model.new_cache(2, 32))
    other = KVCache(model.config, 1, 32, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="the cache was made for another model"):
        model(ids, cache=other)
    cache = model.new_cache(1, 6)
    model(ids, cache=cache)
    before = [t.clone() for t in cache.keys]
    with pytest.raises(ValueError, match="row 0 holds 4 tokens and is given 4 more"):
        model(ids, cache=cache)
    assert cache.lengths.tolist() == [4]
    assert all(torch.equal(a[:, :4], b[:, :4]) for a, b in zip(cache.keys, before, strict=True))


def test_int32_ids_and_noncontiguous_ones() -> None:
    model = tiny.small_model()
    ids = tiny.random_ids(model.config, 3, 20)
    expected = model(ids)
    assert expected.dtype == torch.float32
    assert torch.equal(model(ids.int()), expected)
    assert torch.equal(model(ids.T.contiguous().T), expected)


def test_last_only_of_every_row() -> None:
    model = tiny.small_model()
    ids = tiny.random_ids(model.config, 2, 20)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, 13:] = False
    everything = model(ids, mask)
    last = model(ids, mask, last_only=True)
    assert last.shape == (2, 1, model.config.vocab_size)
    torch.testing.assert_close(last[0, 0], everything[0, 19], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last[1, 0], everything[1, 12], rtol=1e-5, atol=1e-5)


def test_round_trip_and_sliding_window(tmp_path: Path) -> None:
    model = tiny.small_model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = Gemma2.from_pretrained(tmp_path)
    assert again.config == model.config
    ids = tiny.random_ids(model.config, 1, 40)
    assert torch.equal(again(ids), model(ids))
    narrow = Gemma2.from_pretrained(tmp_path, sliding_window=4, dtype=torch.float32)
    assert narrow.config.sliding_window == 4
    assert narrow.dtype == torch.float32
    assert not torch.equal(narrow(ids), model(ids))
    assert torch.equal(
        narrow(ids[:, :1]), Gemma2.from_pretrained(tmp_path, torch.float32)(ids[:, :1])
    )


def test_what_is_not_supported_is_said(tmp_path: Path) -> None:
    tiny.small_model().save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="device cuda: "):
        Gemma2.from_pretrained(tmp_path, device="cuda")
    for wrong in (0, -3):
        with pytest.raises(ValueError, match=f"sliding_window must be .* got {wrong}"):
            Gemma2.from_pretrained(tmp_path, sliding_window=wrong)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_activation": "gelu"}))
    with pytest.raises(NotImplementedError, match=r"config\.json: hidden_activation must be"):
        Gemma2.from_pretrained(tmp_path)


def test_gradients_are_those_of_finite_differences() -> None:
    model = tiny.small_model().requires_grad_(True)
    ids = tiny.random_ids(model.config, 2, 9)
    grad_logits = torch.randn(2, 9, model.config.vocab_size)
    model(ids).backward(grad_logits)
    for name, parameter in model.named_parameters():
        grad, start = parameter.grad, parameter.detach().clone()
        assert grad is not None, name
        direction = grad / grad.norm()
        step = 3 / float(grad.norm())  # the sum of about 1000 terms moves by 3 either way
        ends = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.copy_(start + sign * step * direction)
                ends.append(float((model(ids).double() * grad_logits).sum()))
            parameter.copy_(start)
        slope = (ends[0] - ends[1]) / (2 * step)
        assert slope == pytest.approx(float(grad.norm()), rel=0.02), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_independent_of_threads(dtype: torch.dtype) -> None:
    """To the bit: every product here is this project's own."""
    model = tiny.small_model(dtype=dtype)
    ids = tiny.random_ids(model.config, 2, 70)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        cache = model.new_cache(2, 100)
        results.append((model(ids), model(ids, cache=cache), model(ids[:, :1], cache=cache)))
    torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_half_precision_runs_in_every_mode() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = tiny.small_model(dtype=dtype)
        ids = tiny.random_ids(model.config, 1, 60)
        with torch.inference_mode():
            cache = model.new_cache(1, 80)
            first = model(ids, cache=cache, last_only=True)
        second = model(ids[:, :1], cache=cache, last_only=True)  # a cache outlives the mode
        assert torch.isfinite(first).all()
        assert torch.isfinite(second).all()


def test_packed_sequences_see_themselves_only() -> None:
    model = tiny.small_model()
    rows = [tiny.random_ids(model.config, 1, n, seed=n) for n in (30, 1, 50, 17)]
    ids = torch.cat(rows, dim=1)[0]
    for dtype in (torch.int32, torch.int64):
        hidden = model.hidden(ids, torch.tensor([0, 30, 31, 81, 98], dtype=dtype), 64)
        assert hidden.shape == (98, model.config.hidden_size)
        softcap = model.config.final_logit_softcapping
        logits = ops.logits(hidden, model.embed_tokens.weight, softcap)
        expected = torch.cat([model(row)[0] for row in rows])
        assert tiny.relative_error(logits, expected) < 1e-5


def test_wrong_packed_sequences_are_named() -> None:
    model = tiny.small_model()
    ids, ends = torch.zeros(9, dtype=torch.int64), torch.tensor([0, 4, 9])
    with pytest.raises(ValueError, match=r"packed input_ids must have shape \(tokens,\).*\(1, 9\)"):
        model.hidden(ids[None], ends, 9)
    with pytest.raises(TypeError, match="cu_seqlens must be an int64 or int32 tensor, got list"):
        model.hidden(ids, [0, 9], 9)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cu_seqlens must .* end with 9, the number of tokens"):
        model.hidden(ids, ends[:2], 9)
    for wrong in ([3, 9], [0, 12, 9]):
        with pytest.raises(ValueError, match="cu_seqlens must ascend from 0"):
            model.hidden(ids, torch.tensor(wrong), 9)
    with pytest.raises(ValueError, match="max_position_embeddings = 256, got 257"):
        model.hidden(ids, ends, 257)
    with pytest.raises(ValueError, match=r"vocab_size = 151\), got 151"):
        model.hidden(ids + 151, ends, 9)


def test_gradients_through_padding() -> None:
    model = tiny.small_model().requires_grad_(True)
    ids = tiny.random_ids(model.config, 1, 9)
    weight = torch.randn(1, 9, model.config.vocab_size)
    grads = []
    for padding in (0, 3):
        padded = torch.nn.functional.pad(ids, (0, padding))
        mask = torch.arange(9 + padding)[None] < 9
        logits = model(padded, mask) if padding else model(ids)
        model.zero_grad()
        (logits[:, :9] * weight).sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert tiny.relative_error(grads[1][name], grad) < 1e-5, name


def test_the_default_dtype_changes_nothing() -> None:
    model = tiny.small_model()
    ids = tiny.random_ids(model.config, 1, 70)
    for cache_dtype in (None, torch.int8):
        logits = model(ids, cache=model.new_cache(1, 80, cache_dtype))
        torch.set_default_dtype(torch.float64)
        try:
            again = model(ids, cache=model.new_cache(1, 80, cache_dtype))
        finally:
            torch.set_default_dtype(torch.float32)
        assert again.dtype == torch.float32
        assert torch.equal(again, logits)


def test_columns_of_padding_alone_do_not_count() -> None:
    model = tiny.small_model()
    context = model.config.max_position_embeddings
    ids = tiny.random_ids(model.config, 2, context + 20)
    mask = torch.zeros_like(ids)
    mask[0, 10:40] = 1
    mask[1, context : context + 9] = 1
    logits = model(ids, mask)
    assert logits.shape[:2] == ids.shape
    for row, tokens in ((0, slice(10, 40)), (1, slice(context, context + 9))):
        alone = model(ids[row : row + 1, tokens])
        assert tiny.relative_error(logits[row : row + 1, tokens], alone) < 1e-5
    assert not logits[mask == 0].any()
    mask[0] = 1
    with pytest.raises(ValueError, match=f"{context + 20} tokens exceed the context"):
        model(ids, mask)
