"""The machine's limits, for benchmarks to be measured against.

    python benchmarks/probes.py [--threads N] [--json FILE]

All threads work at once, each in a loop of the extension's own that the instruction set in force
was compiled for: multiplications and additions out of registers, or a walk over memory. Limits move
as a host's other work comes and goes, so take them in turn with what is measured, in the same run.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

import gemma2_ext
from gemma2_ext import _C

# Much more than the caches hold.
READ_BYTES = 1 << 30
# Loops of a register probe: some tens of milliseconds.
LOOPS = 10_000_000


def together(threads: int, work: Callable[[int], float]) -> float:
    """Calls work(i) in all threads at once; the sum of what it returns, per second."""
    barrier = threading.Barrier(threads + 1)
    done = [0.0] * threads

    def run(i: int) -> None:
        barrier.wait()
        done[i] = work(i)

    workers = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    barrier.wait()
    start = time.perf_counter()
    for worker in workers:
        worker.join()
    return sum(done) / (time.perf_counter() - start)


def peak(kind: str = "float32", threads: int | None = None, loops: int = LOOPS) -> float:
    """GFLOP/s of multiplications and additions out of registers.

    Args:
        kind: "float32", "bfloat16" (dot products of pairs) or "int8" (of quadruples).
        threads: None: torch's.
        loops: of a thread.

    Returns:
        0 where the instruction set in force has no such instruction.
    """
    return together(threads or torch.get_num_threads(), lambda i: _C.probe(kind, 0, loops)) / 1e9


class Memory:
    """A buffer much larger than the caches, in huge pages where the system has them.

    Args:
        nbytes: its size.
    """

    def __init__(self, nbytes: int = READ_BYTES) -> None:
        import mmap

        self._mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self.buffer = torch.frombuffer(self._mapping, dtype=torch.int32).fill_(1)

    def read(self, threads: int | None = None) -> float:
        """GB/s of one pass over it, each thread reading its own part."""
        count = threads or torch.get_num_threads()
        part = self.buffer.nbytes // count
        address = self.buffer.data_ptr()
        return together(count, lambda i: _C.probe("read", address + i * part, part)) / 1e9

    def stream(self, reads: int, writes: int, threads: int | None = None) -> float:
        """GB/s, reads and writes together, of a pass of so many streams of each.

        For ops that read some tensors and write others: a norm is 1 and 1, GeGLU 2 and 1. Each
        written stream is the sum of what is read, or a copy.
        """
        if reads not in (1, 2) or writes not in (1, 2):
            raise ValueError(f"stream: 1 or 2 reads and writes, got {reads} and {writes}")
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        parts = self.buffer.tensor_split(reads + writes)
        size = min(len(p) for p in parts)
        sources, targets = [p[:size] for p in parts[:reads]], [p[:size] for p in parts[reads:]]
        start = time.perf_counter()
        if writes == 2:  # as many of each: two copies
            for source, target in zip(sources * 2, targets, strict=False):
                target.copy_(source)
            moved = 4 * size * 4
        else:
            torch.add(sources[0], sources[-1], out=targets[0]) if reads == 2 else targets[0].copy_(
                sources[0]
            )
            moved = (reads + 1) * size * 4
        seconds = time.perf_counter() - start
        torch.set_num_threads(before)
        return moved / seconds / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    threads = args.threads or torch.get_num_threads()
    memory = Memory()
    limits = {f"{kind}_gflop_s": peak(kind, threads) for kind in ("float32", "bfloat16", "int8")}
    limits["read_gb_s"] = sorted(memory.read(threads) for _ in range(5))[2]
    for reads, writes in ((1, 1), (2, 1), (2, 2)):
        rates = sorted(memory.stream(reads, writes, threads) for _ in range(5))
        limits[f"read_{reads}_write_{writes}_gb_s"] = rates[2]
    print(f"{_C.cpu_isa()}, {threads} threads")
    for name, value in limits.items():
        print(f"{name:22s} {value:8.1f}")
    if args.json:
        facts = {"cpu_isa": _C.cpu_isa(), "threads": threads, "version": gemma2_ext.__version__}
        args.json.write_text(json.dumps({**facts, **limits}, indent=1) + "\n")


if __name__ == "__main__":
    main()
