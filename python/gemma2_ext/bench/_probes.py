"""The machine's own limits, measured in the same minutes as what is held against them.

Memory shared with other machines gives twice as much in one minute as in the next, and clocks
change with heat: a share of a limit means something only where the limit was measured in turns
with the code.
"""

from __future__ import annotations

import time

import torch

from .. import _C
from ..cache import cache_room

PROBE_BYTES = 256 << 20  # of each tensor: far beyond the caches
MULTIPLY_SECONDS = 0.02


class CpuProbes:
    """Limits of this processor with torch's number of threads.

    Args:
        scratch_bytes: of each tensor that is read or written.
    """

    def __init__(self, scratch_bytes: int = PROBE_BYTES) -> None:
        # Placed as weights and caches are, in huge pages where the system has them.
        sizes = [scratch_bytes // torch.float32.itemsize] * 3
        self._memory = [t.fill_(1) for t in cache_room(sizes, torch.float32, torch.device("cpu"))]

    def bandwidth(self, reads: int, writes: int) -> float:
        """Bytes a second of one pass that reads `reads` tensors (1 or 2) and writes 0 or 1: the
        fastest of four, as processors differ in whether fetching by instruction helps, and the
        first after a pause is slower."""
        a, b, out = (t.data_ptr() for t in self._memory)
        size, threads = self._memory[0].nbytes, torch.get_num_threads()
        tensors = a, b if reads > 1 else 0, out if writes else 0
        passes = (_C.probe_memory(*tensors, size, threads, fetch) for fetch in (True, False) * 2)
        seconds = min(passes)
        return (reads + writes) * size / seconds

    def arithmetic(self, kind: str) -> float:
        """Operations a second of multiply-adds in registers; kind: "float32", "bfloat16" or
        "int8". The most of three: OpenMP's threads, which wait for work by turning round for
        some milliseconds, leave the first as little as half."""
        threads = torch.get_num_threads()
        return max(_C.probe_multiply(kind, threads, MULTIPLY_SECONDS) for _ in range(3))


class CudaProbes:
    """Limits of the current CUDA device: a copy, and cuBLAS's largest product."""

    def __init__(self) -> None:
        self._memory = [torch.ones(PROBE_BYTES, device="cuda") for _ in range(3)]
        self._factors: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]] = {}

    def bandwidth(self, reads: int, writes: int) -> float:
        """Bytes a second of a pass over device memory with that mix."""
        a, b, out = self._memory
        call = {
            (1, 0): lambda: a.max(),
            (2, 0): lambda: torch.dot(a, b),
            (1, 1): lambda: out.copy_(a),
            (2, 1): lambda: torch.add(a, b, out=out),
        }[(reads, 1 if writes else 0)]
        return (reads + (1 if writes else 0)) * a.nbytes / cuda_seconds(call)

    def arithmetic(self, kind: str) -> float:
        """Operations a second of an 8192^3 product."""
        dtype = {"float32": torch.float32, "float16": torch.float16}.get(kind, torch.bfloat16)
        if dtype not in self._factors:
            x = torch.randn(8192, 8192, device="cuda").to(dtype)
            self._factors[dtype] = (x, x.clone())
        a, b = self._factors[dtype]
        return 2 * 8192**3 / cuda_seconds(lambda: a @ b)


def cuda_seconds(call) -> float:  # type: ignore[no-untyped-def]
    """Seconds of one call on the current CUDA stream, by events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def cpu_seconds(call) -> float:  # type: ignore[no-untyped-def]
    """Seconds of one call by the wall clock."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
