"""transformers with these kernels against stock eager: the same weights, masks, caches, losses."""

from __future__ import annotations

import copy
import importlib.util
import json
import pickle
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny

transformers = pytest.importorskip("transformers")
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (4, 57):
    pytest.skip("needs transformers 4.57", allow_module_level=True)

import gemma2_ext.integrations.transformers as hf  # noqa: E402

# One window, 16, is passed by prompts and again by what follows.
CONFIG = tiny.small_config()
PROMPT, NEW = 24, 14
# Logits of up to 20 through three layers in float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-3}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stock(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    config = tiny.small_config(**changes)
    return tiny.hugging_face(config, tiny.random_weights(config, dtype=dtype))


def registered(model: Any) -> Any:
    hf.register()
    model = copy.deepcopy(model)
    model.set_attn_implementation(hf.NAME)
    return model


def patched(model: Any, **options: Any) -> Any:
    return hf.patch(copy.deepcopy(model), **options)


def batch(side: str) -> tuple[Tensor, Tensor]:
    """Three rows of ids; the second and third padded, past a window of keys."""
    ids = tiny.random_ids(CONFIG, 3, PROMPT)
    mask = torch.ones_like(ids)
    for row, padding in ((1, 5), (2, 19)):
        if side == "left":
            mask[row, :padding] = 0
        elif side == "right":
            mask[row, PROMPT - padding :] = 0
    return ids, mask


def assert_as_exact_as(actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    """The error against float64 is at most twice that of stock eager in the same dtype."""
    assert actual.dtype == eager.dtype
    error = (actual.double() - exact).abs().max()
    own = (eager.double() - exact).abs().max()
    allowed = 2 * own + torch.finfo(actual.dtype).eps * exact.abs().max()
    assert error <= allowed, f"error {error:.2e}, stock's own {own:.2e}"


def in_float64(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of stock eager in float64 at each token that is not padding.

    Row by row, as in float64 its own mask gives NaN where a query sees no key.
    """
    model = copy.deepcopy(model).double()
    rows = zip(ids, mask.bool(), strict=True)
    return torch.cat([model(row[tokens][None], use_cache=False).logits[0] for row, tokens in rows])


WAYS = {"register": registered, "patch": patched}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@torch.no_grad()
def test_logits(way: str, dtype: torch.dtype, side: str) -> None:
    model = stock(dtype)
    ids, mask = batch(side)
    tokens = mask.bool()
    kwargs: dict[str, Any] = {"use_cache": False}
    if side != "none":
        kwargs["attention_mask"] = mask
        kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    exact = in_float64(model, ids, mask)
    eager = model(ids, **kwargs).logits[tokens]
    actual = WAYS[way](model)(ids, **kwargs).logits[tokens]
    assert_as_exact_as(actual, eager, exact)


@torch.no_grad()
def test_padding_on_the_left_itself() -> None:
    """Where no key is seen, stock eager takes the mean of all values; so a whole batch is equal."""
    model = stock()
    ids, mask = batch("left")
    expected = model(ids, attention_mask=mask).logits
    for mine in (registered(model), patched(model)):
        torch.testing.assert_close(mine(ids, attention_mask=mask).logits, expected, **CLOSE)


@torch.no_grad()
def test_the_features_bite() -> None:
    """Without its soft-cap or its window, the same model gives other logits."""
    ids, _ = batch("none")
    eager = stock()(ids).logits
    for change in ({"attn_logit_softcapping": None}, {"sliding_window": 64}):
        other = registered(stock(**change))(ids).logits
        assert (other - eager).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
@torch.no_grad()
def test_the_attention_of_other_models(kind: str) -> None:
    """`register` serves causal models that ask for nothing the kernels lack, windows included."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=151,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        **({"sliding_window": 16} if kind == "Mistral" else {}),
    )
    model = getattr(transformers, f"{kind}ForCausalLM")._from_config(
        config, attn_implementation="eager"
    )
    ids, mask = batch("left")
    expected, actual = (m(ids, attention_mask=mask).logits for m in (model, registered(model)))
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_generate(way: str, cache: str) -> None:
    """Greedy, sampled and beams; prompts longer than the window, left-padded; ids are equal."""
    model = stock()
    mine = WAYS[way](model)
    ids, mask = batch("left")
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}):
        settings = transformers.GenerationConfig(
            max_new_tokens=NEW,
            pad_token_id=0,
            cache_implementation=None if cache == "dynamic" else cache,
            **options,
        )
        results = []
        for m in (model, mine):
            torch.manual_seed(0)
            results.append(m.generate(ids, attention_mask=mask, generation_config=settings))
        assert results[0].shape[1] == PROMPT + NEW
        assert torch.equal(*results), options


@torch.no_grad()
def test_assisted_generation() -> None:
    model = stock()
    assistant = stock(num_hidden_layers=2)
    mine = patched(model)
    ids = tiny.random_ids(CONFIG, 1, PROMPT)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False}
    options["eos_token_id"] = 1
    expected = model.generate(ids, **options)
    for helper in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            actual = mine.generate(ids, **options, **helper)
        assert torch.equal(actual, expected), helper


@pytest.mark.parametrize("kind", ["DynamicCache", "StaticCache"])
@torch.no_grad()
def test_chunked_prefill(kind: str) -> None:
    """Chunks across the window, into caches of transformers; left padding in the first chunk."""
    model = stock()
    mine = patched(model)
    ids = tiny.random_ids(CONFIG, 2, 50)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    exact = torch.zeros(2, 50, CONFIG.vocab_size, dtype=torch.float64)
    exact[mask.bool()] = in_float64(model, ids, mask)
    name = hf._CACHE
    for m in (model, mine):
        options = {"max_cache_len": 64} if kind == "StaticCache" else {}
        cache = getattr(transformers, kind)(config=m.config, **options)
        begin = 0
        for size in (7, 20, 1, 21, 1):
            end = begin + size
            out = m(
                ids[:, begin:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, begin:end],
                cache_position=torch.arange(begin, end),
                **{name: cache},
            )
            tokens = mask[:, begin:end].bool()
            difference = (out.logits.double() - exact[:, begin:end])[tokens].abs().max()
            assert difference < 1e-3, (type(m), begin, difference)
            begin = end


@torch.no_grad()
def test_packed_sequences() -> None:
    """Several sequences in one row, told apart by their positions: none sees another."""
    model = stock()
    ids = tiny.random_ids(CONFIG, 2, 40)
    positions = torch.cat((torch.arange(11), torch.arange(29)))[None].repeat(2, 1)
    positions[1] = torch.arange(40)
    apart = torch.cat((model(ids[:1, :11]).logits, model(ids[:1, 11:]).logits), dim=1)
    for mine in (registered(model), patched(model)):
        packed = mine(ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(packed[:1], apart, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(packed[1:], model(ids[1:]).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_packed_sequences_of_a_collator() -> None:
    """DataCollatorWithFlattening tells sequences apart by cu_seq_lens too."""
    collator = transformers.DataCollatorWithFlattening(
        return_flash_attn_kwargs=True, return_position_ids=False, return_seq_idx=False
    )
    model = stock()
    rows = [tiny.random_ids(CONFIG, 1, n, n)[0].tolist() for n in (11, 29)]
    inputs = collator([{"input_ids": row, "labels": row} for row in rows])
    inputs.pop("labels")
    inputs["position_ids"] = torch.cat([torch.arange(len(r)) for r in rows])[None]
    apart = torch.cat([model(torch.tensor([row])).logits for row in rows], dim=1)
    packed = patched(model)(**inputs, use_cache=False).logits
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_row_of_padding_alone_is_no_nan() -> None:
    ids, mask = batch("left")
    mask[2] = 0
    for model in (registered(stock(torch.float16)), patched(stock(torch.float16))):
        assert torch.isfinite(model(ids, attention_mask=mask).logits).all()


@torch.no_grad()
def test_refused_masks() -> None:
    model = registered(stock())
    ids, mask = batch("none")
    holes = mask.clone()
    holes[1, 7] = 0
    with pytest.raises(NotImplementedError, match="padding between tokens of a row"):
        model(ids, attention_mask=holes)
    square = torch.ones(3, 1, PROMPT, PROMPT, dtype=torch.bool).tril()
    with pytest.raises(NotImplementedError, match=r"attention_mask of shape \(3, 1, 24, 24\)"):
        model(ids, attention_mask=square)
    cache = transformers.DynamicCache(config=model.config)
    model(ids, attention_mask=mask, **{hf._CACHE: cache})
    with pytest.raises(ValueError, match="a column for each of the 25 tokens so far, .* got 24"):
        model(ids[:, :1], attention_mask=mask, **{hf._CACHE: cache})


def test_refused_mask_functions() -> None:
    masks = transformers.masking_utils
    causal = masks.causal_mask_function
    where = {"batch_size": 1, "kv_length": 4, "q_length": 4}
    for function, match in (
        (lambda b, h, q, k: q >= k, "the mask function .*<lambda>"),
        (masks.or_masks(causal, causal), "the mask function or_masks"),
        (
            masks.and_masks(causal, masks.chunked_overlay(2, torch.zeros(1))),
            "the mask function chunked_overlay",
        ),
        (getattr(masks, "bidirectional_mask_function", None), "attention that is not causal"),
    ):
        if function is not None:
            with pytest.raises(NotImplementedError, match=match):
                hf.attention_mask(mask_function=function, **where)


def test_refused_features() -> None:
    model = registered(stock())
    ids, _ = batch("none")
    with pytest.raises(NotImplementedError, match="output_attentions is not supported"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True
    q = k = torch.randn(1, 2, 3, 16)
    attend = hf.attention_forward
    with pytest.raises(NotImplementedError, match=r"attention_dropout must be 0.*got 0\.1"):
        attend(model, q, k, k, None, dropout=0.1)
    with pytest.raises(NotImplementedError, match="Linear passes s_aux, which these kernels lack"):
        attend(torch.nn.Linear(1, 1), q, k, k, None, s_aux=torch.zeros(2))
    with pytest.raises(NotImplementedError, match="attention that is not causal"):
        attend(model, q, k, k, None, is_causal=False)


def test_refused_models() -> None:
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    llama = transformers.LlamaForCausalLM(config)
    with pytest.raises(TypeError, match=r"Gemma2ForCausalLM, got LlamaForCausalLM .*'llama'"):
        hf.patch(llama)
    with pytest.raises(TypeError, match="got Linear"):
        hf.patch(torch.nn.Linear(2, 2))
    for field, value in (("hidden_activation", "gelu"), ("head_dim", 12)):
        model = stock()
        setattr(model.config, field, value)
        with pytest.raises(NotImplementedError, match=f"patch: {field} must be .*, got"):
            hf.patch(model)
    model = stock()
    model.model.norm.forward = lambda x: x
    with pytest.raises(ValueError, match=r"model\.norm has a forward of its own"):
        hf.patch(model)
    with pytest.raises(ValueError, match="the model is not patched"):
        hf.unpatch(stock())


def layout(model: Any) -> list[tuple[str, torch.Size, int]]:
    return [(name, p.shape, p.data_ptr()) for name, p in model.named_parameters()]


@torch.no_grad()
def test_patch_and_unpatch() -> None:
    model = stock()
    ids, _ = batch("none")
    before, modules = model(ids).logits, [(id(m), type(m)) for m in model.modules()]
    parameters = layout(model)
    state = dict(model.__dict__)
    assert hf.patch(model) is model
    assert hf.patch(model) is model  # a second call changes nothing
    assert layout(model) == parameters
    assert [id(m) for m in model.modules()] == [i for i, _ in modules]
    assert not torch.equal(model(ids).logits, before)  # rounded elsewhere
    assert hf.unpatch(model) is model
    assert [(id(m), type(m)) for m in model.modules()] == modules
    assert model.__dict__.keys() == state.keys()
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(ids).logits, before)


@torch.no_grad()
def test_copies_of_a_patched_model(tmp_path: Path) -> None:
    model = stock()
    mine = patched(model)
    ids, _ = batch("none")
    expected = mine(ids).logits
    copied = copy.deepcopy(mine)
    assert torch.equal(copied(ids).logits, expected)
    hf.unpatch(copied)
    assert torch.equal(mine(ids).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(mine))(ids).logits, expected)
    model.save_pretrained(tmp_path / "stock")
    mine.save_pretrained(tmp_path / "patched")
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("stock", "patched")]
    assert configs[0] == configs[1]
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "patched", attn_implementation="eager"
    )
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_hooks_are_called() -> None:
    """What listens to a module still hears it, though two norms are one op elsewhere."""
    model = patched(stock())
    heard = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: heard.append(name))
    with torch.no_grad():
        out = model(batch("none")[0], output_hidden_states=True)
    silent = {"model.rotary_emb", "model.layers", "lm_head"} | {
        name for name, _ in model.named_modules() if name.endswith("act_fn")
    }
    assert {name for name, _ in model.named_modules()} - set(heard) <= silent
    assert len(out.hidden_states) == CONFIG.num_hidden_layers + 1


def test_importing_needs_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    spec = importlib.util.spec_from_file_location("gemma2_ext.integrations._again", hf.__file__)
    assert spec and spec.loader
    with pytest.raises(ImportError, match="pip install 'transformers>=4.57'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
