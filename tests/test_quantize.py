from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gemma2_ext
from common import DTYPES, ISAS, LAYOUTS, with_strides
from gemma2_ext import QuantizedWeight, ops, quantize, reference

FORMATS = quantize.FORMATS
BITS = {"int8": 8.5, "int4": 4.5}


def weights(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.05 * torch.randn(rows, columns)).to(dtype)


def q4_0(weight: Tensor) -> Tensor:
    """What llama.cpp's Q4_0 makes of a matrix of whole groups of 32, by its published rule: the
    value of largest magnitude over -8 is the scale, float16; q = floor(x / d + 8.5), at most 15."""
    groups = weight.float().view(len(weight), -1, 32)
    place = groups.abs().argmax(-1, keepdim=True)
    exact = groups.gather(-1, place) / -8
    inverse = torch.where(exact != 0, 1 / exact, 0.0)
    q = (groups * inverse + 8.5).floor().clamp(0, 15)
    return ((q - 8) * exact.half().float()).view_as(weight)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).square().sum() / expected.square().sum()).sqrt().item()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 35])
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 100])
def test_error_at_every_edge(isa: str, format: quantize.Format, rows: int, columns: int) -> None:
    weight = weights(rows, columns)
    quantized = ops.quantize(weight, format)
    back = quantized.dequantize()
    assert back.shape == weight.shape
    assert back.dtype == torch.float32
    size = quantized.group_size
    padded = torch.nn.functional.pad(weight, (0, -columns % 32)).abs()
    largest = padded.unfold(1, size, size).amax(-1).repeat_interleave(size, 1)
    # int8: half a step of the scale, which is rounded up by at most 2^-7. int4: a step of the
    # largest group's scale is 1 / 6 of the largest magnitude, and what is clipped at 8.75 loses
    # 1.75 steps.
    bound = largest * (0.5 / 127 * (1 + 2**-7) if format == "int8" else 1.75 / 8.75)
    assert ((back - weight).abs() <= bound[:, :columns] + 1e-30).all()
    assert torch.equal(back, quantized.rows(torch.arange(rows)))


@pytest.mark.parametrize("format", FORMATS)
def test_large_weights_in_huge_pages_are_as_small_ones(format: quantize.Format) -> None:
    weight = weights(2080, 4096)
    large = ops.quantize(weight, format)
    assert large.data.nbytes >= quantize.HUGE_PAGES_FROM > large.scales.nbytes
    assert large.data.data_ptr() % (2 << 20) == 0
    for first in range(0, 2080, 416):  # whole blocks of rows, which are packed each on its own
        part = ops.quantize(weight[first : first + 416], format)
        assert torch.equal(large.data[first : first + 416], part.data)
        assert torch.equal(large.scales[first : first + 416], part.scales)
    x = torch.randn(2, 4096)
    right = ops.linear(x, large)
    saved = io.BytesIO()
    torch.save(large.data, saved)
    saved.seek(0)
    for data in (copy.deepcopy(large.data), torch.load(saved), large.data.share_memory_()):
        other = QuantizedWeight(data, large.scales, format, large.shape)
        assert torch.equal(ops.linear(x, other), right)


@pytest.mark.parametrize("format", FORMATS)
def test_representable_weights_come_back_to_the_bit(isa: str, format: quantize.Format) -> None:
    for rows, columns in ((16, 64), (5, 33), (40, 129)):
        if format == "int8":
            q = torch.randint(-127, 128, (rows, columns)).float()
            q[:, ::32] = 127
            weight = q * 2.0**-9
        else:
            q = torch.randint(-8, 8, (rows, columns)).float()
            q[:, ::16] = -8
            weight = q * 2.0**-5
        back = ops.quantize(weight, format).dequantize()
        if format == "int8":
            assert torch.equal(back, weight)
        else:  # the scale is one of a few
            assert relative_error(back, weight) < 0.01


@pytest.mark.parametrize("format", FORMATS)
def test_zeros(isa: str, format: quantize.Format) -> None:
    weight = weights(20, 100)
    weight[3] = 0
    weight[5, 32:64] = 0
    back = ops.quantize(weight, format).dequantize()
    assert (back[3] == 0).all() and (back[5, 32:64] == 0).all()
    assert (ops.quantize(torch.zeros(20, 100), format).dequantize() == 0).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1.0, 1e20, 1e36])
def test_any_magnitude(isa: str, format: quantize.Format, factor: float) -> None:
    weight = weights(20, 96)
    back = ops.quantize(weight * factor, format).dequantize().double()
    assert relative_error(back / factor, weight.double()) < (0.007 if format == "int8" else 0.08)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_dtypes_and_strides(isa: str, format: quantize.Format, dtype: torch.dtype) -> None:
    weight = weights(37, 75, dtype)
    expected = ops.quantize(weight.float(), format)
    for layout in LAYOUTS:
        actual = ops.quantize(with_strides(weight, layout), format)
        assert torch.equal(actual.data, expected.data)
        assert torch.equal(actual.scales.view(torch.int8), expected.scales.view(torch.int8))
    actual = ops.quantize(weight.T.contiguous().T, format)
    assert torch.equal(actual.data, expected.data)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_instruction_set_errs_as_little(isa: str, format: quantize.Format) -> None:
    weight, before = weights(64, 320), gemma2_ext._C.cpu_isa()
    expected = relative_error(ops.quantize(weight, format).dequantize(), weight)
    gemma2_ext._C.set_cpu_isa(isa)
    try:
        actual = relative_error(ops.quantize(weight, format).dequantize(), weight)
    finally:
        gemma2_ext._C.set_cpu_isa(before)
    assert abs(actual / expected - 1) < 1e-5


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "outliers", "one outlier", "ramp"])
def test_int4_errs_less_than_q4_0(kind: str) -> None:
    weight = weights(64, 2304)
    if kind == "heavy tails":
        weight = 0.02 * torch.distributions.StudentT(4.0).sample((64, 2304))
    elif kind == "outliers":
        weight[torch.rand(weight.shape) < 0.001] *= 30
    elif kind == "one outlier":
        weight[7, 99] = 50
    elif kind == "ramp":
        weight *= torch.logspace(-3, 0, 2304)
    ours = ops.quantize(weight, "int4").dequantize()
    theirs = q4_0(weight)
    assert relative_error(ours, weight) <= relative_error(theirs, weight)
    if kind != "one outlier":
        assert relative_error(ours, weight) < 0.9 * relative_error(theirs, weight)
    # Nor for the rest of the row that the outlier is in.
    rest = torch.arange(2304) // 32 != 99 // 32
    assert relative_error(ours[7, rest], weight[7, rest]) < 1.1 * relative_error(
        theirs[7, rest], weight[7, rest]
    )


@pytest.mark.parametrize("format", FORMATS)
def test_bits_a_weight(format: quantize.Format) -> None:
    quantized = ops.quantize(weights(64, 2304), format)
    per_row = 16 if format == "int4" else 0
    assert quantized.nbytes * 8 == 64 * (2304 * BITS[format] + per_row)
    assert quantized.nbytes == quantize.packed_bytes(format, (64, 2304))


@pytest.mark.parametrize("format", FORMATS)
def test_reference_unpacks_the_same(format: quantize.Format) -> None:
    for rows, columns in ((35, 75), (16, 32), (3, 1), (0, 5)):
        quantized = ops.quantize(weights(rows, columns), format)
        bits = 8 if format == "int8" else 4
        unpacked = reference._unpack(quantized.data, quantized.scales, columns, bits)
        assert torch.equal(unpacked, quantized.dequantize())


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 50),
    columns=st.integers(0, 140),
    format=st.sampled_from(FORMATS),
)
def test_packing_and_unpacking(rows: int, columns: int, format: quantize.Format) -> None:
    padded = -(-columns // 32) * 32
    if format == "int8":
        q = torch.randint(-127, 128, (rows, padded)).to(torch.int8)
        scales = torch.rand(rows, padded // 32).bfloat16()
        expected = q.float() * scales.float().repeat_interleave(32, 1)
        packed = quantize.pack_rows(q, 4), quantize.pack_rows(scales, 1)
    else:
        q = torch.randint(0, 16, (rows, padded)).to(torch.uint8)
        s = torch.randint(-127, 128, (rows, padded // 16)).to(torch.int8)
        row = torch.rand(rows, 1).bfloat16()
        factor = row.float() * (s.float() * s.float().abs())
        expected = (q.float() - 8) * factor.repeat_interleave(16, 1)
        packed = quantize.pack_rows(quantize.join_halves(q), 4), quantize.join_scales(row, s)
    weight = QuantizedWeight(*packed, format, (rows, columns))
    assert torch.equal(weight.dequantize(), expected[:, :columns])
    index = torch.randint(0, max(rows, 1), (2, 3 if rows else 0))
    assert torch.equal(weight.rows(index), expected[:, :columns][index])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(isa: str, format: quantize.Format, dtype: torch.dtype) -> None:
    for rows, columns in ((40, 33), (16, 64), (7, 100)):
        weight = ops.quantize(weights(rows, columns), format)
        for shape in ((), (0,), (5,), (2, 300)):
            ids = torch.randint(0, rows, shape)
            out = torch.full((*shape, columns), torch.nan, dtype=dtype)
            quantize.embedding_op(format)(ids, weight.data, weight.scales, 48.0, out)
            assert torch.equal(out, weight.dequantize()[ids].to(dtype) * 48.0)
            assert torch.equal(weight.rows(ids, dtype, 48.0), out)


@pytest.mark.parametrize("format", FORMATS)
def test_embedding_bad_input(format: quantize.Format) -> None:
    weight = ops.quantize(weights(20, 64), format)
    packed = weight.data, weight.scales
    ids, out = torch.zeros(3, dtype=torch.int64), torch.empty(3, 64)
    op = quantize.embedding_op(format)
    for wrong in (-1, 20):
        with pytest.raises(ValueError, match=rf"ids must be in \[0, .* = 20\), got {wrong}"):
            op(torch.tensor([0, wrong, 1]), *packed, 1.0, out)
    for bad_ids in (ids.int(), torch.zeros(6, dtype=torch.int64)[::2]):
        with pytest.raises(ValueError, match="ids must be contiguous int64"):
            op(bad_ids, *packed, 1.0, out)
    for bad_out in (out[:2], out[0], torch.empty(64, 3).t()):
        with pytest.raises(ValueError, match="out must be contiguous of shape"):
            op(ids, *packed, 1.0, bad_out)
    with pytest.raises(ValueError, match="out must be float32, bfloat16 or float16"):
        op(ids, *packed, 1.0, out.int())
    with pytest.raises(ValueError, match="data must have shape"):
        op(ids, *packed, 1.0, torch.empty(3, 200))


@pytest.mark.parametrize("format", FORMATS)
def test_module(format: quantize.Format) -> None:
    weight = ops.quantize(weights(33, 70), format)
    size = weight.group_size
    assert repr(weight) == (
        f"QuantizedWeight({format}, out_features=33, in_features=70, group_size={size})"
    )
    assert weight.shape == (33, 70)
    assert (weight.out_features, weight.in_features) == (33, 70)
    twin = copy.deepcopy(weight)
    assert twin.data.data_ptr() != weight.data.data_ptr()
    assert torch.equal(twin.dequantize(), weight.dequantize())
    for moved in (twin.to(torch.float16), twin.float(), twin.double(), twin.to("cpu", torch.half)):
        assert moved.scales.dtype == weight.scales.dtype
        assert torch.equal(moved.dequantize(), weight.dequantize())
    assert twin.to("meta").device.type == "meta"

    file = io.BytesIO()
    torch.save(weight.state_dict(), file)
    file.seek(0)
    other = ops.quantize(weights(33, 70), format)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other.dequantize(), weight.dequantize())
    holder = torch.nn.Module()
    holder.weight = weight
    assert set(holder.state_dict()) == {"weight.data", "weight.scales"}
    assert weight.dequantize(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(format: quantize.Format, value: float) -> None:
    weight = weights(33, 70)
    weight[20, 69] = value
    with pytest.raises(ValueError, match=rf"weight must be finite .* {value} at \(20, 69\)"):
        ops.quantize(weight, format)


def test_errors() -> None:
    weight = weights(4, 32)
    with pytest.raises(ValueError, match='format must be "int8" or "int4", got \'int3\''):
        ops.quantize(weight, "int3")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"weight must be a torch\.Tensor, got list"):
        ops.quantize([1.0], "int8")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"must be float32, bfloat16 or float16, got torch\.int64"):
        ops.quantize(weight.long(), "int8")
    with pytest.raises(ValueError, match=r"must have shape \(out_features, in_features\), got"):
        ops.quantize(weight[0], "int4")
    good = ops.quantize(weight, "int4")
    with pytest.raises(ValueError, match=r"scales of an int4 weight \(4, 32\) must be torch.int8"):
        QuantizedWeight(good.data, good.scales.float(), "int4", (4, 32))
    with pytest.raises(ValueError, match=r"data of an int4 weight \(5, 32\) must be torch.uint8"):
        QuantizedWeight(good.data, good.scales, "int4", (5, 32))
    with pytest.raises(ValueError, match=r"shape must be \(out_features, in_features\)"):
        QuantizedWeight(good.data, good.scales, "int4", (4,))  # type: ignore[arg-type]
    out = torch.ops.gemma2_ext.quantize_int4_out.default
    with pytest.raises(ValueError, match=r"quantize_int4: data must have shape .*got \(4, 15\)"):
        out(weight, good.data[:, 1:].contiguous(), good.scales)
