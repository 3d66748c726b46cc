"""Devices: what is refused and why, and the loop that decodes on a GPU, run on the CPU."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import gemma2_ext
from gemma2_ext import Gemma2
from gemma2_ext.decode_graph import DecodeGraph, decode
from gemma2_ext.device import check_device, has_kernels
from gemma2_ext.generate import Sampler, _run_on_cuda
from gemma2_ext.models import shipped_model
from gemma2_ext.weights import DeviceArena, load_weights

NO_GPU = not torch.cuda.is_available()
STOPS = torch.tensor([1, 107])


@pytest.fixture(scope="module")
def model() -> Gemma2:
    return Gemma2.from_pretrained(shipped_model(), dtype=torch.float32)


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    *,
    torch_cuda: str | None = "13.0",
    ext_cuda: str | None = "13.0",
    capabilities: tuple[tuple[int, int], ...] = ((9, 0),),
    architectures: str = "80;90a;100;120",
) -> None:
    """A machine with these versions and GPUs."""
    info = {
        "cuda": ext_cuda is not None,
        "cuda_version": ext_cuda,
        "cuda_architectures": architectures,
    }
    monkeypatch.setattr(gemma2_ext._C, "build_info", lambda: info)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "NVIDIA Test")


def test_devices_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_device("cpu") == torch.device("cpu")
    pretend(monkeypatch, capabilities=((9, 0), (12, 0)))
    assert check_device("cuda") == torch.device("cuda", 0)
    assert check_device(torch.device("cuda:1")) == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("machine", "device", "error", "message"),
    [
        ({"torch_cuda": None}, "cuda", NotImplementedError, "is built without CUDA"),
        ({"ext_cuda": None}, "cuda", NotImplementedError, "gemma2_ext has no CUDA kernels"),
        ({"ext_cuda": "12.8"}, "cuda", RuntimeError, "built for CUDA 12.8, PyTorch .* CUDA 13.0"),
        ({"capabilities": ()}, "cuda", RuntimeError, "no GPU, or no driver"),
        ({}, "cuda:3", RuntimeError, "there are 1 GPUs"),
        (
            {"capabilities": ((7, 5),)},
            "cuda",
            NotImplementedError,
            "NVIDIA Test, has compute capability 7.5; the kernels need 8.0 or later",
        ),
        (
            {"capabilities": ((8, 0),), "architectures": "90a"},
            "cuda",
            NotImplementedError,
            "NVIDIA Test, has compute capability 8.0; this build .* is for 90a: .*_CUDA_ARCHS",
        ),
        ({}, "mps", NotImplementedError, "only cpu and cuda are supported, got mps"),
        ({}, "gpu", ValueError, "device must be cpu or cuda, got 'gpu'"),
        ({}, 0, TypeError, "device must be a torch.device or str, got 0"),
    ],
)
def test_devices_that_do_not(
    monkeypatch: pytest.MonkeyPatch,
    machine: dict[str, Any],
    device: Any,
    error: type[Exception],
    message: str,
) -> None:
    pretend(monkeypatch, **machine)
    with pytest.raises(error, match=message):
        check_device(device)


def test_which_gpus_a_build_is_for() -> None:
    default = "80;90a;100;120"
    for capability in [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 1), (13, 0)]:
        assert has_kernels(default, capability), capability
    assert not has_kernels("80;90", (7, 5))
    assert has_kernels("80;90", (12, 0))  # by PTX
    assert has_kernels("86", (8, 9))
    assert not has_kernels("86", (8, 0))
    assert not has_kernels("80;90a", (10, 0))  # PTX of 90a runs nowhere else
    assert has_kernels("120;80", (11, 0))
    assert not has_kernels("80;120", (11, 0))


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_from_pretrained_refuses_before_it_reads_weights(tmp_path: Path) -> None:
    with pytest.raises((NotImplementedError, RuntimeError), match="Gemma2: device cuda"):
        Gemma2.from_pretrained(tmp_path, device="cuda")


@pytest.mark.skipif(gemma2_ext._C.build_info()["cuda"] is True, reason="built with CUDA")
def test_an_op_on_a_gpu_without_kernels_says_so() -> None:
    x, weight = torch.randn(2, 8), torch.randn(8)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for op in (torch.ops.gemma2_ext.rms_norm, torch.ops.gemma2_ext.rms_norm_out):
        rest = (torch.empty_like(x),) if op is torch.ops.gemma2_ext.rms_norm_out else ()
        with pytest.raises(NotImplementedError, match=r"::rms_norm(_out)?: this build of gemma2"):
            op.default.redispatch(keys, x, weight, 1e-6, *rest)


def test_tensors_on_two_devices_are_refused() -> None:
    x, weight = torch.randn(2, 8), torch.randn(8, device="meta")
    with pytest.raises(ValueError, match="weight must be on x's device cpu, got"):
        torch.ops.gemma2_ext.rms_norm.default.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), x, weight, 1e-6
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_by_way_of_staging(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """What a GPU gets, on the CPU: the same tensors as without."""
    config = gemma2_ext.Gemma2Config.from_pretrained(shipped_model())
    right = load_weights(shipped_model(), config, dtype=dtype)
    monkeypatch.setattr(
        "gemma2_ext.weights.Arena", lambda c, d, f=None: DeviceArena(c, d, torch.device("cpu"))
    )
    staged = load_weights(shipped_model(), config, dtype=dtype)
    assert staged.keys() == right.keys()
    for name, tensor in right.items():
        assert torch.equal(staged[name], tensor)
        assert staged[name].data_ptr() % 64 == 0


def start(model: Gemma2, ids: torch.Tensor, sampler: Sampler, length: int) -> DecodeGraph:
    cache = model.new_cache(ids.shape[0], length)
    with torch.inference_mode():
        tokens = sampler(model(ids, cache=cache, last_only=True)[:, 0])
        return DecodeGraph(model, cache, sampler, tokens, STOPS)


def test_what_runs_on_a_device_gives_what_generate_gives(model: Gemma2) -> None:
    ids = torch.randint(3, model.config.vocab_size, (2, 5))
    for stop_ids in ([], [1, 107]):
        right = model.generate(ids, max_new_tokens=12, stop_ids=stop_ids)
        steps = _run_on_cuda(model, ids, 12, Sampler(), None, model.new_cache(2, 32), stop_ids)
        assert torch.equal(torch.stack(list(steps), dim=1), right[:, 5:])


def test_steps_on_the_device_give_what_generate_gives(model: Gemma2) -> None:
    ids = torch.randint(3, model.config.vocab_size, (3, 5))
    right = model.generate(ids, max_new_tokens=12)
    graph = start(model, ids, Sampler(), 32)
    new = torch.stack(list(decode(graph, 12)), dim=1)
    assert torch.equal(torch.cat([ids, new], dim=1), right)
    # The cache holds all tokens but the last one drawn.
    assert graph.cache.lengths.tolist() == [5 + 11] * 3


def test_sampled_steps_give_what_generate_gives(model: Gemma2) -> None:
    ids = torch.randint(3, model.config.vocab_size, (2, 5))
    right = model.generate(ids, max_new_tokens=12, temperature=0.9, top_p=0.8, seed=3)
    generator = torch.Generator().manual_seed(3)
    graph = start(model, ids, Sampler(0.9, top_p=0.8, generator=generator), 32)
    new = torch.stack(list(decode(graph, 12)), dim=1)
    assert torch.equal(torch.cat([ids, new], dim=1), right)


def test_rows_that_stop(model: Gemma2, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(3, model.config.vocab_size, (2, 5))
    drawn = iter([[5, 1], [6, 9], [107, 9], [8, 8]])

    class Scripted(Sampler):
        def __call__(self, logits: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
            return torch.tensor(next(drawn))

    graph = start(model, ids, Scripted(), 32)
    tokens = [t.tolist() for t in decode(graph, 10)]
    assert tokens == [[5, 1], [6, 0], [107, 0]]
    assert graph.cache.lengths.tolist() == [5 + 2] * 2


def test_closing_early_and_a_full_cache(model: Gemma2) -> None:
    ids = torch.randint(3, model.config.vocab_size, (1, 5))
    graph = start(model, ids, Sampler(), 8)
    steps = decode(graph, 10)
    next(steps)
    next(steps)
    steps.close()
    assert graph.cache.length == 5 + 1
    graph = start(model, ids, Sampler(), 8)
    assert len(list(decode(graph, 10))) == 4  # the last one needs no slot
    assert graph.cache.length == 8


def test_nothing_in_a_step_touches_the_host(model: Gemma2) -> None:
    """A step's ops take what they need from tensors alone: another step, another position."""
    ids = torch.randint(3, model.config.vocab_size, (1, 5))
    graph = start(model, ids, Sampler(), 32)
    lengths = graph.cache.lengths.tolist()
    with torch.inference_mode():
        graph._compute()
    assert graph.cache.lengths.tolist() == lengths
    assert graph.key_lengths.item() == 7
    assert math.isfinite(graph.tokens.item())
