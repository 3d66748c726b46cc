"""Results as a table, JSON, pictures and a page; and the comparison with an earlier run."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import _C, __version__
from ._harness import Result, Side

FORMAT = 1  # of the JSON


def machine_facts(device: str) -> dict[str, Any]:
    """What a figure depends on: processor, instruction set, threads, versions."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cpu_isa": _C.cpu_isa(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gemma2_ext": __version__,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = properties.name
        facts["cuda"] = torch.version.cuda
    return facts


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def time_text(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def rate_text(result: Result, seconds: float) -> str:
    """GB/s where memory is the limit, GFLOP/s where arithmetic is."""
    if result.bound == "arithmetic":
        return f"{result.operations / seconds / 1e9:.4g} GFLOP/s"
    return f"{result.bytes / seconds / 1e9:.3g} GB/s"


def limit_text(result: Result) -> str:
    """The limit that the case meets, as it was measured."""
    if not result.limit_seconds:
        return "no limit measured"
    if result.bound == "arithmetic":
        return f"{result.peak / 1e9:.4g} GFLOP/s"
    return f"{result.bandwidth / 1e9:.3g} GB/s"


def lines(result: Result) -> list[str]:
    """A result as lines of text: the case, then one for each side."""
    text = [f"{result.op}  {result.shape}  {result.dtype} {result.phase}  {limit_text(result)}"]
    ours = result.sides[0]
    for side in result.sides:
        if not side.samples:
            text.append(f"  {side.name:16s} {side.verdict}")
            continue
        low, high = side.quartiles
        parts = [
            f"  {side.name:16s} {time_text(side.seconds):>9s}",
            f"({time_text(low)} to {time_text(high)})",
            f"{rate_text(result, side.seconds):>14s}",
        ]
        if result.limit_seconds:
            parts.append(f"{result.limit_seconds / side.seconds:6.1%} of the limit")
        if side is not ours:
            parts.append(f"{side.seconds / ours.seconds:.2f}x our time")
        if side.samples < 20:
            parts.append(f"[{side.samples} samples]")
        if side.verdict != "right":
            parts.append(side.verdict)
        text.append(" ".join(parts))
    return text


def to_json(results: Sequence[Result], machine: dict[str, Any]) -> str:
    """All of it, with the machine they are of."""
    facts = {
        "format": FORMAT,
        "machine": machine,
        "results": [result.to_json() for result in results],
    }
    return json.dumps(facts, indent=1) + "\n"


def read_json(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[Result]]:
    """Machine and results of a file written by `to_json`.

    Raises:
        ValueError: the file is not such a one.
    """
    try:
        facts = json.loads(Path(path).read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            raise ValueError(f"its format is {facts['format']}, not {FORMAT}")
        return facts["machine"], [Result.from_json(r) for r in facts["results"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no results of gemma2-ext bench: {error}") from None


def read_all(paths: Sequence[str | os.PathLike[str]]) -> tuple[dict[str, Any], list[Result]]:
    """Machine and results of several files.

    Raises:
        ValueError: a file is not such a one, or of another machine than the first.
    """
    machine, results = read_json(paths[0])
    for path in paths[1:]:
        other, more = read_json(path)
        for name, value in machine.items():
            if other.get(name) != value:
                raise ValueError(
                    f"{path}: its {name} is {other.get(name)!r}, that of {paths[0]} {value!r}"
                )
        results += more
    return machine, results


def _key(result: Result) -> tuple[str, ...]:
    return (
        *(result.op, result.shape, result.size),
        *(result.phase, result.dtype, result.device),
    )


def compare(old: Sequence[Result], new: Sequence[Result]) -> list[str]:
    """Lines that say of each case in both: faster, slower, or no more than noise.

    Where both runs measured the case's limit, times are taken relative to it, so that a machine
    whose memory is slower today does not count against the code. A change counts beyond 3 % and
    beyond the quartiles of both runs.
    """
    before = {_key(result): result for result in old}
    text = []
    for result in new:
        earlier = before.get(_key(result))
        if earlier is None or not earlier.sides or not earlier.sides[0].samples:
            continue
        ratio, low, high = _ratio(earlier, result)
        verdict = "no change beyond noise"
        if high < 0.97:
            verdict = "faster"
        elif low > 1.03:
            verdict = "slower"
        of = " of the limit's" if earlier.limit_seconds and result.limit_seconds else ""
        text.append(
            f"{result.op}  {result.shape}  {result.dtype} {result.phase}: {ratio:.3f}x the time"
            f"{of} ({low:.3f} to {high:.3f}): {verdict}"
        )
    return text


def _ratio(old: Result, new: Result) -> tuple[float, float, float]:
    """New time over old, and the least and most that the quartiles allow."""
    a, b = old.sides[0], new.sides[0]
    scale = 1.0
    if old.limit_seconds and new.limit_seconds:
        scale = old.limit_seconds / new.limit_seconds

    def over(x: float, y: float) -> float:
        return scale * x / y

    return (
        over(b.seconds, a.seconds),
        over(b.quartiles[0], a.quartiles[1]),
        over(b.quartiles[1], a.quartiles[0]),
    )


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise ValueError("bench: --plot needs matplotlib: pip install matplotlib") from None
    return plt


def plot_bars(results: Sequence[Result], path: str | os.PathLike[str]) -> dict[str, Path]:
    """Bars: each side's share of the limit (its speed relative to ours where none is measured).

    Returns:
        The picture of each op: `path`, or of several ops `path` with each one's name before the
        suffix.
    """
    path = Path(path)
    names = list(dict.fromkeys(result.op for result in results))
    several = len(names) > 1
    pictures = {op: path.with_stem(f"{path.stem}-{op}") if several else path for op in names}
    for op, picture in pictures.items():
        _plot_op([result for result in results if result.op == op], picture)
    return pictures


def _plot_op(results: Sequence[Result], path: Path) -> None:
    plt = _pyplot()
    names: list[str] = []
    for result in results:
        names += [s.name for s in result.sides if s.samples and s.name not in names]
    colors = dict(zip(names, plt.get_cmap("tab10").colors * 3, strict=False))
    figure, axes = plt.subplots(figsize=(9, 0.7 + 0.2 * sum(len(r.sides) + 1 for r in results)))
    y, ticks, labels = 0.0, [], []
    for result in results:
        ours = result.sides[0]
        top = y
        for side in (s for s in result.sides if s.samples):
            share = (result.limit_seconds or ours.seconds) / side.seconds
            wrong = side.verdict != "right"
            axes.barh(y, 100 * share, color=colors[side.name], hatch="//" if wrong else None)
            note = f" {time_text(side.seconds)}" + (" (wrong)" if wrong else "")
            axes.text(100 * share, y, note, va="center", fontsize=6)
            y += 1
        ticks.append((top + y - 1) / 2)
        labels.append(f"{result.shape}\n{result.dtype}, {result.phase}")
        y += 0.8
    axes.set_yticks(ticks, labels, fontsize=6)
    axes.invert_yaxis()
    axes.set_title(results[0].op, fontsize=9)
    axes.set_xlabel("percent of the limit measured in the same run (without one: of our speed)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colors[name]) for name in names]
    axes.legend(handles, names, fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_roofline(results: Sequence[Result], path: str | os.PathLike[str]) -> None:
    """Operations a second over operations a byte, under the roof of both limits."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 5))
    shown = [r for r in results if r.operations and r.bandwidth and r.peak]
    if not shown:
        raise ValueError("bench: a roofline needs a case that multiplies (attention, linear)")
    peak = max(r.peak for r in shown)
    bandwidth = max(r.bandwidth for r in shown)
    low = min(r.operations / r.bytes for r in shown) / 2
    high = max(max(r.operations / r.bytes for r in shown), peak / bandwidth) * 2
    ridge = peak / bandwidth
    points = [low, max(low, ridge), high]
    axes.plot(points, [min(peak, bandwidth * x) / 1e9 for x in points], "k-", linewidth=1)
    names: list[str] = []
    for result in shown:
        names += [s.name for s in result.sides if s.samples and s.name not in names]
    for name in names:
        xy = [
            (r.operations / r.bytes, r.operations / s.seconds / 1e9)
            for r in shown
            for s in r.sides
            if s.name == name and s.samples
        ]
        axes.plot([x for x, _ in xy], [y for _, y in xy], "o", markersize=4, label=name)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s")
    axes.legend(fontsize=7)
    axes.grid(True, which="both", alpha=0.2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def markdown(
    machine: dict[str, Any],
    results: Sequence[Result],
    pictures: Sequence[str] = (),
    picture_of: Mapping[str, str] | None = None,
) -> str:
    """A page of tables, one an op, from results.

    Args:
        machine: as from `machine_facts`.
        results: of one machine.
        pictures: of all ops, as paths from the page.
        picture_of: of one op each, by its name.
    """
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    text = [
        "# Performance",
        "",
        "Written by `gemma2-ext bench --report`. A share of the limit is against a probe of the "
        "machine in turns with what is measured: bandwidth with the same mix of reads and writes, "
        "or multiply-adds in registers. Medians; a side that computes something else is marked.",
        "",
        f"Machine: {facts}.",
        "",
    ]
    for picture in pictures:
        text += [f"![{Path(picture).stem}]({picture})", ""]
    for op in dict.fromkeys(result.op for result in results):
        text += [f"## {op}", ""]
        if picture_of and op in picture_of:
            text += [f"![{op}]({picture_of[op]})", ""]
        text += ["| case | side | time | rate | of the limit | to ours |"]
        text += ["|---|---|---|---|---|---|"]
        for result in (r for r in results if r.op == op):
            case = f"{result.shape}, {result.dtype}, {result.phase}"
            for side in result.sides:
                text.append(_row(case, result, side))
                case = ""
        text.append("")
    return "\n".join(text)


def _row(case: str, result: Result, side: Side) -> str:
    if not side.samples:
        return f"| {case} | {side.name} | {side.verdict} | | | |"
    ours = result.sides[0]
    share = (
        f"{result.limit_seconds / side.seconds:.0%}"
        if result.limit_seconds
        else "no limit measured"
    )
    ratio = f"{side.seconds / ours.seconds:.2f}x the time" if side is not ours else ""
    name = side.name if side.verdict == "right" else f"{side.name} ({side.verdict})"
    rate = rate_text(result, side.seconds)
    return f"| {case} | {name} | {time_text(side.seconds)} | {rate} | {share} | {ratio} |"
