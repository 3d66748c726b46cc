from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attention_common import int8_rows
from common import DTYPES
from host_cuda.emulator import check_schedules, guarded, launch, places


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("aligned", [True, False])
def test_value(dtype: torch.dtype, aligned: bool) -> None:
    data, scales = int8_rows([9, 50], 40, 3, 24)
    if not aligned:
        wide = torch.zeros(2, 40, 3, 27, dtype=torch.int8)
        wide[..., 2:26] = data
        data = wide[..., 2:26]

    def widen(**options: Any) -> tuple[Tensor]:
        out = guarded((2, 3, 40, 24), dtype)
        out.fill_(7.0)
        launch(
            "widen_cache",
            cache=data,
            scales=scales[..., None],
            out=out,
            key_lengths=torch.tensor([9, 50]),
            batch=2,
            capacity=40,
            num_kv_heads=3,
            head_dim=24,
            dtype=dtype,
            **options,
        )
        return (out,)

    (out,) = check_schedules(widen)
    right = (data * scales[..., None]).to(dtype).transpose(1, 2)
    assert torch.equal(out[0, :, :9], right[0, :, :9])
    assert (out[0, :, 9:] == 7.0).all()  # no key there
    assert torch.equal(out[1], right[1])
    assert torch.equal(widen(max_blocks=1)[0], out)
    assert places(widen) == []  # no barrier is met
