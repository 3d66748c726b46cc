"""Draws by torch's ops, as a reference: every token sorted, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# top_k, top_p, min_p: of all, each alone, and together.
EVERY = (0, 1.0, 0.0)
FILTERS = [
    EVERY,
    (1, 1.0, 0.0),
    (40, 1.0, 0.0),
    (4095, 1.0, 0.0),
    (9999, 1.0, 0.0),
    (0, 0.9, 0.0),
    (0, 0.5, 0.0),
    (0, 1e-6, 0.0),
    (0, 1.0, 0.05),
    (0, 1.0, 1.0),
    (64, 0.95, 0.0),
    (300, 0.7, 0.01),
]


def some_keys(rows: int) -> Tensor:
    return torch.randint(-(1 << 31), 1 << 31, (rows, 2)).int()


def arrivals(keys: Tensor, ids: Tensor) -> Tensor:
    """Exponentially distributed float32 numbers (batch, n) of mean 1, a hash of keys and ids.

    Source: the finalizer of MurmurHash3, with the second key inside.
    """
    x = (ids.int() + keys[:, :1]).mul_(-0x61C88647)

    def fold(bits: int) -> None:
        x.bitwise_xor_((x >> bits).bitwise_and_((1 << (32 - bits)) - 1))

    fold(16)
    x.add_(keys[:, 1:]).mul_(-0x7A143595)
    fold(13)
    x.mul_(-0x3D4D51CB)
    fold(16)
    return x.float().add_(0.5).abs_().mul_(-(2.0**-31)).log1p_().neg_()


def scores(
    logits: Tensor, keys: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """What each token's draw goes by, float64; -inf for those that the filters do not leave."""
    falling, order = (logits.double() / temperature).sort(dim=-1, descending=True, stable=True)
    weights = (falling - falling[:, :1]).exp()
    if top_k:
        weights[:, top_k:] = 0
    before = weights.cumsum(-1) - weights
    total = weights.sum(-1, keepdim=True)
    left = weights >= min_p
    if top_k:
        left[:, top_k:] = False
    if top_p < 1:
        left &= before < top_p * total
    left[:, 0] = True
    times = (
        arrivals(keys, torch.arange(logits.shape[-1], device=keys.device))
        .double()
        .gather(-1, order)
    )
    falling = (falling - falling[:, :1] - times.log()).masked_fill(~left, -math.inf)
    return torch.empty_like(falling).scatter_(-1, order, falling)


def keys_at_the_edge(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """Two keys (2, 2) for a row (n,): the first draws the last token that the filters leave, the
    second would draw the one behind it, were it left. Some others where none is found."""
    filters = top_k, top_p, min_p
    left = scores(logits[None], some_keys(1).to(logits.device), temperature, *filters)[0]
    order = logits.sort(descending=True, stable=True).indices
    count = int((left[order] > -math.inf).sum())
    parts = (logits[order] - logits[order[0]]).double() / temperature
    found, missing = some_keys(2), {0, 1}
    for _ in range(3):
        if not missing:
            break
        keys = some_keys(1000)
        times = arrivals(keys, order[: count + 1].cpu()).double()
        race = parts[: count + 1].cpu() - times.log()
        for i, number in enumerate((count, count + 1)):
            wins = (race[:, :number].argmax(-1) == number - 1).nonzero()[:, 0]
            if len(wins):
                found[i] = keys[wins[0]]
                missing.discard(i)
    return found
