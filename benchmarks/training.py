"""A training step of a small Gemma 2 against transformers, in turns: seconds and memory.

    python benchmarks/training.py --dtype bfloat16 --rounds 5 --json out.json

A step is forward, loss, backward, clipping and AdamW on float32 weights, computed in --dtype
(transformers: under autocast). Each side runs in a process of its own, one step at a time, so that
its peak memory is its own; all start from the same weights, and must lose the same.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import gemma2_ext
from gemma2_ext import Gemma2, Gemma2Config
from gemma2_ext.training.data import Batch
from gemma2_ext.training.module import Objective, TrainingModule, new_weights
from gemma2_ext.weights import to_hugging_face_names

SIDES = ("gemma2_ext", "transformers eager", "transformers compiled")
SIZES = {
    # 98 million parameters, 21 million of them the embedding.
    "100m": Gemma2Config(
        vocab_size=32768,
        hidden_size=640,
        intermediate_size=2560,
        num_hidden_layers=13,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=512,
    ),
    "10m": Gemma2Config(
        vocab_size=16384,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=512,
    ),
}


def our_step(config: Gemma2Config, dtype: torch.dtype) -> tuple[torch.nn.Module, Callable]:
    module = TrainingModule(Gemma2(config, new_weights(config, 0)), dtype, Objective())
    module.requires_grad_(True)

    def loss(ids: torch.Tensor) -> torch.Tensor:
        tokens = ids.shape[1] - 1
        ends = torch.tensor([0, tokens], dtype=torch.int32)
        return module(Batch(ids[0, :-1], ids[0, 1:], ends, tokens, "", torch.arange(tokens)))

    return module, loss


def their_step(
    config: Gemma2Config, dtype: torch.dtype, compiled: bool
) -> tuple[torch.nn.Module, Callable]:
    import transformers

    hf_config = transformers.Gemma2Config(**config.to_dict(), attn_implementation="eager")
    model = transformers.Gemma2ForCausalLM(hf_config)
    weights = to_hugging_face_names(new_weights(config, 0), config)
    model.load_state_dict(weights, strict=False)
    del weights
    call = torch.compile(model) if compiled else model
    context = torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext()

    def loss(ids: torch.Tensor) -> torch.Tensor:
        with context:
            return call(input_ids=ids, labels=ids, use_cache=False).loss

    return model, loss


def serve(args: argparse.Namespace) -> None:
    """One side: a line of JSON for each line that it reads."""
    if args.side == SIDES[0] or args.their_memory == "kept":
        gemma2_ext.keep_freed_memory()  # as `gemma2-ext train` does
    config, dtype = SIZES[args.size], getattr(torch, args.dtype)
    if args.side == SIDES[0]:
        module, loss_of = our_step(config, dtype)
    else:
        module, loss_of = their_step(config, dtype, args.side == SIDES[2])
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.vocab_size, (1, args.tokens + 1), generator=generator)
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = loss_of(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "loss": loss.item(), "peak": peak}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", default="100m", choices=SIZES)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument(
        "--their-memory",
        default="kept",
        choices=("kept", "freed"),
        help="whether the other sides keep what a step frees; by themselves they do not",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.side:
        serve(args)
        return
    command = [sys.executable, __file__, "--size", args.size, "--dtype", args.dtype]
    command += ["--tokens", str(args.tokens), "--threads", str(args.threads)]
    command += ["--their-memory", args.their_memory]
    servers = {
        side: subprocess.Popen(
            [*command, "--side", side], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for side in args.sides
    }

    def step(side: str) -> dict[str, Any]:
        server = servers[side]
        assert server.stdin and server.stdout
        server.stdin.write("\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    first = {side: step(side) for side in args.sides}  # also compiles
    losses = {side: row["loss"] for side, row in first.items()}
    # A relative rounding of bfloat16; of float32, what sums in another order may differ by.
    allowed = max(losses.values()) * (2**-8 if args.dtype == "bfloat16" else 1e-4)
    if not max(losses.values()) - min(losses.values()) <= allowed:
        raise SystemExit(f"the sides disagree: {losses}")
    for side in args.sides:
        if first[side]["seconds"] < 60:  # what is slow needs no more warmth
            step(side)
    rows: dict[str, list[dict[str, Any]]] = {side: [] for side in args.sides}
    for _ in range(args.rounds):
        for side in args.sides:
            rows[side].append(step(side))
    for server in servers.values():
        server.communicate()
    config = SIZES[args.size]
    result: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "cpu_isa": gemma2_ext._C.cpu_isa(),
        "threads": args.threads,
        "torch": torch.__version__,
        "dtype": args.dtype,
        "tokens": args.tokens,
        "their_memory": args.their_memory,
        "parameters": config.num_parameters,
        "config": config.to_dict(),
        "sides": {},
    }
    print(f"{config.num_parameters:,} parameters, {args.tokens} tokens, {args.dtype}")
    for side in args.sides:
        seconds = [row["seconds"] for row in rows[side]]
        median = statistics.median(seconds)
        ratio = statistics.median(
            row["seconds"] / own["seconds"]
            for row, own in zip(rows[side], rows[args.sides[0]], strict=True)
        )
        peak = rows[side][-1]["peak"]
        result["sides"][side] = {
            "seconds": median,
            "all": seconds,
            "peak_bytes": peak,
            "first_loss": losses[side],
        }
        print(
            f"{side:22s} {median:7.3f} s a step ({ratio:.2f} of the first), "
            f"{peak / 2**30:.2f} GiB at most"
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
