from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from common import DTYPES, LAYOUTS, assert_accurate, assert_same, with_strides
from gemma2_ext import ops, reference
from products import assert_product

OP = torch.ops.gemma2_ext.linear.default
OUT_OP = torch.ops.gemma2_ext.linear_out.default
# Both forms of the kernel and their edges: groups of rows and their remainders up to 16, panels and
# narrow panels of every width above.
ROWS = [0, 1, 2, 3, 5, 7, 8, 9, 16, 17, 25, 33, 48, 50]


def operands(
    rows: int, in_features: int, out_features: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, in_features).to(dtype)
    return x, (torch.randn(out_features, in_features) / max(in_features, 1) ** 0.5).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_features", [1, 7, 111, 200])
@pytest.mark.parametrize("in_features", [1, 41, 64, 111])
def test_value(isa: str, dtype: torch.dtype, in_features: int, out_features: int) -> None:
    for rows in ROWS:
        x, weight = operands(rows, in_features, out_features, dtype)
        actual = ops.linear(x, weight)
        assert actual.dtype == dtype
        assert_product(actual, x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features, out_features", [(2304, 4096), (9216, 256), (1025, 97)])
def test_production_shapes(
    isa: str, dtype: torch.dtype, in_features: int, out_features: int
) -> None:
    for rows in (1, 8, 40):
        x, weight = operands(rows, in_features, out_features, dtype)
        assert_accurate(ops.linear(x, weight), reference.linear, x, weight)


def test_more_rows_than_one_block(isa: str) -> None:
    x, weight = operands(2060, 70, 130)
    assert_accurate(ops.linear(x, weight), reference.linear, x, weight)
    x, weight = operands(1030, 2070, 40)
    assert_accurate(ops.linear(x, weight), reference.linear, x, weight)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 70),
    in_features=st.integers(0, 300),
    out_features=st.integers(0, 220),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(rows: int, in_features: int, out_features: int, dtype: torch.dtype) -> None:
    x, weight = operands(rows, in_features, out_features, dtype)
    actual = ops.linear(x, weight)
    assert actual.dtype == dtype
    assert_product(actual, x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features", [41, 64])
def test_a_nan_stays_in_its_row(isa: str, dtype: torch.dtype, in_features: int) -> None:
    x, weight = operands(42, in_features, 30, dtype)
    expected = ops.linear(x, weight)
    x[5] = float("nan")
    actual = ops.linear(x, weight)
    assert actual[5].isnan().all()
    assert_same(
        actual[[i for i in range(42) if i != 5]], expected[[i for i in range(42) if i != 5]]
    )


@pytest.mark.parametrize("rows", [3, 21])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(isa: str, layout: str, dtype: torch.dtype, rows: int) -> None:
    x, weight = operands(2 * rows, 41, 30, dtype)
    x = x.view(2, rows, 41)
    expected = ops.linear(x, weight)
    assert_same(ops.linear(with_strides(x, layout), with_strides(weight, layout)), expected)
    assert_same(ops.linear(x.transpose(0, 1), weight), expected.transpose(0, 1))
    assert_same(ops.linear(x, weight.t().contiguous().t()), expected)
    assert_same(ops.linear(x[:, :1].expand(2, rows, 41), weight)[:, -1], expected[:, 0])


def test_rows_of_a_fused_weight(isa: str) -> None:
    x, weight = operands(5, 64, 90)
    assert torch.equal(ops.linear(x, weight[24:50]), ops.linear(x, weight[24:50].clone()))
    assert torch.equal(ops.linear(x, weight[::2]), ops.linear(x, weight[::2].clone()))


def test_shapes(isa: str) -> None:
    x, weight = operands(1, 64, 9)
    assert ops.linear(x[0], weight).shape == (9,)
    assert ops.linear(x.view(1, 1, 1, 64), weight).shape == (1, 1, 1, 9)
    assert ops.linear(torch.empty(0, 3, 64), weight).shape == (0, 3, 9)
    assert ops.linear(x, weight[:0]).shape == (1, 0)
    assert torch.equal(ops.linear(torch.empty(2, 0), torch.empty(3, 0)), torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [7, 30])
def test_every_element_is_written(isa: str, dtype: torch.dtype, rows: int) -> None:
    x, weight = operands(rows, 41, 111, dtype)
    out = torch.full((rows, 111), float("nan"), dtype=dtype)
    OUT_OP(x, weight, out)
    assert torch.equal(out, ops.linear(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_stays_in_its_row_and_column(isa: str, dtype: torch.dtype) -> None:
    for rows in (5, 20):
        x, weight = operands(rows, 41, 50, dtype)
        x[3, 40] = float("nan")
        weight[7, 40] = float("inf")
        out = ops.linear(x, weight)
        assert out[3].isnan().all()
        assert not out[:, 7].isfinite().any()
        out[3], out[:, 7] = 0, 0
        assert out.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 9, 30, 600])
@pytest.mark.parametrize("out_features", [50, 256, 1000])  # units are as wide as fits the threads
def test_independent_of_threads(isa: str, dtype: torch.dtype, rows: int, out_features: int) -> None:
    x, weight = operands(rows, 333, out_features, dtype)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.linear(x, weight))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_independent_of_the_rows_beside(isa: str, dtype: torch.dtype) -> None:
    x, weight = operands(700, 2500, 50, dtype)
    alone = torch.cat([ops.linear(x[i : i + 1], weight) for i in range(16)])
    for rows in range(2, 17) if not (isa == "cuda" and dtype == torch.float32) else ():
        assert torch.equal(ops.linear(x[:rows], weight), alone[:rows])
    many = ops.linear(x, weight)
    if isa != "cuda":
        for rows in (17, 24, 25, 33, 41, 64, 513):
            assert torch.equal(ops.linear(x[:rows], weight), many[:rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features", [77, 600])
def test_many_more_rows_than_outputs(isa: str, dtype: torch.dtype, in_features: int) -> None:
    """To the bit what fewer rows at a time give, on the CPU."""
    x, weight = operands(700, in_features + 3, 41, dtype)
    for part, rows in ((weight[:, :in_features], x[:, :in_features]), (weight[5:15], x[::2])):
        actual = ops.linear(rows, part)
        assert_product(actual, rows, part)
        if isa != "cuda":
            few = 3 * len(part)
            assert torch.equal(actual, torch.cat([ops.linear(r, part) for r in rows.split(few)]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_output(isa: str, dtype: torch.dtype) -> None:
    """As of a value head: each row as alone, however many there are."""
    x, weight = operands(300, 333, 1, dtype)
    for part in (x, x[::3], x[:, :64], x[:20]):
        actual = ops.linear(part, weight[:, : part.shape[1]])
        assert actual.shape == (len(part), 1)
        assert_product(actual, part, weight[:, : part.shape[1]])
        if isa != "cuda":
            alone = [ops.linear(row, weight[:, : part.shape[1]]) for row in part[:40]]
            assert_same(actual[:40], torch.stack(alone))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_many_rows_where_they_lie(isa: str, dtype: torch.dtype) -> None:
    """At every alignment and distance, and up to each remainder of the tiles."""
    x = torch.randn(33, 1028).to(dtype)
    stored = torch.randn(70, 2048).to(dtype)  # rows 4 or 8 KiB apart meet in one set of a cache
    for kept in (1040, 2048):
        for out_features in (12, 23, 24, 36, 37, 70):
            for begin in (0, 1, 2, 7):
                for distance in (1, 2):
                    for in_features in (1027, 1028):
                        rows = stored[:, :kept].contiguous()[:out_features:distance]
                        weight = rows[:, begin : begin + in_features]
                        x_part = x[:, :in_features]
                        right = ops.linear(x_part, weight.contiguous())
                        assert_same(ops.linear(x_part, weight), right)


@pytest.mark.parametrize("in_features", [2304, 4630, 9216])
def test_large_weights(isa: str, in_features: int) -> None:
    """Weights that are expected from memory; the last columns are not a whole unit of work."""
    x, weight = operands(16, in_features, 1021, torch.bfloat16)
    alone = torch.cat([ops.linear(x[i : i + 1], weight) for i in range(16)])
    assert_product(alone, x, weight)
    for rows in range(2, 17):
        assert torch.equal(ops.linear(x[:rows], weight), alone[:rows]), rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight = operands(6, 16, 10, dtype)
    opcheck(OP, (x.view(2, 3, 16), weight))
    opcheck(OP, (x.clone().requires_grad_(), weight.clone().requires_grad_()))
    opcheck(OUT_OP, (x, weight, x.new_empty(6, 10)))


def test_compile_without_graph_breaks() -> None:
    x, weight = operands(5, 64, 33)
    compiled = torch.compile(lambda x: ops.linear(x, weight) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(x), ops.linear(x, weight) * 2)


def gradients(
    function: Callable[..., Tensor], x: Tensor, weight: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    return torch.autograd.grad(function(x, weight), (x, weight), grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features, out_features", [(1, 7), (41, 111), (300, 130), (64, 1)])
def test_backward(isa: str, dtype: torch.dtype, in_features: int, out_features: int) -> None:
    for rows in (1, 7, 33, 100):
        x, weight = operands(rows, in_features, out_features, dtype)
        grad = torch.randn(rows, out_features).to(dtype)
        grad_x, grad_weight = gradients(ops.linear, x, weight, grad)
        assert grad_x.dtype == grad_weight.dtype == dtype
        assert_product(grad_x, grad, weight.T)
        assert_product(grad_weight, grad.T, x.T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_in_blocks(isa: str, dtype: torch.dtype) -> None:
    # Beyond what is packed at a time: 1280 columns of a result, 4096 elements of depth.
    x, weight = operands(9, 1290, 4200, dtype)
    grad = torch.randn(9, 4200).to(dtype)
    grad_x, grad_weight = gradients(ops.linear, x, weight, grad)
    assert_product(grad_x, grad, weight.T)
    assert_product(grad_weight, grad.T, x.T)
    x, weight = operands(4300, 33, 5, dtype)
    grad = torch.randn(4300, 5).to(dtype)
    assert_product(gradients(ops.linear, x, weight, grad)[1], grad.T, x.T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_independent_of_threads(isa: str, dtype: torch.dtype) -> None:
    if isa == "avx512_bf16" and dtype == torch.bfloat16:
        pytest.skip("torch's GEMM, which does not promise it")
    x, weight = operands(300, 333, 500, dtype)
    grad = torch.randn(300, 500).to(dtype)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(gradients(ops.linear, x, weight, grad))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
        assert torch.equal(results[0][1], other[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_strides(isa: str, layout: str) -> None:
    x, weight = operands(6, 41, 30)
    x, grad = x.view(2, 3, 41), torch.randn(2, 3, 30)
    expected = gradients(ops.linear, x, weight, grad)
    actual = gradients(
        ops.linear,
        with_strides(x, layout),
        with_strides(weight, layout),
        with_strides(grad, layout),
    )
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other)
    ones = gradients(ops.linear, x, weight, torch.ones(()).expand(2, 3, 30))
    assert torch.equal(ones[0], gradients(ops.linear, x, weight, torch.ones(2, 3, 30))[0])


def test_backward_of_one_or_none(isa: str) -> None:
    x, weight = operands(5, 64, 33)
    grad_x, grad_weight = gradients(ops.linear, x, weight, torch.ones(5, 33))
    x1, weight1 = x.clone().requires_grad_(), weight.clone().requires_grad_()
    ops.linear(x1, weight).sum().backward()
    ops.linear(x, weight1).sum().backward()
    assert torch.equal(x1.grad, grad_x)
    assert torch.equal(weight1.grad, grad_weight)
    for shape, wide in (((0, 64), (33, 64)), ((5, 0), (33, 0)), ((5, 64), (0, 64))):
        grads = gradients(
            ops.linear, torch.ones(shape), torch.ones(wide), torch.ones(shape[0], wide[0])
        )
        assert grads[0].shape == shape
        assert grads[1].shape == wide
        assert not any(g.any() for g in grads)


def test_gradcheck() -> None:
    x, weight = (t.double().requires_grad_() for t in operands(6, 5, 4))
    assert torch.autograd.gradcheck(ops.linear, (x.view(2, 3, 5), weight))


def test_backward_through_compile_autocast_and_checkpoint() -> None:
    x, weight = operands(20, 64, 33)
    grad = torch.randn(20, 33)
    expected = gradients(ops.linear, x, weight, grad)
    checkpoint = torch.utils.checkpoint.checkpoint
    for function in (
        torch.compile(ops.linear, fullgraph=True),
        lambda x, w: checkpoint(ops.linear, x, w, use_reentrant=False),
    ):
        for one, other in zip(gradients(function, x, weight, grad), expected, strict=True):
            assert torch.equal(one, other)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(x, weight).dtype == torch.bfloat16
        assert ops.linear(x.double(), weight.double()).dtype == torch.float64
        narrow = gradients(ops.linear, x, weight, grad.bfloat16())
    expected = gradients(ops.linear, x.bfloat16(), weight.bfloat16(), grad.bfloat16())
    for one, other in zip(narrow, expected, strict=True):
        assert torch.equal(one, other.float())


def test_no_second_derivative() -> None:
    x, weight = operands(5, 64, 33)
    out = ops.linear(x.requires_grad_(), weight)
    with pytest.raises(NotImplementedError, match="linear has no second derivative"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_backward_errors() -> None:
    x, weight = operands(5, 64, 33)
    op = torch.ops.gemma2_ext.linear_backward_out.default
    with pytest.raises(ValueError, match=r"grad_out must have shape .* got \(5, 32\)"):
        op(torch.ones(5, 32), x, weight, None, None)
    with pytest.raises(ValueError, match="grad_out must have x's dtype Float, got Half"):
        op(torch.ones(5, 33).half(), x, weight, None, None)
    with pytest.raises(ValueError, match="must fit, got"):
        op(torch.ones(5, 33), x, weight[:, 1:], None, None)
    with pytest.raises(ValueError, match="grad_x must have x's shape"):
        op(torch.ones(5, 33), x, weight, x[:, 1:], None)
    with pytest.raises(ValueError, match="grad_weight must be contiguous"):
        op(torch.ones(5, 33), x, weight, None, torch.ones(64, 33).t())


def test_errors() -> None:
    x, weight = operands(5, 64, 33)
    with pytest.raises(TypeError, match=r"linear: x must be a torch\.Tensor, got list"):
        ops.linear([1.0], weight)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="weight must be float32, bfloat16 or float16, got torch.i"):
        ops.linear(x, weight.long())
    with pytest.raises(
        ValueError,
        match=r"linear: weight must have shape \(out_features, in_features\) = \(\*, 64\), "
        r"got \(33, 63\)",
    ):
        ops.linear(x, weight[:, 1:])
    with pytest.raises(ValueError, match=r"weight must have shape .*, got \(64,\)"):
        ops.linear(x, weight[0])
    with pytest.raises(ValueError, match="x must have shape .* got a scalar"):
        ops.linear(torch.tensor(1.0), weight)
    with pytest.raises(ValueError, match="weight must have x's dtype Float, got BFloat16"):
        ops.linear(x, weight.bfloat16())
    with pytest.raises(ValueError, match=r"out must have shape .*\(5, 64\), got \(5, 32\)"):
        OUT_OP(x, weight, torch.empty(5, 32))
    with pytest.raises(ValueError, match="out must be Float, got Half"):
        OUT_OP(x, weight, torch.empty(5, 33).half())
    with pytest.raises(ValueError, match="out must be contiguous"):
        OUT_OP(x, weight, torch.empty(33, 5).t())
