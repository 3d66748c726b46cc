from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import gemma2_ext
from common import ISAS


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on every instruction set of this machine."""
    before = gemma2_ext._C.cpu_isa()
    gemma2_ext._C.set_cpu_isa(request.param)
    yield request.param
    gemma2_ext._C.set_cpu_isa(before)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
