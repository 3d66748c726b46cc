"""Every op under torch: compiled for any size, exported, ahead of time, without data."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from gemma2_ext import ops
from gemma2_ext.ops import _common

HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 4, 2, 16, 24
OPTIONS: dict[str, Any] = {"scale": 0.25, "softcap": 5.0, "window": 3}


def tokens(seqlen: int, *shape: int) -> Tensor:
    return torch.randn(1, seqlen, *shape)


def qkv(seqlen: int) -> tuple[Tensor, Tensor, Tensor]:
    heads = (HEADS, KV_HEADS, KV_HEADS)
    q, k, v = (tokens(seqlen, h, HEAD_DIM) for h in heads)
    return q, k, v


def cache() -> Tensor:
    return torch.zeros(1, 64, KV_HEADS, HEAD_DIM)


# op: (function of tensors, tensors for a number of tokens). Dimension 1 of those that have it, or
# dimension 0 of vectors of positions, is the number of tokens.
CASES: dict[str, tuple[Callable[..., Any], Callable[[int], tuple[Tensor, ...]]]] = {
    "rms_norm": (ops.rms_norm, lambda n: (tokens(n, HIDDEN), torch.randn(HIDDEN))),
    "add_rms_norm": (
        ops.add_rms_norm,
        lambda n: (tokens(n, HIDDEN), tokens(n, HIDDEN), *torch.randn(2, HIDDEN)),
    ),
    "geglu": (ops.geglu, lambda n: (tokens(n, HIDDEN), tokens(n, HIDDEN))),
    "rope": (ops.rope, lambda n: (*qkv(n)[:2], torch.arange(n))),
    "attention": (lambda *t: ops.attention(*t, **OPTIONS), qkv),
    "attention_varlen": (
        lambda q, k, v, begins: ops.attention_varlen(
            q[0], k[0], v[0], begins, begins, q.shape[1], q.shape[1], **OPTIONS
        ),
        lambda n: (*qkv(n), torch.tensor([0, n // 2, n])),
    ),
    "linear": (ops.linear, lambda n: (tokens(n, HIDDEN), torch.randn(7, HIDDEN))),
    "logits": (
        lambda h, w: ops.logits(h, w, 5.0),
        lambda n: (tokens(n, HIDDEN), torch.randn(7, HIDDEN)),
    ),
    "rope_append_cache": (
        ops.rope_append_cache,
        lambda n: (*qkv(n), torch.arange(n), cache(), cache()),
    ),
    "attention_cache": (
        lambda q, k, v, lengths: ops.attention_cache(q, k, v, lengths, **OPTIONS),
        lambda n: (qkv(n)[0], cache(), cache(), torch.tensor([40])),
    ),
    "attention_append_cache": (
        lambda *t: ops.attention_append_cache(*t, **OPTIONS),
        lambda n: (*qkv(n), cache(), cache(), torch.tensor([40])),
    ),
    "attention_paged": (
        lambda q, k, v, table, lengths: ops.attention_paged(q, k, v, table, lengths, **OPTIONS),
        lambda n: (
            qkv(n)[0],
            *torch.randn(2, 8, 8, KV_HEADS, HEAD_DIM),
            torch.arange(8, dtype=torch.int32)[None],
            torch.tensor([40]),
        ),
    ),
}


def flat(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def dynamic_dimensions(op: str) -> list[dict[int, Any]]:
    """For torch.export: the number of tokens is any in every argument that has it."""
    count = torch.export.Dim("count", min=2, max=64)
    few, many = (CASES[op][1](n) for n in (5, 6))
    return [
        {i: count for i in range(a.dim()) if a.shape[i] != b.shape[i]}
        for a, b in zip(few, many, strict=True)
    ]


@pytest.mark.parametrize("op", CASES)
@torch.no_grad()
def test_compiled_once_for_all_sizes(op: str) -> None:
    """From the second size on nothing is compiled again: not from token to token, nor chunk."""
    function, inputs = CASES[op]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for number in (5, 9, 4, 33, 12):
        arguments = inputs(number)
        expected = function(*(a.clone() for a in arguments))
        for a, b in zip(flat(compiled(*arguments)), flat(expected), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("op", CASES)
@torch.no_grad()
def test_exported(op: str) -> None:
    function, inputs = CASES[op]

    class Module(torch.nn.Module):
        def forward(self, *arguments: Tensor) -> Any:
            return function(*arguments)

    shapes = (tuple(dynamic_dimensions(op)),)
    exported = torch.export.export(Module(), inputs(5), dynamic_shapes=shapes)
    arguments = inputs(9)
    expected = function(*(a.clone() for a in arguments))
    actual = exported.module()(*arguments)
    for a, b in zip(flat(actual), flat(expected), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("mode", ["meta", "fake"])
@torch.no_grad()
def test_without_data(op: str, mode: str) -> None:
    """Shapes, strides and dtypes of results as with data, in a mode that computes nothing."""
    function, inputs = CASES[op]
    for dtype in (torch.float32, torch.bfloat16):
        arguments = [a.to(dtype) if a.is_floating_point() else a for a in inputs(5)]
        expected = flat(function(*arguments))
        if mode == "meta":
            actual = flat(function(*(a.to("meta") for a in arguments)))
        else:
            with FakeTensorMode() as fake:
                actual = flat(function(*(fake.from_tensor(a) for a in arguments)))
        for a, b in zip(actual, expected, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.parametrize("op", CASES)
@torch.no_grad()
def test_autocast(op: str) -> None:
    """In a region of autocast the ops take what torch's products leave: mixed dtypes."""
    function, inputs = CASES[op]
    arguments = inputs(5)
    expected = flat(function(*(a.clone() for a in arguments)))
    with torch.autocast("cpu", torch.bfloat16):
        actual = flat(function(*arguments))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05)


@pytest.mark.skipif(
    "GEMMA2_EXT_SLOW_TESTS" not in os.environ,
    reason="AOTInductor compiles for a minute: GEMMA2_EXT_SLOW_TESTS=1 runs it",
)
@torch.no_grad()
def test_ahead_of_time(tmp_path: Path) -> None:
    """AOTInductor: a layer's ops in one library, for any number of tokens."""

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor, norm: Tensor) -> Tensor:
            count = x.shape[1]
            h = ops.linear(ops.rms_norm(x, norm), w).view(1, count, -1, HEAD_DIM)
            q, k, v = h.split((HEADS, KV_HEADS, KV_HEADS), dim=2)
            q, k = ops.rope(q, k, torch.arange(count))
            h = ops.attention(q, k, v, **OPTIONS).flatten(2)
            _, h = ops.add_rms_norm(h, h, norm, norm)
            return ops.logits(ops.geglu(h, h), w, 5.0)

    width = HEADS * HEAD_DIM
    norm, w = torch.randn(width), torch.randn((HEADS + 2 * KV_HEADS) * HEAD_DIM, width) * 0.1
    count = torch.export.Dim("count", min=2, max=64)
    exported = torch.export.export(
        Layer(), (tokens(5, width), w, norm), dynamic_shapes=({1: count}, None, None)
    )
    package = torch._inductor.aoti_compile_and_package(
        exported,
        package_path=str(tmp_path / "layer.pt2"),
        # What is generated around the ops need not be fast here, but soon there.
        inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0", "cpp.simdlen": 1},
    )
    loaded = torch._inductor.aoti_load_package(package)
    for number in (5, 33):
        x = tokens(number, width)
        torch.testing.assert_close(loaded(x, w, norm), Layer()(x, w, norm), rtol=1e-4, atol=1e-4)


DIFFERENTIABLE = (
    "rms_norm",
    "add_rms_norm",
    "geglu",
    "rope",
    "attention",
    "attention_varlen",
    "linear",
)


def gradients(op: str, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients of the sum of all results' squares."""
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
    results = flat(CASES[op][0](*leaves))
    wanted = [t for t in leaves if t.requires_grad]
    return torch.autograd.grad(results, wanted, [2 * t.detach() for t in results])


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_recorded_as_by_the_dispatcher(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, inputs = CASES[op]
    arguments = inputs(7)
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in arguments]
    quick = gradients(op, arguments)
    assert f"{op}Backward" in str(flat(function(*leaves))[0].grad_fn)
    monkeypatch.setattr(_common, "_alone", lambda *tensors: False)
    assert f"gemma2_ext_{op}_default" in str(flat(function(*leaves))[0].grad_fn)
    for a, b in zip(quick, gradients(op, arguments), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_what_looks_on_sees_one_op(op: str) -> None:
    """As the policy of a selective checkpoint, which saves the results of ops by their names."""
    function, inputs = CASES[op]
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        function(*(t.requires_grad_(t.is_floating_point()) for t in inputs(7)))
    assert f"gemma2_ext.{op}.default" in seen


@pytest.mark.parametrize("op", sorted(set(DIFFERENTIABLE) - {"linear"}))
def test_batched_gradients(op: str) -> None:
    """Of several gradients of the results at once, as torch.autograd.functional asks for them."""
    function, inputs = CASES[op]
    leaves = [t.requires_grad_(t.is_floating_point()) for t in inputs(7)]
    results = flat(function(*leaves))
    wanted = [t for t in leaves if t.requires_grad]
    several = [torch.randn(3, *t.shape) for t in results]
    batched = torch.autograd.grad(
        results, wanted, several, is_grads_batched=True, retain_graph=True
    )
    for i in range(3):
        grads = torch.autograd.grad(results, wanted, [g[i] for g in several], retain_graph=True)
        for a, b in zip(batched, grads, strict=True):
            assert torch.equal(a[i], b)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("op", DIFFERENTIABLE)
@torch.no_grad()
def test_mapped(op: str) -> None:
    function, inputs = CASES[op]
    several = [inputs(7) for _ in range(3)]
    mapped = torch.func.vmap(function)(*(torch.stack(t) for t in zip(*several, strict=True)))
    for i, arguments in enumerate(several):
        for a, b in zip(flat(mapped), flat(function(*arguments)), strict=True):
            assert torch.equal(a[i], b)


@pytest.mark.parametrize("op", sorted(CASES))
def test_forward_mode_is_refused(op: str) -> None:
    """A derivative is never silently missing."""
    function, inputs = CASES[op]
    x, *rest = inputs(7)
    function(x, *rest)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: function(x, *rest), (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        function(x, *rest)
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            function(dual, *rest)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_compiled_backward_of_an_eager_forward(op: str) -> None:
    function, inputs = CASES[op]
    leaves = [t.requires_grad_(t.is_floating_point()) for t in inputs(7)]
    results = flat(function(*leaves))
    wanted = [t for t in leaves if t.requires_grad]
    of_results = [torch.randn(t.shape) for t in results]
    expected = torch.autograd.grad(results, wanted, of_results, retain_graph=True)
    torch._dynamo.reset()
    whole = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    with compiled_autograd._enable(whole):
        grads = torch.autograd.grad(results, wanted, of_results)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_every_op_is_here() -> None:
    """But the losses and the packed and fused products, which have such tests of their own."""
    elsewhere = ("linear_", "logits_", "quant", "Quant", "dequant")
    assert set(CASES) == {name for name in ops.__all__ if not name.startswith(elsewhere)}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of this C library")
def test_results_are_not_faulted_in_anew() -> None:
    # In a process of its own: the C library learns from every block that is freed.
    script = """
import resource, torch
from gemma2_ext import ops
x, weight = torch.zeros(2048, 2304, dtype=torch.bfloat16), torch.zeros(2304)
for i in range(20):
    if i == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    results = [ops.rms_norm(x, weight) for _ in range(4)]  # 9 MiB, 2304 pages of 4 KiB, each
    del results
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    # Of 92160 pages; one result may be, where the heap's end was given back.
    assert int(result.stdout) < 2 * 2304
