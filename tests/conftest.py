from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

import gemma2_ext
from common import ISAS

with suppress(ImportError):
    from hypothesis import settings

    # The same examples in every run: a failure is one of the code at hand, and can be repeated.
    settings.register_profile("repeatable", derandomize=True, database=None)
    settings.load_profile("repeatable")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # As in a shell's background job. The programs that tests start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

HAS_CUDA = torch.cuda.is_available() and gemma2_ext._C.build_info()["cuda"]


# These are another level but for products of packed weights: test_isa.py has them.
TESTED_ISAS = [name for name in ISAS if not name.endswith("_vnni")]


@pytest.fixture(params=[*TESTED_ISAS, *(["cuda"] if HAS_CUDA else [])])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on every instruction set of this machine, and on its GPU where it has one.

    On the GPU ("cuda") everything that the test makes is made there.
    """
    if request.param == "cuda":
        # cuBLAS may add up parts of a product in 16 bits unless told otherwise.
        matmul = torch.backends.cuda.matmul
        matmul.allow_fp16_reduced_precision_reduction = False
        matmul.allow_bf16_reduced_precision_reduction = False
        torch.set_default_device("cuda")
        yield "cuda"
        torch.set_default_device(None)
        return
    before = gemma2_ext._C.cpu_isa()
    gemma2_ext._C.set_cpu_isa(request.param)
    yield request.param
    gemma2_ext._C.set_cpu_isa(before)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
