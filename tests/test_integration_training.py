"""Training a patched model: loss and gradients against stock eager, PEFT, TRL, distillation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from gemma2_ext import ops
from gemma2_ext.models import shipped_model

pytest.importorskip("transformers", "4.57")

import gemma2_ext.integrations.transformers as hf

CONFIG = tiny.small_config()
SEQLEN = 2 * CONFIG.sliding_window + 3


def attention_has_a_backward() -> bool:
    q = torch.ones(1, 1, 1, 8, requires_grad=True)
    try:
        ops.attention(q, q, q, scale=1.0).sum().backward()  # type: ignore[union-attr]
    except NotImplementedError:
        return False
    return True


ATTENTIONS = [
    "eager",
    pytest.param(
        hf.NAME,
        marks=pytest.mark.skipif(
            not attention_has_a_backward(), reason="ops.attention has no backward in this build"
        ),
    ),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stock(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    config = tiny.small_config(**changes)
    return tiny.hugging_face(config, tiny.random_weights(config, seed, dtype)).train()


def patched(model: Any, attention: str, **options: Any) -> Any:
    model = hf.patch(copy.deepcopy(model), **options)
    model.set_attn_implementation(attention)
    return model


def batch() -> dict[str, Tensor]:
    """Two rows, the second padded on the left; labels on tokens, but not on all of them."""
    ids = tiny.random_ids(CONFIG, 2, SEQLEN)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 20:24] = -100
    labels[1, 9] = -100  # predicted by padding: a test of its own
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def backward(model: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, dict]:
    model.zero_grad()
    loss = model(**inputs, **options).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_as_exact_as(
    actual: dict[str, Tensor],
    eager: dict[str, Tensor],
    exact: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """A gradient's error is at most twice the largest of stock eager, relative to its size.

    The largest over all parameters: one alone may by luck be nearer the truth than its dtype lets
    expect.
    """
    assert actual.keys() == eager.keys() == exact.keys()

    def errors(gradients: dict[str, Tensor]) -> dict[str, float]:
        return {n: ((g - exact[n]).norm() / exact[n].norm()).item() for n, g in gradients.items()}

    allowed = 2 * max(errors(eager).values()) + torch.finfo(dtype).eps
    for name, error in errors(actual).items():
        assert error <= allowed, f"{name}: {error:.2e}, stock's own error allows {allowed:.2e}"


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients(attention: str, dtype: torch.dtype) -> None:
    model = stock(dtype)
    inputs = batch()
    # Row by row for the truth: in float64 stock's own mask gives NaN in a row of padding.
    double = copy.deepcopy(model).double()
    total = (inputs["labels"][:, 1:] != -100).sum()
    exact_loss = torch.zeros((), dtype=torch.float64)
    for row in range(2):
        tokens = inputs["attention_mask"][row].bool()
        loss = double(
            inputs["input_ids"][row, tokens][None],
            position_ids=torch.nonzero(tokens).T,
            attention_mask=torch.ones(1, int(tokens.sum())),
            labels=inputs["labels"][row, tokens][None],
            num_items_in_batch=total,
        ).loss
        loss.backward()
        exact_loss += loss.detach()
    loss, eager = backward(model, inputs)
    mine = patched(model, attention)
    actual_loss, actual = backward(mine, inputs)
    assert actual_loss.dtype == loss.dtype == torch.float32
    error, own = (abs(x.double() - exact_loss) for x in (actual_loss, loss))
    assert error <= 2 * own + 2 * torch.finfo(dtype).eps * exact_loss
    assert_as_exact_as(actual, eager, gradients(double), dtype)

    # As a trainer counts over several batches, and with the loss alone.
    for options in ({"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(7)}):
        torch.testing.assert_close(
            mine(**inputs, **options).loss,
            model(**inputs, **options).loss,
            rtol=1e-5 if dtype == torch.float32 else 1e-2,
            atol=0,
        )


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_next_to_padding(attention: str, side: str) -> None:
    """On the left the last padding predicts the first token, as any collator has it.

    Its gradient is not compared: eager gives one to scores that are masked and had no effect.
    """
    model = stock()
    ids = tiny.random_ids(CONFIG, 2, SEQLEN)
    mask = torch.ones_like(ids)
    mask[1, slice(0, 9) if side == "left" else slice(-9, None)] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    loss, expected = backward(model, inputs)
    actual_loss, actual = backward(patched(model, attention), inputs)
    torch.testing.assert_close(actual_loss, loss, rtol=1e-5, atol=0)
    for name, gradient in expected.items() if side == "right" else ():
        error = (actual[name] - gradient).norm() / gradient.norm()
        assert error < 1e-3, (name, error)


def test_logits_with_labels() -> None:
    """There when they are asked for, in any way, with their gradient; never made otherwise."""
    model = stock()
    inputs = batch()
    mine = patched(model, "eager")
    calls = []
    mine.lm_head.register_forward_hook(lambda *_: calls.append(1))
    hf._become(mine.lm_head, torch.nn.Linear)
    with torch.no_grad():
        expected = mine(**inputs).logits  # a hook listens: made at once
    assert len(calls) == 1
    mine.lm_head._forward_hooks.clear()

    for read in (
        lambda out: out.logits,
        lambda out: out["logits"],
        lambda out: out[1],
        lambda out: out[:2][1],
        lambda out: out.get("logits"),
        lambda out: dict(out)["logits"],
        lambda out: next(v for k, v in out.items() if k == "logits"),
        lambda out: list(out.values())[1],
        lambda out: copy.copy(out).logits,
    ):
        out = mine(**inputs)
        assert isinstance(out["loss"], Tensor) and "logits" in out
        raw = object.__getattribute__(out, "logits")
        assert not isinstance(raw, Tensor)  # not computed until now
        logits = read(out)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert logits.requires_grad and out.logits is out.logits
    out.logits.sum().backward()
    assert mine.model.embed_tokens.weight.grad is not None

    quiet = patched(model, "eager", skip_logits=True)
    assert quiet(**inputs).logits is None
    assert quiet.eval()(**inputs).logits.shape == (2, SEQLEN, CONFIG.vocab_size)
    _, logits = patched(model, "eager")(**inputs, return_dict=False)[:2]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_loss_of_the_users_own_and_labels_shifted_before() -> None:
    model = stock()
    inputs = batch()
    mine = patched(model, "eager")
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(mine(**inputs, shift_labels=shifted).loss, mine(**inputs).loss)
    mine.loss_function = lambda logits, labels, vocab_size, **_: logits.mean() * 0 + 3
    assert mine(**inputs).loss == 3


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_gradient_checkpointing(attention: str) -> None:
    mine = patched(stock(), attention)
    inputs = batch()
    _, expected = backward(mine, inputs)
    mine.gradient_checkpointing_enable({"use_reentrant": False})
    _, actual = backward(mine, inputs)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_mixed_precision(attention: str) -> None:
    """Weights in float32, products in bfloat16 by autocast: near stock in the same region."""
    model = stock()
    inputs = batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss, eager = backward(model, inputs)
        actual_loss, actual = backward(patched(model, attention), inputs)
    torch.testing.assert_close(actual_loss, loss, rtol=2e-2, atol=0)
    exact = backward(model, inputs)[1]
    assert_as_exact_as(actual, eager, exact, torch.bfloat16)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("order", ["patch first", "adapters first"])
def test_peft(attention: str, order: str) -> None:
    """LoRA on every projection: the adapters' gradients are those of stock, and it learns."""
    peft = pytest.importorskip("peft")
    model = stock()
    settings = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(copy.deepcopy(model), settings).train()
    torch.manual_seed(0)
    if order == "patch first":
        mine = peft.get_peft_model(patched(model, attention), settings).train()
    else:
        mine = hf.patch(peft.get_peft_model(copy.deepcopy(model), settings)).train()
        mine.get_base_model().set_attn_implementation(attention)
    inputs = batch()
    loss, expected = backward(theirs, inputs)
    actual_loss, actual = backward(mine, inputs)
    torch.testing.assert_close(actual_loss, loss, rtol=1e-4, atol=0)
    assert actual.keys() == expected.keys()
    assert actual and all("lora" in name for name in actual)
    for name, gradient in expected.items():
        error = (actual[name] - gradient).norm() / gradient.norm()
        assert error < 1e-3, (name, error)
    optimizer = torch.optim.AdamW(mine.parameters(), lr=1e-2)
    optimizer.step()
    assert backward(mine, inputs)[0] < actual_loss
    hf.unpatch(mine)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_trl(attention: str, tmp_path: Path) -> None:
    """Steps of TRL's SFTTrainer: the loss of each is that of a stock model."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(shipped_model())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = [{"text": text} for text in ("ROMEO:\nO, she doth teach", "To be, or not", "Nay", "O")]
    losses = []
    for patch in (False, True):
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        if patch:
            hf.patch(model).set_attn_implementation(attention)
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(
                output_dir=str(tmp_path),
                max_steps=2,
                per_device_train_batch_size=2,
                learning_rate=1e-3,
                logging_steps=1,
                report_to=[],
                save_strategy="no",
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                disable_tqdm=True,
                max_length=32,
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_distillation_step(attention: str) -> None:
    """A patched student under `ops.linear_distillation`: the plain formula's loss and gradients."""
    teacher, student = stock(seed=1).eval(), stock(num_hidden_layers=2)
    ids = batch()["input_ids"]
    with torch.no_grad():
        target = teacher(ids).logits.softmax(-1)
    loss = -(target * student(ids).logits.log_softmax(-1)).sum(-1).mean()
    loss.backward()
    mine = patched(student, attention)
    mine.zero_grad()
    with torch.no_grad():
        teacher_hidden = hf.patch(teacher).model(ids).last_hidden_state
    actual = ops.linear_distillation(
        mine.model(ids, use_cache=False).last_hidden_state,
        mine.lm_head.weight,
        teacher_hidden,
        teacher.lm_head.weight,
        softcap=CONFIG.final_logit_softcapping,
        teacher_softcap=CONFIG.final_logit_softcapping,
    )
    actual.backward()
    torch.testing.assert_close(actual, loss, rtol=1e-4, atol=0)
    expected = gradients(student)
    for name, gradient in gradients(mine).items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 1e-3, (name, error)
