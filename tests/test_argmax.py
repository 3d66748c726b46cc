from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import gemma2_ext  # noqa: F401  its ops

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
