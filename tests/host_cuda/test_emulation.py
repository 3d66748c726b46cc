"""The emulation itself: its products are right, and it finds the mistakes that it is there for."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

from host_cuda.emulator import (
    DTYPE_NUMBERS,
    LEAST_SHARED_BYTES,
    SCHEDULES,
    library,
    ops,
    structs,
)


def configure(schedule: int, left_out: str = "") -> ctypes.CDLL:
    lib = library()
    lib.emulation_configure(schedule, LEAST_SHARED_BYTES, 4, 90, 2**31 - 1, left_out.encode())
    for probe in (lib.probe_product, lib.probe_mistake, lib.probe_cluster, lib.probe_wgmma):
        probe.restype = ctypes.c_char_p
    return lib


def address(t: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_product_of_matrices(dtype: torch.dtype, transposed: bool) -> None:
    a, b = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype)
    given = b.T.contiguous() if transposed else b
    for schedule in SCHEDULES:
        out = torch.full((16, 8), float("nan"))
        lib = configure(schedule)
        number = DTYPE_NUMBERS[dtype]
        error = lib.probe_product(number, address(a), address(given), address(out), transposed)
        assert error is None
        torch.testing.assert_close(out, a.float() @ b.float().T)


def mistake(number: int, schedule: int = 0, left_out: str = "") -> tuple[str, torch.Tensor]:
    memory = torch.arange(128.0)
    values, out = memory[:64], torch.full((68,), float("nan"))
    lib = configure(schedule, left_out)
    lib.emulation_allow(values.data_ptr(), 256)
    lib.emulation_allow(out.data_ptr(), 272)
    error = lib.probe_mistake(number, address(values), address(out))
    return (error or b"").decode(), out[:64]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_mistakes_are_found(schedule: int) -> None:
    error, out = mistake(0, schedule)
    assert error == ""
    assert torch.equal(out, torch.arange(64.0).flip(0))
    for number, message in {
        1: "shared memory was written at byte 256 of 256",
        2: "two barriers|waits at",
        3: "lanes of a warp are at two functions",
        4: "lanes of a warp are at two|waits at",
        5: "16 bytes is not aligned",
        6: "16 bytes outside of every tensor",
        7: "cp.async writes outside of shared memory",
        8: "102400 bytes of shared memory, the device has 101376",
        9: "a block of 48 threads",
        10: "ends while a copy of its is on its way",
    }.items():
        error, out = mistake(number, schedule)
        if number == 10 and schedule in (1, 3, 4):  # copies land at once
            continue
        wrong = not torch.equal(out, torch.arange(64.0).flip(0))
        if number in (2, 4) and not error:
            assert wrong, f"mistake {number} is not found"  # the barriers met by chance
            continue
        assert re.search(message, error), (number, error)


@pytest.mark.parametrize("what", ["cp_async_wait", "__syncthreads"])
def test_a_barrier_or_wait_left_out_shows(what: str) -> None:
    source = (__file__.rsplit("/", 1)[0]) + "/probes.cpp"
    with open(source) as file:
        lines = file.read().splitlines()
    start = next(i for i, line in enumerate(lines) if "void mistake_kernel" in line)
    number = next(i for i, line in enumerate(lines) if i > start + 8 and f"  {what}" in line) + 1
    place = f"probes.cpp:{number}"
    results = [mistake(0, schedule, place) for schedule in SCHEDULES]
    right = torch.arange(64.0).flip(0)
    assert any(error or not torch.equal(out, right) for error, out in results)


def cluster(
    blocks: int, grid: int, mistake: int = 0, schedule: int = 0, left_out: str = ""
) -> tuple[str, torch.Tensor]:
    out = torch.full((grid, 64), float("nan"))
    error = configure(schedule, left_out).probe_cluster(mistake, blocks, grid, address(out))
    return (error or b"").decode(), out


def of_next_block(blocks: int, grid: int) -> torch.Tensor:
    first = torch.arange(grid) // blocks * blocks
    following = first + (torch.arange(grid) + 1) % blocks
    return 100.0 * following[:, None] + torch.arange(64.0).flip(0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_clusters(schedule: int) -> None:
    for blocks, grid in ((1, 3), (2, 6), (8, 16)):
        error, out = cluster(blocks, grid, schedule=schedule)
        assert error == ""
        assert torch.equal(out, of_next_block(blocks, grid))
    for mistake, message in {2: "no block 2", 3: "that is not in shared memory"}.items():
        assert message in cluster(2, 4, mistake, schedule)[0]
    assert "clusters of 9 blocks" in cluster(9, 18, 0, schedule)[0]
    assert "clusters of 2 blocks" in cluster(2, 3, 0, schedule)[0]


@pytest.mark.parametrize("mistake", [1, 4])
def test_a_block_that_has_ended_has_nothing_to_read(mistake: int) -> None:
    results = [cluster(4, 4, mistake, schedule)[1] for schedule in SCHEDULES]
    assert any(out.isnan().any() for out in results)


def test_a_barrier_of_a_cluster_left_out_shows() -> None:
    cluster(4, 4)
    places = library().emulation_places().decode().split()
    assert len(places) == 2
    for place in places:
        results = [cluster(4, 4, 0, schedule, place)[1] for schedule in SCHEDULES]
        assert not all(torch.equal(out, of_next_block(4, 4)) for out in results)


def warpgroup(
    rows: int, mistake: int = 0, schedule: int = 0, left_out: str = ""
) -> tuple[str, torch.Tensor, torch.Tensor]:
    """The error, what comes out, and what should."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 64, 64).bfloat16()
    out = torch.full((2, 64, 64), float("nan"))
    lib = configure(schedule, left_out)
    error = lib.probe_wgmma(mistake, address(a), address(b), rows, address(out))
    first, second = a.float(), b.float()
    second[rows:] = 0
    with_rows = first.clone()
    with_rows[rows:] = 0  # as it comes through shared memory
    return (error or b"").decode(), out, torch.stack([with_rows @ second.T, first @ second])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_products_of_a_warpgroup(schedule: int) -> None:
    for rows in (64, 37):
        error, out, right = warpgroup(rows, schedule=schedule)
        assert error == ""
        torch.testing.assert_close(out, right)
    for number, message in {
        1: "an mbarrier that is not initialized",
        2: "more arrivals than an mbarrier expects",
        3: "a bulk copy's memory is not aligned",
        4: "a bulk copy writes outside of shared memory",
        7: "a product reads what thread",
        8: "a product reads what thread",
        9: "a bulk copy writes over what thread 0",
        10: "a product without a fence of its registers",
    }.items():
        assert message in warpgroup(64, number, schedule)[0]


def test_what_a_warpgroup_leaves_on_its_way_is_found() -> None:
    errors = {n: {warpgroup(64, n, schedule)[0] for schedule in SCHEDULES} for n in (5, 6)}
    assert any("a warp ends before its products" in error for error in errors[5])
    assert any("a block ends before its bulk copies" in error for error in errors[6])
    warpgroup(64)
    places = library().emulation_places().decode().split()
    # The barrier's initialization, its fence, the copies, the registers' fence, the products.
    assert len(places) == 5
    for place in places:
        results = [warpgroup(64, 0, schedule, place) for schedule in SCHEDULES]
        assert any(error or not torch.allclose(out, right) for error, out, right in results)


def test_structs_are_those_of_the_compiler() -> None:
    """Sizes by the rules of C; a field that the parser missed would shift all that follow."""
    for op, struct in ops().items():
        assert struct in structs(), op
    assert ctypes.sizeof(structs()["HeadsView"]) == 32
    assert structs()["RmsNormParams"].weight_dtype.offset == 60
