"""linear_cross_entropy: -log softmax(softcap * tanh(hidden weight^T / softcap))[target]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common import cast_under_autocast, check_integers, check_tensor, through_dispatcher
from ._losses import register_loss, result_like

_op = torch.ops.gemma2_ext.linear_cross_entropy.default
_out_op = torch.ops.gemma2_ext.linear_cross_entropy_out.default


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """`-log softmax(s)[target]` of the logits `s = softcap * tanh(hidden @ weight.T / softcap)`.

    Neither the logits nor their gradient ever stand whole: products are made for some words at a
    time, summed in float32, and again for the backward but for the first words, whose logits
    (128 MiB at most, none on CUDA) are kept. Results and gradients are equal to the bit from run
    to run and for any number of threads. On CUDA a call waits once for the GPU, to check target.

    Args:
        hidden: (..., hidden_size), float32, bfloat16 or float16, any strides; float64, to check
            gradients with, runs in plain loops on the CPU.
        weight: (vocab_size, hidden_size), hidden's dtype.
        target: (...), int64 or int32, ids of words or ignore_index.
        softcap: positive bound of the logits, or None.
        ignore_index: the target of a token that does not count: its loss and gradient are 0
            whatever its hidden state holds, and no time is spent on it.
        reduction: "mean" over the tokens that count (NaN where none does), "sum", or "none".
        label_smoothing: in [0, 1], the share of the target spread evenly over all words, as in
            torch.nn.functional.cross_entropy.
        z_loss: at least 0; adds `z_loss * logsumexp(s)**2` to every token's loss.

    Returns:
        A float32 scalar (float64 for float64), in nats; with "none" target's shape, 0 where
        ignored.

    Raises:
        TypeError: hidden or weight is not a floating tensor of those dtypes, or target not one of
            integers.
        ValueError: shapes that do not fit, dtypes or devices that differ, a target outside the
            vocabulary, or an option outside its range; the message names it.

    Source: transformers, ForCausalLMLoss on Gemma2ForCausalLM's logits; z_loss from PaLM
    (arXiv 2204.02311), section 5.
    """
    check_tensor("linear_cross_entropy", "hidden", hidden, float64=True)
    check_tensor("linear_cross_entropy", "weight", weight, float64=True)
    check_integers("linear_cross_entropy", "target", target, required=True)
    options: dict[str, Any] = {
        "softcap": softcap,
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
    }
    if through_dispatcher(hidden, weight):
        return _op(hidden, weight, target, **options)
    out = result_like(hidden, reduction)
    _out_op(hidden, weight, target, **options, out=out)
    return out


register_loss(
    "linear_cross_entropy",
    tensors=("hidden", "weight", "target"),
    options=("softcap", "ignore_index", "reduction", "label_smoothing", "z_loss"),
)
cast_under_autocast("linear_cross_entropy", 0, 1)
