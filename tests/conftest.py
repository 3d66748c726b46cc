from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import gemma2_ext
from common import ISAS

HAS_CUDA = torch.cuda.is_available() and gemma2_ext._C.build_info()["cuda"]


@pytest.fixture(params=[*ISAS, *(["cuda"] if HAS_CUDA else [])])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on every instruction set of this machine, and on its GPU where it has one.

    On the GPU ("cuda") everything that the test makes is made there.
    """
    if request.param == "cuda":
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
