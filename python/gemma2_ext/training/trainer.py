"""The loop: AdamW on float32 weights, warm-up and cosine, checkpoints, metrics.

A step's micro-batches are shared out over the processes, and each one's loss is weighted by its
share of the step's tokens: the gradient is that of the mean over all tokens, whatever the number of
processes. DDP averages gradients; FSDP (fully_shard) also keeps weights, gradients and moments in
shards. Nothing is drawn at random after the weights are made, so a run continued from a checkpoint
in the same layout equals one that never stopped, to the bit.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ..config import shown
from ..device import check_device
from ..model import Gemma2
from ..quantize import QuantizedWeight
from . import checkpoint
from .data import Batches
from .export import export_model
from .module import Objective, TrainingModule
from .plot import plot_curves

METRICS, CURVES, CHECKPOINTS = "metrics.jsonl", "curves.png", "checkpoints"
STRATEGIES = ("ddp", "fsdp")
# Between lines of progress where there is no terminal.
SECONDS_BETWEEN_LINES = 10.0


class NonFiniteError(RuntimeError):
    """A loss or gradient that is NaN or infinite; names the step and its batches."""


@dataclass(frozen=True)
class TrainingConfig:
    """What decides a run's result, beside model and data.

    Args:
        steps: updates of the weights.
        step_tokens: the most tokens of an update, a multiple of batch_tokens.
        batch_tokens: the most tokens that a process takes through the model at once.
        sequence_length: the most tokens of a sequence.
        learning_rate: its peak.
        warm_up: steps over which it rises.
        final_learning_rate: what the cosine ends at, as a share of the peak.
        weight_decay: of matrices; norms have none.
        beta1, beta2, epsilon: AdamW's.
        clip: the largest norm of a gradient; longer ones are scaled down.
        dtype: that the model computes in, "float32" or "bfloat16"; weights are float32.
        seed: of the order of the data, and of weights that are drawn.

    Raises:
        ValueError: a value out of range, or values that do not fit together.
    """

    steps: int
    step_tokens: int
    batch_tokens: int
    sequence_length: int
    learning_rate: float = 1e-3
    warm_up: int = 0
    final_learning_rate: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip: float = 1.0
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "step_tokens", "batch_tokens", "sequence_length"):
            _check(name, getattr(self, name) >= 1, "at least 1", getattr(self, name))
        _check("warm_up", self.warm_up >= 0, "at least 0", self.warm_up)
        for name in ("learning_rate", "epsilon", "clip"):
            value = getattr(self, name)
            _check(name, 0 < value < math.inf, "positive and finite", value)
        for name in ("final_learning_rate", "beta1", "beta2"):
            value = getattr(self, name)
            upper = value <= 1 if name == "final_learning_rate" else value < 1
            _check(name, value >= 0 and upper, "between 0 and 1", value)
        _check("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0", self.weight_decay)
        _check("dtype", self.dtype in ("float32", "bfloat16"), "float32 or bfloat16", self.dtype)
        if self.step_tokens % self.batch_tokens:
            raise ValueError(
                f"training: step_tokens must be a multiple of batch_tokens = {self.batch_tokens}, "
                f"got {self.step_tokens}"
            )

    @property
    def micro_batches(self) -> int:
        """Batches of a step, over all processes."""
        return self.step_tokens // self.batch_tokens

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0: warm-up, then a cosine."""
        if step < self.warm_up:
            return self.learning_rate * (step + 1) / self.warm_up
        progress = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        floor = self.final_learning_rate
        cosine = 0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0))
        return self.learning_rate * (floor + (1 - floor) * cosine)


def _check(name: str, good: bool, expected: str, value: object) -> None:
    if not good:
        raise ValueError(f"training: {name} must be {expected}, got {shown(value)}")


@dataclass(frozen=True)
class RunOptions:
    """How a run goes, none of which changes its result.

    Args:
        out: the folder for the model, checkpoints, metrics and curves.
        resume: whether to continue from the newest checkpoint in it, or start where there is none.
        checkpoint_every: steps between checkpoints.
        keep: checkpoints kept.
        evaluate_every: steps between evaluations; the last step is always evaluated.
        strategy: "ddp" or "fsdp", where there is more than one process.
        activation_checkpointing: recompute activations in place of storing them.
        device: "cpu", or "cuda" for the device of this process.
        tensorboard: whether to write event files too.
        export_best: whether the folder gets the weights of the best evaluation, not the last.
        export_dtype: of the weights in the folder.
    """

    out: Path
    resume: bool = False
    checkpoint_every: int = 100
    keep: int = 2
    evaluate_every: int = 100
    strategy: str = "ddp"
    activation_checkpointing: bool = False
    device: str = "cpu"
    tensorboard: bool = False
    export_best: bool = False
    export_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "keep", "evaluate_every"):
            _check(name, getattr(self, name) >= 1, "at least 1", getattr(self, name))
        strategies = " or ".join(STRATEGIES)
        _check("strategy", self.strategy in STRATEGIES, strategies, self.strategy)


@contextmanager
def processes(device: str) -> Iterator[torch.device]:
    """Joins the processes that torchrun started, if it did; yields this one's device."""
    local = torch.device(device)
    if local.type == "cuda":
        local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", local.index or 0)))
        torch.cuda.set_device(check_device(local))
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield local
        return
    dist.init_process_group("nccl" if local.type == "cuda" else "gloo")
    try:
        yield local
    finally:
        # gloo's threads end with what holds the group, cycles included. One that lets go of its
        # last work while the interpreter ends aborts the process.
        gc.collect()
        dist.destroy_process_group()


class Trainer:
    """Trains a model.

    Args:
        model: float32; its weights are changed in place.
        config: what is done.
        options: how.
        batches: what to learn from.
        objective: what is minimised.
        held_out: what to evaluate on; None: nothing.
        held_out_bytes: UTF-8 bytes of its text, for bits per byte.
        tokenizer_folder: whose tokenizer files go into the result; None: none.
        facts: about teacher and data, which a resumed run must share.

    Raises:
        ValueError: the processes do not divide a step, or out holds a run that this one does not
            continue.
        TypeError: the model is not float32, or packed.
    """

    def __init__(
        self,
        model: Gemma2,
        config: TrainingConfig,
        options: RunOptions,
        batches: Batches,
        *,
        objective: Objective | None = None,
        held_out: Batches | None = None,
        held_out_bytes: int | None = None,
        tokenizer_folder: Path | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        if any(isinstance(module, QuantizedWeight) for module in model.modules()):
            raise TypeError("training: packed weights cannot be trained; load those packed from")
        if model.dtype != torch.float32:
            raise TypeError(f"training: the model must be float32, got {model.dtype}")
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        if config.micro_batches % self.world:
            raise ValueError(
                f"training: a step of {config.micro_batches} batches (step_tokens = "
                f"{config.step_tokens} by batch_tokens = {config.batch_tokens}) cannot be shared "
                f"by {self.world} processes"
            )
        self.model, self.config, self.options = model, config, options
        self.batches, self.held_out = batches, held_out
        self.held_out_bytes = held_out_bytes
        self.tokenizer_folder = tokenizer_folder
        self.device = torch.device(options.device)
        self.step, self.position, self.seconds, self.tokens = 0, (0, 0), 0.0, 0
        self.best: float | None = None
        self.identity = {
            "model": model.config.to_dict(),
            "training": asdict(config),
            "data": digest(batches),
            **(facts or {}),
        }
        model.requires_grad_(True)
        dtype = getattr(torch, config.dtype)
        module = TrainingModule(
            model, dtype, objective or Objective(), options.activation_checkpointing
        )
        self.module = self._wrapped(module, dtype)
        self.parameters = dict(model.named_parameters())
        self.optimizer = self._optimizer()

    def _wrapped(self, module: TrainingModule, dtype: torch.dtype) -> torch.nn.Module:
        module.to(self.device)
        if self.world == 1:
            return module
        if self.options.strategy == "ddp":
            ids = [self.device] if self.device.type == "cuda" else None
            return DistributedDataParallel(module, device_ids=ids)
        mesh = dist.init_device_mesh(self.device.type, (self.world,))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for block in module.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return cast("torch.nn.Module", fully_shard(module, mesh=mesh, mp_policy=policy))

    def _optimizer(self) -> torch.optim.AdamW:
        config = self.config
        matrices = [p for p in self.parameters.values() if p.dim() == 2]
        norms = [p for p in self.parameters.values() if p.dim() == 1]
        groups: list[dict[str, Any]] = [
            {"params": matrices},
            {"params": norms, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def run(self) -> dict[str, Any]:
        """Trains to the end; returns the last metrics, held-out ones among them.

        Raises:
            NonFiniteError: a loss or a gradient was NaN or infinite; the last checkpoint stands.
            ValueError: out holds another run, or a damaged checkpoint.
            OSError: the disk is full, or out cannot be written.
        """
        out = self.options.out
        self._start()
        result = last_metrics(out / METRICS) if checkpoint.is_first() else {}
        with _Log(out, self.step, self.config.steps, self.options.tensorboard) as log:
            began = time.perf_counter() - self.seconds
            while self.step < self.config.steps:
                metrics = self._update()
                self.seconds = time.perf_counter() - began
                metrics["seconds"] = self.seconds
                log.write(metrics)
                result.update(metrics)
                last = self.step == self.config.steps
                if self.held_out and (last or self.step % self.options.evaluate_every == 0):
                    evaluation = {"step": self.step, **self.evaluate()}
                    log.write(evaluation)
                    result.update(evaluation)
                    self._keep_best(evaluation["held_out_loss"])
                    self.seconds = time.perf_counter() - began
                if last or self.step % self.options.checkpoint_every == 0:
                    self._save()
        if not (self.options.export_best and self.held_out):
            self.export()
        if checkpoint.is_first():
            plot_curves(out / METRICS, out / CURVES)
        checkpoint.barrier()
        if self.best is not None:
            result["best_held_out_loss"] = self.best
        return result

    def evaluate(self) -> dict[str, float]:
        """Cross-entropy on what was held out, of every token once, and what follows from it."""
        assert self.held_out is not None
        count = self.held_out.count(0)
        nll = torch.zeros((), dtype=torch.float64, device=self.device)
        self.module.eval()
        with torch.no_grad():
            # Every process takes part in every forward, which FSDP needs: past the end with the
            # first batch, for nothing.
            for first in range(0, count, self.world):
                index = first + self.rank
                batch = self.held_out.get(0, index if index < count else 0).to(self.device)
                loss = self.module(batch, evaluate=True)
                if index < count:
                    nll += loss.double() * len(batch.targets)
        self.module.train()
        if self.world > 1:
            dist.all_reduce(nll)
        mean = nll.item() / self.held_out.num_tokens
        result = {"held_out_loss": mean, "held_out_perplexity": math.exp(min(mean, 700.0))}
        if self.held_out_bytes:
            result["held_out_bits_per_byte"] = nll.item() / math.log(2) / self.held_out_bytes
        return result

    def export(self) -> None:
        """Writes the model to out as a Hugging Face folder. Every process calls it."""
        weights = {}
        for name, parameter in self.parameters.items():
            tensor = parameter.detach()
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()
            if checkpoint.is_first():
                weights[name] = tensor.to(device="cpu", dtype=self.options.export_dtype)
        if checkpoint.is_first():
            export_model(self.options.out, weights, self.model.config, self.tokenizer_folder)
        checkpoint.barrier()

    # Steps

    def _update(self) -> dict[str, Any]:
        """One step; returns its metrics. The weights stay as they are where it raises."""
        config = self.config
        positions = self.batches.following(self.position, config.micro_batches)
        total = sum(self.batches.size(*p) for p in positions)
        rate = config.learning_rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        began = time.perf_counter()
        own = positions[self.rank :: self.world]
        mean = torch.zeros((), dtype=torch.float64, device=self.device)
        wrong: list[str] = []
        for position in own:
            batch = self.batches.get(*position).to(self.device)
            share = len(batch.targets) / total
            with self._synchronised(position == own[-1]):
                loss = self.module(batch)
                (loss * (share * self.world)).backward()
            mean += loss.detach().double() * share
            if not math.isfinite(loss.item()):
                wrong.append(f"the loss is {loss.item()} in {batch.name}")
        if self.world > 1:
            dist.all_reduce(mean)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.clip)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        finite = math.isfinite(mean.item()) and math.isfinite(norm.item())
        if not finite:
            self._stop(wrong, norm.item(), positions)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        epoch, index = positions[-1]
        self.step, self.position, self.tokens = (
            self.step + 1,
            (epoch, index + 1),
            self.tokens + total,
        )
        return {
            "step": self.step,
            "epoch": epoch,
            "tokens": self.tokens,
            "loss": mean.item(),
            "learning_rate": rate,
            "gradient_norm": norm.item(),
            "tokens_per_second": total / (time.perf_counter() - began),
        }

    def _synchronised(self, last: bool) -> Any:
        """Gradients cross the processes once a step under DDP; shards are summed each time."""
        if isinstance(self.module, DistributedDataParallel) and not last:
            return self.module.no_sync()
        return nullcontext()

    def _stop(
        self, wrong: Sequence[str], norm: float, positions: Sequence[tuple[int, int]]
    ) -> NoReturn:
        """Raises NonFiniteError, in every process with what all have found."""
        found = [list(wrong)]
        if self.world > 1:
            found = [[] for _ in range(self.world)]
            dist.all_gather_object(found, list(wrong))
        reasons = [reason for reasons in found for reason in reasons]
        if not reasons:
            names = "; ".join(self.batches.get(*position).name for position in positions)
            reasons = [f"the gradient's norm is {norm}, of {names}"]
        self.optimizer.zero_grad(set_to_none=True)
        kept = checkpoint.checkpoints(self.options.out / CHECKPOINTS)
        raise NonFiniteError(
            f"training stopped at step {self.step + 1}: {'; '.join(reasons)}; "
            + (f"the last checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet")
        )

    # Checkpoints

    def _start(self) -> None:
        """Makes the folder, or finds the newest checkpoint in it and goes on from there."""
        folder = self.options.out / CHECKPOINTS
        found = checkpoint.checkpoints(folder)
        if found and not self.options.resume:
            raise ValueError(
                f"{self.options.out}: holds a run of {load_step(found[-1])} steps; resume it, or "
                "name another folder"
            )
        if (
            any(self.options.out.glob("*.safetensors"))
            and not (self.options.out / METRICS).exists()
        ):
            raise ValueError(f"{self.options.out}: holds a model; name another folder")
        checkpoint.barrier()
        if checkpoint.is_first():
            self.options.out.mkdir(parents=True, exist_ok=True)
            checkpoint.clean(folder)
        checkpoint.barrier()
        if found:
            self._resume(found[-1])
        if checkpoint.is_first():
            keep_metrics(self.options.out / METRICS, self.step)

    def _resume(self, path: Path) -> None:
        state = checkpoint.load_state(path)
        difference = first_difference(state.get("identity"), json.loads(json.dumps(self.identity)))
        if difference:
            raise ValueError(f"{path}: belongs to another run: {difference}")
        checkpoint.load(path, checkpoint.flat_state(self.parameters, self.optimizer))
        self.step, self.tokens = state["step"], state["tokens"]
        self.position = (state["epoch"], state["index"])
        self.seconds, self.best = state["seconds"], state["best"]
        checkpoint.set_optimizer_step(self.parameters, self.optimizer, self.step)

    def _save(self) -> None:
        checkpoint.save(
            self.options.out / CHECKPOINTS,
            self.step,
            checkpoint.flat_state(self.parameters, self.optimizer),
            {
                "step": self.step,
                "tokens": self.tokens,
                "epoch": self.position[0],
                "index": self.position[1],
                "seconds": self.seconds,
                "best": self.best,
                "processes": self.world,
                "identity": self.identity,
            },
            self.options.keep,
        )

    def _keep_best(self, loss: float) -> None:
        if self.best is None or loss < self.best:
            self.best = loss
            if self.options.export_best:
                self.export()


def load_step(path: Path) -> int:
    """The step of a checkpoint."""
    return int(checkpoint.load_state(path)["step"])


def digest(batches: Batches) -> dict[str, Any]:
    """What tells data sets apart: the number of tokens, and a hash of each source's ends."""
    sha = hashlib.sha256()
    for source in batches.sources:
        for part in (source.tokens[: 1 << 20], source.tokens[-(1 << 20) :]):
            sha.update(np.ascontiguousarray(part).astype("<u4").tobytes())
        sha.update(source.ends.astype("<i8").tobytes())
    return {"tokens": batches.num_tokens, "sha256": sha.hexdigest(), "shift": batches.shift}


def first_difference(old: Any, new: Any, name: str = "") -> str | None:
    """Where two JSON values differ, for a message; None where they do not."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(k for k in old if k not in new)]:
            inner = f"{name}.{key}" if name else str(key)
            found = first_difference(old.get(key), new.get(key), inner)
            if found:
                return found
        return None
    return None if old == new else f"{name} was {shown(old)}, is now {shown(new)}"


def keep_metrics(path: Path, step: int) -> None:
    """Drops the lines of steps that a resumed run does again, and a half-written one."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


def last_metrics(path: Path) -> dict[str, Any]:
    """What the lines of the last step say; nothing where there is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    return {name: value for row in last for name, value in row.items()}


class _Log:
    """Metrics to a file of JSON lines, to a line on stderr, and to TensorBoard where asked for.

    Only the first process writes.
    """

    def __init__(self, out: Path, step: int, steps: int, tensorboard: bool) -> None:
        self.active = checkpoint.is_first()
        self.steps, self.shown = steps, -math.inf
        self.held_out = ""
        self.events: Any = None
        if not self.active:
            return
        if tensorboard:
            self.events = _summary_writer(out / "tensorboard", step)
        self.file = open(out / METRICS, "a", encoding="utf-8")  # noqa: SIM115
        self.terminal = sys.stderr is not None and sys.stderr.isatty()
        self.bar = tqdm(
            total=steps, initial=step, desc="training", unit="step", disable=not self.terminal
        )

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *error: object) -> None:
        if self.active:
            self.file.close()
            self.bar.close()
            if self.events is not None:
                self.events.close()

    def write(self, metrics: dict[str, Any]) -> None:
        """One line of metrics; JSON has no NaN, so a value that is none is left out."""
        if not self.active:
            return
        self.file.write(json.dumps(metrics) + "\n")
        self.file.flush()
        if self.events is not None:
            for name, value in metrics.items():
                if name != "step":
                    self.events.add_scalar(name, value, metrics["step"])
        if "held_out_loss" in metrics:
            self.held_out = f"  held out {metrics['held_out_loss']:.4f}"
        else:
            self._show(metrics)

    def _show(self, metrics: dict[str, Any]) -> None:
        text = (
            f"loss {metrics['loss']:.4f}  |gradient| {metrics['gradient_norm']:.2f}  "
            f"{metrics['tokens_per_second']:.0f} token/s{self.held_out}"
        )
        if self.terminal:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(metrics["step"] - self.bar.n)
            return
        now, last = time.perf_counter(), metrics["step"] == self.steps
        if sys.stderr is not None and (last or now - self.shown > SECONDS_BETWEEN_LINES):
            self.shown = now
            print(f"step {metrics['step']}/{self.steps}  {text}", file=sys.stderr, flush=True)


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "event files need tensorboard: pip install 'gemma2_ext[tensorboard]'"
        ) from error
    # A resumed run's earlier events of the steps that it does again are hidden.
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
