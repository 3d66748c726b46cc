"""linear_int4: x @ weight^T with weights in 4 bits."""

from __future__ import annotations

from torch import Tensor

from ._quantized import Packed, register

_packed = Packed.named("linear_int4", "x")


def linear_int4(x: Tensor, data: Tensor, scales: Tensor) -> Tensor:
    """`x @ weight.T` for the weight that data and scales stand for, summed in float32.

    Each x is taken to 8 bits with a scale for every 32 columns: an error of up to 1/254 of the
    largest x of 32, a tenth of what 4 bits cost the weights.
    A row's result depends neither on the rows beside it nor on the number of threads. An Inf or NaN
    in a row of x makes the row's result NaN. The gradient goes to x alone.

    Args:
        x: (..., in_features), float32, bfloat16 or float16, any strides.
        data: the weights of a `QuantizedWeight`, uint8, contiguous,
            (out_features, in_features padded to a multiple of 32, over 2).
        scales: its scales, int8, (out_features, 2 + data.shape[1] / 8).

    Returns:
        A contiguous tensor (..., out_features) of x's dtype.

    Raises:
        TypeError: x is not a floating tensor of those dtypes, or data or scales is no tensor.
        ValueError: data or scales is of another dtype, shape or device, or not contiguous.

    Source: docs/quantization.md.
    """
    return _packed(x, data, scales)


register("int4")
