"""Losses over a linear layer against torch, eager and compiled: time of loss and gradients, in
turns in one process, and the peak memory of each in a process of its own.

    python benchmarks/losses.py --tokens 2048 --hidden-size 2304 --vocab-size 256000
    python benchmarks/losses.py --loss distillation --dtype float32 --json out.json

The gradients of hidden and weight are not counted as memory: whoever trains has them anyway. The
answer is checked before anything is timed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import gemma2_ext
from gemma2_ext import ops, reference

SIDES = ("gemma2_ext", "eager", "torch.compile")
# Products of (tokens, hidden_size) by (hidden_size, vocab_size), two for the gradients.
PRODUCTS = {"cross_entropy": 3, "distillation": 4}


def loss_function(side: str, loss: str) -> Callable[..., torch.Tensor]:
    functions = reference if side != "gemma2_ext" else ops
    function = getattr(functions, f"linear_{loss}")
    return torch.compile(function) if side == "torch.compile" else function


def operands(args: argparse.Namespace) -> tuple[tuple[torch.Tensor, ...], dict[str, float]]:
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)

    def side() -> tuple[torch.Tensor, torch.Tensor]:
        hidden = 3 * torch.randn(args.tokens, args.hidden_size)
        # By parts: the float32 draw must not set the peak of memory.
        weight = torch.empty(args.vocab_size, args.hidden_size, dtype=dtype)
        for rows in weight.split(4096):
            rows.copy_(torch.randn(rows.shape) / args.hidden_size**0.5)
        return hidden.to(dtype), weight

    hidden, weight = (t.requires_grad_() for t in side())
    if args.loss == "cross_entropy":
        target = torch.randint(0, args.vocab_size, (args.tokens,))
        return (hidden, weight, target), {"softcap": 30.0}
    return (hidden, weight, *side()), {"softcap": 30.0, "teacher_softcap": 30.0}


def step(function: Callable[..., torch.Tensor], tensors, options) -> tuple[float, float]:
    tensors[0].grad = tensors[1].grad = None
    start = time.perf_counter()
    loss = function(*tensors, **options)
    loss.backward()
    return time.perf_counter() - start, loss.item()


def status_bytes(field: str) -> int:
    """VmRSS, the memory of this process, or VmHWM, its peak since it was last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(field)


def measure_memory(args: argparse.Namespace) -> None:
    """Prints the bytes by which a step raises this process's memory at its peak, gradients left
    out."""
    tensors, options = operands(args)
    function = loss_function(args.memory_of, args.loss)
    few = [t[:16].detach().requires_grad_(t.requires_grad) if t.shape[0] == args.tokens
           else t for t in tensors]  # fmt: skip
    if args.memory_of != "torch.compile":  # which would compile once more for the other shape
        step(function, few, options)
    gradients = sum(t.nbytes for t in tensors[:2])
    tensors[0].grad = tensors[1].grad = None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status_bytes("VmRSS")
    step(function, tensors, options)
    print(status_bytes("VmHWM") - before - gradients)


def peak_of(side: str, arguments: list[str]) -> int:
    command = [sys.executable, __file__, *arguments, "--memory-of", side]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--loss", default="cross_entropy", choices=tuple(PRODUCTS))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden-size", type=int, default=2304)
    parser.add_argument("--vocab-size", type=int, default=64000)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-memory", action="store_true", help="time alone")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        return measure_memory(args)

    tensors, options = operands(args)
    sides = {name: loss_function(name, args.loss) for name in args.sides}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses = {name: step(function, tensors, options)[1] for name, function in sides.items()}
    first = losses[args.sides[0]]
    for name, loss in losses.items():
        assert abs(loss - first) <= 1e-2 * abs(first), f"{name} computes {loss}, not {first}"
    for _ in range(args.rounds):
        for name, function in sides.items():
            seconds[name].append(step(function, tensors, options)[0])

    work = 2 * args.tokens * args.hidden_size * args.vocab_size * PRODUCTS[args.loss]
    rows = {}
    print(
        f"{args.loss}, {args.tokens} tokens x {args.hidden_size} x {args.vocab_size}, {args.dtype},"
        f" {gemma2_ext._C.cpu_isa()}, {torch.get_num_threads()} threads"
    )
    for name in sides:
        time_of_one = statistics.median(seconds[name])
        rows[name] = {"seconds": time_of_one, "gflop_s": work / time_of_one / 1e9}
        line = f"{name:14s} {time_of_one * 1e3:9.1f} ms  {rows[name]['gflop_s']:7.1f} GFLOP/s"
        if not args.no_memory:
            rows[name]["peak_bytes"] = peak_of(name, sys.argv[1:])
            line += f"  {rows[name]['peak_bytes'] / 1e6:8.1f} MB beside the gradients"
        print(line)
    if args.json:
        result = {
            "machine": platform.processor() or platform.machine(),
            "cpu_isa": gemma2_ext._C.cpu_isa(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "loss": args.loss,
            "tokens": args.tokens,
            "hidden_size": args.hidden_size,
            "vocab_size": args.vocab_size,
            "dtype": args.dtype,
            "sides": rows,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
