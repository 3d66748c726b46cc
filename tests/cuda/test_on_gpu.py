"""What only a GPU shows: the model, graphs, streams, memory. The ops' own tests run there too, with
the instruction set "cuda" (conftest.py). Skipped without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import gemma2_ext
from draws import EVERY, some_keys
from gemma2_ext import Gemma2, Gemma2Config, ops, reference
from gemma2_ext.decode_graph import DecodeGraph, StepGraphs
from gemma2_ext.models import shipped_model
from tiny import random_weights
from training_common import metrics
from training_common import run as train

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and gemma2_ext._C.build_info()["cuda"]),
    reason="needs a GPU and a build with CUDA",
)


@pytest.fixture(scope="module")
def models() -> tuple[Gemma2, Gemma2]:
    folder = shipped_model()
    return tuple(  # type: ignore[return-value]
        Gemma2.from_pretrained(folder, dtype=torch.float32, device=d) for d in ("cpu", "cuda")
    )


def test_gpu_has_the_same_tokens_as_the_cpu(models: tuple[Gemma2, Gemma2]) -> None:
    cpu, gpu = models
    ids = torch.randint(3, cpu.config.vocab_size, (3, 17))
    mask = torch.ones(3, 17, dtype=torch.bool)
    mask[1, :5] = False
    right = cpu.generate(ids, max_new_tokens=40, attention_mask=mask)
    assert torch.equal(gpu.generate(ids, max_new_tokens=40, attention_mask=mask).cpu(), right)
    assert list(gpu.stream(ids[:1], max_new_tokens=9)) == list(
        cpu.stream(ids[:1], max_new_tokens=9)
    )


@pytest.mark.parametrize("filters", [EVERY, (64, 0.95, 0.0), (3000, 1.0, 0.0), (0, 0.9, 0.001)])
def test_gpu_draws_what_the_cpu_draws(filters: tuple[int, float, float]) -> None:
    logits, keys = 3 * torch.randn(20, 256_000), some_keys(20)
    drawn = []
    for device in ("cpu", "cuda"):
        out = torch.empty(20, dtype=torch.int64, device=device)
        torch.ops.gemma2_ext.draw_out(logits.to(device), keys.to(device), 0.8, *filters, out)
        drawn.append(out.cpu())
    assert torch.equal(*drawn)


@pytest.mark.parametrize("batch", [1, 2])
def test_gpu_early_launches_give_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    gpu = Gemma2.from_pretrained(shipped_model(), dtype=torch.bfloat16, device="cuda")
    ids = torch.randint(3, gpu.config.vocab_size, (batch, 17))
    tokens = gpu.generate(ids, max_new_tokens=60, temperature=0.8, seed=1)
    monkeypatch.setattr(DecodeGraph, "early_launches", False)
    assert torch.equal(gpu.generate(ids, max_new_tokens=60, temperature=0.8, seed=1), tokens)


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("batch", [1, 3])
def test_gpu_steps_of_a_graph_are_those_of_calls(quantize: str | None, batch: int) -> None:
    gpu = Gemma2.from_pretrained(
        shipped_model(), dtype=torch.bfloat16, device="cuda", quantize=quantize
    )
    ids = torch.randint(3, gpu.config.vocab_size, (batch, 40))
    drawn = gpu.generate(ids, max_new_tokens=40, stop_ids=[])
    assert torch.equal(drawn[:, 40:].cpu(), tokens_by_calls(gpu, ids, 40))


def tokens_by_calls(model: Gemma2, ids: Tensor, count: int) -> Tensor:
    """Each step's ops called one by one."""
    cache = model.new_cache(len(ids), ids.shape[1] + count)
    tokens = [model(ids, cache=cache, last_only=True)[:, 0].argmax(-1)]
    for _ in range(count - 1):
        tokens.append(model(tokens[-1][:, None], cache=cache)[:, 0].argmax(-1))
    return torch.stack(tokens, 1).cpu()


def test_gpu_logits(models: tuple[Gemma2, Gemma2]) -> None:
    cpu, gpu = models
    ids = torch.randint(3, cpu.config.vocab_size, (2, 65))
    torch.testing.assert_close(gpu(ids).cpu(), cpu(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("most", [300, 8192])  # a row at a time, both
@pytest.mark.parametrize("head_dim", [128, 256])
def test_gpu_prompts_of_many_chunks(
    monkeypatch: pytest.MonkeyPatch, head_dim: int, most: int
) -> None:
    """Chunks of 300 tokens through rings of 600 slots, against all tokens at once."""
    monkeypatch.setattr("gemma2_ext.cache.MAX_TOKENS_CUDA", most)
    config = Gemma2Config(
        *(500, 128, 256, 4, 4, 2, head_dim), sliding_window=300, max_position_embeddings=2048
    )
    torch.manual_seed(0)
    gpu = Gemma2(config, random_weights(config, dtype=torch.bfloat16)).cuda()
    ids = torch.randint(3, 500, (2, 1500))
    cache = gpu.new_cache(2, 1600)
    assert (cache.chunk_size, cache.keys[0].shape[1]) == (300, 600)
    in_chunks, at_once = gpu(ids, cache=cache), gpu(ids)
    # Each is 5 % from float32, the roundings of bfloat16 through layers that show all of them.
    assert (in_chunks - at_once).norm() < 0.1 * at_once.norm()


def test_gpu_cache_of_int8(models: tuple[Gemma2, Gemma2]) -> None:
    cpu = models[0]
    ids = torch.randint(3, cpu.config.vocab_size, (2, 40))
    for part in (ids, ids[:, :7], ids[:, :1]):  # widened, then as it is
        caches = [model.new_cache(2, 64, torch.int8) for model in models]
        logits = [model(ids, cache=cache) for model, cache in zip(models, caches, strict=True)]
        torch.testing.assert_close(logits[1].cpu(), logits[0], rtol=1e-2, atol=5e-2)
        logits = [model(part, cache=cache) for model, cache in zip(models, caches, strict=True)]
        torch.testing.assert_close(logits[1].cpu(), logits[0], rtol=1e-2, atol=5e-2)
    half = Gemma2.from_pretrained(
        shipped_model(), dtype=torch.bfloat16, device="cuda", cache_dtype=torch.int8
    )
    drawn = half.generate(ids, max_new_tokens=30, stop_ids=[])
    assert torch.equal(drawn[:, 40:].cpu(), tokens_by_calls(half, ids, 30))


@pytest.mark.parametrize("after_runs", [2, 1000], ids=["graphs", "no graphs"])
def test_gpu_drafts_give_the_same_tokens(
    models: tuple[Gemma2, Gemma2], monkeypatch: pytest.MonkeyPatch, after_runs: int
) -> None:
    monkeypatch.setattr(StepGraphs, "AFTER_RUNS", after_runs)
    _, gpu = models
    ids = torch.tensor([[7, 8, 9, 10, 11, 12] * 5])
    right = list(gpu.stream(ids, max_new_tokens=40))
    assert list(gpu.stream(ids, max_new_tokens=40, draft="ngram")) == right
    assert list(gpu.stream(ids, max_new_tokens=40, draft=gpu)) == right


def test_gpu_sampling_repeats(models: tuple[Gemma2, Gemma2]) -> None:
    gpu = models[1]
    ids = torch.randint(3, gpu.config.vocab_size, (2, 5))
    for options in ({}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.1}):
        first, second = (
            gpu.generate(ids, max_new_tokens=12, temperature=0.9, seed=3, **options)
            for _ in range(2)
        )
        assert torch.equal(first, second)


def test_gpu_trains_as_the_cpu_does(tmp_path: Path) -> None:
    options = ("--steps", 5, "--held-out", 0.2, "--dtype", "float32")
    for device in ("cpu", "cuda"):
        train(tmp_path / f"train-{device}", *options, "--device", device)
    teacher = ("--teacher", tmp_path / "train-cpu", "--hard-labels", 0.3, "--temperature", 1.5)
    for device in ("cpu", "cuda"):
        out = tmp_path / f"distill-{device}"
        train(out, *options, *teacher, "--device", device, command="distill")
    for command in ("train", "distill"):
        right, lines = (metrics(tmp_path / f"{command}-{d}") for d in ("cpu", "cuda"))
        assert len(lines) == len(right) == 6
        for line, expected in zip(lines, right, strict=True):
            for name in ("loss", "gradient_norm", "held_out_loss"):
                assert line.get(name) == pytest.approx(expected.get(name), rel=1e-3)


def test_gpu_has_the_same_losses_for_a_large_vocabulary() -> None:
    hidden = 3 * torch.randn(300, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(256_000, 64, device="cuda", dtype=torch.bfloat16) / 8
    target = torch.randint(256_000, (300,), device="cuda")
    target[::3] = -100
    results = []
    for device in ("cpu", "cuda"):
        h, w = (t.to(device).requires_grad_() for t in (hidden, weight))
        loss = ops.linear_cross_entropy(h, w, target.to(device), softcap=30.0)
        results.append((loss.detach(), *torch.autograd.grad(loss, (h, w))))
    torch.testing.assert_close(results[1][0].cpu(), results[0][0], rtol=1e-5, atol=0)
    for gradient, right in zip(results[1][1:], results[0][1:], strict=True):
        error = (gradient.cpu().double() - right.double()).norm()
        assert error <= 0.01 * right.double().norm()


def test_gpu_out_of_range_target_is_a_value_error() -> None:
    hidden, weight = torch.randn(2, 8, device="cuda"), torch.randn(10, 8, device="cuda")
    with pytest.raises(ValueError, match="target must be in"):
        ops.linear_cross_entropy(hidden, weight, torch.tensor([3, 10], device="cuda"))


def test_gpu_streams_and_graphs() -> None:
    x, w = torch.randn(64, 2304, device="cuda"), torch.randn(2304, device="cuda")
    expected = reference.rms_norm(x, w)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        out = ops.rms_norm(x, w)
    side.synchronize()
    torch.testing.assert_close(out, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.rms_norm(x, w)
    x.mul_(2)
    graph.replay()
    torch.testing.assert_close(out, reference.rms_norm(x, w))


def test_gpu_out_of_memory_is_torch_s_own_error() -> None:
    x = torch.empty(1, dtype=torch.bfloat16, device="cuda").expand(1 << 30, 1024)
    with pytest.raises(torch.OutOfMemoryError):
        ops.geglu(x, x)


def test_gpu_tensors_on_two_devices() -> None:
    with pytest.raises(ValueError, match="weight must be on x's device cuda:0, got cpu"):
        ops.rms_norm(torch.randn(2, 8, device="cuda"), torch.randn(8))


def test_gpu_more_than_2_31_elements() -> None:
    free, _ = torch.cuda.mem_get_info()
    rows, size = (1 << 31) // 1024 + 3, 1024
    if free < 5 * rows * size * 2:
        pytest.skip("needs 22 GB")
    x = torch.randn(rows, size, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(size, device="cuda", dtype=torch.bfloat16)
    out = ops.rms_norm(x, w)
    torch.testing.assert_close(out[-3:], reference.rms_norm(x[-3:], w))
    torch.testing.assert_close(ops.geglu(x, x)[-3:], reference.geglu(x[-3:], x[-3:]))
