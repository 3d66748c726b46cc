"""Runs of `gemma2-ext train` and `distill` on a tiny text, for tests."""

from __future__ import annotations

import io
import json
import random
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from gemma2_ext import Gemma2, Gemma2Config, cli
from gemma2_ext.training import trainer

WORDS = ("the", "king", "shall", "speak", "of", "love", "and", "war", "before", "night", "comes")
DRAW = random.Random(0)
TEXT = "".join(" ".join(DRAW.choices(WORDS, k=8)).capitalize() + ".\n" for _ in range(80))
SMALL = ("--sequence-length", 32, "--batch-tokens", 64, "--learning-rate", 1e-2, "--warm-up", 2)


def student(**changes: Any) -> Gemma2Config:
    values: dict[str, Any] = {
        "vocab_size": 2048,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "eos_token_id": (1, 107),
    }
    return Gemma2Config(**{**values, **changes})


def train_arguments(folder: Path, *args: object, command: str = "train") -> list[str]:
    """Arguments of a run in folder, whose text and student stand in folder.parent."""
    parent = folder.parent
    if not (parent / "config.json").exists():
        (parent / "text.txt").write_text(TEXT)
        student().save_pretrained(parent)
    student_option = "--student" if command == "distill" else "--model"
    values = [command, student_option, parent / "config.json", "--data", parent / "text.txt"]
    return [str(a) for a in (*values, *SMALL, "--out", folder, "--json", *args)]


def run(folder: Path, *args: object, command: str = "train") -> dict[str, Any]:
    """Runs the command in this process; returns the object it prints, or its error."""
    arguments = train_arguments(folder, "--threads", 1, *args, command=command)
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = cli.main(arguments)
    if code:
        return {"error": err.getvalue().strip().splitlines()[-1]}
    return json.loads(out.getvalue())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(Gemma2.from_pretrained(folder).named_parameters())


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run, without what a clock says."""
    lines = (folder / trainer.METRICS).read_text().splitlines()
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]
