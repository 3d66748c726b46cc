"""Decoding on a GPU: one step as a CUDA graph, and the loop around it.

A step is some 200 launches of a few microseconds each; replaying a graph costs one. Tokens, the
stop tokens and lengths stay on the device, so that a step's input is the output of the
one before it, and a step is started before the host has seen its predecessor's token: the only wait
is for the copy of that token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _C
from .cache import KVCache

if TYPE_CHECKING:
    from .generate import Sampler
    from .model import Gemma2

_advance_out = torch.ops.gemma2_ext.advance_out.default
PAD_ID = 0
WARM_UP_STEPS = 2  # before the capture: libraries allocate and choose at their first calls


class DecodeGraph:
    """A step of `model` for every row of `cache`: tokens in, the next tokens out.

    Args:
        model: on a GPU.
        cache: holds the prompts.
        sampler: draws the tokens.
        tokens: (batch,), the ones drawn from the prompts.
        stops: ids that end a row.

    Attributes:
        early_launches: whether kernels of a captured step may start before those in front of them
            have ended; the tokens are the same.
        tokens: (batch,) on the device, what the last step drew; 0 in rows that have stopped.
    """

    early_launches = True

    def __init__(
        self, model: Gemma2, cache: KVCache, sampler: Sampler, tokens: Tensor, stops: Tensor
    ) -> None:
        self.model, self.cache, self.sampler = model, cache, sampler
        self.stops = stops.to(model.device)
        self.tokens = tokens.clone()
        self.running = ~torch.isin(self.tokens, self.stops)
        self.key_lengths = cache.lengths.to(model.device) + 1
        # Of the random numbers; filled at each step.
        self.keys = torch.zeros(cache.batch_size, 2, dtype=torch.int32, device=model.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def step(self) -> None:
        """Starts a step; the host does not wait for it."""
        ones = [1] * self.cache.batch_size
        self.cache.reserve(ones)
        # Drawn on the host, so that a seed gives the tokens that it gives on the CPU.
        keys = self.sampler.keys(self.cache.batch_size)
        self.keys.copy_(keys.pin_memory() if self.keys.is_cuda else keys, non_blocking=True)
        if self.graph is None and self.tokens.is_cuda:
            self.graph = self._capture()
        if self.graph is not None:
            self.graph.replay()
        else:
            self._compute()
        self.cache.commit(ones)

    def _compute(self) -> None:
        hidden = self.model._decode(self.tokens[:, None], None, self.key_lengths, self.cache)
        drawn = self.sampler(self.model._logits(hidden, last_only=True)[:, 0], self.keys)
        _advance_out(drawn, self.stops, PAD_ID, self.tokens, self.running, self.key_lengths)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Captures a step; what the steps before the capture have changed is put back."""
        state = (self.tokens, self.running, self.key_lengths)
        before = [t.clone() for t in state]

        def warm_up() -> None:
            self._compute()
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)

        return _capture(self.model.device, warm_up, self._compute, early=self.early_launches)


class StepGraphs:
    """Steps of one row over tokens that the host gives: a draft to check, or one's next token.

    A step of as many tokens as some before is captured once it has run often enough to be worth
    that; `capture` does it, between steps.

    Args:
        model: on a GPU.
        cache: of one row.
    """

    # A capture costs about as much as so many steps lose without one.
    AFTER_RUNS = 16

    def __init__(self, model: Gemma2, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self._steps: dict[int, _Step] = {}
        self._last: _Step | None = None

    def logits(self, ids: list[int]) -> Tensor:
        """Those after each of the row's next tokens, which the cache then holds.

        Args:
            ids: at most as many as the cache takes back, and has room for.

        Returns:
            (len(ids), vocab_size) float32, overwritten by the next step of as many tokens.
        """
        count = len(ids)
        step = self._steps.get(count)
        if step is None:
            # Written by later steps, so no inference tensors.
            with torch.inference_mode(False):
                step = self._steps[count] = _Step(count, self.model.device)
        (end,) = self.cache.reserve([count])
        step.ids.copy_(torch.tensor([ids]))
        step.key_lengths.fill_(end)
        if step.graph is None:
            self._compute(step)
        else:
            step.graph.replay()
        step.runs += 1
        self._last = step
        self.cache.commit([count])
        assert step.logits is not None
        return step.logits[0]

    def capture(self) -> None:
        """Captures the last step if it has run often enough; before the cache has got more tokens.

        It is computed anew for that, and writes into the cache what it has written.
        """
        step = self._last
        if step is None or step.graph is not None or step.runs < self.AFTER_RUNS:
            return
        compute = functools.partial(self._compute, step)
        step.graph = _capture(self.model.device, compute, compute, early=True)

    def _compute(self, step: _Step) -> None:
        hidden = self.model._decode(step.ids, None, step.key_lengths, self.cache)
        step.logits = self.model._logits(hidden, last_only=False)


class _Step:
    """Of a number of tokens: input, output, and the graph that leads from one to the other."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.ids = torch.zeros(1, count, dtype=torch.int64, device=device)
        self.key_lengths = torch.zeros(1, dtype=torch.int64, device=device)
        self.logits: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.runs = 0


def _capture(
    device: torch.device, warm_up: Callable[[], None], compute: Callable[[], None], *, early: bool
) -> torch.cuda.CUDAGraph:
    """A graph of `compute`, after some of `warm_up` on a stream beside the current one."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_STEPS):
            warm_up()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Nothing in a step writes weights, so a kernel's first ones may be on their way while those in
    # front of it are at work.
    _C.set_early_launches(early)
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream):
            compute()
    finally:
        _C.set_early_launches(False)
    return graph


def decode(graph: DecodeGraph, max_new_tokens: int) -> Iterator[Tensor]:
    """Yields the tokens in `graph`, then those of further steps, (batch,) on the CPU.

    Ends after max_new_tokens, when every row has stopped, or when the cache is full. While it waits
    for a step's tokens the next step is already on its way; where it turns out not to be wanted,
    the cache takes it back.
    """
    cache = graph.cache
    stops = graph.stops.cpu()
    running = torch.ones(cache.batch_size, dtype=torch.bool)
    for count in range(1, max_new_tokens + 1):
        tokens, ready = _copy_to_host(graph.tokens)
        ahead = count < max_new_tokens and cache.length < cache.max_length
        if ahead:
            with torch.inference_mode():
                graph.step()
        if ready is not None:
            ready.synchronize()
        running &= ~torch.isin(tokens, stops)
        finished = not bool(running.any())
        if ahead and finished:
            cache.rewind(1)
        try:
            yield tokens
        except GeneratorExit:
            if ahead and not finished:
                cache.rewind(1)
            raise
        if finished or not ahead:
            return


def _copy_to_host(tokens: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Starts a copy; it is there once the event has happened."""
    if not tokens.is_cuda:
        return tokens.clone(), None
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tokens.device))
    return host, event
