"""add_rms_norm: post-norm, addition and the next norm; eager and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator

from .. import ops, reference
from . import _common
from ._common import Setting, checker, forward_backward, number_of_sets, peer
from ._harness import Case


def cases(setting: Setting) -> Iterator[Case]:
    """Rows of hidden_size; memory is the limit."""
    hidden_size = setting.config.hidden_size
    for rows in _common.ROWS[setting.phase]:
        training = setting.phase == "training"
        size = rows * hidden_size * setting.dtype.itemsize
        sets = number_of_sets(4 * size)

        def make(rows: int = rows) -> tuple:
            x, residual = (setting.randn(rows, hidden_size) for _ in range(2))
            return x, residual, setting.randn(hidden_size), setting.randn(hidden_size)

        inputs = _common.sets_of(sets, make)
        yield Case(
            op="add_rms_norm",
            shape=f"{rows} x {hidden_size}",
            **setting.facts,
            ours=forward_backward(ops.add_rms_norm, inputs),
            peers={
                "torch eager": peer(reference.add_rms_norm, inputs),
                "torch.compile": peer(reference.add_rms_norm, inputs, compile=True),
            },
            check=checker(reference.add_rms_norm, inputs[0], setting.dtype),
            sets=sets,
            reads=(6 if training else 2) * size,
            writes=(4 if training else 2) * size,
            operations=0,
            arithmetic="float32",
        )
