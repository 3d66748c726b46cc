"""Checkpoints of packed weights: quantized while they are read, written, and loaded.

A packed checkpoint is a safetensors file whose matrices are those of `parameter_shapes`, q, k, v
and gate, up as one, each as "model.NAME.data" and "model.NAME.scales" in the layout of
`quantize.py`; norms are as they were. config.json says so in quantization_config. Quantizing goes
through a few rows at a time, so it takes little memory beside the result.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from .config import Gemma2Config, check_folder, quantization_config, read_json
from .quantize import (
    BLOCK_ROWS,
    FORMATS,
    Format,
    QuantizedWeight,
    check_finite,
    check_format,
    empty_packed,
    packed_dtypes,
    quantize_into,
)
from .weights import (
    DTYPES,
    INDEX,
    OUTPUT,
    SINGLE,
    STORED_DTYPES,
    Arena,
    Part,
    SafetensorsFile,
    Source,
    check_tied,
    common_dtype,
    load_weights,
    match,
    match_parts,
    open_files,
    parameter_shapes,
    progress_bar,
    read_all,
    slots,
    sync_folder,
    write_file,
)

# Bytes of a matrix that are quantized at a time.
CHUNK_BYTES = 32 << 20
# Beside the weights in a checkpoint's folder.
_COPIED = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "generation_config.json"),
)


def format_of_files(files: list[SafetensorsFile]) -> Format | None:
    """The format of a checkpoint's matrices, by their dtype; None: they are not packed."""
    for file in files:
        for name, stored in file.tensors.items():
            if name.endswith(".weight.data"):
                for format in FORMATS:
                    if STORED_DTYPES.get(stored.dtype) == packed_dtypes(format)[0]:
                        return format
                raise TypeError(
                    f"{file.path}: tensor {name} must be of I8 or U8, got {stored.dtype}"
                )
    return None


def _match_packed(
    files: list[SafetensorsFile], config: Gemma2Config, format: Format
) -> dict[str, Source]:
    """Every tensor of a packed checkpoint with its place, all checked."""
    wanted = slots(config, torch.bfloat16, format)
    names = {dtype: name for name, dtype in STORED_DTYPES.items()}
    dtypes = {
        name: names[slot.dtype] for name, slot in wanted.items() if not _is_norm(name, config)
    }
    parts = {name: Part(name, 0, slot.shape) for name, slot in wanted.items()}
    return match(files, parts, set(), config, dtypes)


def _is_norm(name: str, config: Gemma2Config) -> bool:
    return len(parameter_shapes(config).get(name, (0, 0))) == 1


def stored_format(
    folder: str | os.PathLike[str], config: Gemma2Config
) -> tuple[torch.dtype, Format | None]:
    """A checkpoint's dtype (of its norms where it is packed) and format, from its headers."""
    with open_files(folder) as files:
        format = format_of_files(files)
        sources = _sources(files, config, format)
        sources.pop(OUTPUT, None)
        kept = [s for name, s in sources.items() if format is None or _is_norm(name, config)]
        return common_dtype(kept), format


def declared_format(folder: str | os.PathLike[str]) -> Format | None:
    """The format that a folder's config.json says its matrices are packed in."""
    says = read_json(check_folder(folder) / "config.json").get("quantization_config")
    return cast("Format", says["format"]) if says else None


def _sources(
    files: list[SafetensorsFile], config: Gemma2Config, format: Format | None
) -> dict[str, Source]:
    return match_parts(files, config) if format is None else _match_packed(files, config, format)


def load_checkpoint(
    folder: str | os.PathLike[str],
    config: Gemma2Config,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantize: Format | None = None,
    progress: bool = False,
) -> dict[str, Tensor] | dict[str, Tensor | QuantizedWeight]:
    """Loads a folder's weights, packed ones as they are, others packed where that is asked for.

    Args:
        folder: a checkpoint's folder, of Hugging Face's tensors or packed.
        config: what they must fit.
        dtype: float32, bfloat16 or float16, of what is not packed; None: that of the file.
        device: where weights that are not packed are to be; packed ones are on the CPU.
        quantize: None, or the format wanted.
        progress: whether to show a progress bar on stderr.

    Returns:
        The tensors of `parameter_shapes(config)`, in one mapping of huge pages.

    Raises:
        ValueError: the folder is packed in another format; a weight to be quantized is NaN or Inf.
        FileNotFoundError, OSError, TypeError, MemoryError: as `load_weights`.
    """
    if quantize is not None:
        check_format("quantize", quantize)
    with open_files(folder) as files:
        format = format_of_files(files)
        if format is None and quantize is None:
            return load_weights(folder, config, dtype=dtype, device=device, progress=progress)
        if dtype is not None and dtype not in DTYPES.values():
            raise TypeError(
                f"load_weights: dtype must be float32, bfloat16 or float16, got {dtype!r}"
            )
        if format is not None and quantize not in (None, format):
            raise ValueError(
                f"{folder}: is packed in {format}, not in {quantize}: quantize the checkpoint that "
                "it was made from"
            )
        sources = _sources(files, config, format)
        output = sources.pop(OUTPUT, None)
        kept = [s for s in sources.values() if _is_norm(s.part.fused, config)]
        wanted = cast("Format", format or quantize)
        arena = Arena(config, dtype or common_dtype(kept), wanted)
        if output is not None:
            check_tied(output, sources["embed_tokens.weight"])
        if format is not None:
            read_all(list(sources.values()), arena, progress)
        else:
            read_all(kept, arena, False)
            matrices = [s for s in sources.values() if s not in kept]
            _quantize_all(matrices, arena, wanted, progress)
        for file in files:
            file.check_unchanged()
    return _with_packed(arena.tensors, config, wanted)


def _with_packed(
    tensors: Mapping[str, Tensor], config: Gemma2Config, format: Format
) -> dict[str, Tensor | QuantizedWeight]:
    """Data and scales joined to QuantizedWeight, in the order of `parameter_shapes`."""
    return {
        name: tensors[name]
        if len(shape) == 1
        else QuantizedWeight(
            tensors[f"{name}.data"], tensors[f"{name}.scales"], format, (shape[0], shape[1])
        )
        for name, shape in parameter_shapes(config).items()
    }


def _quantize_all(sources: list[Source], arena: Arena, format: Format, progress: bool) -> None:
    with progress_bar(sum(source.stored.nbytes for source in sources), progress) as update:
        done = 0
        for name, parts in _by_matrix(sources).items():
            data, scales = arena.tensors[f"{name}.data"], arena.tensors[f"{name}.scales"]
            for nbytes in _quantize_matrix(parts, data, scales, format):
                done += nbytes
                update(done)


def _by_matrix(sources: list[Source]) -> dict[str, list[Source]]:
    """The parts of each fused matrix, from its first row to its last."""
    matrices: dict[str, list[Source]] = {}
    for source in sorted(sources, key=lambda s: s.part.first_row):
        matrices.setdefault(source.part.fused, []).append(source)
    return matrices


def _quantize_matrix(
    parts: list[Source], data: Tensor, scales: Tensor, format: Format
) -> Iterator[int]:
    """Quantizes a fused matrix, whole blocks of rows at a time; yields the bytes read each time."""
    rows, columns = data.shape[0], parts[0].part.shape[1]
    count = max(1, CHUNK_BYTES // (columns * 4 * BLOCK_ROWS)) * BLOCK_ROWS
    for first in range(0, rows, count):
        chunk, nbytes = _read_rows(parts, first, min(count, rows - first))
        block = slice(first, first + len(chunk))
        quantize_into(chunk, data[block], scales[block], format)
        yield nbytes


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.view(torch.uint8).numpy().data.cast("B")


def _read_rows(parts: list[Source], first: int, count: int) -> tuple[Tensor, int]:
    """Rows [first, first + count) of a fused matrix, and the bytes read for them."""
    pieces, nbytes = [], 0
    for source in parts:
        part = source.part
        begin = max(first, part.first_row) - part.first_row
        end = min(first + count, part.first_row + part.shape[0]) - part.first_row
        if begin >= end:
            continue
        dtype = DTYPES[source.stored.dtype]
        piece = torch.empty((end - begin, part.shape[1]), dtype=dtype)
        row_bytes = part.shape[1] * dtype.itemsize
        source.file.read_into(_bytes(piece), source.stored.begin + begin * row_bytes)
        check_finite(f"{source.file.path}: tensor {source.name}", piece, first_row=begin)
        pieces.append(piece)
        nbytes += piece.nbytes
    if len({piece.dtype for piece in pieces}) > 1:
        pieces = [piece.float() for piece in pieces]
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0], nbytes


def quantize_checkpoint(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: Format,
    *,
    progress: bool = False,
) -> None:
    """Writes a packed checkpoint of a Hugging Face folder, matrix by matrix.

    Holds one packed matrix in memory at a time. The weights' file takes its name last, when all is
    on the disk: until then the folder does not load.

    Args:
        folder: the checkpoint to quantize.
        out: a new folder, or one without a checkpoint; gets the tokenizer's files too.
        format: "int8" or "int4".
        progress: whether to show a progress bar on stderr.

    Raises:
        ValueError: folder is packed already; a weight is NaN or Inf, named with its place.
        FileExistsError: out holds a checkpoint.
        FileNotFoundError, OSError, TypeError: as `load_weights`.
    """
    check_format("format", format)
    folder, out = check_folder(folder), Path(out)
    config = Gemma2Config.from_pretrained(folder)
    for name in ("config.json", SINGLE, INDEX):
        if os.path.lexists(out / name):
            raise FileExistsError(f"{out}: has a {name} already; name a new folder")
    with open_files(folder) as files:
        if format_of_files(files) is not None:
            raise ValueError(f"{folder}: is packed already ({format_of_files(files)})")
        sources = match_parts(files, config)
        output = sources.pop(OUTPUT, None)
        kept = [s for s in sources.values() if _is_norm(s.part.fused, config)]
        wanted = slots(config, common_dtype(kept), format)
        if output is not None:
            check_tied(output, sources["embed_tokens.weight"])
        made = _make_folders(out)
        try:
            total, free = sum(s.nbytes for s in wanted.values()), shutil.disk_usage(out).free
            if total > free:
                raise OSError(
                    errno.ENOSPC,
                    f"{out}: the weights need {total / 2**30:.2f} GiB, "
                    f"{free / 2**30:.2f} GiB are free",
                )
            with tempfile.TemporaryDirectory(prefix=".saving-", dir=out) as temporary:
                partial = Path(temporary)
                nbytes = sum(source.stored.nbytes for source in sources.values())
                with progress_bar(nbytes, progress) as update:
                    write_file(
                        partial / SINGLE,
                        {f"model.{name}": slot for name, slot in wanted.items()},
                        _packed_tensors(list(sources.values()), config, format, update),
                        {"format": "pt", "quantization": format, "producer": "gemma2_ext"},
                    )
                for file in files:
                    file.check_unchanged()
                _write_others(folder, partial, format)
                for path in sorted(partial.iterdir(), key=lambda path: path.name == SINGLE):
                    sync_folder(out)  # all others are there when the weights come
                    os.replace(path, out / path.name)
                sync_folder(out)
        except BaseException:
            for path in made:
                path.rmdir()
            raise


def _make_folders(path: Path) -> list[Path]:
    """Makes a folder and those above it; returns those that were not there, the last one first."""
    made = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    return made


def _packed_tensors(
    sources: list[Source], config: Gemma2Config, format: Format, update: Callable[[int], None]
) -> Iterator[Tensor]:
    """The tensors of `slots(config, ..., format)` in their order, each made when it is due."""
    matrices, done = _by_matrix(sources), 0
    for name, shape in parameter_shapes(config).items():
        if len(shape) == 1:
            (source,) = matrices[name]
            norm = torch.empty(shape, dtype=DTYPES[source.stored.dtype])
            source.file.read_into(_bytes(norm), source.stored.begin)
            done += norm.nbytes
            update(done)
            yield norm
            continue
        data, scales = empty_packed(format, (shape[0], shape[1]))
        for nbytes in _quantize_matrix(matrices[name], data, scales, format):
            done += nbytes
            update(done)
        yield data
        yield scales


def _write_others(folder: Path, partial: Path, format: Format) -> None:
    """config.json, which says what the weights are, and the tokenizer's files as they are."""
    for name in _COPIED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, partial / name)
    config = {
        **read_json(folder / "config.json"),
        "quantization_config": quantization_config(format),
    }
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
