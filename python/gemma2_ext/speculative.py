"""Speculative decoding: a cheap draft of the next tokens, which one pass of the model checks.

    ids: ... a b           the draft says c d e; one forward pass over b c d e gives what the model
    model draws: c d x     itself draws after each of them: c and d were right, x stands in for e

The model draws every token itself, with the random numbers that it would have used without a
draft, and a row's logits do not depend on the rows beside it. So the text is the same, token by
token, with any draft or none, greedy or sampled, and the distribution with it. A draft model that
draws with the same random numbers guesses right nearly as often as two distributions allow.
Source: prompt look-up as in transformers' prompt_lookup_num_tokens; drafts by a smaller model:
arXiv 2211.17192; common random numbers in place of its rejections: arXiv 2408.07978.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .cache import MIN_SLACK, KVCache
from .decode_graph import StepGraphs

if TYPE_CHECKING:
    from .generate import Sampler
    from .model import Gemma2

# Tokens that one pass checks at most, the last one drawn included: as many rows as the kernels
# compute each as if it were alone, and as many as every ring takes back.
MAX_ROWS = MIN_SLACK
# Fewest tokens that have to occur again for what followed them to be a draft, and most that are
# compared.
MIN_MATCH, MAX_MATCH = 2, 16
# Earlier occurrences that are compared.
CANDIDATES = 16


class Pace:
    """How many tokens to draft: as many as give most tokens a second, by what was measured so far.

    A token of a draft of some kind is right with probability a, so a step with n of them gives
    (1 - a^(n + 1)) / (1 - a) tokens. It takes the time of a pass over n + 1 rows and n times that
    of drafting a token.
    """

    # Right and wrong tokens that a kind of draft starts with, and is drawn back to while unused.
    PRIOR = (1.2, 0.8)
    # A step without a draft is measured anew after so many with one.
    PLAIN_EVERY = 100

    def __init__(self, fixed: int | None = None) -> None:
        self._fixed = fixed
        self._row_seconds: dict[int, float] = {}
        self._draft_seconds = 0.0
        self._right: dict[int, tuple[float, float]] = {}
        self._since_plain = 0

    @property
    def plain_seconds(self) -> float:
        """A step's time without a draft; 0 where there was none."""
        return self._row_seconds.get(1, 0.0)

    def seconds(self, rows: int) -> float:
        """A step's time over so many rows, between those measured."""
        known = sorted(self._row_seconds)
        above = next((r for r in known if r >= rows), None)
        below = next((r for r in reversed(known) if r <= rows), None)
        assert below is not None  # the first step is over one row
        low = self._row_seconds[below]
        if above is None or above == below:
            # Past the widest one measured: a tenth of a row's own time for each more.
            return low + (rows - below) * 0.1 * self.plain_seconds
        part = (rows - below) / (above - below)
        return low + part * (self._row_seconds[above] - low)

    def length(self, kind: int, most: int) -> int:
        """The number of tokens to draft, 0 to `most`."""
        if not self._row_seconds or self._since_plain >= self.PLAIN_EVERY:
            return 0
        if self._fixed is not None:
            return min(self._fixed, most)
        right, wrong = self._right.get(kind, self.PRIOR)
        a = right / (right + wrong)
        best, best_rate, tokens = 0, 1 / self.plain_seconds, 1.0
        for n in range(1, most + 1):
            tokens += a**n
            rate = tokens / (self.seconds(n + 1) + n * self._draft_seconds)
            if rate > best_rate:
                best, best_rate = n, rate
        if best == 0:
            # Drawn towards the prior, so that this kind has another chance some day.
            keep = 0.98
            self._right[kind] = (
                keep * right + (1 - keep) * self.PRIOR[0],
                keep * wrong + (1 - keep) * self.PRIOR[1],
            )
        return best

    def record(self, kind: int, proposed: int, accepted: int, draft: float, model: float) -> None:
        """Counts a step: tokens, and the seconds of drafting and of the model's pass."""

        def average(old: float | None, new: float) -> float:
            # One step that the machine was busy elsewhere must not count for many.
            return new if not old else old + 0.2 * (min(new, 2 * old) - old)

        rows = proposed + 1
        self._row_seconds[rows] = average(self._row_seconds.get(rows), model)
        self._since_plain = self._since_plain + 1 if proposed else 0
        if not proposed:
            return
        self._draft_seconds = average(self._draft_seconds, draft / proposed)
        right, wrong = self._right.get(kind, self.PRIOR)
        keep = 0.9
        self._right[kind] = (keep * right + accepted, keep * wrong + (accepted < proposed))


class Draft(ABC):
    """Guesses tokens; it serves one conversation at a time, whose tokens it remembers.

    Args:
        length: tokens to draft for each pass of the model, 1 to MAX_ROWS - 1; None: as many as pay,
            by what acceptance and passes have been so far.

    Attributes:
        ids: the tokens so far.
        steps, proposed, accepted: passes of the model in the current answer, tokens drafted for
            them, and those that were right.
        pace: how long drafts are; learnt over all answers.
    """

    def __init__(self, length: int | None = None) -> None:
        if length is not None and not 1 <= length < MAX_ROWS:
            raise ValueError(
                f"{type(self).__name__}: length must be from 1 to {MAX_ROWS - 1}, got {length}"
            )
        self.ids: list[int] = []
        self.pace = Pace(length)
        self.steps = self.proposed = self.accepted = 0

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that were right; 0 where none was drafted."""
        return self.accepted / self.proposed if self.proposed else 0.0

    def check(self, model: Gemma2, held: int) -> None:
        """Whether it can serve a model whose cache holds so many tokens.

        Raises:
            ValueError: it has not seen them, or has another vocabulary.
        """
        if len(self.ids) < held:
            raise ValueError(
                f"generate: the cache holds {held} tokens, of which the draft has seen "
                f"{len(self.ids)}: give every call with this cache the same draft object"
            )

    def begin(self, held: int, ids: list[int]) -> None:
        """Starts an answer: `held` tokens of before stand, and `ids` follow them."""
        self.ids[held:] = ids
        self.steps = self.proposed = self.accepted = 0

    def record(
        self, kind: int, proposed: int, right: int, draft_seconds: float, model_seconds: float
    ) -> None:
        """Counts a step."""
        self.steps += 1
        self.proposed += proposed
        self.accepted += right
        self.pace.record(kind, proposed, right, draft_seconds, model_seconds)

    @abstractmethod
    def kind(self) -> int:
        """Which kind of draft the next one is, as `Pace` tells them apart; -1: there is none."""

    @abstractmethod
    def propose(self, sampler: Sampler, keys: Tensor) -> list[int]:
        """Tokens that may follow, at most one a key: `sampler` will draw them with these."""


class NgramDraft(Draft):
    """Prompt look-up: what followed the longest earlier occurrence of the last tokens.

    It costs nothing and helps where a text repeats itself: summaries, code, quotations.
    """

    def __init__(self, length: int | None = None) -> None:
        super().__init__(length)
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self._indexed = 0
        self._source = 0

    def check(self, model: Gemma2, held: int) -> None:
        """See `Draft.check`. What it has not seen it only does not find."""

    def begin(self, held: int, ids: list[int]) -> None:
        """See `Draft.begin`."""
        self.ids += [-1] * (held - len(self.ids))
        super().begin(held, ids)
        self._ends.clear()
        self._indexed = 0

    def kind(self) -> int:
        """The length of the match."""
        ids = self.ids
        for end in range(max(self._indexed, MIN_MATCH), len(ids)):
            self._ends.setdefault(tuple(ids[end - MIN_MATCH : end]), []).append(end)
        self._indexed = max(self._indexed, len(ids))
        best = -1
        for end in reversed(self._ends.get(tuple(ids[-MIN_MATCH:]), [])[-CANDIDATES:]):
            length = MIN_MATCH
            while length < min(end, MAX_MATCH) and ids[end - length - 1] == ids[-length - 1]:
                length += 1
            if length > best:
                best, self._source = length, end
        return best

    def propose(self, sampler: Sampler, keys: Tensor) -> list[int]:
        """See `Draft.propose`. A match that reaches the end goes on into its own continuation."""
        period = len(self.ids) - self._source
        return [self.ids[self._source + i % period] for i in range(len(keys))]


class ModelDraft(Draft):
    """A smaller model with the same vocabulary.

    Args:
        model: the smaller model.
        length: as for `Draft`.
    """

    def __init__(self, model: Gemma2, length: int | None = None) -> None:
        super().__init__(length)
        self.model = model
        self._cache: KVCache | None = None
        self._steps: StepGraphs | None = None

    def check(self, model: Gemma2, held: int) -> None:
        """See `Draft.check`."""
        super().check(model, held)
        ours, theirs = self.model.config.vocab_size, model.config.vocab_size
        if ours != theirs:
            raise ValueError(
                f"generate: the draft model must have the model's vocab_size {theirs}, got {ours}"
            )

    def begin(self, held: int, ids: list[int]) -> None:
        """See `Draft.begin`."""
        super().begin(held, ids)
        if self._cache is None:
            self._cache = self.model.new_cache(1)
            self._steps = _step_graphs(self.model, self._cache)
        self._forget(held)
        if self.kind() == 0 and len(self.ids) - 1 > self._cache.length:
            self._feed(self.ids[:-1])

    def kind(self) -> int:
        """0 as long as the text is within the smaller model's context."""
        assert self._cache is not None
        return 0 if len(self.ids) < self._cache.max_length else -1

    def propose(self, sampler: Sampler, keys: Tensor) -> list[int]:
        """See `Draft.propose`."""
        assert self._cache is not None
        self._forget(len(self.ids) - 1)
        tokens: list[int] = []
        for key in keys[: self._cache.max_length - len(self.ids) + 1]:
            tokens.append(int(sampler(self._feed(self.ids + tokens), key[None])))
        if self._steps is not None and tokens:
            self._steps.capture()
        return tokens

    def _forget(self, held: int) -> None:
        """Takes back what the cache holds beyond the first `held` tokens."""
        assert self._cache is not None
        back = self._cache.length - held
        if back > self._cache.chunk_size:
            self._cache.reset()
        elif back > 0:
            self._cache.rewind(back)

    def _feed(self, ids: list[int]) -> Tensor:
        """The logits after `ids`, of which the cache holds the first ones."""
        assert self._cache is not None
        new = ids[self._cache.length :]
        if self._steps is not None and len(new) <= MAX_ROWS:
            return self._steps.logits(new)[-1:]
        return self.model(torch.tensor([new]), cache=self._cache, last_only=True)[:, 0]


def as_draft(draft: str | nn.Module | Draft) -> Draft:
    """The draft that `generate` was asked for.

    Args:
        draft: "ngram", a smaller model, or a `Draft`, which a conversation's calls share.

    Raises:
        ValueError, TypeError: it is none of these.
    """
    if isinstance(draft, Draft):
        return draft
    if isinstance(draft, str):
        if draft != "ngram":
            raise ValueError(f"generate: draft must be 'ngram', a model or a Draft, got {draft!r}")
        return NgramDraft()
    if isinstance(draft, nn.Module) and hasattr(draft, "new_cache"):
        return ModelDraft(draft)  # type: ignore[arg-type]
    raise TypeError(
        f"generate: draft must be 'ngram', a model or a Draft, got {type(draft).__name__}"
    )


def _step_graphs(model: Gemma2, cache: KVCache) -> StepGraphs | None:
    """Where a step's launches would cost more than the step."""
    return StepGraphs(model, cache) if model.device.type == "cuda" else None


class _Keys:
    """The keys of the tokens to come, in the order in which plain decoding would draw them."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._ahead = sampler.keys(0)

    def first(self, count: int) -> Tensor:
        if (missing := count - len(self._ahead)) > 0:
            self._ahead = torch.cat([self._ahead, self._sampler.keys(missing)])
        return self._ahead[:count]

    def drop(self, count: int) -> None:
        self._ahead = self._ahead[count:]


def speculate(
    model: Gemma2,
    input_ids: Tensor,
    max_new_tokens: int,
    sampler: Sampler,
    attention_mask: Tensor | None,
    cache: KVCache,
    stop_ids: Collection[int],
    draft: Draft,
) -> Iterator[Tensor]:
    """Yields the tokens (1,) of `generate` with a draft that has begun.

    Arguments as for `generate`, checked. Whenever a token is handed out, the cache holds all but
    that one.
    """
    keys, steps = _Keys(sampler), _step_graphs(model, cache)
    mask, fed, proposal, kind, drawn = attention_mask, input_ids, list[int](), -1, 0
    given = input_ids[0] if mask is None else input_ids[mask != 0]
    with torch.inference_mode():
        draft.begin(cache.length, given.tolist())
    while drawn < max_new_tokens:
        start = time.perf_counter()
        with torch.inference_mode():
            if drawn:
                kind = draft.kind()
                room = min(max_new_tokens - drawn, cache.max_length - cache.length, MAX_ROWS)
                length = draft.pace.length(kind, room - 1) if kind >= 0 else 0
                proposal = draft.propose(sampler, keys.first(length)) if length else []
                mask, fed = None, torch.tensor([[draft.ids[-1], *proposal]])
            drafted = time.perf_counter()
            if drawn and steps is not None:
                logits = steps.logits(fed[0].tolist())
            else:
                logits = model(fed, mask, cache=cache, last_only=not proposal)[0]
            tokens = sampler(logits, keys.first(len(logits))).tolist()
        right = 0
        while right < len(proposal) and proposal[right] == tokens[right]:
            right += 1
        keys.drop(right + 1)
        if proposal:
            # Taken back, and counted again one by one as they are handed out.
            cache.rewind(len(proposal))
        if drawn:
            end = time.perf_counter()
            draft.record(kind, len(proposal), right, drafted - start, end - drafted)
            if steps is not None:
                with torch.inference_mode():
                    steps.capture()
        for i, token in enumerate(tokens[: right + 1]):
            if i:
                cache.commit([1])
            draft.ids.append(token)
            drawn += 1
            yield torch.tensor([token])
            if token in stop_ids or cache.length >= cache.max_length:
                return
