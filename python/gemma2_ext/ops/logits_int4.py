"""logits_int4: softcap * tanh(hidden @ weight^T / softcap) with weights in 4 bits, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ._quantized import Packed, register_logits

_packed = Packed.named("logits_int4", "hidden")


def logits_int4(
    hidden: Tensor, data: Tensor, scales: Tensor, softcap: float | None = None
) -> Tensor:
    """`softcap * tanh(hidden @ weight.T / softcap)` as `linear_int4` multiplies, in float32.

    Args:
        hidden: (..., hidden_size), float32, bfloat16 or float16, any strides.
        data: the weights of a `QuantizedWeight` (vocab_size, hidden_size), uint8, contiguous.
        scales: its scales.
        softcap: positive; None leaves the products as they are.

    Returns:
        A contiguous float32 tensor (..., vocab_size), with a gradient to hidden.

    Raises:
        TypeError: hidden is not a floating tensor of those dtypes, or data or scales is no tensor.
        ValueError: data or scales is of another dtype, shape or device, or not contiguous; or
            softcap is not positive and finite.

    Source: Gemma 2 (arXiv 2408.00118); docs/quantization.md.
    """
    return _packed(hidden, data, scales, softcap, dtype=torch.float32)


register_logits("int4")
