from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from common import DTYPES
from gemma2_ext import ops
from packed_ops import assert_exact, assert_logits_gradient, exact_x, packed

OP = torch.ops.gemma2_ext.logits_int8.default
OUT_OP = torch.ops.gemma2_ext.logits_int8_out.default


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 0.5, 30.0])
def test_value(isa: str, dtype: torch.dtype, softcap: float | None) -> None:
    for hidden_size, vocab_size in ((1, 7), (41, 1), (111, 250)):
        weight = packed(vocab_size, hidden_size, "int8")
        for rows in (0, 1, 4, 70):
            hidden = exact_x(rows, hidden_size, dtype)
            actual = ops.logits(hidden, weight, softcap)
            assert actual.dtype == torch.float32
            assert_exact(actual, hidden, weight, softcap)
            direct = ops.logits_int8(hidden, weight.data, weight.scales, softcap)
            assert torch.equal(direct, actual)


def test_softcap_bites(isa: str) -> None:
    weight, hidden = packed(100, 256, "int8"), 100 * torch.randn(3, 256)
    plain, capped = ops.logits(hidden, weight), ops.logits(hidden, weight, 30.0)
    assert plain.abs().max() > 100
    assert capped.abs().max() <= 30
    torch.testing.assert_close(capped, 30 * torch.tanh(plain / 30))


def test_opcheck() -> None:
    weight, hidden = packed(10, 16, "int8"), torch.randn(6, 16)
    opcheck(OP, (hidden.view(2, 3, 16), weight.data, weight.scales, 30.0))
    opcheck(OUT_OP, (hidden, weight.data, weight.scales, None, torch.empty(6, 10)))


def test_compile_without_graph_breaks() -> None:
    weight, hidden = packed(33, 64, "int8"), torch.randn(5, 64)
    compiled = torch.compile(lambda h: ops.logits(h, weight, 30.0) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(hidden), ops.logits(hidden, weight, 30.0) * 2)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient(dtype: torch.dtype, softcap: float | None) -> None:
    assert_logits_gradient(packed(33, 64, "int8"), torch.randn(2, 5, 64).to(dtype), softcap)


def test_errors() -> None:
    weight, hidden = packed(33, 64, "int8"), torch.randn(5, 64)
    with pytest.raises(ValueError, match="logits: hidden must have shape"):
        ops.logits(hidden[:, 1:], weight)
    with pytest.raises(TypeError, match=r"logits_int8: scales must be a torch\.Tensor, got None"):
        ops.logits_int8(hidden, weight.data, None)  # type: ignore[arg-type]
    for softcap in (0.0, float("nan")):
        with pytest.raises(ValueError, match="softcap must be positive and finite, or None"):
            ops.logits(hidden, weight, softcap)
    with pytest.raises(ValueError, match="out must be Float, got BFloat16"):
        OUT_OP(hidden, weight.data, weight.scales, None, torch.empty(5, 33).bfloat16())
