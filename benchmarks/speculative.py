"""Speculative decoding: acceptance, tokens a step, speed-up over plain decoding in the same run.

    python benchmarks/speculative.py                       # the model that ships
    python benchmarks/speculative.py --size 2b --layers 4  # random weights of published shapes

Texts that repeat themselves and texts that do not, greedy and sampled; drafts by prompt look-up and
by a smaller model. Every text is compared with the plain one. Random weights do not repeat what
they read, so the accepted drafts of --size come from a draft that knows the text (`oracle`), wrong
at the stated rate: what a draft of that quality gives at these shapes.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from gemma2_ext import _C, Gemma2, Gemma2Config
from gemma2_ext.generate import Sampler
from gemma2_ext.models import shipped_model
from gemma2_ext.speculative import Draft, ModelDraft, NgramDraft
from gemma2_ext.tokenizer import Tokenizer
from gemma2_ext.weights import random_weights

VERSE = (
    "But, soft! what light through yonder window breaks?\nIt is the east, and Juliet is the sun.\n"
)
PROMPTS = {
    "repeats": ("ROMEO:\n" + VERSE) * 4,
    "does not": "ROMEO:\nWhat news from Verona? Dost thou not bring me letters from the friar?\n",
}


class Oracle(Draft):
    """A draft that knows the text, and says another token in a share of all cases."""

    def __init__(self, text: list[int], right: float) -> None:
        super().__init__()
        self._text, self._right, self._random = text, right, random.Random(0)

    def kind(self) -> int:
        return 0

    def propose(self, sampler: Sampler, keys: torch.Tensor) -> list[int]:
        at = len(self.ids)
        tokens = self._text[at : at + len(keys)]
        return [t if self._random.random() < self._right else t ^ 1 for t in tokens]


def rounds(model: Gemma2, ids: torch.Tensor, drafts: dict, count: int, times: int, **options):
    """Plain and drafted decoding in turns; prints and returns a row for each draft."""

    def timed(draft: Draft | None) -> tuple[float, torch.Tensor]:
        tokens, start = [], 0.0
        for token in model.stream(ids, max_new_tokens=count, stop_ids=(), draft=draft, **options):
            start = start or time.perf_counter()  # the first token is the prompt's
            tokens.append(token)
        return (time.perf_counter() - start) / (len(tokens) - 1), torch.tensor(tokens)

    text = timed(None)[1]
    rows = []
    for name, make in drafts.items():
        draft = make(ids[0].tolist() + text.tolist())
        plain_seconds, draft_seconds = [], []
        for _ in range(times):
            plain_seconds.append(timed(None)[0])
            seconds, tokens = timed(draft)
            assert torch.equal(tokens, text), "a draft has changed the text"
            draft_seconds.append(seconds)
        plain, drafted = statistics.median(plain_seconds), statistics.median(draft_seconds)
        row = {
            "draft": name,
            "acceptance": draft.acceptance,
            "tokens_per_step": (len(text) - 1) / draft.steps,
            "plain_token_s": 1 / plain,
            "draft_token_s": 1 / drafted,
            "speed_up": plain / drafted,
        }
        rows.append(row)
        print(
            f"  {name:16s} acceptance {row['acceptance']:4.0%}  "
            f"{row['tokens_per_step']:5.2f} tokens a step  plain {row['plain_token_s']:7.1f} "
            f"token/s  drafted {row['draft_token_s']:7.1f}  speed-up {row['speed_up']:.2f}"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=("2b", "9b", "27b"))
    parser.add_argument("--layers", type=int, help="fewer layers, for a quick look")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"{_C.cpu_isa()}, {torch.get_num_threads()} threads")
    results = []
    if args.size:
        config = getattr(Gemma2Config, f"gemma2_{args.size}")()
        if args.layers:
            kinds = config.layer_types[: args.layers]
            config = replace(config, num_hidden_layers=args.layers, layer_types=kinds)
        model = Gemma2(config, random_weights(config, torch.bfloat16, seed=0))
        ids = torch.randint(3, config.vocab_size, (1, 64))
        drafts = {
            f"oracle {right:.0%}": lambda text, right=right: Oracle(text, right)
            for right in (1.0, 0.9, 0.7, 0.4)
        }
        print(f"{args.size}, {config.num_hidden_layers} layers, bfloat16")
        rows = rounds(model, ids, drafts, args.new_tokens, args.rounds)
        results += [{"model": args.size, **row} for row in rows]
    else:
        model = Gemma2.from_pretrained(shipped_model())
        tokenizer = Tokenizer.from_pretrained(shipped_model())
        drafts = {
            "ngram": lambda text: NgramDraft(),
            "model (itself)": lambda text: ModelDraft(model),
        }
        for text, prompt in PROMPTS.items():
            ids = torch.tensor([tokenizer.encode(prompt)])
            for options in ({}, {"temperature": 0.8, "seed": 1}):
                print(f"text that {text}, {options or 'greedy'}")
                rows = rounds(model, ids, drafts, args.new_tokens, args.rounds, **options)
                results += [{"model": "shipped", "text": text, **options, **r} for r in rows]
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
