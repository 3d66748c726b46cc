"""attention_varlen: attention of each of several sequences packed one behind another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common import (
    backward_op,
    check_integers,
    check_tensor,
    differentiable,
    narrow,
    needs_gradient,
    new_like,
)

_op = torch.ops.gemma2_ext.attention_varlen.default
_out_op = torch.ops.gemma2_ext.attention_varlen_out.default


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    causal: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of each of several sequences packed one behind another.

    Sequence b has rows [cu_seqlens_q[b], cu_seqlens_q[b + 1]) of q and the like of k and v; its
    last query stands at its last key, as in `attention`.

    Args:
        q: (total_q, num_heads, head_dim), float32, bfloat16 or float16, any strides; head_dim a
            multiple of 8 from 8 to 256. (float64, slow, for checks of gradients.)
        k: (total_k, num_kv_heads, head_dim), q's dtype, num_kv_heads a divisor of num_heads. Under
            autocast q, k and v in float32 are rounded to autocast's dtype.
        v: k's shape and dtype.
        cu_seqlens_q: (batch + 1,) int32 or int64, from 0, ascending, at most total_q.
        cu_seqlens_k: likewise for k and v, at most total_k.
        max_seqlen_q: at least the longest sequence of q.
        max_seqlen_k: likewise for k.
        scale, softcap, window, causal: as in `attention`.
        return_lse: whether to return the logarithm of the softmax's denominator too.

    Returns:
        A contiguous tensor of q's shape and dtype, 0 in rows that see no key or belong to no
        sequence; with return_lse also lse, (num_heads, total_q), float32, -inf in such rows.
        Both have gradients.

    Raises:
        TypeError: q, k or v is not a floating tensor of those dtypes, or cu_seqlens are no tensor.
        ValueError: shapes, dtypes or devices do not fit; scale or softcap is no positive number;
            window is below 1 or goes with causal=False; cu_seqlens are out of order or range; a
            sequence is longer than max_seqlen_q or max_seqlen_k. On a GPU, where looking at
            cu_seqlens would wait for it, they are clamped to the tensors instead, and rows past
            max_seqlen_q of their sequence are not computed.
        NotImplementedError: a second derivative is asked for.

    Source: FlashAttention-2 (arXiv 2307.08691) and its varlen interface.
    """
    check_tensor("attention_varlen", "q", q, float64=True)
    check_tensor("attention_varlen", "k", k, float64=True)
    check_tensor("attention_varlen", "v", v, float64=True)
    check_integers("attention_varlen", "cu_seqlens_q", cu_seqlens_q, required=True)
    check_integers("attention_varlen", "cu_seqlens_k", cu_seqlens_k, required=True)
    q, k, v = narrow(q, k, v)
    needs = needs_gradient(q, k, v)
    out, lse = _form(q, k, v)(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale=scale,
        softcap=softcap,
        window=window,
        causal=causal,
        return_lse=return_lse or needs,  # which the backward reads
    )
    return (out, lse) if return_lse else out


def _run(
    q: Tensor, *others: Tensor | int | None, return_lse: bool, **options: Any
) -> tuple[Tensor, Tensor | None]:
    out = new_like(q)
    lse = q.new_empty(_lse_shape(q), dtype=_lse_dtype(q)) if return_lse else None
    _out_op(q, *others, **options, out=out, lse=lse)
    return out, lse


def _lse_shape(q: Tensor) -> tuple[int, ...]:
    return (q.shape[1], q.shape[0]) if q.dim() == 3 else (0,)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@torch.library.register_fake("gemma2_ext::attention_varlen")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    causal: bool = True,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    lse_shape = _lse_shape(q) if return_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=_lse_dtype(q))


@torch.library.register_fake("gemma2_ext::attention_varlen_out")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    causal: bool,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    return None


def _allocate(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return new_like(q), new_like(k), new_like(v)


_backward_op = backward_op("attention_varlen", _allocate)


def _setup_context(
    ctx: Any,
    inputs: tuple[Any, ...],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, Tensor],
) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.longest = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens_q, cu_seqlens_k, *output)
    ctx.options = keyword_only_inputs


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, *ends, out, lse = ctx.saved_tensors
    options = ctx.options
    if not options["return_lse"]:
        # The op was called by itself, without what its backward reads.
        with torch.no_grad():
            lse = _op(q, k, v, *ends, *ctx.longest, **{**options, "return_lse": True})[1]
        grad_lse = torch.zeros_like(lse)
    grads = _backward_op(
        *(grad_out, grad_lse, q, k, v, out, lse, *ends, *ctx.longest),
        options["scale"],
        options["softcap"],
        options["window"],
        options["causal"],
    )
    return *grads, None, None, None, None


_form = differentiable("attention_varlen", _run, _setup_context, _backward)
