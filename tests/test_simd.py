"""Accuracy of csrc/cpu/simd.h, compiled here on its own for every instruction set that runs."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from common import ISAS

ROOT = Path(__file__).resolve().parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# Name: lanes, flags, the instruction set that the machine must have.
BUILDS = {
    "scalar": (4, [], "scalar"),
    "avx2": (8, AVX2, "avx2"),
    "avx512": (16, AVX512, "avx512"),
    "avx512 on avx2": (16, AVX2, "avx2"),
}

Floats = np.ndarray


class Probe:
    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self.lanes = self._library.probe_lanes()

    def __call__(self, name: str, x: np.ndarray, dtype: type = np.float32) -> np.ndarray:
        x = np.ascontiguousarray(x)
        y = np.zeros(x.shape, dtype)
        self._call(name, x, y, x.size)
        return y

    def reduce(self, x: Floats) -> tuple[Floats, Floats]:
        sums, maxima = np.zeros(len(x), np.float32), np.zeros(len(x), np.float32)
        self._call("reduce", np.ascontiguousarray(x), sums, maxima, len(x))
        return sums, maxima

    def _call(self, name: str, *arguments: np.ndarray | int) -> None:
        getattr(self._library, f"probe_{name}")(
            *(
                ctypes.c_int64(a) if isinstance(a, int) else ctypes.c_void_p(a.ctypes.data)
                for a in arguments
            )
        )


@pytest.fixture(scope="module", params=BUILDS)
def probe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Probe:
    lanes, flags, isa = BUILDS[request.param]
    if COMPILER is None:
        pytest.skip("no C++ compiler on PATH")
    if isa not in ISAS:
        pytest.skip(f"this machine or this build lacks {isa}")
    if isa == "avx512" and os.environ.get("GEMMA2_EXT_EMULATED"):
        pytest.skip("AVX-512 is emulated in this build")
    path = tmp_path_factory.mktemp("simd") / "probe.so"
    command = [COMPILER, "-std=c++17", "-O3", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wno-psabi"]
    command += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", *flags]
    command += [f"-DGEMMA2_LANES={lanes}", "-DGEMMA2_ISA=probed", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(ROOT / "tests" / "simd_probe.cpp"), "-o", str(path)], check=True)
    return Probe(path)


def spread(low: float, high: float, count: int = 1_000_003) -> Floats:
    """Floats of [low, high], evenly spaced and with every exponent."""
    even = np.linspace(low, high, count)
    exponents = np.geomspace(1e-38, max(abs(low), abs(high)), count)
    values = np.concatenate((even, exponents, -exponents)).astype(np.float32)
    return values[(values >= low) & (values <= high)]


def relative_error(actual: Floats, exact: Floats) -> float:
    return float(np.abs(actual.astype(np.float64) / exact - 1).max())


def test_exp(probe: Probe) -> None:
    x = spread(-87.0, 88.0)
    assert relative_error(probe("exp", x), np.exp(x.astype(np.float64))) <= 2.5e-7


def test_exp_at_the_ends(probe: Probe) -> None:
    x = np.array([-math.inf, -1e30, -88.0, 0.0, -0.0, 89.0, 1e30, math.inf, math.nan], np.float32)
    inf = math.inf
    np.testing.assert_array_equal(probe("exp", x), [0, 0, 0, 1, 1, inf, inf, inf, math.nan])
    # Between the smallest normal result and 0, and up to the largest: no step aside.
    x = np.linspace(-89, -87, 10_001).astype(np.float32)
    assert np.all(np.abs(probe("exp", x) - np.exp(x.astype(np.float64))) < 1.2e-38)
    x = np.linspace(88, 90, 10_001).astype(np.float32)
    y = probe("exp", x)
    assert np.all(np.isinf(y) | (np.abs(y / np.exp(x.astype(np.float64)) - 1) < 3e-7))


def test_tanh(probe: Probe) -> None:
    x = spread(-30.0, 30.0)
    x = x[x != 0]
    y = probe("tanh", x)
    assert relative_error(y, np.tanh(x.astype(np.float64))) <= 5e-7
    assert np.abs(y).max() <= 1.0


def test_tanh_at_the_ends(probe: Probe) -> None:
    x = np.array([-math.inf, -1e30, -0.0, 0.0, 1e30, math.inf, math.nan], np.float32)
    y = probe("tanh", x)
    np.testing.assert_allclose(y, [-1, -1, 0, 0, 1, 1, math.nan], rtol=1e-7)
    assert np.signbit(y[2]) and not np.signbit(y[3])
    tiny = np.array([1e-45, -1e-40, 1e-30, -1e-10], np.float32)
    np.testing.assert_array_equal(probe("tanh", tiny), tiny)


@pytest.mark.parametrize("high", [4.0, 1e4, 1.1e6, 3e38])
def test_sincos(probe: Probe, high: float) -> None:
    x = spread(-high, high, 300_001 if high > 1e6 else 1_000_003)
    wide = x.astype(np.float64)
    for name, exact in (("sin", np.sin(wide)), ("cos", np.cos(wide))):
        assert np.abs(probe(name, x) - exact).max() <= 1.5e-7
    # Near multiples of pi/2, where the subtraction cancels.
    x = (np.arange(-20_000, 20_000) * (math.pi / 2)).astype(np.float32)
    wide = x.astype(np.float64)
    small = np.where(np.arange(40_000) % 2 == 0, probe("sin", x), probe("cos", x))
    exact = np.where(np.arange(40_000) % 2 == 0, np.sin(wide), np.cos(wide))
    assert np.abs(small - exact).max() <= 1e-9


def test_sincos_at_the_ends(probe: Probe) -> None:
    x = np.array([math.inf, -math.inf, math.nan, 0.0, 3e38, 1.0], np.float32)
    sine, cosine = probe("sin", x), probe("cos", x)
    assert np.isnan(sine[:3]).all() and np.isnan(cosine[:3]).all()
    assert sine[3] == 0 and cosine[3] == 1
    assert np.isfinite(sine[3:]).all()


def test_round_small(probe: Probe) -> None:
    x = np.concatenate((spread(-4e6, 4e6, 100_001), np.arange(-1000, 1000, dtype=np.float32) / 2))
    np.testing.assert_array_equal(probe("round_small", x), np.rint(x))


def test_reductions(probe: Probe) -> None:
    x = np.random.default_rng(0).standard_normal((100, probe.lanes)).astype(np.float32)
    sums, maxima = probe.reduce(x)
    np.testing.assert_allclose(sums, x.sum(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(maxima, x.max(1))


def bits_equal(actual: np.ndarray, expected: np.ndarray, is_nan: np.ndarray) -> None:
    """Equal to the bit; of NaN only that it is one."""
    np.testing.assert_array_equal(actual[~is_nan], expected[~is_nan])


HALVES = {"bfloat16": torch.bfloat16, "half": torch.float16}


@pytest.mark.parametrize("name", HALVES)
def test_load_every_pattern(probe: Probe, name: str) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    expected = torch.from_numpy(bits.view(np.int16)).view(HALVES[name]).float().numpy()
    # 65535 elements: the last one goes through load_n.
    for part in (slice(0, 65535), slice(1, 65536)):
        actual = probe(f"load_{name}", bits[part])
        nan = np.isnan(expected[part])
        np.testing.assert_array_equal(np.isnan(actual), nan)
        bits_equal(actual.view(np.uint32), expected[part].view(np.uint32), nan)
        back = probe(f"store_{name}", actual, np.uint16)
        bits_equal(back, bits[part], nan)


@pytest.mark.parametrize("name", HALVES)
def test_pairs(probe: Probe, name: str) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    numbers = bits[~torch.from_numpy(bits.view(np.int16)).view(HALVES[name]).isnan().numpy()]
    for count in (1, probe.lanes - 1, probe.lanes, 2 * probe.lanes, 2 * probe.lanes + 1, 77, None):
        some = numbers[:count]
        np.testing.assert_array_equal(probe(f"pairs_of_{name}", some, np.uint16), some)
        if name == "bfloat16":
            wide = probe("pairs_to_float", some)
            np.testing.assert_array_equal(wide.view(np.uint32), some.astype(np.uint32) << 16)
            np.testing.assert_array_equal(probe("pairs_from_float", wide, np.uint16), some)


@pytest.mark.parametrize("name", HALVES)
def test_rounding(probe: Probe, name: str) -> None:
    dtype = HALVES[name]
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).float()
    values = values[torch.isfinite(values)].sort().values
    # Every tie between neighbours, and what lies one float32 to both sides of it.
    ties = ((values[1:].double() + values[:-1].double()) / 2).float()
    infinity = torch.tensor(math.inf)
    below, above = torch.nextafter(ties, -infinity), torch.nextafter(ties, infinity)
    ends = torch.tensor([65519.0, 65520.0, 65536.0, 3.4e38, math.inf, -math.inf, math.nan, 0.0])
    snan = torch.tensor([0x7F800001, 0xFF800001 - (1 << 32), 0x7FFFFFFF], dtype=torch.int32)
    x = torch.cat((ties, below, above, ends, -ends, snan.view(torch.float32)))
    expected = x.to(dtype)
    nan = x.isnan().numpy()
    wanted = expected.view(torch.int16).numpy().view(np.uint16)
    stores: list[Callable[[], np.ndarray]] = [
        lambda: probe(f"store_{name}", x.numpy(), np.uint16),
        lambda: probe(f"one_by_one_{name}", x.numpy(), np.uint16),
    ]
    if name == "bfloat16":
        stores += [
            lambda: probe("pairs_from_float", x.numpy(), np.uint16),
            lambda: probe("pairs_rounded", x.numpy(), np.uint16),
        ]
    for store in stores:
        actual = store()
        bits_equal(actual, wanted, nan)
        assert torch.from_numpy(actual.view(np.int16)).view(dtype).isnan().numpy()[nan].all()
    rounded = probe(f"round_to_{name}", x.numpy())
    bits_equal(rounded.view(np.uint32), expected.float().numpy().view(np.uint32), nan)
    assert np.isnan(rounded[nan]).all()
