"""Builds the CUDA kernels for the CPU (emulation.h) and launches them from tests.

    launch("rms_norm", x=x, x_stride=x.stride(0), ..., out=out)

takes the fields of the op's struct in csrc/params.h by name: tensors for pointers and views,
dtypes, numbers; what is left out is zero. `check_schedules` runs a launch under every schedule.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
# See emulation.cpp: in step, one warp at a time, at random; copies late, at once, at random.
SCHEDULES = (0, 1, 2, 3, 4, 5, 6, 7)
LEAST_SHARED_BYTES = 99 << 10  # of a block on sm_86, sm_89 and sm_120
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-march=native", "-Wall", "-Wextra", "-Werror")
QUIET = ("-Wno-unknown-pragmas", "-Wno-unused-parameter")


class Refused(RuntimeError):
    """What the emulation found: a misaligned access, a deadlock, a write outside, ..."""


# ---- the build


def sources() -> list[Path]:
    kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    return [*kernels, *(HERE / f"{name}.cpp" for name in ("emulation", "entry", "probes"))]


def build(folder: Path) -> Path:
    """The shared library; objects whose sources have not changed are kept in `folder`."""
    compiler = os.environ.get("CXX", "c++")
    headers = [*(ROOT / "csrc" / "cuda").glob("*.*h"), *HERE.glob("*.h"), ROOT / "csrc/params.h"]
    common = hashlib.sha256(repr((compiler, FLAGS, QUIET)).encode())
    for path in sorted(headers):
        common.update(path.read_bytes())

    def remove(old: set[Path]) -> None:  # never what another process may have made just now
        for path in old:
            path.unlink(missing_ok=True)

    def compile_one(source: Path) -> Path:
        digest = common.copy()
        digest.update(source.read_bytes())
        target = folder / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        if not target.exists():
            remove(set(folder.glob(f"{source.stem}-*.o")) - {target})
            part = target.with_suffix(f".{os.getpid()}")
            command = [compiler, *FLAGS, *QUIET, f"-I{HERE}", "-x", "c++", "-c", source, "-o", part]
            subprocess.run(command, check=True)
            part.replace(target)
        return target

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources()))
    digest = hashlib.sha256(repr(objects).encode()).hexdigest()[:16]
    library = folder / f"host_cuda-{digest}.so"
    if not library.exists():
        remove(set(folder.glob("host_cuda-*.so")) - {library})
        part = library.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, "-shared", *objects, "-o", part], check=True)
        part.replace(library)
    return library


@functools.cache
def library() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(build(ROOT / "build" / "host_cuda")))
    lib.emulation_places.restype = ctypes.c_char_p
    lib.emulation_configure.argtypes = [*[ctypes.c_int] * 5, ctypes.c_char_p]
    lib.emulation_allow.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    return lib


# ---- the structs of csrc/params.h

DTYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SCALARS: dict[str, Any] = {
    "int64_t": ctypes.c_int64,
    "int32_t": ctypes.c_int32,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "bool": ctypes.c_bool,
    "DType": ctypes.c_int32,
}


@functools.cache
def structs() -> dict[str, type[ctypes.Structure]]:
    """A ctypes structure for every struct of params.h, by name."""
    text = re.sub(r"//[^\n]*", "", (ROOT / "csrc" / "params.h").read_text())
    found: dict[str, type[ctypes.Structure]] = {}
    for name, body in re.findall(r"\bstruct (\w+) \{(.*?)\};", text, re.S):
        fields: list[tuple[str, Any]] = []
        for declaration in filter(None, (d.strip() for d in body.split(";"))):
            match = re.fullmatch(r"(?:const )?(\w+)\s*(\*?)\s*(.+)", declaration, re.S)
            assert match, f"params.h: {declaration!r}"
            kind: Any = ctypes.c_void_p
            if not match[2]:
                kind = SCALARS[match[1]] if match[1] in SCALARS else found[match[1]]
            for member in match[3].split(","):
                fields.append((member.strip().lstrip("*"), kind))
        found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found


@functools.cache
def ops() -> dict[str, str]:
    """The launchers in csrc/cuda/kernels.h, each with its struct."""
    text = (ROOT / "csrc" / "cuda" / "kernels.h").read_text()
    return dict(re.findall(r"\bX\((\w+), (\w+)\)", text))


def _extent(t: Tensor) -> tuple[int, int]:
    """Address and bytes that a view spans."""
    if t.numel() == 0:
        return t.data_ptr(), 0
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), (last + 1) * t.element_size()


def _convert(kind: Any, value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return DTYPE_NUMBERS[value]
    if isinstance(value, dict):
        kinds = dict(kind._fields_)
        return kind(**{name: _convert(kinds[name], inner) for name, inner in value.items()})
    if isinstance(value, Tensor):
        if kind is ctypes.c_void_p:
            return value.data_ptr()
        assert kind.__name__ == "HeadsView" and value.stride(-1) == 1, "a view of heads"
        return kind(value.data_ptr(), *value.stride()[:-1])
    return value


# ---- launches


def launch(
    op: str,
    *,
    schedule: int = 0,
    shared_bytes: int = LEAST_SHARED_BYTES,
    multiprocessors: int = 4,
    compute_capability: int = 90,
    max_blocks: int = 2**31 - 1,
    left_out: str = "",
    early: bool = False,
    **fields: Any,
) -> None:
    """Runs `launch_<op>`.

    Args:
        op: its name.
        schedule: one of SCHEDULES.
        shared_bytes: shared memory that a block can have.
        multiprocessors: of the emulated device.
        compute_capability: of it, 10 * major + minor.
        max_blocks: that the x dimension of its grids may have.
        left_out: a place whose barrier or wait has no effect.
        early: as if launches may start before those in front have ended; here they do not.
        fields: of the op's struct.

    Raises:
        Refused: with what the launcher or the emulation found wrong.
    """
    struct = structs()[ops()[op]]
    kinds = dict(struct._fields_)
    params = struct(**{name: _convert(kinds[name], value) for name, value in fields.items()})
    lib = library()
    device = (shared_bytes, multiprocessors, compute_capability, max_blocks)
    lib.emulation_configure(schedule, *device, left_out.encode())
    inner = [v for f in fields.values() if isinstance(f, dict) for v in f.values()]
    for value in (*fields.values(), *inner):
        if isinstance(value, Tensor):
            lib.emulation_allow(*_extent(value))
    lib.emulated_early_launches(early)
    run = getattr(lib, f"emulated_{op}")
    run.restype = ctypes.c_char_p
    error = run(ctypes.byref(params))
    if error is not None:
        raise Refused(error.decode())


GUARD = 64  # elements


def guarded(shape: Sequence[int], dtype: torch.dtype, *, offset: int = 0) -> Tensor:
    """NaN of this shape, `offset` elements past 16-byte alignment, with NaN before and after it."""
    count = 1
    for size in shape:
        count *= size
    memory = torch.full((GUARD + offset + count + GUARD,), float("nan"), dtype=dtype)
    view = memory[GUARD + offset : GUARD + offset + count].view(*shape)
    assert (memory.data_ptr() + GUARD * memory.element_size()) % 16 == 0
    return view


def assert_guards(out: Tensor) -> None:
    """Nothing was written around what `guarded` gave."""
    memory = torch.empty(0, dtype=out.dtype).set_(out.untyped_storage())
    begin = out.storage_offset()
    assert memory[:begin].isnan().all(), "written before the output"
    assert memory[begin + out.numel() :].isnan().all(), "written behind the output"


def check_schedules(run: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """`run(schedule=...)` gives equal, finite outputs under every schedule, and these are returned.

    Its outputs are fresh ones of `guarded`.
    """
    results = [run(schedule=schedule) for schedule in SCHEDULES]
    for outputs in results:
        for out, first in zip(outputs, results[0], strict=True):
            assert_guards(out)
            assert torch.isfinite(out).all(), "not every element was written"
            assert torch.equal(out, first), "the result depends on the schedule"
    return results[0]


def places(run: Callable[..., tuple[Tensor, ...]]) -> list[str]:
    """The barriers and waits that `run`'s launch reaches, "file:line" each."""
    run(schedule=0)
    return library().emulation_places().decode().split()


def line_of(place: str, behind: int = 0) -> str:
    """The source at a place, or so many lines behind it."""
    file, number = place.split(":")
    lines = (ROOT / "csrc" / "cuda" / file).read_text().splitlines()
    return lines[int(number) - 1 + behind].strip()


def is_needed(run: Callable[..., tuple[Tensor, ...]], place: str) -> bool:
    """Whether without the barrier or wait at `place` something is refused or a result changes."""
    right = run(schedule=0)
    for schedule in SCHEDULES:
        try:
            outputs = run(schedule=schedule, left_out=place)
        except Refused:
            return True
        if not all(torch.equal(out, first) for out, first in zip(outputs, right, strict=True)):
            return True
    return False


def assert_needed(run: Callable[..., tuple[Tensor, ...]], place: str) -> None:
    if not is_needed(run, place):
        pytest.fail(f"nothing fails without the barrier or wait at {place}")
