"""rms_norm: eager as transformers writes it, torch.compile, Liger."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .. import ops, reference
from . import _common
from ._common import Setting, checker, forward_backward, needs, needs_cuda, number_of_sets, peer
from ._harness import Call, Case


def cases(setting: Setting) -> Iterator[Case]:
    """Rows of hidden_size; memory is the limit."""
    hidden_size = setting.config.hidden_size
    for rows in _common.ROWS[setting.phase]:
        passes = 1 if setting.phase != "training" else 3  # x and out; x, grad and the gradient
        size = rows * hidden_size * setting.dtype.itemsize
        sets = number_of_sets(2 * size)
        inputs = _common.sets_of(
            sets,
            lambda rows=rows: (setting.randn(rows, hidden_size), setting.randn(hidden_size)),  # type: ignore[misc]
        )

        def liger(inputs: list[tuple[Any, ...]] = inputs) -> Call:
            needs_cuda(setting, "Liger")
            function = needs("liger_kernel.ops.rms_norm").LigerRMSNormFunction
            return forward_backward(
                lambda x, w: function.apply(x, w, 1e-6, 1.0, "gemma", False), inputs
            )

        yield Case(
            op="rms_norm",
            shape=f"{rows} x {hidden_size}",
            **setting.facts,
            ours=forward_backward(ops.rms_norm, inputs),
            peers={
                "torch eager": peer(reference.rms_norm, inputs),
                "torch.compile": peer(reference.rms_norm, inputs, compile=True),
                "Liger": liger,
            },
            check=checker(reference.rms_norm, inputs[0], setting.dtype),
            sets=sets,
            reads=passes * size,
            writes=size if passes == 1 else 2 * size,
            operations=0,
            arithmetic="float32",
        )
