"""The list of what can be measured, and a run over part of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator

import torch

from ..quantize import Format
from ._common import PHASES, Setting
from ._harness import Case, Result, Settings, measure
from ._probes import CpuProbes, CudaProbes

# In the order of a layer. Each is a file here with a function `cases`.
OPS = (
    *("rms_norm", "add_rms_norm", "geglu", "rope", "attention", "linear", "logits"),
    *("linear_cross_entropy", "linear_distillation"),
)
# Those over weights that may be packed.
PACKED_OPS = ("linear", "logits")


def check_op(op: str, quantize: Format | None) -> None:
    """Raises ValueError where no op has that name, or it has no weights to be packed."""
    if op not in OPS:
        raise ValueError(f"bench: there is no op {op!r}; there are {', '.join(OPS)}")
    if quantize and op not in PACKED_OPS:
        raise ValueError(f"bench: {op} has no packed weights; {', '.join(PACKED_OPS)} have")


def cases(op: str, setting: Setting) -> Iterator[Case]:
    """The cases of an op, made one after another, so that only one's inputs are in memory.

    Raises:
        ValueError: as `check_op`.
    """
    check_op(op, setting.quantize)
    found: Iterator[Case] = importlib.import_module(f"{__package__}.{op}").cases(setting)
    return found


def check_device(device: str) -> None:
    """Raises RuntimeError where torch has no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("bench: torch finds no CUDA device")


def run_suite(
    names: Iterable[str],
    *,
    size: str,
    phases: Iterable[str] = PHASES,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    quantize: Format | None = None,
    settings: Settings | None = None,
    shape: str = "",
    show: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Measures ops, one case after another.

    Args:
        names: of ops, from OPS.
        size: "2b", "9b" or "27b": whose shapes.
        phases: of "decode", "prefill" and "training".
        dtype: of inputs.
        device: "cpu" or "cuda".
        quantize: the format of packed weights; for ops of PACKED_OPS.
        settings: how long to measure.
        shape: only cases whose shape holds this text.
        show: called with each result as it comes.

    Raises:
        ValueError: an unknown op, or `quantize` for one without weights to be packed.
        RuntimeError: a result of this package's is wrong, or there is no such device.
    """
    check_device(device)
    names = list(names)
    for op in names:
        check_op(op, quantize)
    probes = CudaProbes() if device == "cuda" else CpuProbes()
    results = []
    for op in names:
        for phase in phases:
            setting = Setting(size, phase, dtype, device, quantize)
            # Training measures gradients; elsewhere inference_mode is how the model runs.
            with torch.inference_mode(phase != "training"):
                for case in cases(op, setting):
                    if shape in case.shape:
                        torch.manual_seed(0)
                        results.append(measure(case, settings or Settings(), probes))
                        show(results[-1])
    return results
