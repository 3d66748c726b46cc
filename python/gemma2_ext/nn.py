"""Gemma 2's building blocks as modules over the ops, with Hugging Face's parameter names.

Each loads the state_dict of its counterpart in transformers (Gemma2RMSNorm, Gemma2MLP,
Gemma2Attention), has its gradients, and computes in the dtype that it is given.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor

from . import ops

__all__ = ["MLP", "Attention", "GeGLU", "Linear", "RMSNorm"]


class Config(Protocol):
    """What the modules read of a configuration: `gemma2_ext.Gemma2Config`, or transformers'."""

    @property
    def hidden_size(self) -> Any: ...
    @property
    def intermediate_size(self) -> Any: ...
    @property
    def num_attention_heads(self) -> Any: ...
    @property
    def num_key_value_heads(self) -> Any: ...
    @property
    def head_dim(self) -> Any: ...
    @property
    def query_pre_attn_scalar(self) -> Any: ...
    @property
    def sliding_window(self) -> Any: ...
    @property
    def attn_logit_softcapping(self) -> Any: ...
    @property
    def layer_types(self) -> Any: ...


class RMSNorm(torch.nn.Module):
    """`x * rsqrt(mean(x**2, -1) + eps) * (1 + weight)`, in float32, rounded once.

    Args:
        hidden_size: of the last dimension.
        eps: added to the mean of squares.
        device: of the weight.
        dtype: of the weight; the input may have another.

    `weight` (hidden_size,) starts at 0, which is a factor of 1.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden_size) -> the same shape and dtype."""
        return ops.rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class GeGLU(torch.nn.Module):
    """`gelu_tanh(gate) * up`, without parameters."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """Two tensors of one shape and dtype -> one."""
        return ops.geglu(gate, up)


class Linear(torch.nn.Linear):
    """`x @ weight.T` by this package's kernel; torch.nn.Linear without a bias otherwise."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return ops.linear(input, self.weight)


class MLP(torch.nn.Module):
    """`down_proj(gelu_tanh(gate_proj(x)) * up_proj(x))`.

    Args:
        config: of the model; hidden_size and intermediate_size are read.
        device: of the weights.
        dtype: of the weights.
    """

    def __init__(
        self,
        config: Config,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden, inter = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(hidden, inter, device=device, dtype=dtype)
        self.up_proj = Linear(hidden, inter, device=device, dtype=dtype)
        self.down_proj = Linear(inter, hidden, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden_size) -> the same shape."""
        return self.down_proj(ops.geglu(self.gate_proj(x), self.up_proj(x)))


def _check_padding(positions: Tensor) -> None:
    """Refuses padding behind a row's tokens, where looking at the values costs nothing."""
    if positions.device.type != "cpu" or torch.compiler.is_compiling() or not positions.numel():
        return
    if bool(((positions[..., -1] < 0) & (positions.amax(-1) >= 0)).any()):
        raise ValueError(
            "gemma2_ext.nn.Attention: with a cache, padding must be on the left of a row's tokens"
        )


class Attention(torch.nn.Module):
    """Soft-capped, grouped-query attention with RoPE; local where `config` says so of the layer.

    Args:
        config: of the model.
        layer_idx: which layer of it: its entry of config.layer_types is "sliding_attention" or
            "full_attention".
        device: of the weights.
        dtype: of the weights.

    Raises:
        NotImplementedError: the configuration asks for biases, scaled RoPE or attention that is
            not causal.
    """

    def __init__(
        self,
        config: Config,
        layer_idx: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for field in ("attention_bias", "use_bidirectional_attention"):
            if getattr(config, field, False):
                raise NotImplementedError(f"gemma2_ext.nn.Attention: {field} must be False")
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.scale = config.query_pre_attn_scalar**-0.5
        self.softcap = config.attn_logit_softcapping
        local = config.layer_types[layer_idx] == "sliding_attention"
        self.window = config.sliding_window if local else None
        self.rope_theta = _rope_theta(config)
        rows, kv_rows = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, rows, device=device, dtype=dtype)
        self.k_proj = Linear(config.hidden_size, kv_rows, device=device, dtype=dtype)
        self.v_proj = Linear(config.hidden_size, kv_rows, device=device, dtype=dtype)
        self.o_proj = Linear(rows, config.hidden_size, device=device, dtype=dtype)

    def forward(
        self,
        hidden_states: Tensor,
        positions: Tensor | None = None,
        *,
        key_starts: Tensor | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
        key_lengths: Tensor | None = None,
    ) -> Tensor:
        """Attention over the given tokens, or over a cache that they are first written to.

        Args:
            hidden_states: (batch, seqlen, hidden_size).
            positions: (seqlen,) or (batch, seqlen) integers; None: 0, 1, ... in each row, counted
                from key_starts. With a cache they are needed, and -1 is padding on the left.
            key_starts: (batch,) integers, each row's first token where padding is on the left;
                not with a cache.
            cache: keys and values, each (batch, capacity, num_kv_heads, head_dim), where position
                p is in slot `p % capacity`; written in place, without a gradient.
            key_lengths: (batch,) integers, positions in the cache with these; None: the last of
                `positions` and 1.

        Returns:
            hidden_states' shape and dtype.
        """
        batch, seqlen, _ = hidden_states.shape
        q = self.q_proj(hidden_states).view(batch, seqlen, self.num_heads, self.head_dim)
        k = self.k_proj(hidden_states).view(batch, seqlen, self.num_kv_heads, self.head_dim)
        v = self.v_proj(hidden_states).view(batch, seqlen, self.num_kv_heads, self.head_dim)
        options: dict[str, Any] = {
            "scale": self.scale,
            "softcap": self.softcap,
            "window": self.window,
        }
        if cache is None:
            if positions is None:
                positions = torch.arange(seqlen, device=hidden_states.device)
                if key_starts is not None:
                    positions = positions - key_starts[:, None]
            q, k = ops.rope(q, k, positions, self.rope_theta)
            out = cast("Tensor", ops.attention(q, k, v, key_starts=key_starts, **options))
        else:
            if positions is None:
                raise ValueError("gemma2_ext.nn.Attention: positions are needed with a cache")
            if key_starts is not None:
                raise ValueError("gemma2_ext.nn.Attention: key_starts do not go with a cache")
            q = ops.rope_append_cache(q, k, v, positions, *cache, self.rope_theta)
            if key_lengths is None:
                _check_padding(positions)
                key_lengths = (positions[..., -1] + 1).expand(batch).contiguous()
            out = ops.attention_cache(q, *cache, key_lengths, **options)
        return self.o_proj(out.reshape(batch, seqlen, self.num_heads * self.head_dim))

    def extra_repr(self) -> str:
        return f"layer_idx={self.layer_idx}, window={self.window}, softcap={self.softcap}"


def _rope_theta(config: Any) -> float:
    """The base of RoPE's frequencies; transformers 5 keeps it in a dictionary."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kind = parameters.get("rope_type", "default")
    if kind != "default":
        raise NotImplementedError(f"gemma2_ext.nn.Attention: rope_type must be 'default': {kind!r}")
    return parameters["rope_theta"] if parameters else config.rope_theta
