from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from common import DTYPES, LAYOUTS, assert_accurate, with_strides
from gemma2_ext import ops
from products import assert_product

OP = torch.ops.gemma2_ext.logits.default
OUT_OP = torch.ops.gemma2_ext.logits_out.default


def reference_logits(hidden: Tensor, weight: Tensor, softcap: float | None = None) -> Tensor:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    y = hidden.to(wide) @ weight.to(wide).T
    return y if softcap is None else softcap * torch.tanh(y / softcap)


def operands(
    rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    # Products of about hidden_size ** 0.5 * 3: beyond a soft-cap of 30 for the larger sizes.
    return (
        (3 * torch.randn(rows, hidden_size)).to(dtype),
        torch.randn(vocab_size, hidden_size).to(dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 0.5, 30.0])
@pytest.mark.parametrize("hidden_size, vocab_size", [(1, 7), (41, 1), (111, 250), (256, 1009)])
def test_value(
    isa: str, dtype: torch.dtype, softcap: float | None, hidden_size: int, vocab_size: int
) -> None:
    for rows in (0, 1, 4, 7, 16, 35):
        hidden, weight = operands(rows, hidden_size, vocab_size, dtype)
        actual = ops.logits(hidden, weight, softcap)
        assert actual.dtype == torch.float32
        assert_product(actual, hidden, weight, softcap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 20])
def test_production_shape(isa: str, dtype: torch.dtype, rows: int) -> None:
    hidden, weight = operands(rows, 2304, 5000, dtype)
    actual = ops.logits(hidden, weight, 30.0)
    # Float32 on both sides. One product after the other, as the scalar kernel has it, makes 2304
    # roundings of sums of 3 * 2304**0.5 or less, which add up as their number's root. A GPU's
    # tensor cores cut off each of their 2304 / 16 sums, of the products' size, and do not round.
    eps, size = torch.finfo(torch.float32).eps, 3 * 2304**0.5
    noise = eps / 2 * 2304**0.5 * size
    if isa == "cuda" and dtype != torch.float32:
        noise = 2304 / 16 * eps * size
    assert_accurate(
        actual,
        lambda h, w: reference_logits(h, w, 30.0),
        hidden,
        weight,
        roundings=4,
        noise=noise,
    )


def test_softcap_bites(isa: str) -> None:
    hidden, weight = operands(3, 2304, 100, torch.bfloat16)
    plain, capped = ops.logits(hidden, weight), ops.logits(hidden, weight, 30.0)
    assert plain.abs().max() > 100
    assert capped.abs().max() <= 30
    torch.testing.assert_close(capped, 30 * torch.tanh(plain / 30))


def test_not_rounded_to_bfloat16(isa: str) -> None:
    hidden = torch.ones(1, 256).bfloat16()
    weight = torch.ones(3, 256).bfloat16()
    weight[:, 0] += 2.0**-7
    for rows in (1, 20):
        assert (ops.logits(hidden.expand(rows, 256), weight) == 256 + 2.0**-7).all()


def test_head_of_the_vocabulary(isa: str) -> None:
    hidden, weight = operands(2, 64, 256_000, torch.bfloat16)
    torch.testing.assert_close(
        ops.logits(hidden, weight, 30.0), reference_logits(hidden, weight, 30.0)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(isa: str, layout: str) -> None:
    hidden, weight = operands(6, 41, 30, torch.bfloat16)
    hidden = hidden.view(2, 3, 41)
    expected = ops.logits(hidden, weight, 30.0)
    actual = ops.logits(with_strides(hidden, layout), with_strides(weight, layout), 30.0)
    assert torch.equal(actual, expected)
    assert torch.equal(ops.logits(hidden.transpose(0, 1), weight, 30.0), expected.transpose(0, 1))


@pytest.mark.parametrize("rows", [1, 7, 30])
def test_every_element_is_written(isa: str, rows: int) -> None:
    hidden, weight = operands(rows, 41, 111, torch.float16)
    out = torch.full((rows, 111), float("nan"))
    OUT_OP(hidden, weight, 30.0, out)
    assert torch.equal(out, ops.logits(hidden, weight, 30.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_independent_of_threads_and_rows(isa: str, dtype: torch.dtype) -> None:
    hidden, weight = operands(40, 333, 1000, dtype)
    before = torch.get_num_threads()
    results = {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results[threads] = [ops.logits(hidden[:rows], weight, 30.0) for rows in (1, 9, 20, 40)]
    torch.set_num_threads(before)
    for one, two, three in zip(results[1], results[2], results[3], strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    if not (isa == "cuda" and dtype == torch.float32):  # those are cuBLAS's
        assert torch.equal(results[1][0], results[1][1][:1])
    if isa != "cuda":
        assert torch.equal(results[1][2], results[1][3][:20])


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    hidden, weight = operands(6, 16, 10, dtype)
    opcheck(OP, (hidden.view(2, 3, 16), weight, 30.0))
    opcheck(OP, (hidden, weight))
    opcheck(OP, (hidden.clone().requires_grad_(), weight, 30.0))
    opcheck(OUT_OP, (hidden, weight, None, torch.empty(6, 10)))


def test_compile_without_graph_breaks() -> None:
    hidden, weight = operands(5, 64, 33, torch.float32)
    compiled = torch.compile(lambda h: ops.logits(h, weight, 30.0) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(hidden), ops.logits(hidden, weight, 30.0) * 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_backward(isa: str, dtype: torch.dtype, softcap: float | None) -> None:
    tensors = operands(35, 64, 250, dtype)
    grad = torch.randn(35, 250)

    def gradient(function: Callable[..., Tensor], i: int, *tensors: Tensor) -> Tensor:
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = function(*leaves, softcap)
        return torch.autograd.grad(out, leaves[i], grad.to(out.dtype))[0]

    for i in range(2):
        assert_accurate(
            gradient(ops.logits, i, *tensors),
            lambda *t, i=i: gradient(reference_logits, i, *t),
            *tensors,
            roundings=2,
        )


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap: float | None) -> None:
    hidden, weight = (t.double().requires_grad_() for t in operands(4, 5, 6, torch.float32))
    assert torch.autograd.gradcheck(lambda h, w: ops.logits(h, w, softcap), (hidden, weight))


def test_errors() -> None:
    hidden, weight = operands(5, 64, 33, torch.float32)
    with pytest.raises(TypeError, match=r"logits: weight must be a torch\.Tensor, got int"):
        ops.logits(hidden, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"logits: weight must have shape .* \(\*, 64\), got"):
        ops.logits(hidden, weight[:, 1:])
    with pytest.raises(ValueError, match="hidden must have shape .* got a scalar"):
        ops.logits(torch.tensor(1.0), weight)
    with pytest.raises(ValueError, match="weight must have hidden's dtype Float, got Half"):
        ops.logits(hidden, weight.half())
    for softcap in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="softcap must be positive and finite, or None"):
            ops.logits(hidden, weight, softcap)
    with pytest.raises(ValueError, match="out must be Float, got BFloat16"):
        OUT_OP(hidden, weight, None, torch.empty(5, 33).bfloat16())
