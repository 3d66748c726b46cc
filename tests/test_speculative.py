"""Drafts change the speed of a text, and nothing else: tokens, distribution, stops, caches."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from gemma2_ext import Gemma2, cli, decode_graph, ops, speculative
from gemma2_ext.chat import Conversation
from gemma2_ext.generate import Sampler
from gemma2_ext.models import shipped_model
from gemma2_ext.speculative import MAX_ROWS, Draft, ModelDraft, NgramDraft, Pace, as_draft
from gemma2_ext.tokenizer import Tokenizer

SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.7, "top_k": 20, "seed": 2},
    {"temperature": 0.5, "top_p": 0.8, "seed": 3},
    {"temperature": 0.8, "min_p": 0.1, "seed": 4},
    {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "min_p": 0.05, "seed": 5},
]


class Liar(Draft):
    """The tokens that the model will draw, the `wrong`-th of each draft excepted."""

    def __init__(self, truth: list[int], wrong: int, length: int) -> None:
        super().__init__(length)
        self.truth, self.wrong = truth, wrong

    def kind(self) -> int:
        return 0

    def propose(self, sampler: Sampler, keys: Tensor) -> list[int]:
        at = len(self.ids)
        tokens = self.truth[at : at + len(keys)]
        return [abs(t - 1) if i == self.wrong else t for i, t in enumerate(tokens)]


def repeating_ids(model: Gemma2, length: int) -> Tensor:
    """A prompt that is the same few tokens over and over."""
    return tiny.random_ids(model.config, 1, 12).repeat(1, length // 12 + 1)[:, :length]


@pytest.mark.parametrize("options", SAMPLINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_text_is_the_same_with_any_draft(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Past the rings' wrap, and up to the end of the context."""
    model = tiny.small_model(dtype=dtype, max_position_embeddings=128)
    small = tiny.small_model(seed=1, num_hidden_layers=1)
    ids = repeating_ids(model, 30)
    plain = model.generate(ids, max_new_tokens=200, stop_ids=(), **options)
    assert plain.shape == (1, 129)
    truth = plain[0].tolist()
    for draft in (
        NgramDraft(5),
        ModelDraft(small, 7),
        Liar(truth, -1, MAX_ROWS - 1),
        Liar(truth, 0, 2),
        Liar(truth, 7, MAX_ROWS - 1),
    ):
        actual = model.generate(ids, max_new_tokens=200, stop_ids=(), draft=draft, **options)
        assert torch.equal(actual, plain), draft
        assert draft.ids == truth
        if isinstance(draft, Liar) and draft.wrong == -1:
            assert draft.acceptance == 1
            assert draft.steps == 1 + math.ceil((98 - 1) / MAX_ROWS)  # the first one is plain
        if isinstance(draft, Liar) and draft.wrong == 7:
            assert 0.4 < draft.acceptance < 0.5  # 7 of 15


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 1},
        {"num_attention_heads": 8, "num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"sliding_window": 1},
        {"sliding_window": 33},
        {"head_dim": 256, "num_hidden_layers": 2},
    ],
    ids=str,
)
def test_logits_of_several_rows_are_those_of_each_alone(changes: dict[str, Any], isa: str) -> None:
    """To the bit, or a draft could change a text: for every group of heads, window and dtype."""
    for dtype, starts in (
        (torch.float32, (1, 250)),
        (torch.bfloat16, (63, 500)),
        (torch.float16, (50,)),
    ):
        model = tiny.small_model(dtype=dtype, max_position_embeddings=1024, **changes)
        ids = tiny.random_ids(model.config, 1, 600)
        for start in starts:
            one, many = model.new_cache(1, 600), model.new_cache(1, 600)
            model(ids[:, :start], cache=one)
            model(ids[:, :start], cache=many)
            rows = [model(ids[:, i : i + 1], cache=one) for i in range(start, start + MAX_ROWS)]
            assert torch.equal(
                model(ids[:, start : start + MAX_ROWS], cache=many), torch.cat(rows, dim=1)
            )


def test_attention_of_several_rows_is_that_of_each_alone(isa: str) -> None:
    """Over splits of the keys, rings and windows whose edges fall between and inside of them."""
    q = torch.randn(1, MAX_ROWS, 4, 64)
    k, v = torch.randn(2, 1, 700, 2, 64)
    for length, window in ((530, None), (700, None), (2000, 256), (1530, 511), (1290, 600)):
        options: dict[str, Any] = {"scale": 0.3, "softcap": 5.0, "window": window}
        together = ops.attention_cache(q, k, v, torch.tensor([length]), **options)
        for i in range(MAX_ROWS):
            # Later keys are in the cache already, but for the slots that they took from older ones.
            alone = ops.attention_cache(
                q[:, i : i + 1], k, v, torch.tensor([length - MAX_ROWS + 1 + i]), **options
            )
            assert torch.equal(alone, together[:, i : i + 1]), (length, window, i)


class Recorded:
    """In place of a CUDA graph on the CPU: what it does is computed again."""

    def __init__(self, compute: Callable[[], None]) -> None:
        self.replay = compute


@pytest.mark.parametrize("options", SAMPLINGS[:3], ids=str)
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 16}], ids=str)
def test_steps_of_a_gpu_give_the_same(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], changes: dict[str, Any]
) -> None:
    """Steps by graphs, computed as they would be captured: anew, behind each other, in place."""
    model = tiny.small_model(max_position_embeddings=128, **changes)
    other = tiny.small_model(max_position_embeddings=128, num_hidden_layers=1)
    ids = repeating_ids(model, 20)
    right = model.generate(ids, max_new_tokens=100, stop_ids=[], **options)
    captured = 0

    def capture(
        device: torch.device, warm_up: Callable[[], None], compute: Callable[[], None], early: bool
    ) -> Recorded:
        nonlocal captured
        captured += 1
        for run in (warm_up, warm_up, compute):
            run()
        return Recorded(compute)

    monkeypatch.setattr(speculative, "_step_graphs", decode_graph.StepGraphs)
    monkeypatch.setattr(decode_graph, "_capture", capture)
    monkeypatch.setattr(decode_graph.StepGraphs, "AFTER_RUNS", 3)
    truth = right[0].tolist()
    for draft in (NgramDraft(3), ModelDraft(other, 3), ModelDraft(other), Liar(truth, 2, 5)):
        out = model.generate(ids, max_new_tokens=100, stop_ids=[], draft=draft, **options)
        assert torch.equal(out, right)
    assert captured >= 4


def test_a_stop_token_inside_an_accepted_run() -> None:
    model = tiny.small_model()
    ids = tiny.random_ids(model.config, 1, 10)
    free = model.generate(ids, max_new_tokens=40, stop_ids=())[0].tolist()
    stop = free[10 + 6]
    stopped = free[: free.index(stop, 10) + 1]
    cache = model.new_cache(1, 64)
    draft = Liar(free, -1, MAX_ROWS - 1)
    actual = model.generate(ids, max_new_tokens=40, stop_ids=[stop], draft=draft, cache=cache)
    assert actual[0].tolist() == stopped == draft.ids
    assert cache.length == len(stopped) - 1
    more = torch.tensor([[stopped[-1], 5]])
    assert torch.equal(
        model.generate(more, max_new_tokens=9, stop_ids=(), draft=draft, cache=cache),
        model.generate(torch.tensor([[*stopped, 5]]), max_new_tokens=9, stop_ids=())[
            :, len(stopped) - 1 :
        ],
    )


@pytest.mark.parametrize("count", [1, 2, 3, 17, 18])
def test_numbers_of_new_tokens(count: int) -> None:
    model = tiny.small_model()
    ids = tiny.random_ids(model.config, 1, 10)
    plain = model.generate(ids, max_new_tokens=count, stop_ids=())
    truth = model.generate(ids, max_new_tokens=60, stop_ids=())[0].tolist()
    draft = Liar(truth, -1, MAX_ROWS - 1)
    actual = model.generate(ids, max_new_tokens=count, stop_ids=(), draft=draft)
    assert torch.equal(actual, plain)
    assert draft.proposed == max(0, count - 2 - draft.steps + 1)
    assert torch.equal(model.generate(ids, max_new_tokens=0, draft="ngram"), ids)


def test_a_stream_that_is_left_leaves_the_cache_usable() -> None:
    model = tiny.small_model()
    ids = tiny.random_ids(model.config, 1, 8)
    whole = model.generate(ids, max_new_tokens=40, stop_ids=())
    draft = Liar(whole[0].tolist(), -1, MAX_ROWS - 1)
    for count in (1, 2, 3, 10, 19):
        cache = model.new_cache(1, 64)
        stream = model.stream(ids, max_new_tokens=40, stop_ids=(), cache=cache, draft=draft)
        seen = [next(stream) for _ in range(count)]
        assert cache.length == 8 + count - 1  # before it is closed, too
        rest = model.generate(
            torch.tensor([seen[-1:]]), max_new_tokens=10, stop_ids=(), cache=cache, draft=draft
        )
        assert [*seen, *rest[0, 1:].tolist()] == whole[0, 8 : 18 + count].tolist()


def test_padding_and_integer_types() -> None:
    model = tiny.small_model()
    ids = tiny.random_ids(model.config, 1, 20).int()
    mask = torch.ones(1, 20, dtype=torch.bool)
    mask[0, [0, 1, 7, 19]] = False
    for draft in ("ngram", ModelDraft(tiny.small_model(seed=1), 4)):
        options: dict[str, Any] = {"max_new_tokens": 20, "attention_mask": mask, "stop_ids": ()}
        actual = model.generate(ids, draft=draft, **options)
        assert actual.dtype == torch.int32
        assert torch.equal(actual, model.generate(ids, **options))


def test_a_draft_that_is_the_model_is_always_right() -> None:
    model = tiny.small_model()
    ids = tiny.random_ids(model.config, 1, 20)
    for options in SAMPLINGS[:3]:
        draft = ModelDraft(model, MAX_ROWS - 1)
        actual = model.generate(ids, max_new_tokens=60, stop_ids=(), draft=draft, **options)
        assert draft.acceptance == 1
        assert torch.equal(actual, model.generate(ids, max_new_tokens=60, stop_ids=(), **options))
    for draft in ("ngram", model):
        actual = model.generate(ids, max_new_tokens=60, stop_ids=(), draft=draft)
        assert torch.equal(actual, model.generate(ids, max_new_tokens=60, stop_ids=()))


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_packed_weights(quantize: Any) -> None:
    model = Gemma2.from_pretrained(shipped_model(), quantize=quantize)
    ids = tiny.random_ids(model.config, 1, 20)
    for options in ({}, {"temperature": 0.8, "seed": 1}):
        plain = model.generate(ids, max_new_tokens=40, stop_ids=(), **options)
        draft = Liar(plain[0].tolist(), 5, MAX_ROWS - 1)
        actual = model.generate(ids, max_new_tokens=40, stop_ids=(), draft=draft, **options)
        assert torch.equal(actual, plain)


def test_a_prompt_of_one_token() -> None:
    model, small = tiny.small_model(), tiny.small_model(seed=1, num_hidden_layers=1)
    ids = tiny.random_ids(model.config, 1, 1)
    right = model.generate(ids, max_new_tokens=8, stop_ids=())
    for draft in (NgramDraft(3), ModelDraft(small, 3), ModelDraft(small)):
        assert torch.equal(model.generate(ids, max_new_tokens=8, stop_ids=(), draft=draft), right)
    # The next answer: of its text the draft's cache has all but the last token.
    draft, cache = ModelDraft(small, 3), model.new_cache(1, 40)
    first = model.generate(ids, max_new_tokens=8, stop_ids=(), draft=draft, cache=cache)
    second = model.generate(first[:, -1:], max_new_tokens=8, stop_ids=(), draft=draft, cache=cache)
    whole = model.generate(ids, max_new_tokens=16, stop_ids=())
    assert torch.equal(second[:, 1:], whole[:, 9:])


def test_the_draft_models_context_may_be_shorter() -> None:
    model = tiny.small_model()
    ids = tiny.random_ids(model.config, 1, 20)
    plain = model.generate(ids, max_new_tokens=60, stop_ids=())
    for context in (16, 20, 21, 40):
        draft = ModelDraft(tiny.small_model(max_position_embeddings=context), 6)
        actual = model.generate(ids, max_new_tokens=60, stop_ids=(), draft=draft)
        assert torch.equal(actual, plain)
        assert (draft.proposed > 0) == (context > 21)


# ---- sampling ------------------------------------------------------------------------------------


def test_a_draws_noise_is_the_tokens_own() -> None:
    """A token's chance to be drawn does not depend on the others', given the keys."""
    sampler = Sampler(temperature=1.0, generator=torch.Generator().manual_seed(0))
    logits = 2 * torch.randn(4000, 50)
    keys = sampler.keys(4000)
    first = sampler(logits, keys)
    assert torch.equal(sampler(logits, keys), first)
    # Making another token less probable changes nothing for the one that came first.
    others = logits.clone()
    others[torch.arange(4000), (first + 1) % 50] -= 1.0
    assert torch.equal(sampler(others, keys), first)
    # As many as two distributions allow: 1 - TV is what no draft can exceed, (1 - TV) / (1 + TV)
    # what this one keeps in the worst case.
    near = logits + 0.5 * torch.randn_like(logits)
    overlap = torch.minimum(logits.softmax(-1), near.softmax(-1)).sum(-1).mean().item()
    equal = (sampler(near, keys) == first).double().mean().item()
    assert overlap / (2 - overlap) - 0.02 < equal < overlap + 0.02


def test_keys_come_one_by_one_or_many_at_once() -> None:
    one = Sampler(temperature=1.0, generator=torch.Generator().manual_seed(7))
    many = Sampler(temperature=1.0, generator=torch.Generator().manual_seed(7))
    assert torch.equal(torch.cat([one.keys(1) for _ in range(40)]), many.keys(40))
    assert len(many.keys(1000).unique()) == 2000
    state = torch.get_rng_state()
    Sampler().keys(5)
    assert torch.equal(torch.get_rng_state(), state)  # greedy draws nothing


@pytest.mark.parametrize("vocab_size", [16383, 16384, 20_001])
def test_tokens_of_a_large_vocabulary_have_their_frequencies(vocab_size: int) -> None:
    """A few likely tokens, at the edges of runs among others, and all the rest together."""
    likely = torch.tensor([0, 1, 511, 512, 513, 5000, 16382, vocab_size - 1])
    logits = torch.randn(1, vocab_size) - 3
    logits[0, likely] = torch.tensor([7.0, 6.0, 6.5, 5.0, 7.2, 4.0, 6.8, 5.5])
    logits[0, 2000:4000] = -math.inf
    sampler = Sampler(temperature=1.25, generator=torch.Generator().manual_seed(3))
    draws = 6000
    keys = sampler.keys(draws)
    drawn = torch.cat([sampler(logits.expand(500, -1), part) for part in keys.split(500)])
    assert torch.equal(drawn[:3], torch.cat([sampler(logits, keys[i : i + 1]) for i in range(3)]))
    assert not ((drawn >= 2000) & (drawn < 4000)).any()
    assert (drawn >= 0).all() and (drawn < vocab_size).all()
    expected = draws * (logits / 1.25).softmax(-1)[0]
    counts = torch.bincount(drawn, minlength=vocab_size).float()
    chi_square, classes = 0.0, 0
    rest, quarter = torch.ones(vocab_size, dtype=torch.bool), torch.arange(vocab_size) * 4
    rest[likely] = False
    parts = [torch.tensor([i]) for i in likely.unique()]
    parts += [(rest & (quarter // vocab_size == q)).nonzero()[:, 0] for q in range(4)]
    for part in parts:
        mean = expected[part].sum().item()
        assert mean > 20
        chi_square += (counts[part].sum().item() - mean) ** 2 / mean
        classes += 1
    assert chi_square < classes - 1 + 5 * math.sqrt(2 * (classes - 1)), chi_square


def test_alike_distributions_draw_alike_from_a_large_vocabulary() -> None:
    """Each of the two steps keeps (1 - TV) / (1 + TV) or more; no draft keeps more than 1 - TV."""
    sampler = Sampler(temperature=1.0, generator=torch.Generator().manual_seed(0))
    draws = 300
    logits = 3 * torch.randn(draws, 30_000)
    keys = sampler.keys(draws)
    near = logits + 0.1 * torch.randn_like(logits)
    overlap = torch.minimum(logits.softmax(-1), near.softmax(-1)).sum(-1).mean().item()
    equal = (sampler(near, keys) == sampler(logits, keys)).double().mean().item()
    deviation = math.sqrt(overlap * (1 - overlap) / draws)
    assert equal > (overlap / (2 - overlap)) ** 2 - 5 * deviation
    assert equal < overlap + 5 * deviation


@pytest.mark.parametrize("options", [{"temperature": 8.0}, {"temperature": 6.0, "top_k": 4}])
def test_two_tokens_have_their_joint_distribution(options: dict[str, Any]) -> None:
    """The frequency of each pair, by a chi-square test at five standard deviations."""
    config = tiny.small_config(vocab_size=7, num_hidden_layers=2)
    model = Gemma2(config, tiny.random_weights(config))
    draft = ModelDraft(Gemma2(config, tiny.random_weights(config, seed=1)), 2)
    ids = tiny.random_ids(config, 1, 5)
    draws = 1000
    pairs: Counter[tuple[int, int]] = Counter()
    for seed in range(draws):
        # The first token comes out of the prompt: the two behind it are drafted.
        new = model.generate(
            ids.repeat(1, 2), max_new_tokens=3, seed=seed, stop_ids=(), draft=draft, **options
        )
        pairs[tuple(new[0, -2:].tolist())] += 1
    assert draft.pace.plain_seconds > 0

    def distribution(prompt: list[int]) -> Tensor:
        logits = model(torch.tensor([prompt]))[0, -1].double() / options["temperature"]
        if k := options.get("top_k"):
            logits[logits < logits.topk(k).values[-1]] = -math.inf
        return logits.softmax(-1)

    prompt = ids[0].tolist() * 2
    expected = torch.zeros(7, 7, dtype=torch.float64)
    for a, pa in enumerate(distribution(prompt).tolist()):
        if pa == 0:
            continue
        for b, pb in enumerate(distribution([*prompt, a]).tolist()):
            if pb:
                expected[b] += pa * pb * distribution([*prompt, a, b])
    actual = torch.zeros(7, 7, dtype=torch.float64)
    for (b, c), n in pairs.items():
        actual[b, c] = n
    expected *= draws
    assert actual[expected == 0].sum() == 0
    often = expected >= 5
    chi_square = ((actual - expected)[often] ** 2 / expected[often]).sum().item()
    freedom = int(often.sum()) - 1
    assert freedom >= 5
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


# ---- drafts --------------------------------------------------------------------------------------


def proposal(ids: list[int], count: int) -> tuple[int, list[int]]:
    draft = NgramDraft()
    draft.begin(0, ids)
    kind = draft.kind()
    return kind, draft.propose(Sampler(), torch.empty(count, 2)) if kind >= 0 else []


def test_prompt_look_up() -> None:
    assert proposal([1, 2, 3, 4, 1, 2], 2) == (2, [3, 4])
    assert proposal([1, 2, 3, 4], 2) == (-1, [])
    assert proposal([1], 2) == (-1, [])
    # The longest match, not the last one; the last one of equals.
    assert proposal([9, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2], 2) == (3, [3, 8])
    assert proposal([1, 2, 3, 8, 1, 2, 4, 9, 5, 1, 2], 2) == (2, [4, 9])
    # A match up to the end goes on in itself.
    assert proposal([7, 8, 9, 7, 8, 9, 7, 8], 7) == (5, [9, 7, 8, 9, 7, 8, 9])
    assert proposal([4, 4, 4], 3) == (2, [4, 4, 4])
    assert proposal(list(range(20)) * 2, 3)[0] == 16


def test_an_answer_begins_where_the_cache_ends() -> None:
    draft = NgramDraft()
    draft.begin(0, [1, 2, 3, 4, 1, 2])
    draft.kind()
    draft.begin(3, [5, 6, 2, 3])  # 4, 1, 2 were taken back
    assert draft.ids == [1, 2, 3, 5, 6, 2, 3]
    assert draft.kind() == 2
    assert draft.propose(Sampler(), torch.empty(2, 2)) == [5, 6]
    fresh = NgramDraft()
    fresh.begin(4, [8, 9, 7, 8, 9])  # four tokens that it has not seen
    assert fresh.kind() == 2
    assert fresh.propose(Sampler(), torch.empty(1, 2)) == [7]


def test_pace() -> None:
    """Long drafts where they are right, none where they are wrong, what pays in between."""
    pace = Pace()
    assert pace.length(2, 15) == 0  # nothing is known yet
    pace.record(-1, 0, 0, 0.0, 1.0)
    for rows in range(2, 17):
        pace.record(9, rows - 1, rows - 1, 0.0, 1.0 + 0.05 * (rows - 1))
    assert pace.length(9, 15) == 15
    assert pace.length(9, 4) == 4
    for _ in range(40):
        pace.record(3, 1, 0, 0.0, 1.05)
    assert pace.length(3, 15) == 0
    assert pace.length(9, 15) == 15  # kinds are apart
    for _ in range(60):
        pace.record(5, 4, 3, 0.0, 1.2)  # right three times of four
    assert pace.length(5, 15) == 0  # time to measure a step without a draft
    pace.record(-1, 0, 0, 0.0, 1.0)
    assert 2 <= pace.length(5, 15) <= 8
    for _ in range(1000):
        if pace.length(3, 15):
            break
    else:
        pytest.fail("a kind that was wrong is never tried again")
    # A draft that takes as long as the model never pays.
    slow = Pace()
    slow.record(-1, 0, 0, 0.0, 1.0)
    for _ in range(10):
        slow.record(0, 3, 3, 3.0, 1.1)
    assert slow.length(0, 15) == 0
    fixed = Pace(4)
    fixed.record(-1, 0, 0, 0.0, 1.0)
    assert [fixed.length(0, most) for most in (15, 4, 2, 0)] == [4, 4, 2, 0]
    assert pace.plain_seconds == 1.0


def test_errors() -> None:
    model = tiny.small_model()
    ids = tiny.random_ids(model.config, 1, 8)
    with pytest.raises(ValueError, match="draft must be 'ngram', a model or a Draft, got 'magic'"):
        model.generate(ids, draft="magic")
    with pytest.raises(TypeError, match="draft must be 'ngram', a model or a Draft, got int"):
        model.generate(ids, draft=3)
    with pytest.raises(ValueError, match="a draft serves one row, got 2"):
        model.generate(ids.repeat(2, 1), draft="ngram")
    other = tiny.small_model(vocab_size=152)
    for call in (model.generate, model.stream):
        with pytest.raises(ValueError, match="must have the model's vocab_size 151, got 152"):
            call(ids, draft=other)
    for length in (0, MAX_ROWS):
        with pytest.raises(ValueError, match=f"length must be from 1 to 15, got {length}"):
            NgramDraft(length)
    cache = model.new_cache(1, 64)
    model.generate(ids, max_new_tokens=4, cache=cache)
    with pytest.raises(ValueError, match=r"cache holds \d+ tokens, of which the draft has seen 0"):
        model.generate(ids, cache=cache, draft=model)
    assert isinstance(as_draft(model), ModelDraft)


def test_a_conversation_keeps_its_draft() -> None:
    folder = shipped_model()
    model, tokenizer = Gemma2.from_pretrained(folder), Tokenizer.from_pretrained(folder)
    answers = []
    for draft in (None, NgramDraft(3), ModelDraft(model, 4)):
        conversation = Conversation(model, tokenizer, draft=draft, temperature=0.8, seed=1)
        texts = ["".join(conversation.answer("Who art thou?", max_new_tokens=12))]
        pieces = iter(conversation.answer("And thy name?"))
        for _ in range(3):
            next(pieces)
        texts.append("".join(conversation.answer("Speak again.", max_new_tokens=12)))
        answers.append((texts, conversation.ids))
        if draft:
            assert draft.ids == conversation.ids
    assert answers[0] == answers[1] == answers[2]


# ---- the command line ----------------------------------------------------------------------------


def test_cli(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["generate", "to be or not to be or not to be or", "--max-new-tokens", "40"]
    assert cli.main(args) == 0
    plain = capsys.readouterr().out
    for draft in ("ngram", str(shipped_model())):
        assert cli.main([*args, "--draft", draft]) == 0
        out, err = capsys.readouterr()
        assert out == plain
        assert re.search(
            r"; draft \d+ of \d+ accepted \(\d+%\), [\d.]+ tokens a step, speed-up [\d.]+\]\n", err
        )
        assert cli.main([*args, "--draft", draft, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        facts = result["draft"]
        assert result["text"] + "\n" == plain
        assert facts["proposed_tokens"] >= facts["accepted_tokens"] >= 0
        assert facts["tokens_per_step"] == (result["new_tokens"] - 1) / facts["steps"]
        assert facts["speed_up"] > 0
    assert cli.main([*args, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["draft"] is None

    assert cli.main([*args, "--draft", "/nowhere"]) == 2
    assert "/nowhere" in capsys.readouterr().err
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shipped_model() / file, tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace('"<pad>"', '"<pat>"'))
    assert cli.main([*args, "--draft", str(tmp_path)]) == 2
    assert re.search(r"--draft: token 0 of .* is another than that of", capsys.readouterr().err)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("2048", "2049"))
    assert cli.main([*args, "--draft", str(tmp_path)]) == 2
    assert re.search(r"--draft: the model must have the vocab_size 2048", capsys.readouterr().err)
