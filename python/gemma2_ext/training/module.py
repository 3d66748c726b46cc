"""Gemma 2 as a module that trains: float32 weights, computed in bfloat16 or float32, and a loss.

The weights are the model's own, regrouped: a block is a layer with the norm behind it in place of
the one before it, which is what one fused "norm, add, next norm" needs. Blocks are what FSDP
gathers and what activation checkpointing recomputes. The loss is computed inside the forward, from
hidden states: logits never stand whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..config import Gemma2Config
from ..model import Gemma2, Layer, Weight, packed_attention, run_layer
from ..quantize import QuantizedWeight
from ..weights import parameter_shapes
from .data import Batch


@dataclass(frozen=True)
class Objective:
    """What is minimised: cross-entropy, or the distance from a teacher, or a blend.

    Args:
        teacher: whose distribution the student learns; None: the batch's stored one, if any.
        temperature: divides both sides' capped logits.
        hard_labels: weight of the cross-entropy beside the teacher's, from 0 to 1.
        distil: whether there is a teacher at all.
    """

    teacher: Gemma2 | None = None
    temperature: float = 1.0
    hard_labels: float = 0.0
    distil: bool = False


class Block(nn.Module):
    """A layer's weights without its input_layernorm, and the weight of the norm behind it."""

    qkv_proj: Weight
    o_proj: Weight
    gate_up_proj: Weight
    down_proj: Weight
    post_attention_layernorm: Weight
    pre_feedforward_layernorm: Weight
    post_feedforward_layernorm: Weight
    following: Weight

    def __init__(self, config: Gemma2Config, layer: Layer, following: Weight) -> None:
        super().__init__()
        self.config = config
        for name in Block.__annotations__:
            setattr(self, name, following if name == "following" else getattr(layer, name))

    def forward(
        self, residual: Tensor, hidden: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """See `model.run_layer`; the weights are rounded to hidden's dtype first."""
        weights = SimpleNamespace(
            **{
                name: SimpleNamespace(weight=getattr(self, name).weight.to(hidden.dtype))
                for name in Block.__annotations__
            }
        )
        return run_layer(self.config, weights, weights.following.weight, residual, hidden, attend)


class TrainingModule(nn.Module):
    """A batch to the mean of its tokens' losses.

    Args:
        model: the model that is trained; its parameters are this module's.
        dtype: that it computes in; parameters, gradients and the loss are float32.
        objective: what is minimised.
        activation_checkpointing: keep only the states between layers, and recompute what lies
            inside each for its gradient.
    """

    def __init__(
        self,
        model: Gemma2,
        dtype: torch.dtype,
        objective: Objective,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.config = model.config
        self.dtype = dtype
        # Not a submodule: neither wrapped nor trained.
        self.objective = objective
        self.teacher_embedding = None
        if objective.teacher is not None:
            weight = objective.teacher.embed_tokens.weight
            packed = isinstance(weight, QuantizedWeight)
            self.teacher_embedding = weight.dequantize(self.dtype) if packed else weight.detach()
        self.activation_checkpointing = activation_checkpointing
        self.embed_tokens = model.embed_tokens
        layers = cast("list[Layer]", list(model.layers))
        self.first_norm = layers[0].input_layernorm
        followings = [*(layer.input_layernorm for layer in layers[1:]), model.norm]
        self.blocks = nn.ModuleList(
            Block(model.config, layer, following)
            for layer, following in zip(layers, followings, strict=True)
        )

    def forward(self, batch: Batch, evaluate: bool = False) -> Tensor:
        """The mean of the batch's tokens' losses, a float32 scalar.

        Args:
            batch: the sequences.
            evaluate: whether the cross-entropy with the text is wanted, whatever the objective.
        """
        embedding = self.embed_tokens.weight.to(self.dtype)
        hidden = self._hidden(batch, embedding)
        if self.objective.distil and not evaluate:
            return self._distance(batch, hidden, embedding)
        return ops.linear_cross_entropy(
            hidden, embedding, batch.targets, softcap=self.config.final_logit_softcapping
        )

    def _hidden(self, batch: Batch, embedding: Tensor) -> Tensor:
        config = self.config
        attend = packed_attention(config, batch.cu_seqlens, batch.max_seqlen)
        residual = F.embedding(batch.input_ids[None], embedding)
        residual = residual * config.embedding_scale(self.dtype)
        norm = self.first_norm.weight.to(self.dtype)
        hidden = ops.rms_norm(residual, norm, config.rms_norm_eps)
        for i, block in enumerate(self.blocks):
            inside = functools.partial(attend, i)
            if self.activation_checkpointing and torch.is_grad_enabled():
                residual, hidden = checkpoint(block, residual, hidden, inside, use_reentrant=False)
            else:
                residual, hidden = block(residual, hidden, inside)
        return hidden[0]

    def _distance(self, batch: Batch, hidden: Tensor, embedding: Tensor) -> Tensor:
        """The distillation loss, `-sum P_T log P_S`, blended with the cross-entropy."""
        teacher = self.objective.teacher
        options: dict[str, Any] = {
            "softcap": self.config.final_logit_softcapping,
            "temperature": self.objective.temperature,
            "target": batch.targets,
            "hard_weight": self.objective.hard_labels,
        }
        if teacher is None:
            assert batch.top_ids is not None and batch.top_log_probs is not None
            return ops.linear_distillation_topk(
                hidden, embedding, batch.top_ids, batch.top_log_probs, **options
            )
        assert self.teacher_embedding is not None
        with torch.no_grad():  # not inference_mode: autograd keeps what this gives
            states = teacher.hidden(batch.input_ids, batch.cu_seqlens, batch.max_seqlen)
        return ops.linear_distillation(
            hidden,
            embedding,
            states,
            self.teacher_embedding,
            teacher_softcap=teacher.config.final_logit_softcapping,
            **options,
        )


def new_weights(config: Gemma2Config, seed: int) -> dict[str, Tensor]:
    """Float32 weights to train from scratch, drawn by seed.

    Matrices have standard deviation in_features ** -0.5, so that products keep their input's
    variance and embeddings have unit variance behind their factor; the norms behind sub-layers
    start at 1 / sqrt(2 * layers), so that the stream's variance doubles over all of them.
    """
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    behind = (2 * config.num_hidden_layers) ** -0.5 - 1.0
    for name, shape in parameter_shapes(config).items():
        if len(shape) == 2:
            weights[name] = torch.empty(shape).normal_(0, shape[1] ** -0.5, generator=generator)
        else:
            weights[name] = torch.full(shape, behind if ".post_" in name else 0.0)
    return weights
