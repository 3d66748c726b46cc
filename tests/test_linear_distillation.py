from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch.library import opcheck

from common import DTYPES, LAYOUTS, with_strides
from gemma2_ext import ops, reference
from losses_common import (
    assert_loss,
    assert_same_for_any_threads,
    peak_growth,
    value_and_gradients,
)

OP = torch.ops.gemma2_ext.linear_distillation.default
OUT_OP = torch.ops.gemma2_ext.linear_distillation_out.default
LOSS = ops.linear_distillation
CAPS = {"softcap": 3.0, "teacher_softcap": 2.0}


def operands(
    tokens: int,
    vocab_size: int,
    teacher_vocab_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    hidden_size: int = 41,
) -> tuple[Tensor, ...]:
    """Products of standard deviation 3, so that the soft-caps bite; the teacher is wider."""

    def side(hidden_size: int, vocab_size: int) -> tuple[Tensor, Tensor]:
        hidden = 3 * torch.randn(tokens, hidden_size)
        return hidden.to(dtype), (torch.randn(vocab_size, hidden_size) / hidden_size**0.5).to(dtype)

    return *side(hidden_size, vocab_size), *side(hidden_size + 9, teacher_vocab_size or vocab_size)


def labels(tokens: int, vocab_size: int) -> Tensor:
    target = torch.randint(0, vocab_size, (tokens,))
    target[::4] = -100
    return target


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        CAPS | {"reduction": "sum"},
        CAPS | {"temperature": 2.5, "reduction": "none"},
        {"softcap": 3.0, "temperature": 0.5},
    ],
)
@pytest.mark.parametrize("tokens, vocab_size", [(2, 2), (33, 95), (70, 290)])
def test_value_and_gradients(
    isa: str, dtype: torch.dtype, options: dict[str, Any], tokens: int, vocab_size: int
) -> None:
    tensors = operands(tokens, vocab_size, dtype=dtype)
    mask = torch.rand(tokens) > 0.3
    mask[0] = True
    for mask_ in (None, mask):
        assert_loss(LOSS, reference.linear_distillation, *tensors, mask=mask_, **options)


@pytest.mark.parametrize("teacher_vocab_size", [1, 96, 150, 290, 301, 1000])
def test_unequal_vocabularies(isa: str, teacher_vocab_size: int) -> None:
    hidden, weight, teacher_hidden, teacher_weight = operands(33, 290, teacher_vocab_size)
    assert_loss(
        LOSS,
        reference.linear_distillation,
        hidden,
        weight,
        teacher_hidden,
        teacher_weight,
        **CAPS,
        temperature=1.5,
    )
    # By hand: what the teacher lacks is -inf, what it has beyond the student's words is dropped.
    common = min(290, teacher_vocab_size)
    log_p = F.log_softmax(hidden @ weight.T, -1)[:, :common]
    q = F.softmax(teacher_hidden @ teacher_weight[:common].T, -1)
    loss = LOSS(hidden, weight, teacher_hidden, teacher_weight, reduction="none")
    torch.testing.assert_close(loss, -(q * log_p).sum(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("hard_weight", [0.3, 1.0])
def test_hard_labels(isa: str, dtype: torch.dtype, temperature: float, hard_weight: float) -> None:
    tensors = operands(33, 130, dtype=dtype)
    options = CAPS | {
        "temperature": temperature,
        "hard_weight": hard_weight,
        "target": labels(33, 130),
        "mask": torch.rand(33) > 0.3,
    }
    assert_loss(LOSS, reference.linear_distillation, *tensors, **options)


def test_blend_is_of_both_losses() -> None:
    hidden, weight, *teacher = operands(33, 130)
    target = labels(33, 130)
    soft = LOSS(hidden, weight, *teacher, softcap=3.0, temperature=2.0, reduction="none")
    hard = ops.linear_cross_entropy(hidden, weight, target, softcap=3.0, reduction="none")
    blend = LOSS(
        hidden,
        weight,
        *teacher,
        softcap=3.0,
        temperature=2.0,
        reduction="none",
        target=target,
        hard_weight=0.25,
    )
    torch.testing.assert_close(blend, torch.where(target == -100, soft, 0.75 * soft + 0.25 * hard))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_words_and_tokens(dtype: torch.dtype) -> None:
    assert_loss(
        LOSS, reference.linear_distillation, *operands(40, 17_001, dtype=dtype, hidden_size=16)
    )
    assert_loss(
        LOSS, reference.linear_distillation, *operands(4500, 110, dtype=dtype, hidden_size=16)
    )


def test_soft_caps_bite() -> None:
    tensors = operands(33, 130)
    losses = [
        LOSS(*tensors, softcap=cap, teacher_softcap=teacher_cap)
        for cap in (None, 1.0)
        for teacher_cap in (None, 1.0)
    ]
    for i in range(4):
        for j in range(i):
            assert (losses[i] - losses[j]).abs() > 1e-2


def test_student_that_equals_its_teacher() -> None:
    hidden, weight, *_ = operands(20, 130)
    loss, grad_hidden, grad_weight = value_and_gradients(
        LOSS, hidden, weight, hidden, weight, softcap=3.0, teacher_softcap=3.0
    )
    s = 3 * torch.tanh(hidden @ weight.T / 3)
    entropy = -(s.softmax(-1) * s.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(loss, entropy)
    assert grad_hidden.abs().max() < 1e-7
    assert grad_weight.abs().max() < 1e-7


def test_teacher_of_another_dtype(isa: str) -> None:
    hidden, weight, teacher_hidden, teacher_weight = operands(33, 130)
    assert_loss(
        LOSS,
        lambda h, w, t, v: reference.linear_distillation(h, w, t.float(), v.float()),
        hidden,
        weight,
        teacher_hidden.bfloat16(),
        teacher_weight.bfloat16(),
    )


def test_teacher_gets_no_gradient() -> None:
    tensors = [t.requires_grad_() for t in operands(10, 30)]
    LOSS(*tensors).backward()
    assert tensors[0].grad is not None
    assert tensors[2].grad is None
    assert tensors[3].grad is None
    assert not LOSS(tensors[0].detach(), tensors[1].detach(), *tensors[2:]).requires_grad


def test_masked_tokens_are_of_no_effect(isa: str) -> None:
    hidden, weight, teacher_hidden, teacher_weight = operands(50, 130)
    mask = torch.rand(50) > 0.4
    expected = value_and_gradients(
        LOSS, hidden[mask], weight, teacher_hidden[mask], teacher_weight, **CAPS
    )
    hidden[~mask] = teacher_hidden[~mask] = float("nan")
    for m in (mask, mask.long(), mask.to(torch.uint8) * 2):
        loss, grad_hidden, grad_weight = value_and_gradients(
            LOSS, hidden, weight, teacher_hidden, teacher_weight, mask=m, **CAPS
        )
        assert torch.equal(loss, expected[0])
        assert torch.equal(grad_hidden[mask], expected[1])
        assert (grad_hidden[~mask] == 0).all()
        assert torch.equal(grad_weight, expected[2])


def test_no_token_counts(isa: str) -> None:
    tensors = operands(20, 130)
    mask = torch.zeros(20, dtype=torch.bool)
    for reduction, expected in (("mean", float("nan")), ("sum", 0.0)):
        loss, *gradients = value_and_gradients(LOSS, *tensors, mask=mask, reduction=reduction)
        torch.testing.assert_close(loss, torch.tensor(expected), equal_nan=True)
        assert not any(g.any() for g in gradients)
    assert not LOSS(*tensors, mask=mask, reduction="none").any()


def test_shapes(isa: str) -> None:
    hidden, weight, teacher_hidden, teacher_weight = operands(6, 130)
    flat = LOSS(hidden, weight, teacher_hidden, teacher_weight, reduction="none")
    deep = LOSS(
        hidden.view(2, 3, -1),
        weight,
        teacher_hidden.view(2, 3, -1),
        teacher_weight,
        reduction="none",
    )
    assert torch.equal(deep, flat.view(2, 3))
    one = LOSS(hidden[0], weight, teacher_hidden[0], teacher_weight)
    torch.testing.assert_close(one, flat[0])
    assert LOSS(hidden[:0], weight, teacher_hidden[:0], teacher_weight).isnan()
    assert LOSS(hidden[:0], weight, teacher_hidden[:0], teacher_weight, reduction="sum") == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(isa: str, layout: str) -> None:
    tensors = operands(12, 130)
    mask, target = torch.rand(12) > 0.3, labels(12, 130)
    options = CAPS | {"target": target, "hard_weight": 0.5, "mask": mask}
    expected = value_and_gradients(LOSS, *tensors, **options)
    leaves = [with_strides(t, layout).detach().requires_grad_(i < 2) for i, t in enumerate(tensors)]
    value = LOSS(*leaves, **options)
    value.backward()
    for actual, right in zip((value, leaves[0].grad, leaves[1].grad), expected, strict=True):
        assert torch.equal(actual, right)


@pytest.mark.parametrize("dtype", DTYPES)
def test_independent_of_threads_and_runs(isa: str, dtype: torch.dtype) -> None:
    tensors = operands(150, 1000, 900, dtype, hidden_size=100)
    assert_same_for_any_threads(
        LOSS, *tensors, **CAPS, temperature=2.0, target=labels(150, 1000), hard_weight=0.5
    )


def test_every_element_is_written(isa: str) -> None:
    tensors = operands(50, 130)
    out = torch.full((50,), float("nan"))
    OUT_OP(
        *tensors,
        None,
        None,
        softcap=3.0,
        teacher_softcap=None,
        temperature=1.0,
        hard_weight=0.0,
        ignore_index=-100,
        reduction="none",
        out=out,
    )
    assert torch.equal(out, LOSS(*tensors, softcap=3.0, reduction="none"))


@pytest.mark.parametrize("options", [{}, {"hard_weight": 0.4, "reduction": "none"}])
def test_gradcheck(options: dict[str, Any]) -> None:
    hidden, weight, *teacher = (t.double() for t in operands(5, 7, 9, hidden_size=4))
    target = labels(5, 7)
    assert torch.autograd.gradcheck(
        lambda h, w: LOSS(h, w, *teacher, **CAPS, temperature=1.5, target=target, **options),
        (hidden.requires_grad_(), weight.requires_grad_()),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_opcheck(dtype: torch.dtype) -> None:
    hidden, weight, *teacher = operands(6, 10, 12, dtype)
    mask, target = torch.rand(6) > 0.3, labels(6, 10)
    opcheck(OP, (hidden, weight, *teacher, mask), {"softcap": 3.0, "reduction": "none"})
    opcheck(
        OP,
        (hidden.requires_grad_(), weight.requires_grad_(), *teacher, mask, target),
        {"softcap": 3.0, "hard_weight": 0.3},
    )


def test_compile_autocast_and_checkpoint() -> None:
    tensors = operands(20, 33)
    mask = torch.rand(20) > 0.3
    expected = value_and_gradients(LOSS, *tensors, **CAPS, mask=mask)

    def checkpointed(*args: Tensor, **options: Any) -> Tensor:
        return torch.utils.checkpoint.checkpoint(LOSS, *args, use_reentrant=False, **options)

    for loss in (torch.compile(LOSS, fullgraph=True), checkpointed):
        actual = value_and_gradients(loss, *tensors, **CAPS, mask=mask)
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(one, other)
    with torch.autocast("cpu", torch.bfloat16):
        actual = value_and_gradients(LOSS, *tensors, **CAPS, mask=mask)
    expected = value_and_gradients(LOSS, *(t.bfloat16() for t in tensors), **CAPS, mask=mask)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other.float())


def test_memory() -> None:
    """Both sides' logits of 1024 tokens and 64000 words, and a gradient, would be 786 MB."""
    growth = peak_growth("""
hidden = torch.randn(1024, 64).bfloat16().requires_grad_()
weight = torch.randn(64_000, 64).bfloat16().requires_grad_()
teacher = torch.randn(1024, 80).bfloat16(), torch.randn(64_000, 80).bfloat16()
def run(tokens):
    ops.linear_distillation(hidden[:tokens], weight, teacher[0][:tokens], teacher[1]).backward()
    hidden.grad = weight.grad = None
""")
    assert growth < 230


def test_errors() -> None:
    hidden, weight, teacher_hidden, teacher_weight = tensors = operands(6, 130)
    with pytest.raises(TypeError, match=r"linear_distillation: hidden must be a torch\.Tensor"):
        LOSS([1.0], *tensors[1:])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="teacher_weight must be float32, .*, got torch.int64"):
        LOSS(*tensors[:3], teacher_weight.long())
    with pytest.raises(TypeError, match="mask must be bool, uint8, int32 or int64, got torch.fl"):
        LOSS(*tensors, mask=torch.ones(6))
    with pytest.raises(TypeError, match=r"mask must be a torch\.Tensor, got list"):
        LOSS(*tensors, mask=[True] * 6)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="target must be int32 or int64, got torch.float32"):
        LOSS(*tensors, target=torch.ones(6))
    with pytest.raises(ValueError, match=r"teacher_weight must have shape .* \(\*, 50\)"):
        LOSS(*tensors[:3], teacher_weight[:, 1:])
    with pytest.raises(ValueError, match="teacher_weight must have teacher_hidden's dtype Float"):
        LOSS(*tensors[:3], teacher_weight.half())
    with pytest.raises(ValueError, match="teacher_hidden must have hidden's dtype Double"):
        LOSS(hidden.double(), weight.double(), teacher_hidden, teacher_weight)
    with pytest.raises(
        ValueError, match=r"teacher_hidden must have hidden's leading shape, got \(5, 50\)"
    ):
        LOSS(hidden, weight, teacher_hidden[1:], teacher_weight)
    with pytest.raises(ValueError, match=r"mask must have hidden's leading shape, got \(5,\)"):
        LOSS(*tensors, mask=torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"target must have hidden's leading shape, got \(5,\)"):
        LOSS(*tensors, target=torch.ones(5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"target must be in \[0, vocab_size = 130\).*, got 130"):
        LOSS(*tensors, target=torch.full((6,), 130), hard_weight=0.5)
    with pytest.raises(ValueError, match=r"hard_weight = 0\.5\d* needs target"):
        LOSS(*tensors, hard_weight=0.5)
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"hard_weight must be in \[0, 1\]"):
            LOSS(*tensors, target=torch.ones(6, dtype=torch.long), hard_weight=wrong)
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        for name in ("softcap", "teacher_softcap", "temperature"):
            with pytest.raises(ValueError, match=f": {name} must be positive and finite"):
                LOSS(*tensors, **{name: wrong})
    with pytest.raises(ValueError, match="reduction must be 'mean', 'sum' or 'none', got 'max'"):
        LOSS(*tensors, reduction="max")
