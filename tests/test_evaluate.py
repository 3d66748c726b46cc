"""Perplexity against the reference model's, window by window."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gemma2_ext import Gemma2, Gemma2Config, evaluate, ops, reference
from gemma2_ext.evaluate import PerplexityResult, perplexity, windows


@pytest.fixture(scope="module")
def model() -> Gemma2:
    torch.manual_seed(1)
    config = Gemma2Config(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=64,
        sliding_window=5,
    )
    model = Gemma2(config)
    with torch.no_grad():  # predictions far from uniform, so that an error shows
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
    return model


def expected_nll(model: Gemma2, ids: Tensor, context: int, stride: int) -> float:
    """Each window in one pass of the reference in float64."""
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    bos, text = ids[:1], ids[1:]
    total, end = 0.0, 0
    while end < len(text):
        first, end = end, min(len(text), end + stride if end else context)
        seen = torch.cat([bos, text[max(0, end - context) : end]])
        logits = reference.forward(model.config, weights, seen[None, :-1])[0]
        scored = end - first
        total += F.cross_entropy(logits[-scored:], seen[-scored:], reduction="sum").item()
    return total


@pytest.mark.parametrize(
    ("seqlen", "context", "stride"),
    [(2, 64, 32), (40, 64, 64), (65, 64, 32), (150, 64, 24), (150, 16, 1), (31, 1, 1), (90, 7, 7)],
)
def test_perplexity_is_the_references(model: Gemma2, seqlen: int, context: int, stride: int):
    ids = torch.randint(0, 101, (seqlen,))
    result = perplexity(model, ids, context=context, stride=stride, num_bytes=3 * seqlen)
    nll = expected_nll(model, ids, context, stride)
    assert result.num_tokens == seqlen - 1
    assert result.nll == pytest.approx(nll, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nll / (seqlen - 1)), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(nll / math.log(2) / (3 * seqlen), rel=1e-5)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_packed_weights_in_pieces(
    model: Gemma2, monkeypatch: pytest.MonkeyPatch, format: Literal["int8", "int4"]
):
    weights = dict(model.named_parameters())
    packed = {
        n: ops.quantize(w.detach(), format) if w.dim() == 2 else w for n, w in weights.items()
    }
    model = Gemma2(model.config, packed)
    ids = torch.randint(0, 101, (60,))
    logits = model(ids[None, :-1], cache=model.new_cache(1, 59))[0].double()  # in the same chunks
    expected = F.cross_entropy(logits, ids[1:], reduction="sum").item()
    for rows in (7, 1000):
        monkeypatch.setattr(evaluate, "LOGITS_BYTES", rows * 4 * 101)
        assert perplexity(model, ids.tolist()).nll == pytest.approx(expected, rel=1e-5)


def test_defaults_are_the_models_context_and_half_of_it(model: Gemma2):
    ids = torch.randint(0, 101, (150,))
    assert perplexity(model, ids).nll == perplexity(model, ids, context=64, stride=32).nll


@given(st.integers(1, 200), st.integers(1, 50), st.data())
def test_windows_score_each_token_once_with_enough_context(
    num_tokens: int, context: int, data: st.DataObject
):
    stride = data.draw(st.integers(1, context))
    scored = []
    for begin, first, end in windows(num_tokens, context, stride):
        assert 0 <= begin <= first < end
        assert end - begin <= context
        assert begin == 0 or first - begin >= context - stride
        scored += range(first, end)
    assert scored == list(range(num_tokens))


def test_result_without_bytes_or_beyond_floats():
    assert PerplexityResult(10.0, 5).bits_per_byte is None
    assert PerplexityResult(1e6, 5).perplexity == math.inf


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([2], {}, r"at least two tokens, .* got \(1,\)"),
        ([], {}, r"at least two tokens, .* got \(0,\)"),
        ([[2, 3]], {}, r"shape \(seqlen,\) .* got \(1, 2\)"),
        ([2, 101], {}, r"token ids must be in \[0, vocab_size = 101\), got 2 to 101"),
        ([2, -1], {}, r"token ids must be in \[0, vocab_size = 101\), got -1 to 2"),
        ([2, 3], {"context": 0}, r"context must be between 1 and .* = 64, got 0"),
        ([2, 3], {"context": 65}, r"context must be between 1 and .* = 64, got 65"),
        ([2, 3], {"stride": 0}, r"stride must be between 1 and context = 64, got 0"),
        ([2, 3], {"context": 8, "stride": 9}, r"stride must be between 1 and context = 8, got 9"),
    ],
)
def test_bad_input_is_refused(model: Gemma2, ids: list, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        perplexity(model, ids, **options)


def test_floats_are_refused(model: Gemma2):
    with pytest.raises(TypeError, match="int64 or int32, got torch.float32"):
        perplexity(model, [2.0, 3.0])
