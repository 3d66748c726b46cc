"""linear_distillation_topk: -sum P_T log P_S, from a teacher's stored top-k log-probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common import cast_under_autocast, check_integers, check_tensor, through_dispatcher
from ._losses import check_mask, register_loss, result_like

_op = torch.ops.gemma2_ext.linear_distillation_topk.default
_out_op = torch.ops.gemma2_ext.linear_distillation_topk_out.default


def linear_distillation_topk(
    hidden: Tensor,
    weight: Tensor,
    teacher_indices: Tensor,
    teacher_log_probs: Tensor,
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
    renormalize: bool = True,
    mask: Tensor | None = None,
    reduction: str = "mean",
    target: Tensor | None = None,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """`-sum over k words of P_T log P_S`, P_T of the teacher's stored log-probabilities.

    With renormalize, P_T is `softmax(teacher_log_probs / temperature)` over a token's k words:
    what the teacher gave the others is spread over these in proportion. Without, P_T is
    `exp(teacher_log_probs)`, which sums to less than 1: the other words have no term in the sum,
    and temperature must be 1, since their share at another one is not known. P_S is over the whole
    vocabulary in either case. Everything else is as in `linear_distillation`.

    Args:
        hidden: (..., hidden_size), the student's, float32, bfloat16 or float16, any strides;
            float64, to check gradients with, runs in plain loops on the CPU.
        weight: (vocab_size, hidden_size), hidden's dtype.
        teacher_indices: (..., k), int64 or int32, ids of words.
        teacher_log_probs: (..., k), any float dtype, the natural logarithms of the teacher's
            probabilities at temperature 1, after its soft-cap. -inf marks a place without a word,
            whose index is not read.
        softcap: positive bound of the student's logits, or None.
        temperature: positive.
        renormalize: whether P_T sums to 1.
        mask: (...), bool or integers, true where a token counts; None: everywhere. What the others
            hold is of no effect, and takes no time.
        reduction: "mean" over the tokens that count (NaN where none does), "sum", or "none".
        target: (...), int64 or int32, ids of words or ignore_index; needed where hard_weight > 0.
        hard_weight: in [0, 1], the share of the cross-entropy with target, at temperature 1.
        ignore_index: the target of a token without a label.

    Returns:
        A float32 scalar (float64 for float64), in nats; with "none" hidden's leading shape, 0
        where the mask is false.

    Raises:
        TypeError: an input is no tensor, or of a dtype that it cannot have.
        ValueError: shapes that do not fit, dtypes or devices that differ, an index or target
            outside the vocabulary, a log-probability above 0, a token without any, or an option
            outside its range; the message names it.

    Source: Gemma 2 (arXiv 2408.00118), section 3.2, over the words that were stored.
    """
    op = "linear_distillation_topk"
    check_tensor(op, "hidden", hidden, float64=True)
    check_tensor(op, "weight", weight, float64=True)
    check_integers(op, "teacher_indices", teacher_indices, required=True)
    check_tensor(op, "teacher_log_probs", teacher_log_probs, float64=True)
    check_mask(op, mask)
    check_integers(op, "target", target)
    options: dict[str, Any] = {
        "softcap": softcap,
        "temperature": temperature,
        "renormalize": renormalize,
        "hard_weight": hard_weight,
        "ignore_index": ignore_index,
        "reduction": reduction,
    }
    tensors = (hidden, weight, teacher_indices, teacher_log_probs, mask, target)
    if through_dispatcher(hidden, weight):
        return _op(*tensors, **options)
    out = result_like(hidden, reduction)
    _out_op(*tensors, **options, out=out)
    return out


register_loss(
    "linear_distillation_topk",
    tensors=("hidden", "weight", "teacher_indices", "teacher_log_probs", "mask", "target"),
    options=("softcap", "temperature", "renormalize", "hard_weight", "ignore_index", "reduction"),
)
cast_under_autocast("linear_distillation_topk", 0, 1)
