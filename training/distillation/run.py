"""Gemma 2's finding in kind: a small model learns more from a teacher than from the text alone.

Students of three sizes, each from scratch and by distillation, on the same tokens in the same
order, over several seeds; beside it GQA against MHA and deep against wide at equal parameters, and
a smaller window at inference. Every run is a `gemma2-ext` command; its result is written to
`results/NAME.json` as it ends, and a run whose result is there is not done again.

    python run.py                                       # Shakespeare; the shipped model teaches
    python run.py --data wiki.txt --out wiki            # trains a teacher on that text first
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from gemma2_ext import Gemma2Config, cli
from gemma2_ext.models import shipped_model

HERE = Path(__file__).resolve().parent
SHAKESPEARE = HERE.parent / "shakespeare" / "tinyshakespeare.txt"
LENGTH = 256
SEEDS = 3


def config(hidden: int, layers: int, inner: int, heads: int = 4, kv_heads: int = 2) -> Gemma2Config:
    """A student for the shipped tokenizer and teacher."""
    return Gemma2Config(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=512,
        query_pre_attn_scalar=16,
        sliding_window=64,
        eos_token_id=(1, 107),
    )


def resized(shape: Gemma2Config, parameters: int) -> Gemma2Config:
    """The shape with the intermediate_size that comes nearest to so many parameters."""
    at = [replace(shape, intermediate_size=n).num_parameters for n in (1, 2)]
    inner = round((parameters - at[0]) / (at[1] - at[0])) + 1
    return replace(shape, intermediate_size=inner)


SIZES = {"small": config(32, 2, 96), "medium": config(64, 4, 192), "large": config(112, 6, 336)}
MIDDLE = SIZES["medium"].num_parameters
# Against the medium one, whose queries share keys and values by two.
SHAPES = {
    "mha": resized(config(64, 4, 1, kv_heads=4), MIDDLE),
    "deep": resized(config(52, 7, 1), MIDDLE),
    "wide": resized(config(80, 2, 1), MIDDLE),
}
TEACHER = replace(config(192, 8, 512), head_dim=48, query_pre_attn_scalar=48)


def split(text: str, eval_bytes: int) -> tuple[str, str]:
    """The first nine tenths, and some eval_bytes characters behind them: each to the end of a
    paragraph, or of a line where the text has no empty ones."""
    mark = "\n\n" if "\n\n" in text else "\n"
    cut = text.rfind(mark, 0, len(text) * 9 // 10) + len(mark)
    rest = text[cut:]
    end = rest.find(mark, eval_bytes)
    if cut < len(mark) or not rest.strip():
        raise SystemExit(f"{len(text)} characters: nothing to cut in two by a paragraph or line")
    return text[:cut], rest if end < 0 else rest[:end]


class Runs:
    """Runs commands and keeps their results."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work = args.out / "work"
        self.results = args.out / "results"
        self.work.mkdir(parents=True, exist_ok=True)
        self.results.mkdir(exist_ok=True)

    def command(self, *args: object) -> str:
        """Runs a gemma2-ext command in this process; returns what it prints."""
        values = [*map(str, args), "--threads", str(self.args.threads)]
        with redirect_stdout(io.StringIO()) as out:
            code = cli.main(values)
        if code:
            raise SystemExit(f"gemma2-ext {' '.join(values)} failed")
        return out.getvalue()

    def train(self, name: str, student: Gemma2Config, seed: int, distil: bool) -> None:
        """One run; its result goes to results/NAME.json."""
        path = self.results / f"{name}.json"
        args = self.args
        setting = {
            "seed": seed,
            "parameters": student.num_parameters,
            "config": student.to_dict(),
            "steps": args.steps,
            "step_tokens": args.step_tokens,
            "learning_rate": args.learning_rate,
            "top_k": args.top_k,
        }
        if path.exists():
            stored = json.loads(path.read_text())
            if any(stored.get(key) != json.loads(json.dumps(setting[key])) for key in setting):
                raise SystemExit(f"{path} is of a run with other settings: move it away")
            return
        folder, work = self.work / name, self.work
        student.save_pretrained(work / f"{name}.config")
        kind = ["train", "--model"]
        if distil:
            kind = ["distill", *(() if args.top_k else ("--teacher", self.teacher)), "--student"]
        data = (work / "taught.tokens", "--fixed-cuts") if args.top_k else (work / "train.tokens",)
        command = [
            *kind,
            work / f"{name}.config/config.json",
            *("--data", *data),
            *("--eval-data", work / "eval.txt", "--tokenizer", self.teacher),
            *("--sequence-length", LENGTH, "--batch-tokens", args.step_tokens),
            *("--steps", args.steps, "--learning-rate", args.learning_rate, "--dtype", "float32"),
            *("--warm-up", args.steps // 10, "--seed", seed, "--out", folder, "--resume"),
            *("--evaluate-every", max(1, args.steps // 8), "--checkpoint-every", args.steps),
        ]
        began = time.perf_counter()
        result = json.loads(self.command(*command, "--json"))
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        curve = [line for line in map(json.loads, lines) if "held_out_loss" in line]
        record = {
            "name": name,
            "objective": "distillation" if distil else "cross-entropy",
            **setting,
            "tokens": result["tokens"],
            "held_out_loss": result["held_out_loss"],
            "held_out_perplexity": result["held_out_perplexity"],
            "held_out_bits_per_byte": result["held_out_bits_per_byte"],
            "curve": [[line["step"], line["held_out_loss"]] for line in curve],
            "seconds": time.perf_counter() - began,
        }
        self.write(name, record)

    def write(self, name: str, record: dict[str, Any]) -> None:
        partial = self.results / f".{name}"
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.replace(self.results / f"{name}.json")
        print(f"{name}: {record.get('held_out_perplexity', '')}", flush=True)

    def prepare(self) -> None:
        """Text, teacher, and with --top-k what the teacher says about the text."""
        args, work = self.args, self.work
        train, held_out = split(args.data.read_text(encoding="utf-8"), args.eval_bytes)
        (work / "train.txt").write_text(train, encoding="utf-8")
        (work / "eval.txt").write_text(held_out, encoding="utf-8")
        tokens = work / "train.tokens"
        if not tokens.exists():
            tokenizer = args.teacher or shipped_model()
            self.command("tokenize", work / "train.txt", "--tokenizer", tokenizer, "--out", tokens)
        self.teacher: Path = args.teacher or shipped_model()
        if args.teacher is None and args.data.resolve() != SHAKESPEARE:
            self.teacher = work / "teacher"
            TEACHER.save_pretrained(work / "teacher.config")
            self.command(
                *("train", "--model", work / "teacher.config/config.json", "--data", tokens),
                *("--eval-data", work / "eval.txt", "--export", "best", "--out", self.teacher),
                *("--sequence-length", LENGTH, "--batch-tokens", 2048, "--learning-rate", 3e-3),
                *("--steps", args.teacher_steps, "--warm-up", 100, "--dtype", "float32"),
                *("--seed", 0, "--resume"),
            )
        if args.top_k and not (work / "taught.tokens").exists():
            self.command(
                *("teach", "--teacher", self.teacher, "--data", tokens, "--top-k", args.top_k),
                *("--sequence-length", LENGTH, "--dtype", "float32"),
                *("--out", work / "taught.tokens"),
            )

    def windows(self, name: str, folder: Path) -> None:
        """A model's perplexity with its window, half and a quarter of it."""
        if (self.results / f"{name}.json").exists():
            return
        window = Gemma2Config.from_pretrained(folder).sliding_window
        record: dict[str, Any] = {"name": name, "windows": {}}
        for size in (window, window // 2, window // 4):
            out = self.command(
                *("perplexity", self.work / "eval.txt", "--model", folder, "--json"),
                *("--sliding-window", size, "--context", LENGTH, "--dtype", "float32"),
            )
            record["windows"][size] = json.loads(out)["perplexity"]
        self.write(name, record)


def jobs(seeds: int) -> Iterator[tuple[str, Gemma2Config, int, bool]]:
    """All runs, seed after seed, so that what was cut short is whole as far as it goes."""
    for seed in range(seeds):
        for size, student in SIZES.items():
            for kind in ("scratch", "distilled"):
                yield f"{size}-{kind}-{seed}", student, seed, kind == "distilled"
        for shape, student in SHAPES.items():
            yield f"{shape}-scratch-{seed}", student, seed, False


def perplexities(results: Path, prefix: str) -> list[float]:
    found = sorted(results.glob(f"{prefix}-[0-9].json"))
    return [json.loads(path.read_text())["held_out_perplexity"] for path in found]


def table(results: Path, rows: Sequence[tuple[str, str, str]]) -> str:
    """Markdown: the mean and spread of two kinds of run, and their ratio."""
    lines = []
    for label, first, second in rows:
        a, b = perplexities(results, first), perplexities(results, second)
        if not a or not b:
            continue
        paired = [y / x for x, y in zip(a, b, strict=False)]
        lines.append(
            f"| {label} | {spread(a)} | {spread(b)} | {statistics.mean(paired):.3f} "
            f"({min(paired):.3f} to {max(paired):.3f}) |"
        )
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def plot(results: Path, image: Path) -> None:
    """Held-out loss over parameters, and over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    sizes, curves = figure.subplots(1, 2)
    for kind, color in (("scratch", "tab:red"), ("distilled", "tab:blue")):
        points = []
        for size in SIZES:
            paths = sorted(results.glob(f"{size}-{kind}-[0-9].json"))
            records = [json.loads(path.read_text()) for path in paths]
            points += [(r["parameters"], r["held_out_perplexity"]) for r in records]
            for record in records:
                style = {"small": ":", "medium": "--", "large": "-"}[size]
                label = f"{size}, {kind}" if record is records[0] else None
                curves.plot(*zip(*record["curve"], strict=True), style, color=color, label=label)
        sizes.plot(*zip(*points, strict=True), "o", color=color, label=kind, alpha=0.7)
    sizes.set(xlabel="parameters", ylabel="held-out perplexity")
    sizes.legend()
    curves.set(xlabel="step", ylabel="held-out loss, nats a token")
    curves.legend(fontsize="small")
    figure.savefig(image, format="png", dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, default=SHAKESPEARE, help="UTF-8 text")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for work/ and results/")
    parser.add_argument("--teacher", type=Path, help="default: shipped, or trained on --data")
    parser.add_argument("--teacher-steps", type=int, default=750)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--step-tokens", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument(
        "--top-k", type=int, help="teach by the stored K most probable words; default: by all"
    )
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--eval-bytes", type=int, default=30000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    runs = Runs(args)
    runs.prepare()
    # glibc gives every large tensor back to the system, and takes it anew in the next step.
    os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 35)}
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        for done in [pool.submit(runs.train, *job) for job in jobs(args.seeds)]:
            done.result()
    runs.windows("windows-teacher", runs.teacher)
    runs.windows("windows-student", runs.work / "large-distilled-0")
    results = runs.results
    print("\n| student | from scratch | distilled | ratio |\n|---|---|---|---|")
    rows = [
        (f"{n}, {c.num_parameters:,}", f"{n}-scratch", f"{n}-distilled") for n, c in SIZES.items()
    ]
    print(table(results, rows))
    print("\n| first, second | first | second | ratio |\n|---|---|---|---|")
    print(
        table(
            results,
            [
                ("MHA, GQA", "mha-scratch", "medium-scratch"),
                ("wide, deep", "wide-scratch", "deep-scratch"),
            ],
        )
    )
    docs = HERE.parents[1] / "docs"
    plot(results, (docs if args.out == HERE else args.out) / "distillation.png")


if __name__ == "__main__":
    main()
