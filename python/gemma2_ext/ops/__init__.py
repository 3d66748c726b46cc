"""Gemma 2's operations as torch ops: float32, bfloat16 and float16.

Layout is (batch, seqlen, heads, head_dim). Each function is also `torch.ops.gemma2_ext.<name>`;
`reference.py` states in plain torch what each computes.
"""

from ..quantize import quantize
from ._common import refuse_cuda_without_kernels
from .add_rms_norm import add_rms_norm
from .attention import attention
from .attention_append_cache import attention_append_cache
from .attention_cache import attention_cache
from .attention_paged import attention_paged
from .attention_varlen import attention_varlen
from .geglu import geglu
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .linear_distillation import linear_distillation
from .linear_distillation_topk import linear_distillation_topk
from .linear_geglu import linear_geglu
from .linear_int4 import linear_int4
from .linear_int8 import linear_int8
from .logits import logits
from .logits_int4 import logits_int4
from .logits_int8 import logits_int8
from .rms_norm import rms_norm
from .rope import rope
from .rope_append_cache import rope_append_cache

refuse_cuda_without_kernels()

__all__ = [
    "add_rms_norm",
    "attention",
    "attention_append_cache",
    "attention_cache",
    "attention_paged",
    "attention_varlen",
    "geglu",
    "linear",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_distillation_topk",
    "linear_geglu",
    "linear_int4",
    "linear_int8",
    "logits",
    "logits_int4",
    "logits_int8",
    "quantize",
    "rms_norm",
    "rope",
    "rope_append_cache",
]
