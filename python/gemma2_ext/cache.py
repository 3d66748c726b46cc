"""The keys and values of past tokens.

A global layer keeps every position; a local layer keeps a ring of its window plus some slack, so
that the cache of a long context costs about half. Position p of a row is in slot `p % capacity`.
Padding is never written: every row counts its own tokens from 0, whatever the padding around them.

The slack is what lets several tokens be written at once without losing a key that the first of them
still sees, and what `rewind` may take back:

    window 4, slack 2, after positions 0..8:   slot      0  1  2  3  4  5
                                               position  6  7  8  3  4  5
    the query at 8 sees 5..8; after rewind(2) the one at 6 sees 3..6: all still there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._memory import empty_in_huge_pages
from .config import Gemma2Config

# Most tokens of a row that go through the model at once: wide enough for the matrix products,
# narrow enough that the rings' slack and the activations stay small. On a GPU more: 512 tokens of
# 2B took an H200 ten times as long as their products would, with 200 calls of the host's.
MAX_CHUNK, MAX_CHUNK_CUDA = 512, 2048
# Most tokens of all rows together; more in a batch go through in groups of rows.
MAX_TOKENS, MAX_TOKENS_CUDA = 512, 8192
# Least slack: what speculative decoding may take back where the window is tiny.
MIN_SLACK = 16
# Of a head's row of a token in an int8 cache.
SCALE_BYTES = 4
# Smaller caches stay in the processor's.
HUGE_PAGES_FROM = 32 << 20


def ring_slack(config: Gemma2Config, device: torch.device | str = "cpu") -> int:
    """Slots of a local layer's ring beyond its window; also tokens that may go through at once."""
    most = MAX_CHUNK_CUDA if torch.device(device).type == "cuda" else MAX_CHUNK
    return min(most, max(config.sliding_window, MIN_SLACK))


def layer_capacity(
    config: Gemma2Config, layer: int, max_length: int, device: torch.device | str = "cpu"
) -> int:
    """Slots that a layer's cache holds for each row."""
    if config.is_local(layer):
        return min(max_length, config.sliding_window + ring_slack(config, device))
    return max_length


def cache_bytes(
    config: Gemma2Config,
    batch_size: int,
    max_length: int,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> int:
    """Bytes of a KVCache of these sizes, without making one."""
    layers = range(config.num_hidden_layers)
    slots = sum(layer_capacity(config, i, max_length, device) for i in layers)
    row = config.head_dim * dtype.itemsize + (SCALE_BYTES if dtype == torch.int8 else 0)
    return 2 * batch_size * slots * config.num_key_value_heads * row


def cache_room(sizes: list[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Flat tensors of so many elements, uninitialized; on the CPU and large ones in huge pages.

    Decoding reads every page once a token: with 4 KiB pages it waits for their addresses.
    """
    nbytes = sum(sizes) * dtype.itemsize
    if device.type != "cpu" or nbytes < HUGE_PAGES_FROM:
        return [torch.empty(size, dtype=dtype, device=device) for size in sizes]
    return list(empty_in_huge_pages(nbytes, "a KVCache").view(dtype).split(sizes))


class KVCache:
    """Keys and values of `batch_size` sequences of up to `max_length` tokens each.

    Args:
        config: the model's.
        batch_size: rows.
        max_length: tokens a row may hold, at most config.max_position_embeddings.
        dtype: of keys and values: the model's, or int8: a byte an element, and each head's row of
            a token its own scale, see `ops.rope_append_cache`.
        device: where they live.

    Attributes:
        keys, values: one tensor a layer, (batch, capacity, num_key_value_heads, head_dim), of which
            each head's slots are contiguous.
        key_scales, value_scales: of an int8 cache one tensor a layer, (batch, capacity,
            num_key_value_heads) float32; empty otherwise.

    Raises:
        ValueError: batch_size or max_length is below 1, or max_length exceeds the model's context.
    """

    def __init__(
        self,
        config: Gemma2Config,
        batch_size: int = 1,
        max_length: int | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        context = config.max_position_embeddings
        max_length = context if max_length is None else max_length
        if batch_size < 1:
            raise ValueError(f"KVCache: batch_size must be at least 1, got {batch_size}")
        if not 1 <= max_length <= context:
            raise ValueError(
                f"KVCache: max_length must be between 1 and max_position_embeddings = {context}, "
                f"got {max_length}"
            )
        device = torch.device(device)
        self.config = config
        self.batch_size = batch_size
        self.max_length = max_length
        self.chunk_size = ring_slack(config, device)
        self._max_tokens = MAX_TOKENS_CUDA if device.type == "cuda" else MAX_TOKENS
        # Not inference tensors, wherever the cache is made: later writes may come from outside
        # inference mode. Left uninitialized: no slot is read before it is written.
        with torch.inference_mode(False):
            # A head's slots lie one after another: attention reads them head by head, and memory
            # delivers a stream faster than pieces.
            shapes = [
                (
                    batch_size,
                    config.num_key_value_heads,
                    layer_capacity(config, layer, max_length, device),
                    config.head_dim,
                )
                for layer in range(config.num_hidden_layers)
            ]
            room = cache_room([math.prod(shape) for shape in shapes] * 2, dtype, device)
            tensors = [
                flat.view(shape).transpose(1, 2)
                for flat, shape in zip(room, shapes * 2, strict=True)
            ]
            self.keys, self.values = tensors[: len(shapes)], tensors[len(shapes) :]
            scales = [
                torch.empty(shape[:3], dtype=torch.float32, device=device).transpose(1, 2)
                for shape in (shapes * 2 if dtype == torch.int8 else [])
            ]
            self.key_scales, self.value_scales = scales[: len(shapes)], scales[len(shapes) :]
        # Numbers of the host: a step does without torch's calls for them.
        self._held = [0] * batch_size
        # One past the last position ever written: older ones may have lost their slot to it.
        self._written = [0] * batch_size

    @property
    def lengths(self) -> Tensor:
        """Tokens held by each row: (batch,) int64 on the CPU, a copy."""
        return torch.tensor(self._held, device="cpu")

    @property
    def length(self) -> int:
        """Tokens held by the longest row."""
        return max(self._held)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, and of their scales."""
        tensors = (*self.keys, *self.values, *self.key_scales, *self.value_scales)
        return sum(t.nbytes for t in tensors)

    def scales(self, layer: int) -> dict[str, Tensor]:
        """What `ops.rope_append_cache` and `ops.attention_cache` take beside keys and values."""
        if not self.key_scales:
            return {}
        return {"k_scales": self.key_scales[layer], "v_scales": self.value_scales[layer]}

    def row_groups(self, seqlen: int) -> list[slice]:
        """Rows that go through the model together where each brings `seqlen` tokens, at least 1."""
        most = max(1, self._max_tokens // seqlen)
        groups = -(-self.batch_size // most)
        size = -(-self.batch_size // groups)
        return [slice(i, i + size) for i in range(0, self.batch_size, size)]

    def check_room(self, counts: Sequence[int]) -> list[int]:
        """Whether `counts` more tokens fit, one count a row.

        Returns:
            The tokens that each row then holds.

        Raises:
            ValueError: a row would hold more than max_length tokens.
        """
        ends = [held + count for held, count in zip(self._held, counts, strict=True)]
        end = max(ends)
        if end > self.max_length:
            row = ends.index(end)
            raise ValueError(
                f"KVCache: row {row} holds {self._held[row]} tokens and is given {counts[row]} "
                f"more, but max_length is {self.max_length}"
            )
        return ends

    def reserve(self, counts: Sequence[int]) -> list[int]:
        """As `check_room`, and announces the write of the tokens; `commit` completes it."""
        ends = self.check_room(counts)
        self._written = list(map(max, self._written, ends))
        return ends

    def commit(self, counts: Sequence[int]) -> None:
        """Counts `counts` more tokens as held, once all layers have written them."""
        self._held = [held + count for held, count in zip(self._held, counts, strict=True)]

    def rewind(self, n: int | Tensor) -> None:
        """Takes back the last n tokens of every row, as if they had never been given.

        Args:
            n: a count, or one a row (batch,).

        Raises:
            TypeError: n is no integer.
            ValueError: n is negative, a row holds fewer tokens, or a ring has already lost keys
                that the shorter sequence needs (more than `chunk_size` tokens back).
        """
        given = torch.as_tensor(n)
        if given.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"KVCache: rewind needs an integer n, got {n}")
        counts = given.expand(self.batch_size).tolist()
        if min(counts) < 0:
            raise ValueError(f"KVCache: rewind needs n >= 0, got {n}")
        lengths = [held - count for held, count in zip(self._held, counts, strict=True)]
        if min(lengths) < 0:
            raise ValueError(f"KVCache: cannot take back {n} tokens, the rows hold {self._held}")
        config = self.config
        for layer in range(config.num_hidden_layers):
            if not config.is_local(layer):
                continue
            capacity = self.keys[layer].shape[1]
            for written, length in zip(self._written, lengths, strict=True):
                # Positions below the first are overwritten; the second is the oldest in sight.
                if written - capacity > max(length - config.sliding_window + 1, 0):
                    raise ValueError(
                        f"KVCache: cannot take back {n} tokens: local layers keep "
                        f"{config.sliding_window} positions and {self.chunk_size} more"
                    )
            break  # all rings are alike
        self._held = lengths

    def reset(self) -> None:
        """Forgets all tokens."""
        self._held = [0] * self.batch_size
        self._written = [0] * self.batch_size
