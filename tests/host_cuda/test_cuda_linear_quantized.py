from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from common import assert_accurate
from gemma2_ext import reference
from host_cuda.emulator import (
    ROOT,
    Refused,
    assert_guards,
    assert_needed,
    check_schedules,
    guarded,
    launch,
    places,
)

FORMATS = ("int8", "int4")
# Without clusters, which may share the columns of a few blocks of weight, and with them.
DEVICES = pytest.mark.parametrize("compute_capability", [80, 90])


def blocks(rows: Tensor, width: int) -> Tensor:
    """(rows, n) as the kernels read it: blocks of 16 rows, each [n / width][row][width], flat."""
    parts = [
        block.view(len(block), -1, width).transpose(0, 1).reshape(-1) for block in rows.split(16)
    ]
    return torch.cat(parts)


def random_weight(format: str, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """data, scales, and the float32 matrix that they stand for."""
    padded = -(-columns // 32) * 32
    if format == "int8":
        q = torch.randint(-127, 128, (rows, padded), dtype=torch.int8)
        q[:, columns:] = 0
        scale = (torch.rand(rows, padded // 32) / 1000).bfloat16()
        exact = q.float() * scale.float().repeat_interleave(32, dim=1)
        return blocks(q, 4), blocks(scale, 1), exact[:, :columns]
    q = torch.randint(0, 16, (rows, padded), dtype=torch.uint8)
    q[:, columns:] = 8
    s = torch.randint(-127, 128, (rows, padded // 16), dtype=torch.int8)
    row = (torch.rand(rows) / 1e6).bfloat16()
    pieces = q.view(rows, -1, 2, 16)
    data = (pieces[:, :, 0] | pieces[:, :, 1] << 4).view(rows, -1)
    scales = torch.cat(
        [
            torch.cat((f.view(torch.int8), blocks(g, 1)))
            for f, g in zip(row.split(16), s.split(16), strict=True)
        ]
    )
    factors = row.float()[:, None] * (s.float() * s.float().abs())
    exact = (q.float() - 8) * factors.repeat_interleave(16, dim=1)
    return blocks(data, 4), scales, exact[:, :columns]


def linear(
    format: str,
    x: Tensor,
    packed: tuple[Tensor, Tensor, Tensor],
    *,
    softcap: float = 0.0,
    out_dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[Tensor]:
    data, scales, exact = packed
    out = guarded((x.shape[0], exact.shape[0]), out_dtype or x.dtype)
    launch(
        f"linear_{format}",
        x=x,
        x_stride=x.stride(0),
        weight=data,
        scales=scales,
        out=out,
        out_stride=out.stride(0),
        rows=x.shape[0],
        in_features=x.shape[1],
        out_features=exact.shape[0],
        softcap=softcap,
        dtype=x.dtype,
        out_dtype=out.dtype,
        **options,
    )
    return (out,)


def product(x: Tensor, weight: Tensor) -> Tensor:
    return reference.linear(x, weight.to(x.dtype))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 16])
@DEVICES
def test_rows(format: str, dtype: torch.dtype, rows: int, compute_capability: int) -> None:
    packed, x = random_weight(format, 41, 264), torch.randn(rows, 264).to(dtype)
    device = {"compute_capability": compute_capability}
    (out,) = check_schedules(lambda **options: linear(format, x, packed, **device, **options))
    assert_accurate(out, product, x, packed[2])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("in_features", "out_features"), [(1, 1), (31, 15), (33, 17), (41, 33), (1100, 16), (2304, 32)]
)
@DEVICES
def test_any_size(
    format: str, in_features: int, out_features: int, compute_capability: int
) -> None:
    packed = random_weight(format, out_features, in_features)
    for rows in (1, 3, 5):
        x = torch.randn(rows, in_features).bfloat16()
        (out,) = linear(format, x, packed, compute_capability=compute_capability)
        assert_accurate(out, product, x, packed[2])


@pytest.mark.parametrize("format", FORMATS)
@DEVICES
def test_a_row_is_the_same_beside_others(format: str, compute_capability: int) -> None:
    packed, x = random_weight(format, 33, 1100), torch.randn(4, 1100).bfloat16()
    device = {"compute_capability": compute_capability}
    (all_rows,) = linear(format, x, packed, **device)
    for rows in (1, 2, 3):
        assert torch.equal(linear(format, x[:rows], packed, **device)[0], all_rows[:rows])
    assert torch.equal(linear(format, x, packed, early=True, **device)[0], all_rows)


@pytest.mark.parametrize("format", FORMATS)
def test_x_that_shared_memory_cannot_hold_and_few_blocks(format: str) -> None:
    packed, x = random_weight(format, 49, 6500), torch.randn(4, 6500).bfloat16()
    (out,) = linear(format, x, packed, max_blocks=2)
    assert_accurate(out, product, x, packed[2])


# Of so many blocks of weights four warps make a team; with so little shared memory two teams share
# half of x at a time.
MANY_BLOCKS, LITTLE_MEMORY = (8201, 2304), {"int8": 63 << 10, "int4": 67 << 10}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 4])
def test_teams_of_warps(format: str, rows: int) -> None:
    packed, x = random_weight(format, *MANY_BLOCKS), torch.randn(rows, 2304).bfloat16()
    (out,) = check_schedules(lambda **options: linear(format, x, packed, **options))
    assert_accurate(out, product, x, packed[2])
    devices: list[dict[str, int]] = [
        {"shared_bytes": LITTLE_MEMORY[format]},
        {"shared_bytes": 227 << 10, "multiprocessors": 132},
    ]
    for device in devices:
        assert torch.equal(linear(format, x, packed, **device)[0], out)


# A few blocks of long rows on so few multiprocessors: clusters of blocks share their columns.
FEW_BLOCKS, LARGE_MEMORY = (73, 9216), 227 << 10


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("columns", [9216, 9217, 8000])
def test_clusters_share_columns(format: str, columns: int) -> None:
    packed = random_weight(format, FEW_BLOCKS[0], columns)
    x = torch.randn(4, columns).bfloat16()
    run = lambda **options: linear(format, x, packed, shared_bytes=LARGE_MEMORY, **options)  # noqa: E731
    (out,) = check_schedules(run)
    assert_accurate(out, product, x, packed[2])
    for rows in (1, 2, 3):
        (alone,) = linear(format, x[:rows], packed, shared_bytes=LARGE_MEMORY)
        assert torch.equal(alone, out[:rows])
    (without,) = run(compute_capability=80)
    assert_accurate(without, product, x, packed[2])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_teams_of_most_warps_fit_every_device(format: str, rows: int) -> None:
    """In the 99 KiB of devices that have no clusters to share the columns either."""
    packed, x = random_weight(format, 16, 9216), torch.randn(rows, 9216).bfloat16()
    (out,) = linear(format, x, packed, compute_capability=86)
    assert_accurate(out, product, x, packed[2])


@pytest.mark.parametrize("format", FORMATS)
def test_weights_at_an_odd_place(format: str) -> None:
    data, scales, exact = random_weight(format, 32, 264)
    x = torch.randn(2, 264).bfloat16()
    (right,) = linear(format, x, (data, scales, exact))
    moved = torch.cat((data[:4], data))[4:], torch.cat((scales[:2], scales))[2:], exact
    assert moved[0].data_ptr() % 8 == 4
    assert torch.equal(linear(format, x, moved)[0], right)


@pytest.mark.parametrize("format", FORMATS)
def test_unaligned_x_and_soft_cap(format: str) -> None:
    packed, x = random_weight(format, 20, 72), 30 * torch.randn(2, 72).bfloat16()
    moved = torch.empty(2 * 73 + 1).bfloat16()[1:].view(2, 73)[:, :72].copy_(x)
    options: dict[str, Any] = {"softcap": 30.0, "out_dtype": torch.float32}
    (out,) = linear(format, x, packed, **options)
    assert torch.equal(linear(format, moved, packed, **options)[0], out)
    exact = x.double() @ packed[2].double().T
    assert (out.double() - 30 * torch.tanh(exact / 30)).abs().max() < 2e-5


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (19, 41), (32, 300), (16, 5000)])
def test_dequantize(format: str, dtype: torch.dtype, rows: int, columns: int) -> None:
    data, scales, exact = random_weight(format, rows, columns)
    out = guarded((rows, columns), dtype)
    launch(
        f"dequantize_{format}",
        data=data,
        scales=scales,
        out=out,
        out_features=rows,
        in_features=columns,
        dtype=dtype,
    )
    torch.testing.assert_close(out, exact.to(dtype))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (19, 41), (32, 2304)])
def test_embedding(format: str, dtype: torch.dtype, rows: int, columns: int) -> None:
    data, scales, exact = random_weight(format, rows, columns)
    ids = torch.randint(rows, (9,))
    out = guarded((9, columns), dtype)
    given = {"ids": ids, "data": data, "scales": scales, "scale": 48.0, "count": 9, "out": out}
    shape = {"out_features": rows, "in_features": columns, "dtype": dtype}
    launch(f"embedding_{format}", **given, **shape, max_blocks=4)
    assert_guards(out)
    assert torch.equal(out, exact.to(dtype)[ids] * 48.0)
    ids[2], ids[5] = -1, rows
    launch(f"embedding_{format}", **given, **shape)
    assert out[2].isnan().all()
    assert out[5].isnan().all()
    assert out[[0, 1, 3, 4, 6, 7, 8]].isfinite().all()


def test_float32_and_misaligned_data_are_refused() -> None:
    data, scales, exact = random_weight("int8", 16, 32)
    x = torch.randn(1, 32)
    with pytest.raises(Refused, match="linear_int8: the kernel takes 16-bit x"):
        linear("int8", x, (data, scales, exact))
    moved = torch.cat((data[:1], data))[1:]
    with pytest.raises(Refused, match="data must be aligned to 4 bytes"):
        linear("int8", x.bfloat16(), (moved, scales, exact))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "columns", "barriers"), [(9, 1024, 2), (4, 6500, 5)])
def test_every_barrier_is_needed(format: str, rows: int, columns: int, barriers: int) -> None:
    packed, x = random_weight(format, 48, columns), torch.randn(rows, columns).bfloat16()
    run = lambda **options: linear(format, x, packed, max_blocks=1, **options)  # noqa: E731
    assert len(places(run)) == barriers
    for place in places(run):
        assert_needed(run, place)


@pytest.mark.parametrize("format", FORMATS)
def test_every_barrier_of_teams_is_needed(format: str) -> None:
    packed, x = random_weight(format, *MANY_BLOCKS), torch.randn(2, 2304).bfloat16()
    memory = LITTLE_MEMORY[format]
    run = lambda **options: linear(format, x, packed, shared_bytes=memory, **options)  # noqa: E731
    assert len(places(run)) == 5
    for place in places(run):
        assert_needed(run, place)


@pytest.mark.parametrize("format", FORMATS)
def test_every_barrier_of_clusters_is_needed(format: str) -> None:
    packed, x = random_weight(format, *FEW_BLOCKS), torch.randn(2, FEW_BLOCKS[1]).bfloat16()
    run = lambda **options: linear(format, x, packed, shared_bytes=LARGE_MEMORY, **options)  # noqa: E731
    found = places(run)
    assert len(found) == 7
    for place in found:
        source = (ROOT / "csrc" / "cuda" / "linear_quantized.cu").read_text().splitlines()
        # Of one part of x nothing has been used before.
        if "the part before" not in source[int(place.split(":")[1]) - 1]:
            assert_needed(run, place)
