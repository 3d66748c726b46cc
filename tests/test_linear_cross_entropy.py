from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
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

OP = torch.ops.gemma2_ext.linear_cross_entropy.default
OUT_OP = torch.ops.gemma2_ext.linear_cross_entropy_out.default
OPTIONS: list[dict[str, Any]] = [
    {},
    {"softcap": 3.0, "reduction": "sum"},
    {"softcap": 3.0, "label_smoothing": 0.2, "z_loss": 1e-2},
    {"softcap": 30.0, "reduction": "none", "ignore_index": 0},
]


def operands(
    tokens: int, hidden_size: int, vocab_size: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Products of standard deviation 3, so that a soft-cap of 3 bites; a third of the tokens is
    ignored."""
    hidden = (3 * torch.randn(tokens, hidden_size)).to(dtype)
    weight = (torch.randn(vocab_size, hidden_size) / hidden_size**0.5).to(dtype)
    target = torch.randint(0, vocab_size, (tokens,))
    target[::3] = -100
    return hidden, weight, target


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "tokens, hidden_size, vocab_size",
    [(7, 41, 95), (33, 111, 97), (70, 64, 500)],
)
def test_value_and_gradients(
    isa: str,
    dtype: torch.dtype,
    options: dict[str, Any],
    tokens: int,
    hidden_size: int,
    vocab_size: int,
) -> None:
    hidden, weight, target = operands(tokens, hidden_size, vocab_size, dtype)
    if options.get("ignore_index") == 0:
        target.clamp_(min=0)
    assert_loss(
        ops.linear_cross_entropy, reference.linear_cross_entropy, hidden, weight, target, **options
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_words(dtype: torch.dtype) -> None:
    # Several chunks of words, the last ragged.
    hidden, weight, target = operands(40, 16, 17_001, dtype)
    target[1], target[2] = 0, 17_000
    assert_loss(
        ops.linear_cross_entropy,
        reference.linear_cross_entropy,
        hidden,
        weight,
        target,
        softcap=3.0,
    )


def test_more_logits_than_are_kept() -> None:
    # 2100 tokens times 17001 words exceed 128 MiB; each half of the tokens alone does not.
    hidden, weight, target = operands(2100, 8, 17_001)
    whole = value_and_gradients(
        ops.linear_cross_entropy, hidden, weight, target, softcap=3.0, reduction="sum"
    )
    halves = [
        value_and_gradients(ops.linear_cross_entropy, h, weight, t, softcap=3.0, reduction="sum")
        for h, t in zip(hidden.split(1050), target.split(1050), strict=True)
    ]
    torch.testing.assert_close(whole[0], halves[0][0] + halves[1][0])
    torch.testing.assert_close(whole[1], torch.cat([halves[0][1], halves[1][1]]))
    torch.testing.assert_close(whole[2], halves[0][2] + halves[1][2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_tokens_than_a_block(dtype: torch.dtype) -> None:
    hidden, weight, target = operands(6500, 24, 110, dtype)
    assert_loss(
        ops.linear_cross_entropy,
        reference.linear_cross_entropy,
        hidden,
        weight,
        target,
        softcap=3.0,
    )


def test_agrees_with_torch() -> None:
    hidden, weight, target = operands(50, 32, 200)
    for smoothing in (0.0, 0.3, 1.0):
        for reduction in ("mean", "sum", "none"):
            torch.testing.assert_close(
                ops.linear_cross_entropy(
                    hidden, weight, target, label_smoothing=smoothing, reduction=reduction
                ),
                F.cross_entropy(
                    hidden @ weight.T, target, label_smoothing=smoothing, reduction=reduction
                ),
            )


def test_soft_cap_bites() -> None:
    hidden, weight, target = operands(50, 32, 200)
    plain, capped = (
        ops.linear_cross_entropy(hidden, weight, target, softcap=cap) for cap in (None, 1.0)
    )
    assert plain > capped + 1
    # With logits in [-1, 1] no word is less likely than e^-2 times the evenly likely one.
    assert capped <= math.log(200) + 2


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_large_and_small_logits(isa: str, scale: float) -> None:
    hidden, weight, target = operands(40, 32, 200)
    for softcap in (None, 30.0):
        assert_loss(
            ops.linear_cross_entropy,
            reference.linear_cross_entropy,
            hidden * scale,
            weight,
            target,
            softcap=softcap,
            roundings=32,  # of a logit of 1e4 or more, e is the difference of two
        )


def test_small_gradients_survive_float16() -> None:
    # Of a mean over many tokens a probability's share is below float16's smallest number.
    hidden, weight, target = operands(3000, 16, 200, torch.float16)
    assert_loss(
        ops.linear_cross_entropy,
        reference.linear_cross_entropy,
        hidden,
        weight,
        target,
        softcap=3.0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ignored_tokens_are_of_no_effect(isa: str, dtype: torch.dtype) -> None:
    hidden, weight, target = operands(50, 40, 130, dtype)
    counts = target != -100
    expected = value_and_gradients(
        ops.linear_cross_entropy, hidden[counts], weight, target[counts], softcap=3.0
    )
    hidden[~counts] = float("nan")
    loss, grad_hidden, grad_weight = value_and_gradients(
        ops.linear_cross_entropy, hidden, weight, target, softcap=3.0
    )
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad_hidden[counts], expected[1])
    assert (grad_hidden[~counts] == 0).all()
    assert torch.equal(grad_weight, expected[2])


def test_no_token_counts(isa: str) -> None:
    hidden, weight, target = operands(50, 40, 130)
    target.fill_(-100)
    for reduction, expected in (("mean", float("nan")), ("sum", 0.0)):
        loss, grad_hidden, grad_weight = value_and_gradients(
            ops.linear_cross_entropy, hidden, weight, target, reduction=reduction
        )
        torch.testing.assert_close(loss, torch.tensor(expected), equal_nan=True)
        assert (grad_hidden == 0).all()
        assert (grad_weight == 0).all()
    assert (ops.linear_cross_entropy(hidden, weight, target, reduction="none") == 0).all()


def test_shapes(isa: str) -> None:
    hidden, weight, target = operands(6, 40, 130)
    flat = ops.linear_cross_entropy(hidden, weight, target, reduction="none")
    deep = ops.linear_cross_entropy(
        hidden.view(2, 3, 40), weight, target.view(2, 3), reduction="none"
    )
    assert torch.equal(deep, flat.view(2, 3))
    one = ops.linear_cross_entropy(hidden[1], weight, target[1])
    assert one.shape == ()
    torch.testing.assert_close(one, flat[1])
    no_columns = ops.linear_cross_entropy(hidden[:, :0], weight[:, :0], target)
    torch.testing.assert_close(no_columns, torch.tensor(130.0).log())
    empty = hidden[:0], weight, target[:0]
    assert ops.linear_cross_entropy(*empty).isnan()
    assert ops.linear_cross_entropy(*empty, reduction="sum") == 0
    assert ops.linear_cross_entropy(*empty, reduction="none").shape == (0,)
    _, grad_hidden, grad_weight = value_and_gradients(
        ops.linear_cross_entropy, *empty, reduction="sum"
    )
    assert grad_hidden.shape == (0, 40)
    assert torch.equal(grad_weight, torch.zeros_like(weight))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(isa: str, layout: str) -> None:
    hidden, weight, target = operands(12, 41, 130)
    hidden, target = hidden.view(3, 4, 41), target.view(3, 4)
    expected = value_and_gradients(ops.linear_cross_entropy, hidden, weight, target, softcap=3.0)

    for h, w, t in (
        (with_strides(hidden, layout), with_strides(weight, layout), target),
        (hidden.transpose(0, 1).contiguous().transpose(0, 1), weight, target.t().contiguous().t()),
        (hidden, weight, target.int()),
    ):
        h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
        value = ops.linear_cross_entropy(h, w, t, softcap=3.0)
        value.backward()
        for actual, right in zip((value, h.grad, w.grad), expected, strict=True):
            assert torch.equal(actual, right)


@pytest.mark.parametrize("dtype", DTYPES)
def test_independent_of_threads_and_runs(isa: str, dtype: torch.dtype) -> None:
    hidden, weight, target = operands(150, 333, 2000, dtype)
    assert_same_for_any_threads(
        ops.linear_cross_entropy, hidden, weight, target, softcap=3.0, label_smoothing=0.1
    )


def test_one_gradient_alone(isa: str) -> None:
    hidden, weight, target = operands(50, 40, 130)
    _, grad_hidden, grad_weight = value_and_gradients(
        ops.linear_cross_entropy, hidden, weight, target
    )
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    ops.linear_cross_entropy(h, weight, target).backward()
    assert torch.equal(h.grad, grad_hidden)
    ops.linear_cross_entropy(hidden, w, target).backward()
    assert torch.equal(w.grad, grad_weight)


def test_backward_twice() -> None:
    hidden, weight, target = operands(50, 40, 130)
    hidden.requires_grad_()
    loss = ops.linear_cross_entropy(hidden, weight, target)
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], first)


def test_every_element_is_written(isa: str) -> None:
    hidden, weight, target = operands(50, 40, 130)
    out = torch.full((50,), float("nan"))
    OUT_OP(
        hidden,
        weight,
        target,
        softcap=3.0,
        ignore_index=-100,
        reduction="none",
        label_smoothing=0.0,
        z_loss=0.0,
        out=out,
    )
    expected = ops.linear_cross_entropy(hidden, weight, target, softcap=3.0, reduction="none")
    assert torch.equal(out, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction: str) -> None:
    hidden, weight, target = operands(5, 6, 7)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: ops.linear_cross_entropy(
            h, w, target, softcap=3.0, label_smoothing=0.1, z_loss=0.05, reduction=reduction
        ),
        (hidden, weight),
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_opcheck(dtype: torch.dtype) -> None:
    hidden, weight, target = operands(6, 16, 10, dtype)
    hidden, target = hidden.view(2, 3, 16), target.view(2, 3)
    opcheck(OP, (hidden, weight, target), {"softcap": 3.0, "reduction": "none"})
    opcheck(OP, (hidden.requires_grad_(), weight.requires_grad_(), target), {"softcap": 3.0})


def test_compile_without_graph_breaks() -> None:
    hidden, weight, target = operands(20, 64, 33)
    options = {"softcap": 3.0, "label_smoothing": 0.1}
    expected = value_and_gradients(ops.linear_cross_entropy, hidden, weight, target, **options)
    compiled = torch.compile(ops.linear_cross_entropy, fullgraph=True)
    actual = value_and_gradients(compiled, hidden, weight, target, **options)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_autocast_and_checkpoint() -> None:
    hidden, weight, target = operands(20, 64, 33)
    narrow = value_and_gradients(
        ops.linear_cross_entropy, hidden.bfloat16(), weight.bfloat16(), target, softcap=3.0
    )
    with torch.autocast("cpu", torch.bfloat16):
        wide = value_and_gradients(ops.linear_cross_entropy, hidden, weight, target, softcap=3.0)
        assert torch.equal(ops.linear_cross_entropy(hidden, weight, target, softcap=3.0), narrow[0])
    assert wide[1].dtype == torch.float32
    for one, other in zip(wide, narrow, strict=True):
        assert torch.equal(one, other.float())

    def checkpointed(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(
            lambda: ops.linear_cross_entropy(h, w, t), use_reentrant=False
        )

    expected = value_and_gradients(ops.linear_cross_entropy, hidden, weight, target)
    actual = value_and_gradients(checkpointed, hidden, weight, target)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_memory() -> None:
    """The logits of 1024 tokens and 128000 words would be 524 MB in float32, and as much again for
    their gradient. Beside the gradients (17 MB), 128 MiB of logits are kept, and what is in work
    takes up to 50 MB."""
    growth = peak_growth("""
hidden = torch.randn(1024, 64).bfloat16().requires_grad_()
weight = torch.randn(128_000, 64).bfloat16().requires_grad_()
target = torch.randint(0, 128_000, (1024,))
def run(tokens):
    ops.linear_cross_entropy(hidden[:tokens], weight, target[:tokens], softcap=30.0).backward()
    hidden.grad = weight.grad = None
""")
    assert growth < 230


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(0, 70),
    hidden_size=st.integers(1, 130),
    vocab_size=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    options=st.sampled_from(OPTIONS[:3]),
)
def test_any_shape(
    tokens: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    hidden, weight, target = operands(tokens, hidden_size, vocab_size, dtype)
    if tokens < 2:
        options = options | {"reduction": "sum"}
    assert_loss(
        ops.linear_cross_entropy, reference.linear_cross_entropy, hidden, weight, target, **options
    )


def test_no_second_derivative() -> None:
    hidden, weight, target = operands(6, 40, 130)
    loss = ops.linear_cross_entropy(hidden.requires_grad_(), weight, target)
    with pytest.raises(NotImplementedError, match="linear_cross_entropy has no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_the_backward_takes_only_what_the_forward_kept() -> None:
    hidden, weight, target = operands(3, 8, 5)
    options = (3.0, -100, "mean", 0.0, 0.0)
    _, stats, kept = torch.ops.gemma2_ext.linear_cross_entropy_forward(
        hidden, weight, target, *options
    )

    def backward(stats: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        grads = torch.empty_like(hidden), torch.empty_like(weight)
        grad = torch.ones(())
        torch.ops.gemma2_ext.linear_cross_entropy_backward_out(
            grad, hidden, weight, target, stats, kept, *options, *grads
        )
        return grads[0]

    leaf = hidden.clone().requires_grad_()
    ops.linear_cross_entropy(leaf, weight, target, softcap=3.0).backward()
    assert torch.equal(backward(stats, kept), leaf.grad)
    for wrong in (stats[:, 1:], stats[:1], stats.double(), stats.flatten()):
        with pytest.raises(ValueError, match="stats must be what the forward returned"):
            backward(wrong, kept)
    for wrong in (kept[1:], kept[:0], kept[None]):
        with pytest.raises(ValueError, match="kept must be what the forward returned"):
            backward(stats, wrong)


def test_errors() -> None:
    hidden, weight, target = operands(6, 40, 130)
    loss = ops.linear_cross_entropy
    with pytest.raises(TypeError, match=r"linear_cross_entropy: hidden must be a torch\.Tensor"):
        loss([1.0], weight, target)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="weight must be float32, bfloat16 or float16, got torch.i"):
        loss(hidden, weight.long(), target)
    with pytest.raises(TypeError, match="target must be int32 or int64, got torch.float32"):
        loss(hidden, weight, target.float())
    with pytest.raises(
        ValueError, match=r"weight must have shape \(vocab_size, hidden_size\) = \(\*, 40\)"
    ):
        loss(hidden, weight[:, 1:], target)
    with pytest.raises(ValueError, match=r"with at least one word, got \(0, 40\)"):
        loss(hidden, weight[:0], target)
    with pytest.raises(ValueError, match="hidden must have shape .* got a scalar"):
        loss(torch.tensor(1.0), weight, target)
    with pytest.raises(ValueError, match="weight must have hidden's dtype Float, got Half"):
        loss(hidden, weight.half(), target)
    with pytest.raises(
        ValueError, match=r"target must have hidden's leading shape, got \(5,\) for .* \(6, 40\)"
    ):
        loss(hidden, weight, target[1:])
    for wrong in (130, -1, -101):
        target[4] = wrong
        with pytest.raises(
            ValueError,
            match=r"target must be in \[0, vocab_size = 130\) or ignore_index = -100, "
            rf"got {wrong} at token 4",
        ):
            loss(hidden, weight, target)
    target[4] = 0
    for softcap in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="softcap must be positive and finite, or None"):
            loss(hidden, weight, target, softcap=softcap)
    for smoothing in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\]"):
            loss(hidden, weight, target, label_smoothing=smoothing)
    for z_loss in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="z_loss must be at least 0 and finite"):
            loss(hidden, weight, target, z_loss=z_loss)
    for grad in (False, True):
        with pytest.raises(
            ValueError, match="reduction must be 'mean', 'sum' or 'none', got 'max'"
        ):
            loss(hidden.requires_grad_(grad), weight, target, reduction="max")
    with pytest.raises(ValueError, match="out must be a scalar, got"):
        OUT_OP(
            hidden,
            weight,
            target,
            softcap=None,
            ignore_index=-100,
            reduction="mean",
            label_smoothing=0.0,
            z_loss=0.0,
            out=torch.empty(6),
        )
