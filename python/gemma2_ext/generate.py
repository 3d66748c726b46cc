"""From logits to tokens: sampling, batches that stop each on their own, and a stream."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cache import KVCache
from .decode_graph import DecodeGraph, decode
from .speculative import Draft, as_draft, speculate

if TYPE_CHECKING:
    from .model import Gemma2

# <eos> and <end_of_turn>: Gemma 2 ends an answer with either.
STOP_IDS = (1, 107)
PAD_ID = 0
LEAST_TEMPERATURE = 1e-30  # 1 / temperature is to be a float32; of less the draws are the same

_argmax_out = torch.ops.gemma2_ext.argmax_out.default
_draw_out = torch.ops.gemma2_ext.draw_out.default


@dataclass(frozen=True)
class Sampler:
    """Draws a token from logits.

    Filters apply in this order: temperature, top_k, top_p, min_p, as in transformers. Of equal
    logits the first count as the more probable. Where the largest logit is NaN or infinite, its
    first token is drawn.

    Args:
        temperature: logits are divided by it; 0 takes the largest logit, whatever else is set.
        top_k: only the k most probable tokens.
        top_p: only the most probable tokens that together carry top_p, the one that reaches it
            included.
        min_p: only tokens at least min_p times as probable as the most probable one.
        generator: of random numbers; None: torch's own.

    Raises:
        ValueError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"generate: temperature must be at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"generate: top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"generate: top_p must be in (0, 1], got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"generate: min_p must be in [0, 1], got {self.min_p}")

    def keys(self, count: int) -> Tensor:
        """The keys (count, 2) int32 of the next draws' random numbers."""
        if self.temperature == 0:
            return torch.empty(count, 2, dtype=torch.int32)
        numbers = torch.randint(-(1 << 31), 1 << 31, (count, 2), generator=self.generator)
        return numbers.int()

    def __call__(self, logits: Tensor, keys: Tensor | None = None) -> Tensor:
        """(batch, vocab_size) float32 -> (batch,) int64.

        The same keys (batch, 2) and logits give the same tokens; None: the next ones.
        """
        if self.temperature == 0:
            return _most_probable(logits)
        if keys is None:
            keys = self.keys(logits.shape[0])
        tokens = logits.new_empty(len(logits), dtype=torch.int64)
        filters = self.top_k or 0, 1.0 if self.top_p is None else self.top_p, self.min_p or 0.0
        temperature = max(self.temperature, LEAST_TEMPERATURE)
        _draw_out(logits, keys.to(logits.device), temperature, *filters, tokens)
        return tokens


def _most_probable(logits: Tensor) -> Tensor:
    """argmax of each row: (batch, vocab_size) -> (batch,); of equals the first."""
    if logits.device.type not in ("cpu", "cuda"):
        return logits.argmax(-1)
    tokens = logits.new_empty(len(logits), dtype=torch.int64)
    _argmax_out(logits, tokens)
    return tokens


def generate(
    model: Gemma2,
    input_ids: Tensor,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    attention_mask: Tensor | None = None,
    cache: KVCache | None = None,
    stop_ids: Sequence[int] | None = None,
    draft: str | Gemma2 | Draft | None = None,
) -> Tensor:
    """Continues each row until it draws a stop token, by at most max_new_tokens.

    All rows end where the longest one comes to the context's end.

    Args:
        model: the model.
        input_ids: (batch, seqlen) int64 or int32; with a cache, the tokens it does not hold yet.
        max_new_tokens: at least 0.
        temperature, top_k, top_p, min_p: see `Sampler`.
        seed: of the random numbers, for a result that can be repeated on the same kind of device;
            None: torch's generator.
        attention_mask: (batch, seqlen), true where input_ids holds a token; padding on any side.
        cache: continued, and left holding all tokens but the last one drawn; None: a fresh one.
        stop_ids: tokens that end a row; None: 1 (<eos>) and 107 (<end_of_turn>).
        draft: what guesses tokens that one pass of the model then checks: "ngram" (what followed
            the same tokens before), a smaller model of the same vocabulary, or a
            `speculative.Draft` that calls with the same cache share. One row only. The tokens are
            those drawn without it (on a GPU but where two are equal to the logits' last bits).

    Returns:
        (batch, seqlen + n), input_ids' dtype: the prompt as given, then the new tokens with the
        stop token included, and 0 (<pad>) after it.

    Raises:
        TypeError, ValueError: see `Gemma2.forward` and `Sampler`; a prompt that does not fit the
            context or the cache; a draft for more than one row, or with another vocabulary.
    """
    sampler = _sampler(temperature, top_k, top_p, min_p, seed)
    new = list(
        _steps(model, input_ids, max_new_tokens, sampler, attention_mask, cache, stop_ids, draft)
    )
    if not new:
        return input_ids.clone()
    return torch.cat([input_ids, torch.stack(new, dim=1).to(input_ids)], dim=1)


def stream(
    model: Gemma2,
    input_ids: Tensor,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    attention_mask: Tensor | None = None,
    cache: KVCache | None = None,
    stop_ids: Sequence[int] | None = None,
    draft: str | Gemma2 | Draft | None = None,
) -> Iterator[int]:
    """The tokens that `generate` would append to one prompt, each as soon as it is drawn.

    Arguments as for `generate`, with input_ids of shape (1, seqlen). The stop token is yielded too.
    Closing the iterator early leaves the cache holding every token yielded but the last.

    Raises:
        ValueError: input_ids has more than one row; else as `generate`. Arguments are checked at
            the call, not at the first token.
    """
    if isinstance(input_ids, Tensor) and input_ids.dim() == 2 and input_ids.shape[0] != 1:
        raise ValueError(f"stream: one prompt at a time, got {input_ids.shape[0]} rows")
    sampler = _sampler(temperature, top_k, top_p, min_p, seed)
    steps = _steps(
        model, input_ids, max_new_tokens, sampler, attention_mask, cache, stop_ids, draft
    )
    return (int(tokens) for tokens in steps)


def _sampler(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    seed: int | None,
) -> Sampler:
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise ValueError(f"generate: seed must have 64 bits, got {seed}")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return Sampler(temperature, top_k, top_p, min_p, generator)


def _steps(
    model: Gemma2,
    input_ids: Tensor,
    max_new_tokens: int,
    sampler: Sampler,
    attention_mask: Tensor | None,
    cache: KVCache | None,
    stop_ids: Sequence[int] | None,
    draft: str | Gemma2 | Draft | None,
) -> Iterator[Tensor]:
    """Checks the arguments, then yields each step's tokens (batch,): 0 in rows that stopped."""
    if operator.index(max_new_tokens) < 0:
        raise ValueError(f"generate: max_new_tokens must be at least 0, got {max_new_tokens}")
    model._check_input(input_ids, attention_mask, cache)
    batch = input_ids.shape[0]
    counts = [input_ids.shape[1]] * batch
    if attention_mask is not None:
        counts = (attention_mask != 0).sum(-1).tolist()
    if cache is None:
        longest, context = max(counts), model.config.max_position_embeddings
        if longest > context:
            raise ValueError(
                f"generate: the prompt's {longest} tokens exceed the context, "
                f"max_position_embeddings = {context}"
            )
        cache = model.new_cache(batch, max(1, min(longest + max_new_tokens, context)))
    else:
        cache.check_room(counts)
    stops = _stops(stop_ids)
    if draft is None and model.device.type == "cuda":
        return _run_on_cuda(model, input_ids, max_new_tokens, sampler, attention_mask, cache, stops)
    if draft is None:
        return _run(model, input_ids, max_new_tokens, sampler, attention_mask, cache, stops)
    if batch != 1:
        raise ValueError(f"generate: a draft serves one row, got {batch}")
    draft = as_draft(draft)
    draft.check(model, cache.length)
    return speculate(model, input_ids, max_new_tokens, sampler, attention_mask, cache, stops, draft)


def _stops(stop_ids: Sequence[int] | None) -> list[int]:
    if stop_ids is None:
        return list(STOP_IDS)
    try:
        return [operator.index(i) for i in stop_ids]
    except TypeError:
        raise TypeError(f"generate: stop_ids must be integers, got {stop_ids!r}") from None


def _run(
    model: Gemma2,
    input_ids: Tensor,
    max_new_tokens: int,
    sampler: Sampler,
    attention_mask: Tensor | None,
    cache: KVCache,
    stop_ids: list[int],
) -> Iterator[Tensor]:
    stops = set(stop_ids)
    running = [True] * input_ids.shape[0]
    step_ids, step_mask = input_ids, attention_mask
    for _ in range(max_new_tokens):
        # The mode must not leak into the caller between two tokens of a stream.
        with torch.inference_mode():
            logits = model(step_ids, step_mask, cache=cache, last_only=True)[:, 0]
            tokens = sampler(logits)
        if not all(running):
            tokens = tokens.masked_fill(~torch.tensor(running, device=tokens.device), PAD_ID)
        yield tokens
        for row, token in enumerate(tokens.tolist()):
            running[row] = running[row] and token not in stops
        if not any(running) or cache.length >= cache.max_length:
            return
        step_ids, step_mask = tokens[:, None], None


def _run_on_cuda(
    model: Gemma2,
    input_ids: Tensor,
    max_new_tokens: int,
    sampler: Sampler,
    attention_mask: Tensor | None,
    cache: KVCache,
    stop_ids: list[int],
) -> Iterator[Tensor]:
    """As `_run`: the prompts once, then steps that the device feeds to itself."""
    if max_new_tokens == 0:
        return
    with torch.inference_mode():
        tokens = sampler(model(input_ids, attention_mask, cache=cache, last_only=True)[:, 0])
        stops = torch.tensor(stop_ids, dtype=torch.int64)
        graph = DecodeGraph(model, cache, sampler, tokens, stops)
    yield from decode(graph, max_new_tokens)
