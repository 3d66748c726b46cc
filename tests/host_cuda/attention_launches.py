"""Launches of the attention kernels for tests: AttentionParams from tensors and options."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from host_cuda import emulator
from host_cuda.emulator import assert_guards, guarded, launch


def forward_fields(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    causal: bool = True,
    **fields: Any,
) -> dict[str, Any]:
    """The fields of AttentionParams; `fields` go over what the shapes say."""
    batch, seqlen_q, num_heads, head_dim = q.shape
    return {
        "q": q,
        "k": k,
        "v": v,
        "out": out.expand(batch, *out.shape[1:]),
        "lse": lse,
        "lse_batch_stride": lse.stride(0),
        "lse_head_stride": lse.stride(1),
        "batch": batch,
        "seqlen_q": seqlen_q,
        "seqlen_k": k.shape[1],
        "num_heads": num_heads,
        "num_kv_heads": k.shape[2],
        "head_dim": head_dim,
        "scale": scale,
        "softcap": softcap or 0.0,
        "window": window or 0,
        "causal": causal,
        "dtype": q.dtype,
        **fields,
    }


def partial_size(
    fields: dict[str, Any], multiprocessors: int, shared_bytes: int, compute_capability: int
) -> int:
    """attention_partial_size on such a device."""
    struct = emulator.structs()["AttentionParams"]
    kinds = dict(struct._fields_)
    params = struct(**{n: emulator._convert(kinds[n], value) for n, value in fields.items()})
    library = emulator.library()
    device = (shared_bytes, multiprocessors, compute_capability, 2**31 - 1)
    library.emulation_configure(0, *device, b"")
    library.emulated_attention_partial_size.restype = ctypes.c_int64
    return int(library.emulated_attention_partial_size(ctypes.byref(params)))


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    multiprocessors: int = 4,
    shared_bytes: int = emulator.LEAST_SHARED_BYTES,
    compute_capability: int = 90,
    schedule: int = 0,
    left_out: str = "",
    into: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the kernels, on an emulated device."""
    out = guarded(options.pop("out_shape", q.shape), q.dtype) if into is None else into
    lse = guarded((out.shape[0], q.shape[2], out.shape[1]), torch.float32)
    fields = forward_fields(q, k, v, out, lse, **options)
    size = partial_size(fields, multiprocessors, shared_bytes, compute_capability)
    partial = guarded((size,), torch.float32)
    launch(
        "attention",
        **fields,
        partial=partial,
        multiprocessors=multiprocessors,
        shared_bytes=shared_bytes,
        compute_capability=compute_capability,
        schedule=schedule,
        left_out=left_out,
    )
    for t in (lse, partial) if into is not None else (out, lse, partial):
        assert_guards(t)
    return out, lse


def run_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    *,
    shared_bytes: int = emulator.LEAST_SHARED_BYTES,
    schedule: int = 0,
    left_out: str = "",
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_q, grad_k, grad_v) of the kernels, on an emulated device."""
    grads = [guarded(t.shape, t.dtype) for t in (q, k, v)]
    grads[1].zero_(), grads[2].zero_()
    terms = guarded(lse.shape, torch.float32)
    batch = q.shape[0]
    launch(
        "attention_backward",
        forward=forward_fields(q, k, v, out, lse, **options),
        grad_out=grad_out.expand(batch, *grad_out.shape[1:]),
        grad_lse=grad_lse,
        grad_q=grads[0],
        grad_k=grads[1],
        grad_v=grads[2],
        row_terms=terms,
        shared_bytes=shared_bytes,
        schedule=schedule,
        left_out=left_out,
    )
    for t in (*grads, terms):
        assert_guards(t)
    return grads[0], grads[1], grads[2]
