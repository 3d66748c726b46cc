"""From token ids to text: a continuation as it comes, and a conversation that keeps its cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .cache import KVCache
    from .model import Gemma2
    from .speculative import Draft
    from .tokenizer import Tokenizer

END_OF_TURN = 107


@dataclass
class Timing:
    """Tokens read and written, and the seconds that each took.

    The first new token comes out of reading the prompt, so writing counts the others.
    """

    prompt_tokens: int
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    draft: Draft | None = None

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens a second, without the first one."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def tokens_per_step(self) -> float:
        """New tokens for each pass of the model, without the first one."""
        steps = self.draft.steps if self.draft else self.new_tokens - 1
        return (self.new_tokens - 1) / steps if steps > 0 else 0.0

    @property
    def speed_up(self) -> float:
        """The decode rate over that of this run's steps without a draft."""
        return self.decode_rate * self.draft.pace.plain_seconds if self.draft else 1.0

    def __str__(self) -> str:
        text = f"prefill {self.prompt_tokens} tokens, {self.prefill_rate:.1f} token/s"
        if self.new_tokens > 1:
            text += f"; decode {self.new_tokens} tokens, {self.decode_rate:.1f} token/s"
        if self.draft and self.new_tokens > 1:
            text += (
                f"; draft {self.draft.accepted} of {self.draft.proposed} accepted "
                f"({self.draft.acceptance:.0%}), {self.tokens_per_step:.1f} tokens a step, "
                f"speed-up {self.speed_up:.2f}"
            )
        return text


class TextStream:
    """The text that continues a prompt, each piece as soon as its characters are whole.

    Args:
        model: the model.
        tokenizer: that of the model.
        input_ids: the prompt; with a cache, the tokens it does not hold yet.
        max_new_tokens: at least 0.
        cache: continued; None: a fresh one.
        draft: guesses tokens; None: none does.
        sampling: temperature, top_k, top_p, min_p, seed, as for `Gemma2.stream`.

    Attributes:
        new_ids: the tokens drawn so far, the stop token included.
        stop_reason: "stop" (a stop token), "length" (max_new_tokens) or "context" (the context or
            the cache is full); None while it runs, and where it was broken off.
        timing: what it took so far.

    Raises:
        ValueError: as `Gemma2.stream`, when it is made.
    """

    def __init__(
        self,
        model: Gemma2,
        tokenizer: Tokenizer,
        input_ids: list[int],
        *,
        max_new_tokens: int,
        cache: KVCache | None = None,
        draft: Draft | None = None,
        **sampling: Any,
    ) -> None:
        self.new_ids: list[int] = []
        self.stop_reason: str | None = None
        self.timing = Timing(len(input_ids), draft=draft)
        self._max_new_tokens = max_new_tokens
        self._tokenizer = tokenizer
        self._ids = model.stream(
            torch.tensor([input_ids], dtype=torch.int64),
            max_new_tokens=max_new_tokens,
            cache=cache,
            stop_ids=tokenizer.eos_ids,
            draft=draft,
            **sampling,
        )

    def __iter__(self) -> Iterator[str]:
        decoder = self._tokenizer.stream_decoder()
        stops = self._tokenizer.eos_ids
        last = time.perf_counter()
        for token in self._ids:
            now = time.perf_counter()
            if self.new_ids:
                self.timing.decode_seconds += now - last
            else:
                self.timing.prefill_seconds = now - last
            self.new_ids.append(token)
            self.timing.new_tokens += 1
            if token not in stops and (text := decoder.push(token)):
                yield text
            last = time.perf_counter()
        if text := decoder.flush():
            yield text
        if self.new_ids and self.new_ids[-1] in stops:
            self.stop_reason = "stop"
        elif len(self.new_ids) == self._max_new_tokens:
            self.stop_reason = "length"
        else:
            self.stop_reason = "context"


class Conversation:
    """Turns of a user and the model in Gemma's chat format; only new tokens go through the model.

    An answer may be broken off anywhere, even by KeyboardInterrupt: what was drawn until then
    stands as the model's turn.

    Args:
        model: the model.
        tokenizer: that of the model.
        max_length: tokens that the conversation may have; None: the model's context.
        seed: of the first answer; it grows by one with each.
        draft: guesses tokens of the answers; None: none does.
        sampling: temperature, top_k, top_p, min_p, as for `Gemma2.stream`.
    """

    def __init__(
        self,
        model: Gemma2,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        seed: int | None = None,
        draft: Draft | None = None,
        **sampling: Any,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.cache = model.new_cache(1, max_length)
        self._newline = tokenizer.encode("\n", add_bos=False)
        self._first_seed = seed
        self._draft = draft
        self._sampling = sampling
        self.reset()

    def reset(self) -> None:
        """Forgets all turns."""
        self.cache.reset()
        self._given: list[int] = []
        self._stream: TextStream | None = None
        self._seed = self._first_seed

    @property
    def ids(self) -> list[int]:
        """All tokens of the conversation. The cache holds the first of them, in this order."""
        return self._given + (self._stream.new_ids if self._stream else [])

    def answer(self, text: str, *, max_new_tokens: int | None = None) -> TextStream:
        """Adds a user's turn and returns the model's, which is drawn as it is iterated.

        Args:
            text: what the user says.
            max_new_tokens: of the answer; None: as many as the context holds.

        Raises:
            ValueError: the text is empty, or does not fit into what is left of the context; the
                conversation stands as it was.
        """
        if not text.strip():
            raise ValueError("chat: the message is empty")
        ids = self.ids
        turn = self.tokenizer.apply_chat_template([{"role": "user", "content": text}])
        if ids:
            # The model's turn ends in the same way whether or not it drew a stop token, and <bos>
            # stands only once. A stop token is not in the cache yet: no token followed it.
            if ids[-1] in self.tokenizer.eos_ids:
                ids.pop()
            turn = [END_OF_TURN, *self._newline, *turn[1:]]
        if len(ids) + len(turn) > self.cache.max_length:
            raise ValueError(
                f"chat: the context holds {self.cache.max_length} tokens; the conversation has "
                f"{len(ids)} and this message {len(turn)} more"
            )
        ids += turn
        stream = TextStream(
            self.model,
            self.tokenizer,
            ids[self.cache.length :],
            max_new_tokens=self.cache.max_length if max_new_tokens is None else max_new_tokens,
            cache=self.cache,
            draft=self._draft,
            seed=self._seed,
            **self._sampling,
        )
        self._given, self._stream = ids, stream
        if self._seed is not None:
            self._seed += 1
        return stream
