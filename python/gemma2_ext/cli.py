"""The command line: `gemma2-ext generate | chat | perplexity | quantize | bench | train | ...`.

Argument parsing, and what belongs to a terminal: streams of text, Ctrl-C, one line for an error.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import __version__, build_info
from .cache import cache_bytes
from .chat import Conversation, TextStream
from .config import GLOBAL, LOCAL, Gemma2Config
from .evaluate import perplexity, window_sizes
from .generate import Sampler
from .model import Gemma2
from .models import shipped_model
from .packed import declared_format, quantize_checkpoint, stored_format
from .quantize import FORMATS
from .speculative import Draft, ModelDraft, NgramDraft
from .threads import default_threads
from .tokenizer import Tokenizer
from .training import commands as training
from .weights import SINGLE, available_memory, memory_needed

PROGRAM = "gemma2-ext"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CHAT_HELP = "/reset forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the error and exits with code 2."""
        self.exit(2, f"{PROGRAM}: error: {message} (see {self.prog} --help)\n")


def whole_number(minimum: int, maximum: int = 2**63 - 1) -> Callable[[str], int]:
    """A type for argparse: an int from minimum to maximum."""

    def convert(text: str) -> int:
        with contextlib.suppress(ValueError):
            if minimum <= int(text) <= maximum:
                return int(text)
        bound = f"at least {minimum}" if maximum == 2**63 - 1 else f"{minimum} to {maximum}"
        raise argparse.ArgumentTypeError(f"must be a whole number, {bound}, got {text!r}")

    return convert


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `run` in its result is the command's function."""
    machine = Parser(add_help=False)
    machine.add_argument(
        "--threads",
        type=whole_number(1, os.cpu_count() or 1),
        metavar="N",
        help="default: OMP_NUM_THREADS, or one a core that may be used",
    )
    machine.add_argument("--debug", action="store_true", help="show the traceback of an error")

    model = Parser(add_help=False, parents=[machine])
    group = model.add_argument_group("model")
    group.add_argument(
        "--model", type=Path, metavar="DIR", help="Hugging Face folder; default: the one that ships"
    )
    group.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as stored")
    group.add_argument(
        "--quantize",
        choices=FORMATS,
        help="pack the weights while they are read; default: as stored",
    )
    group.add_argument(
        "--cache", choices=("int8",), help="keep the KV cache in 8 bits; default: as activations"
    )
    group.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    group.add_argument(
        "--sliding-window", type=whole_number(1), metavar="N", help="in place of the model's"
    )

    sampling = Parser(add_help=False)
    group = sampling.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: greedy")
    group.add_argument(
        "--top-k", type=whole_number(1), metavar="K", help="only the K most probable tokens"
    )
    group.add_argument("--top-p", type=float, metavar="P", help="only those that carry P together")
    group.add_argument(
        "--min-p", type=float, metavar="P", help="only those P times as probable as the first"
    )
    group.add_argument("--seed", type=whole_number(0), metavar="N", help="repeats a result")
    group.add_argument(
        "--draft",
        metavar="ngram|DIR",
        help="guess tokens by what followed the same ones before, or by a smaller model; the text "
        "stays the same",
    )

    parser = Parser(prog=PROGRAM, description="Gemma 2 at the speed of the machine.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    command = commands.add_parser(
        "generate",
        parents=[model, sampling],
        help="continue a text",
        description="Continues a text, printed as it comes.",
    )
    source = command.add_mutually_exclusive_group()
    source.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help='"-", or nothing in a pipe: standard input'
    )
    source.add_argument("--file", type=Path, help="read the prompt from here, as it stands")
    command.add_argument("--max-new-tokens", type=whole_number(1), default=256, metavar="N")
    command.add_argument("--chat", action="store_true", help="ask the prompt as a user's turn")
    command.add_argument("--json", action="store_true", help="one JSON object, at the end")
    command.set_defaults(run=run_generate)

    command = commands.add_parser(
        "chat",
        parents=[model, sampling],
        help="talk with the model",
        description=f"Talks with the model. {CHAT_HELP}.",
    )
    command.add_argument("--max-new-tokens", type=whole_number(1), metavar="N", help="of an answer")
    command.add_argument(
        "--max-length", type=whole_number(1), metavar="N", help="of it all; default: the context"
    )
    command.set_defaults(run=run_chat)

    command = commands.add_parser(
        "perplexity",
        parents=[model],
        help="how well the model predicts a text",
        description="Perplexity per token and bits per byte of a text, over strided windows.",
    )
    command.add_argument("file", type=Path, metavar="FILE", help='UTF-8 text; "-": standard input')
    command.add_argument(
        "--context",
        type=whole_number(1),
        metavar="N",
        help="tokens of a window; default: the model's",
    )
    command.add_argument(
        "--stride", type=whole_number(1), metavar="N", help="tokens it scores; default: half of it"
    )
    command.add_argument(
        "--max-tokens", type=whole_number(1), metavar="N", help="score the text's first N only"
    )
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=run_perplexity)

    command = commands.add_parser(
        "quantize",
        parents=[machine],
        help="write a model with weights in 8 or 4 bits",
        description="Writes a folder with the model's weights in 8.5 or 4.5 bits each, embedding "
        "included, matrix by matrix. It loads like any other.",
    )
    command.add_argument("folder", type=Path, metavar="DIR", help="Hugging Face folder")
    command.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    command.add_argument("--to", choices=FORMATS, required=True, dest="format")
    command.set_defaults(run=run_quantize)

    command = commands.add_parser(
        "info",
        parents=[model],
        help="this build, a model, and the memory it will need",
        description="Shows this build, a model, and the memory it will need, without loading it.",
    )
    command.add_argument("--batch", type=whole_number(1), default=1, metavar="N")
    command.add_argument(
        "--max-length",
        type=whole_number(1),
        metavar="N",
        help="tokens; default: the model's context",
    )
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=run_info)
    training.add_commands(commands, Parser, machine, whole_number)
    add_bench(commands)
    return parser


def add_bench(commands: argparse._SubParsersAction[Parser]) -> None:
    """Adds the command `bench`."""
    command = commands.add_parser(
        "bench",
        help="measure the ops against the machine's limits and against others",
        description="Checks each op's answer, then times it in turns with its peers, and measures "
        "the machine's limit between them.",
    )
    command.add_argument(
        "ops", nargs="*", metavar="OP", help="default: all ops; `model`: the whole model"
    )
    command.add_argument("--size", default="2b", choices=("2b", "9b", "27b"), help="whose shapes")
    command.add_argument("--phase", choices=("decode", "prefill", "training"), help="default: all")
    command.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    command.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    command.add_argument("--threads", type=whole_number(1, os.cpu_count() or 1), metavar="N")
    command.add_argument("--shape", default="", metavar="TEXT", help="only shapes that hold it")
    command.add_argument("--rounds", type=whole_number(3), default=20, metavar="N", help="samples")
    command.add_argument(
        "--prompt", type=whole_number(1), metavar="N", help="of the model's prefill; default 512"
    )
    command.add_argument(
        "--batch", type=whole_number(1), metavar="N", help="the model's sequences; default 1"
    )
    command.add_argument(
        "--quantize", choices=FORMATS, help="weights, of the model, linear and logits"
    )
    command.add_argument("--layers", type=whole_number(1), metavar="N", help="fewer in the model")
    command.add_argument("--no-peers", action="store_true", help="only this package")
    command.add_argument("--json", type=Path, metavar="FILE", help="write results here")
    command.add_argument(
        "--load", type=Path, nargs="+", metavar="FILE", help="show these, measure nothing"
    )
    command.add_argument("--compare", type=Path, metavar="FILE", help="an earlier run's JSON")
    command.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="bars, as PNG or SVG; a file an op where there are several",
    )
    command.add_argument("--roofline", type=Path, metavar="FILE", help="likewise")
    command.add_argument("--report", type=Path, metavar="FILE", help="a page in Markdown")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=run_bench, model=None)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: arguments; None: the process's.

    Returns:
        The exit code: 0, 2 after an error, 130 after Ctrl-C, 141 where the reader of standard
        output is gone.
    """
    args = build_parser().parse_args(argv)
    try:
        for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "replace")):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=errors)
        if "model" in args:
            args.model = args.model or shipped_model()
        if args.threads or "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(args.threads or default_threads())
        args.run(args)
        print(end="", flush=True)
        return 0
    except KeyboardInterrupt:
        note()
        return 130
    except BrokenPipeError:
        drop_output()
        return 141
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        note(f"{PROGRAM}: error: {describe(error)}")
        try:
            print(end="", flush=True)
        except OSError:
            drop_output()
        return 2


def drop_output() -> None:
    """What standard output did not take; else Python would try again, and fail, when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def note(line: str = "") -> None:
    """Prints a line to standard error."""
    if sys.stderr is not None:
        print(line, file=sys.stderr, flush=True)


def describe(error: Exception) -> str:
    """An exception as one line."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    expected = (OSError, ValueError, TypeError, RuntimeError, MemoryError, ImportError)
    if text and isinstance(error, expected):
        return text
    return f"{type(error).__name__}: {text}"


def read_text(path: Path) -> str:
    """A UTF-8 file as it stands; "-" is standard input."""
    name = "standard input" if str(path) == "-" else str(path)
    if name == str(path):
        data = path.read_bytes()
    elif sys.stdin is None:
        raise ValueError("standard input is closed")
    else:
        data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from error


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt from the argument, --file or standard input."""
    if args.file is not None:
        text = read_text(args.file)
    elif args.prompt is not None and args.prompt != "-":
        text = args.prompt
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError("the prompt is not UTF-8") from error
    elif args.prompt is None and (sys.stdin is None or sys.stdin.isatty()):
        raise ValueError('there is no prompt: give one, or --file FILE, or "-" for standard input')
    else:
        text = read_text(Path("-"))
    if not (text.strip() if args.chat else text):
        raise ValueError("the prompt is empty")
    return text


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of `Gemma2.stream`, refused here where a model need not be loaded for it."""
    options = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    Sampler(**options)
    return {**options, "seed": args.seed}


def load_config(args: argparse.Namespace) -> Gemma2Config:
    """The configuration that `load_model` will use."""
    config = Gemma2Config.from_pretrained(args.model)
    if args.sliding_window is not None:
        config = replace(config, sliding_window=args.sliding_window)
    return config


def sequence_length(args: argparse.Namespace, config: Gemma2Config) -> int:
    """--max-length, or the context; refused here where a model need not be loaded for it."""
    context = config.max_position_embeddings
    if args.max_length is not None and args.max_length > context:
        raise ValueError(
            f"--max-length must be at most max_position_embeddings = {context}, "
            f"got {args.max_length}"
        )
    return args.max_length or context


def load_model(args: argparse.Namespace) -> Gemma2:
    """The model, with a progress bar on a terminal."""
    return Gemma2.from_pretrained(
        args.model,
        dtype=DTYPES.get(args.dtype),
        device=args.device,
        quantize=args.quantize,
        sliding_window=args.sliding_window,
        cache_dtype=torch.int8 if args.cache else None,
        progress=sys.stderr is not None and sys.stderr.isatty(),
    )


def check_draft(args: argparse.Namespace, tokenizer: Tokenizer) -> None:
    """Refuses a draft model with another vocabulary before gigabytes are read."""
    if args.draft in (None, "ngram"):
        return
    ours, theirs = load_config(args), Gemma2Config.from_pretrained(args.draft)
    if ours.vocab_size != theirs.vocab_size:
        raise ValueError(
            f"--draft: the model must have the vocab_size {ours.vocab_size} of {args.model}, "
            f"{args.draft} has {theirs.vocab_size}"
        )
    if (wrong := tokenizer.difference(Tokenizer.from_pretrained(args.draft))) is not None:
        raise ValueError(
            f"--draft: token {wrong} of {args.draft} is another than that of {args.model}"
        )


def load_draft(args: argparse.Namespace) -> Draft | None:
    """What --draft asks for."""
    if args.draft is None:
        return None
    if args.draft == "ngram":
        return NgramDraft()
    dtype = DTYPES.get(args.dtype)
    return ModelDraft(Gemma2.from_pretrained(args.draft, dtype=dtype, device=args.device))


def run_generate(args: argparse.Namespace) -> None:
    """`gemma2-ext generate`."""
    sampling = sampling_options(args)
    prompt = read_prompt(args)
    context = load_config(args).max_position_embeddings
    tokenizer = Tokenizer.from_pretrained(args.model)
    check_draft(args, tokenizer)
    if args.chat:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
    else:
        ids = tokenizer.encode(prompt)
    if len(ids) > context:  # known before gigabytes are read
        raise ValueError(
            f"the prompt's {len(ids)} tokens exceed the context, "
            f"max_position_embeddings = {context}"
        )
    model, draft = load_model(args), load_draft(args)
    stream = TextStream(
        model, tokenizer, ids, max_new_tokens=args.max_new_tokens, draft=draft, **sampling
    )
    if not args.json:
        for text in stream:
            print(text, end="", flush=True)
        print(flush=True)
        note(f"[{stream.timing}]")
        return
    text = "".join(stream)
    timing = stream.timing
    result = {
        "prompt": prompt,
        "text": text,
        "prompt_tokens": timing.prompt_tokens,
        "new_tokens": timing.new_tokens,
        "stop_reason": stream.stop_reason,
        "prefill_seconds": timing.prefill_seconds,
        "decode_seconds": timing.decode_seconds,
        "prefill_tokens_per_second": timing.prefill_rate,
        "decode_tokens_per_second": timing.decode_rate,
        "draft": None,
    }
    if draft is not None:
        result["draft"] = {
            "proposed_tokens": draft.proposed,
            "accepted_tokens": draft.accepted,
            "acceptance": draft.acceptance,
            "steps": draft.steps,
            "tokens_per_step": timing.tokens_per_step,
            "speed_up": timing.speed_up,
        }
    print(json.dumps(result))


def run_chat(args: argparse.Namespace) -> None:
    """`gemma2-ext chat`."""
    sampling = sampling_options(args)
    max_length = sequence_length(args, load_config(args))
    tokenizer = Tokenizer.from_pretrained(args.model)
    check_draft(args, tokenizer)
    conversation = Conversation(
        load_model(args), tokenizer, max_length=max_length, draft=load_draft(args), **sampling
    )
    prompt = ""
    if sys.stdin is not None and sys.stdin.isatty():
        prompt = "> "
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() a history and an editable line)
        note(CHAT_HELP)
    interrupts = 0
    while interrupts < 2:
        try:
            line = input(prompt).strip()
            interrupts = 0
            if line == "/exit":
                return
            if line == "/reset":
                conversation.reset()
                note("[forgotten]")
            elif line.startswith("/"):
                note(CHAT_HELP)
            elif line:
                answer(conversation, line, args.max_new_tokens)
        except EOFError:
            return
        except KeyboardInterrupt:
            interrupts += 1
            note("\n[stopped; Ctrl-C again ends]")


def answer(conversation: Conversation, message: str, max_new_tokens: int | None) -> None:
    """Prints the model's turn as it comes."""
    try:
        stream = conversation.answer(message, max_new_tokens=max_new_tokens)
    except ValueError as error:
        note(f"[{error}; /reset forgets the conversation]")
        return
    for text in stream:
        print(text, end="", flush=True)
    print(flush=True)
    if stream.stop_reason == "context":
        note("[the context is full; /reset forgets the conversation]")
    note(f"[{stream.timing}; {len(conversation.ids)} of {conversation.cache.max_length} tokens]")


def run_perplexity(args: argparse.Namespace) -> None:
    """`gemma2-ext perplexity`."""
    context, stride = window_sizes(load_config(args), args.context, args.stride)
    text = read_text(args.file)
    tokenizer = Tokenizer.from_pretrained(args.model)
    ids = tokenizer.encode(text)
    if args.max_tokens is not None and args.max_tokens < len(ids) - 1:
        ids = ids[: args.max_tokens + 1]
        text = tokenizer.decode(ids)
    if len(ids) < 2:
        raise ValueError(f"{args.file}: there is no text in it")
    model = load_model(args)
    start = time.perf_counter()
    result = perplexity(
        model,
        ids,
        context=context,
        stride=stride,
        num_bytes=len(text.encode("utf-8")),
        progress=sys.stderr is not None and sys.stderr.isatty(),
    )
    seconds = time.perf_counter() - start
    if args.json:
        summary = {**vars(result), "perplexity": result.perplexity}
        print(json.dumps({**summary, "bits_per_byte": result.bits_per_byte, "seconds": seconds}))
        return
    print(f"perplexity {result.perplexity:.4f} per token")
    print(f"bits per byte {result.bits_per_byte:.4f}")
    note(
        f"[{result.num_tokens} tokens, {result.num_bytes} bytes, "
        f"{result.num_tokens / seconds:.1f} token/s]"
    )


# Options of `bench` that say what is measured, or how.
_MEASURING = (
    "size",
    "dtype",
    "device",
    "threads",
    "rounds",
    "batch",
    "prompt",
    "quantize",
    "layers",
    "no_peers",
)


def run_bench(args: argparse.Namespace) -> None:
    """`gemma2-ext bench`."""
    from .bench import OPS, Result, Settings, _report, _suite, run_suite
    from .bench.model import PHASES, ModelSettings, run_model

    for name in args.ops:
        if name not in (*OPS, "model"):
            raise ValueError(
                f"bench: there is no op {name!r}; there are {', '.join(OPS)}, and model"
            )
    for option in ("batch", "prompt", "layers"):
        if getattr(args, option) is not None and "model" not in args.ops:
            raise ValueError(f"bench: --{option} is for `bench model`")
    if args.load:
        defaults = vars(build_parser().parse_args(["bench"]))
        for option in _MEASURING:
            if getattr(args, option) != defaults[option]:
                raise ValueError(
                    f"bench: --{option.replace('_', '-')} is for measuring; --load shows what "
                    "was measured, and --phase, --shape and OP choose among it"
                )
    if args.shape and "model" in args.ops and not args.load:
        raise ValueError("bench: --shape chooses among cases of ops; the model is one case")
    earlier = _report.read_json(args.compare)[1] if args.compare else None

    def show(result: Result) -> None:
        print("\n".join(_report.lines(result)), flush=True)

    if args.load:
        machine, results = _report.read_all(args.load)
        results = [
            r
            for r in results
            if (not args.ops or r.op in args.ops)
            and args.phase in (None, r.phase)
            and args.shape in r.shape
        ]
        for result in results:
            show(result)
    else:
        model = None
        if "model" in args.ops:
            model = ModelSettings(
                size=args.size,
                dtype=getattr(torch, args.dtype),
                device=args.device,
                quantize=args.quantize,
                batch=args.batch or 1,
                prompt=args.prompt or 512,
                new_tokens=args.rounds,
                layers=args.layers,
                peers=not args.no_peers,
                phases=(args.phase,) if args.phase else PHASES,
            )
        _suite.check_device(args.device)
        machine = _report.machine_facts(args.device)
        print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
        every = _suite.PACKED_OPS if args.quantize else OPS
        results = run_suite(
            [name for name in args.ops if name != "model"] if args.ops else every,
            size=args.size,
            phases=(args.phase,) if args.phase else ("decode", "prefill", "training"),
            dtype=getattr(torch, args.dtype),
            device=args.device,
            quantize=args.quantize,
            settings=Settings(rounds=args.rounds, peers=not args.no_peers),
            shape=args.shape,
            show=show,
        )
        if model is not None:
            results += run_model(model, show)
    if not results:
        raise ValueError("bench: no case has that phase and shape")
    if args.json:
        args.json.write_text(_report.to_json(results, machine), encoding="utf-8")
    if earlier is not None:
        print("\n".join(_report.compare(earlier, results)))
    plots = _report.plot_bars(results, args.plot) if args.plot else {}
    if args.roofline:
        _report.plot_roofline(results, args.roofline)
    if args.report:
        folder = args.report.parent
        pictures = [os.path.relpath(args.roofline, folder)] if args.roofline else []
        picture_of = {op: os.path.relpath(path, folder) for op, path in plots.items()}
        page = _report.markdown(machine, results, pictures, picture_of)
        args.report.write_text(page, encoding="utf-8")


def run_quantize(args: argparse.Namespace) -> None:
    """`gemma2-ext quantize`."""
    start = time.perf_counter()
    progress = sys.stderr is not None and sys.stderr.isatty()
    quantize_checkpoint(args.folder, args.out, args.format, progress=progress)
    seconds = time.perf_counter() - start
    nbytes = (args.out / SINGLE).stat().st_size
    print(f"{args.out}: {format_bytes(nbytes)} of weights in {args.format}", flush=True)
    note(f"[{seconds:.1f} s]")


def run_info(args: argparse.Namespace) -> None:
    """`gemma2-ext info`."""
    config = load_config(args)
    if args.dtype:  # then there need be no weights
        dtype, format = DTYPES[args.dtype], declared_format(args.model)
    else:
        dtype, format = stored_format(args.model, config)
    if format is not None and args.quantize not in (None, format):
        raise ValueError(f"{args.model}: is packed in {format}, not in {args.quantize}")
    format = format or args.quantize
    max_length = sequence_length(args, config)
    full = replace(config, layer_types=(GLOBAL,) * config.num_hidden_layers)
    cache_dtype = torch.int8 if args.cache else dtype
    weights, cache, without_rings = (
        memory_needed(config, dtype, format),
        cache_bytes(config, args.batch, max_length, cache_dtype),
        cache_bytes(full, args.batch, max_length, cache_dtype),
    )
    info = {
        "build": build_info(),
        "threads": torch.get_num_threads(),
        "model": {
            "folder": str(args.model),
            "parameters": config.num_parameters,
            "dtype": str(dtype).removeprefix("torch."),
            "quantization": format,
            **config.to_dict(),
        },
        "memory": {
            "batch": args.batch,
            "max_length": max_length,
            "weights_bytes": weights,
            "cache_bytes": cache,
            "cache_without_rings_bytes": without_rings,
            "total_bytes": weights + cache,
            "available_bytes": available_memory(),
        },
    }
    print(json.dumps(info) if args.json else describe_info(info))


def format_bytes(count: int) -> str:
    """A number of bytes for a reader."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def describe_info(info: dict[str, Any]) -> str:
    """The facts of `info --json` for a reader."""
    build, model, memory = info["build"], info["model"], info["memory"]
    local = model["layer_types"].count(LOCAL)
    available = memory["available_bytes"]

    size = format_bytes
    dtype = model["dtype"]
    if model["quantization"]:
        dtype = f"matrices in {model['quantization']}, the rest in {dtype}"
    return "\n".join(
        (
            f"gemma2_ext {build['version']}, torch {build['torch']} (built with "
            f"{build['built_with_torch']}), compiler {build['compiler']}, "
            f"CUDA kernels: {'yes' if build['cuda'] else 'no'}",
            f"CPU kernels: {build['cpu_isa']} (this machine can run "
            f"{', '.join(build['supported_cpu_isas'])}), threads: {info['threads']}",
            f"model: {model['folder']}",
            f"  {model['parameters']:,} parameters, {dtype}, vocabulary of "
            f"{model['vocab_size']}, context of {model['max_position_embeddings']} tokens",
            f"  {model['num_hidden_layers']} layers of {model['hidden_size']} "
            f"({model['intermediate_size']} in the MLP), {local} of them local with a window of "
            f"{model['sliding_window']}",
            f"  {model['num_attention_heads']} heads of {model['head_dim']}, "
            f"{model['num_key_value_heads']} for keys and values; soft-caps "
            f"{model['attn_logit_softcapping']} and {model['final_logit_softcapping']}",
            f"memory: weights {size(memory['weights_bytes'])}, KV cache "
            f"{size(memory['cache_bytes'])} for {memory['batch']} x {memory['max_length']} tokens "
            f"({size(memory['cache_without_rings_bytes'])} if no layer were local)",
            f"  {size(memory['total_bytes'])} in all, "
            + ("" if available is None else f"{size(available)} available"),
        )
    )
