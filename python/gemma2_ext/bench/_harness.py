"""Checks an answer, then times it: ours and its peers in turns, with probes of the limit between.

A round times every candidate once (a short call several times over, until it is long enough for
the clock), so what changes on the machine from one minute to the next meets all of them alike. The
median over the rounds is reported, with the quartiles as its uncertainty.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._probes import CpuProbes, CudaProbes, cpu_seconds, cuda_seconds

Call = Callable[[int], Any]  # of a set of inputs, by its number


class Unavailable(Exception):
    """A peer that this machine cannot run; its text says why."""


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Attributes:
        rounds: samples of each candidate.
        sample_seconds: a sample is at least this long.
        budget_seconds: a candidate that took longer in all is measured no further (but 3 times; one
            whose single call takes longer, once).
        peers: whether to measure peers at all.
    """

    rounds: int = 20
    sample_seconds: float = 0.02
    budget_seconds: float = 10.0
    peers: bool = True


@dataclass(frozen=True)
class Case:
    """One measurement: an op at one shape.

    Attributes:
        op: its name.
        shape: in words, for the table.
        size: "2b", "9b" or "27b".
        phase: "decode", "prefill" or "training".
        dtype: of its inputs.
        device: "cpu" or "cuda".
        ours: runs this package's op on inputs of one set and returns its result.
        peers: by name, what makes a callable like `ours`; it raises Unavailable where it cannot.
        check: of a result on set 0: None where it is right, else what is wrong with it.
        sets: of inputs, used in turns; together larger than the caches where memory is the limit.
        reads, writes: bytes that have to move.
        operations: additions and multiplications that have to be done.
        arithmetic: what they are done in: "float32" or "bfloat16".
    """

    op: str
    shape: str
    size: str
    phase: str
    dtype: str
    device: str
    ours: Call
    peers: dict[str, Callable[[], Call]]
    check: Callable[[Any], str | None]
    sets: int
    reads: int
    writes: int
    operations: int
    arithmetic: str


@dataclass
class Side:
    """One candidate's figures. `verdict`: "right", "wrong: ..." or "unavailable: ..."."""

    name: str
    verdict: str
    seconds: float = 0.0
    quartiles: tuple[float, float] = (0.0, 0.0)
    samples: int = 0


@dataclass
class Result:
    """A case's figures: its sides (ours first), and the limit in seconds (0: none measured)."""

    op: str
    shape: str
    size: str
    phase: str
    dtype: str
    device: str
    bytes: int
    operations: int
    bandwidth: float
    peak: float
    limit_seconds: float
    bound: str
    sides: list[Side] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As plain dictionaries and lists."""
        return asdict(self)

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> Result:
        """Back from `to_json`."""
        sides = [Side(**{**side, "quartiles": tuple(side["quartiles"])}) for side in facts["sides"]]
        return cls(**{**facts, "sides": sides})


def compare_tensors(actual: Any, exact: Tensor, dtype: torch.dtype) -> str | None:
    """None where the difference from `exact` is small beside it (both as root mean squares).

    This tells another function from the same one in that dtype; how exact an op is, tests judge.
    """
    allowed = {torch.float32: 1e-3, torch.float16: 2e-2}.get(dtype, 8e-2)
    if not isinstance(actual, Tensor):
        return f"a {type(actual).__name__}"
    if actual.shape != exact.shape:
        return f"shape {tuple(actual.shape)} for {tuple(exact.shape)}"
    if exact.numel() == 0:
        return None
    scale = float(exact.double().square().mean().sqrt()) or 1.0
    error = float((actual.double() - exact.double()).square().mean().sqrt()) / scale
    if not error <= allowed:  # NaN too
        return f"off by {error:.0%}"
    return None


def measure(case: Case, settings: Settings, probes: CpuProbes | CudaProbes) -> Result:
    """Runs one case.

    Raises:
        RuntimeError: this package's own answer is wrong.
    """
    seconds_of = cuda_seconds if case.device == "cuda" else cpu_seconds
    sides: list[Side] = []
    calls: list[tuple[Side, Call]] = []
    makers: dict[str, Callable[[], Call]] = {"gemma2_ext": lambda: case.ours}
    if settings.peers:
        makers.update(case.peers)
    for name, make in makers.items():
        try:
            call = make()
            problem = case.check(call(0))
        except Unavailable as error:
            sides.append(Side(name, f"unavailable: {error}"))
            continue
        except Exception as error:  # a peer's own failure is a finding, ours is an error
            if name == "gemma2_ext":
                raise
            sides.append(Side(name, f"unavailable: {_first_line(error)}"))
            continue
        if problem and name == "gemma2_ext":
            raise RuntimeError(f"gemma2_ext::{case.op} {case.shape} is wrong: {problem}")
        side = Side(name, f"wrong: {problem}" if problem else "right")
        sides.append(side)
        calls.append((side, call))

    repeats: dict[str, int] = {}
    samples: dict[str, list[float]] = {side.name: [] for side, _ in calls}
    for side, call in calls:
        once = seconds_of(lambda call=call: call(1 % case.sets))
        if once < 1:  # what compiles has done so by now; what is slow needs no more warmth
            for i in range(min(case.sets, 3)):
                call(i)
            once = seconds_of(lambda call=call: call(0))
        repeats[side.name] = max(1, min(10000, round(settings.sample_seconds / max(once, 1e-7))))
        if once > settings.budget_seconds:
            samples[side.name].append(once)
    slow = {name for name, taken in samples.items() if taken}
    spent = dict.fromkeys(samples, 0.0)
    turn = dict.fromkeys(samples, 0)
    bandwidths: list[float] = []
    peaks: list[float] = []
    mix = _mix(case)
    for _ in range(settings.rounds):
        if case.reads + case.writes:
            bandwidths.append(probes.bandwidth(*mix))
        if case.operations:
            peaks.append(probes.arithmetic(case.arithmetic))
        for side, call in calls:
            name, taken = side.name, samples[side.name]
            if name in slow or (spent[name] > settings.budget_seconds and len(taken) >= 3):
                continue
            count = repeats[name]

            def run(call: Call = call, name: str = name, count: int = count) -> None:
                for _ in range(count):
                    call(turn[name] % case.sets)
                    turn[name] += 1

            seconds = seconds_of(run)
            spent[name] += seconds
            taken.append(seconds / count)
    for side, _ in calls:
        taken = samples[side.name]
        side.seconds, side.samples = statistics.median(taken), len(taken)
        side.quartiles = _quartiles(taken)
    return _result(case, sides, bandwidths, peaks)


def _mix(case: Case) -> tuple[int, int]:
    """The probe's reads and writes that come nearest the case's."""
    if case.writes * 10 < case.reads:
        return 1, 0
    return (2 if case.reads > 1.5 * case.writes else 1), 1


def _result(
    case: Case, sides: list[Side], bandwidths: Sequence[float], peaks: Sequence[float]
) -> Result:
    bandwidth = statistics.median(bandwidths) if bandwidths else 0.0
    peak = statistics.median(peaks) if peaks else 0.0
    by_memory = (case.reads + case.writes) / bandwidth if bandwidth else 0.0
    by_arithmetic = case.operations / peak if peak else 0.0
    return Result(
        op=case.op,
        shape=case.shape,
        size=case.size,
        phase=case.phase,
        dtype=case.dtype,
        device=case.device,
        bytes=case.reads + case.writes,
        operations=case.operations,
        bandwidth=bandwidth,
        peak=peak,
        limit_seconds=max(by_memory, by_arithmetic),
        bound="memory" if by_memory >= by_arithmetic else "arithmetic",
        sides=sides,
    )


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4)
    return low, high


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120] if text else ''}"
