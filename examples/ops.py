"""A layer of Gemma 2 from the ops, as one would write it in plain torch, with its gradient.

python examples/ops.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma2_ext import Gemma2Config, ops, reference


def layer(x: Tensor, w: dict[str, Tensor], config: Gemma2Config, kit: object) -> Tensor:
    """`kit` is `gemma2_ext.ops` or `gemma2_ext.reference`: they have the same functions."""
    batch, seqlen, _ = x.shape
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    h = kit.rms_norm(x, w["input_norm"])
    q, k, v = (
        (h @ w["qkv"].T)
        .view(batch, seqlen, -1, config.head_dim)
        .split((heads, kv_heads, kv_heads), dim=2)
    )
    q, k = kit.rope(q, k, torch.arange(seqlen), config.rope_theta)
    h = kit.attention(
        q,
        k,
        v,
        scale=config.query_pre_attn_scalar**-0.5,
        softcap=config.attn_logit_softcapping,
        window=config.sliding_window,
    )
    h = h.reshape(batch, seqlen, -1) @ w["o"].T
    x, h = kit.add_rms_norm(h, x, w["post_attention_norm"], w["pre_feedforward_norm"])
    gate, up = (h @ w["gate_up"].T).chunk(2, dim=-1)
    h = kit.geglu(gate, up) @ w["down"].T
    return x + kit.rms_norm(h, w["post_feedforward_norm"])


def main() -> None:
    torch.manual_seed(0)
    config = Gemma2Config.gemma2_2b()
    hidden, inter = 256, 512  # a narrow layer, with the heads of the real one
    rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    sizes = {
        "input_norm": (hidden,),
        "qkv": (rows, hidden),
        "o": (hidden, config.num_attention_heads * config.head_dim),
        "post_attention_norm": (hidden,),
        "pre_feedforward_norm": (hidden,),
        "gate_up": (2 * inter, hidden),
        "down": (hidden, inter),
        "post_feedforward_norm": (hidden,),
    }
    weights = {name: torch.randn(size) * size[-1] ** -0.5 for name, size in sizes.items()}
    x = torch.randn(1, 96, hidden)

    fused = layer(x, weights, config, ops)
    plain = layer(x, weights, config, reference)
    print(f"largest difference from plain torch: {(fused - plain).abs().max():.1e}")
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)

    # bfloat16 goes in and comes out, sums are float32 inside.
    narrow = layer(x.bfloat16(), {n: w.bfloat16() for n, w in weights.items()}, config, ops)
    error = (narrow.float() - plain).abs().max() / plain.abs().max()
    print(f"in bfloat16 the largest is {error:.1e} of the largest value")


if __name__ == "__main__":
    main()
