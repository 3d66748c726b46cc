"""linear_distillation: -sum over the vocabulary of P_T log P_S, from both sides' hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common import cast_under_autocast, check_integers, check_tensor, through_dispatcher
from ._losses import check_mask, register_loss, result_like

_op = torch.ops.gemma2_ext.linear_distillation.default
_out_op = torch.ops.gemma2_ext.linear_distillation_out.default


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
    target: Tensor | None = None,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """`-sum P_T log P_S`, P = softmax(softcap * tanh(hidden @ weight.T / softcap) / temperature).

    Each side has its own soft-cap, which comes before the temperature; there is no temperature**2
    factor. The teacher's distribution is the one over the student's words: logits that it has
    beyond them, or lacks, count as -inf. Memory, sums and bit-equality are as in
    `linear_cross_entropy`: neither side's logits stand whole. The teacher gets no gradient.

    With labels the loss of a token is `(1 - hard_weight) * that + hard_weight * cross-entropy`,
    the latter at temperature 1; a token whose target is ignore_index keeps the first term alone,
    with weight 1.

    Args:
        hidden: (..., hidden_size), the student's, float32, bfloat16 or float16, any strides;
            float64, to check gradients with, runs in plain loops on the CPU.
        weight: (vocab_size, hidden_size), the student's, hidden's dtype.
        teacher_hidden: (..., teacher_hidden_size), hidden's leading shape, any of the dtypes.
        teacher_weight: (teacher_vocab_size, teacher_hidden_size), teacher_hidden's dtype.
        softcap: positive bound of the student's logits, or None.
        teacher_softcap: positive bound of the teacher's logits, or None.
        temperature: positive, divides both sides' capped logits.
        mask: (...), bool or integers, true where a token counts; None: everywhere. What the others
            hold is of no effect, and takes no time.
        reduction: "mean" over the tokens that count (NaN where none does), "sum", or "none".
        target: (...), int64 or int32, ids of words or ignore_index; needed where hard_weight > 0.
        hard_weight: in [0, 1].
        ignore_index: the target of a token without a label.

    Returns:
        A float32 scalar (float64 for float64), in nats; with "none" hidden's leading shape, 0
        where the mask is false.

    Raises:
        TypeError: an input is no tensor, or of a dtype that it cannot have.
        ValueError: shapes that do not fit, dtypes or devices that differ, a target outside the
            vocabulary, or an option outside its range; the message names it.

    Source: Gemma 2 (arXiv 2408.00118), section 3.2; Hinton et al. (arXiv 1503.02531).
    """
    op = "linear_distillation"
    check_tensor(op, "hidden", hidden, float64=True)
    check_tensor(op, "weight", weight, float64=True)
    check_tensor(op, "teacher_hidden", teacher_hidden, float64=True)
    check_tensor(op, "teacher_weight", teacher_weight, float64=True)
    check_mask(op, mask)
    check_integers(op, "target", target)
    options: dict[str, Any] = {
        "softcap": softcap,
        "teacher_softcap": teacher_softcap,
        "temperature": temperature,
        "hard_weight": hard_weight,
        "ignore_index": ignore_index,
        "reduction": reduction,
    }
    tensors = (hidden, weight, teacher_hidden, teacher_weight, mask, target)
    if through_dispatcher(hidden, weight):
        return _op(*tensors, **options)
    out = result_like(hidden, reduction)
    _out_op(*tensors, **options, out=out)
    return out


register_loss(
    "linear_distillation",
    tensors=("hidden", "weight", "teacher_hidden", "teacher_weight", "mask", "target"),
    options=(
        "softcap",
        "teacher_softcap",
        "temperature",
        "hard_weight",
        "ignore_index",
        "reduction",
    ),
)
cast_under_autocast("linear_distillation", 0, 1, 2, 3)
