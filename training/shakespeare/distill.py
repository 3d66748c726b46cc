"""Distils the model that ships: a student of the same size learns what train.py's model says.

The text and its speeches as chats are written to files, `gemma2-ext distill` does the rest: the
student is drawn anew and never sees which word stands in the text, only its teacher's distribution.

    python train.py && python distill.py                        # the model in the package
    python distill.py --data my.txt --teacher my-model --out my-student
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from train import (
    CARD,
    CHAT_PROMPT,
    HERE,
    TEACHER,
    TEXT_PROMPT,
    bits_per_byte,
    encode,
    sample,
    speeches,
    split,
    write,
)

from gemma2_ext import Gemma2, cli

SHIPPED = HERE.parents[1] / "python" / "gemma2_ext" / "models" / "shakespeare"

TRAINING = """\
Distilled by `gemma2-ext distill` from a teacher of the same size and shape, which `train.py` made
from the text itself ({teacher_bits_per_byte:.3f} bits per byte): the student was drawn anew and
learnt the teacher's distribution over all words at every place, never the word that stands there.
Step {best_step} of {steps}, each of 2048 tokens in sequences of 512; AdamW at 0.003, beta2 0.98,
100 steps of warm-up, then a cosine to a tenth; gradients clipped to 1, seed 0. It read the text as
it stands, and what of it are speeches as chats of {turns}: one is the user's turn, the next the
model's. Float32 on a CPU (threads: {num_threads}). The scripts, the text and how to repeat it are
in the project's `training/shakespeare`."""


def write_chats(path: Path, turns: list[str], length: int) -> None:
    """JSON Lines of conversations of so many speeches; in every other one a speech that would be
    asked is an answer."""
    with path.open("w", encoding="utf-8") as file:
        for i, first in enumerate(range(0, len(turns) - length, length)):
            chat = turns[first + i % 2 :][:length]
            text = "".join(
                f"<start_of_turn>{('user', 'model')[j % 2]}\n{speech}<end_of_turn>\n"
                for j, speech in enumerate(chat)
            )
            file.write(json.dumps({"text": text}) + "\n")


def measured(folder: Path, text: str) -> float:
    """Bits per byte of the weights as stored, computed in float32."""
    model = Gemma2.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor(encode(Tokenizer.from_file(str(folder / "tokenizer.json")), text))
    stride = model.config.max_position_embeddings // 2
    weights = dict(model.named_parameters())
    return bits_per_byte(model.config, weights, ids, len(text.encode()), stride)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, default=HERE / "tinyshakespeare.txt", help="UTF-8")
    parser.add_argument("--teacher", type=Path, default=TEACHER, help="folder of train.py")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="text and checkpoints")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder of the student")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--turns", type=int, default=8, help="of a chat")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    train_text, held_out = split(args.data.read_text(encoding="utf-8"))
    text, chats, evaluated = (args.work / n for n in ("train.txt", "chats.jsonl", "held_out.txt"))
    text.write_text(train_text, encoding="utf-8")
    evaluated.write_text(held_out, encoding="utf-8")
    turns = speeches(train_text)
    write_chats(chats, turns, args.turns)
    data = [text, chats] if len(turns) > args.turns else [text]
    every = str(max(1, args.steps // 8))
    code = cli.main(
        [
            *("distill", "--teacher", str(args.teacher), "--tokenizer", str(args.teacher)),
            *("--student", str(args.teacher / "config.json"), "--out", str(args.work / "student")),
            *("--data", *map(str, data), "--eval-data", str(evaluated)),
            *("--sequence-length", "512", "--batch-tokens", "2048", "--steps", str(args.steps)),
            *("--learning-rate", "3e-3", "--warm-up", "100", "--beta2", "0.98", "--seed", "0"),
            *("--dtype", "float32", "--export", "best", "--export-dtype", "bfloat16"),
            *("--evaluate-every", every, "--checkpoint-every", every, "--resume"),
            *("--threads", str(args.threads)),
        ]
    )
    if code:
        raise SystemExit(code)
    describe(args, held_out)


def describe(args: argparse.Namespace, held_out: str) -> None:
    """Copies the student to --out, with its card."""
    args.out.mkdir(parents=True, exist_ok=True)
    for path in sorted((args.work / "student").glob("*.*")):
        if path.suffix in (".json", ".safetensors"):
            (args.out / path.name).write_bytes(path.read_bytes())
    model = Gemma2.from_pretrained(args.out, dtype=torch.float32)
    weights, config = dict(model.named_parameters()), model.config
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    lines = (args.work / "student" / "metrics.jsonl").read_text().splitlines()
    evaluations = [line for line in map(json.loads, lines) if "held_out_loss" in line]
    best = min(evaluations, key=lambda line: float(line["held_out_loss"]))
    torch.manual_seed(0)
    figures = {
        "data": args.data.name,
        "millions": config.num_parameters / 1e6,
        "bits_per_byte": measured(args.out, held_out),
        "teacher_bits_per_byte": measured(args.teacher, held_out),
        "held_out_bytes": len(held_out.encode()),
        "context": config.max_position_embeddings,
        "length": config.max_position_embeddings // 2,
        "best_step": best["step"],
        "num_threads": args.threads,
        "continuation": sample(config, weights, tokenizer, TEXT_PROMPT, 160),
        "answer": sample(config, weights, tokenizer, CHAT_PROMPT, 160),
    }
    facts = config.to_dict() | vars(args) | figures
    card = CARD.format(**facts, training=TRAINING.format(**facts))
    write(args.out, "README.md", card)
    print(card)


if __name__ == "__main__":
    main()
