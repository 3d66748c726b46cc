"""Gemma 2's operations as torch ops: float32, bfloat16 and float16.

Layout is (batch, seqlen, heads, head_dim). Each function is also `torch.ops.gemma2_ext.<name>`;
`reference.py` states in plain torch what each computes.
"""

from ._common import refuse_cuda_without_kernels
from .add_rms_norm import add_rms_norm
from .attention import attention
from .attention_cache import attention_cache
from .attention_varlen import attention_varlen
from .geglu import geglu
from .linear import linear
from .linear_geglu import linear_geglu
from .logits import logits
from .rms_norm import rms_norm
from .rope import rope
from .rope_append_cache import rope_append_cache

refuse_cuda_without_kernels()

__all__ = [
    "add_rms_norm",
    "attention",
    "attention_cache",
    "attention_varlen",
    "geglu",
    "linear",
    "linear_geglu",
    "logits",
    "rms_norm",
    "rope",
    "rope_append_cache",
]
