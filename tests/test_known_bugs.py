"""What other implementations of Gemma 2 got wrong, each a test by that name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from gemma2_ext import Gemma2, Gemma2Config, ops, reference
from gemma2_ext.models import shipped_model
from gemma2_ext.tokenizer import Tokenizer


def attend(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    out = ops.attention(q, k, v, **options)  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    return out


def logits_by_steps(model: Gemma2, ids: Tensor) -> Tensor:
    cache = model.new_cache(ids.shape[0], ids.shape[1])
    return torch.cat([model(ids[:, i : i + 1], cache=cache) for i in range(ids.shape[1])], dim=1)


def test_attention_scale_from_query_pre_attn_scalar() -> None:
    """9B took 224 for 256; 27B took head_dim for 144."""
    assert Gemma2Config.gemma2_2b().softmax_scale == 256**-0.5
    assert Gemma2Config.gemma2_9b().softmax_scale == 256**-0.5
    assert Gemma2Config.gemma2_27b().head_dim == 128
    assert Gemma2Config.gemma2_27b().softmax_scale == 144**-0.5
    ids = tiny.random_ids(tiny.small_config(), 1, 30)
    weights = tiny.random_weights(tiny.small_config())
    logits = []
    for scalar in (16, 24):
        config = tiny.small_config(query_pre_attn_scalar=scalar)
        logits.append(Gemma2(config, weights)(ids))
        with torch.no_grad():
            expected = tiny.hugging_face(config, weights)(ids).logits
        assert tiny.relative_error(logits[-1], expected) < 2e-5
    assert tiny.relative_error(*logits) > 1e-3


def test_local_and_global_layers_swapped() -> None:
    config = tiny.small_config(num_hidden_layers=2)
    assert config.layer_types == ("sliding_attention", "full_attention")
    assert [Gemma2Config.gemma2_2b().is_local(i) for i in range(3)] == [True, False, True]
    weights = tiny.random_weights(config)
    swapped = tiny.small_config(num_hidden_layers=2, layer_types=config.layer_types[::-1])
    ids = tiny.random_ids(config, 1, 40)
    # What lies out of the window of layer 0 reaches the last token through layer 1 only.
    for model, expected in ((Gemma2(config, weights), config), (Gemma2(swapped, weights), swapped)):
        with torch.no_grad():
            theirs = tiny.hugging_face(expected, weights)(ids).logits
        assert tiny.relative_error(model(ids), theirs) < 2e-5
    assert tiny.relative_error(Gemma2(config, weights)(ids), Gemma2(swapped, weights)(ids)) > 1e-3


@pytest.mark.parametrize("window", [1, 2, 7])
def test_window_off_by_one(window: int) -> None:
    """A query sees `window` keys, itself included: not one more, not one less."""
    seqlen = 12
    q = k = torch.zeros(1, seqlen, 1, 16)
    v = torch.eye(seqlen, 16)[None, :, None]
    seen = attend(q, k, v, scale=1.0, window=window)[0, :, 0, :seqlen] > 0
    for i in range(seqlen):
        assert seen[i].nonzero()[:, 0].tolist() == list(range(max(0, i - window + 1), i + 1))


def test_window_mask_of_one_token_decode_past_the_window() -> None:
    """A mask built from row 0 hides nothing, or everything, where one token is decoded."""
    model, theirs, _ = tiny.trio(5)
    ids = tiny.random_ids(model.config, 1, 3 * model.config.sliding_window)
    with torch.no_grad():
        expected = theirs(ids).logits
    assert tiny.relative_error(logits_by_steps(model, ids), expected) < 2e-5


def test_window_ignored_past_4096_tokens() -> None:
    """A context beyond 4096 with the window of the published models, against the reference."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 4300, 1, 8).unbind()
    expected = reference.attention(q, k, v, scale=0.3, softcap=50.0, window=4096)
    assert isinstance(expected, Tensor)
    actual = attend(q, k, v, scale=0.3, softcap=50.0, window=4096)
    torch.testing.assert_close(actual, expected)
    k[:, 203] = 1e4  # seen by query 4298, not by 4299
    v[:, 203] = 1e4
    changed = attend(q, k, v, scale=0.3, softcap=50.0, window=4096)
    assert torch.equal(changed[:, 4299], actual[:, 4299])
    assert not torch.equal(changed[:, 4298], actual[:, 4298])


def test_cache_past_4096_tokens() -> None:
    """Chunks and then single tokens across position 4096, with the published window."""
    config = tiny.small_config(
        num_hidden_layers=2, sliding_window=4096, max_position_embeddings=8192, head_dim=8
    )
    model = Gemma2(config, tiny.random_weights(config))
    ids = tiny.random_ids(config, 1, 4110)
    expected = model(ids)[:, 4088:]
    cache = model.new_cache(1, 4200)
    model(ids[:, :4090], cache=cache, last_only=True)
    steps = [model(ids[:, i : i + 1], cache=cache) for i in range(4090, 4110)]
    assert tiny.relative_error(torch.cat(steps, dim=1), expected[:, 2:]) < 2e-5


def test_cache_length_read_from_a_local_layers_ring() -> None:
    """A ring holds fewer tokens than the sequence has; the cache's length counts them all."""
    model = tiny.small_model(max_position_embeddings=128)
    cache = model.new_cache(1, 128)
    ring = cache.keys[0].shape[1]
    ids = tiny.random_ids(model.config, 1, 100)
    assert ring < 100
    model(ids, cache=cache)
    assert cache.length == 100
    assert cache.lengths.tolist() == [100]


def test_window_of_1_trims_the_cache() -> None:
    config = tiny.small_config(sliding_window=1)
    weights = tiny.random_weights(config)
    model = Gemma2(config, weights)
    ids = tiny.random_ids(config, 1, 60)
    with torch.no_grad():
        expected = tiny.hugging_face(config, weights)(ids).logits
    assert tiny.relative_error(model(ids), expected) < 2e-5
    assert tiny.relative_error(logits_by_steps(model, ids), expected) < 2e-5
    assert model.new_cache(1, 256).keys[0].shape[1] < 32


def test_soft_cap_silently_dropped() -> None:
    """Neither in prefill nor in decoding is a cap lost, and no other value is put in its place."""
    weights = tiny.random_weights(tiny.small_config())
    ids = tiny.random_ids(tiny.small_config(), 1, 40)
    results = []
    for caps in ({}, {"attn_logit_softcapping": None}, {"final_logit_softcapping": None}):
        config = tiny.small_config(**caps)
        model = Gemma2(config, weights)
        with torch.no_grad():
            expected = tiny.hugging_face(config, weights)(ids).logits
        for logits in (model(ids), logits_by_steps(model, ids)):
            assert tiny.relative_error(logits, expected) < 2e-5
        results.append(model(ids))
    assert tiny.relative_error(results[1], results[0]) > 1e-3
    assert tiny.relative_error(results[2], results[0]) > 1e-3


def test_final_soft_cap_on_logits_not_on_hidden_states() -> None:
    hidden, weight = torch.randn(3, 20), torch.randn(50, 20)
    expected = 2.0 * torch.tanh(F.linear(hidden, weight) / 2.0)
    actual = ops.logits(hidden, weight, 2.0)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert actual.abs().max() <= 2.0


def test_soft_cap_in_the_loss() -> None:
    """A loss without the cap distils another objective."""
    hidden, weight = torch.randn(5, 12).double(), torch.randn(30, 12).double()
    target = torch.randint(0, 30, (5,))
    capped = 3.0 * torch.tanh(hidden @ weight.T / 3.0)
    loss = reference.linear_cross_entropy(hidden, weight, target, softcap=3.0)
    torch.testing.assert_close(loss.double(), F.cross_entropy(capped, target), rtol=1e-6, atol=0)
    other = reference.linear_cross_entropy(hidden, weight, target)
    assert abs(other - loss) > 1e-2


def test_soft_cap_derivative_after_masking_is_no_nan() -> None:
    q, k, v = (torch.randn(1, 6, 2, 8, requires_grad=True) for _ in range(3))
    starts = torch.tensor([2])
    out = reference.attention(q, k, v, scale=1.0, softcap=2.0, window=3, key_starts=starts)
    assert isinstance(out, Tensor)
    out.sum().backward()
    for tensor in (q, k, v):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()


def test_tanh_gelu_not_exact_gelu() -> None:
    gate, up = torch.linspace(-6, 6, 1001), torch.ones(1001)
    tanh, exact = F.gelu(gate, approximate="tanh"), F.gelu(gate)
    actual = ops.geglu(gate, up)
    assert (actual - tanh).abs().max() < 1e-6
    assert (actual - exact).abs().max() > 1e-4


def test_norm_in_float32_and_one_plus_weight_in_float32() -> None:
    """In bfloat16 1 + w loses w's last bits, and the norm its precision, before the rounding."""
    x = torch.randn(64, 256).bfloat16()
    weight = torch.full((256,), 2.0**-9 + 2.0**-10).bfloat16()  # 1 + w is 1 in bfloat16
    expected = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    expected = (expected * (1 + weight.float())).bfloat16()
    actual = ops.rms_norm(x, weight)
    assert (actual != expected).double().mean() < 0.002  # a tie that float32 rounds elsewhere
    assert (ops.rms_norm(x, torch.zeros_like(weight)) != expected).double().mean() > 0.1


def test_embedding_scale_rounded_to_the_weights_dtype() -> None:
    """sqrt(2304) = 48 is exact, sqrt(3584) = 59.87 is 59.75 in bfloat16."""
    assert Gemma2Config.gemma2_2b().embedding_scale(torch.bfloat16) == 48.0
    assert Gemma2Config.gemma2_9b().embedding_scale(torch.bfloat16) == 59.75
    assert Gemma2Config.gemma2_9b().embedding_scale(torch.float32) == pytest.approx(59.8665)
    assert Gemma2Config.gemma2_27b().embedding_scale(torch.bfloat16) == 68.0


def test_left_padded_fully_masked_rows_give_no_nan() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        model = tiny.small_model(dtype=dtype)
        ids = tiny.random_ids(model.config, 2, 30)
        mask = torch.ones(2, 30, dtype=torch.bool)
        mask[0, :29] = False
        for cache in (None, model.new_cache(2, 64)):
            logits = model(ids, mask, cache=cache)
            assert torch.isfinite(logits).all()
            assert not logits[0, :29].any()


def test_padding_mask_lost() -> None:
    """What stands at padded places does not matter, in one pass and with a cache."""
    model = tiny.small_model()
    ids = tiny.random_ids(model.config, 2, 30)
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[0, :11] = 0
    other = torch.where(mask == 0, 7, ids)
    assert torch.equal(model(ids, mask), model(other, mask))
    assert not torch.equal(model(ids), model(other))
    caches = [model.new_cache(2, 64) for _ in range(2)]
    first, second = (
        model(i, mask, cache=cache) for i, cache in zip((ids, other), caches, strict=True)
    )
    assert torch.equal(first, second)
    following = ids[:, :1]
    assert torch.equal(*(model(following, cache=cache) for cache in caches))


def test_double_bos() -> None:
    tokenizer = Tokenizer.from_pretrained(shipped_model())
    for ids in (
        tokenizer.encode("<bos>Hark"),
        tokenizer.apply_chat_template([{"role": "user", "content": "Hark"}]),
    ):
        assert ids.count(2) == 1
        assert ids[0] == 2


def test_end_of_turn_printed() -> None:
    """Generation stops at 1 and at 107, and neither is text."""
    tokenizer = Tokenizer.from_pretrained(shipped_model())
    assert tokenizer.eos_ids == (1, 107)
    assert tokenizer.decode([*tokenizer.encode("Hark"), 107]) == "Hark"
    config = tiny.small_config()
    weights = tiny.random_weights(config)
    ids = tiny.random_ids(config, 1, 8)
    for stop in (1, 107):
        forced = weights["embed_tokens.weight"].clone()
        hidden = reference_hidden_direction(config, weights, ids)
        forced[stop] = 100 * hidden
        model = Gemma2(config, {**weights, "embed_tokens.weight": forced})
        assert model.generate(ids, max_new_tokens=5)[0, 8:].tolist() == [stop]


def reference_hidden_direction(
    config: Gemma2Config, weights: dict[str, Tensor], ids: Tensor
) -> Tensor:
    """The last hidden state: the logits of an identity in place of the output matrix."""
    logits = Gemma2(config, weights)(ids)[0, -1]
    cap = config.final_logit_softcapping
    assert cap is not None
    scores = cap * torch.atanh((logits / cap).double())
    hidden = torch.linalg.lstsq(weights["embed_tokens.weight"].double(), scores[:, None]).solution
    return (hidden[:, 0] / hidden.norm()).float()


@pytest.mark.parametrize("words", [17, 20, 23])
def test_teachers_larger_vocabulary(words: int) -> None:
    """Words that only one side has carry no probability: they are no logits of 0."""
    hidden, weight = torch.randn(4, 8).double(), torch.randn(words, 8).double()
    teacher_hidden, teacher_weight = torch.randn(4, 6).double(), torch.randn(20, 6).double()
    loss = reference.linear_distillation(hidden, weight, teacher_hidden, teacher_weight)
    shared = min(words, 20)
    p = (teacher_hidden @ teacher_weight[:shared].T).softmax(-1)
    log_q = (hidden @ weight.T).log_softmax(-1)[:, :shared]
    torch.testing.assert_close(loss.double(), -(p * log_q).sum(-1).mean(), rtol=1e-6, atol=0)
