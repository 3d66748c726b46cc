"""The commands `gemma2-ext train`, `distill`, `teach` and `tokenize`.

Arguments are declared without importing what trains; the functions import it when they run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import keep_freed_memory
from ..config import Gemma2Config, read_json
from ..model import Gemma2
from ..models import shipped_model
from ..tokenizer import Tokenizer

if TYPE_CHECKING:
    from .data import Batches, Documents
    from .module import Objective
    from .trainer import RunOptions, Trainer, TrainingConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TEXT_HELP = "UTF-8 text, JSON Lines (*.jsonl), or shards of `tokenize`"


def add_commands(
    commands: Any,
    parser: Callable[..., argparse.ArgumentParser],
    machine: argparse.ArgumentParser,
    whole_number: Any,
) -> None:
    """Adds the commands to a parser's subparsers.

    Args:
        commands: what `add_subparsers` gave.
        parser: the class of parsers.
        machine: the parser of what all commands take.
        whole_number: the command line's type for integers.
    """
    text = parser(add_help=False)
    group = text.add_argument_group("text")
    group.add_argument(
        "--text-field", default="text", metavar="NAME", help="of JSON Lines; default: text"
    )
    group.add_argument(
        "--plain-text",
        action="store_true",
        help="control tokens written in the text are letters like others",
    )
    run = _run_arguments(parser, whole_number)

    command = commands.add_parser(
        "train",
        parents=[machine, text, run],
        help="train a model, from scratch or further",
        description="Trains a model on text; OUT becomes a Hugging Face folder.",
    )
    command.add_argument(
        "--model",
        dest="student",
        type=Path,
        required=True,
        metavar="CONFIG_OR_DIR",
        help="config.json: weights are drawn; a folder with weights: they are trained further",
    )
    command.set_defaults(run=run_train)

    command = commands.add_parser(
        "distill",
        parents=[machine, text, run],
        help="train a student on a teacher's distribution",
        description="Trains a student to predict what a teacher does; OUT becomes a Hugging Face "
        "folder.",
    )
    command.add_argument(
        "--teacher", type=Path, metavar="DIR", help="default: what `teach` stored with the data"
    )
    command.add_argument(
        "--student",
        type=Path,
        required=True,
        metavar="CONFIG_OR_DIR",
        help="config.json: weights are drawn; a folder with weights: they are trained further",
    )
    command.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="of both sides; default: 1"
    )
    command.add_argument(
        "--hard-labels",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="weight of the cross-entropy with the text, beside the teacher's; default: 0",
    )
    command.set_defaults(run=run_distill)

    command = commands.add_parser(
        "teach",
        parents=[machine, text],
        help="store a teacher's distribution once, for `distill`",
        description="Stores a teacher's most probable tokens for every token of a text, and some "
        "drawn from the others.",
    )
    command.add_argument("--teacher", type=Path, required=True, metavar="DIR")
    command.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="default: the teacher's or the one that ships"
    )
    command.add_argument(
        "--data", type=Path, nargs="+", required=True, metavar="FILE", help=TEXT_HELP
    )
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="the shard")
    command.add_argument(
        "--top-k", type=whole_number(1), default=64, metavar="K", help="words stored of each place"
    )
    command.add_argument(
        "--tail",
        type=whole_number(0),
        metavar="N",
        help="of these, drawn from the less probable ones; default: a quarter",
    )
    command.add_argument(
        "--seed", type=whole_number(0), default=0, metavar="N", help="of the draws"
    )
    command.add_argument(
        "--sequence-length", type=whole_number(1), metavar="N", help="default: the context"
    )
    command.add_argument(
        "--batch-tokens", type=whole_number(1), metavar="N", help="default: at least 4096"
    )
    command.add_argument("--dtype", choices=DTYPES, help="of the teacher; default: as stored")
    command.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    command.set_defaults(run=run_teach)

    command = commands.add_parser(
        "tokenize",
        parents=[machine, text],
        help="text to a shard of token ids",
        description="Writes the token ids of text to a shard, which training maps into memory.",
    )
    command.add_argument("data", type=Path, nargs="+", metavar="FILE", help="text or JSON Lines")
    command.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="default: the one that ships"
    )
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="the shard")
    command.set_defaults(run=run_tokenize)


def _run_arguments(
    parser: Callable[..., argparse.ArgumentParser], whole_number: Any
) -> argparse.ArgumentParser:
    run = parser(add_help=False)
    group = run.add_argument_group("data")
    group.add_argument(
        "--data", type=Path, nargs="+", required=True, metavar="FILE", help=TEXT_HELP
    )
    group.add_argument(
        "--eval-data", type=Path, nargs="+", metavar="FILE", help="held-out text to evaluate on"
    )
    group.add_argument(
        "--held-out",
        type=float,
        metavar="SHARE",
        help="hold the last share of every file out, and evaluate on it",
    )
    group.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="default: the student's, the teacher's or the one that ships",
    )
    group.add_argument(
        "--sequence-length", type=whole_number(1), metavar="N", help="default: the context"
    )
    group.add_argument(
        "--fixed-cuts",
        action="store_true",
        help="cut long documents at the same places every epoch, as a stored teacher needs",
    )
    group.add_argument(
        "--batch-tokens",
        type=whole_number(1),
        metavar="N",
        help="that a process runs at once; default: 4096, or a sequence",
    )
    group.add_argument(
        "--step-tokens",
        type=whole_number(1),
        metavar="N",
        help="of an update, over all processes; default: a batch of each",
    )
    group = run.add_argument_group("training")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--steps", type=whole_number(1), metavar="N")
    length.add_argument("--epochs", type=whole_number(1), default=1, metavar="N", help="default: 1")
    group.add_argument("--learning-rate", type=float, default=1e-3, metavar="R")
    group.add_argument(
        "--warm-up", type=whole_number(0), metavar="N", help="steps; default: a twentieth"
    )
    group.add_argument("--final-learning-rate", type=float, default=0.1, metavar="SHARE")
    group.add_argument("--weight-decay", type=float, default=0.1, metavar="D")
    group.add_argument("--beta1", type=float, default=0.9, metavar="B")
    group.add_argument("--beta2", type=float, default=0.95, metavar="B")
    group.add_argument("--epsilon", type=float, default=1e-8, metavar="E")
    group.add_argument("--clip", type=float, default=1.0, metavar="NORM", help="of the gradient")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="to compute in; master weights are float32. Default: bfloat16",
    )
    group.add_argument("--seed", type=whole_number(0), default=0, metavar="N")
    group.add_argument(
        "--activation-checkpointing",
        action="store_true",
        help="recompute activations in place of storing them",
    )
    group = run.add_argument_group("run")
    group.add_argument("--out", type=Path, required=True, metavar="DIR")
    group.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    group.add_argument("--checkpoint-every", type=whole_number(1), default=100, metavar="STEPS")
    group.add_argument("--keep", type=whole_number(1), default=2, metavar="N", help="checkpoints")
    group.add_argument("--evaluate-every", type=whole_number(1), default=100, metavar="STEPS")
    group.add_argument(
        "--export", choices=("last", "best"), default="last", help="which weights OUT gets"
    )
    group.add_argument(
        "--export-dtype", choices=DTYPES, help="of the weights in OUT; default: --dtype"
    )
    group.add_argument(
        "--strategy", choices=("ddp", "fsdp"), default="ddp", help="under torchrun; default: ddp"
    )
    group.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    group.add_argument("--tensorboard", action="store_true", help="write event files too")
    group.add_argument("--json", action="store_true", help="one JSON object, at the end")
    return run


def run_train(args: argparse.Namespace) -> None:
    """`gemma2-ext train`."""
    _train(args, teacher_folder=None, distil=False)


def run_distill(args: argparse.Namespace) -> None:
    """`gemma2-ext distill`."""
    if not 0 <= args.hard_labels < 1:
        raise ValueError(f"--hard-labels must be at least 0 and below 1, got {args.hard_labels}")
    if not 0 < args.temperature < float("inf"):
        raise ValueError(f"--temperature must be positive and finite, got {args.temperature}")
    _train(args, teacher_folder=args.teacher, distil=True)


def _train(args: argparse.Namespace, teacher_folder: Path | None, distil: bool) -> None:
    from .trainer import processes

    # A step frees gigabytes that the next one needs; to fault them in anew takes a twentieth of it.
    keep_freed_memory()
    with processes(args.device) as device:
        trainer = _trainer(args, teacher_folder, distil, device)
        result = trainer.run()
        if trainer.rank == 0:
            _report(args, result)
        del trainer  # what holds the group of processes


def _trainer(
    args: argparse.Namespace, teacher_folder: Path | None, distil: bool, device: torch.device
) -> Trainer:
    """The run that the arguments ask for; what costs least to check comes first."""
    from .module import new_weights
    from .trainer import Trainer

    options = _run_options(args, device)
    config, folder = student_config(args.student)
    tokenizer_folder = args.tokenizer or _with_tokenizer(folder, teacher_folder)
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{tokenizer_folder}: the tokenizer's {tokenizer.vocab_size} tokens exceed the "
            f"student's vocab_size = {config.vocab_size}"
        )
    sources, held_out_sources = _sources(args, tokenizer)
    stored = distil and teacher_folder is None
    length = _sequence_length(args, config, sources if stored else [])
    if stored:
        _check_stored(sources, length, args.temperature)
    else:
        sources = [replace(s, top_ids=None, top_log_probs=None) for s in sources]
    batch_tokens = args.batch_tokens or max(4096, length)
    shift = not (stored or args.fixed_cuts)
    batches = _batches(sources, tokenizer, config, length, batch_tokens, args.seed, shift)
    training = _training_config(args, batches)
    held_out = held_out_bytes = None
    if held_out_sources:
        held_out = _batches(held_out_sources, tokenizer, config, length, batch_tokens, None, False)
        sizes = [s.num_bytes for s in held_out_sources]
        held_out_bytes = None if None in sizes else sum(size or 0 for size in sizes)
    if folder is None:
        model = Gemma2(config, new_weights(config, args.seed))
    else:
        model = Gemma2.from_pretrained(folder, dtype=torch.float32)
    return Trainer(
        model,
        training,
        options,
        batches,
        objective=_objective(args, teacher_folder, distil, device),
        held_out=held_out,
        held_out_bytes=held_out_bytes,
        tokenizer_folder=tokenizer_folder,
        facts={"objective": _objective_facts(args, sources, distil)},
    )


def _run_options(args: argparse.Namespace, device: torch.device) -> RunOptions:
    from .trainer import RunOptions

    return RunOptions(
        out=args.out,
        resume=args.resume,
        checkpoint_every=args.checkpoint_every,
        keep=args.keep,
        evaluate_every=args.evaluate_every,
        strategy=args.strategy,
        activation_checkpointing=args.activation_checkpointing,
        device=str(device),
        tensorboard=args.tensorboard,
        export_best=args.export == "best",
        export_dtype=DTYPES[args.export_dtype or args.dtype],
    )


def _training_config(args: argparse.Namespace, batches: Batches) -> TrainingConfig:
    from .trainer import TrainingConfig

    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    step_tokens = args.step_tokens or batches.batch_tokens * world
    if step_tokens % batches.batch_tokens:
        raise ValueError(
            f"--step-tokens must be a multiple of --batch-tokens {batches.batch_tokens}, "
            f"got {step_tokens}"
        )
    steps = args.steps
    if steps is None:
        steps = _steps_of_epochs(args.epochs, batches, step_tokens // batches.batch_tokens)
    return TrainingConfig(
        steps=steps,
        step_tokens=step_tokens,
        batch_tokens=batches.batch_tokens,
        sequence_length=batches.sequence_length,
        learning_rate=args.learning_rate,
        warm_up=steps // 20 if args.warm_up is None else args.warm_up,
        final_learning_rate=args.final_learning_rate,
        weight_decay=args.weight_decay,
        beta1=args.beta1,
        beta2=args.beta2,
        epsilon=args.epsilon,
        clip=args.clip,
        dtype=args.dtype,
        seed=args.seed,
    )


def _report(args: argparse.Namespace, result: dict[str, Any]) -> None:
    if args.json:
        print(json.dumps({"out": str(args.out), **result}))
        return
    if "loss" in result:
        print(f"loss {result['loss']:.4f}")
    if "held_out_perplexity" in result:
        print(f"held-out perplexity {result['held_out_perplexity']:.4f} per token")
    if "held_out_bits_per_byte" in result:
        print(f"held-out bits per byte {result['held_out_bits_per_byte']:.4f}")
    print(f"the model is in {args.out}")


def student_config(path: Path) -> tuple[Gemma2Config, Path | None]:
    """The student's configuration, and the folder whose weights it starts from.

    Args:
        path: a folder with weights, or a config.json, or a folder that has only that.

    Raises:
        OSError, ValueError, TypeError, NotImplementedError: as `Gemma2Config.from_pretrained`.
    """
    if path.is_file():
        return Gemma2Config.from_dict(read_json(path), source=str(path)), None
    config = Gemma2Config.from_pretrained(path)
    has_weights = any(path.glob("*.safetensors")) or any(path.glob("*.bin"))
    return config, path if has_weights else None


def _with_tokenizer(*folders: Path | None) -> Path:
    for folder in folders:
        if folder is not None and any(
            (folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")
        ):
            return folder
    return shipped_model()


def _sources(
    args: argparse.Namespace, tokenizer: Tokenizer
) -> tuple[list[Documents], list[Documents]]:
    """What to train on, and what is held out."""
    from .data import load_documents, split_held_out

    if args.eval_data and args.held_out is not None:
        raise ValueError("give --eval-data or --held-out, not both")
    if args.held_out is not None and not 0 < args.held_out < 1:
        raise ValueError(f"--held-out must be between 0 and 1, got {args.held_out}")

    def load(paths: list[Path]) -> list[Documents]:
        return load_documents(paths, tokenizer, text_field=args.text_field, plain=args.plain_text)

    sources = load(args.data)
    if args.held_out is None:
        return sources, load(args.eval_data) if args.eval_data else []
    pairs = [split_held_out(source, args.held_out, tokenizer) for source in sources]
    return [first for first, _ in pairs], [second for _, second in pairs]


def _batches(
    sources: list[Documents],
    tokenizer: Tokenizer,
    config: Gemma2Config,
    length: int,
    batch_tokens: int,
    seed: int | None,
    shift: bool,
) -> Batches:
    from .data import Batches

    return Batches(
        sources, tokenizer.bos_id, config.vocab_size, length, batch_tokens, seed=seed, shift=shift
    )


def _steps_of_epochs(epochs: int, batches: Batches, micro_batches: int) -> int:
    steps = sum(batches.count(epoch) for epoch in range(epochs)) // micro_batches
    if steps == 0:
        raise ValueError(
            f"the data's {batches.num_tokens} tokens do not fill a step; lower --step-tokens, or "
            "say --steps"
        )
    return steps


def _sequence_length(
    args: argparse.Namespace, config: Gemma2Config, taught: list[Documents]
) -> int:
    """--sequence-length, or that of a stored teacher, or the context."""
    lengths = [source.teacher.get("sequence_length") for source in taught]
    length = args.sequence_length or next((n for n in lengths if type(n) is int and n > 0), None)
    context = config.max_position_embeddings
    if length is not None and length > context:
        raise ValueError(
            f"--sequence-length must be at most max_position_embeddings = {context}, got {length}"
        )
    return length or context


def _check_stored(sources: list[Documents], length: int, temperature: float) -> None:
    for source in sources:
        if source.top_ids is None:
            raise ValueError(
                f"{source.name}: holds no teacher's log-probabilities; name a --teacher, or store "
                "them by `gemma2-ext teach`"
            )
        taught = source.teacher.get("sequence_length")
        if taught != length:
            raise ValueError(
                f"{source.name}: was taught in sequences of {taught} tokens, "
                f"--sequence-length is {length}"
            )
        if temperature != 1 and source.teacher.get("tail"):
            raise ValueError(
                f"{source.name}: holds words drawn at temperature 1, --temperature is "
                f"{temperature}; store the teacher by `gemma2-ext teach --tail 0`"
            )


def _objective(
    args: argparse.Namespace, teacher_folder: Path | None, distil: bool, device: torch.device
) -> Objective:
    from .module import Objective

    if not distil:
        return Objective()
    teacher = None
    if teacher_folder is not None:
        teacher = Gemma2.from_pretrained(teacher_folder, DTYPES[args.dtype], device).eval()
    return Objective(teacher, args.temperature, args.hard_labels, distil=True)


def _objective_facts(
    args: argparse.Namespace, sources: list[Documents], distil: bool
) -> dict[str, Any]:
    if not distil:
        return {"kind": "cross-entropy"}
    teacher = str(args.teacher) if args.teacher else [source.teacher for source in sources]
    return {
        "kind": "distillation",
        "teacher": teacher,
        "temperature": args.temperature,
        "hard_labels": args.hard_labels,
    }


def run_teach(args: argparse.Namespace) -> None:
    """`gemma2-ext teach`."""
    from .data import load_documents
    from .teacher import teach

    tokenizer = Tokenizer.from_pretrained(args.tokenizer or _with_tokenizer(args.teacher))
    config = Gemma2Config.from_pretrained(args.teacher)
    length = _sequence_length(args, config, [])
    documents = load_documents(
        args.data, tokenizer, text_field=args.text_field, plain=args.plain_text
    )
    teacher = Gemma2.from_pretrained(args.teacher, DTYPES.get(args.dtype), args.device)
    tail = args.tail
    if tail is None:
        tail = args.top_k // 4 if args.top_k < config.vocab_size else 0
    shard = teach(
        teacher,
        tokenizer,
        documents,
        args.out,
        top_k=args.top_k,
        tail=tail,
        seed=args.seed,
        sequence_length=length,
        batch_tokens=args.batch_tokens or max(4096, length),
        name=str(args.teacher),
        progress=sys.stderr is not None and sys.stderr.isatty(),
    )
    size = args.out.stat().st_size
    print(
        f"{args.out}: {len(shard.tokens):,} tokens, the {args.top_k - tail} best of each and "
        f"{tail} drawn from the others, {size:,} bytes"
    )


def run_tokenize(args: argparse.Namespace) -> None:
    """`gemma2-ext tokenize`."""
    from .data import encode_document, read_documents, write_shard

    tokenizer = Tokenizer.from_pretrained(args.tokenizer or shipped_model())

    def documents() -> Iterator[tuple[str, list[int]]]:
        for path in args.data:
            for text in read_documents(path, args.text_field):
                if text:
                    yield text, encode_document(tokenizer, text, args.plain_text)

    shard = write_shard(args.out, documents(), tokenizer)
    print(f"{args.out}: {len(shard.ends):,} documents, {len(shard.tokens):,} tokens")
