"""The curves of a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def plot_curves(metrics: Path, image: Path) -> bool:
    """Draws loss, held-out loss and learning rate over the steps; needs matplotlib.

    Args:
        metrics: the JSON lines of a run.
        image: the PNG to write.

    Returns:
        Whether it was drawn; without matplotlib a note on stderr says what to install.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        if sys.stderr is not None:
            print(
                f"no {image.name}: plotting needs matplotlib: pip install 'gemma2_ext[plot]'; "
                f"the figures are in {metrics}",
                file=sys.stderr,
            )
        return False
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "held_out_loss" in row]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([r["step"] for r in steps], [r["loss"] for r in steps], linewidth=0.8, label="loss")
    if held_out:
        axes.plot(
            [r["step"] for r in held_out],
            [r["held_out_loss"] for r in held_out],
            "o-",
            markersize=3,
            label="held out, cross-entropy",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("nats a token")
    rate = axes.twinx()
    rate.plot(
        [r["step"] for r in steps],
        [r["learning_rate"] for r in steps],
        color="0.6",
        linewidth=0.8,
        linestyle="dashed",
    )
    rate.set_ylabel("learning rate (dashed)")
    axes.legend(loc="upper right")
    partial = image.with_name("." + image.name)
    figure.savefig(partial, format="png", dpi=100)
    partial.replace(image)
    return True
