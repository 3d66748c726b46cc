"""geglu: eager, torch.compile, Liger."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .. import ops, reference
from . import _common
from ._common import Setting, checker, forward_backward, needs, needs_cuda, number_of_sets, peer
from ._harness import Call, Case


def cases(setting: Setting) -> Iterator[Case]:
    """Rows of intermediate_size; memory is the limit."""
    columns = setting.config.intermediate_size
    for rows in _common.ROWS[setting.phase]:
        training = setting.phase == "training"
        size = rows * columns * setting.dtype.itemsize
        sets = number_of_sets(3 * size)
        inputs = _common.sets_of(
            sets,
            lambda rows=rows: (setting.randn(rows, columns), setting.randn(rows, columns)),  # type: ignore[misc]
        )

        def liger(inputs: list[tuple[Any, ...]] = inputs) -> Call:
            needs_cuda(setting, "Liger")
            function = needs("liger_kernel.ops.geglu").LigerGELUMulFunction
            return forward_backward(function.apply, inputs)

        yield Case(
            op="geglu",
            shape=f"{rows} x {columns}",
            **setting.facts,
            ours=forward_backward(ops.geglu, inputs),
            peers={
                "torch eager": peer(reference.geglu, inputs),
                "torch.compile": peer(reference.geglu, inputs, compile=True),
                "Liger": liger,
            },
            check=checker(reference.geglu, inputs[0], setting.dtype),
            sets=sets,
            reads=(5 if training else 2) * size,
            writes=(3 if training else 1) * size,
            operations=0,
            arithmetic="float32",
        )
