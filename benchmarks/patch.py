"""A patched transformers model against stock eager, in turns: prefill, decode, a training step.

    python benchmarks/patch.py --layers 2 --vocab-size 32000 --prompt 512 --dtype bfloat16

Layers have the sizes of Gemma 2 2B; fewer of them, and fewer words, so that a step's gradients fit.
The loss is checked to agree before anything is timed. Peak memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import transformers

import gemma2_ext
import gemma2_ext.integrations.transformers as hf
from gemma2_ext import Gemma2Config

KINDS = ("stock eager", "patched")


def make(args: argparse.Namespace, kind: str) -> Any:
    config = Gemma2Config.gemma2_2b()
    config = replace(
        config,
        num_hidden_layers=args.layers,
        layer_types=config.layer_types[: args.layers],
        vocab_size=args.vocab_size,
    )
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM._from_config(
        transformers.Gemma2Config(**config.to_dict()),
        attn_implementation="eager",
        dtype=getattr(torch, args.dtype),
    )
    return hf.patch(model) if kind == "patched" else model


def work(args: argparse.Namespace, model: Any, phase: str) -> Callable[[], Any]:
    """What is timed of a phase, as a function without arguments."""
    ids = torch.randint(0, args.vocab_size, (1, args.prompt))
    if phase == "training step":

        def step() -> float:
            model.train().zero_grad()
            loss = model(ids, labels=ids).loss
            loss.backward()
            return loss.item()

        return step
    model.eval()
    if phase == "prefill":
        return torch.no_grad()(lambda: model(ids, logits_to_keep=1, use_cache=False).logits)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    tokens = args.new_tokens
    return lambda: model.generate(ids, min_new_tokens=tokens, max_new_tokens=tokens, **options)


def peak_gigabytes(args: argparse.Namespace, kind: str, phase: str) -> float:
    """Of the process so far; run in one of its own."""
    work(args, make(args, kind), phase)()
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("VmHWM")]
    return int(line.split()[1]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--phases", nargs="+", default=["prefill", "decode", "training step"])
    parser.add_argument("--peak-of", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        print(peak_gigabytes(args, args.peak_of, args.phases[0]))
        return
    models = {kind: make(args, kind) for kind in KINDS}
    print(
        f"{platform.processor() or platform.machine()}, {gemma2_ext._C.cpu_isa()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {args.dtype}, {args.layers} layers of Gemma 2 2B, "
        f"{args.vocab_size} words, {args.prompt} tokens"
    )
    for phase in args.phases:
        runs = {kind: work(args, model, phase) for kind, model in models.items()}
        first = {kind: run() for kind, run in runs.items()}
        if phase == "training step":
            assert abs(first["patched"] / first["stock eager"] - 1) < 1e-2, first
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(args.repeats):
            for kind, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[kind].append(time.perf_counter() - start)
        medians = {kind: statistics.median(times) for kind, times in seconds.items()}
        row: dict[str, Any] = {"phase": phase, "seconds": medians}
        row["ratio"] = medians["stock eager"] / medians["patched"]
        row["peak_gigabytes"] = {
            kind: float(
                subprocess.check_output(
                    [sys.executable, __file__, *sys.argv[1:], "--peak-of", kind, "--phases", phase]
                )
            )
            for kind in KINDS
        }
        print(json.dumps(row))


if __name__ == "__main__":
    main()
