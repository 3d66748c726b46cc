from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import gemma2_ext  # noqa: F401  its ops
from draws import EVERY, FILTERS, arrivals, keys_at_the_edge, scores, some_keys

pytestmark = pytest.mark.usefixtures("isa")


def draw(
    logits: Tensor,
    keys: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    out = torch.full((len(logits),), -1)
    torch.ops.gemma2_ext.draw_out(logits, keys, temperature, top_k, top_p, min_p, out)
    return out


def assert_wins(
    drawn: Tensor, logits: Tensor, keys: Tensor, temperature: float, *filters: Any
) -> None:
    """No token that is left has a better score, but by float32's roundings: of 1 / temperature, a
    difference of logits, the product, the last difference and the logarithm, of a time that two
    libraries' log1p may give a few units apart."""
    wanted = scores(logits.cpu(), keys.cpu(), temperature, *filters)
    behind = wanted.amax(-1) - wanted.gather(-1, drawn.cpu()[:, None])[:, 0]
    sizes = 2 * logits.abs().amax(-1).cpu() / temperature
    assert (behind <= torch.finfo(torch.float32).eps * (4 * sizes + 2 * 22 + 4)).all()


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("temperature", [0.1, 0.8, 3.0])
@pytest.mark.parametrize("columns", [1, 17, 4099])
def test_a_draw_is_the_race_of_what_is_left(
    columns: int, temperature: float, filters: tuple[int, float, float]
) -> None:
    logits, keys = 4 * torch.randn(30, columns), some_keys(30)
    drawn = draw(logits, keys, temperature, *filters)
    assert_wins(drawn, logits, keys, temperature, *filters)
    assert torch.equal(draw(logits, keys, temperature, *filters), drawn)


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("deviation", [0.1, 1.0])
def test_the_edge_of_what_is_left(deviation: float, filters: tuple[int, float, float]) -> None:
    logits = deviation * torch.randn(4099)
    keys = keys_at_the_edge(logits, 1.0, *filters)
    both = logits.expand(2, -1)
    assert_wins(draw(both, keys, 1.0, *filters), both, keys, 1.0, *filters)


@pytest.mark.parametrize("deviation", [0.1, 1.0, 5.0])
@pytest.mark.parametrize(
    "filters",
    [EVERY, (64, 1.0, 0.0), (700, 0.99, 0.0), (30_000, 0.9, 0.0), (0, 0.95, 0.0), (0, 1.0, 0.01)],
)
def test_a_large_vocabulary(deviation: float, filters: tuple[int, float, float]) -> None:
    """In one row and beside others, whose runs are shared out in other ways."""
    logits, keys = deviation * torch.randn(6, 50_003), some_keys(6)
    drawn = draw(logits, keys, 1.0, *filters)
    assert_wins(drawn, logits, keys, 1.0, *filters)
    alone = [draw(logits[i : i + 1], keys[i : i + 1], 1.0, *filters) for i in range(6)]
    assert torch.equal(torch.cat(alone), drawn)


@pytest.mark.parametrize("top_k", [1, 3, 40, 64, 78, 79, 1000, 10_048])
def test_the_largest_of_many(top_k: int) -> None:
    """Whatever is drawn is one of them, and at a high temperature any is."""
    logits = torch.randn(5, 10_048)
    logits[1] = logits[1].sort().values  # the largest all in neighbouring runs
    logits[2, 1000:] = -math.inf
    logits[3] = torch.randint(0, 4, (10_048,)).float()  # most are equal
    logits[4] = -logits[4].abs()  # and of both zeros
    logits[4, ::50], logits[4, 1::50] = 0.0, -0.0
    order = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    for row, left in zip(logits, order, strict=True):
        drawn = draw(row.expand(2000, -1), some_keys(2000), 1e9, top_k)
        assert torch.isin(drawn, left).all()
        if row.isfinite().all():
            assert len(drawn.unique()) >= min(top_k, 700)


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-30])
def test_a_low_temperature_leaves_the_largest(temperature: float) -> None:
    logits, keys = torch.randn(50, 3000), some_keys(50)
    for filters in (EVERY, (40, 0.9, 0.0), (0, 0.5, 0.1)):
        assert torch.equal(draw(logits, keys, temperature, *filters), logits.argmax(-1))
    logits[:, 30] = logits[:, 70] = 100.0
    assert draw(logits, keys, temperature).unique().tolist() == [30, 70]


def test_times_are_exponential() -> None:
    """Every decile of the distribution, its far ends, over tokens and over draws."""
    for keys, ids in (
        (some_keys(4), torch.arange(250_000)),
        (some_keys(250_000), torch.tensor([0, 1, 5, 1 << 17])),
    ):
        noise = arrivals(keys, ids)
        assert (noise > 0).all()
        uniform = (-noise.double()).exp()
        n = uniform.numel()
        counts = torch.histc(uniform, 1000, 0, 1)
        chi_square = ((counts - n / 1000) ** 2 / (n / 1000)).sum().item()
        assert abs(chi_square - 999) < 5 * math.sqrt(2 * 999)
        assert noise.min() * n < 20
        # Neighbours are not alike.
        for axis in (0, 1):
            if uniform.shape[axis] > 4:
                a, b = uniform.narrow(axis, 0, 249_999), uniform.narrow(axis, 1, 249_999)
                correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
                assert abs(correlation) < 5 / math.sqrt(a.numel())


def test_draws_have_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -math.inf, 3.0]])
    count = 20000
    drawn = draw(logits.expand(count, -1), some_keys(count), 2.0)
    shares = torch.bincount(drawn, minlength=5) / count
    p = (logits[0] / 2.0).softmax(-1).to(shares.device)
    assert ((shares - p).abs() <= 5 * (p * (1 - p) / count).sqrt()).all()


def test_draws_of_what_is_not_a_number() -> None:
    logits, keys = torch.full((3, 50), -math.inf), some_keys(3)
    logits[0, 7] = -80.0
    logits[1, 9] = math.inf
    logits[2, 11], logits[2, 20] = math.nan, 5.0
    assert draw(logits, keys).tolist() == [7, 9, 11]


def test_of_equal_logits_the_first_are_left() -> None:
    logits, keys = torch.full((400, 3000), 2.0), some_keys(400)
    logits[:, 1000] = 1.5
    assert draw(logits, keys, 1.0, 5).unique().tolist() == list(range(5))
    assert draw(logits, keys, 1.0, 2000, 0.00149).unique().tolist() == [0, 1, 2]
    assert draw(logits, keys, 1.0, 0, 0.001).unique().tolist() == [0, 1, 2]
    logits[:, 500:700] = 3.0
    assert draw(logits, keys, 1.0, 3).unique().tolist() == [500, 501, 502]
    drawn = draw(logits, keys, 1.0, 0, 1.0, 0.9)  # min_p leaves all equal ones
    assert drawn.min() >= 500
    assert drawn.max() < 700
    assert len(drawn.unique()) > 100


@pytest.mark.parametrize("filters", [(3, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.1), (9, 0.5, 0.1)])
def test_draws_of_some_that_are_not_numbers(filters: tuple[int, float, float]) -> None:
    logits, keys = torch.full((4, 50), -math.inf), some_keys(4)
    logits[0, 7] = -80.0
    logits[1, 9:11] = math.inf
    logits[2, 11:13], logits[2, 5] = math.nan, 5.0
    assert draw(logits, keys, 1.0, *filters).tolist() == [7, 9, 11, 0]


def test_draw_refuses_bad_input() -> None:
    logits, keys, out = torch.randn(2, 8), some_keys(2), torch.empty(2, dtype=torch.int64)
    op = torch.ops.gemma2_ext.draw_out
    every = 0, 1.0, 0.0
    with pytest.raises(ValueError, match="draw: logits must be float32"):
        op(logits.double(), keys, 1.0, *every, out)
    for wrong in (keys[:1], keys.long(), keys[:, :1], keys.t().contiguous().t()):
        with pytest.raises(ValueError, match=r"draw: keys must be contiguous int32 of shape"):
            op(logits, wrong, 1.0, *every, out)
    for temperature in (0.0, -1.0, 1e-40, math.nan):
        with pytest.raises(ValueError, match="draw: temperature must be above 0"):
            op(logits, keys, temperature, *every, out)
    with pytest.raises(ValueError, match="draw: out must be contiguous int64"):
        op(logits, keys, 1.0, *every, out.int())
    for filters in ((-1, 1.0, 0.0), (0, 0.0, 0.0), (0, 1.1, 0.0), (0, 1.0, -0.1), (0, 1.0, 1.1)):
        with pytest.raises(ValueError, match=r"draw: top_k must be at least 0, top_p in \(0, 1\]"):
            op(logits, keys, 1.0, *filters, out)
    with pytest.raises(ValueError, match="draw: top_k must be at least 0"):
        op(logits, keys, 1.0, 0, math.nan, 0.0, out)
