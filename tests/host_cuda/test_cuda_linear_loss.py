"""The kernels of the losses, with torch's products between them as csrc/torch/linear_loss_cuda.cpp
has them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from common import DTYPES
from gemma2_ext import reference
from host_cuda.emulator import assert_needed, check_schedules, guarded, launch, places
from losses_common import assert_loss

STATS = 8  # kLossCudaStats


class Problem:
    """A loss's arrays, as LossTokens has them, and its sides."""

    def __init__(
        self,
        sides: list[tuple[Tensor, Tensor, float | None]],
        counted: Tensor,
        entries: tuple[Tensor, Tensor],
        *,
        lse_weight: Tensor | float = 1.0,
        hard_weight: Tensor | float = 0.0,
        teacher_weight: Tensor | float = 0.0,
        temperature: float = 1.0,
        z_loss: float = 0.0,
        uniform: float = 0.0,
        reduction: str = "mean",
        words: int = 64,
        **options: Any,
    ) -> None:
        n = int(counted.sum())
        place = counted.nonzero()[:, 0]
        self.sides = [(hidden[place], weight, softcap) for hidden, weight, softcap in sides]
        self.words, self.options, self.tokens = words, options, len(counted)

        def each(value: Tensor | float) -> Tensor:
            return torch.as_tensor(value, dtype=torch.float64).expand(n).contiguous()

        self.loss: dict[str, Any] = {
            "tokens": n,
            "entries_per_token": entries[0].shape[1],
            "place": place,
            "entry_word": entries[0].contiguous(),
            "entry_weight": entries[1].double().contiguous(),
            "lse_weight": each(lse_weight),
            "hard_weight": each(hard_weight),
            "teacher_weight": each(teacher_weight),
            "temperature": temperature,
            "z_loss": z_loss,
            "uniform": uniform,
            "hard": isinstance(hard_weight, Tensor),
            "by_token": reduction == "none",
            "divisor": n if reduction == "mean" else 1,
        }

    def logits(self, begin: int, end: int) -> dict[str, Any]:
        """Both sides' products with these words."""
        fields = {}
        names = ("student", "teacher")
        for name, (hidden, weight, softcap) in zip(names, self.sides, strict=False):
            rows = weight[begin:end].float()
            data = guarded((len(hidden), len(rows)), torch.float32)
            data.copy_(hidden.float() @ rows.T)
            side = {"data": data, "words": len(rows), "softcap": softcap or 0.0}
            fields[name] = side if len(rows) else {"softcap": softcap or 0.0}
        return fields

    def chunks(self) -> list[tuple[int, int]]:
        vocab_size = len(self.sides[0][1])
        return [(i, min(i + self.words, vocab_size)) for i in range(0, vocab_size, self.words)]

    def sums(self, **options: Any) -> Tensor:
        total = guarded((STATS, self.loss["tokens"]), torch.float32)
        for begin, end in self.chunks():
            launch(
                "linear_loss_sums",
                **self.logits(begin, end),
                loss=self.loss,
                word_begin=begin,
                first=begin == 0,
                total=total,
                **self.options,
                **options,
            )
        return total

    def result(self, total: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        by_token = self.loss["by_token"]
        out = guarded((self.tokens if by_token else 1,), torch.float32).zero_()
        stats = guarded((3, self.tokens), torch.float32).zero_()
        launch(
            "linear_loss_result",
            loss=self.loss,
            teacher=len(self.sides) == 2,
            total=total,
            out=out,
            stats=stats,
            stats_stride=self.tokens,
            **options,
        )
        return out, stats

    def gradient(self, grad: Tensor, stats: Tensor, **options: Any) -> list[Tensor]:
        """Of the student's products, for every chunk of words."""
        parts = []
        for begin, end in self.chunks():
            hidden = self.sides[0][0]
            gradient = guarded((len(hidden), end - begin), hidden.dtype)
            launch(
                "linear_loss_gradient",
                **self.logits(begin, end),
                loss=self.loss,
                word_begin=begin,
                grad=grad,
                stats=stats,
                stats_stride=self.tokens,
                gradient=gradient,
                dtype=hidden.dtype,
                **self.options,
                **options,
            )
            parts.append(gradient)
        return parts

    def add(self, products: list[Tensor], dtype: torch.dtype, **options: Any) -> Tensor:
        """The sum, in the rows of all tokens."""
        rows, columns = products[0].shape
        sums = guarded((rows, columns), torch.float32)
        out = guarded((self.tokens, columns), dtype).zero_()
        for i, product in enumerate(products):
            last = {"out": out, "place": self.loss["place"]} if i == len(products) - 1 else {}
            launch(
                "linear_loss_add",
                product=product,
                sums=sums,
                first=i == 0,
                rows=rows,
                columns=columns,
                dtype=dtype,
                **last,
                **self.options,
                **options,
            )
        return out


def loss_of(make: Callable[..., Problem]) -> Callable[..., Tensor]:
    """A differentiable loss of (hidden, weight, ...) out of what `make` says of it."""

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, weight: Tensor, problem: Problem) -> Tensor:
            out, ctx.stats = problem.result(problem.sums())
            ctx.problem = problem
            return out.clone() if problem.loss["by_token"] else out[0].clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
            problem = ctx.problem
            hidden, weight, _ = problem.sides[0]
            parts = problem.gradient(grad.contiguous().view(-1), ctx.stats)
            products = [
                part.float() @ weight[begin:end].float()
                for part, (begin, end) in zip(parts, problem.chunks(), strict=True)
            ]
            grad_weight = torch.cat([part.float().T @ hidden.float() for part in parts])
            return problem.add(products, hidden.dtype), grad_weight.to(weight.dtype), None

    def loss(hidden: Tensor, weight: Tensor, *rest: Tensor, **options: Any) -> Tensor:
        with torch.no_grad():
            problem = make(hidden, weight, *rest, **options)
        return Loss.apply(hidden, weight, problem)

    return loss


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    **options: Any,
) -> Problem:
    counted = target != -100
    words = target[counted][:, None]
    return Problem(
        [(hidden, weight, softcap)],
        counted,
        (words, torch.full(words.shape, 1 - label_smoothing)),
        uniform=label_smoothing / len(weight),
        **options,
    )


def distillation(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    mask: Tensor,
    target: Tensor,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    **options: Any,
) -> Problem:
    soft, hard, entries = _labels(mask, target, hard_weight)
    return Problem(
        [(hidden, weight, softcap), (teacher_hidden, teacher_weight, teacher_softcap)],
        mask,
        entries,
        lse_weight=soft + (hard if temperature == 1 else 0),
        hard_weight=hard if temperature != 1 else 0.0,
        teacher_weight=soft / temperature,
        temperature=temperature,
        **options,
    )


def _labels(
    mask: Tensor, target: Tensor, hard_weight: float
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    words = target[mask]
    hard = torch.where(words == -100, 0.0, hard_weight).double()
    return 1 - hard, hard, (words.clamp(min=-1)[:, None], hard[:, None])


def topk(
    hidden: Tensor,
    weight: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    *,
    mask: Tensor,
    softcap: float | None = None,
    temperature: float = 1.0,
    **options: Any,
) -> Problem:
    q = (log_probs[mask].double() / temperature).softmax(-1) / temperature
    return Problem(
        [(hidden, weight, softcap)], mask, (indices[mask], q), temperature=temperature, **options
    )


def operands(
    tokens: int, hidden_size: int, vocab_size: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    hidden = (3 * torch.randn(tokens, hidden_size)).to(dtype)
    return hidden, (torch.randn(vocab_size, hidden_size) / hidden_size**0.5).to(dtype)


def targets(tokens: int, vocab_size: int) -> Tensor:
    target = torch.randint(0, vocab_size, (tokens,))
    target[::3] = -100
    return target


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 3.0, "reduction": "sum"},
        {"softcap": 3.0, "label_smoothing": 0.2, "z_loss": 1e-2},
        {"softcap": 30.0, "reduction": "none"},
    ],
)
@pytest.mark.parametrize(
    "tokens, hidden_size, vocab_size, words",
    [(7, 41, 95, 95), (9, 48, 600, 256), (5, 16, 2501, 1280)],
)
def test_cross_entropy(
    dtype: torch.dtype,
    options: dict[str, Any],
    tokens: int,
    hidden_size: int,
    vocab_size: int,
    words: int,
) -> None:
    hidden, weight = operands(tokens, hidden_size, vocab_size, dtype)
    loss = loss_of(lambda *a, **o: cross_entropy(*a, words=words, **o))
    target = targets(tokens, vocab_size)
    target[1], target[2] = 0, vocab_size - 1
    assert_loss(loss, reference.linear_cross_entropy, hidden, weight, target, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("teacher_words", [95, 200, 300])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 2.0, "hard_weight": 0.3}, {"reduction": "none"}]
)
def test_distillation(dtype: torch.dtype, teacher_words: int, options: dict[str, Any]) -> None:
    hidden, weight = operands(9, 41, 200, dtype)
    teacher = operands(9, 24, teacher_words, dtype)
    mask = torch.arange(9) % 4 != 1
    target = targets(9, 200)
    assert_loss(
        loss_of(lambda *a, **o: distillation(*a, words=128, **o)),
        reference.linear_distillation,
        hidden,
        weight,
        *teacher,
        mask=mask,
        target=target,
        softcap=3.0,
        teacher_softcap=5.0,
        **options,
    )


@pytest.mark.parametrize("k", [1, 5, 70])
def test_topk(k: int) -> None:
    hidden, weight = operands(9, 41, 300)
    log_probs, indices = torch.randn(9, 300).log_softmax(-1).topk(k)
    if k == 5:
        indices[2, 3] = indices[2, 1]  # a word twice
    assert_loss(
        loss_of(lambda *a, **o: topk(*a, words=128, **o)),
        reference.linear_distillation_topk,
        hidden,
        weight,
        indices,
        log_probs,
        mask=torch.arange(9) % 4 != 1,
        softcap=3.0,
        temperature=1.5,
    )


def test_no_token_counts() -> None:
    hidden, weight = operands(4, 8, 30)
    for reduction, expected in (("mean", math.nan), ("sum", 0.0)):
        problem = cross_entropy(hidden, weight, torch.full((4,), -100), reduction=reduction)
        out, _ = problem.result(torch.empty(STATS, 0))
        torch.testing.assert_close(out, torch.tensor([expected]), equal_nan=True)


def _problem() -> Problem:
    """With several chunks of words, of warps and of blocks."""
    torch.manual_seed(0)
    hidden, weight = operands(5, 8, 2040)
    return distillation(
        hidden,
        weight,
        *operands(5, 8, 1900),
        mask=torch.ones(5, dtype=torch.bool),
        target=targets(5, 2040),
        softcap=3.0,
        temperature=2.0,
        hard_weight=0.3,
        words=1024,
        max_blocks=2,
    )


def _sums(**options: Any) -> tuple[Tensor]:
    return (_problem().sums(**options),)


def _result(**options: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return _problem().result(1 + torch.rand(STATS, 5), **options)


def _gradient(**options: Any) -> tuple[Tensor, ...]:
    problem = _problem()
    return tuple(problem.gradient(torch.ones(1), 1 + torch.rand(3, 5), **options))


def _add(**options: Any) -> tuple[Tensor]:
    torch.manual_seed(0)
    return (_problem().add([torch.randn(5, 1030) for _ in range(3)], torch.float32, **options),)


@pytest.mark.parametrize("run", [_sums, _result, _gradient, _add])
def test_schedules(run: Callable[..., tuple[Tensor, ...]]) -> None:
    check_schedules(run)


@pytest.mark.parametrize("run", [_sums, _result])
def test_every_barrier_is_needed(run: Callable[..., tuple[Tensor, ...]]) -> None:
    found = places(run)
    assert found
    for place in found:
        assert_needed(run, place)
