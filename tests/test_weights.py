"""Checkpoints: read as safetensors wrote them, written so that transformers reads them, refused
where anything is wrong with them."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import mmap
import os
import pickle
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from common import DTYPES
from gemma2_ext import Gemma2, Gemma2Config, weights
from gemma2_ext.weights import (
    available_memory,
    load_weights,
    memory_needed,
    parameter_shapes,
    parse_header,
    random_weights,
    save_weights,
    stored_dtype,
)

# No tensor is a multiple of 64 bytes, so that every one needs its own alignment.
CONFIG = Gemma2Config(
    vocab_size=37,
    hidden_size=12,
    intermediate_size=13,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
LAYER = {
    "self_attn.q_proj": (32, 12),
    "self_attn.k_proj": (16, 12),
    "self_attn.v_proj": (16, 12),
    "self_attn.o_proj": (12, 32),
    "mlp.gate_proj": (13, 12),
    "mlp.up_proj": (13, 12),
    "mlp.down_proj": (12, 13),
    "input_layernorm": (12,),
    "post_attention_layernorm": (12,),
    "pre_feedforward_layernorm": (12,),
    "post_feedforward_layernorm": (12,),
}
SHAPES = {
    "model.embed_tokens.weight": (37, 12),
    **{f"model.layers.{i}.{name}.weight": shape for i in (0, 1) for name, shape in LAYER.items()},
    "model.norm.weight": (12,),
}
NAMES = list(SHAPES)
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8, "I8": 1, "I16": 2}

Entries = dict[str, dict[str, Any]]


def make_tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A checkpoint's tensors, with numbers of every size that float16 holds."""
    return {
        name: (torch.randn(shape) * torch.randn(shape).mul(4).exp2()).to(dtype)
        for name, shape in SHAPES.items()
    }


def fused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint's tensors are in memory: q, k, v and gate, up one after another."""
    get = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    result = {"embed_tokens.weight": get["embed_tokens.weight"], "norm.weight": get["norm.weight"]}
    for i in range(2):
        layer = {name: get[f"layers.{i}.{name}.weight"] for name in LAYER}
        qkv = [layer.pop(f"self_attn.{x}_proj") for x in "qkv"]
        gate_up = [layer.pop(f"mlp.{x}_proj") for x in ("gate", "up")]
        for name, tensor in layer.items():
            result[f"layers.{i}.{name.split('.')[-1]}.weight"] = tensor
        result[f"layers.{i}.qkv_proj.weight"] = torch.cat(qkv)
        result[f"layers.{i}.gate_up_proj.weight"] = torch.cat(gate_up)
    return result


def write(folder: Path, tensors: Mapping[str, Tensor], shards: int = 1) -> None:
    """A checkpoint by safetensors' own writer; neighbours in the model are in other shards."""
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        part = {name: tensors[name] for name in list(tensors)[i::shards]}
        shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, shard))
    write_index(folder, weight_map)


def write_index(folder: Path, weight_map: Any) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def assert_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same tensors to the bit."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8)), name


def assert_refused(folder: Path, kind: type[BaseException], match: str, **options: Any) -> None:
    """That loading fails by exactly this kind of error, in one line, and leaves nothing behind."""
    descriptors = os.listdir("/proc/self/fd")
    with pytest.raises(kind, match=match) as info:
        load_weights(folder, CONFIG, **options)
    assert type(info.value) is kind
    assert "\n" not in str(info.value)
    assert os.listdir("/proc/self/fd") == descriptors
    assert not any(thread.name == "load_weights" for thread in threading.enumerate())


# What is right is read right


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("shards", [1, 2, 5, len(NAMES)])
def test_loads_what_safetensors_wrote(
    tmp_path: Path, shards: int, prefix: str, dtype: torch.dtype
) -> None:
    tensors = {
        prefix + name.removeprefix("model."): tensor for name, tensor in make_tensors(dtype).items()
    }
    write(tmp_path, tensors, shards)
    assert_equal(load_weights(str(tmp_path), CONFIG), fused(tensors))
    assert stored_dtype(tmp_path, CONFIG) == dtype


@pytest.mark.parametrize("read_bytes", [8, 100, 8 << 20])
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_conversion(
    tmp_path: Path,
    stored: torch.dtype,
    target: torch.dtype,
    read_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pieces of any length too, which do not end where rows do."""
    monkeypatch.setattr(weights, "READ_BYTES", read_bytes)
    tensors = make_tensors(stored)
    write(tmp_path, tensors, 3)
    expected = fused({name: tensor.to(target) for name, tensor in tensors.items()})
    assert_equal(load_weights(tmp_path, CONFIG, dtype=target), expected)


def test_mixed_dtypes(tmp_path: Path) -> None:
    tensors = make_tensors()
    norm = "model.layers.1.input_layernorm.weight"
    tensors[norm] = tensors[norm].bfloat16()
    write(tmp_path, tensors)
    assert_refused(
        tmp_path,
        TypeError,
        "model.safetensors: tensor .* is (F32|BF16), .* is (BF16|F32): say which dtype is wanted",
    )
    with pytest.raises(TypeError, match="say which dtype is wanted"):
        stored_dtype(tmp_path, CONFIG)
    loaded = load_weights(tmp_path, CONFIG, dtype=torch.bfloat16)
    assert_equal(loaded, fused({name: tensor.bfloat16() for name, tensor in tensors.items()}))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_overflow_to_float16(tmp_path: Path, stored: torch.dtype) -> None:
    tensors = make_tensors(stored)
    norm = tensors["model.layers.1.mlp.up_proj.weight"]
    norm[3, 4] = -65280.0  # what both dtypes hold
    norm[2] = torch.inf  # are in the file: none of our doing
    norm[1] = torch.nan
    write(tmp_path, tensors)
    loaded = load_weights(tmp_path, CONFIG, dtype=torch.float16)
    rows = loaded["layers.1.gate_up_proj.weight"][13:]
    assert torch.equal(rows[2:], norm[2:].half()) and rows[1].isnan().all()
    norm[3, 4] = -70000.0
    norm[1:3] = 0
    write(tmp_path, tensors)
    assert_refused(
        tmp_path,
        ValueError,
        r"model.safetensors: tensor model.layers.1.mlp.up_proj.weight has values past float16's "
        r"range \(65504\): (7e|6.989e|7.014e)\+04",
        dtype=torch.float16,
    )


def test_largest_float16(tmp_path: Path) -> None:
    tensors = make_tensors()
    tensors["model.norm.weight"][0] = 65519.0  # rounds to 65504; 65520 does not
    write(tmp_path, tensors)
    assert load_weights(tmp_path, CONFIG, dtype=torch.float16)["norm.weight"][0] == 65504
    tensors["model.norm.weight"][0] = 65520.0
    write(tmp_path, tensors)
    assert_refused(tmp_path, ValueError, "model.norm.weight has values past", dtype=torch.float16)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_output_matrix(tmp_path: Path, shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "READ_BYTES", 100)
    tensors = make_tensors()
    embedding = tensors["model.embed_tokens.weight"]
    write(tmp_path, {**tensors, "lm_head.weight": embedding.clone()}, shards)
    assert_equal(load_weights(tmp_path, CONFIG), fused(tensors))
    assert stored_dtype(tmp_path, CONFIG) == torch.float32
    match = "safetensors: tensor lm_head.weight must equal model.embed_tokens.weight, and does not"
    other = embedding.clone()
    other[-1, -1] += 1
    for different in (other, embedding.bfloat16()):
        write(tmp_path, {**tensors, "lm_head.weight": different}, shards)
        assert_refused(tmp_path, ValueError, match)
    write(tmp_path, {**tensors, "lm_head.weight": embedding.T.contiguous()}, shards)
    match = r"lm_head.weight must have shape \(37, 12\) by the configuration, got \(12, 37\)"
    assert_refused(tmp_path, ValueError, match)


def test_place_in_memory(tmp_path: Path) -> None:
    for dtype in DTYPES:
        write(tmp_path, make_tensors(dtype))
        loaded = load_weights(tmp_path, CONFIG)
        position = loaded["embed_tokens.weight"].data_ptr()
        assert position % (2 << 20) == 0  # a huge page
        begin = position
        for name, shape in parameter_shapes(CONFIG).items():
            assert loaded[name].data_ptr() == position, name
            assert loaded[name].shape == shape and loaded[name].is_contiguous()
            position += math.ceil(math.prod(shape) * dtype.itemsize / 64) * 64
        assert position - begin == memory_needed(CONFIG, dtype)
    assert memory_needed(Gemma2Config.gemma2_9b(), torch.float32) == 4 * 9241705984


def test_tensors_outlive_each_other(tmp_path: Path) -> None:
    tensors = make_tensors()
    write(tmp_path, tensors)
    norm = load_weights(tmp_path, CONFIG)["norm.weight"]
    gc.collect()
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(norm, tensors["model.norm.weight"])
    norm.zero_()  # the memory is this process's own


def test_links_are_followed(tmp_path: Path) -> None:
    """Downloads lie in a folder of links."""
    tensors = make_tensors()
    for folder in ("blobs", "snapshot"):
        (tmp_path / folder).mkdir()
    write(tmp_path / "blobs", tensors, 2)
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{path.name}")
    assert_equal(load_weights(tmp_path / "snapshot", CONFIG), fused(tensors))


def test_single_file_comes_before_an_index(tmp_path: Path) -> None:
    write(tmp_path, make_tensors(), 2)
    tensors = make_tensors()
    write(tmp_path, tensors)
    assert_equal(load_weights(tmp_path, CONFIG), fused(tensors))


def test_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, make_tensors(), 2)
    load_weights(tmp_path, CONFIG)
    assert capsys.readouterr() == ("", "")
    load_weights(tmp_path, CONFIG, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    size = sum(math.prod(shape) * 4 for shape in SHAPES.values())
    assert re.search(rf"weights: 100%.* {size / 1024:.1f}k/{size / 1024:.1f}k ", err)


def test_random_weights() -> None:
    config = dataclasses.replace(CONFIG, vocab_size=30000, hidden_size=100)
    made = random_weights(config, torch.bfloat16)
    assert {name: tuple(t.shape) for name, t in made.items()} == parameter_shapes(config)
    matrix, norm = made["embed_tokens.weight"], made["norm.weight"]
    assert matrix.dtype == torch.bfloat16
    assert matrix.float().std().item() == pytest.approx(0.1, rel=0.01)
    assert norm.float().std().item() == pytest.approx(0.05, rel=0.3)
    assert len({tuple(row) for row in matrix[:, :4].tolist()}) == 30000
    assert_equal(random_weights(config, torch.bfloat16), made)
    other = random_weights(config, torch.bfloat16, seed=1)
    assert not torch.equal(other["norm.weight"], norm)


# Writing, and transformers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard_bytes", [5 << 30, 2000, 1])
def test_round_trip(tmp_path: Path, shard_bytes: int, dtype: torch.dtype) -> None:
    tensors = make_tensors(dtype)
    folder = tmp_path / "new" / "folder"
    save_weights(folder, fused(tensors), CONFIG, shard_bytes=shard_bytes)
    files = sorted(os.listdir(folder))
    if shard_bytes == 5 << 30:
        assert files == ["model.safetensors"]
    else:
        assert files.pop() == "model.safetensors.index.json"
        count = len(files)
        assert files == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        assert count == len(SHAPES) or shard_bytes > 1
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert set(index["weight_map"].values()) == set(files)
    stored: dict[str, Tensor] = {}
    for name in files:
        part = load_file(folder / name)
        assert not part.keys() & stored.keys()
        assert len(part) == 1 or sum(t.nbytes for t in part.values()) <= shard_bytes
        stored.update(part)
        header_bytes = int.from_bytes((folder / name).read_bytes()[:8], "little")
        assert (8 + header_bytes) % 64 == 0  # whoever maps the file finds its tensors aligned
    assert_equal(stored, tensors)
    assert_equal(load_weights(folder, CONFIG), fused(tensors))


@pytest.mark.parametrize("shard_bytes", [5 << 30, 3000])
def test_transformers_reads_ours(tmp_path: Path, shard_bytes: int) -> None:
    from transformers import AutoModelForCausalLM

    tensors = {name: tensor.clamp(-1, 1) for name, tensor in make_tensors().items()}
    CONFIG.save_pretrained(tmp_path)
    save_weights(tmp_path, fused(tensors), CONFIG, shard_bytes=shard_bytes)
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not any(report.values()), report
    state = theirs.state_dict()
    assert torch.equal(state.pop("lm_head.weight"), tensors["model.embed_tokens.weight"])
    assert_equal(state, tensors)
    ids = torch.randint(0, 37, (2, 9))
    ours = Gemma2(CONFIG, load_weights(tmp_path, CONFIG))
    with torch.no_grad():
        expected = theirs(ids).logits
    torch.testing.assert_close(ours(ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_shard_size", ["5GB", "3KB"])
def test_reads_what_transformers_writes(
    tmp_path: Path, max_shard_size: str, dtype: torch.dtype
) -> None:
    from transformers import Gemma2Config as Theirs
    from transformers import Gemma2ForCausalLM, Gemma2Model

    for kind, prefix in ((Gemma2ForCausalLM, ""), (Gemma2Model, "model.")):
        theirs = kind(Theirs(**CONFIG.to_dict())).to(dtype)
        folder = tmp_path / kind.__name__
        theirs.save_pretrained(folder, max_shard_size=max_shard_size)
        assert (len(list(folder.glob("*.safetensors"))) > 1) == (max_shard_size == "3KB")
        config = Gemma2Config.from_pretrained(folder)
        assert config == CONFIG
        state = {prefix + name: tensor for name, tensor in theirs.state_dict().items()}
        state.pop("lm_head.weight", None)
        assert state.keys() == SHAPES.keys()
        assert_equal(load_weights(folder, config), fused(state))


def test_save_takes_any_layout_and_parameters(tmp_path: Path) -> None:
    expected = fused(make_tensors())
    given = {name: torch.nn.Parameter(t.clone()) for name, t in expected.items()}
    wide = torch.zeros(37, 30)
    wide[:, 3:15] = expected["embed_tokens.weight"]
    given["embed_tokens.weight"] = wide[:, 3:15]
    down = expected["layers.0.down_proj.weight"]
    given["layers.0.down_proj.weight"] = down.T.contiguous().T
    save_weights(tmp_path, given, CONFIG)
    assert_equal(load_weights(tmp_path, CONFIG), expected)


def test_save_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = fused(make_tensors())

    def refused(given: Mapping[str, Tensor], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            save_weights(tmp_path / "new", given, CONFIG)
        assert not (tmp_path / "new").exists()

    norm = good["norm.weight"]
    refused({n: t for n, t in good.items() if n != "norm.weight"}, "norm.weight is missing")
    refused({**good, "lm_head.weight": norm}, "lm_head.weight is not a weight of this model")
    refused({**good, "norm.weight": norm[1:]}, r"norm.weight must have shape \(12,\), got \(11,\)")
    refused({**good, "norm.weight": norm.half()}, "all the same, got torch.float16, torch.float32")
    refused({n: t.double() for n, t in good.items()}, "must be float32, .*, got torch.float64")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30, 512))  # type: ignore[attr-defined]
        with pytest.raises(OSError, match="the weights need 0.00 GiB, 0.00 GiB are free"):
            save_weights(tmp_path, good, CONFIG)
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="/file"):
        save_weights(tmp_path / "file", good, CONFIG)


SHARD_BYTES = {1: 5 << 30, 3: 6000}


class Killed(BaseException):
    pass


@contextmanager
def interrupted_at(step: int, action: Callable[[], None]) -> Iterator[None]:
    """Runs action just before the step-th time that the file system is told something."""
    done = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done == step:
                action()
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", counted(os.fsync))
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        yield


def save_in_a_process_killed_at(step: int, folder: Path, tensors: Any, shards: int) -> bool:
    """Returns whether the process lived to the end."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with interrupted_at(step, lambda: os._exit(2)):
                save_weights(folder, tensors, CONFIG, shard_bytes=SHARD_BYTES[shards])
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 2)
    return status == 0


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "interrupted"])
@pytest.mark.parametrize("new_shards", [1, 3])
@pytest.mark.parametrize("old_shards", [1, 3])
def test_interrupted_save(tmp_path: Path, old_shards: int, new_shards: int, killed: bool) -> None:
    """At every step: the old checkpoint, or the new one."""
    old, new = fused(make_tensors()), fused(make_tensors())
    states = ""
    for step in range(1, 100):
        folder = tmp_path / str(step)
        save_weights(folder, old, CONFIG, shard_bytes=SHARD_BYTES[old_shards])
        assert len(list(folder.glob("*.safetensors"))) == old_shards
        if killed:
            finished = save_in_a_process_killed_at(step, folder, new, new_shards)
        else:

            def interrupt() -> None:
                raise Killed

            try:
                with interrupted_at(step, interrupt):
                    save_weights(folder, new, CONFIG, shard_bytes=SHARD_BYTES[new_shards])
                finished = True
            except Killed:
                finished = False
            assert not list(folder.glob(".*"))
        loaded = load_weights(folder, CONFIG)
        is_new = torch.equal(loaded["norm.weight"], new["norm.weight"])
        assert_equal(loaded, new if is_new else old)
        states += "n" if is_new else "o"
        if finished:
            break
    assert re.fullmatch("ooo+n+", states), states
    assert len(list(folder.iterdir())) == (1 if new_shards == 1 else 4)
    # After whatever befell it, the next one succeeds.
    for number in range(1, step):
        folder = tmp_path / str(number)
        save_weights(folder, old, CONFIG, shard_bytes=SHARD_BYTES[old_shards])
        assert_equal(load_weights(folder, CONFIG), old)
        assert len(list(folder.iterdir())) == (1 if old_shards == 1 else 4)


def test_interrupted_first_save(tmp_path: Path) -> None:
    for step in (1, 6):
        assert not save_in_a_process_killed_at(step, tmp_path, fused(make_tensors()), 3)
        match = "has .*neither model.safetensors nor model.safetensors.index.json"
        assert_refused(tmp_path, FileNotFoundError, match)
    assert_refused(tmp_path, FileNotFoundError, "the download or the saving was not completed")


# What is wrong is refused


def test_folder_errors(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere", FileNotFoundError, "nowhere: no such folder")
    (tmp_path / "file").touch()
    assert_refused(tmp_path / "file", NotADirectoryError, "file: not a folder")
    assert_refused(tmp_path, FileNotFoundError, ": has neither model.safetensors nor model.safe")
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    match = "has model-00001-of-00002.safetensors, but neither .* the download or the saving was"
    assert_refused(tmp_path, FileNotFoundError, match)


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "consolidated.00.pth", "model.ckpt", "pytorch_model.bin.index.json"],
)
def test_pickles_are_never_opened(tmp_path: Path, name: str) -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "harm",)

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Harmful()))
    assert_refused(
        folder,
        ValueError,
        rf"checkpoint: has only pickled weights \({name}\), .*"
        r"AutoModelForCausalLM.from_pretrained\('.*/checkpoint'\).save_pretrained\(OUT\)",
    )
    # Called what it is not, it is not opened either.
    (folder / name).rename(folder / "model.safetensors")
    assert_refused(folder, ValueError, "model.safetensors: not a safetensors file")
    assert not (tmp_path / "harm").exists()
    # Beside safetensors it does not matter.
    tensors = make_tensors()
    write(folder, tensors)
    (folder / name).touch()
    assert_equal(load_weights(folder, CONFIG), fused(tensors))


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "model.safetensors.index.json", "model-00001-of-00002.safetensors"],
)
def test_not_a_regular_file(tmp_path: Path, name: str) -> None:
    write(tmp_path, make_tensors(), 2)
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if name.endswith("2.safetensors"):
        assert_refused(tmp_path, FileNotFoundError, f"/{name}")
    path.symlink_to(tmp_path / "nowhere")
    assert_refused(tmp_path, FileNotFoundError, f"/{name}")
    path.unlink()
    path.mkdir()
    assert_refused(tmp_path, ValueError, f"/{name}: not a regular file")
    path.rmdir()
    os.mkfifo(path)
    assert_refused(tmp_path, ValueError, f"/{name}: not a regular file")
    path.unlink()
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    assert_refused(tmp_path, ValueError, f"/{name}: is a Git LFS pointer, .* `git lfs pull`")


def test_unreadable() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # any user may look around, unlike in pytest's own folder
        write(folder, make_tensors(), 2)
        for path in folder.iterdir():
            path.chmod(0o644)
        (folder / "model-00002-of-00002.safetensors").chmod(0)
        uid = os.geteuid()
        if uid == 0:  # root reads anything
            os.seteuid(65534)
        try:
            match = "Permission denied.*/model-00002-of-00002.safetensors"
            assert_refused(folder, PermissionError, match)
        finally:
            os.seteuid(uid)


Change = Callable[[dict[str, Tensor]], Any]
NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        (lambda t: t.pop(NORM), ValueError, ": lacks tensor model.norm.weight$"),
        (
            lambda t: [t.pop(name) for name in NAMES if "layers.1" in name],
            ValueError,
            r": lacks tensor model.layers.1.input_layernorm.weight and 10 more$",
        ),
        (
            lambda t: t.update({UP.replace("layers.1", "layers.2"): t[UP].clone()}),
            ValueError,
            "has tensor 'model.layers.2.mlp.up_proj.weight', which a Gemma 2 of 2 layers",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}),
            ValueError,
            "has tensor 'model.layers.0.self_attn.q_proj.bias', which a Gemma 2",
        ),
        (
            lambda t: t.update({"é\n": t[NORM] + 1}),
            ValueError,
            r"has tensor '\\xe9\\n', which a Gemma 2",
        ),
        (
            lambda t: t.update({"model.model.norm.weight": t[NORM].clone()}),
            ValueError,
            "has tensor 'model.model.norm.weight', which a Gemma 2",
        ),
        (
            lambda t: t.update({"norm.weight": t[NORM].clone()}),
            ValueError,
            r"has tensor '(model.)?norm.weight', which .*\.safetensors has too",
        ),
        (
            lambda t: t.update({NORM: torch.zeros(13)}),
            ValueError,
            r"tensor model.norm.weight must have shape \(12,\) by the configuration, got \(13,\)",
        ),
        (
            lambda t: t.update({UP: t[UP].T.contiguous()}),
            ValueError,
            rf"tensor {UP} must have shape \(13, 12\) by the configuration, got \(12, 13\)",
        ),
        (
            lambda t: t.update({UP: t[UP].view(-1)}),
            ValueError,
            rf"tensor {UP} must have shape \(13, 12\) by the configuration, got \(156,\)",
        ),
        (lambda t: t.update({NORM: torch.zeros(0)}), ValueError, r"got \(0,\)"),
        (lambda t: t.update({NORM: torch.zeros(())}), ValueError, r"got \(\)"),
        (
            lambda t: t.update({NORM: torch.zeros(12, dtype=torch.int8)}),
            TypeError,
            "tensor model.norm.weight must be of F32, BF16, F16, got I8",
        ),
        (
            lambda t: t.update({NORM: torch.zeros(12, dtype=torch.float64)}),
            TypeError,
            "tensor model.norm.weight must be of F32, BF16, F16, got F64",
        ),
        (
            lambda t: t.update({NORM: torch.zeros(12, dtype=torch.float8_e4m3fn)}),
            TypeError,
            "tensor model.norm.weight must be of F32, BF16, F16, got F8_E4M3",
        ),
    ],
)
def test_wrong_tensors(
    tmp_path: Path, change: Change, kind: type[Exception], match: str, shards: int
) -> None:
    tensors = make_tensors()
    change(tensors)
    write(tmp_path, tensors, shards)
    assert_refused(tmp_path, kind, f"^{tmp_path}.*{match}", dtype=torch.float32)


def test_another_configuration(tmp_path: Path) -> None:
    write(tmp_path, make_tensors())
    for changes, match in (
        ({"num_hidden_layers": 1}, "'model.layers.1.* which a Gemma 2 of 1 layers"),
        ({"num_hidden_layers": 3}, r"lacks tensor model.layers.2.input_layernorm.weight and 10 mo"),
        ({"vocab_size": 38}, r"embed_tokens.weight must have shape \(38, 12\) .*, got \(37, 12\)"),
        ({"num_key_value_heads": 4}, r"k_proj.weight must have shape \(32, 12\) .* \(16, 12\)"),
    ):
        config = dataclasses.replace(CONFIG, **{"layer_types": None, **changes})
        with pytest.raises(ValueError, match=match):
            load_weights(tmp_path, config)


def test_wrong_dtype_argument(tmp_path: Path) -> None:
    for dtype in (torch.float64, torch.int8, "float32"):
        match = f"dtype must be float32, bfloat16 or float16, got {dtype!r}"
        assert_refused(tmp_path, TypeError, match, dtype=dtype)


# Index and shards

SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.pop(NAMES[0]), rf"{SHARD_1}: has tensor '{NAMES[0]}', which .*json has not"),
        (
            lambda m: m.update({NAMES[0]: SHARD_2}),
            rf"index.json: says that {SHARD_2} has tensor '{NAMES[0]}'; it has not",
        ),
        (
            lambda m: m.update({"extra": SHARD_1}),
            rf"index.json: says that {SHARD_1} has tensor 'extra'; it has not",
        ),
        *(
            (
                lambda m, bad=bad: m.update({NAMES[0]: bad}),
                rf"index.json: weight_map\['{NAMES[0]}'\] must name a .safetensors file in the "
                rf"folder, got {shown}",
            )
            for bad, shown in (
                (f"../{SHARD_1}", r"'\.\./model"),
                (f"/etc/{SHARD_1}", "'/etc/"),
                (f"a\\{SHARD_1}", r"'a\\\\"),
                (f"a\0{SHARD_1}", r"'a\\x00"),
                (f"a\n{SHARD_1}", r"'a\\n"),
                (f"\ud800{SHARD_1}", r"'\\ud800"),
                ("pytorch_model-00001-of-00002.bin", "'pytorch_model"),
                (".safetensors", r"'\.safetensors'"),
                ("", "''"),
                (None, "None"),
                (1, "1"),
                ([SHARD_1], r"\['model"),
            )
        ),
    ],
)
def test_index_and_shards_disagree(tmp_path: Path, change: Any, match: str) -> None:
    tensors = make_tensors()
    write(tmp_path, tensors, 2)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    change(weight_map)
    write_index(tmp_path, weight_map)
    assert_refused(tmp_path, ValueError, match)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    tensors = make_tensors()
    write(tmp_path, tensors, 2)
    part = load_file(tmp_path / SHARD_2)
    save_file({**part, NAMES[0]: tensors[NAMES[0]]}, tmp_path / SHARD_2)
    match = f"{SHARD_2}: has tensor '{NAMES[0]}', which .*index.json has in {SHARD_1}"
    assert_refused(tmp_path, ValueError, match)


def test_shards_that_are_not_there(tmp_path: Path) -> None:
    write(tmp_path, make_tensors(), 2)
    (tmp_path / SHARD_2).unlink()
    assert_refused(tmp_path, FileNotFoundError, f"/{SHARD_2}")
    write_index(tmp_path, {NAMES[0]: "x" * 300 + ".safetensors"})
    assert_refused(tmp_path, OSError, "File name too long.*/xxx")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{}", "weight_map must map tensors to files, got None"),
        ('{"weight_map": {}}', "weight_map must map tensors to files, got {}"),
        ('{"weight_map": ["a"]}', r"weight_map must map tensors to files, got \['a'\]"),
        ("[]", "must hold a JSON object"),
        ("", "not valid JSON"),
        (f'{{"weight_map": {{"a": "{SHARD_1}", "a": "{SHARD_2}"}}}}', "'a' stands there twice"),
    ],
)
def test_broken_index(tmp_path: Path, text: str, match: str) -> None:
    write(tmp_path, make_tensors(), 2)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert_refused(tmp_path, ValueError, f"/model.safetensors.index.json: .*{match}")


# Files that are not valid safetensors


def entries(dtype: str = "F32") -> Entries:
    """A correct header."""
    header, offset = {}, 0
    for name, shape in SHAPES.items():
        nbytes = math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + nbytes],
        }
        offset += nbytes
    return header


DATA_BYTES = 4 * sum(map(math.prod, SHAPES.values()))


def with_header(header: Any, data_bytes: int = DATA_BYTES) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data_bytes)


def refuse_file(folder: Path, content: bytes, match: str) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert_refused(folder, ValueError, f"/model.safetensors: .*{match}")


def test_a_header_by_hand_is_accepted(tmp_path: Path) -> None:
    """So that what the next tests refuse is refused for what they changed."""
    spaced = b" " + json.dumps({"__metadata__": {"a": "b"}, **entries()}).encode() + b" \n "
    for content in (with_header(entries()), with_header(spaced)):
        (tmp_path / "model.safetensors").write_bytes(content)
        assert not any(tensor.any() for tensor in load_weights(tmp_path, CONFIG).values())


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is truncated: must be at least 8 bytes, is 0"),
        (b"\x08\0\0\0\0\0\0", "is truncated: must be at least 8 bytes, is 7"),
        (bytes(8), "header: not valid JSON"),
        (bytes(1000), "header: not valid JSON"),
        (b"\xff" * 100, r"say that the header has 18446744073709551615 bytes, more than the file"),
        (b"To be, or not to be", r"not a safetensors file, or truncated: its first 8 bytes say"),
        (b"\x01" + bytes(7), r"the header has 1 bytes, more than the file \(8\) or the limit"),
        (with_header(b"\xff" * 9), r"header: not UTF-8 \(byte 0\)"),
        (with_header(b'{"a": }'), "header: not valid JSON"),
        (with_header(b"{" + b"}" * 30), "header: not valid JSON"),
        (with_header(b"[" * 99_999), "header: not valid JSON: nested too deeply"),
        (with_header([]), r"header: must hold a JSON object, got \[\]"),
        (with_header({}), "has bytes after its last tensor: must be 10 bytes by its header, is"),
        (with_header({}, 0), "lacks tensor model.embed_tokens.weight and 23 more"),
        (
            with_header(
                json.dumps(entries()).encode().replace(b'"model.layers.1.', b'"model.layers.0.')
            ),
            "header: .*field 'model.layers.0..*' stands there twice",
        ),
        (with_header(entries(), DATA_BYTES - 1), r"is truncated: must be \d+ bytes by its header"),
        (with_header(entries(), 0), r"is truncated: must be \d+ bytes by its header, is \d+"),
        (
            with_header(entries(), DATA_BYTES + 1),
            r"has bytes after its last tensor: must be \d+ byt",
        ),
        (with_header({"__metadata__": 1, **entries()}), "__metadata__ must map .* strings, got 1"),
        (
            with_header({"__metadata__": {"a": 1}, **entries()}),
            "__metadata__ must map names to str",
        ),
        (
            with_header({"__metadata__": None, **entries()}),
            "__metadata__ must map names to strings",
        ),
    ],
    ids=range(21),
)
def test_broken_file(tmp_path: Path, content: bytes, match: str) -> None:
    refuse_file(tmp_path, content, match)


def test_every_truncation(tmp_path: Path) -> None:
    content = save(make_tensors())
    for size in (*range(0, 200, 7), *range(200, len(content), 331), len(content) - 1):
        refuse_file(tmp_path, content[:size], "truncated")
    refuse_file(tmp_path, content + b"\0", "has bytes after its last tensor")
    refuse_file(tmp_path, content + content, "has bytes after its last tensor")


def test_a_header_past_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((100_000_001).to_bytes(8, "little") + b"{}")
    os.truncate(path, 1 << 33)  # takes no room on the disk
    assert_refused(tmp_path, ValueError, r"100000001 bytes, more than .* limit \(100000000\)")


FIRST, SECOND = NAMES[:2]
BAD_ENTRIES: list[tuple[str, str, Any, str]] = [
    (FIRST, "dtype", "F33", "dtype must be of BOOL.*F64, got 'F33'"),
    (FIRST, "dtype", 32, "dtype must be of .*, got 32"),
    (FIRST, "dtype", ["F32"], r"dtype must be of .*, got \['F32'\]"),
    (FIRST, "dtype", "BF16", r"data_offsets must span 888 bytes for shape \[37, 12\] of BF16"),
    (FIRST, "shape", [37, 13], r"data_offsets must span 1924 bytes for shape \[37, 13\] of F32"),
    (FIRST, "shape", [], r"data_offsets must span 4 bytes for shape \[\]"),
    (FIRST, "shape", 444, "shape must be a list of at most 8 non-negative integers, got 444"),
    (FIRST, "shape", [37.0, 12], "shape must be a list of at most 8 non-negative integers"),
    (FIRST, "shape", [True, 444], "shape must be a list of at most 8 non-negative integers"),
    (FIRST, "shape", [-37, -12], "shape must be a list of at most 8 non-negative integers"),
    (FIRST, "shape", [444] + [1] * 8, "shape must be a list of at most 8 non-negative integers"),
    (FIRST, "shape", [1 << 63, 0], "shape must be a list of at most 8 non-negative integers"),
    (FIRST, "shape", [2**62] * 8, r"data_offsets must span \d{150} bytes for shape"),
    (FIRST, "shape", None, "shape must be a list of at most 8 non-negative integers, got None"),
    (FIRST, "data_offsets", [0], r"data_offsets must be \[begin, end\], got \[0\]"),
    (FIRST, "data_offsets", [], r"data_offsets must be \[begin, end\], got \[\]"),
    (FIRST, "data_offsets", [1776, 0], r"data_offsets must be \[begin, end\], got \[1776, 0\]"),
    (FIRST, "data_offsets", [0, 888, 1776], "data_offsets must be a list of at most 2 non-neg"),
    (FIRST, "data_offsets", [-1776, 0], "data_offsets must be a list of at most 2 non-negative"),
    (FIRST, "data_offsets", "0, 1776", "data_offsets must be a list of at most 2 non-negative"),
    (FIRST, "data_offsets", [0, 1e99], "data_offsets must be a list of at most 2 non-negative"),
    (FIRST, "data_offsets", [0, 1775], "data_offsets must span 1776 bytes .*, got 1775"),
    (FIRST, "data_offsets", [0, 2**62], "data_offsets must span 1776 bytes"),
    (SECOND, "data_offsets", [0, 1536], r"overlaps .*: data_offsets must begin at \d+, got 0"),
    (
        SECOND,
        "data_offsets",
        [1775, 3311],
        "overlaps tensor .*data_offsets must begin at 1776, got",
    ),
    (SECOND, "data_offsets", [1777, 3313], "leaves a gap after tensor .*begin at 1776, got 1777"),
    (SECOND, "data_offsets", [2**61, 2**61 + 1536], r"leaves a gap after tensor .* begin at 1776"),
]


@pytest.mark.parametrize(("name", "field", "value", "match"), BAD_ENTRIES)
def test_broken_entry(tmp_path: Path, name: str, field: str, value: Any, match: str) -> None:
    header = entries()
    header[name][field] = value
    refuse_file(tmp_path, with_header(header), match)


def test_broken_entries(tmp_path: Path) -> None:
    where = rf"tensor '{FIRST}' must have dtype, shape and data_offsets, got"
    for bad in (None, 1, [], "F32", {}, {**entries()[FIRST], "strides": [12, 1]}):
        refuse_file(tmp_path, with_header({**entries(), FIRST: bad}), where)
    for field in entries()[FIRST]:
        header = entries()
        del header[FIRST][field]
        refuse_file(tmp_path, with_header(header), where)
    header = entries()
    del header[FIRST]
    match = "leaves a gap after the header: data_offsets must begin at 0, got 1776"
    refuse_file(tmp_path, with_header(header), match)


def test_nesting_up_to_what_the_parser_bears() -> None:
    limit = sys.getrecursionlimit()
    for depth in range(limit - 150, limit + 10):
        header = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
        with pytest.raises(ValueError, match="^x: .*(nested too deeply|must have dtype)"):
            parse_header(Path("x"), header, 0)


# While it is read


def test_memory_is_checked_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = make_tensors()
    read = 0
    real = weights.SafetensorsFile.read_into

    def counted(self: Any, target: memoryview, offset: int) -> None:
        nonlocal read
        read += len(target)
        real(self, target, offset)

    monkeypatch.setattr(weights.SafetensorsFile, "read_into", counted)
    needed = memory_needed(CONFIG, torch.float32) + weights.SPARE_BYTES
    # Even where there is an output matrix to compare with the embedding.
    for more in ({}, {"lm_head.weight": tensors[FIRST].clone()}):
        write(tmp_path, {**tensors, **more})
        header = 8 + int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
        for available, fits in ((needed, True), (None, True), (needed - 1, False), (0, False)):
            monkeypatch.setattr(weights, "available_memory", lambda n=available: n)
            read = 0
            if fits:
                load_weights(tmp_path, CONFIG)
                continue
            match = r"0.00 billion weights in float32 need 0.06 GiB of memory, 0.0\d GiB are avail"
            assert_refused(tmp_path, MemoryError, match)
            assert read < header + 64
    with pytest.raises(MemoryError, match="billion weights in bfloat16 need"):
        random_weights(CONFIG)


def test_the_system_refuses_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    # More than a process has addresses.
    config = dataclasses.replace(
        CONFIG, vocab_size=1 << 24, hidden_size=1 << 20, intermediate_size=1 << 22
    )
    monkeypatch.setattr(weights, "available_memory", lambda: None)
    with pytest.raises(MemoryError, match=r"^the system refuses \d+\.\d\d GiB for the weights: "):
        random_weights(config, torch.float32)


@pytest.mark.parametrize("shards", [1, 3])
def test_errors_while_reading(tmp_path: Path, shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process at work on the files; no thread and no descriptor stays behind."""
    monkeypatch.setattr(weights, "READ_BYTES", 64)
    write(tmp_path, make_tensors(), shards)
    path = sorted(tmp_path.glob("*.safetensors"))[-1]
    content = path.read_bytes()
    size = len(content)
    real = weights._read_piece
    pieces = 0

    def meddled(meddle: Callable[[], Any]) -> Any:
        def read_piece(*args: Any) -> int:
            nonlocal pieces
            pieces += 1
            if pieces == 9:
                meddle()
            return real(*args)

        return read_piece

    def rewrite() -> None:
        with open(path, "r+b") as file:
            file.write(content)
            file.truncate()

    for meddle, match in (
        (rewrite, f"{path.name}: changed while it was read"),
        (
            lambda: os.truncate(path, size - 9),
            f"{path.name}: ends at byte {size - 9}, was {size} b",
        ),
        (lambda: os.truncate(path, size + 9), f"{path.name}: changed while it was read"),
    ):
        rewrite()
        os.utime(path, (1, 1))  # the clock of files is coarse
        pieces = 0
        monkeypatch.setattr(weights, "_read_piece", meddled(meddle))
        assert_refused(tmp_path, OSError, match)
    monkeypatch.setattr(weights, "_read_piece", real)
    rewrite()
    load_weights(tmp_path, CONFIG)


def test_a_replaced_file_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is open stays as it was."""
    monkeypatch.setattr(weights, "READ_BYTES", 64)
    tensors = make_tensors()
    save_weights(tmp_path, fused(tensors), CONFIG)
    real, other = weights._read_piece, fused(make_tensors())
    saved = threading.Lock()

    def read_piece(*args: Any) -> int:
        if saved.acquire(blocking=False):
            save_weights(tmp_path, other, CONFIG, shard_bytes=1)
        return real(*args)

    monkeypatch.setattr(weights, "_read_piece", read_piece)
    assert_equal(load_weights(tmp_path, CONFIG), fused(tensors))
    assert_equal(load_weights(tmp_path, CONFIG), other)


def test_interrupted_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def bar(*_: Any) -> Iterator[Callable[[int], None]]:
        def update(done: int) -> None:
            raise KeyboardInterrupt

        yield update

    write(tmp_path, make_tensors(), 3)
    monkeypatch.setattr(weights, "progress_bar", bar)
    assert_refused(tmp_path, KeyboardInterrupt, "^$")


# Memory of the machine and of its control groups


def tree(folder: Path, files: Mapping[str, object]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


MEMINFO = (
    "MemTotal:       4000 kB\nMemFree:        1000 kB\nMemAvailable:   3000 kB\nSwapFree: 9 kB"
)
LINE_V1 = "9:cpu,cpuacct:/x\n5:foo,memory:/outer/inner\n1:name=systemd:/outer/inner"
NO_LIMIT = 9223372036854771712


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/meminfo": "MemTotal: 4000 kB"}, None),
        ({"proc/meminfo": MEMINFO}, 3000 * 1024),
        ({"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/outer/inner"}, 3000 * 1024),
        (  # version 2: the group's own limit, cache of files given back
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/outer/inner",
                "cgroup/outer/inner/memory.max": 5000,
                "cgroup/outer/inner/memory.current": 4000,
                "cgroup/outer/inner/memory.stat": "anon 3000\ninactive_file 300\nactive_file 7",
            },
            1307,
        ),
        (  # the outer group's limit holds too
            {
                "proc/self/cgroup": "0::/outer/inner",
                "cgroup/outer/inner/memory.max": "max",
                "cgroup/outer/inner/memory.current": 4000,
                "cgroup/outer/memory.max": 9000,
                "cgroup/outer/memory.current": 8500,
            },
            500,
        ),
        (  # in a container: the group's path is that of the host, its files are at the root
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/docker/4d7a",
                "cgroup/memory.max": 5000,
                "cgroup/memory.current": 1000,
            },
            4000,
        ),
        (  # past its limit
            {
                "proc/self/cgroup": "0::/",
                "cgroup/memory.max": 5000,
                "cgroup/memory.current": 6000,
            },
            0,
        ),
        (  # no limit
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/",
                "cgroup/memory.max": "max",
                "cgroup/memory.current": 6000,
            },
            3000 * 1024,
        ),
        (  # version 1; the totals include groups within
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": LINE_V1,
                "cgroup/memory/memory.limit_in_bytes": NO_LIMIT,
                "cgroup/memory/memory.usage_in_bytes": 100,
                "cgroup/memory/outer/memory.limit_in_bytes": 5000,
                "cgroup/memory/outer/memory.usage_in_bytes": 4000,
                "cgroup/memory/outer/memory.stat": (
                    "inactive_file 1\nactive_file 2\ntotal_inactive_file 30\ntotal_active_file 40"
                ),
            },
            1070,
        ),
        (  # version 1 without the memory controller
            {"proc/meminfo": MEMINFO, "proc/self/cgroup": "4:cpu:/a\n0::/a"},
            3000 * 1024,
        ),
    ],
    ids=range(11),
)
def test_available_memory(
    tmp_path: Path, files: Mapping[str, object], expected: int | None
) -> None:
    tree(tmp_path, files)
    assert available_memory(str(tmp_path / "proc"), str(tmp_path / "cgroup")) == expected


def test_available_memory_here() -> None:
    available = available_memory()
    assert available is not None and 0 < available < os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE


# Anything at all in a file

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 5000)
    | st.floats()
    | st.sampled_from(["F32", "BF16", "F64", "I8", ""])
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets"]) | st.text(max_size=5),
            inner,
            max_size=4,
        )
    ),
    max_leaves=6,
)
changed_entries = st.lists(
    st.tuples(
        st.sampled_from([*NAMES, "__metadata__"]) | st.text(max_size=5),
        st.sampled_from(["dtype", "shape", "data_offsets", None]),
        json_values,
    ),
    max_size=3,
)


def changed_header(changes: list[tuple[str, str | None, Any]]) -> dict[str, Any]:
    """A correct header in which fields, or whole entries, are another value."""
    header: dict[str, Any] = entries()
    for name, field, value in changes:
        if field is None or not isinstance(header.get(name), dict):
            header[name] = value
        else:
            header[name][field] = value
    return header


def check_error(error: Exception, path: Path, kinds: tuple[type[Exception], ...]) -> None:
    assert type(error) in kinds
    assert str(path) in str(error)
    assert str(error).isprintable()
    assert len(str(error)) < 2 * len(str(path)) + 500


def check_header(text: bytes, data_bytes: int) -> None:
    path = Path("x.safetensors")
    try:
        tensors = parse_header(path, text, data_bytes)
    except Exception as error:
        check_error(error, path, (ValueError,))
        return
    # Every byte after the header is of one tensor.
    end = 8 + len(text)
    for tensor in sorted(tensors.values(), key=lambda t: (t.begin, t.nbytes)):
        assert tensor.begin == end
        assert tensor.nbytes == math.prod(tensor.shape) * weights._ITEM_BYTES[tensor.dtype]
        end += tensor.nbytes
    assert end == 8 + len(text) + data_bytes


@settings(max_examples=400, deadline=None)
@given(changes=changed_entries, data_bytes=st.just(DATA_BYTES) | st.integers(0, 1 << 60))
def test_any_header(changes: list[Any], data_bytes: int) -> None:
    check_header(json.dumps(changed_header(changes)).encode(), data_bytes)


@settings(max_examples=300, deadline=None)
@given(text=st.binary(max_size=60) | st.text(alphabet='{}[]":,01ae', max_size=30).map(str.encode))
def test_any_bytes_as_a_header(text: bytes) -> None:
    check_header(text, 0)


def check_load(folder: Path, kinds: tuple[type[Exception], ...]) -> None:
    try:
        loaded = load_weights(folder, CONFIG, dtype=torch.float32)
    except Exception as error:
        check_error(error, folder, kinds)
    else:
        assert {n: tuple(t.shape) for n, t in loaded.items()} == parameter_shapes(CONFIG)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_file(data: st.DataObject) -> None:
    """Bytes replaced, put in and taken out, mostly of the header."""
    dtype = data.draw(st.sampled_from(["F32", "BF16", "F64"]))
    content = bytearray(with_header(entries(dtype), DATA_BYTES // 4 * ITEM_BYTES[dtype]))
    header_bytes = int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(0, 3))):
        last = data.draw(st.sampled_from([8, 8 + header_bytes, len(content)]))
        begin = data.draw(st.integers(0, last))
        end = data.draw(st.integers(begin, min(begin + 20, len(content))))
        same_length = data.draw(st.booleans())
        size = (end - begin) if same_length else None
        content[begin:end] = data.draw(st.binary(min_size=size or 0, max_size=size or 20))
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "model.safetensors").write_bytes(content)
        check_load(Path(name), (ValueError, TypeError))


@settings(max_examples=100, deadline=None)
@given(changes=changed_entries)
def test_any_header_in_a_file(changes: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "model.safetensors").write_bytes(with_header(changed_header(changes)))
        check_load(Path(name), (ValueError, TypeError))


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=200))
def test_any_bytes(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "model.safetensors").write_bytes(content)
        check_load(Path(name), (ValueError,))


@settings(max_examples=100, deadline=None)
@given(
    changes=st.dictionaries(
        st.sampled_from(NAMES) | st.text(max_size=5),
        json_values
        | st.sampled_from([SHARD_1, SHARD_2])
        | st.text(max_size=5).map(lambda text: text + ".safetensors"),
        max_size=3,
    ),
    whole=st.none() | json_values,
)
def test_any_index(changes: dict[str, Any], whole: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, make_tensors(), 2)
        index = folder / "model.safetensors.index.json"
        weight_map = json.loads(index.read_text())["weight_map"] | changes
        write_index(folder, weight_map if whole is None else whole)
        # Names of files that are not there, or cannot be: errors of the system.
        check_load(folder, (ValueError, FileNotFoundError, OSError))
