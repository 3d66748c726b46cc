from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from common import (
    DTYPES,
    LAYOUTS,
    assert_accurate,
    assert_gradients_accurate,
    assert_independent_of_threads,
    assert_no_second_derivative,
    assert_same_gradients_compiled,
    gradients,
    with_strides,
)
from gemma2_ext import ops, reference

OP = torch.ops.gemma2_ext.add_rms_norm.default
OUT_OP = torch.ops.gemma2_ext.add_rms_norm_out.default
BACKWARD_OP = torch.ops.gemma2_ext.add_rms_norm_backward.default
BACKWARD_OUT_OP = torch.ops.gemma2_ext.add_rms_norm_backward_out.default


def inputs(
    rows: int, hidden_size: int, dtype: torch.dtype, weight_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight_dtype = weight_dtype or dtype
    x, residual = torch.randn(rows, hidden_size), torch.randn(rows, hidden_size).mul(5)
    post_weight, pre_weight = torch.randn(hidden_size), torch.randn(hidden_size)
    return (
        x.to(dtype),
        residual.to(dtype),
        post_weight.to(weight_dtype),
        pre_weight.to(weight_dtype),
    )


def check(*tensors: Tensor) -> None:
    r, normed = ops.add_rms_norm(*tensors)
    assert_accurate(r, lambda *t: reference.add_rms_norm(*t)[0], *tensors)
    assert_accurate(normed, lambda *t: reference.add_rms_norm(*t)[1], *tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [1, 7, 8, 41, 111, 256, 2304, 3584, 4608])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_value(isa: str, dtype: torch.dtype, hidden_size: int, rows: int) -> None:
    check(*inputs(rows, hidden_size, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_weights_of_another_dtype(isa: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    tensors = inputs(5, 64, dtype, weight_dtype)
    if dtype == weight_dtype or weight_dtype == torch.float32 or dtype == torch.float32:
        check(*tensors)
    else:  # neither holds the other: through float32
        r, normed = ops.add_rms_norm(*tensors)
        widened = ops.add_rms_norm(*tensors[:2], *(w.float() for w in tensors[2:]))
        assert torch.equal(r, widened[0])
        assert torch.equal(normed, widened[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_where_transformers_does(isa: str, dtype: torch.dtype) -> None:
    x, residual, post_weight, pre_weight = inputs(16, 2304, dtype)
    r, normed = ops.add_rms_norm(x, residual, post_weight, pre_weight)
    # The sum is of rounded numbers and is rounded; the norm behind it is that of the rounded sum.
    assert torch.equal(r, residual + ops.rms_norm(x, post_weight))
    torch.testing.assert_close(
        normed.float(), ops.rms_norm(r, pre_weight).float(), rtol=1e-2, atol=0
    )
    assert (normed != ops.rms_norm(r, pre_weight)).float().mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_and_small_rows(isa: str, dtype: torch.dtype) -> None:
    x, residual, post_weight, pre_weight = inputs(4, 333, dtype)
    scale = torch.tensor([1e-4, 1e-2, 1.0, 1e2])[:, None].to(dtype)
    check(x * scale, residual * scale, post_weight, pre_weight)
    zeros = torch.zeros_like(x)
    r, normed = ops.add_rms_norm(zeros, zeros, post_weight, pre_weight)
    assert not r.any() and not normed.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(isa: str, layout: str) -> None:
    x, residual = torch.randn(2, 3, 5, 41)
    weights = torch.randn(41), torch.randn(41)
    expected = ops.add_rms_norm(x, residual, *weights)
    actual = ops.add_rms_norm(
        with_strides(x, layout),
        with_strides(residual, layout),
        *(with_strides(w, layout) for w in weights),
    )
    mixed = ops.add_rms_norm(x, with_strides(residual, layout), *weights)
    swapped = ops.add_rms_norm(x.transpose(0, 1), residual.transpose(0, 1), *weights)
    for i in (0, 1):
        assert torch.equal(actual[i], expected[i])
        assert torch.equal(mixed[i], expected[i])
        assert torch.equal(swapped[i], expected[i].transpose(0, 1))


def test_every_element_is_written(isa: str) -> None:
    tensors = inputs(7, 41, torch.float32)
    outs = [torch.full((7, 41), float("nan")) for _ in range(2)]
    OUT_OP(*tensors, 1e-6, *outs)
    for out, expected in zip(outs, ops.add_rms_norm(*tensors), strict=True):
        assert torch.equal(out, expected)


def test_residual_may_be_updated_in_place(isa: str) -> None:
    x, residual, post_weight, pre_weight = inputs(7, 41, torch.bfloat16)
    r, normed = ops.add_rms_norm(x, residual, post_weight, pre_weight)
    out = torch.empty_like(x)
    OUT_OP(x, residual, post_weight, pre_weight, 1e-6, residual, out)
    assert torch.equal(residual, r)
    assert torch.equal(out, normed)


def test_independent_of_threads(isa: str) -> None:
    tensors = inputs(513, 333, torch.float32)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(torch.stack(ops.add_rms_norm(*tensors)))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(0, 9), hidden_size=st.integers(1, 70), dtype=st.sampled_from(DTYPES))
def test_any_shape(rows: int, hidden_size: int, dtype: torch.dtype) -> None:
    check(*inputs(rows, hidden_size, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    tensors = inputs(3, 16, dtype)
    opcheck(OP, (*tensors, 1e-6))
    opcheck(OUT_OP, (*tensors, 1e-6, torch.empty_like(tensors[0]), torch.empty_like(tensors[0])))


def test_compile_without_graph_breaks() -> None:
    x, *rest = inputs(5, 64, torch.float32)

    def both(x: Tensor) -> Tensor:
        r, normed = ops.add_rms_norm(x, *rest)
        return r * 2 + normed

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), both(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [5, 8, 41, 513, 2304, 4609])
@pytest.mark.parametrize("rows", [0, 1, 7, 9])
def test_gradients(isa: str, dtype: torch.dtype, hidden_size: int, rows: int) -> None:
    assert_gradients_accurate(
        ops.add_rms_norm, reference.add_rms_norm, *inputs(rows, hidden_size, dtype), roundings=2
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_many_rows(isa: str, dtype: torch.dtype) -> None:
    tensors = inputs(1500, 24, dtype)
    assert_gradients_accurate(ops.add_rms_norm, reference.add_rms_norm, *tensors)


def test_gradients_of_weights_of_another_dtype(isa: str) -> None:
    tensors = inputs(5, 64, torch.bfloat16, torch.float32)
    assert_gradients_accurate(ops.add_rms_norm, reference.add_rms_norm, *tensors)


def test_gradient_of_one_output(isa: str) -> None:
    tensors, grad = inputs(5, 64, torch.float32), torch.randn(5, 64)
    for i in (0, 1):
        grads = [grad, torch.zeros(5, 64)] if i == 0 else [torch.zeros(5, 64), grad]
        expected = gradients(ops.add_rms_norm, tensors, *grads)

        def one(*t: Tensor, i: int = i) -> Tensor:
            return ops.add_rms_norm(*t)[i]

        assert all(map(torch.equal, gradients(one, tensors, grad), expected))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_strided_tensors(isa: str, layout: str) -> None:
    tensors = [*inputs(15, 41, torch.float32), *torch.randn(2, 15, 41)]
    expected = gradients(ops.add_rms_norm, tensors[:4], *tensors[4:])
    strided = [with_strides(t, layout) for t in tensors]
    actual = gradients(ops.add_rms_norm, strided[:4], *strided[4:])
    assert all(map(torch.equal, actual, expected))


def test_every_element_of_the_gradients_is_written(isa: str) -> None:
    x, residual, post_weight, pre_weight = inputs(7, 41, torch.float32)
    r = ops.add_rms_norm(x, residual, post_weight, pre_weight)[0]
    grads = [torch.full_like(t, float("nan")) for t in (x, x, post_weight, pre_weight)]
    BACKWARD_OUT_OP(x, residual, x, r, post_weight, pre_weight, 1e-6, *grads)
    expected = gradients(ops.add_rms_norm, (x, residual, post_weight, pre_weight), x, residual)
    assert all(map(torch.equal, grads, expected))


def test_gradients_independent_of_threads(isa: str) -> None:
    tensors, grads = inputs(2100, 70, torch.float32), torch.randn(2, 2100, 70)
    assert_independent_of_threads(lambda: gradients(ops.add_rms_norm, tensors, *grads))


def test_gradcheck() -> None:
    tensors = [t.double().requires_grad_() for t in inputs(6, 11, torch.float32)]
    exact = reference.add_rms_norm(*tensors)
    for actual, wanted in zip(ops.add_rms_norm(*tensors), exact, strict=True):
        torch.testing.assert_close(actual, wanted)
    assert torch.autograd.gradcheck(ops.add_rms_norm, tensors)


def test_backward_opcheck() -> None:
    x, residual, post_weight, pre_weight = inputs(6, 16, torch.float32)
    leaves = [t.clone().requires_grad_() for t in (x, residual, post_weight, pre_weight)]
    opcheck(OP, (*leaves, 1e-6))
    arguments = (x, x, x, residual, post_weight, pre_weight, 1e-6)
    opcheck(BACKWARD_OP, arguments)
    grads = [torch.empty_like(t) for t in (x, x, post_weight, pre_weight)]
    opcheck(BACKWARD_OUT_OP, (*arguments, *grads))


def test_backward_under_transforms() -> None:
    tensors = inputs(5, 64, torch.float32)
    assert_same_gradients_compiled(ops.add_rms_norm, *tensors)
    assert_no_second_derivative(ops.add_rms_norm, *tensors)


def test_autocast_widens_to_the_residual(isa: str) -> None:
    # What a product under autocast gives, added to a float32 stream.
    x, residual, *weights = inputs(5, 64, torch.float32)
    expected = ops.add_rms_norm(x.bfloat16().float(), residual, *weights)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        actual = ops.add_rms_norm(x.bfloat16(), residual, *weights)
    assert all(map(torch.equal, actual, expected))
    with pytest.raises(ValueError, match="residual must have x's dtype BFloat16, got Float"):
        ops.add_rms_norm(x.bfloat16(), residual, *weights)


def test_errors() -> None:
    x, residual, post_weight, pre_weight = inputs(5, 64, torch.float32)
    with pytest.raises(TypeError, match=r"add_rms_norm: residual must be a torch\.Tensor, got int"):
        ops.add_rms_norm(x, 0, post_weight, pre_weight)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pre_weight must be float32, .*, got torch.int64"):
        ops.add_rms_norm(x, residual, post_weight, pre_weight.long())
    with pytest.raises(
        ValueError, match=r"add_rms_norm: residual must have x's shape \(5, 64\), got \(4, 64\)"
    ):
        ops.add_rms_norm(x, residual[1:], post_weight, pre_weight)
    with pytest.raises(ValueError, match="residual must have x's dtype Float, got Half"):
        ops.add_rms_norm(x, residual.half(), post_weight, pre_weight)
    for name, weights in (
        ("post_weight", (post_weight[1:], pre_weight)),
        ("pre_weight", (post_weight, pre_weight[1:])),
    ):
        with pytest.raises(
            ValueError, match=rf"{name} must have shape \(hidden_size,\) = \(64,\), got \(63,\)"
        ):
            ops.add_rms_norm(x, residual, *weights)
    with pytest.raises(
        ValueError, match="pre_weight must have post_weight's dtype Float, got Half"
    ):
        ops.add_rms_norm(x, residual, post_weight, pre_weight.half())
    with pytest.raises(ValueError, match="got a scalar"):
        ops.add_rms_norm(torch.tensor(1.0), torch.tensor(1.0), post_weight, pre_weight)
    with pytest.raises(ValueError, match="eps must be at least 0"):
        ops.add_rms_norm(x, residual, post_weight, pre_weight, eps=-1.0)
    with pytest.raises(ValueError, match="residual_out must have x's shape"):
        OUT_OP(x, residual, post_weight, pre_weight, 1e-6, torch.empty(5, 63), torch.empty(5, 64))
