from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from attention_common import assert_lse_accurate, gradient_noise
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

OP = torch.ops.gemma2_ext.attention_varlen.default
OUT_OP = torch.ops.gemma2_ext.attention_varlen_out.default
BACKWARD_OP = torch.ops.gemma2_ext.attention_varlen_backward.default
BACKWARD_OUT_OP = torch.ops.gemma2_ext.attention_varlen_backward_out.default
NAN = float("nan")


def ends(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=dtype)


def packed(
    q_lengths: list[int],
    k_lengths: list[int],
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, ...]:
    """The positional arguments for sequences of these lengths."""
    q = torch.randn(sum(q_lengths), heads[0], head_dim).to(dtype)
    k = torch.randn(sum(k_lengths), heads[1], head_dim).to(dtype)
    v = torch.randn(sum(k_lengths), heads[1], head_dim).to(dtype)
    longest = max([0, *q_lengths]), max([0, *k_lengths])
    return q, k, v, ends(q_lengths), ends(k_lengths), *longest


def attend(*args: Any, **options: Any) -> Tensor:
    out = ops.attention_varlen(*args, **options)
    assert isinstance(out, Tensor)
    return out


def check(args: tuple[Any, ...], **options: Any) -> None:
    def truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention_varlen(q, k, v, *args[3:], **options)

    out, lse = ops.attention_varlen(*args, return_lse=True, **options)
    assert_accurate(out, truth, *args[:3], roundings=2)
    assert torch.equal(out, attend(*args, **options))
    q, k, v, q_ends, k_ends = args[:5]
    assert lse.shape == (q.shape[1], q.shape[0])
    for b in range(len(q_ends) - 1):
        rows, keys = slice(q_ends[b], q_ends[b + 1]), slice(k_ends[b], k_ends[b + 1])
        assert_lse_accurate(
            lse[None, :, rows], q[None, rows], k[None, keys], v[None, keys], **options
        )


LENGTHS = [
    ([1], [1]),
    ([5, 1, 130], [5, 1, 130]),
    ([1, 1, 1], [700, 3, 1]),
    ([3, 0, 40, 200], [90, 10, 40, 300]),
    ([10, 20], [5, 0]),  # more queries than keys: the first see none
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("head_dim", [8, 40, 256])
def test_value(isa: str, dtype: torch.dtype, lengths: Any, head_dim: int) -> None:
    check(packed(*lengths, head_dim=head_dim, dtype=dtype), scale=head_dim**-0.5, softcap=50.0)


@pytest.mark.parametrize("heads", [(1, 1), (8, 1), (6, 2), (4, 4)])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_groups_and_window(isa: str, heads: tuple[int, int], lengths: Any) -> None:
    args = packed(*lengths, heads, 16)
    check(args, scale=0.25, window=17)
    check(args, scale=0.25, softcap=3.0, causal=False)


def test_equals_attention_of_each_sequence(isa: str) -> None:
    args = packed([70, 30], [70, 90])
    out = attend(*args, scale=0.1)
    second = ops.attention(args[0][None, 70:], args[1][None, 70:], args[2][None, 70:], scale=0.1)
    assert isinstance(second, Tensor)
    torch.testing.assert_close(out[None, 70:], second)


def test_nan_of_one_sequence_stays_in_it(isa: str) -> None:
    q, k, v, *rest = packed([40, 3, 40], [40, 30, 40])
    expected = attend(q, k, v, *rest, scale=0.1)
    for t in (k, v):
        t[40:70] = NAN
    actual = attend(q, k, v, *rest, scale=0.1)
    assert torch.equal(actual[:40], expected[:40])
    assert actual[40:43].isnan().all()
    assert torch.equal(actual[43:], expected[43:])


def test_rows_of_no_sequence_are_zero(isa: str) -> None:
    q, k, v, q_ends, k_ends, *longest = packed([4, 5], [9, 5])
    out = torch.full((12, 4, 64), NAN)
    lse = torch.full((4, 12), NAN)
    q = torch.cat((q, torch.full((3, 4, 64), NAN)))
    options = {"scale": 0.1, "softcap": None, "window": None, "causal": True}
    OUT_OP(q, k, v, q_ends, k_ends, *longest, **options, out=out, lse=lse)
    assert torch.equal(out[:9], attend(q[:9], k, v, q_ends, k_ends, *longest, scale=0.1))
    assert torch.equal(out[9:], torch.zeros(3, 4, 64))
    assert torch.isfinite(lse[:, :9]).all()
    assert (lse[:, 9:] == -math.inf).all()


def test_empty(isa: str) -> None:
    for lengths in ([], [0], [0, 0]):
        assert attend(*packed(lengths, lengths), scale=0.1).shape == (0, 4, 64)
    out, lse = ops.attention_varlen(*packed([3], [0]), scale=0.1, return_lse=True)
    assert torch.equal(out, torch.zeros(3, 4, 64))
    assert (lse == -math.inf).all()


def test_int64_ends_and_loose_bounds(isa: str) -> None:
    q, k, v, q_ends, k_ends, *_ = packed([50, 3], [50, 9])
    expected = attend(q, k, v, q_ends, k_ends, 50, 50, scale=0.1)
    assert torch.equal(
        attend(q, k, v, q_ends.long(), k_ends.long(), 10**6, 10**6, scale=0.1), expected
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(isa: str, layout: str) -> None:
    q, k, v, *rest = packed([40, 3], [40, 9], dtype=torch.bfloat16)
    expected = attend(q, k, v, *rest, scale=0.1)
    strided = [with_strides(t, layout) for t in (q, k, v)]
    assert torch.equal(attend(*strided, *rest, scale=0.1), expected)


def test_independent_of_threads(isa: str) -> None:
    args = packed([300, 1, 90], [300, 900, 90])
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(attend(*args, scale=0.1, softcap=50.0))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    args = packed([4, 7], [9, 7], head_dim=16, dtype=dtype)
    opcheck(OP, args, {"scale": 0.1})
    opcheck(OP, args, {"scale": 0.1, "softcap": 5.0, "window": 3, "return_lse": True})
    options = {"scale": 0.1, "softcap": 5.0, "window": None, "causal": False}
    out, lse = torch.empty_like(args[0]), torch.empty(4, 11)
    opcheck(OUT_OP, args, {**options, "out": out, "lse": lse})


def test_compile_without_graph_breaks() -> None:
    q, *rest = packed([20, 9], [20, 30])

    def f(q: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = ops.attention_varlen(q, *rest, scale=0.1, return_lse=True)
        return out * 2, lse + attend(q, *rest, scale=0.1, softcap=5.0, window=4).sum()

    for actual, expected in zip(torch.compile(f, fullgraph=True)(q), f(q), strict=True):
        torch.testing.assert_close(actual, expected)


def of_qkv(args: tuple[Any, ...], attention: Any, **options: Any) -> Callable[..., Any]:
    """`attention` of q, k and v alone."""
    return functools.update_wrapper(
        lambda *t: attention(*t, *args[3:], scale=0.25, **options), attention
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("options", [{"softcap": 3.0}, {"window": 17}, {"causal": False}])
def test_gradients(isa: str, dtype: torch.dtype, lengths: Any, options: dict[str, Any]) -> None:
    args = packed(*lengths, head_dim=40, dtype=dtype)
    ours = of_qkv(args, ops.attention_varlen, **options)
    theirs = of_qkv(args, reference.attention_varlen, **options)
    noise = gradient_noise(*args[:3], 0.25)
    assert_gradients_accurate(ours, theirs, *args[:3], roundings=2, noise=noise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(3, 3), (4, 2)])
@pytest.mark.parametrize(
    "lengths",
    [(1, 1), (1, 40), (12, 13), (31, 33), (32, 32), (30, 90), (48, 17), (96, 64), (98, 97)],
)
def test_gradients_equal_those_of_each_sequence(
    isa: str, dtype: torch.dtype, heads: tuple[int, int], lengths: tuple[int, int]
) -> None:
    """Of the same results: a forward takes few rows another way where no longer ones are beside."""
    rows, keys = lengths
    args = packed([130, rows], [140, keys], heads, dtype=dtype)
    out, lse = ops.attention_varlen(*args, scale=0.1, return_lse=True)
    q, k, v, *rest = args
    grad_out, grad_lse, options = torch.randn(q.shape).to(dtype), torch.randn(lse.shape), (0.1, 5.0)
    beside = BACKWARD_OP(grad_out, grad_lse, q, k, v, out, lse, *rest, *options, None, True)
    of_q, of_k = slice(130, None), slice(140, None)
    alone = torch.ops.gemma2_ext.attention_backward(
        *(grad_out[None, of_q], grad_lse[None, :, of_q].contiguous()),
        *(q[None, of_q], k[None, of_k], v[None, of_k]),
        *(out[None, of_q], lse[None, :, of_q].contiguous()),
        *(None, None, *options, None, True),
    )
    for grad, expected, part in zip(beside, alone, (of_q, of_k, of_k), strict=True):
        assert torch.equal(grad[None, part], expected)


def test_gradients_of_rows_of_no_sequence_are_zero(isa: str) -> None:
    args = packed([100, 5], [90, 50])
    q, k, v, *rest = args
    longer = [torch.cat((t, torch.full((3, *t.shape[1:]), NAN))) for t in (q, k, v)]
    f = functools.partial(ops.attention_varlen, scale=0.1)
    expected = gradients(lambda *t: f(*t, *rest), (q, k, v), q)
    actual = gradients(lambda *t: f(*t, *rest), longer, longer[0])
    for grad, wanted in zip(actual, expected, strict=True):
        assert torch.equal(grad[:-3], wanted)
        assert not grad[-3:].any()


def test_gradients_independent_of_threads(isa: str) -> None:
    args = packed([300, 1, 90], [300, 200, 90], (4, 1))
    f = of_qkv(args, ops.attention_varlen, softcap=50.0)
    assert_independent_of_threads(lambda: gradients(f, args[:3], args[0]))


@pytest.mark.parametrize("options", [{"softcap": 2.0, "window": 3}, {"causal": False}])
def test_gradcheck(options: dict[str, Any]) -> None:
    args = packed([3, 0, 2], [4, 2, 2], (4, 2), 8)
    tensors = [t.double().requires_grad_() for t in args[:3]]
    f = of_qkv(args, ops.attention_varlen, **options)
    torch.testing.assert_close(
        f(*tensors), of_qkv(args, reference.attention_varlen, **options)(*tensors)
    )
    assert torch.autograd.gradcheck(f, tensors, fast_mode=True)


def test_backward_opcheck() -> None:
    args = packed([4, 7], [9, 7], head_dim=16)
    q, k, v, *rest = args
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    opcheck(OP, (*leaves, *rest), {"scale": 0.1, "return_lse": True})
    out, lse = ops.attention_varlen(*args, scale=0.1, return_lse=True)
    arguments = (q, lse, q, k, v, out, lse, *rest, 0.1, 5.0, 3, True)
    opcheck(BACKWARD_OP, arguments)
    opcheck(BACKWARD_OUT_OP, (*arguments, q.clone(), k.clone(), v.clone()))


def test_backward_under_transforms() -> None:
    args = packed([20, 9], [20, 30])
    f = of_qkv(args, ops.attention_varlen, softcap=5.0, window=9)
    assert_same_gradients_compiled(f, *args[:3])
    assert_no_second_derivative(f, *args[:3])
    expected = gradients(f, args[:3], args[0])
    without_lse = gradients(
        lambda *t: OP(*t, *args[3:], scale=0.25, softcap=5.0, window=9)[0], args[:3], args[0]
    )
    assert all(map(torch.equal, without_lse, expected))


def test_errors() -> None:
    q, k, v, q_ends, k_ends, max_q, max_k = packed([4, 5], [9, 5])

    def error(
        match: str,
        *,
        kind: type[Exception] = ValueError,
        q: Any = q,
        k: Any = k,
        v: Any = v,
        q_ends: Any = q_ends,
        k_ends: Any = k_ends,
        max_q: int = max_q,
        max_k: int = max_k,
        **options: Any,
    ) -> None:
        with pytest.raises(kind, match="gemma2_ext::attention_varlen: " + match):
            attend(q, k, v, q_ends, k_ends, max_q, max_k, **{"scale": 0.1, **options})

    error(r"k must be a torch\.Tensor, got NoneType", k=None, kind=TypeError)
    error(r"cu_seqlens_q must be a torch\.Tensor, got NoneType", q_ends=None, kind=TypeError)
    error(
        "cu_seqlens_k must be int32 or int64, got torch.float32",
        k_ends=k_ends.float(),
        kind=TypeError,
    )
    error(r"q must have shape \(total_q, num_heads, head_dim\), got \(1, 9, 4, 64\)", q=q[None])
    k_shape = r"k must have shape \(total_k, num_kv_heads, head_dim\) = \(\*, \*, 64\), got "
    error(k_shape + r"\(14, 2, 32\)", k=k[..., :32])
    error(r"v must have k's shape \(14, 2, 64\), got \(13, 2, 64\)", v=v[1:])
    error("k must have q's dtype", k=k.half())
    error("num_heads must be a positive multiple of num_kv_heads = 2, got 3", q=q[:, :3])
    error(r"cu_seqlens_q must have shape \(batch \+ 1,\), got \(0,\)", q_ends=q_ends[:0])
    error(r"cu_seqlens_q must have shape \(batch \+ 1,\), got \(1, 3\)", q_ends=q_ends[None])
    error(r"cu_seqlens_k must have shape \(batch \+ 1,\) = \(3,\), got \(2,\)", k_ends=k_ends[:2])
    error(r"cu_seqlens_q\[0\] must be 0, got 4", q_ends=q_ends[1:], k_ends=k_ends[1:])
    order = r"cu_seqlens_k\[2\] must be from cu_seqlens_k\[1\] = 9 to total_k = 14, got "
    error(order + "8", k_ends=torch.tensor([0, 9, 8]))
    error(order + "15", k_ends=torch.tensor([0, 9, 15]))
    error("max_seqlen_q must be at least the longest sequence, 5 by cu_seqlens_q, got 4", max_q=4)
    error("max_seqlen_k must be at least the longest sequence, 9 by cu_seqlens_k, got 8", max_k=8)
    error("scale must be finite, got nan", scale=NAN)
    error("softcap must be positive and finite, got 0", softcap=0.0)
    error("window must be at least 1, got 0", window=0)
    error("window needs causal=True, got causal=False", window=3, causal=False)
    options = {"scale": 0.1, "softcap": None, "window": None, "causal": True}
    with pytest.raises(ValueError, match="attention_varlen: out must have q's shape"):
        OUT_OP(q, k, v, q_ends, k_ends, 5, 9, **options, out=torch.empty(9, 4, 32), lse=None)
    with pytest.raises(ValueError, match=r"lse must be contiguous float32 of shape \(4, 9\), got"):
        OUT_OP(
            *(q, k, v, q_ends, k_ends, 5, 9),
            **options,
            out=torch.empty_like(q),
            lse=torch.empty(9, 4),
        )
