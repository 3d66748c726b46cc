"""What the public functions of all ops share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _C
from ..quantize import QuantizedWeight

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(op: str, name: str, value: object, *, float64: bool = False) -> None:
    """Raises TypeError unless `value` is a strided tensor of float32, bfloat16 or float16.

    `float64` is for the ops that also have kernels in float64, slow ones for checks of gradients.
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f"gemma2_ext::{op}: {name} must be a torch.Tensor, got {type(value).__name__}"
        )
    if value.dtype not in FLOATS and not (float64 and value.dtype == torch.float64):
        raise TypeError(
            f"gemma2_ext::{op}: {name} must be float32, bfloat16 or float16, got {value.dtype}"
        )
    if value.layout is not torch.strided:
        raise TypeError(f"gemma2_ext::{op}: {name} must be strided, not {value.layout}")


def check_integers(op: str, name: str, value: object, *, required: bool = False) -> None:
    """Raises TypeError unless `value` is a tensor of int32 or int64, or None where not required."""
    if value is None and not required:
        return
    if not isinstance(value, Tensor):
        raise TypeError(
            f"gemma2_ext::{op}: {name} must be a torch.Tensor, got {type(value).__name__}"
        )
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"gemma2_ext::{op}: {name} must be int32 or int64, got {value.dtype}")


def check_cache(
    op: str, k_cache: object, v_cache: object, k_scales: object, v_scales: object
) -> None:
    """Raises unless caches are tensors of float32, bfloat16, float16 or int8."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not isinstance(cache, Tensor) or cache.dtype != torch.int8:
            check_tensor(op, name, cache)
    for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
        if scales is not None and not isinstance(scales, Tensor):
            raise TypeError(
                f"gemma2_ext::{op}: {name} must be a torch.Tensor, got {type(scales).__name__}"
            )


def check_in_features(op: str, name: str, x: Tensor, weight: QuantizedWeight) -> None:
    """Raises unless x's last dimension is weight's. (The packed tensors are padded.)"""
    check_tensor(op, name, x)
    if x.dim() < 1 or x.shape[-1] != weight.in_features:
        raise ValueError(
            f"gemma2_ext::{op}: {name} must have shape (..., in_features) = (..., "
            f"{weight.in_features}) for {weight}, got {tuple(x.shape)}"
        )


def through_dispatcher(*tensors: Tensor) -> bool:
    """Whether a call goes through the functional op: traced, cast, mapped, or with a gradient.

    Otherwise the public function allocates the output and calls the `_out` op, which is cheaper
    and leaves an out-of-memory error to torch.
    """
    return _transformed(*tensors) or needs_gradient(*tensors)


def _transformed(*tensors: Tensor) -> bool:
    """Whether torch makes something else of a call: traces, casts or maps it."""
    if torch.compiler.is_compiling():
        return True
    # Asked of all devices first: it is quick, and mostly the answer.
    if torch._C._is_any_autocast_enabled() and _autocast(tensors[0]):
        return True
    if forward_ad._current_level >= 0:
        for t in tensors:
            if forward_ad.unpack_dual(t).tangent is not None:
                raise NotImplementedError(
                    "gemma2_ext: the ops have no forward-mode derivative (torch.func.jvp)"
                )
    return torch._C._are_functorch_transforms_active()


def _alone(*tensors: Tensor) -> bool:
    """Whether nothing but autograd looks at a call: no mode, transform, tracer or subclass."""
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    for t in tensors:
        if type(t) is not Tensor and type(t) is not torch.nn.Parameter:
            return False
        if torch._C._functorch.is_legacy_batchedtensor(t):  # of autograd.grad's is_grads_batched
            return False
    return torch._C._get_tracing_state() is None


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd records a call with these tensors."""
    if torch.is_grad_enabled():
        for t in tensors:  # a generator in any() takes longer than all else here
            if t.requires_grad:
                return True
    return False


def new_like(t: Tensor) -> Tensor:
    """A new contiguous tensor of t's shape, dtype and device; quicker than `new_empty`."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def promote(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, tensors of several dtypes in the widest of them, as torch's own ops do it.

    Otherwise the tensors as they are: an op computes in the dtype that it is given.
    """
    dtype = tensors[0].dtype
    for t in tensors:
        if t.dtype != dtype:
            break
    else:
        return tensors
    if not _autocast(tensors[0]):
        return tensors
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return tuple(t.to(dtype) for t in tensors)


def narrow(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, float32 tensors and those of several dtypes in autocast's dtype: the rule
    for matrix products."""
    first = tensors[0].dtype
    for t in tensors:
        if t.dtype == torch.float32 or t.dtype != first:
            break
    else:
        return tensors
    if not _autocast(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t.to(dtype) if t.dtype in FLOATS else t for t in tensors)


def _autocast(tensor: Tensor) -> bool:
    kind = tensor.device.type  # torch raises for one that has no autocast
    return kind != "meta" and torch.is_autocast_enabled(kind)


# Kept for the life of the process, as its registrations are.
_library = torch.library.Library("gemma2_ext", "FRAGMENT")


def differentiable(
    op: str,
    run: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., Callable[..., Any]]:
    """Makes `op` differentiable, and returns what tells the form of it to call for tensors.

    That is the op where torch makes something else of a call, or it is recorded while more than
    autograd looks on; where it is only recorded, an autograd.Function, which takes less time; and
    `run` where no gradient is asked for.

    Args:
        op: its name.
        run: from the op's arguments to new results, by its `_out` form.
        setup_context, backward: as of torch.library.register_autograd; they call ops, so that a
            compiler can trace them.
    """
    overload = getattr(torch.ops.gemma2_ext, op).default
    torch.library.register_autograd(f"gemma2_ext::{op}", backward, setup_context=setup_context)

    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, keywords = args
        output = run(*inputs, **keywords)
        setup_context(ctx, tuple(inputs), *([keywords] if keywords else []), output)
        return output

    def backward_of_inputs(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(ctx, *grads), None

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward_of_inputs)}
    function: Any = type(op, (torch.autograd.Function,), members)

    def record(*inputs: Any, **keywords: Any) -> Any:
        return function.apply(*inputs, keywords)

    def form(*tensors: Tensor) -> Callable[..., Any]:
        if _transformed(*tensors):
            return overload
        if not needs_gradient(*tensors):
            return run
        return record if _alone(*tensors) else overload

    return form


def backward_op(op: str, allocate: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """Makes `<op>_backward` an op of two forms, and returns what calls it.

    Args:
        op: whose `<op>_backward` and `<op>_backward_out` are declared.
        allocate: from `<op>_backward`'s arguments to new tensors for its results. As that happens
            in Python, running out of memory is torch's own error.
    """
    overload = getattr(torch.ops.gemma2_ext, f"{op}_backward").default
    out_op = getattr(torch.ops.gemma2_ext, f"{op}_backward_out").default

    def run(*args: Any) -> tuple[Tensor, ...]:
        grads = allocate(*args)
        out_op(*args, *grads)
        return grads

    def second(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(f"gemma2_ext::{op} has no second derivative")

    _library.impl(f"{op}_backward", run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gemma2_ext::{op}_backward", allocate)
    torch.library.register_fake(f"gemma2_ext::{op}_backward_out", lambda *args: None)
    torch.library.register_autograd(f"gemma2_ext::{op}_backward", second)

    def call(*args: Any) -> Any:
        # A compiler, a mode or a second derivative is to see one op without outputs among its
        # arguments.
        looked_at = torch.compiler.is_compiling() or torch.is_grad_enabled()
        quick = not looked_at and _alone(args[0])
        return (run if quick else overload)(*args)

    return call


def refuse_backward(op: str) -> None:
    """Registers a backward that raises, so that a gradient is never silently missing."""

    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(
            f"gemma2_ext::{op} has no backward yet; run it under torch.no_grad()"
        )

    torch.library.register_autograd(f"gemma2_ext::{op}", backward)


def cast_under_autocast(op: str, *positions: int) -> None:
    """Registers that autocast casts the arguments at `positions` to its dtype, as it does those of
    torch's own products; float64 stays."""
    overload = getattr(torch.ops.gemma2_ext, op).default

    def register(device: str, key: str) -> None:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def autocast(*args: Any, **kwargs: Any) -> Any:
            dtype = torch.get_autocast_dtype(device)
            cast = tuple(
                a.to(dtype) if i in positions and a.dtype in FLOATS else a
                for i, a in enumerate(args)
            )
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return overload(*cast, **kwargs)

        _library.impl(op, autocast, key)

    register("cpu", "AutocastCPU")
    register("cuda", "AutocastCUDA")


def refuse_gradient(op: str, message: str | None = None) -> None:
    """As refuse_backward, for an op that writes into its arguments: the call itself raises.

    torch.library.register_autograd takes no such op. The message says what is missing.
    """
    overload = getattr(torch.ops.gemma2_ext, op).default

    def autograd(keyset: torch._C.DispatchKeySet, *args: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            raise NotImplementedError(
                message or f"gemma2_ext::{op} has no backward; run it under torch.no_grad()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args, **options)

    _library.impl(op, autograd, "Autograd", with_keyset=True)


def refuse_cuda_without_kernels() -> None:
    """An op that has no CUDA kernel says so on a GPU, in place of torch's list of backends."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    why = (
        "has no CUDA kernel yet"
        if _C.build_info()["cuda"]
        else "this build of gemma2_ext has no CUDA kernels; install it again where nvcc is on PATH "
        "or in CUDA_HOME, beside a PyTorch with CUDA"
    )
    for name in torch._C._dispatch_get_all_op_names():
        composite = has(name, "CompositeExplicitAutograd") if "gemma2_ext::" in name else True
        if composite or not has(name, "CPU") or has(name, "CUDA"):
            continue

        def refuse(*args: Any, name: str = name, **kwargs: Any) -> NoReturn:
            raise NotImplementedError(f"{name}: {why}")

        _library.impl(name.removeprefix("gemma2_ext::"), refuse, "CUDA")
