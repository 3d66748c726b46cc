"""Checkpoints of a run: torch.distributed.checkpoint for tensors, state.json for everything else.

A checkpoint is written beside its place and takes it by one rename, once every process has written
its part to disk. So whatever is named `step-*` is whole, and a process killed at any moment loses
the steps since the last one. Tensors are stored whole or in shards, as the processes hold them, and
load into any other number of processes.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from ..config import read_json

STATE = "state.json"
_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = (".saving-", ".deleting-")
# What torch.distributed.checkpoint's own metadata is made of; anything else is refused.
_METADATA = {
    "torch": ("Size", "float32"),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        *("ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _METADATA.get(module, ()):
            raise ValueError(f"names {module}.{name}, which has no place in a checkpoint")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """A reader whose metadata cannot name code: torch's would unpickle anything."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        with open(path, "rb") as file:
            try:
                metadata = _Unpickler(file).load()
            except (pickle.UnpicklingError, ValueError, EOFError, AttributeError) as error:
                raise ValueError(f"{path}: not a checkpoint's metadata: {error}") from None
        if not isinstance(metadata, Metadata):
            raise ValueError(f"{path}: not a checkpoint's metadata")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def is_first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    """Waits for all processes."""
    if dist.is_initialized():
        dist.barrier()


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, the newest last."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def save(
    folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int
) -> None:
    """Writes the checkpoint of a step and removes all but the newest `keep`.

    Every process calls it.

    Args:
        folder: of all checkpoints, made where it is not there.
        step: names the checkpoint.
        tensors: by name; DTensors are stored in shards.
        state: written as JSON; the same in every process.
        keep: at least 1.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    partial, final = folder / f".saving-{step:08}", folder / f"step-{step:08}"
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        for path in _leftovers(folder):
            shutil.rmtree(path)
        partial.mkdir()
    barrier()
    writer = dcp.FileSystemWriter(partial, sync_files=True, overwrite=True)
    with _quiet():
        dcp.save(dict(tensors), storage_writer=writer, no_dist=not dist.is_initialized())
    if is_first():
        with open(partial / STATE, "w", encoding="utf-8") as file:
            file.write(json.dumps(state, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        _sync(partial)
        if final.exists():  # of a run that came this far before and was resumed from earlier
            _remove(final)
        os.rename(partial, final)
        _sync(folder)
        for path in checkpoints(folder)[:-keep]:
            _remove(path)
    barrier()


def load_state(path: Path) -> dict[str, Any]:
    """The JSON beside a checkpoint's tensors.

    Raises:
        FileNotFoundError: the folder is no checkpoint.
        ValueError: it is damaged.
    """
    return read_json(path / STATE)


def load(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fills tensors, or this process's shards of them, with a checkpoint's. Every process calls it.

    Raises:
        ValueError: the checkpoint is damaged, or its tensors are not these.
    """
    try:
        with _quiet():
            dcp.load(dict(tensors), storage_reader=_Reader(path), no_dist=not dist.is_initialized())
    except (dcp.api.CheckpointException, RuntimeError, OSError, AssertionError) as error:
        failures = getattr(error, "failures", {})
        cause = next((f[0] for f in failures.values()), error) if failures else error
        raise ValueError(f"{path}: cannot be loaded: {cause}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def clean(folder: Path) -> None:
    """Removes what killed processes have left. One process calls it."""
    for path in _leftovers(folder):
        shutil.rmtree(path)


def _leftovers(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (p for p in list(folder.iterdir()) if p.name.startswith(_TEMPORARY))


def _remove(path: Path) -> None:
    """Removes a checkpoint; killed on the way, it does not leave half of one under its name."""
    doomed = path.with_name(".deleting-" + path.name)
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flat_state(parameters: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and the optimizer's moments by name, for `save` and `load`.

    Moments that the optimizer does not hold yet are made, so that `load` can fill them.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        tensors[f"weights.{name}"] = parameter.detach()
        tensors[f"exp_avg.{name}"] = state["exp_avg"]
        tensors[f"exp_avg_sq.{name}"] = state["exp_avg_sq"]
    return tensors


def set_optimizer_step(
    parameters: dict[str, Any], optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Tells the optimizer how many updates its moments have seen."""
    for parameter in parameters.values():
        optimizer.state[parameter]["step"].fill_(step)
