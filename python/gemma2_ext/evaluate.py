"""How well a model predicts a text: perplexity over strided windows.

    perplexity = exp(nll / tokens),  bits per byte = nll / (ln 2 * bytes)

A window holds at most `context` tokens; the next one starts so that it scores the following
`stride` tokens, and sees at least `context - stride` before each of them. Logits never stand whole:
those of a packed embedding are made in pieces below LOGITS_BYTES, whatever the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from . import ops

if TYPE_CHECKING:
    from .cache import KVCache
    from .config import Gemma2Config
    from .model import Gemma2

# 131 rows of a vocabulary of 256000: enough rows to keep the products busy.
LOGITS_BYTES = 1 << 27


@dataclass(frozen=True)
class PerplexityResult:
    """What `perplexity` measured.

    Args:
        nll: negative log-likelihood of all scored tokens together, in nats.
        num_tokens: tokens scored.
        num_bytes: UTF-8 bytes that they stand for; None: not known.
    """

    nll: float
    num_tokens: int
    num_bytes: int | None = None

    @property
    def perplexity(self) -> float:
        """exp(nll / num_tokens); infinite where that exceeds a float."""
        try:
            return math.exp(self.nll / self.num_tokens)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """nll / (ln 2 * num_bytes), which does not depend on the tokenizer; None without bytes."""
        return self.nll / (math.log(2) * self.num_bytes) if self.num_bytes else None


def perplexity(
    model: Gemma2,
    token_ids: Sequence[int] | Tensor,
    *,
    context: int | None = None,
    stride: int | None = None,
    num_bytes: int | None = None,
    progress: bool = False,
) -> PerplexityResult:
    """exp of the mean negative log-likelihood of a text's tokens, each scored exactly once.

    Args:
        model: the model.
        token_ids: (seqlen,), <bos> and the text. The first token is not scored, and stands in front
            of every window: without <bos> Gemma's predictions are far off.
        context: tokens that a window holds, <bos> included; None: the model's context.
        stride: tokens that a window scores, except the first one, which scores `context`; every
            token but the text's first `context` is predicted from more than `context - stride`
            others. None: half of the context.
        num_bytes: UTF-8 bytes of the text without <bos>, for bits per byte.
        progress: whether to show a progress bar on stderr.

    Raises:
        TypeError: token_ids are not integers.
        ValueError: fewer than two tokens, ids outside the vocabulary, or not
            1 <= stride <= context <= max_position_embeddings.
    """
    context, stride = window_sizes(model.config, context, stride)
    ids = torch.as_tensor(token_ids)
    if ids.dim() != 1 or ids.numel() < 2:
        raise ValueError(
            "perplexity: token_ids must have shape (seqlen,) with at least two tokens, <bos> and "
            f"one to score, got {tuple(ids.shape)}"
        )
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"perplexity: token_ids must be int64 or int32, got {ids.dtype}")
    vocab_size = model.config.vocab_size
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise ValueError(
            f"perplexity: token ids must be in [0, vocab_size = {vocab_size}), got "
            f"{int(ids.min())} to {int(ids.max())}"
        )
    ids = ids.long()
    bos, text = ids[:1], ids[1:]
    cache = model.new_cache(1, min(context, len(text)))
    nll, scored = 0.0, 0
    bar = tqdm(total=len(text), desc="scoring", unit="token", disable=not progress)
    with bar, torch.inference_mode():
        for begin, first, end in windows(len(text), context, stride):
            cache.reset()
            # The prediction of token i comes from the position of token i - 1.
            inputs = torch.cat([bos, text[begin : end - 1]])
            for piece in _nll(model, cache, inputs, text[first:end]):
                nll += piece.sum(dtype=torch.float64).item()
                scored += len(piece)
                result = PerplexityResult(nll, scored)
                bar.set_postfix_str(f"perplexity {result.perplexity:.3f}", refresh=False)
                bar.update(len(piece))
    return PerplexityResult(nll, scored, num_bytes)


def window_sizes(
    config: Gemma2Config, context: int | None = None, stride: int | None = None
) -> tuple[int, int]:
    """The context and stride that `perplexity` uses; it raises as that does."""
    longest = config.max_position_embeddings
    context = longest if context is None else context
    if not 1 <= context <= longest:
        raise ValueError(
            f"perplexity: context must be between 1 and max_position_embeddings = {longest}, "
            f"got {context}"
        )
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(
            f"perplexity: stride must be between 1 and context = {context}, got {stride}"
        )
    return context, stride


def windows(num_tokens: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first, end) of each window: it scores tokens [first, end) and sees from begin on."""
    end = 0
    while end < num_tokens:
        first, end = end, min(end + stride, num_tokens) if end else min(context, num_tokens)
        yield max(0, end - context), first, end


def _nll(model: Gemma2, cache: KVCache, inputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
    """Negative log-likelihoods of `targets`, which the last len(targets) of `inputs` predict."""
    inputs, targets = inputs.to(model.device), targets.to(model.device)
    unscored = len(inputs) - len(targets)
    for begin, hidden in model._chunks(inputs[None], [len(inputs)], cache):
        first = max(begin, unscored)  # of this chunk
        scored = hidden[0, first - begin :]
        if len(scored):
            yield _losses(model, scored, targets[first - unscored :][: len(scored)])


def _losses(model: Gemma2, hidden: Tensor, targets: Tensor) -> Tensor:
    """Of each row of hidden states."""
    weight, softcap = model.embed_tokens.weight, model.config.final_logit_softcapping
    if isinstance(weight, Tensor):
        return ops.linear_cross_entropy(hidden, weight, targets, softcap=softcap, reduction="none")
    rows = max(1, LOGITS_BYTES // (4 * model.config.vocab_size))
    losses = []
    for some, target in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = ops.logits(some, weight, softcap)
        # In place: torch's logsumexp takes as much memory again.
        logits -= logits.amax(-1, keepdim=True)
        of_target = logits.gather(-1, target[:, None])[:, 0]
        losses.append(logits.exp_().sum(-1).log() - of_target)
    return torch.cat(losses)
