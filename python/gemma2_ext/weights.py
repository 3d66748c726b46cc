"""Weights between Hugging Face's safetensors files and memory.

A safetensors file is: 8 bytes, the length of the header (little-endian); the header, a JSON object
that gives each tensor's dtype, shape and place; the tensors, row after row, without a gap. All
headers are checked against the configuration before a byte of weights is read. Weights then go from
the files straight to their place in one anonymous mapping of huge pages, where q, k, v and gate, up
lie one after another, so that each group is one matrix. Reading is bound by memory (page cache) or
disk. Pickles are never opened.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ._memory import map_huge_pages
from .config import (
    Gemma2Config,
    check_folder,
    check_not_lfs_pointer,
    named,
    open_regular,
    parse_json,
    read_json,
    shown,
)
from .quantize import Format, QuantizedWeight, packed_dtypes, packed_shapes

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Those of packed weights too.
STORED_DTYPES = {**DTYPES, "I8": torch.int8, "U8": torch.uint8}
# Bytes of an element of every dtype that a header may name.
_ITEM_BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2},
    **{"BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8},
}
MAX_HEADER_BYTES = 100_000_000
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OUTPUT = "lm_head.weight"
SHARD_BYTES = 5 << 30

ALIGNMENT = 64
READ_BYTES = 8 << 20
READERS = 2
# Weights are not all that a process needs.
SPARE_BYTES = 64 << 20


class Part(NamedTuple):
    """Rows of a fused tensor that are one tensor of a checkpoint."""

    fused: str
    first_row: int
    shape: tuple[int, ...]


def parameter_shapes(config: Gemma2Config) -> dict[str, tuple[int, ...]]:
    """Every fused tensor's shape by name, in the order of computation."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part in hugging_face_parts(config).values():
        rows = part.first_row + part.shape[0]
        shapes[part.fused] = (rows, *part.shape[1:])
    return shapes


def hugging_face_parts(config: Gemma2Config) -> dict[str, Part]:
    """Where each tensor of a checkpoint lies in the fused ones, by its name without "model."."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows = config.num_attention_heads * config.head_dim
    kv_rows = config.num_key_value_heads * config.head_dim
    layer = {
        "input_layernorm": Part("input_layernorm", 0, (hidden,)),
        "self_attn.q_proj": Part("qkv_proj", 0, (q_rows, hidden)),
        "self_attn.k_proj": Part("qkv_proj", q_rows, (kv_rows, hidden)),
        "self_attn.v_proj": Part("qkv_proj", q_rows + kv_rows, (kv_rows, hidden)),
        "self_attn.o_proj": Part("o_proj", 0, (hidden, q_rows)),
        "post_attention_layernorm": Part("post_attention_layernorm", 0, (hidden,)),
        "pre_feedforward_layernorm": Part("pre_feedforward_layernorm", 0, (hidden,)),
        "mlp.gate_proj": Part("gate_up_proj", 0, (inner, hidden)),
        "mlp.up_proj": Part("gate_up_proj", inner, (inner, hidden)),
        "mlp.down_proj": Part("down_proj", 0, (hidden, inner)),
        "post_feedforward_layernorm": Part("post_feedforward_layernorm", 0, (hidden,)),
    }
    parts = {"embed_tokens.weight": Part("embed_tokens.weight", 0, (config.vocab_size, hidden))}
    for i in range(config.num_hidden_layers):
        for name, (fused, first_row, shape) in layer.items():
            parts[f"layers.{i}.{name}.weight"] = Part(
                f"layers.{i}.{fused}.weight", first_row, shape
            )
    parts["norm.weight"] = Part("norm.weight", 0, (hidden,))
    return parts


def to_hugging_face_names(weights: Mapping[str, Tensor], config: Gemma2Config) -> dict[str, Tensor]:
    """Views of the fused tensors by their names in a checkpoint ("model.layers.0....").

    Raises:
        ValueError: a tensor is missing, unknown or of another shape.
    """
    check_fused(weights, config)
    return {
        f"model.{name}": weights[part.fused].narrow(0, part.first_row, part.shape[0])
        for name, part in hugging_face_parts(config).items()
    }


def check_fused(
    weights: Mapping[str, Tensor] | Mapping[str, Tensor | QuantizedWeight], config: Gemma2Config
) -> None:
    """Raises ValueError unless weights holds exactly config's fused tensors, of one dtype.

    Matrices may be packed, all in the same format.
    """
    shapes = parameter_shapes(config)
    for name in sorted(shapes.keys() ^ weights.keys()):
        problem = "is missing" if name in shapes else "is not a weight of this model"
        raise ValueError(f"weights: {name} {problem}")
    format = format_of(weights)
    kept = {name: w for name, w in weights.items() if format is None or len(shapes[name]) == 1}
    dtypes = {weight.dtype for weight in kept.values() if isinstance(weight, Tensor)}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES.values()):
        raise ValueError(
            "weights: must be float32, bfloat16 or float16, all the same, got "
            + ", ".join(sorted(map(str, dtypes)))
        )
    for name, shape in shapes.items():
        weight = weights[name]
        if tuple(weight.shape) != shape:
            raise ValueError(f"weights: {name} must have shape {shape}, got {tuple(weight.shape)}")
        got = weight.format if isinstance(weight, QuantizedWeight) else None
        if got != (None if name in kept else format):
            raise ValueError(
                f"weights: {name} must be {'a tensor' if name in kept else format} like the "
                f"others, got {got or 'a tensor'}"
            )


def format_of(
    weights: Mapping[str, Tensor] | Mapping[str, Tensor | QuantizedWeight],
) -> Format | None:
    """The format of the first packed weight; None where all are plain."""
    packed = (w.format for w in weights.values() if isinstance(w, QuantizedWeight))
    return next(packed, None)


# Memory


class Slot(NamedTuple):
    """A tensor in memory: one of the fused ones, or a packed one's data or scales."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


def slots(config: Gemma2Config, dtype: torch.dtype, format: Format | None) -> dict[str, Slot]:
    """All tensors in memory by name; with a format, matrices as "NAME.data" and "NAME.scales"."""
    result = {}
    for name, shape in parameter_shapes(config).items():
        if format is None or len(shape) == 1:
            result[name] = Slot(shape, dtype)
            continue
        sizes, dtypes = packed_shapes(format, (shape[0], shape[1])), packed_dtypes(format)
        result[f"{name}.data"] = Slot(sizes[0], dtypes[0])
        result[f"{name}.scales"] = Slot(sizes[1], dtypes[1])
    return result


def memory_needed(config: Gemma2Config, dtype: torch.dtype, format: Format | None = None) -> int:
    """Bytes that a model's weights take in memory; format: of matrices that are packed."""
    return sum(_aligned(slot.nbytes) for slot in slots(config, dtype, format).values())


def available_memory(proc: str = "/proc", cgroups: str = "/sys/fs/cgroup") -> int | None:
    """Bytes that this process can still get: of the machine, and of its control groups.

    Returns None where the system does not tell. Page cache counts as available; swap does not.
    """
    found = []
    for line in _lines(Path(proc, "meminfo")):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    for line in _lines(Path(proc, "self/cgroup")):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit_name, usage_name = Path(cgroups), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root = Path(cgroups, "memory")
            limit_name, usage_name = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = Path(path.lstrip("/"))
        # A container may not see its own path, but only the root of its mount.
        for level in (group, *group.parents):
            limit, usage = (_lines(root / level / name) for name in (limit_name, usage_name))
            if limit and usage and limit[0].isdecimal():
                stat = dict(line.split()[:2] for line in _lines(root / level / "memory.stat"))
                cache = sum(
                    int(stat.get(f"total_{name}", stat.get(name, 0)))
                    for name in ("inactive_file", "active_file")
                )
                found.append(max(0, int(limit[0]) - int(usage[0]) + cache))
    return min(found, default=None)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _check_memory(config: Gemma2Config, dtype: torch.dtype, format: Format | None) -> None:
    needed, available = memory_needed(config, dtype, format) + SPARE_BYTES, available_memory()
    if available is not None and needed > available:
        raise MemoryError(
            f"{config.num_parameters / 1e9:.2f} billion weights in "
            f"{format or _dtype_name(dtype)} need "
            f"{needed / 2**30:.2f} GiB of memory, {available / 2**30:.2f} GiB are available"
        )


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Arena:
    """Room for all fused tensors in one anonymous mapping of huge pages, not yet touched.

    Args:
        config: gives the tensors' shapes.
        dtype: of every tensor that is not packed.
        format: of matrices that are packed.

    Raises:
        MemoryError: the system refuses the mapping.
    """

    def __init__(
        self, config: Gemma2Config, dtype: torch.dtype, format: Format | None = None
    ) -> None:
        _check_memory(config, dtype, format)
        nbytes = memory_needed(config, dtype, format)
        self.memory, offset = map_huge_pages(nbytes, "the weights")
        self.slots = slots(config, dtype, format)
        self.offsets: dict[str, int] = {}
        # Tensors keep the mapping alive by themselves.
        self.tensors: dict[str, Tensor] = {}
        for name, slot in self.slots.items():
            self.offsets[name] = offset
            count = math.prod(slot.shape)
            self.tensors[name] = self.flat(offset, count, slot.dtype).view(slot.shape)
            offset += _aligned(slot.nbytes)

    def flat(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """(count,) elements that begin at a byte of the mapping."""
        if count == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self.memory, dtype=dtype, count=count, offset=offset)


class DeviceArena:
    """As `Arena`, in one allocation on a GPU, without packed matrices.

    Args:
        config: gives the tensors' shapes.
        dtype: of every tensor.
        device: where the room is.

    Raises:
        torch.OutOfMemoryError: torch's own.
    """

    def __init__(self, config: Gemma2Config, dtype: torch.dtype, device: torch.device) -> None:
        self.memory = torch.empty(memory_needed(config, dtype), dtype=torch.uint8, device=device)
        self.slots = slots(config, dtype, None)
        self.offsets: dict[str, int] = {}
        self.tensors: dict[str, Tensor] = {}
        offset = 0
        for name, slot in self.slots.items():
            self.offsets[name] = offset
            count = math.prod(slot.shape)
            self.tensors[name] = self.flat(offset, count, slot.dtype).view(slot.shape)
            offset += _aligned(slot.nbytes)

    def flat(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """(count,) elements that begin at a byte of the allocation."""
        return self.memory[offset : offset + count * dtype.itemsize].view(dtype)


# Reading


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its dtype by safetensors' name, shape, first byte and length."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


def parse_header(path: Path, header: bytes, data_bytes: int) -> dict[str, StoredTensor]:
    """The tensors that a safetensors header declares, each checked.

    Args:
        path: of the file, for messages.
        header: the JSON text.
        data_bytes: bytes of the file after the header.

    Returns:
        Tensors by name, `begin` counted from the start of the file.

    Raises:
        ValueError: not JSON, fields missing or unknown, values out of range, or tensors that
            overlap, leave a gap, or do not fill the file.
    """
    values = parse_json(header, f"{path}: header")
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{path}: __metadata__ must map names to strings, got {shown(metadata)}")
    start = 8 + len(header)
    tensors = {name: _stored(path, name, entry, start) for name, entry in values.items()}
    end, last = start, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if tensor.begin != end:
            problem = "overlaps" if tensor.begin < end else "leaves a gap after"
            raise ValueError(
                f"{path}: tensor {shown(name)} {problem} {last}: "
                f"data_offsets must begin at {end - start}, got {tensor.begin - start}"
            )
        end, last = tensor.begin + tensor.nbytes, f"tensor {shown(name)}"
    if end != start + data_bytes:
        problem = "is truncated" if end > start + data_bytes else "has bytes after its last tensor"
        raise ValueError(
            f"{path}: {problem}: must be {end} bytes by its header, is {start + data_bytes}"
        )
    return tensors


def _stored(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} must have dtype, shape and data_offsets, got {shown(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise ValueError(f"{where}: dtype must be of {', '.join(_ITEM_BYTES)}, got {shown(dtype)}")
    # Sizes past 2^63 cannot be in a file, and their product would take long.
    for field, numbers, most in (("shape", shape, 8), ("data_offsets", offsets, 2)):
        if (
            not isinstance(numbers, list)
            or len(numbers) > most
            or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)
        ):
            raise ValueError(
                f"{where}: {field} must be a list of at most {most} non-negative integers, "
                f"got {shown(numbers)}"
            )
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{where}: data_offsets must be [begin, end], got {shown(offsets)}")
    nbytes = offsets[1] - offsets[0]
    if math.prod(shape) * _ITEM_BYTES[dtype] != nbytes:
        raise ValueError(
            f"{where}: data_offsets must span {math.prod(shape) * _ITEM_BYTES[dtype]} bytes for "
            f"shape {shape} of {dtype}, got {nbytes}"
        )
    return StoredTensor(dtype, tuple(shape), start + offsets[0], nbytes)


class SafetensorsFile:
    """An open safetensors file whose header has been checked; close it by `close()`.

    Raises:
        OSError: it cannot be opened or read; FileNotFoundError, PermissionError among them.
        ValueError: it is not a regular file, or not a valid safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = open_regular(path)
        try:
            self.stat = os.fstat(self.descriptor)
            self.tensors = self._read_header()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> dict[str, StoredTensor]:
        size = self.stat.st_size
        start = bytearray(min(size, 64))
        self.read_into(memoryview(start), 0)
        check_not_lfs_pointer(self.path, bytes(start))
        if size < 8:
            raise ValueError(f"{self.path}: is truncated: must be at least 8 bytes, is {size}")
        length = int.from_bytes(start[:8], "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(
                f"{self.path}: not a safetensors file, or truncated: its first 8 bytes say that "
                f"the header has {length} bytes, more than the file ({size}) or the limit "
                f"({MAX_HEADER_BYTES})"
            )
        header = bytearray(length)
        self.read_into(memoryview(header), 8)
        return parse_header(self.path, bytes(header), size - 8 - length)

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fills target with the bytes from offset on; OSError where the file ends before."""
        while target:
            with named(self.path):
                count = os.preadv(self.descriptor, [target], offset)
            if count == 0:
                raise OSError(
                    f"{self.path}: ends at byte {offset}, was {self.stat.st_size} bytes long"
                )
            target, offset = target[count:], offset + count

    def check_unchanged(self) -> None:
        """Raises OSError where the file was written to since it was opened."""
        now = os.fstat(self.descriptor)
        if (now.st_size, now.st_mtime_ns) != (self.stat.st_size, self.stat.st_mtime_ns):
            raise OSError(f"{self.path}: changed while it was read")

    def close(self) -> None:
        """Closes the file."""
        os.close(self.descriptor)


class Source(NamedTuple):
    """A checkpoint's tensor: its file and place there, and where it goes."""

    file: SafetensorsFile
    name: str
    stored: StoredTensor
    part: Part


@contextmanager
def open_checkpoint(
    folder: str | os.PathLike[str], config: Gemma2Config
) -> Iterator[dict[str, Source]]:
    """Opens a folder's safetensors files and checks all their tensors against config.

    Reads headers only. Yields the tensors by their names without "model.", all of
    `hugging_face_parts(config)` and perhaps OUTPUT.

    Raises:
        FileNotFoundError, OSError, ValueError, TypeError: see `load_weights`.
    """
    with open_files(folder) as files:
        yield match_parts(files, config)


@contextmanager
def open_files(folder: str | os.PathLike[str]) -> Iterator[list[SafetensorsFile]]:
    """Opens a folder's safetensors files, and checks each by itself and against the index.

    Raises:
        FileNotFoundError, OSError, ValueError: see `load_weights`.
    """
    folder = check_folder(folder)
    with ExitStack() as stack:

        def opened(name: str) -> SafetensorsFile:
            file = SafetensorsFile(folder / name)
            stack.callback(file.close)
            return file

        if os.path.lexists(folder / SINGLE):
            files = [opened(SINGLE)]
        elif os.path.lexists(folder / INDEX):
            files = _open_shards(folder / INDEX, opened)
        else:
            raise _no_safetensors(folder)
        yield files


def _no_safetensors(folder: Path) -> Exception:
    names = sorted(os.listdir(folder))
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        return FileNotFoundError(
            f"{folder}: has {shards[0]}, but neither {SINGLE} nor {INDEX}; the download or the "
            "saving was not completed"
        )
    pickles = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt", ".bin.index.json"))]
    if pickles:
        return ValueError(
            f"{folder}: has only pickled weights ({pickles[0]}), which can run any code when "
            "opened and are never loaded; where you trust them, convert them by "
            f"transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
            ".save_pretrained(OUT), which writes safetensors"
        )
    return FileNotFoundError(f"{folder}: has neither {SINGLE} nor {INDEX}")


# A file's name, not a path; no half of a character, which no file's name can hold.
_SHARD = r"[^/\\\x00-\x1f\ud800-\udfff]+\.safetensors"


def _open_shards(index: Path, opened: Callable[[str], SafetensorsFile]) -> list[SafetensorsFile]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map must map tensors to files, got {shown(weight_map)}")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(_SHARD, shard):
            raise ValueError(
                f"{index}: weight_map[{shown(name)}] must name a .safetensors file in the folder, "
                f"got {shown(shard)}"
            )
    files = {shard: opened(shard) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in files[shard].tensors:
            raise ValueError(f"{index}: says that {shard} has tensor {shown(name)}; it has not")
    for shard, file in files.items():
        for name in file.tensors:
            if weight_map.get(name) != shard:
                raise ValueError(
                    f"{file.path}: has tensor {shown(name)}, which {index.name} has "
                    + (f"in {weight_map[name]}" if name in weight_map else "not")
                )
    return list(files.values())


def match_parts(files: list[SafetensorsFile], config: Gemma2Config) -> dict[str, Source]:
    """Every tensor of a Hugging Face checkpoint with its place, all checked."""
    parts = hugging_face_parts(config)
    output = Part(OUTPUT, 0, parts["embed_tokens.weight"].shape)
    return match(files, {**parts, OUTPUT: output}, {OUTPUT}, config)


def match(
    files: list[SafetensorsFile],
    parts: Mapping[str, Part],
    optional: set[str],
    config: Gemma2Config,
    dtypes: Mapping[str, str] | None = None,
) -> dict[str, Source]:
    """Every tensor with its place, checked by name, shape and dtype (a floating one if not given).

    Args:
        files: the checkpoint's.
        parts: the tensors that it must have, without "model." in front.
        optional: those among them that may be absent.
        config: for messages.
        dtypes: those of tensors that must have a particular one, by safetensors' name.
    """
    sources: dict[str, Source] = {}
    for file in files:
        for name, stored in file.tensors.items():
            key = name.removeprefix("model.")
            part = parts.get(key)
            if part is None:
                raise ValueError(
                    f"{file.path}: has tensor {shown(name)}, which a Gemma 2 of "
                    f"{config.num_hidden_layers} layers (num_hidden_layers) has not"
                )
            if key in sources:
                raise ValueError(
                    f"{file.path}: has tensor {shown(name)}, which {sources[key].file.path} has too"
                )
            if stored.shape != part.shape:
                raise ValueError(
                    f"{file.path}: tensor {name} must have shape {part.shape} by the "
                    f"configuration, got {stored.shape}"
                )
            allowed = [dtypes[key]] if dtypes and key in dtypes else list(DTYPES)
            if stored.dtype not in allowed:
                raise TypeError(
                    f"{file.path}: tensor {name} must be of {', '.join(allowed)}, "
                    f"got {stored.dtype}"
                )
            sources[key] = Source(file, name, stored, part)
    missing = [name for name in parts if name not in sources and name not in optional]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{_place(files)}: lacks tensor model.{missing[0]}{more}")
    return sources


def _place(files: list[SafetensorsFile]) -> Path:
    return files[0].path if len(files) == 1 else files[0].path.parent


def check_tied(output: Source, embedding: Source) -> None:
    """Raises ValueError unless lm_head.weight is the embedding once more."""
    same = output.stored.dtype == embedding.stored.dtype
    buffers = [bytearray(min(READ_BYTES, output.stored.nbytes)) for _ in range(2)]
    for offset in range(0, output.stored.nbytes if same else 0, READ_BYTES):
        count = min(READ_BYTES, output.stored.nbytes - offset)
        views = [memoryview(buffer)[:count] for buffer in buffers]
        for source, view in zip((output, embedding), views, strict=True):
            source.file.read_into(view, source.stored.begin + offset)
        same = same and views[0] == views[1]
    if not same:
        raise ValueError(
            f"{output.file.path}: tensor {OUTPUT} must equal {embedding.name}, and does not: "
            "an output matrix apart from the embedding is not supported"
        )


def stored_dtype(folder: str | os.PathLike[str], config: Gemma2Config) -> torch.dtype:
    """The dtype of a checkpoint's weights; `load_weights`' checks of all headers come first."""
    with open_checkpoint(folder, config) as sources:
        sources.pop(OUTPUT, None)
        return common_dtype(list(sources.values()))


def common_dtype(sources: list[Source]) -> torch.dtype:
    first = sources[0]
    for source in sources:
        if source.stored.dtype != first.stored.dtype:
            raise TypeError(
                f"{source.file.path}: tensor {source.name} is {source.stored.dtype}, "
                f"{first.name} is {first.stored.dtype}: say which dtype is wanted"
            )
    return DTYPES[first.stored.dtype]


def load_weights(
    folder: str | os.PathLike[str],
    config: Gemma2Config,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> dict[str, Tensor]:
    """Loads model.safetensors, or the shards that model.safetensors.index.json names.

    Args:
        folder: a checkpoint's folder; tensors are named as transformers does, with or without
            "model." in front.
        config: what they must fit.
        dtype: float32, bfloat16 or float16, in memory; None: that of the file.
        device: where they are to be. On a GPU they are never whole in the host's memory.
        progress: whether to show a progress bar on stderr.

    Returns:
        The tensors of `parameter_shapes(config)`: views of one mapping of huge pages, or of one
        allocation on the device, each 64-byte aligned.

    Raises:
        FileNotFoundError: the folder, or a file that it must have, is not there.
        OSError: a file cannot be read, or changes meanwhile.
        ValueError: a file is no valid safetensors; a tensor is missing, unknown, of another shape,
            or too large for float16; index and shards disagree; there are only pickles.
        TypeError: a tensor's dtype is not a supported one.
        MemoryError: less memory is available than the weights need.
    """
    if dtype is not None and dtype not in DTYPES.values():
        raise TypeError(f"load_weights: dtype must be float32, bfloat16 or float16, got {dtype!r}")
    with open_checkpoint(folder, config) as checkpoint:
        output = checkpoint.pop(OUTPUT, None)
        sources = list(checkpoint.values())
        dtype = dtype or common_dtype(sources)
        device = torch.device(device)
        arena: Arena | DeviceArena
        arena = Arena(config, dtype) if device.type == "cpu" else DeviceArena(config, dtype, device)
        if output is not None:
            check_tied(output, checkpoint["embed_tokens.weight"])
        read_all(sources, arena, progress)
        for file in {source.file for source in sources}:
            file.check_unchanged()
        return arena.tensors


class _Piece(NamedTuple):
    """Up to READ_BYTES of a tensor, and the byte of the arena where they begin there."""

    source: Source
    offset: int
    elements: int
    target: int


def _pieces(sources: list[Source], arena: Arena | DeviceArena) -> Iterator[_Piece]:
    """All tensors in the order of the files."""
    for source in sorted(sources, key=lambda s: (s.file.path, s.stored.begin)):
        stored, part = source.stored, source.part
        count = math.prod(stored.shape)
        row = count // stored.shape[0]
        itemsize = arena.slots[part.fused].dtype.itemsize
        target = arena.offsets[part.fused] + part.first_row * row * itemsize
        item = _ITEM_BYTES[stored.dtype]
        step = READ_BYTES // item
        for first in range(0, count, step):
            yield _Piece(
                source,
                stored.begin + first * item,
                min(step, count - first),
                target + first * itemsize,
            )


def read_all(sources: list[Source], arena: Arena | DeviceArena, progress: bool) -> None:
    """Reads every tensor to its place, with READERS threads that end with this call."""
    pieces = _pieces(sources, arena)
    lock, stop = threading.Lock(), threading.Event()
    errors: list[BaseException] = []
    bytes_read = 0

    def read() -> None:
        nonlocal bytes_read
        staging = bytearray(READ_BYTES)
        try:
            while not stop.is_set():
                with lock:
                    piece = next(pieces, None)
                if piece is None:
                    return
                count = _read_piece(piece, arena, staging)
                with lock:
                    bytes_read += count
        except BaseException as error:
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=read, name="load_weights") for _ in range(READERS)]
    try:
        with progress_bar(sum(source.stored.nbytes for source in sources), progress) as update:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.05)
                    update(bytes_read)
            update(bytes_read)
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if errors:
        raise errors[0]


def _read_piece(piece: _Piece, arena: Arena | DeviceArena, staging: bytearray) -> int:
    """Reads a piece, straight to its place, or through staging to a GPU or another dtype."""
    source, offset, elements, target = piece
    dtype, wanted = STORED_DTYPES[source.stored.dtype], arena.slots[source.part.fused].dtype
    nbytes = elements * dtype.itemsize
    if not isinstance(arena, DeviceArena) and dtype == wanted:
        source.file.read_into(memoryview(arena.memory)[target : target + nbytes], offset)
        return nbytes
    source.file.read_into(memoryview(staging)[:nbytes], offset)
    values = torch.frombuffer(staging, dtype=dtype, count=elements)
    converted = arena.flat(target, elements, wanted).copy_(values)
    lossy = wanted == torch.float16 and dtype != torch.float16
    if lossy and not torch.equal(converted.isfinite().cpu(), values.isfinite()):
        raise ValueError(
            f"{source.file.path}: tensor {source.name} has values past float16's range "
            f"(65504): {values.abs().max().item():.4g}"
        )
    return nbytes


@contextmanager
def progress_bar(total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function that takes the bytes done so far."""
    if not show:
        yield lambda done: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="weights", unit="B", unit_scale=True, unit_divisor=1024) as bar:
        yield lambda done: bar.update(done - bar.n)


# Writing


def stored_tensors(
    weights: Mapping[str, Tensor] | Mapping[str, Tensor | QuantizedWeight], config: Gemma2Config
) -> dict[str, Tensor]:
    """What a file holds, by its names there: Hugging Face's, or where matrices are packed
    "model.layers.0.qkv_proj.weight.data", "....scales" and the like."""
    if format_of(weights) is None:
        return to_hugging_face_names(cast("Mapping[str, Tensor]", weights), config)
    check_fused(weights, config)
    tensors = {}
    for name, weight in weights.items():
        if isinstance(weight, QuantizedWeight):
            tensors[f"model.{name}.data"] = weight.data
            tensors[f"model.{name}.scales"] = weight.scales
        else:
            tensors[f"model.{name}"] = weight
    return tensors


def save_weights(
    folder: str | os.PathLike[str],
    weights: Mapping[str, Tensor] | Mapping[str, Tensor | QuantizedWeight],
    config: Gemma2Config,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes fused tensors as model.safetensors by Hugging Face's names, in shards where large.

    A checkpoint in the folder is replaced. Whenever the process ends, the folder loads as the old
    checkpoint or the new one.

    Args:
        folder: made where it is not there.
        weights: the tensors of `parameter_shapes(config)`, of one dtype or packed in one format.
        config: gives their names and shapes.
        shard_bytes: a file's tensors take at most this much, or are a single one.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape or dtype.
        OSError: the disk is full, or the folder cannot be written.
    """
    tensors = stored_tensors(weights, config)
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        held = sum(other.nbytes for other in shards[-1].values())
        if shards[-1] and held + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    total = sum(tensor.nbytes for tensor in tensors.values())

    os.makedirs(folder, exist_ok=True)
    folder = check_folder(folder)
    for path in folder.glob(".saving-*"):  # of a process that was killed
        shutil.rmtree(path, ignore_errors=True)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise OSError(
            errno.ENOSPC,
            f"{folder}: the weights need {total / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free",
        )
    stale = [path for path in folder.iterdir() if re.fullmatch(_SAVED_NAMES, path.name)]
    names = [SINGLE] if len(shards) == 1 else _shard_names(len(shards), {p.name for p in stale})
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        partial = Path(temporary)
        for name, shard in zip(names, shards, strict=True):
            _write_file(partial / name, shard)
        if len(shards) > 1:
            files = {n: f for f, shard in zip(names, shards, strict=True) for n in shard}
            index = {"metadata": {"total_size": total}, "weight_map": files}
            with open(partial / INDEX, "w", encoding="utf-8") as file:
                file.write(json.dumps(index, indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            names.append(INDEX)
        # The last of them replaces the old checkpoint, or, where that is model.safetensors, which
        # comes before an index, its removal does.
        for name in names[:-1]:
            os.replace(partial / name, folder / name)
        sync_folder(folder)
        os.replace(partial / names[-1], folder / names[-1])
        sync_folder(folder)
        for path in stale:
            if path.name not in names:
                path.unlink(missing_ok=True)


# Whatever an earlier save_weights, or transformers, may have left.
_SAVED_NAMES = r"model((-\d+)?-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"


def _shard_names(count: int, taken: set[str]) -> list[str]:
    """Shards' names, other than those of a checkpoint that has to last until all are there."""
    for stem in itertools.chain(["model"], (f"model-{i}" for i in itertools.count(2))):
        names = [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        if taken.isdisjoint(names):
            break
    return names


def _write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    slots = {name: Slot(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    write_file(path, slots, tensors.values(), {"format": "pt"})


def write_file(
    path: Path, slots: Mapping[str, Slot], tensors: Iterable[Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file, down to the disk.

    Args:
        path: of the file.
        slots: every tensor's shape and dtype by name.
        tensors: the tensors in that order; each may be made when it is asked for.
        metadata: strings by name.
    """
    dtypes = {dtype: name for name, dtype in STORED_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, slot in slots.items():
        header[name] = {
            "dtype": dtypes[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": [offset, offset + slot.nbytes],
        }
        offset += slot.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data.cast("B")
            for first in range(0, len(data), READ_BYTES):
                file.write(data[first : first + READ_BYTES])
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Random weights

# A prime, so that no two rows of a matrix begin at the same place of the block.
RANDOM_BLOCK = 1_000_003


def random_weights(
    config: Gemma2Config, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> dict[str, Tensor]:
    """Weights for benchmarks and tests, in memory as `load_weights` places them; seconds for 2B.

    A block of normal numbers, repeated: matrices with standard deviation hidden_size ** -0.5, norms
    with 0.05.

    Args:
        config: gives names and shapes.
        dtype: float32, bfloat16 or float16.
        seed: of the block.

    Raises:
        MemoryError: less memory is available than the weights need.
    """
    arena = Arena(config, dtype)
    block = torch.randn(RANDOM_BLOCK, generator=torch.Generator().manual_seed(seed))
    matrix, norm = (block * config.hidden_size**-0.5).to(dtype), (block * 0.05).to(dtype)
    position = 0
    for tensor in arena.tensors.values():
        values, flat = (matrix if tensor.dim() == 2 else norm), tensor.view(-1)
        done = 0
        while done < len(flat):
            count = min(len(flat) - done, RANDOM_BLOCK - position)
            flat[done : done + count].copy_(values[position : position + count])
            done, position = done + count, (position + count) % RANDOM_BLOCK
    return arena.tensors
