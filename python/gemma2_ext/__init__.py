"""Gemma 2 at the speed of the machine: fused ops, a thin model, distillation."""

from __future__ import annotations

# torch first: it loads the libraries that _C is linked against.
import torch

try:
    from . import _C
except ImportError as error:
    if torch.version.cuda is None and "libtorch_cuda" in str(error):
        raise ImportError(
            "gemma2_ext was built for a PyTorch with CUDA, and this PyTorch "
            f"({torch.__version__}) has none; install gemma2_ext again (pip install .)"
        ) from error
    raise
from . import nn, ops
from .cache import KVCache
from .config import Gemma2Config
from .model import Gemma2
from .quantize import QuantizedWeight

__version__ = "0.1.0"


def build_info() -> dict[str, object]:
    """Facts about this build: package and torch versions, compiler, CUDA, instruction sets."""
    return {
        "version": __version__,
        "torch": torch.__version__,
        **_C.build_info(),
        "cpu_isa": _C.cpu_isa(),
        "supported_cpu_isas": _C.supported_cpu_isas(),
    }


def keep_freed_memory() -> bool:
    """Has this process keep the CPU memory that it frees, for its next tensors.

    By default tensors of 32 MiB and more go back to the system when they are freed, which clears
    each anew: that takes longer than a norm of it. `gemma2-ext train` and `distill` call this, for
    a loop of one's own it is as good. The memory in use stays at its highest.

    Returns:
        False where the C library has no such setting (it is not glibc).
    """
    return _C.keep_freed_memory()


__all__ = [
    "Gemma2",
    "Gemma2Config",
    "KVCache",
    "QuantizedWeight",
    "__version__",
    "build_info",
    "keep_freed_memory",
    "nn",
    "ops",
]
