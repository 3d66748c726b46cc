"""Gemma 2's operations as torch ops: float32, bfloat16 and float16.

Layout is (batch, seqlen, heads, head_dim). Each function is also `torch.ops.gemma2_ext.<name>`;
`reference.py` states in plain torch what each computes.
"""

from .linear import linear
from .logits import logits
from .rms_norm import rms_norm

__all__ = ["linear", "logits", "rms_norm"]
