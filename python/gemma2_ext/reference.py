"""Gemma 2 and its ops in plain torch: the truth that the kernels are compared with.

Written as transformers' Gemma 2 (5.x, eager attention) computes in the dtype of its input: norms
in float32 with one cast at the end, products and soft-caps in the input dtype, softmax and losses
in float32. Given float64 everything is float64, which is what "exact" means in the tests. The
functions have the names and signatures of `gemma2_ext.ops`, are differentiable, store what they
like, and take any device. This file needs nothing but torch, so it can be read and run alone.

Source: "Gemma 2: Improving Open Language Models at a Practical Size" (arXiv 2408.00118);
transformers `models/gemma2/modeling_gemma2.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _widen(x: Tensor) -> Tensor:
    """float32 for the dtypes below it, float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def _soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """`cap * tanh(x / cap)` in x's dtype; x where cap is None."""
    return x if cap is None else torch.tanh(x / cap) * cap


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """`x * rsqrt(mean(x**2, -1) + eps) * (1 + weight)`, in float32, rounded once to x's dtype.

    Args:
        x: (..., hidden_size), any float dtype.
        weight: (hidden_size,), any float dtype; float64 only with a float64 x.
        eps: added to the mean of squares.

    Returns:
        x's shape and dtype.

    Source: transformers, Gemma2RMSNorm.
    """
    wide = _widen(x)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * (1.0 + weight.to(wide.dtype))).type_as(x)


def add_rms_norm(
    x: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`r = residual + rms_norm(x; post_weight)`, and `rms_norm(r; pre_weight)`.

    Args:
        x: (..., hidden_size), a sub-layer's output.
        residual: x's shape, the stream that it is added to.
        post_weight: (hidden_size,), of the norm behind the sub-layer.
        pre_weight: (hidden_size,), of the norm before the next one.
        eps: of both norms.

    Returns:
        (r, normed r), both x's shape; r is rounded to x's dtype before its norm.

    Source: transformers, Gemma2DecoderLayer.
    """
    r = residual + rms_norm(x, post_weight, eps)
    return r, rms_norm(r, pre_weight, eps)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """`gelu_tanh(gate) * up`, gelu_tanh(g) = g/2 (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3))).

    Args:
        gate: any shape, any float dtype.
        up: gate's shape.

    Returns:
        gate's shape and dtype; the activation is rounded to that dtype before the product.

    Source: transformers, Gemma2MLP with `gelu_pytorch_tanh`.
    """
    return F.gelu(gate, approximate="tanh") * up


def rope_frequencies(
    head_dim: int, theta: float, device: torch.device | str | None = None
) -> Tensor:
    """`1 / theta ** (arange(0, head_dim, 2) / head_dim)`, every step rounded to float32.

    Args:
        head_dim: even.
        theta: base of the frequencies, 10000 in Gemma 2.
        device: of the result. The arithmetic runs on the CPU, so that all devices agree.

    Returns:
        (head_dim / 2,), float32, radians a position.

    Source: transformers, Gemma2RotaryEmbedding.compute_default_rope_parameters.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    return (1.0 / theta**exponent).to(device)


def rope(q: Tensor, k: Tensor, positions: Tensor, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Rotates halves: `(x1 cos - x2 sin, x2 cos + x1 sin)`, angle = position * inv_freq.

    Frequencies and angles are rounded to float32 whatever the dtype, cosine and sine to the dtype.

    Args:
        q: (batch, seqlen, num_heads, head_dim), any float dtype.
        k: (batch, seqlen, num_kv_heads, head_dim).
        positions: (seqlen,) or (batch, seqlen), integers.
        theta: base of the frequencies.

    Returns:
        (q, k) rotated, new tensors of the same shapes and dtypes.

    Source: transformers, apply_rotary_pos_emb (Su et al., arXiv 2104.09864, half-split form).
    """
    half = q.shape[-1] // 2
    inv_freq = rope_frequencies(q.shape[-1], theta, q.device)
    angle = (positions[..., None].float() * inv_freq)[..., None, :]
    if q.dtype == torch.float64:
        angle = angle.double()
    cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)

    def rotate(x: Tensor) -> Tensor:
        x1, x2 = x[..., :half], x[..., half:]
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)

    return rotate(q), rotate(k)


def _scores(
    q: Tensor, k: Tensor, visible: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Scores (batch, heads, seqlen_q, seqlen_k) as the softmax reads them, and which rows see none.

    `visible` broadcasts to the scores. The soft-cap comes before the mask; a row that sees nothing
    gets zeros for -inf, so that its softmax is finite and no NaN reaches a gradient.
    """
    k = k.transpose(1, 2).repeat_interleave(q.shape[2] // k.shape[2], dim=1)
    scores = _widen(_soft_cap(torch.matmul(q.transpose(1, 2), k.mT) * scale, softcap))
    blind = ~visible.any(-1, keepdim=True)
    nothing = torch.where(blind, 0.0, -math.inf).to(scores.dtype)
    return torch.where(visible, scores, nothing), blind


def _attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Attention where `visible` is true, in `attention`'s layout; 0 in rows that see nothing."""
    scores, blind = _scores(q, k, visible, scale, softcap)
    v = v.transpose(1, 2).repeat_interleave(q.shape[2] // v.shape[2], dim=1)
    out = torch.matmul(scores.softmax(-1).to(q.dtype), v)
    return out.masked_fill(blind, 0.0).transpose(1, 2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    causal: bool = True,
    key_lengths: Tensor | None = None,
    key_starts: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`softmax(mask(softcap * tanh(scale * q k^T / softcap))) v`, with grouped queries.

    Row b's valid keys are [key_starts[b], key_lengths[b]); what k and v hold elsewhere is ignored,
    NaN included. Query i stands at position `key_lengths[b] - seqlen_q + i` (seqlen_k where
    key_lengths is None). Causal: it sees key j if j <= position; window: if j > position - window.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), any float dtype.
        k: (batch, seqlen_k, num_kv_heads, head_dim), num_kv_heads a divisor of num_heads.
        v: k's shape.
        scale: of the scores, query_pre_attn_scalar ** -0.5 in Gemma 2.
        softcap: bound of the scaled scores, or None.
        window: number of keys that a query sees, itself included, or None for all.
        causal: whether a query is kept from later keys.
        key_lengths: (batch,) integers, end of each row's keys; None: seqlen_k.
        key_starts: (batch,) integers, start of each row's keys; None: 0.
        return_lse: whether to return the logarithm of the softmax's denominator too.

    Returns:
        (batch, seqlen_q, num_heads, head_dim) in q's dtype, 0 in a row that sees no key; with
        return_lse also lse, (batch, num_heads, seqlen_q), natural logarithm, float32 (float64 for
        float64), -inf in such a row.

    Raises:
        ValueError: a window without causal, or one below 1.

    Source: transformers, eager_attention_forward of `models/gemma2`.
    """
    if window is not None and not causal:
        raise ValueError("attention: window needs causal=True, got causal=False")
    if window is not None and window < 1:
        raise ValueError(f"attention: window must be at least 1, got {window}")
    batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    if key_lengths is None:
        key_lengths = torch.full((batch,), seqlen_k, device=q.device)
    if key_starts is None:
        key_starts = torch.zeros_like(key_lengths)
    key = torch.arange(seqlen_k, device=q.device)
    valid = (key >= key_starts[:, None].long()) & (key < key_lengths[:, None].long())
    query = torch.arange(seqlen_q, device=q.device) + (key_lengths[:, None].long() - seqlen_q)
    visible = valid[:, None, :].expand(batch, seqlen_q, seqlen_k)
    if causal:
        visible = visible & (key <= query[..., None])
    if window is not None:
        visible = visible & (key > query[..., None] - window)
    # 0 * NaN is NaN: what lies outside the valid keys must not reach the products.
    k = k.masked_fill(~valid[..., None, None], 0.0)
    v = v.masked_fill(~valid[..., None, None], 0.0)
    visible = visible[:, None]
    out = _attend(q, k, v, visible, scale, softcap)
    if not return_lse:
        return out
    scores, blind = _scores(q, k, visible, scale, softcap)
    return out, torch.logsumexp(scores, -1).masked_fill(blind[..., 0], -math.inf)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    causal: bool = True,
) -> Tensor:
    """`attention` of each of several sequences packed one behind another.

    Sequence b has rows [cu_seqlens_q[b], cu_seqlens_q[b + 1]) of q and the like of k and v; its
    last query stands at its last key, as in `attention`.

    Args:
        q: (total_q, num_heads, head_dim), any float dtype.
        k: (total_k, num_kv_heads, head_dim).
        v: k's shape.
        cu_seqlens_q: (batch + 1,) integers from 0, ascending.
        cu_seqlens_k: likewise for k and v.
        max_seqlen_q: at least the longest sequence of q; of no use here.
        max_seqlen_k: likewise for k.
        scale, softcap, window, causal: as in `attention`.

    Returns:
        q's shape and dtype; 0 in rows that see no key or belong to no sequence.

    Raises:
        ValueError: a window without causal, or one below 1.

    Source: FlashAttention's varlen interface; transformers, eager_attention_forward.
    """
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    parts = [torch.zeros_like(q[: q_ends[0]])]
    for b in range(len(q_ends) - 1):
        rows, keys = slice(q_ends[b], q_ends[b + 1]), slice(k_ends[b], k_ends[b + 1])
        out = attention(
            q[None, rows],
            k[None, keys],
            v[None, keys],
            scale=scale,
            softcap=softcap,
            window=window,
            causal=causal,
        )
        assert isinstance(out, Tensor)
        parts.append(out[0])
    parts.append(torch.zeros_like(q[q_ends[-1] :]))
    return torch.cat(parts)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x weight^T` in x's dtype.

    Args:
        x: (..., in_features), any float dtype.
        weight: (out_features, in_features), x's dtype.

    Returns:
        (..., out_features) in x's dtype.

    Source: torch.nn.functional.linear.
    """
    return F.linear(x, weight)


def _unpack(data: Tensor, scales: Tensor, in_features: int, bits: int) -> Tensor:
    """The float32 weight (out_features, in_features) of packed tensors, block by block."""
    blocks = []
    for first in range(0, data.shape[0], 16):
        q, s = data[first : first + 16], scales[first : first + 16]
        rows = len(q)
        if bits == 8:
            groups = q.reshape(-1, 8, rows, 4).permute(2, 0, 1, 3).reshape(rows, -1, 32).float()
            scale = s.reshape(-1, rows).T.float()
        else:
            q = torch.stack((q & 15, q >> 4)).reshape(2, -1, 4, rows, 4)
            groups = q.permute(3, 1, 0, 2, 4).reshape(rows, -1, 16).float() - 8
            factor = s.flatten()[: 2 * rows].clone().view(torch.bfloat16).float()
            s = s.flatten()[2 * rows :].reshape(-1, rows).T.float()
            scale = factor[:, None] * s * s.abs()
        blocks.append((groups * scale[..., None]).flatten(1)[:, :in_features])
    return torch.cat(blocks) if blocks else data.new_empty((0, in_features), dtype=torch.float32)


def linear_int8(x: Tensor, data: Tensor, scales: Tensor) -> Tensor:
    """`x weight^T` in x's dtype, weight in 8 bits: scale * q for groups of 32 columns.

    Args:
        x: (..., in_features), any float dtype.
        data: q, int8, in blocks of 16 rows: [column / 4][row][4].
        scales: bfloat16, in blocks of 16 rows: [group][row].

    Returns:
        (..., out_features) in x's dtype.

    Source: docs/quantization.md.
    """
    return F.linear(x, _unpack(data, scales, x.shape[-1], 8).to(x.dtype))


def linear_int4(x: Tensor, data: Tensor, scales: Tensor) -> Tensor:
    """`x weight^T` in x's dtype, weight in 4 bits: row * s|s| * (q - 8) for groups of 16 columns.

    Args:
        x: (..., in_features), any float dtype.
        data: q, in blocks of 16 rows: [column / 32][4][row][4] bytes, the first 16 columns in the
            low halves.
        scales: int8, in blocks of 16 rows: row as bfloat16, then s as [group][row].

    Returns:
        (..., out_features) in x's dtype.

    Source: docs/quantization.md.
    """
    return F.linear(x, _unpack(data, scales, x.shape[-1], 4).to(x.dtype))


def linear_geglu(x: Tensor, weight: Tensor) -> Tensor:
    """`gelu_tanh(x @ gate.T) * (x @ up.T)`, weight being gate above up.

    Args:
        x: (..., in_features), any float dtype.
        weight: (2 * out_features, in_features), x's dtype.

    Returns:
        (..., out_features) in x's dtype.

    Source: transformers, Gemma2MLP without its last product.
    """
    gate, up = linear(x, weight).chunk(2, dim=-1)
    return geglu(gate, up)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """`-log softmax(softcap * tanh(hidden weight^T / softcap))[target]`.

    Args:
        hidden: (..., hidden_size), any float dtype.
        weight: (vocab_size, hidden_size), hidden's dtype.
        target: (...), integers, token ids or ignore_index.
        softcap: bound of the logits, or None.
        ignore_index: the target of a token that does not count.
        reduction: "mean" over the tokens that count (NaN where none does), "sum", or "none".
        label_smoothing: share of the target that is spread evenly over all words.
        z_loss: weight of the squared logarithm of the softmax's denominator, in a token's loss.

    Returns:
        A float32 (float64 for float64) scalar, in nats; with "none" target's shape, 0 where
        ignored.

    Raises:
        ValueError: reduction is none of the three.

    Source: transformers, Gemma2ForCausalLM and ForCausalLMLoss (logits widened for the loss);
    z_loss: PaLM (arXiv 2204.02311), section 5.
    """
    logits = _widen(_soft_cap(F.linear(hidden, weight), softcap))
    logits = logits.reshape(-1, logits.shape[-1])
    target = target.long()
    loss = F.cross_entropy(
        logits,
        target.flatten(),
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    ).view(target.shape)
    counts = target != ignore_index
    if z_loss != 0:
        loss = loss + z_loss * torch.logsumexp(logits, -1).view(target.shape) ** 2
    return _reduce(loss, counts, reduction, "linear_cross_entropy")


def _reduce(loss: Tensor, counts: Tensor, reduction: str, name: str) -> Tensor:
    """Mean or sum over the tokens that count, or all of them, 0 where they do not."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{name}: reduction must be mean, sum or none, got {reduction!r}")
    loss = loss.masked_fill(~counts, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counts.sum()


def _hard_blend(
    soft: Tensor,
    logits: Tensor,
    target: Tensor | None,
    hard_weight: float,
    ignore_index: int,
) -> Tensor:
    """`(1 - hard_weight) * soft + hard_weight * cross-entropy` where there is a label."""
    if target is None or hard_weight == 0:
        return soft
    target = target.long()
    hard = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        target.flatten(),
        ignore_index=ignore_index,
        reduction="none",
    ).view(target.shape)
    return torch.where(target == ignore_index, soft, (1 - hard_weight) * soft + hard_weight * hard)


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
    target: Tensor | None = None,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """`-sum over the vocabulary of P_T log P_S`, P = softmax(soft-capped logits / temperature).

    Each side has its own soft-cap; there is no temperature**2 factor; the teacher gets no
    gradient. With vocabularies of unequal size the teacher's distribution is the one over the
    student's words: logits it has beyond them, or lacks, count as -inf. With labels the loss of a
    token is `(1 - hard_weight) * that + hard_weight * cross-entropy`, the latter at temperature 1.

    Args:
        hidden: (..., hidden_size), the student's, any float dtype.
        weight: (vocab_size, hidden_size), the student's.
        teacher_hidden: (..., teacher_hidden_size), the same leading shape.
        teacher_weight: (teacher_vocab_size, teacher_hidden_size).
        softcap: bound of the student's logits, or None.
        teacher_softcap: bound of the teacher's logits, or None.
        temperature: divides both sides' capped logits.
        mask: (...), true where a token counts; None: everywhere.
        reduction: "mean" over the tokens that count (NaN where none does), "sum", or "none".
        target: (...), integers, token ids or ignore_index (no label there); None: no labels.
        hard_weight: share of the cross-entropy with target.
        ignore_index: the target of a token without a label.

    Returns:
        A float32 (float64 for float64) scalar, in nats; with "none" hidden's leading shape, 0
        where the mask is false.

    Raises:
        ValueError: reduction is none of the three.

    Source: Gemma 2 (arXiv 2408.00118), section 3.2; Hinton et al. (arXiv 1503.02531).
    """
    logits = _widen(_soft_cap(F.linear(hidden, weight), softcap))
    student = logits / temperature
    with torch.no_grad():
        teacher = _widen(_soft_cap(F.linear(teacher_hidden, teacher_weight), teacher_softcap))
        missing = student.shape[-1] - teacher.shape[-1]
        teacher = F.pad(teacher / temperature, (0, missing), value=-math.inf)
        probabilities = teacher.softmax(-1).to(student.dtype)
    soft = -(probabilities * student.log_softmax(-1)).sum(-1)
    loss = _hard_blend(soft, logits, target, hard_weight, ignore_index)
    counts = torch.ones_like(loss, dtype=torch.bool) if mask is None else mask != 0
    return _reduce(loss, counts, reduction, "linear_distillation")


def linear_distillation_topk(
    hidden: Tensor,
    weight: Tensor,
    teacher_indices: Tensor,
    teacher_log_probs: Tensor,
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
    renormalize: bool = True,
    mask: Tensor | None = None,
    reduction: str = "mean",
    target: Tensor | None = None,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """`-sum over k words of P_T log P_S`, P_S = softmax(soft-capped logits / temperature).

    Args:
        hidden: (..., hidden_size), the student's, any float dtype.
        weight: (vocab_size, hidden_size), the student's.
        teacher_indices: (..., k), integers, ids of words.
        teacher_log_probs: (..., k), any float dtype; -inf where there is no word.
        softcap: bound of the student's logits, or None.
        temperature: divides the student's capped logits, and the log-probabilities.
        renormalize: whether P_T is softmax(teacher_log_probs / temperature), or their exp.
        mask: (...), true where a token counts; None: everywhere.
        reduction: "mean" over the tokens that count (NaN where none does), "sum", or "none".
        target: (...), integers, token ids or ignore_index; None: no labels.
        hard_weight: share of the cross-entropy with target, at temperature 1.
        ignore_index: the target of a token without a label.

    Returns:
        A float32 (float64 for float64) scalar, in nats; with "none" hidden's leading shape, 0
        where the mask is false.

    Raises:
        ValueError: reduction is none of the three.

    Source: Gemma 2 (arXiv 2408.00118), section 3.2.
    """
    logits = _widen(_soft_cap(F.linear(hidden, weight), softcap))
    logs = _widen(teacher_log_probs).to(logits.dtype)
    probabilities = (logs / temperature).softmax(-1) if renormalize else logs.exp()
    indices = torch.where(logs == -math.inf, 0, teacher_indices.long())
    student = (logits / temperature).log_softmax(-1).gather(-1, indices)
    soft = -(probabilities * student).sum(-1)
    loss = _hard_blend(soft, logits, target, hard_weight, ignore_index)
    counts = torch.ones_like(loss, dtype=torch.bool) if mask is None else mask != 0
    return _reduce(loss, counts, reduction, "linear_distillation_topk")


def forward(
    config: Any,
    weights: Mapping[str, Tensor],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """The whole of Gemma 2: token ids to soft-capped logits.

    Positions count a row's tokens from 0 and skip its padding, which no token sees.

    Args:
        config: anything with the attributes of Gemma2Config.
        weights: the fused tensors by name: `embed_tokens.weight`, `norm.weight`, and for each
            layer i `layers.{i}.` with `qkv_proj`, `o_proj`, `gate_up_proj`, `down_proj` and the
            four norms; one float dtype.
        input_ids: (batch, seqlen), integers.
        attention_mask: (batch, seqlen), true or 1 where input_ids holds a token; None: everywhere.

    Returns:
        Logits (batch, seqlen, vocab_size) in the weights' dtype, 0 where the mask is false.

    Source: transformers, Gemma2ForCausalLM.
    """
    batch, seqlen = input_ids.shape
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim, eps = config.head_dim, config.rms_norm_eps
    scale = config.query_pre_attn_scalar**-0.5
    embedding = weights["embed_tokens.weight"]

    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    tokens = attention_mask != 0
    positions = (tokens.long().cumsum(-1) - 1).clamp(min=0)
    distance = positions[:, :, None] - positions[:, None, :]
    causal = torch.ones(seqlen, seqlen, dtype=torch.bool, device=input_ids.device).tril()
    # A padded query sees nothing: what it computes is of no use to anyone.
    everything = causal & tokens[:, None, :] & tokens[:, :, None]
    nearby = everything & (distance < config.sliding_window)

    embedding_scale = torch.tensor(config.hidden_size**0.5).to(embedding.dtype)
    x = F.embedding(input_ids, embedding) * embedding_scale
    for i in range(config.num_hidden_layers):
        layer = f"layers.{i}"
        local = config.layer_types[i] == "sliding_attention"
        normed = rms_norm(x, weights[f"{layer}.input_layernorm.weight"], eps)
        qkv = F.linear(normed, weights[f"{layer}.qkv_proj.weight"])
        qkv = qkv.view(batch, seqlen, heads + 2 * kv_heads, head_dim)
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=2)
        q, k = rope(q, k, positions, config.rope_theta)
        visible = (nearby if local else everything)[:, None]
        out = _attend(q, k, v, visible, scale, config.attn_logit_softcapping)
        out = F.linear(out.reshape(batch, seqlen, -1), weights[f"{layer}.o_proj.weight"])
        x, normed = add_rms_norm(
            out,
            x,
            weights[f"{layer}.post_attention_layernorm.weight"],
            weights[f"{layer}.pre_feedforward_layernorm.weight"],
            eps,
        )
        gate, up = F.linear(normed, weights[f"{layer}.gate_up_proj.weight"]).chunk(2, dim=-1)
        out = F.linear(geglu(gate, up), weights[f"{layer}.down_proj.weight"])
        x = x + rms_norm(out, weights[f"{layer}.post_feedforward_layernorm.weight"], eps)
    x = rms_norm(x, weights["norm.weight"], eps)
    logits = _soft_cap(F.linear(x, embedding), config.final_logit_softcapping)
    return logits.masked_fill(~tokens[..., None], 0.0)
