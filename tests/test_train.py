"""Training as a user runs it: results, resuming, being killed, several processes."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gemma2_ext import Gemma2
from gemma2_ext.models import shipped_model
from gemma2_ext.tokenizer import Tokenizer
from gemma2_ext.training import checkpoint, trainer
from gemma2_ext.training.trainer import TrainingConfig
from tiny import relative_error
from training_common import TEXT, metrics, run, student, train_arguments, weights


def assert_equal_runs(first: Path, second: Path) -> None:
    """The same weights and metrics, to the bit."""
    for (name, a), b in zip(weights(first).items(), weights(second).values(), strict=True):
        assert torch.equal(a, b), name
    assert metrics(first) == metrics(second)


def test_it_learns_a_tiny_text_by_heart(tmp_path: Path) -> None:
    tmp_path.joinpath("line.txt").write_text(TEXT[:200])
    result = run(
        tmp_path / "out",
        *("--data", tmp_path / "line.txt", "--eval-data", tmp_path / "line.txt"),
        *("--steps", 80, "--dtype", "float32", "--learning-rate", 2e-2),
    )
    lines = metrics(tmp_path / "out")
    assert lines[0]["loss"] > 7
    assert result["loss"] < 0.3
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 81))
    assert (tmp_path / "out" / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_computes_the_same_with_the_result(tmp_path: Path, dtype: str) -> None:
    transformers = pytest.importorskip("transformers")
    result = run(tmp_path / "out", "--steps", 6, "--held-out", 0.2, "--dtype", dtype)
    assert result["held_out_loss"] < 7 and result["held_out_bits_per_byte"] > 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    )
    assert theirs.dtype == getattr(torch, dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = torch.tensor([tokenizer(TEXT[:200])["input_ids"][:60]])
    assert ids[0].tolist() == Tokenizer.from_pretrained(tmp_path / "out").encode(TEXT[:200])[:60]
    with torch.no_grad():
        expected = theirs(ids).logits
    ours = Gemma2.from_pretrained(tmp_path / "out")(ids)
    assert relative_error(ours, expected) < {"float32": 1e-5, "bfloat16": 3e-2}[dtype]
    assert theirs.generation_config.eos_token_id == [1, 107]


def test_bfloat16_and_recomputed_activations_change_little_and_nothing(tmp_path: Path) -> None:
    exact = run(tmp_path / "exact", "--steps", 5, "--dtype", "float32")
    rounded = run(tmp_path / "rounded", "--steps", 5)
    assert abs(rounded["loss"] - exact["loss"]) < 0.02
    run(tmp_path / "again", "--steps", 5, "--dtype", "float32", "--activation-checkpointing")
    assert_equal_runs(tmp_path / "exact", tmp_path / "again")


def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path) -> None:
    options = ("--steps", 9, "--held-out", 0.1, "--evaluate-every", 2)
    run(tmp_path / "whole", *options, "--checkpoint-every", 100)
    run(tmp_path / "parts", *options, "--checkpoint-every", 2)
    folder = tmp_path / "parts" / trainer.CHECKPOINTS
    assert [p.name for p in checkpoint.checkpoints(folder)] == ["step-00000008", "step-00000009"]
    # As after a crash in step 9: that checkpoint does not exist, a part of it does.
    (folder / "step-00000009").rename(folder / ".saving-00000009")
    with open(tmp_path / "parts" / trainer.METRICS, "a") as file:
        file.write('{"step": 10, "lo')
    result = run(tmp_path / "parts", *options, "--resume")
    assert result["step"] == 9
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")
    assert not list(folder.glob(".*"))


def test_a_killed_run_loses_one_interval_at_most(tmp_path: Path) -> None:
    options = ("--steps", 25, "--checkpoint-every", 1, "--keep", 1)
    arguments = train_arguments(tmp_path / "killed", *options, "--threads", 1)
    process = subprocess.Popen(
        [sys.executable, "-m", "gemma2_ext", *arguments], stderr=subprocess.DEVNULL
    )
    folder = tmp_path / "killed" / trainer.CHECKPOINTS
    deadline = time.monotonic() + 120
    while process.poll() is None and not list(folder.glob("step-*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.random() * 0.3)  # wherever in a step or in a write
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    lines = (tmp_path / "killed" / trainer.METRICS).read_text().splitlines()
    *older, kept = checkpoint.checkpoints(folder)
    assert (
        len(older) <= 1
    )  # killed after the new one took its place, before the old one was removed
    assert len(lines) - 1 <= trainer.load_step(kept) <= len(lines)
    run(tmp_path / "killed", *options, "--resume")
    run(tmp_path / "whole", "--steps", 25)
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")


def test_freed_memory_is_not_faulted_in_anew() -> None:
    # In a process of its own, as the setting stays.
    script = """
import resource, sys, torch, gemma2_ext
assert gemma2_ext.keep_freed_memory()
for i in range(60):
    if i == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    sizes = [4 << 20] * 4 + [16 << 20]  # 16 MiB and, mapped by themselves, 64: 32768 pages
    tensors = [torch.ones(size) for size in sizes]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert int(result.stdout) < 1000


def test_another_run_is_not_resumed(tmp_path: Path) -> None:
    run(tmp_path / "out", "--steps", 2)
    error = run(tmp_path / "out", "--steps", 2)["error"]
    assert "holds a run of 2 steps; resume it, or name another folder" in error
    error = run(tmp_path / "out", "--steps", 3, "--resume")["error"]
    assert "belongs to another run: training.steps was 2, is now 3" in error
    (tmp_path / "text.txt").write_text(TEXT + "More.")
    error = run(tmp_path / "out", "--steps", 2, "--resume")["error"]
    assert "belongs to another run: data.tokens was" in error
    Gemma2(student()).save_pretrained(tmp_path / "model")
    error = run(tmp_path / "model", "--steps", 2)["error"]
    assert f"{tmp_path / 'model'}: holds a model; name another folder" in error


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    run(tmp_path / "out", "--steps", 2)
    (path,) = checkpoint.checkpoints(tmp_path / "out" / trainer.CHECKPOINTS)
    (data,) = path.glob("*.distcp")
    content, facts = data.read_bytes(), (path / ".metadata").read_bytes()
    data.write_bytes(content[: len(content) // 2])
    assert f"{path}: cannot be loaded" in run(tmp_path / "out", "--steps", 2, "--resume")["error"]
    data.write_bytes(content)
    # A pickle that would run code, in the place of one that names tensors.
    (path / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    error = run(tmp_path / "out", "--steps", 2, "--resume")["error"]
    assert "not a checkpoint's metadata: names os.system, which has no place" in error
    (path / ".metadata").write_bytes(facts)
    assert run(tmp_path / "out", "--steps", 2, "--resume")["out"]


def test_a_loss_that_is_not_finite_stops(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--steps", 9, "--checkpoint-every", 1, "--warm-up", 0, "--learning-rate", 1e38)
    error = run(out, *options, "--dtype", "float32")["error"]
    assert "training stopped at step 2: the loss is nan in batch 1 of epoch 0: tokens " in error
    assert f"{tmp_path / 'text.txt'}[" in error
    assert f"the last checkpoint is {out / trainer.CHECKPOINTS / 'step-00000001'}" in error
    assert not (out / "model.safetensors").exists()


def test_training_goes_on_from_a_folder_with_weights(tmp_path: Path) -> None:
    run(tmp_path / "first", "--steps", 20, "--dtype", "float32")
    last = metrics(tmp_path / "first")[-1]["loss"]
    run(tmp_path / "second", "--steps", 1, "--model", tmp_path / "first", "--dtype", "float32")
    assert metrics(tmp_path / "second")[0]["loss"] < last + 0.3


def test_the_best_weights_are_kept_where_asked_for(tmp_path: Path) -> None:
    options = ("--steps", 12, "--held-out", 0.2, "--evaluate-every", 3, "--learning-rate", 0.2)
    result = run(tmp_path / "out", *options, "--export", "best", "--dtype", "float32")
    found = [line["held_out_loss"] for line in metrics(tmp_path / "out") if "held_out_loss" in line]
    assert len(found) == 4 and result["best_held_out_loss"] == min(found)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def run_processes(folder: Path, *args: object) -> None:
    """The command in two processes, as torchrun starts them."""
    port = str(free_port())
    processes = []
    for rank in range(2):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "OMP_NUM_THREADS": 1}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "gemma2_ext", *train_arguments(folder, *args)],
                env={**os.environ, **{k: str(v) for k, v in environment.items()}},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_does(tmp_path: Path, strategy: str) -> None:
    options = ("--steps", 6, "--step-tokens", 256, "--held-out", 0.2, "--dtype", "float32")
    run(tmp_path / "one", *options, "--checkpoint-every", 4)
    run_processes(tmp_path / "two", *options, "--checkpoint-every", 4, "--strategy", strategy)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two) == 7
    for a, b in zip(one, two, strict=True):
        for name, value in a.items():
            assert b[name] == pytest.approx(value, rel=1e-5), (a["step"], name)
    for name, value in weights(tmp_path / "one").items():
        assert relative_error(weights(tmp_path / "two")[name], value) < 1e-3, name
    # And one process goes on from what two have saved.
    (tmp_path / "two" / trainer.CHECKPOINTS / "step-00000006").rename(tmp_path / "unused")
    result = run(tmp_path / "two", *options, "--resume")
    assert result["held_out_loss"] == pytest.approx(one[-1]["held_out_loss"], rel=1e-5)


def test_tensorboard_is_an_extra(tmp_path: Path) -> None:
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        error = run(tmp_path / "out", "--steps", 1, "--tensorboard")["error"]
        assert "event files need tensorboard: pip install 'gemma2_ext[tensorboard]'" in error
    else:
        run(tmp_path / "out", "--steps", 1, "--tensorboard")
        assert list((tmp_path / "out" / "tensorboard").glob("events.*"))


def test_matplotlib_is_an_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gemma2_ext.training.plot import plot_curves

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert "plotting needs matplotlib: pip install 'gemma2_ext[plot]'" in capsys.readouterr().err


def test_learning_rate_rises_then_follows_a_cosine() -> None:
    config = TrainingConfig(110, 8, 8, 8, learning_rate=2.0, warm_up=10, final_learning_rate=0.1)
    rates = [config.learning_rate_at(step) for step in range(110)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert rates[60] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] >= 0.2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--learning-rate", 0), "learning_rate must be positive and finite, got 0.0"),
        (("--learning-rate", "nan"), "learning_rate must be positive and finite, got nan"),
        (("--beta2", 1), "beta2 must be between 0 and 1, got 1.0"),
        (("--clip", -1), "clip must be positive and finite, got -1.0"),
        (("--step-tokens", 65), "--step-tokens must be a multiple of --batch-tokens 64, got 65"),
        (("--sequence-length", 65), "at most max_position_embeddings = 64, got 65"),
        (("--batch-tokens", 31), "sequence_length must be between 1 and batch_tokens = 31, got 32"),
        (("--held-out", 1), "--held-out must be between 0 and 1, got 1.0"),
        (("--step-tokens", 6400), "do not fill a step; lower --step-tokens, or say --steps"),
        (("--model", "nowhere"), "nowhere: no such folder"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, args: tuple[object, ...], message: str) -> None:
    assert message in run(tmp_path / "out", *args)["error"]
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_missing_gpu_is_named() -> None:
    with (
        pytest.raises((NotImplementedError, RuntimeError), match="device cuda"),
        trainer.processes("cuda"),
    ):
        pass


def test_a_tokenizer_larger_than_the_student_is_refused(tmp_path: Path) -> None:
    student(vocab_size=1000).save_pretrained(tmp_path / "small")
    error = run(tmp_path / "out", "--model", tmp_path / "small" / "config.json")["error"]
    assert "the tokenizer's 2048 tokens exceed the student's vocab_size = 1000" in error


def test_the_default_tokenizer_is_the_one_that_ships(tmp_path: Path) -> None:
    run(tmp_path / "out", "--steps", 1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (shipped_model() / name).read_bytes()
