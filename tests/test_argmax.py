from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gemma2_ext.generate import Sampler, _exponential

pytestmark = pytest.mark.usefixtures("isa")


def argmax(x: Tensor) -> Tensor:
    out = torch.full((len(x),), -1)
    torch.ops.gemma2_ext.argmax_out(x, out)
    return out


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("columns", [1, 3, 15, 16, 17, 1023, 1024, 1025, 3000, 256000])
def test_as_torch(rows: int, columns: int) -> None:
    x = torch.randn(rows, columns)
    assert torch.equal(argmax(x), x.argmax(-1))
    assert torch.equal(argmax(x.round()), x.round().argmax(-1))  # of equals the first
    assert torch.equal(argmax(torch.full_like(x, 2.0)), torch.zeros(rows, dtype=torch.int64))


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number(special: float) -> None:
    for place in (0, 7, 1024, 2047, 2048, 2999):
        x = torch.randn(2, 3000)
        x[1, place:] = special
        x[0, place] = special
        assert torch.equal(argmax(x), x.argmax(-1)), place
    x = torch.full((1, 3000), -math.inf)
    assert argmax(x).item() == 0
    x[0, 2500] = math.nan
    x[0, 100] = math.inf
    assert argmax(x).item() == 2500


def test_strides() -> None:
    x = torch.randn(6, 4000)
    assert torch.equal(argmax(x[::2, 5:3005]), x[::2, 5:3005].argmax(-1))
    assert torch.equal(argmax(x.t()), x.t().argmax(-1))


def test_bad_input() -> None:
    x, out = torch.randn(2, 8), torch.empty(2, dtype=torch.int64)
    op = torch.ops.gemma2_ext.argmax_out
    with pytest.raises(ValueError, match=r"argmax: x must be float32 of shape .* got \(2, 0\)"):
        op(torch.empty(2, 0), out)
    with pytest.raises(ValueError, match="x must be float32"):
        op(x.bfloat16(), out)
    with pytest.raises(ValueError, match="x must be float32"):
        op(x[0], out)
    for wrong in (out[:1], out.int(), torch.empty(4, dtype=torch.int64)[::2]):
        with pytest.raises(ValueError, match=r"out must be contiguous int64 of shape \(rows,\)"):
            op(x, wrong)


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


def some_keys(rows: int) -> Tensor:
    return torch.randint(-(1 << 31), 1 << 31, (rows, 2)).int()


@pytest.mark.parametrize("temperature", [0.1, 0.8, 3.0])
@pytest.mark.parametrize("columns", [1, 17, 4099])
def test_a_draw_is_the_race_of_all_tokens(temperature: float, columns: int) -> None:
    logits, keys = 4 * torch.randn(40, columns), some_keys(40)
    times = _exponential(keys, torch.arange(columns, dtype=torch.int32)).double()
    parts = logits.double() / temperature, times.to(logits.device).log()
    scores, drawn = parts[0] - parts[1], draw(logits, keys, temperature)
    # Of float32: 1 / temperature, the product and the difference are rounded, so is the logarithm,
    # of a time that two libraries' log1p may give a few units apart.
    sizes = [part.abs().amax(-1) for part in parts]
    bound = torch.finfo(torch.float32).eps * (3 * sizes[0] + 2 * sizes[1] + 4)
    behind = scores.amax(-1) - scores.gather(-1, drawn[:, None])[:, 0]
    assert (behind <= bound).all()
    assert torch.equal(draw(logits, keys, temperature), drawn)


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


# Filters, each alone and together: top_k, top_p, min_p.
FILTERS = [
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


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("deviation", [0.1, 2.0, 5.0])
def test_a_draw_of_some_is_the_race_of_those(
    filters: tuple[int, float, float], deviation: float
) -> None:
    """As the sampler has it by torch's ops, on the CPU."""
    top_k, top_p, min_p = filters
    sampler = Sampler(0.8, top_k or None, top_p, min_p)
    logits, keys = deviation * torch.randn(30, 4099), some_keys(30)
    drawn = draw(logits, keys, 0.8, *filters)
    assert torch.equal(drawn.cpu(), sampler(logits.cpu(), keys.cpu()))


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


def test_advance() -> None:
    drawn, stops = torch.tensor([5, 3, 8, 7, 3]), torch.tensor([3, 8])
    running = torch.tensor([True, True, True, False, False])
    tokens, lengths = torch.full((5,), -1), torch.tensor([4, 5, 6, 7, 8])
    torch.ops.gemma2_ext.advance_out(drawn, stops, 0, tokens, running, lengths)
    assert tokens.tolist() == [5, 3, 8, 0, 0]
    assert running.tolist() == [True, False, False, False, False]
    assert lengths.tolist() == [5, 6, 7, 8, 9]
    torch.ops.gemma2_ext.advance_out(drawn, stops[:0], 9, tokens, running, lengths)
    assert tokens.tolist() == [5, 9, 9, 9, 9]
    for name, wrong in (("running", running.long()), ("tokens", tokens[:4])):
        given = {"tokens": tokens, "running": running, "key_lengths": lengths, name: wrong}
        with pytest.raises(ValueError, match=f"advance: {name} must"):
            torch.ops.gemma2_ext.advance_out(drawn, stops, 0, **given)
