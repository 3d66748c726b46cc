from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from common import DTYPES, with_strides
from gemma2_ext import ops, reference
from losses_common import assert_loss, assert_same_for_any_threads, value_and_gradients

OP = torch.ops.gemma2_ext.linear_distillation_topk.default
LOSS = ops.linear_distillation_topk
REFERENCE = reference.linear_distillation_topk


def operands(
    tokens: int, vocab_size: int, k: int, dtype: torch.dtype = torch.float32, hidden_size: int = 41
) -> tuple[Tensor, ...]:
    """Products of standard deviation 3; a teacher whose first k words hold a part of 1."""
    hidden = (3 * torch.randn(tokens, hidden_size)).to(dtype)
    weight = (torch.randn(vocab_size, hidden_size) / hidden_size**0.5).to(dtype)
    log_probs, indices = (2 * torch.randn(tokens, vocab_size)).log_softmax(-1).topk(k)
    return hidden, weight, indices, log_probs


def labels(tokens: int, vocab_size: int) -> Tensor:
    target = torch.randint(0, vocab_size, (tokens,))
    target[::4] = -100
    return target


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"renormalize": False, "softcap": 3.0},
        {"softcap": 3.0, "temperature": 2.0, "reduction": "none"},
    ],
)
@pytest.mark.parametrize("tokens, vocab_size, k", [(2, 2, 1), (33, 95, 7), (50, 290, 64)])
def test_value_and_gradients(
    isa: str, dtype: torch.dtype, options: dict[str, Any], tokens: int, vocab_size: int, k: int
) -> None:
    tensors = operands(tokens, vocab_size, k, dtype)
    tensors[3][0, 1:] = -torch.inf
    tensors[2][0, 1:] = -1
    mask = torch.rand(tokens) > 0.3
    mask[0] = True
    assert_loss(LOSS, REFERENCE, *tensors, mask=mask, **options)


@pytest.mark.parametrize("temperature, renormalize", [(1.0, True), (1.0, False), (2.0, True)])
def test_hard_labels(isa: str, temperature: float, renormalize: bool) -> None:
    assert_loss(
        LOSS,
        REFERENCE,
        *operands(33, 130, 5),
        softcap=3.0,
        temperature=temperature,
        renormalize=renormalize,
        target=labels(33, 130),
        hard_weight=0.3,
    )


def test_all_words_are_linear_distillation() -> None:
    hidden, weight, *_ = operands(20, 60, 1)
    teacher, teacher_weight = 2 * torch.randn(20, 9), torch.randn(60, 9)
    log_probs, indices = (teacher @ teacher_weight.T).log_softmax(-1).topk(60)
    for temperature in (1.0, 2.0):
        torch.testing.assert_close(
            LOSS(hidden, weight, indices, log_probs, temperature=temperature, softcap=3.0),
            ops.linear_distillation(
                hidden, weight, teacher, teacher_weight, temperature=temperature, softcap=3.0
            ),
        )
    torch.testing.assert_close(
        LOSS(hidden, weight, indices, log_probs, renormalize=False),
        ops.linear_distillation(hidden, weight, teacher, teacher_weight),
    )


def test_one_certain_word_is_cross_entropy() -> None:
    hidden, weight, indices, log_probs = operands(20, 60, 1)
    expected = value_and_gradients(
        ops.linear_cross_entropy, hidden, weight, indices[:, 0], softcap=3.0
    )
    actual = value_and_gradients(LOSS, hidden, weight, indices, log_probs * 0, softcap=3.0)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_rest_that_is_left_out_moves_no_word() -> None:
    # Without renormalization the gradient of the logits sums to 0 all the same.
    *_, indices, log_probs = operands(20, 60, 3)
    logits = torch.randn(20, 60, requires_grad=True)
    loss = LOSS(logits, torch.eye(60), indices, log_probs, renormalize=False)
    loss.backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.sum(-1), torch.zeros(20), atol=1e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_stored_in_another_dtype(dtype: torch.dtype) -> None:
    hidden, weight, indices, log_probs = operands(20, 60, 5)
    stored = log_probs.to(dtype)
    torch.testing.assert_close(
        LOSS(hidden, weight, indices.int(), stored),
        LOSS(hidden, weight, indices, stored.float()),
    )


def test_shapes_and_strides(isa: str) -> None:
    hidden, weight, indices, log_probs = operands(6, 60, 5)
    flat = LOSS(hidden, weight, indices, log_probs, reduction="none")
    deep = LOSS(
        hidden.view(2, 3, -1),
        with_strides(weight, "strided"),
        with_strides(indices.double(), "strided").long().view(2, 3, 5),
        with_strides(log_probs, "strided").view(2, 3, 5),
        reduction="none",
    )
    assert torch.equal(deep, flat.view(2, 3))
    mask = torch.zeros(6, dtype=torch.bool)
    assert LOSS(hidden, weight, indices, log_probs, mask=mask).isnan()
    assert LOSS(hidden[:0], weight, indices[:0], log_probs[:0], reduction="sum") == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_independent_of_threads_and_runs(isa: str, dtype: torch.dtype) -> None:
    assert_same_for_any_threads(LOSS, *operands(150, 1000, 20, dtype), softcap=3.0)


@pytest.mark.parametrize("renormalize", [False, True])
def test_gradcheck(renormalize: bool) -> None:
    hidden, weight, indices, log_probs = operands(5, 7, 3)
    assert torch.autograd.gradcheck(
        lambda h, w: LOSS(
            h,
            w,
            indices,
            log_probs,
            softcap=3.0,
            renormalize=renormalize,
            target=labels(5, 7) * 0,
            hard_weight=0.3,
        ),
        (hidden.double().requires_grad_(), weight.double().requires_grad_()),
    )


def test_opcheck_and_compile() -> None:
    hidden, weight, indices, log_probs = operands(6, 10, 3)
    opcheck(OP, (hidden, weight, indices, log_probs), {"softcap": 3.0, "reduction": "none"})
    opcheck(OP, (hidden.clone().requires_grad_(), weight, indices, log_probs))
    expected = value_and_gradients(LOSS, hidden, weight, indices, log_probs)
    compiled = torch.compile(LOSS, fullgraph=True)
    actual = value_and_gradients(compiled, hidden, weight, indices, log_probs)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_errors() -> None:
    hidden, weight, indices, log_probs = operands(6, 60, 5)
    with pytest.raises(TypeError, match="teacher_indices must be int32 or int64, got torch.float"):
        LOSS(hidden, weight, log_probs, log_probs)
    with pytest.raises(TypeError, match="teacher_log_probs must be float32, .*, got torch.int64"):
        LOSS(hidden, weight, indices, indices)
    with pytest.raises(ValueError, match=r"teacher_indices must have shape \(\.\.\., k\), k at"):
        LOSS(hidden, weight, indices[:, :0], log_probs[:, :0])
    with pytest.raises(
        ValueError, match=r"teacher_indices must have hidden's leading shape and 5 elements a token"
    ):
        LOSS(hidden, weight, indices[1:], log_probs[1:])
    with pytest.raises(ValueError, match=r"teacher_log_probs must have teacher_indices's shape"):
        LOSS(hidden, weight, indices, log_probs[:, 1:])
    for wrong in (-1, 60):
        with pytest.raises(
            ValueError,
            match=rf"teacher_indices must be in \[0, vocab_size = 60\) .*, got {wrong} at token 4",
        ):
            bad = indices.clone()
            bad[4, 2] = wrong
            LOSS(hidden, weight, bad, log_probs)
    for wrong_log in (0.5, float("nan")):
        bad_logs = log_probs.clone()
        bad_logs[4, 2] = wrong_log
        with pytest.raises(ValueError, match="teacher_log_probs must be logarithms of prob"):
            LOSS(hidden, weight, indices, bad_logs)
    log_probs[4] = -torch.inf
    with pytest.raises(ValueError, match="must hold a probability above 0, got none at token 4"):
        LOSS(hidden, weight, indices, log_probs)
    with pytest.raises(ValueError, match="renormalize = False needs temperature = 1, got 2.0"):
        LOSS(hidden, weight, indices, log_probs, renormalize=False, temperature=2.0)
