"""Weights in 8 and 4 bits: how they are packed, and QuantizedWeight, which holds them.

    int8: w = scale * q            groups of 32 columns; q -127..127, scale bfloat16: 8.5 bits
    int4: w = row * s|s| * (q - 8) groups of 16 columns; q 0..15, s -127..127: 4.5 bits,
                                   and row, a bfloat16 for each row

Rows are stored in blocks of 16 (fewer in the last), columns padded to a multiple of 32. A block is

    data    int8: [column / 4][row][4]; int4: [column / 32][4][row][4], where byte [v][row][i] has
            column 4 v + i in its low half and column 16 + 4 v + i in its high half
    scales  int8: [group][row]; int4: [row] as bfloat16, then s as [group][row]

so that a vector of a kernel holds four columns of several rows, and a lane sums a row.
docs/quantization.md says why, with the errors measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ._memory import empty_in_huge_pages

Format = Literal["int8", "int4"]
FORMATS: tuple[Format, ...] = ("int8", "int4")
BLOCK_ROWS = 16
# Columns are padded to a multiple of this.
DEPTH = 32
# Bytes of a tensor; of smaller ones huge pages would be too much of a waste.
HUGE_PAGES_FROM = 4 << 20
GROUP_SIZES: dict[Format, int] = {"int8": 32, "int4": 16}


def packed_shapes(
    format: Format, shape: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of data and scales for a weight of this shape."""
    rows, columns = shape
    padded = -(-columns // DEPTH) * DEPTH
    if format == "int8":
        return (rows, padded), (rows, padded // 32)
    return (rows, padded // 2), (rows, 2 + padded // 16)


def packed_dtypes(format: Format) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of data and scales."""
    return (torch.int8, torch.bfloat16) if format == "int8" else (torch.uint8, torch.int8)


def packed_bytes(format: Format, shape: tuple[int, int]) -> int:
    """Bytes of data and scales together for a weight of this shape."""
    shapes, dtypes = packed_shapes(format, shape), packed_dtypes(format)
    return sum(math.prod(s) * d.itemsize for s, d in zip(shapes, dtypes, strict=True))


def check_format(where: str, format: object) -> None:
    """Raises ValueError unless format is "int8" or "int4"."""
    if format not in FORMATS:
        raise ValueError(f'{where} must be "int8" or "int4", got {format!r}')


class QuantizedWeight(nn.Module):
    """A matrix (out_features, in_features) in 8 or 4 bits a weight, as `ops.linear` takes it.

    A module with two buffers, so it moves, copies and saves with the model that holds it. Its
    contents have no other dtype: `.to(dtype)`, `.half()` and the like leave them as they are.

    Args:
        data: the quantized weights, int8 or (int4: two in a byte) uint8, of `packed_shapes`.
        scales: bfloat16 (int8) or int8 (int4), of `packed_shapes`.
        format: "int8" or "int4".
        shape: (out_features, in_features).

    Raises:
        ValueError: shapes or dtypes that do not fit format and shape.
    """

    data: Tensor
    scales: Tensor

    def __init__(
        self, data: Tensor, scales: Tensor, format: Format, shape: tuple[int, int] | torch.Size
    ) -> None:
        super().__init__()
        check_format("QuantizedWeight: format", format)
        if len(shape) != 2:
            raise ValueError(
                f"QuantizedWeight: shape must be (out_features, in_features), got {tuple(shape)}"
            )
        self.format: Format = format
        self.shape = torch.Size(shape)
        shapes = packed_shapes(format, (shape[0], shape[1]))
        for name, tensor, size, dtype in zip(
            ("data", "scales"), (data, scales), shapes, packed_dtypes(format), strict=True
        ):
            if tuple(tensor.shape) != size or tensor.dtype != dtype:
                raise ValueError(
                    f"QuantizedWeight: {name} of an {format} weight {tuple(shape)} must be {dtype} "
                    f"of shape {size}, got {tensor.dtype} of shape {tuple(tensor.shape)}"
                )
            self.register_buffer(name, tensor)

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return GROUP_SIZES[self.format]

    @property
    def out_features(self) -> int:
        """Rows."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns."""
        return self.shape[1]

    @property
    def device(self) -> torch.device:
        """Where data and scales are."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales."""
        return self.data.nbytes + self.scales.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix that the packed weights stand for, (out_features, in_features)."""
        return dequantize(self.format, self.data, self.scales, self.in_features).to(dtype)

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Rows of the matrix, as an embedding is looked up: (*index.shape, in_features).

        Rounded to dtype, then multiplied by scale. An index out of range is a ValueError on the
        CPU; on a GPU, where none is looked at, its row is NaN.
        """
        index = index.to(self.device, torch.int64).contiguous()
        rows = torch.empty(*index.shape, self.in_features, dtype=dtype, device=self.device)
        embedding_op(self.format)(index, self.data, self.scales, scale, rows)
        return rows

    def extra_repr(self) -> str:
        """What stands between the parentheses of repr()."""
        device = "" if self.device.type == "cpu" else f", device={self.device}"
        return (
            f"{self.format}, out_features={self.out_features}, in_features={self.in_features}, "
            f"group_size={self.group_size}{device}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedWeight:
        """Moves the buffers as nn.Module does, but without a change of dtype."""
        for name in ("data", "scales"):
            buffer = cast("Tensor", self._buffers[name])
            # As integers: what casts floating tensors only then leaves them alone.
            bits = buffer.view(torch.uint8)
            self._buffers[name] = fn(bits).view(buffer.dtype)
        return self


def quantize(weight: Tensor, format: Format) -> QuantizedWeight:
    """`weight` in 8 or 4 bits: per group the scale of least squared error, and rounded values.

    int8: the scale that takes a group's largest magnitude to 127, rounded up to bfloat16. int4: of
    all scales that the format can say, of either sign, that which errs least.

    Args:
        weight: (out_features, in_features), float32, bfloat16 or float16, finite.
        format: "int8" (8.5 bits a weight) or "int4" (4.5 bits a weight).

    Returns:
        A QuantizedWeight, on weight's device.

    Raises:
        TypeError: weight is not a floating tensor of those dtypes.
        ValueError: weight is not a matrix, holds NaN or Inf, or format is another one.

    Source: scales of scales as in llama.cpp's k-quants; the sign as in its Q4_0.
    """
    check_format("quantize: format", format)
    if not isinstance(weight, Tensor):
        raise TypeError(f"quantize: weight must be a torch.Tensor, got {type(weight).__name__}")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"quantize: weight must be float32, bfloat16 or float16, got {weight.dtype}"
        )
    if weight.dim() != 2:
        raise ValueError(
            "quantize: weight must have shape (out_features, in_features), "
            f"got {tuple(weight.shape)}"
        )
    weight = weight.detach()
    check_finite("quantize: weight", weight)
    data, scales = empty_packed(format, (weight.shape[0], weight.shape[1]), weight.device)
    quantize_into(weight, data, scales, format)
    return QuantizedWeight(data, scales, format, weight.shape)


def empty_packed(
    format: Format, shape: tuple[int, int], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Room for the data and scales of a weight of this shape, on the CPU in huge pages."""
    shapes, dtypes = packed_shapes(format, shape), packed_dtypes(format)
    return _empty(shapes[0], dtypes[0], device), _empty(shapes[1], dtypes[1], device)


def _empty(shape: tuple[int, int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    nbytes = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or nbytes < HUGE_PAGES_FROM:
        return torch.empty(shape, dtype=dtype, device=device)
    return empty_in_huge_pages(nbytes, "a quantized weight").view(dtype).view(shape)


def quantize_into(weight: Tensor, data: Tensor, scales: Tensor, format: Format) -> None:
    """Quantizes a finite matrix into given tensors; see `quantize`."""
    op = getattr(torch.ops.gemma2_ext, f"quantize_{format}_out").default
    if weight.device.type == "cpu":
        op(weight, data, scales)
        return
    parts = empty_packed(format, (weight.shape[0], weight.shape[1]))
    op(weight.cpu(), *parts)
    data.copy_(parts[0])
    scales.copy_(parts[1])


def check_finite(name: str, weight: Tensor, *, first_row: int = 0) -> None:
    """Raises ValueError where weight holds NaN or Inf, and says where the first one is.

    first_row: the row of a larger matrix at which this one begins.
    """
    if weight.numel() == 0 or all(math.isfinite(x) for x in weight.aminmax()):
        return
    place = tuple(int(i) for i in (~weight.isfinite()).nonzero()[0])
    raise ValueError(
        f"{name} must be finite to be quantized, has {weight[place].item()} at "
        f"{(place[0] + first_row, *place[1:])}"
    )


# Between the packed order and rows.


def _blocks(rows: int) -> list[tuple[int, int]]:
    """(first row, rows) of the whole blocks together, and of the last one where it is smaller."""
    whole = rows // BLOCK_ROWS * BLOCK_ROWS
    return [(0, whole)] * (whole > 0) + [(whole, rows - whole)] * (whole < rows)


def _rows_in_order(packed: Tensor, width: int) -> Tensor:
    """(rows, n) whose blocks are [n / width][row][width] -> the same with each row in one piece."""
    parts = []
    for first, count in _blocks(packed.shape[0]):
        block = min(count, BLOCK_ROWS)
        part = packed[first : first + count]
        part = part.reshape(count // block, packed.shape[1] // width, block, width)
        parts.append(part.transpose(1, 2).reshape(packed[first : first + count].shape))
    return torch.cat(parts) if parts else packed


def pack_rows(rows: Tensor, width: int) -> Tensor:
    """The inverse of what a kernel reads: (rows, n) -> blocks of [n / width][row][width]."""
    parts = []
    for first, count in _blocks(rows.shape[0]):
        block = min(count, BLOCK_ROWS)
        part = rows[first : first + count]
        part = part.reshape(count // block, block, rows.shape[1] // width, width)
        parts.append(part.transpose(1, 2).reshape(rows[first : first + count].shape))
    return torch.cat(parts) if parts else rows


def _split_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """int4's scales as row (rows, 1) bfloat16 and s (rows, groups)."""
    row, s = [], []
    for first, count in _blocks(scales.shape[0]):
        block = min(count, BLOCK_ROWS)
        part = scales[first : first + count].reshape(count // block, -1)
        row.append(part[:, : 2 * block].contiguous().view(torch.bfloat16).reshape(count, 1))
        s.append(_rows_in_order(part[:, 2 * block :].reshape(count, -1), 1))
    if not s:
        return scales.new_empty((0, 1), dtype=torch.bfloat16), scales[:, 2:]
    return torch.cat(row), torch.cat(s)


def join_scales(row: Tensor, s: Tensor) -> Tensor:
    """int4's scales from row (rows, 1) bfloat16 and s (rows, groups) int8."""
    parts = []
    packed = pack_rows(s, 1)
    for first, count in _blocks(s.shape[0]):
        block = min(count, BLOCK_ROWS)
        head = row[first : first + count].contiguous().view(torch.int8).view(count // block, -1)
        tail = packed[first : first + count].reshape(count // block, block * s.shape[1])
        parts.append(torch.cat((head, tail), 1).reshape(count, 2 + s.shape[1]))
    return torch.cat(parts) if parts else s.new_empty((0, 2 + s.shape[1]))


def _halves(pairs: Tensor) -> Tensor:
    """(rows, n) bytes, 16 to 32 columns -> (rows, 2 n) numbers 0 to 15, in the columns' order."""
    pieces = pairs.view(len(pairs), -1, DEPTH // 2)
    return torch.stack((pieces & 15, pieces >> 4), 2).view(len(pairs), -1)


def join_halves(q: Tensor) -> Tensor:
    """The inverse of `_halves`."""
    pieces = q.view(len(q), q.shape[1] // DEPTH, 2, DEPTH // 2)
    return (pieces[:, :, 0] | pieces[:, :, 1] << 4).view(len(q), q.shape[1] // 2)


def _scaled(format: Format, q: Tensor, scales: Tensor, row: Tensor | None) -> Tensor:
    """Float32 weights from numbers and scales in the rows' own order."""
    groups = q.view(len(q), -1, GROUP_SIZES[format]).float()
    if row is None:
        return (groups * scales.float()[..., None]).view(len(q), -1)
    s = scales.float()
    factor = row.float() * (s * s.abs())
    return ((groups - 8) * factor[..., None]).view(len(q), -1)


def dequantize(format: Format, data: Tensor, scales: Tensor, in_features: int) -> Tensor:
    """The float32 matrix that packed tensors stand for."""
    if data.numel() == 0:
        return torch.zeros((data.shape[0], in_features), dtype=torch.float32, device=data.device)
    q = _rows_in_order(data, 4)
    if format == "int8":
        weight = _scaled(format, q, _rows_in_order(scales, 1), None)
    else:
        row, s = _split_scales(scales)
        weight = _scaled(format, _halves(q), s, row)
    return weight[:, :in_features]


def embedding_op(format: Format) -> Any:
    """The op (ids, data, scales, scale, out): rows in out's dtype, times the scale."""
    return getattr(torch.ops.gemma2_ext, f"embedding_{format}_out").default
