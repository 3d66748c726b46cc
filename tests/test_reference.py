"""reference.py against transformers' Gemma 2, module by module and as a whole."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from common import DTYPES
from gemma2_ext import reference


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny products spend their time in waiting for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("seed", range(tiny.NUM_CONFIGS))
def test_forward(seed: int) -> None:
    model, theirs, weights = tiny.trio(seed)
    config = model.config
    ids = tiny.random_ids(config, 2, 60, seed)
    mask = torch.ones_like(ids)
    mask[1, :21] = 0
    with torch.no_grad():
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        expected = theirs(ids, attention_mask=mask, position_ids=position_ids).logits
    actual = reference.forward(config, weights, ids, mask)
    # The same operations in another order: a few roundings.
    assert tiny.relative_error(actual[mask != 0], expected[mask != 0]) < 1e-5
    assert not actual[mask == 0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forward_in_half_precision_rounds_where_transformers_does(dtype: torch.dtype) -> None:
    """The same roundings at the same places: most logits are equal to the bit."""
    equal = []
    for seed in range(0, tiny.NUM_CONFIGS, 4):
        config = tiny.random_config(seed)
        weights = tiny.random_weights(config, seed, dtype)
        ids = tiny.random_ids(config, 2, 60, seed)
        with torch.no_grad():
            expected = tiny.hugging_face(config, weights)(ids).logits
        actual = reference.forward(config, weights, ids)
        assert actual.dtype == dtype
        equal.append((actual == expected).double().mean().item())
    assert sum(equal) / len(equal) > 0.5, equal


def test_forward_in_float64_is_exact() -> None:
    """Its error shrinks with the dtype's: float32 differs from it by float32's rounding."""
    config = tiny.small_config()
    weights = tiny.random_weights(config)
    ids = tiny.random_ids(config, 1, 60)
    exact = reference.forward(config, {n: w.double() for n, w in weights.items()}, ids)
    assert exact.dtype == torch.float64
    assert 1e-8 < tiny.relative_error(reference.forward(config, weights, ids), exact) < 1e-5


def test_interior_padding_is_as_if_it_were_not_there() -> None:
    config = tiny.small_config()
    weights = {n: w.double() for n, w in tiny.random_weights(config).items()}
    ids = tiny.random_ids(config, 1, 50)
    mask = torch.ones_like(ids)
    mask[0, [0, 7, 8, 20, 49]] = 0
    alone = reference.forward(config, weights, ids[mask != 0][None])
    actual = reference.forward(config, weights, ids, mask)[mask != 0]
    assert tiny.relative_error(actual, alone[0]) < 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype) -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    norm = Gemma2RMSNorm(41, eps=1e-5).to(dtype)
    norm.weight.data.normal_()
    x, r = torch.randn(2, 7, 3, 41).to(dtype)
    expected = norm(x)
    assert torch.equal(reference.rms_norm(x, norm.weight, 1e-5), expected)
    residual, normed = reference.add_rms_norm(x, r, norm.weight, norm.weight, 1e-5)
    assert torch.equal(residual, r + expected)
    assert torch.equal(normed, norm(r + expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_geglu_and_linear(dtype: torch.dtype) -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP

    config = tiny.small_config()
    theirs = tiny.hugging_face(config, tiny.random_weights(config, dtype=dtype))
    mlp = theirs.model.layers[0].mlp
    assert isinstance(mlp, Gemma2MLP)
    x = torch.randn(3, config.hidden_size).to(dtype)
    gate = reference.linear(x, mlp.gate_proj.weight)
    up = reference.linear(x, mlp.up_proj.weight)
    actual = reference.linear(reference.geglu(gate, up), mlp.down_proj.weight)
    assert torch.equal(actual, mlp(x))


@pytest.mark.parametrize("theta", [10000.0, 1e6])
@pytest.mark.parametrize("head_dim", [8, 64, 256])
def test_rope(head_dim: int, theta: float) -> None:
    from transformers import Gemma2Config
    from transformers.models.gemma2.modeling_gemma2 import (
        Gemma2RotaryEmbedding,
        apply_rotary_pos_emb,
    )

    config = tiny.small_config(head_dim=head_dim, rope_theta=theta)
    embedding = Gemma2RotaryEmbedding(Gemma2Config(**config.to_dict()))
    positions = torch.tensor([[0, 1, 2, 4095, 8191], [7, 7, 0, 100, 8190]])
    for dtype in DTYPES:
        q, k = torch.randn(2, 5, 4, head_dim).to(dtype), torch.randn(2, 5, 2, head_dim).to(dtype)
        cos, sin = embedding(q, positions)
        expected = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
        for a, b in zip(reference.rope(q, k, positions, theta), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2 * torch.finfo(dtype).eps)
        row = reference.rope(q[:1], k[:1], positions[0], theta)
        assert torch.equal(row[0], reference.rope(q, k, positions, theta)[0][:1])


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_attention(window: int | None, softcap: float | None) -> None:
    """Against a mask written out and transformers' eager attention: prefill, chunk and decode."""
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    class Module(torch.nn.Module):
        num_key_value_groups = 4

    lengths, starts = torch.tensor([17, 9, 20]), torch.tensor([0, 3, 19])
    for seqlen_q in (20, 6, 1):
        q = torch.randn(3, seqlen_q, 8, 16)
        k, v = torch.randn(2, 3, 20, 2, 16)
        position = (lengths - seqlen_q)[:, None, None] + torch.arange(seqlen_q)[None, :, None]
        key = torch.arange(20)
        seen = (key <= position) & (key >= starts[:, None, None]) & (key < lengths[:, None, None])
        if window is not None:
            seen &= key > position - window
        mask = torch.where(seen, 0.0, -math.inf)[:, None]
        expected, _ = eager_attention_forward(
            Module(),
            *(x.transpose(1, 2) for x in (q, k, v)),
            mask,
            scaling=0.5,
            softcap=softcap,
        )
        scores = 0.5 * q.transpose(1, 2) @ k.transpose(1, 2).repeat_interleave(4, 1).mT
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        lse = (scores + mask).logsumexp(-1)
        for poison in (False, True):
            if poison:  # what lies outside the valid keys must not matter
                outside = (key < starts[:, None]) | (key >= lengths[:, None])
                k, v = (x.masked_fill(outside[..., None, None], math.nan) for x in (k, v))
            actual, actual_lse = reference.attention(
                q,
                k,
                v,
                scale=0.5,
                softcap=softcap,
                window=window,
                key_lengths=lengths,
                key_starts=starts,
                return_lse=True,
            )
            sees = seen.any(-1)
            torch.testing.assert_close(actual[sees], expected[sees])
            assert not actual[~sees].any()
            torch.testing.assert_close(actual_lse, lse)


def test_attention_without_causality() -> None:
    q, k, v = torch.randn(3, 2, 7, 2, 8).double()
    actual = reference.attention(q, k, v, scale=0.3, causal=False)
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), scale=0.3
    ).transpose(1, 2)
    torch.testing.assert_close(actual, expected)
    with pytest.raises(ValueError, match="window needs causal=True"):
        reference.attention(q, k, v, scale=0.3, causal=False, window=3)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        reference.attention(q, k, v, scale=0.3, window=0)


def test_attention_varlen_is_attention_of_each_sequence() -> None:
    lengths_q, lengths_k = (5, 0, 1, 7), (5, 3, 9, 8)
    q = torch.randn(sum(lengths_q) + 2, 4, 8)
    k, v = torch.randn(2, sum(lengths_k) + 1, 2, 8)
    cu_q = torch.tensor([0, *torch.tensor(lengths_q).cumsum(0)], dtype=torch.int32)
    cu_k = torch.tensor([0, *torch.tensor(lengths_k).cumsum(0)], dtype=torch.int32)
    options = {"scale": 0.4, "softcap": 2.0, "window": 4}
    out = reference.attention_varlen(q, k, v, cu_q, cu_k, 7, 9, **options)
    for i in range(4):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        expected = reference.attention(q[None, rows], k[None, keys], v[None, keys], **options)
        assert torch.equal(out[rows], expected[0])
    assert not out[cu_q[-1] :].any()


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_linear_cross_entropy_is_the_loss_of_transformers(softcap: float | None) -> None:
    config = tiny.small_config(final_logit_softcapping=softcap)
    theirs = tiny.hugging_face(config, tiny.random_weights(config))
    ids = tiny.random_ids(config, 2, 20)
    labels = ids.clone()
    labels[0, :9] = -100
    with torch.no_grad():
        expected = theirs(ids, labels=labels).loss
        hidden = theirs.model(ids).last_hidden_state[:, :-1]
        weight = theirs.lm_head.weight
        target = labels[:, 1:]
        loss = reference.linear_cross_entropy(hidden, weight, target, softcap=softcap)
        torch.testing.assert_close(loss, expected)
        each = reference.linear_cross_entropy(
            hidden, weight, target, softcap=softcap, reduction="none"
        )
        total = reference.linear_cross_entropy(
            hidden, weight, target, softcap=softcap, reduction="sum"
        )
    counted = target != -100
    assert each.shape == target.shape
    assert not each[~counted].any()
    torch.testing.assert_close(each.sum(), total)
    torch.testing.assert_close(each.sum() / counted.sum(), expected)
    other = reference.linear_cross_entropy(
        hidden, weight, target.masked_fill(~counted, 5), softcap=softcap, ignore_index=5
    )
    keep = counted & (target != 5)
    torch.testing.assert_close(other, each[keep].mean())


def distillation_by_hand(
    student: Tensor, teacher: Tensor, cap: float | None, teacher_cap: float | None, t: float
) -> Tensor:
    def log_p(logits: Tensor, cap: float | None) -> Tensor:
        return ((cap * torch.tanh(logits / cap) if cap else logits) / t).log_softmax(-1)

    return -(log_p(teacher, teacher_cap).exp() * log_p(student, cap)).sum(-1)


@pytest.mark.parametrize(("cap", "teacher_cap"), [(None, None), (3.0, 5.0), (None, 2.0)])
def test_linear_distillation(cap: float | None, teacher_cap: float | None) -> None:
    hidden, weight = torch.randn(2, 5, 8).double(), torch.randn(31, 8).double()
    teacher_hidden, teacher_weight = torch.randn(2, 5, 12).double(), torch.randn(31, 12).double()
    mask = torch.rand(2, 5) < 0.7
    sides = (hidden, weight, teacher_hidden, teacher_weight)
    each = distillation_by_hand(
        hidden @ weight.T, teacher_hidden @ teacher_weight.T, cap, teacher_cap, 1.7
    )
    options = {"softcap": cap, "teacher_softcap": teacher_cap, "temperature": 1.7}
    for reduction, expected in {
        "mean": each[mask].mean(),
        "sum": each[mask].sum(),
        "none": each * mask,
    }.items():
        actual = reference.linear_distillation(*sides, **options, mask=mask, reduction=reduction)
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(reference.linear_distillation(*sides, **options), each.mean())
    with pytest.raises(ValueError, match="reduction must be mean, sum or none, got 'max'"):
        reference.linear_distillation(*sides, reduction="max")


def test_gradients() -> None:
    """Every function is differentiable, and its derivative is that of its values."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    check = torch.autograd.gradcheck
    x, r, w, u = draw(3, 8), draw(3, 8), draw(8), draw(8)
    assert check(lambda *a: reference.rms_norm(*a), (x, w))
    assert check(lambda *a: reference.add_rms_norm(*a), (x, r, w, u))
    assert check(lambda *a: reference.geglu(*a), (x, r))
    q, k, v = draw(2, 4, 4, 8), draw(2, 6, 2, 8), draw(2, 6, 2, 8)
    positions = torch.tensor([3, 4, 5, 6])
    assert check(lambda q, k: reference.rope(q, k, positions), (q, draw(2, 4, 2, 8)))
    # Row 1's first queries see no key at all.
    ends, starts = torch.tensor([6, 5]), torch.tensor([1, 3])
    assert check(
        lambda *a: reference.attention(
            *a, scale=0.4, softcap=1.5, window=2, key_lengths=ends, key_starts=starts
        ),
        (q, k, v),
    )
    target = torch.tensor([1, -100, 4])
    e, t, te = draw(9, 8), torch.randn(3, 5).double(), torch.randn(9, 5).double()
    assert check(lambda *a: reference.linear_cross_entropy(*a, target, softcap=2.0), (x, e))
    assert check(
        lambda *a: reference.linear_distillation(*a, t, te, softcap=2.0, teacher_softcap=3.0),
        (x, e),
    )


def test_the_teacher_gets_no_gradient() -> None:
    tensors = [torch.randn(3, 4, requires_grad=True) for _ in range(4)]
    reference.linear_distillation(*tensors).backward()
    assert [t.grad is not None for t in tensors] == [True, True, False, False]


def test_gradients_of_the_whole_are_those_of_transformers() -> None:
    model, theirs, weights = tiny.trio(2)
    config = model.config
    theirs = tiny.hugging_face(config, weights)
    ids = tiny.random_ids(config, 2, 40).clamp(min=1)  # a pad's embedding gets no gradient there
    mine = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    reference.forward(config, mine, ids).square().mean().backward()
    theirs(ids).logits.square().mean().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    actual = tiny.split(config, {name: w.grad for name, w in mine.items()})
    assert actual.keys() == expected.keys()
    for name, grad in actual.items():
        assert tiny.relative_error(grad, expected[name]) < 1e-4, name
