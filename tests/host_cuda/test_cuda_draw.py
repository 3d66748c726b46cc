from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import gemma2_ext  # noqa: F401  its ops
from draws import EVERY, keys_at_the_edge, scores, some_keys
from host_cuda.emulator import SCHEDULES, is_needed, launch, line_of, places

# With clusters of blocks and without.
DEVICES = pytest.mark.parametrize("compute_capability", [80, 90])


def draw(
    logits: Tensor, keys: Tensor, filters: tuple[int, float, float] = EVERY, **options: Any
) -> tuple[Tensor]:
    out = torch.full((len(logits),), -1)
    launch(
        "draw",
        logits=logits,
        logits_stride=logits.stride(0),
        rows=logits.shape[0],
        columns=logits.shape[1],
        keys=keys,
        inverse_temperature=1 / 0.7,
        **dict(zip(("top_k", "top_p", "min_p"), filters, strict=True)),
        out=out,
        **options,
    )
    return (out,)


def right(logits: Tensor, keys: Tensor, filters: tuple[int, float, float]) -> Tensor:
    return scores(logits, keys, 0.7, *filters).argmax(-1)


@DEVICES
@pytest.mark.parametrize("filters", [EVERY, (50, 0.9, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.02)])
@pytest.mark.parametrize("columns", [1, 33, 4097, 40000])
def test_a_draw(compute_capability: int, columns: int, filters: tuple[int, float, float]) -> None:
    logits, keys = 3 * torch.randn(3, columns), some_keys(3)
    expected = right(logits, keys, filters)
    for schedule in SCHEDULES:
        options = {"compute_capability": compute_capability, "schedule": schedule}
        assert torch.equal(draw(logits, keys, filters, **options)[0], expected)


# Values as of a model, of few sizes, all equal, falling, and all large ones with one thread.
ROWS = {
    "normal": lambda n: 3 * torch.randn(n),
    "rounded": lambda n: (2 * torch.randn(n)).round(),
    "equal": lambda n: torch.ones(n),
    "falling": lambda n: -torch.arange(n) / 100.0,
    "beside each other": lambda n: torch.randn(n) + 9.0 * (torch.arange(n) % 4096 < 4),
    "few above -inf": lambda n: torch.randn(n).masked_fill(torch.rand(n) > 0.001, -math.inf),
}


@DEVICES
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("top_k", [1, 7, 64, 256, 257, 2048, 2049, 9999])
def test_the_k_largest(compute_capability: int, kind: str, top_k: int) -> None:
    """The last of them can be drawn, the one behind it not; with top-p besides, too."""
    logits = ROWS[kind](5000)[None].expand(2, -1)
    for filters in ((top_k, 1.0, 0.0), (top_k, 0.9, 0.0)):
        keys = keys_at_the_edge(logits[0], 0.7, *filters)
        drawn = draw(logits, keys, filters, compute_capability=compute_capability)[0]
        assert torch.equal(drawn, right(logits, keys, filters))


@DEVICES
def test_what_top_p_throws_away_is_drawn_anew(compute_capability: int) -> None:
    """Of little that is left, most races are won by others at first."""
    logits, keys = torch.randn(6, 3000), some_keys(6)
    for filters in ((0, 0.02, 0.0), (500, 0.05, 0.0), (0, 1e-9, 0.0)):
        expected = right(logits, keys, filters)
        drawn = draw(logits, keys, filters, compute_capability=compute_capability)[0]
        assert torch.equal(drawn, expected)


@DEVICES
@pytest.mark.parametrize("filters", [(3, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.1), (9, 0.5, 0.1)])
def test_draws_of_what_is_not_a_number(
    compute_capability: int, filters: tuple[int, float, float]
) -> None:
    logits, keys = torch.full((4, 50), -math.inf), some_keys(4)
    logits[0, 7] = -80.0
    logits[1, 9:11] = math.inf
    logits[2, 11:13], logits[2, 5] = math.nan, 5.0
    (drawn,) = draw(logits, keys, filters, compute_capability=compute_capability)
    assert drawn.tolist() == [7, 9, 11, 0]


def test_draws_of_rows_off_vectors() -> None:
    logits, keys, filters = torch.randn(3, 5001), some_keys(3), (40, 0.9, 0.01)
    for rows in (logits, logits[:, 3:]):
        assert torch.equal(draw(rows, keys, filters)[0], right(rows, keys, filters))


def test_every_barrier_of_a_draw_is_needed() -> None:
    logits, keys = 0.01 * torch.randn(4, 5000), some_keys(4)  # any other 64 show
    reached, needed = set[str](), set[str]()
    for capability in (80, 90):

        def run(capability: int = capability, **options: Any) -> tuple[Tensor]:
            return draw(logits, keys, (64, 1.0, 0.0), compute_capability=capability, **options)

        reached |= set(places(run))
        needed |= {place for place in places(run) if is_needed(run, place)}
    assert len(reached) == 7
    # Without one a bound is too low, and the k-th largest is found all the same.
    (free,) = reached - needed
    assert "bound = " in line_of(free, 1)
