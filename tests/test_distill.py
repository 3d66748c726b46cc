"""Distillation: the loss against the reference, the stored teacher against the one at hand."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gemma2_ext import Gemma2, cli, ops, reference
from gemma2_ext.models import shipped_model
from gemma2_ext.tokenizer import Tokenizer
from gemma2_ext.training import data
from gemma2_ext.training.module import new_weights
from gemma2_ext.training.teacher import _words as teacher_words
from tiny import random_weights
from training_common import TEXT, metrics, run, student, train_arguments

TOKENIZER = Tokenizer.from_pretrained(shipped_model())


def teacher_folder(folder: Path, **changes: Any) -> Path:
    """A random model that is sure of what it says, with its own width and soft-cap."""
    config = student(hidden_size=40, final_logit_softcapping=20.0, **changes)
    Gemma2(config, random_weights(config, 3)).save_pretrained(folder)
    return folder


def first_batch(folder: Path) -> data.Batch:
    """The first one of a run in folder with the default seed and fixed cuts."""
    sources = data.load_documents([folder.parent / "text.txt"], TOKENIZER)
    return data.Batches(sources, 2, 2048, 32, 64, seed=0, shift=False).get(0, 0)


def logits_of(model: Gemma2, batch: data.Batch) -> list[Tensor]:
    """Logits of each sequence, by the reference."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    begins = batch.cu_seqlens.tolist()
    return [
        reference.forward(model.config, parameters, batch.input_ids[None, begin:end])[0]
        for begin, end in pairwise(begins)
    ]


def distance(teacher: Gemma2, pupil: Gemma2, batch: data.Batch, temperature: float) -> float:
    """-sum of P_T log P_S over the student's words, the mean over the batch's tokens."""
    words = pupil.config.vocab_size
    theirs = torch.cat(logits_of(teacher, batch))[:, :words] / temperature
    ours = torch.cat(logits_of(pupil, batch)) / temperature
    return -(theirs.softmax(-1) * ours.log_softmax(-1)).sum(-1).mean().item()


@pytest.mark.parametrize(("temperature", "words"), [(1.0, 2048), (2.0, 2112)])
def test_the_loss_is_the_reference_s(
    tmp_path: Path,
    temperature: float,
    words: int,
) -> None:
    folder = teacher_folder(tmp_path / "teacher", vocab_size=words)
    options = ("--steps", 1, "--dtype", "float32", "--fixed-cuts", "--temperature", temperature)
    result = run(tmp_path / "out", "--teacher", folder, *options, command="distill")
    pupil = Gemma2(student(), new_weights(student(), 0))
    teacher = Gemma2.from_pretrained(folder)
    expected = distance(teacher, pupil, first_batch(tmp_path / "out"), temperature)
    assert result["loss"] == pytest.approx(expected, rel=1e-5)

    options = ("--teacher", folder, *options, "--hard-labels", 0.25)
    result = run(tmp_path / "blend", *options, command="distill")
    batch = first_batch(tmp_path / "blend")
    hard = F.cross_entropy(torch.cat(logits_of(pupil, batch)), batch.targets).item()
    assert result["loss"] == pytest.approx(0.75 * expected + 0.25 * hard, rel=1e-5)


def test_a_student_learns_what_its_teacher_knows(tmp_path: Path) -> None:
    """Of a text that it never sees as a target: the teacher writes other words behind it."""
    folder = teacher_folder(tmp_path / "teacher")
    options = ("--steps", 30, "--dtype", "float32", "--learning-rate", 2e-2)
    run(tmp_path / "out", "--teacher", folder, *options, command="distill")
    losses = [line["loss"] for line in metrics(tmp_path / "out")]
    assert losses[-1] < losses[0] - 1.0


def test_a_packed_teacher_teaches_and_is_no_student(tmp_path: Path) -> None:
    folder, packed = teacher_folder(tmp_path / "teacher"), tmp_path / "packed"
    assert cli.main(["quantize", str(folder), str(packed), "--to", "int8"]) == 0
    options = ("--steps", 1, "--dtype", "float32")
    exact = run(tmp_path / "exact", "--teacher", folder, *options, command="distill")
    rounded = run(tmp_path / "rounded", "--teacher", packed, *options, command="distill")
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=1e-2)
    teach(tmp_path, packed, "--top-k", 4, "--sequence-length", 32)
    error = run(tmp_path / "out", "--model", packed, "--steps", 1)["error"]
    assert "packed weights cannot be trained" in error


def teach(tmp_path: Path, folder: Path, *args: object) -> Path:
    out = tmp_path / "taught.tokens"
    text = tmp_path / "text.txt"
    if not text.exists():
        text.write_text(TEXT)
    values = ["teach", "--teacher", folder, "--data", text, "--out", out, *args]
    assert cli.main([str(v) for v in values]) == 0
    return out


def test_what_is_stored_is_what_the_teacher_says(tmp_path: Path) -> None:
    folder = teacher_folder(tmp_path / "teacher")
    options = ("--sequence-length", 32, "--batch-tokens", 70)
    path = teach(tmp_path, folder, "--top-k", 8, "--tail", 0, *options)
    shard = data.open_shard(path, TOKENIZER)
    assert shard.top_ids is not None and shard.top_log_probs is not None
    facts = {"name": str(folder), "top_k": 8, "tail": 0, "sequence_length": 32}
    assert shard.teacher == facts
    teacher = Gemma2.from_pretrained(folder)
    batch = data.Batches([shard], 2, 2048, 32, 64, seed=3, shift=False).get(0, 1)
    expected = torch.cat(logits_of(teacher, batch)).log_softmax(-1).topk(8)
    assert batch.top_ids is not None and batch.top_log_probs is not None
    assert (batch.top_ids == expected.indices).float().mean() > 0.99
    torch.testing.assert_close(batch.top_log_probs, expected.values, rtol=1e-3, atol=1e-3)
    assert np.array_equal(shard.tokens[batch.rows], batch.targets)


def test_words_drawn_from_the_tail(tmp_path: Path) -> None:
    folder = teacher_folder(tmp_path / "teacher")
    options = ("--top-k", 40, "--sequence-length", 32)
    first = data.open_shard(teach(tmp_path, folder, *options), TOKENIZER)
    assert first.teacher["tail"] == 10
    assert first.top_ids is not None and first.top_log_probs is not None
    ids, log_probs = first.top_ids.copy(), first.top_log_probs.astype(np.float64)
    assert np.allclose(np.exp(log_probs).sum(-1), 1, atol=2e-3)
    assert (log_probs[:, 30:] == log_probs[:, 30:31]).all()
    for row in ids:
        assert not set(row[:30]) & set(row[30:])
    again = data.open_shard(teach(tmp_path, folder, *options), TOKENIZER)
    assert np.array_equal(again.top_ids, ids)
    other = data.open_shard(teach(tmp_path, folder, *options, "--seed", 1), TOKENIZER)
    assert np.array_equal(other.top_ids[:, :30], ids[:, :30])
    assert not np.array_equal(other.top_ids, ids)


def test_the_mean_over_the_draws_is_the_whole_distribution() -> None:
    # 4000 draws of the same place: loss and gradient within 5 standard errors of these draws.
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50) * 2
    hidden = torch.randn(1, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 8, dtype=torch.float64)
    ids, log_probs = teacher_words(logits.expand(4000, 50), 6, 3, generator)
    whole = -(logits.double().softmax(-1) * (hidden @ weight.T).log_softmax(-1)).sum()
    (expected,) = torch.autograd.grad(whole, hidden)
    rows = hidden.detach().expand(4000, 8).clone().requires_grad_()
    losses = ops.linear_distillation_topk(rows, weight, ids, log_probs.double(), reduction="none")
    error = losses.std() / 4000**0.5
    assert abs(losses.mean() - whole) < 5 * error
    assert error < 0.02 * whole
    (grads,) = torch.autograd.grad(losses.sum(), rows)
    grad = grads.mean(0, keepdim=True)
    assert ((grad - expected).abs() < 5 * grads.std(0) / 4000**0.5).all()
    # Without draws the six best stand for all, and the gradient is another.
    few = ops.linear_distillation_topk(hidden, weight, ids[:1, :6], log_probs[:1, :6].double())
    (biased,) = torch.autograd.grad(few, hidden)
    assert (biased - expected).norm() > 5 * (grad - expected).norm()


def test_a_teacher_without_a_tail() -> None:
    logits = torch.full((2, 12), -1e4)
    logits[0, 3], logits[1] = 5.0, 0.0
    ids, log_probs = teacher_words(logits, 2, 4, torch.Generator().manual_seed(0))
    assert ids.shape == log_probs.shape == (2, 6)
    assert (log_probs[0, 2:] == -float("inf")).all()
    torch.testing.assert_close(log_probs[1].exp().sum(), torch.tensor(1.0))


def test_a_stored_teacher_teaches_as_one_at_hand(tmp_path: Path) -> None:
    folder = teacher_folder(tmp_path / "teacher")
    taught = teach(tmp_path, folder, "--top-k", 2048, "--sequence-length", 32)
    options = ("--steps", 2, "--dtype", "float32", "--hard-labels", 0.1, "--fixed-cuts")
    run(tmp_path / "stored", "--data", taught, *options, command="distill")
    run(tmp_path / "at_hand", "--teacher", folder, *options, command="distill")
    for stored, at_hand in zip(
        metrics(tmp_path / "stored"), metrics(tmp_path / "at_hand"), strict=True
    ):
        assert stored["loss"] == pytest.approx(at_hand["loss"], rel=1e-3)


def test_wrong_teachers_are_named(tmp_path: Path) -> None:
    def refused(match: str, *args: object) -> None:
        assert match in run(tmp_path / "out", *args, command="distill")["error"]

    train_arguments(tmp_path / "out")  # writes text and student
    refused("text.txt: holds no teacher's log-probabilities; name a --teacher")
    folder = teacher_folder(tmp_path / "teacher")
    taught = teach(tmp_path, folder, "--top-k", 4, "--sequence-length", 16)
    refused("was taught in sequences of 16 tokens, --sequence-length is 32", "--data", taught)
    taught = teach(tmp_path, folder, "--top-k", 4, "--sequence-length", 32)
    refused("drawn at temperature 1, --temp", "--data", taught, "--temperature", 2)
    refused("--hard-labels must be at least 0 and below 1, got 1.0", "--hard-labels", 1)
    refused("--temperature must be positive and finite, got 0.0", "--temperature", 0)
    refused("nowhere: no such folder", "--teacher", tmp_path / "nowhere")


def test_teach_refuses_what_it_cannot_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = teacher_folder(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text(TEXT)
    command = ["teach", "--teacher", str(folder), "--data", str(tmp_path / "text.txt")]
    command += ["--out", str(tmp_path / "taught.tokens")]
    assert cli.main([*command, "--top-k", "2049"]) == 2
    assert "top_k must be between 1 and vocab_size = 2048, got 2049" in capsys.readouterr().err
    assert cli.main([*command, "--tail", "64"]) == 2
    assert "tail must be from 0 to top_k - 1 = 63, got 64" in capsys.readouterr().err
    assert cli.main([*command, "--sequence-length", "65"]) == 2
    assert "at most max_position_embeddings = 64, got 65" in capsys.readouterr().err
    assert not (tmp_path / "taught.tokens").exists()


def test_tokenize_writes_a_shard_that_training_takes(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = "".join(json.dumps({"text": line}) + "\n" for line in TEXT.splitlines())
    (tmp_path / "rows.jsonl").write_text(rows)
    out = tmp_path / "rows.tokens"
    assert cli.main(["tokenize", str(tmp_path / "rows.jsonl"), "--out", str(out)]) == 0
    shard = data.open_shard(out, TOKENIZER)
    assert f"{len(shard.ends)} documents, {len(shard.tokens):,} tokens" in capsys.readouterr().out
    options = ("--steps", 2, "--dtype", "float32")
    run(tmp_path / "shard", "--data", out, *options)
    run(tmp_path / "lines", "--data", tmp_path / "rows.jsonl", *options)
    assert metrics(tmp_path / "shard") == metrics(tmp_path / "lines")
