"""Every op and the whole model on a GPU, against what else one would use, in one process.

    benchmarks/gpu.sh                      # builds, tests and then runs this
    python benchmarks/gpu.py --json out.json --only norms,linear --budget 120

Each line is checked against the reference before it is timed: the median of 20 runs after a
warm-up, between CUDA events, over copies of the inputs that together exceed the second cache. What
takes under a millisecond is timed as a CUDA graph of 20 calls, so that the host's part does not
show; "eager us" is then the time of a call from Python.
A peer that is missing or fails is named in the JSON and left out of the table. The limits (copy
bandwidth, cuBLAS) are measured first, in the same process. On a CPU (--device cpu --quick) it runs
small shapes, as a test of itself; those figures mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import itertools
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gemma2_ext
from gemma2_ext import _C, Gemma2, Gemma2Config, ops, reference

ROTATED_BYTES = 512 << 20  # more than the second cache of any GPU
SOFTCAP, WINDOW, HEAD_DIM, HEADS, KV_HEADS = 50.0, 4096, 256, 8, 4


class Bench:
    """Times calls, keeps the rows, stops when the time is over."""

    def __init__(self, device: str, quick: bool, budget: float, peers: bool = True) -> None:
        self.device, self.quick, self.peers = torch.device(device), quick, peers
        self.end = time.monotonic() + budget
        self.rows: list[dict[str, Any]] = []
        self.missing: dict[str, str] = {}
        self.limits: dict[str, float] = {}

    def seconds(self, call: Callable[[], Any], runs: int = 20) -> float:
        """Median time of a call, on the device's own clock where it has one."""
        if self.device.type == "cpu":
            times = []
            for _ in range(3):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            return statistics.median(times)
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        pairs = []
        for _ in range(runs):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return statistics.median(b.elapsed_time(e) for b, e in pairs) / 1e3

    def graph_seconds(
        self, call: Callable[[], Any], calls: int = 20, early: bool = False
    ) -> float | None:
        """Time of a call in a graph of several, or None where it cannot be captured.

        early: launches as in a captured decoding step.
        """
        graph = torch.cuda.CUDAGraph()
        if early:
            _C.set_early_launches(True)
        try:
            with torch.cuda.graph(graph):
                for _ in range(calls):
                    call()
        except Exception:
            torch.cuda.synchronize()
            return None
        finally:
            if early:
                _C.set_early_launches(False)
        return self.seconds(graph.replay, 10) / calls

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Random bfloat16 on the device."""
        return (torch.randn(shape, device=self.device) * scale).bfloat16()

    def rotated(self, *first: Tensor) -> list[tuple[Tensor, ...]]:
        """Copies of the inputs that together exceed the caches."""
        size = sum(t.nbytes for t in first)
        copies = 1 if self.quick else min(64, max(2, ROTATED_BYTES // max(size, 1)))
        return [first, *(tuple(t.clone() for t in first) for _ in range(copies - 1))]

    def compare(
        self,
        group: str,
        shape: str,
        inputs: list[tuple[Tensor, ...]],
        calls: dict[str, Callable[..., Any]],
        exact: Callable[..., Any] | None,
        *,
        nbytes: float = 0,
        flop: float = 0,
        tolerance: float = 2e-2,
        graph: bool = True,
        early: bool = False,
    ) -> None:
        """One row for each call. The first is ours, and is compared with `exact`.

        early: ours also as it is launched in a decoding step, whose inputs are there early.
        """
        if time.monotonic() > self.end:
            self.missing[f"{group} {shape}"] = "the time was over"
            return
        for name, call in calls.items():
            if not self.peers and name != next(iter(calls)):
                continue
            label = f"{group} {shape} {name}"
            try:
                result = call(*inputs[0])
                if exact is not None and name == next(iter(calls)):
                    self.check(result, exact(*inputs[0]), tolerance)
                turn = itertools.cycle(inputs)
                timed = lambda call=call, turn=turn: call(*next(turn))  # noqa: E731
                eager = seconds = self.seconds(timed)
                if self.device.type == "cuda" and eager < 1e-3 and graph:
                    seconds = self.graph_seconds(timed) or eager
            except Exception as error:
                self.missing[label] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
                continue
            times = {name: seconds}
            if early and seconds != eager and name == next(iter(calls)):
                times[f"{name}, early"] = self.graph_seconds(timed, early=True) or seconds
            for label, seconds in times.items():
                row = {"group": group, "shape": shape, "name": label, "us": seconds * 1e6}
                row["eager us"] = eager * 1e6
                if nbytes:
                    row["GB/s"] = nbytes / seconds / 1e9
                    row["of limit"] = row["GB/s"] / self.limits["copy GB/s"]
                if flop:
                    row["TFLOP/s"] = flop / seconds / 1e12
                    row["of limit"] = row["TFLOP/s"] / self.limits["cuBLAS TFLOP/s"]
                self.rows.append(row)
                self.print(row)

    @staticmethod
    def check(result: Any, exact: Any, tolerance: float) -> None:
        pairs = zip(result, exact, strict=True) if isinstance(result, tuple) else [(result, exact)]
        for a, b in pairs:
            if a.shape != b.shape:
                a = a[:, -b.shape[1] :]  # the last rows, where all would take too much memory
            error = (a.double() - b.double()).abs().max().item()
            scale = b.double().abs().max().item()
            if not error <= tolerance * scale:
                raise AssertionError(f"wrong result: error {error:.3g} where {scale:.3g} is large")

    @staticmethod
    def print(row: dict[str, Any]) -> None:
        rate = next((f"{row[u]:9.1f} {u}" for u in ("GB/s", "TFLOP/s", "token/s") if u in row), "")
        share = f"{100 * row['of limit']:5.0f} %" if "of limit" in row else ""
        name = f"{row['group']:12} {row['shape']:28} {row['name']:22}"
        print(f"{name} {row['us']:11.1f} us {rate} {share}", flush=True)


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def measure_limits(bench: Bench) -> None:
    """Copy bandwidth, and cuBLAS's product of two 8192 x 8192 bfloat16 matrices."""
    size = (1 << 20) if bench.quick else (1 << 30)
    a = torch.empty(size, dtype=torch.uint8, device=bench.device)
    b = torch.empty_like(a)
    bench.limits["copy GB/s"] = 2 * size / bench.seconds(lambda: b.copy_(a)) / 1e9
    n = 256 if bench.quick else 8192
    x, y = torch.randn(2, n, n, device=bench.device).bfloat16()
    bench.limits["cuBLAS TFLOP/s"] = 2 * n**3 / bench.seconds(lambda: x @ y) / 1e12
    print({name: round(value, 1) for name, value in bench.limits.items()})


def liger(bench: Bench) -> Any:
    """Liger's ops, or None with the reason noted."""
    try:
        from liger_kernel.ops.geglu import LigerGELUMulFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    except Exception as error:
        bench.missing["liger"] = str(error)
        return None
    return {
        "rms_norm": lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6, 1.0, "gemma"),
        "geglu": LigerGELUMulFunction.apply,
    }


def norms(bench: Bench) -> None:
    peers = liger(bench)
    for rows in (1, 8) if bench.quick else (1, 64, 32768):
        size, make = 2304, bench.normal
        inputs = bench.rotated(make(rows, size), make(size))
        calls = {
            "gemma2_ext": ops.rms_norm,
            "eager": reference.rms_norm,
            "compile": compiled(reference.rms_norm),
        }
        if peers:
            calls["liger"] = peers["rms_norm"]
        shape = f"{rows} x {size}"
        traffic = 2 * rows * size * 2
        bench.compare("rms_norm", shape, inputs, calls, reference.rms_norm, nbytes=traffic)
        inputs = bench.rotated(make(rows, size), make(rows, size), make(size), make(size))
        calls = {
            "gemma2_ext": ops.add_rms_norm,
            "eager": reference.add_rms_norm,
            "compile": compiled(reference.add_rms_norm),
        }
        bench.compare(
            "add_rms_norm", shape, inputs, calls, reference.add_rms_norm, nbytes=2 * traffic
        )
        inputs = bench.rotated(make(rows, 9216), make(rows, 9216))
        calls = {
            "gemma2_ext": ops.geglu,
            "eager": reference.geglu,
            "compile": compiled(reference.geglu),
        }
        if peers:
            calls["liger"] = peers["geglu"]
        bench.compare(
            "geglu", f"{rows} x 9216", inputs, calls, reference.geglu, nbytes=3 * rows * 9216 * 2
        )
        positions = torch.arange(rows, device=bench.device)
        inputs = bench.rotated(make(1, rows, HEADS, HEAD_DIM), make(1, rows, KV_HEADS, HEAD_DIM))
        rope = functools.partial(reference.rope, positions=positions)
        calls = {
            "gemma2_ext": lambda q, k, p=positions: ops.rope(q, k, p),
            "eager": rope,
            "compile": torch.compile(rope, dynamic=False),
        }
        traffic = 2 * rows * (HEADS + KV_HEADS) * HEAD_DIM * 2
        bench.compare(
            "rope", f"{rows}, {HEADS} + {KV_HEADS} heads", inputs, calls, rope, nbytes=traffic
        )


def linear(bench: Bench) -> None:
    shapes = {"qkv": (4096, 2304), "o": (2304, 2048), "gate_up": (18432, 2304)}
    shapes |= {"down": (2304, 9216)}
    if bench.quick:
        shapes = {"small": (64, 96)}
    for name, (out, into) in shapes.items():
        for rows in (1, 4, 16):
            inputs = bench.rotated(
                bench.normal(rows, into), bench.normal(out, into, scale=into**-0.5)
            )
            shape = f"{name} {rows} x {into} -> {out}"
            calls = {"gemma2_ext": ops.linear, "torch": F.linear}
            nbytes = 2 * out * into
            bench.compare("linear", shape, inputs, calls, F.linear, nbytes=nbytes, early=rows < 5)
            for format in ("int8", "int4"):
                x, weight = inputs[0]
                packed = ops.quantize(weight, format)
                copies = min(64, max(2, ROTATED_BYTES // packed.nbytes))
                bench.compare(
                    f"linear {format}",
                    shape,
                    [(x, copy.deepcopy(packed)) for _ in range(copies)],
                    {"gemma2_ext": ops.linear},
                    lambda x, w: F.linear(x, w.dequantize(x.dtype)),
                    nbytes=packed.nbytes,
                    early=rows < 5,
                )
    vocab = 512 if bench.quick else 256000
    inputs = [(bench.normal(1, 2304), bench.normal(vocab, 2304, scale=1 / 48))]
    exact = lambda h, w: 30 * torch.tanh(F.linear(h.float(), w.float()) / 30)  # noqa: E731
    calls = {
        "gemma2_ext": lambda h, w: ops.logits(h, w, 30.0),
        "torch": lambda h, w: 30 * torch.tanh(F.linear(h, w).float() / 30),
    }
    shape = f"1 x 2304 -> {vocab}"
    bench.compare("logits", shape, inputs, calls, exact, nbytes=2 * vocab * 2304, early=True)


def flex(
    bench: Bench, seqlen: int, window: int | None, scale: float
) -> Callable[..., Tensor] | None:
    """flex_attention compiled with soft-cap and window."""
    if not bench.peers:
        return None
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            seen = j <= i
            return seen if window is None else seen & (j > i - window)

        torch._dynamo.reset()  # each shape is a compilation of its own, and their number is limited
        blocks = create_block_mask(mask, None, None, seqlen, seqlen, device=bench.device.type)
        call = torch.compile(flex_attention, dynamic=False)

        def cap(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return SOFTCAP * torch.tanh(score / SOFTCAP)

        return lambda q, k, v: call(
            *(t.transpose(1, 2) for t in (q, k, v)),
            score_mod=cap,
            block_mask=blocks,
            scale=scale,
            enable_gqa=True,
        ).transpose(1, 2)
    except Exception as error:
        bench.missing["flex_attention"] = str(error).splitlines()[0]
        return None


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """Without a soft-cap, as a bound."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def gradients(call: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Of call's output with regard to q, k and v, for a given gradient of it."""

    def backward(*tensors: Tensor) -> tuple[Tensor, ...]:
        *inputs, of_out = tensors
        if backward.out is None:  # once: the forward pass is not part of it
            with torch.enable_grad():
                backward.leaves = [t.detach().requires_grad_() for t in inputs]
                backward.out = call(*backward.leaves)
        return torch.autograd.grad(backward.out, backward.leaves, of_out, retain_graph=True)

    backward.out = None
    return backward


def attention(bench: Bench) -> None:
    shapes = [(64, HEAD_DIM, None)] if bench.quick else []
    for head_dim in () if bench.quick else (256, 128):
        for seqlen in (1024, 8192, 16384):
            windows = (None, WINDOW) if seqlen > WINDOW else (None,)
            shapes += [(seqlen, head_dim, window) for window in windows]
    for seqlen, head_dim, window in shapes:
        scale = head_dim**-0.5
        num_heads = HEADS * HEAD_DIM // head_dim
        heads = (num_heads, num_heads // 2, num_heads // 2)
        inputs = [tuple(bench.normal(1, seqlen, h, head_dim) for h in heads)]
        options: dict[str, Any] = {"scale": scale, "softcap": SOFTCAP, "window": window}
        ours = functools.partial(ops.attention, **options)
        calls: dict[str, Callable[..., Any]] = {"gemma2_ext": ours}
        peer = flex(bench, seqlen, window, scale)
        if peer:
            calls["flex_attention"] = peer
        if window is None:
            calls["SDPA, no soft-cap"] = functools.partial(sdpa, scale=scale, causal=True)
        exact = functools.partial(reference.attention, **options)
        if seqlen > 1024:
            exact = lambda q, k, v, f=exact: f(q[:, -64:].float(), k.float(), v.float())  # noqa: E731
        seen = sum(min(i + 1, window or seqlen) for i in range(seqlen))
        flop = 4 * seen * num_heads * head_dim
        name = f"{seqlen}, head_dim {head_dim}" + (f", window {window}" if window else "")
        bench.compare("attention", name, inputs, calls, exact, flop=flop, graph=False)
        if seqlen > 8192 or window:
            continue
        inputs = [(*inputs[0], bench.normal(1, seqlen, num_heads, head_dim))]
        backward = {peer: gradients(call) for peer, call in calls.items()}
        bench.compare(
            "attention backward",
            name,
            inputs,
            backward,
            gradients(exact) if seqlen <= 1024 else None,
            flop=2.5 * flop,
            graph=False,
        )


def decode(bench: Bench) -> None:
    scale = HEAD_DIM**-0.5
    for batch, keys in (
        ((2, 64),) if bench.quick else ((1, 8192), (8, 8192), (64, 8192), (1, 65536), (8, 65536))
    ):
        inputs = bench.rotated(
            bench.normal(batch, 1, HEADS, HEAD_DIM),
            bench.normal(batch, keys, KV_HEADS, HEAD_DIM),
            bench.normal(batch, keys, KV_HEADS, HEAD_DIM),
        )
        lengths = torch.full((batch,), keys, device=bench.device)
        calls = {
            "gemma2_ext": lambda q, k, v, n=lengths: ops.attention_cache(
                q, k, v, n, scale=scale, softcap=SOFTCAP
            ),
            "SDPA, no soft-cap": functools.partial(sdpa, scale=scale, causal=False),
        }
        traffic = 2 * batch * keys * KV_HEADS * HEAD_DIM * 2
        name = f"batch {batch}, {keys} keys"
        exact = functools.partial(reference.attention, scale=scale, softcap=SOFTCAP)
        bench.compare("decode", name, inputs, calls, exact if batch == 1 else None, nbytes=traffic)
        decode_int8(bench, batch, keys, lengths)
    decode_step(bench)


def decode_step(bench: Bench) -> None:
    """What a step has beside its products: a token's way into the cache, argmax, a draw."""
    keys = 64 if bench.quick else 512
    options: dict[str, Any] = {"scale": HEAD_DIM**-0.5, "softcap": SOFTCAP}
    lengths = torch.full((1,), keys, device=bench.device)
    positions = lengths[:, None] - 1

    def together(*tensors: Tensor) -> Tensor:
        return ops.attention_append_cache(*tensors, lengths, **options)

    def apart(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        q = ops.rope_append_cache(q, k, v, positions, k_cache, v_cache)
        return ops.attention_cache(q, k_cache, v_cache, lengths, **options)

    inputs = bench.rotated(
        *(bench.normal(1, 1, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)),
        *(bench.normal(1, keys, KV_HEADS, HEAD_DIM) for _ in range(2)),
    )
    calls = {"attention_append_cache": together, "rope_append_cache, attention_cache": apart}
    bench.compare("decode", f"one token, {keys} keys", inputs, calls, apart, early=True)

    def argmax(x: Tensor) -> Tensor:
        out = torch.empty(len(x), dtype=torch.int64, device=x.device)
        torch.ops.gemma2_ext.argmax_out(x, out)
        return out

    words = 1000 if bench.quick else 256_000
    inputs = [(3 * torch.randn(1, words, device=bench.device),) for _ in range(8)]
    calls = {"gemma2_ext": argmax, "torch": functools.partial(torch.argmax, dim=-1)}
    bench.compare(
        "decode", f"argmax of {words}", inputs, calls, calls["torch"], nbytes=4 * words, early=True
    )

    keys = torch.tensor([[1, 2]], dtype=torch.int32, device=bench.device)

    def draw(x: Tensor, top_k: int, top_p: float) -> Tensor:
        out = torch.empty(len(x), dtype=torch.int64, device=x.device)
        torch.ops.gemma2_ext.draw_out(x, keys, 1.0, top_k, top_p, 0.0, out)
        return out

    def by_torch(x: Tensor, top_k: int, top_p: float) -> Tensor:
        if top_k == 0 and top_p == 1:
            p = x.softmax(-1)
            return (p / torch.empty_like(p).exponential_()).argmax(-1)
        values, ids = x.topk(top_k) if top_k else x.sort(descending=True)
        p = values.softmax(-1)
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
        place = (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True)
        return ids.gather(-1, place)[:, 0]

    for what, top_k, top_p in (
        (f"a draw of {words}", 0, 1.0),
        (f"a draw of {words}, top-p 0.95", 0, 0.95),
        (f"a draw of {words}, top-k 64, top-p 0.95", 64, 0.95),
    ):
        calls = {
            "gemma2_ext": functools.partial(draw, top_k=top_k, top_p=top_p),
            "torch": functools.partial(by_torch, top_k=top_k, top_p=top_p),
        }
        bench.compare("decode", what, inputs, calls, None, nbytes=4 * words, early=True)


def decode_int8(bench: Bench, batch: int, keys: int, lengths: Tensor) -> None:
    """One row over a cache of int8, each row of a head with its scale."""
    scale = HEAD_DIM**-0.5
    shape = (batch, KV_HEADS, keys)
    rows = [
        torch.randint(-127, 128, (*shape, HEAD_DIM), dtype=torch.int8, device=bench.device)
        for _ in range(2)
    ]
    scales = [torch.rand(shape, device=bench.device) * 0.02 + 0.01 for _ in range(2)]
    inputs = bench.rotated(
        bench.normal(batch, 1, HEADS, HEAD_DIM), *(t.transpose(1, 2) for t in (*rows, *scales))
    )

    def ours(q: Tensor, k: Tensor, v: Tensor, k_scales: Tensor, v_scales: Tensor) -> Tensor:
        both = {"k_scales": k_scales, "v_scales": v_scales}
        return ops.attention_cache(q, k, v, lengths, **both, scale=scale, softcap=SOFTCAP)

    def exact(q: Tensor, k: Tensor, v: Tensor, k_scales: Tensor, v_scales: Tensor) -> Tensor:
        wide = [(t * s[..., None]).to(q.dtype) for t, s in ((k, k_scales), (v, v_scales))]
        return reference.attention(q, *wide, scale=scale, softcap=SOFTCAP)

    bench.compare(
        "decode",
        f"batch {batch}, {keys} keys of int8",
        inputs,
        {"gemma2_ext": ours},
        exact if batch == 1 else None,
        nbytes=2 * batch * keys * KV_HEADS * (HEAD_DIM + 4),
    )


def decode_rate(ours: Gemma2, ids: Tensor, tokens: int) -> tuple[float, float]:
    """Tokens per second of prefill and of decoding, the latter behind its first step's capture."""
    for _ in range(2):
        steps = ours.stream(ids, max_new_tokens=tokens, stop_ids=[])
        start = time.perf_counter()
        next(steps)
        first = time.perf_counter()
        next(steps)  # its graph is captured here
        second = time.perf_counter()
        count = sum(1 for _ in steps)
        end = time.perf_counter()
    return len(ids[0]) / (first - start), count / (end - second)


def prefill_seconds(ours: Gemma2, tokens: int) -> float:
    """A prompt of random tokens into a cache, up to its last token's logits."""
    ids = torch.randint(3, ours.config.vocab_size, (1, tokens))
    cache = ours.new_cache(1, tokens)
    times = []
    for _ in range(4):
        cache.reset()
        start = time.perf_counter()
        ours(ids, cache=cache, last_only=True).cpu()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def losses(bench: Bench) -> None:
    """Loss and both gradients at Gemma 2 2B's head; memory beyond the gradients."""
    tokens, words, size = (32, 1000, 64) if bench.quick else (8192, 256_000, 2304)
    hidden, weight = (
        bench.normal(tokens, size, scale=3.0),
        bench.normal(words, size, scale=size**-0.5),
    )
    teacher = bench.normal(tokens, size, scale=3.0)
    target = torch.randint(words, (tokens,), device=bench.device)

    def gradients(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        def call(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                h, w = (t.detach().requires_grad_() for t in (hidden, weight))
                value = loss(h, w)
                return value.detach(), *torch.autograd.grad(value, (h, w))

        return call

    def plain(h: Tensor, w: Tensor) -> Tensor:
        return reference.linear_cross_entropy(h, w, target, softcap=30.0)

    def distance(module: Any, h: Tensor, w: Tensor) -> Tensor:
        caps = {"softcap": 30.0, "teacher_softcap": 30.0}
        return module.linear_distillation(h, w, teacher, weight, **caps)

    calls = {
        "gemma2_ext": gradients(lambda h, w: ops.linear_cross_entropy(h, w, target, softcap=30.0)),
        "eager": gradients(plain),
    }
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cut

        calls["cut-cross-entropy"] = gradients(lambda h, w: cut(h, w, target, softcap=30.0))
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss(softcap=30.0)
        calls["liger"] = gradients(lambda h, w: fused(w, h, target))
    shape = f"{tokens} x {size} x {words}"
    inputs, flop = [(hidden, weight)], 6.0 * tokens * size * words
    both = {
        "cross_entropy": (calls, gradients(plain)),
        "distillation": (
            {"gemma2_ext": gradients(functools.partial(distance, ops))},
            gradients(functools.partial(distance, reference)) if bench.quick else None,
        ),
    }
    for group, (sides, exact) in both.items():
        for name, call in sides.items():
            first = name == "gemma2_ext"
            if not (first or bench.peers):
                continue
            peak, before, rows = 0, memory(bench), len(bench.rows)
            if bench.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                call(*inputs[0])  # alone: the check below has memory of its own
                peak = torch.cuda.max_memory_allocated() - before
            work = flop * (4 / 3 if group == "distillation" else 1)
            bench.compare(
                *(group, shape, inputs, {name: call}, exact if first else None),
                flop=work,
                tolerance=5e-2,
                graph=False,
            )
            if bench.device.type == "cuda" and len(bench.rows) > rows:
                gradient_bytes = hidden.nbytes + weight.nbytes
                bench.rows[-1]["MB beyond gradients"] = (peak - gradient_bytes) / 1e6


def memory(bench: Bench) -> int:
    """Bytes in use on the device."""
    return torch.cuda.memory_allocated() if bench.device.type == "cuda" else 0


def random_model(bench: Bench, size: str) -> tuple[Gemma2Config, dict[str, Tensor]]:
    config = getattr(Gemma2Config, f"gemma2_{size}")()
    if bench.quick:
        from gemma2_ext.models import shipped_model

        config = Gemma2Config.from_pretrained(shipped_model())
    from gemma2_ext.weights import parameter_shapes

    weights = {
        name: torch.zeros(shape, dtype=torch.bfloat16, device=bench.device)
        if len(shape) == 1
        else torch.empty(shape, dtype=torch.bfloat16, device=bench.device).normal_(0, 0.02)
        for name, shape in parameter_shapes(config).items()
    }
    return config, weights


@torch.inference_mode()
def model(bench: Bench) -> None:
    """Decoding token/s on random weights, through `stream`, and its share of the limit."""
    tokens = 8 if bench.quick else 128
    for size in ("2b",) if bench.quick else ("2b", "9b"):
        config, weights = random_model(bench, size)
        ids = torch.randint(3, config.vocab_size, (1, 16 if bench.quick else 512))
        for format in ("bf16", "int8", "int4"):
            if time.monotonic() > bench.end:
                bench.missing[f"model {size} {format}"] = "the time was over"
                continue
            packed: dict[Any, ops.QuantizedWeight] = {}  # of each shape one: only time matters
            chosen: dict[str, Any] = dict(weights)
            for name, weight in weights.items() if format != "bf16" else ():
                if weight.ndim == 2:
                    if weight.shape not in packed:
                        packed[weight.shape] = ops.quantize(weight, format)
                    chosen[name] = copy.deepcopy(packed[weight.shape])
            ours = Gemma2(config, chosen)
            prefill, rate = decode_rate(ours, ids, tokens)
            nbytes = sum(t.nbytes for t in (*ours.parameters(), *ours.buffers()))
            row = {
                "group": "model",
                "shape": f"{size} {format}, {len(ids[0])} + {tokens}",
                "name": "gemma2_ext",
                "us": 1e6 / rate,
                "token/s": rate,
                "of limit": rate * nbytes / 1e9 / bench.limits["copy GB/s"],
                "prefill token/s": prefill,
            }
            bench.rows.append(row)
            bench.print(row)
            prompt = 64 if bench.quick else 8192
            seconds = prefill_seconds(ours, prompt)
            # Of products with the layers' weights alone, without attention's.
            weights_of_layers = config.num_parameters - config.vocab_size * config.hidden_size
            row = {
                "group": "prefill",
                "shape": f"{size} {format}, {prompt}",
                "name": "gemma2_ext",
                "us": seconds * 1e6,
                "prefill token/s": prompt / seconds,
                "TFLOP/s": 2 * weights_of_layers * prompt / seconds / 1e12,
            }
            row["of limit"] = row["TFLOP/s"] / bench.limits["cuBLAS TFLOP/s"]
            bench.rows.append(row)
            bench.print(row)
            del ours, chosen, packed
        if size == "2b" and bench.peers:
            transformers_rate(bench, config, weights, ids, tokens)


def transformers_rate(
    bench: Bench, config: Gemma2Config, weights: dict[str, Tensor], ids: Tensor, tokens: int
) -> None:
    if importlib.util.find_spec("transformers") is None:
        bench.missing["transformers"] = "not installed"
        return
    from gemma2_ext.bench.model import transformers_model

    hf = transformers_model(config, weights).to(bench.device)
    call = lambda n: hf.generate(  # noqa: E731
        ids.to(bench.device), max_new_tokens=n, min_new_tokens=n, do_sample=False
    )
    call(4)
    times = []
    for n in (2, 2 + tokens // 4):
        start = time.perf_counter()
        call(n)
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    rate = (tokens // 4) / max(times[1] - times[0], 1e-9)
    row = {"group": "model", "shape": "2B bf16", "name": "transformers eager"}
    row |= {"us": 1e6 / rate, "token/s": rate}
    bench.rows.append(row)
    bench.print(row)


def machine(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "host": platform.processor() or platform.machine(),
        "build": gemma2_ext.build_info(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    commands = {"commit": ["git", "rev-parse", "HEAD"]}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
        commands["nvidia-smi"] = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
    for name, command in commands.items():
        try:
            facts[name] = subprocess.check_output(command, text=True, timeout=20).strip()
        except (OSError, subprocess.SubprocessError) as error:
            facts[name] = str(error)
    return facts


GROUPS = {
    "norms": norms,
    "linear": linear,
    "decode": decode,
    "model": model,
    "losses": losses,
    "attention": attention,  # last: flex_attention takes minutes to compile
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default=",".join(GROUPS), help="of " + ", ".join(GROUPS))
    parser.add_argument("--budget", type=float, default=240, help="seconds")
    parser.add_argument("--alone", action="store_true", help="without the peers")
    parser.add_argument("--quick", action="store_true", help="small shapes, to test this script")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    bench = Bench(args.device, args.quick, args.budget, not args.alone)
    facts = machine(bench.device)
    print({name: facts[name] for name in ("torch", "commit", *(["gpu"] if "gpu" in facts else []))})
    with torch.no_grad():
        measure_limits(bench)
        for name in args.only.split(","):
            try:
                GROUPS[name](bench)
            except Exception as error:
                bench.missing[name] = f"{type(error).__name__}: {str(error)[:300]}"
    for name, reason in bench.missing.items():
        print(f"left out: {name}: {reason}")
    if args.json:
        result = {"machine": facts, "limits": bench.limits, "rows": bench.rows}
        args.json.write_text(json.dumps(result | {"missing": bench.missing}, indent=1))


if __name__ == "__main__":
    main()
