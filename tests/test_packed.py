from __future__ import annotations

import copy
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from gemma2_ext import Gemma2, Gemma2Config, QuantizedWeight, ops, packed
from gemma2_ext.evaluate import perplexity
from gemma2_ext.models import shipped_model
from gemma2_ext.packed import load_checkpoint, quantize_checkpoint, stored_format
from gemma2_ext.quantize import FORMATS, Format
from gemma2_ext.tokenizer import Tokenizer
from gemma2_ext.weights import memory_needed, parameter_shapes, random_weights

SIZES = [{}, {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "vocab_size": 160}]


def folder_of(path: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """A checkpoint whose fused matrices have rows that do not end where blocks of 16 do."""
    tiny.small_model(dtype=dtype, **changes).save_pretrained(path)
    return path


def matrices(weights: Any) -> dict[str, QuantizedWeight]:
    return {name: w for name, w in weights.items() if isinstance(w, QuantizedWeight)}


def assert_same(left: Any, right: Any) -> None:
    assert list(left) == list(right)
    for name, weight in left.items():
        if isinstance(weight, QuantizedWeight):
            assert weight.format == right[name].format and weight.shape == right[name].shape
            assert torch.equal(weight.data, right[name].data), name
            assert torch.equal(
                weight.scales.view(torch.uint8), right[name].scales.view(torch.uint8)
            )
        else:
            assert torch.equal(weight, right[name]), name


def in_8_bits(x: Tensor) -> Tensor:
    """x as the ops over packed weights take it: 8 bits, with a scale for every 32 columns."""
    groups = torch.nn.functional.pad(x, (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    rounded = (groups / scale.clamp(min=1e-30)).round() * scale
    return rounded.flatten(-2)[..., : x.shape[-1]]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_way_gives_the_same_weights(
    tmp_path: Path, format: Format, dtype: torch.dtype
) -> None:
    folder = folder_of(tmp_path / "plain", dtype)
    config = Gemma2Config.from_pretrained(folder)
    plain = load_checkpoint(folder, config)
    expected = {name: w if w.dim() == 1 else ops.quantize(w, format) for name, w in plain.items()}
    assert_same(load_checkpoint(folder, config, quantize=format), expected)
    quantize_checkpoint(folder, tmp_path / "deep" / "packed", format)
    assert_same(load_checkpoint(tmp_path / "deep" / "packed", config), expected)
    assert_same(load_checkpoint(tmp_path / "deep" / "packed", config, quantize=format), expected)
    Gemma2(config, expected).save_pretrained(tmp_path / "saved")
    assert_same(load_checkpoint(tmp_path / "saved", config), expected)
    assert stored_format(tmp_path / "saved", config) == (dtype, format)
    assert stored_format(folder, config) == (dtype, None)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_at_a_time(tmp_path: Path, format: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path / "plain")
    quantize_checkpoint(folder, tmp_path / "whole", format)
    monkeypatch.setattr(packed, "CHUNK_BYTES", 1)
    quantize_checkpoint(folder, tmp_path / "parts", format)
    names = ["config.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path / "parts")) == names
    for name in names:
        whole, parts = (tmp_path / kind / name for kind in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes()


def test_the_file(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "plain")
    (folder / "tokenizer.json").write_text("{}")
    quantize_checkpoint(folder, tmp_path / "packed", "int4")
    assert (tmp_path / "packed" / "tokenizer.json").read_text() == "{}"
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config.pop("quantization_config") == {"quant_method": "gemma2_ext", "format": "int4"}
    assert config == json.loads((folder / "config.json").read_text())
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    assert tensors["model.layers.0.qkv_proj.weight.data"].dtype == torch.uint8
    assert tensors["model.embed_tokens.weight.scales"].dtype == torch.int8
    assert tensors["model.norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("sizes", SIZES)
def test_model_computes_with_the_packed_weights(
    format: Format, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.small_model(**sizes)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    quantized = {n: w if w.dim() == 1 else ops.quantize(w, format) for n, w in weights.items()}
    dense = {
        n: w.dequantize() if isinstance(w, QuantizedWeight) else w for n, w in quantized.items()
    }
    ids = tiny.random_ids(model.config, 2, 40)
    actual, expected = Gemma2(model.config, quantized), Gemma2(model.config, dense)
    assert actual.dtype == torch.float32
    logits = actual(ids)
    with monkeypatch.context() as patch:
        linear, logits_op = ops.linear, ops.logits
        patch.setattr(ops, "linear", lambda x, w: linear(in_8_bits(x), w))
        patch.setattr(ops, "logits", lambda x, w, softcap: logits_op(in_8_bits(x), w, softcap))
        # What is left: an x near the middle between two numbers may go either way, by the
        # processor. One that does moves all by 0.002 to 0.010, single logits by up to 0.034.
        assert tiny.relative_distance(logits, expected(ids)) < 0.03
    rows = actual.embed_tokens.weight.rows(ids)
    assert torch.equal(rows, expected.embed_tokens.weight[ids])
    cache = actual.new_cache(2, 64)
    cached = torch.cat([actual(ids[:, i : i + 1], cache=cache) for i in range(40)], 1)
    assert tiny.relative_distance(cached, logits) < 0.03
    twin = copy.deepcopy(actual)
    assert torch.equal(twin(ids), logits)
    other = Gemma2(
        model.config,
        {n: w if w.dim() == 1 else ops.quantize(w * 2, format) for n, w in weights.items()},
    )
    other.load_state_dict(actual.state_dict())
    assert torch.equal(other(ids), logits)
    generated = actual.generate(ids[:, :5], max_new_tokens=4)
    assert generated.shape == (2, 9)


def test_perplexity_of_the_shipped_model() -> None:
    text = Path(__file__).parents[1] / "training" / "shakespeare" / "tinyshakespeare.txt"
    held_out = text.read_bytes()[-111_606:][:3000].decode()
    ids = Tokenizer.from_pretrained(shipped_model()).encode(held_out)
    results = {}
    for quantize in (None, *FORMATS):
        model = Gemma2.from_pretrained(shipped_model(), quantize=quantize)
        results[quantize] = perplexity(model, ids, context=512, stride=256).perplexity
    assert abs(results["int8"] / results[None] - 1) < 0.001
    assert abs(results["int4"] / results[None] - 1) < 0.03


def test_dtype_of_what_is_not_packed(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "plain", torch.float32)
    model = Gemma2.from_pretrained(folder, torch.bfloat16, quantize="int8")
    assert model.dtype == torch.bfloat16
    assert model.norm.weight.dtype == torch.bfloat16
    quantize_checkpoint(folder, tmp_path / "packed", "int8")
    again = Gemma2.from_pretrained(tmp_path / "packed", torch.bfloat16)
    ids = tiny.random_ids(model.config, 1, 7)
    assert torch.equal(model(ids), again(ids))
    assert again.to(torch.float32).embed_tokens.weight.scales.dtype == torch.bfloat16


def test_shards_and_an_output_matrix(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "plain")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantize_checkpoint(folder, tmp_path / "packed", "int4")
    assert "lm_head.weight" not in load_file(tmp_path / "packed" / "model.safetensors")
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"tensor lm_head\.weight must equal"):
        quantize_checkpoint(folder, tmp_path / "other", "int4")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_memory_needed_is_what_is_taken(tmp_path: Path, format: Format) -> None:
    folder = folder_of(tmp_path / "plain", **SIZES[1])
    config = Gemma2Config.from_pretrained(folder)
    weights = load_checkpoint(folder, config, quantize=format)
    taken = sum(-(-t.nbytes // 64) * 64 for t in Gemma2(config, weights).state_dict().values())
    assert memory_needed(config, torch.bfloat16, format) == taken
    big = Gemma2Config.gemma2_27b()
    bits = 8 * memory_needed(big, torch.bfloat16, format) / big.num_parameters
    assert bits == pytest.approx(8.5 if format == "int8" else 4.5, abs=0.01)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_is_refused_by_name(tmp_path: Path, value: float) -> None:
    folder = folder_of(tmp_path / "plain")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][7, 5] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    match = (
        rf"model\.safetensors: tensor model\.layers\.1\.mlp\.up_proj\.weight must be finite to be "
        rf"quantized, has {value} at \(7, 5\)"
    )
    with pytest.raises(ValueError, match=match):
        Gemma2.from_pretrained(folder, quantize="int8")
    with pytest.raises(ValueError, match=match):
        quantize_checkpoint(folder, tmp_path / "new" / "packed", "int8")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("step", ["first", "later", "rename", "weights"])
def test_interrupted_it_leaves_nothing_that_loads(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = folder_of(tmp_path / "plain"), tmp_path / "packed"
    calls = 0

    def interrupt(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if step in ("first", "rename") or calls == 5 or str(args[-1]).endswith("model.safetensors"):
            raise KeyboardInterrupt
        original(*args)

    owner, name = (packed, "quantize_into") if step in ("first", "later") else (os, "replace")
    original = getattr(owner, name)
    out.mkdir()
    monkeypatch.setattr(owner, name, interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(folder, out, "int4")
    monkeypatch.undo()
    assert "model.safetensors" not in os.listdir(out)
    assert not list(out.glob(".saving-*"))
    with pytest.raises((FileNotFoundError, ValueError)):
        Gemma2.from_pretrained(out)


def test_folders_that_are_refused(tmp_path: Path) -> None:
    folder, out = folder_of(tmp_path / "plain"), tmp_path / "packed"
    with pytest.raises(FileExistsError, match=r"plain: has a config\.json already; name a new"):
        quantize_checkpoint(folder, folder, "int4")
    quantize_checkpoint(folder, out, "int4")
    with pytest.raises(FileExistsError, match=r"packed: has a config\.json already"):
        quantize_checkpoint(folder, out, "int4")
    with pytest.raises(ValueError, match=r"packed: is packed already \(int4\)"):
        quantize_checkpoint(out, tmp_path / "again", "int8")
    with pytest.raises(ValueError, match="packed: is packed in int4, not in int8"):
        Gemma2.from_pretrained(out, quantize="int8")
    with pytest.raises(ValueError, match='quantize must be "int8" or "int4", got \'int2\''):
        Gemma2.from_pretrained(folder, quantize="int2")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        quantize_checkpoint(tmp_path / "nowhere", tmp_path / "again", "int8")
    assert not (tmp_path / "again").exists()


def test_a_full_disk_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path / "plain")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="the weights need") as caught:
        quantize_checkpoint(folder, tmp_path / "packed", "int8")
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks tensor model\.norm\.weight"),
        (
            lambda t: t.pop("model.layers.0.o_proj.weight.scales"),
            r"lacks tensor model\.layers\.0\.o_proj\.weight\.scales",
        ),
        (
            lambda t: t.update({"model.layers.0.o_proj.weight.data": torch.zeros(3, 3).byte()}),
            r"tensor model\.layers\.0\.o_proj\.weight\.data must have shape .* got \(3, 3\)",
        ),
        (
            lambda t: t.update(
                {"model.norm.weight": t["model.norm.weight"].to(torch.float64).to(torch.int8)}
            ),
            r"tensor model\.norm\.weight must be of F32, BF16, F16, got I8",
        ),
        (
            lambda t: t.update(
                {"model.embed_tokens.weight.scales": t["model.embed_tokens.weight.scales"].half()}
            ),
            r"tensor model\.embed_tokens\.weight\.scales must be of I8, got F16",
        ),
        (
            lambda t: t.update({"model.embed_tokens.weight.data": torch.zeros(1, 1)}),
            r"tensor model\.embed_tokens\.weight\.data must be of I8 or U8, got F32",
        ),
    ],
)
def test_broken_files(tmp_path: Path, change: Any, match: str) -> None:
    quantize_checkpoint(folder_of(tmp_path / "plain"), tmp_path / "packed", "int4")
    path = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises((ValueError, TypeError), match=match):
        Gemma2.from_pretrained(tmp_path / "packed")


def test_weights_that_do_not_fit_each_other() -> None:
    config = tiny.small_config()
    weights: dict[str, Any] = dict(random_weights(config, torch.float32))
    name = "layers.0.o_proj.weight"
    mixed = {**weights, name: ops.quantize(weights[name], "int4")}
    with pytest.raises(ValueError, match="must be int4 like the others, got a tensor"):
        Gemma2(config, mixed)
    quantized = {n: w if w.dim() == 1 else ops.quantize(w, "int8") for n, w in weights.items()}
    with pytest.raises(ValueError, match="must be .* like the others, got int"):
        Gemma2(config, {**quantized, name: mixed[name]})
    wide = ops.quantize(torch.zeros(3, 3), "int8")
    with pytest.raises(ValueError, match=r"o_proj\.weight must have shape"):
        Gemma2(config, {**quantized, name: wide})
    assert list(parameter_shapes(config)) == list(quantized)
