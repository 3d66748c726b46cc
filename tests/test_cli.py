"""The command line as a user meets it: real processes, pipes and a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gemma2_ext
from gemma2_ext import Gemma2, Gemma2Config, cli
from gemma2_ext.cache import cache_bytes
from gemma2_ext.chat import Conversation, TextStream
from gemma2_ext.evaluate import perplexity
from gemma2_ext.models import shipped_model
from gemma2_ext.tokenizer import Tokenizer

PROMPT = "ROMEO:\nBut soft, what light"
RATES = r"\[prefill (\d+) tokens, [\d.]+ token/s; decode (\d+) tokens, [\d.]+ token/s"
COMMAND = [sys.executable, "-m", "gemma2_ext"]


def run(*args: str | bytes | Path, stdin: str | bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Runs the program in a process of its own."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    return subprocess.run([*COMMAND, *args], input=data, capture_output=True, timeout=120)


@pytest.fixture
def main(capsys: pytest.CaptureFixture[str]):
    """Runs a command in this process: (exit code, standard output, standard error)."""

    def run_here(*args: str | Path) -> tuple[int, str, str]:
        try:
            code = cli.main([str(a) for a in args])
        except SystemExit as exit_:  # argparse's way
            code = exit_.code
        return code, *capsys.readouterr()

    return run_here


END_OF_TURN = 107


def model_folder(folder: Path, stops: bool = False, **changes: object) -> Path:
    """A random model with the shipped tokenizer that writes letters, and `stops` or not."""
    torch.manual_seed(0)
    shipped = shipped_model()
    tokenizer = Tokenizer.from_pretrained(shipped)
    config = Gemma2Config(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=8,
    )
    model = Gemma2(replace(config, **changes))
    with torch.no_grad():
        # Only letters have logits far from 0, and so the largest.
        letters = tokenizer.encode("a b c d e f g h i j k l m n o p", add_bos=False)
        model.embed_tokens.weight[letters + [END_OF_TURN] * stops] *= 100
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shipped / file, folder)
    return folder


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("endless"), max_position_embeddings=1 << 20)


@pytest.fixture(scope="session")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("short"), max_position_embeddings=96)


@pytest.fixture(scope="module")
def shakespeare() -> tuple[Gemma2, Tokenizer]:
    return Gemma2.from_pretrained(shipped_model()), Tokenizer.from_pretrained(shipped_model())


def greedy_text(model: Gemma2, tokenizer: Tokenizer, ids: list[int], count: int) -> str:
    new = model.generate(torch.tensor([ids]), max_new_tokens=count)[0, len(ids) :].tolist()
    return tokenizer.decode([i for i in new if i not in (*tokenizer.eos_ids, 0)])


# ---- generate ------------------------------------------------------------------------------------


def test_generate_writes_what_the_model_generates(shakespeare, main, tmp_path: Path):
    model, tokenizer = shakespeare
    ids = tokenizer.encode(PROMPT)
    expected = greedy_text(model, tokenizer, ids, 24)
    result = run("generate", PROMPT, "--max-new-tokens", "24")
    assert (result.returncode, result.stdout.decode()) == (0, expected + "\n")
    rates = re.search(RATES, result.stderr.decode().splitlines()[-1])
    assert rates
    assert [int(n) for n in rates.groups()] == [len(ids), 24]

    piped = run("generate", "--json", "--max-new-tokens", "24", stdin=PROMPT)
    summary = json.loads(piped.stdout)
    assert summary["prompt"] == PROMPT
    assert summary["text"] == expected
    assert (summary["prompt_tokens"], summary["new_tokens"]) == (len(ids), 24)
    assert summary["stop_reason"] == "length"
    assert summary["prefill_tokens_per_second"] == pytest.approx(
        len(ids) / summary["prefill_seconds"]
    )
    assert summary["decode_tokens_per_second"] == pytest.approx(23 / summary["decode_seconds"])

    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    code, out, _ = main("generate", "--file", tmp_path / "prompt.txt", "--max-new-tokens", 24)
    assert (code, out) == (0, expected + "\n")


def test_generate_as_a_users_turn(shakespeare, main):
    model, tokenizer = shakespeare
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Who art thou?"}])
    _, out, _ = main("generate", "--chat", "Who art thou?", "--max-new-tokens", 20)
    assert out == greedy_text(model, tokenizer, ids, 20) + "\n"


def test_generate_samples_by_seed(main):
    drawn = [
        main("generate", PROMPT, "--max-new-tokens", 20, "--temperature", 1.5, "--seed", s)[1]
        for s in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    # Each of these filters leaves only the most probable token.
    greedy = main("generate", PROMPT, "--max-new-tokens", 20)[1]
    for option, value in (("--top-k", 1), ("--top-p", 1e-6), ("--min-p", 1.0)):
        args = ("--temperature", 1.5, option, value)
        assert main("generate", PROMPT, "--max-new-tokens", 20, *args)[1] == greedy


def test_generate_stops_where_the_context_ends(main, short: Path):
    code, out, err = main("generate", "a b c", "--model", short, "--json")
    summary = json.loads(out)
    assert (code, err, summary["stop_reason"]) == (0, "", "context")
    # The last token drawn has no need of a slot.
    assert summary["prompt_tokens"] + summary["new_tokens"] == 96 + 1


def test_generate_takes_dtype_threads_and_window(main):
    threads = torch.get_num_threads()
    try:
        args = ("--dtype", "float32", "--threads", 1, "--sliding-window", 4)
        code, out, _ = main("generate", PROMPT, "--max-new-tokens", 40, *args)
        assert (code, torch.get_num_threads()) == (0, 1)
    finally:
        torch.set_num_threads(threads)
    model = Gemma2.from_pretrained(shipped_model(), dtype=torch.float32, sliding_window=4)
    tokenizer = Tokenizer.from_pretrained(shipped_model())
    assert out == greedy_text(model, tokenizer, tokenizer.encode(PROMPT), 40) + "\n"


def test_a_reader_that_leaves_is_no_error(endless: Path):
    process = subprocess.Popen(
        [*COMMAND, "generate", "a", "--model", endless, "--max-new-tokens", "100000"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout and process.stderr
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=120) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_ctrl_c_ends_generate_quietly(endless: Path):
    process = subprocess.Popen(
        [*COMMAND, "generate", "a", "--model", endless, "--max-new-tokens", "100000"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, b"\n")


# ---- chat ----------------------------------------------------------------------------------------


def test_chat_from_a_pipe(shakespeare):
    model, tokenizer = shakespeare
    expected, conversation = [], Conversation(model, tokenizer)
    for message in ("Who art thou?", "Speak again."):
        expected.append("".join(conversation.answer(message, max_new_tokens=20)))
    conversation.reset()
    expected.append("".join(conversation.answer("Speak again.", max_new_tokens=20)))

    lines = "Who art thou?\n\nSpeak again.\n/reset\nSpeak again.\n/help\n/exit\nnever read\n"
    result = run("chat", "--max-new-tokens", "20", stdin=lines)
    assert result.returncode == 0
    assert result.stdout.decode() == "".join(text + "\n" for text in expected)
    notes = result.stderr.decode().splitlines()
    assert len([n for n in notes if re.match(r"\[prefill \d+ tokens", n)]) == 3
    assert "[forgotten]" in notes
    assert notes[-1] == cli.CHAT_HELP


def test_chat_says_when_the_context_is_full(short: Path):
    result = run("chat", "--model", short, stdin="a\nb c d\n/reset\na\n" + "word " * 96)
    assert result.returncode == 0
    full = "[the context is full; /reset forgets the conversation]"
    notes = result.stderr.decode().splitlines()
    assert notes[0] == notes[4] == full
    assert re.fullmatch(r"\[prefill.*; 97 of 96 tokens\]", notes[1])
    refusal = r"\[chat: the context holds 96 tokens; .*; /reset forgets the conversation\]"
    assert re.fullmatch(refusal, notes[2])
    assert notes[3] == "[forgotten]"
    assert re.fullmatch(refusal, notes[6])


class Terminal:
    """The program on a terminal of its own, where Ctrl-C is a byte like any other."""

    def __init__(self, *args: str | Path) -> None:
        self.master, slave = pty.openpty()
        rows_and_columns = struct.pack("HHHH", 24, 80, 0, 0)  # tqdm needs a width
        fcntl.ioctl(slave, termios.TIOCSWINSZ, rows_and_columns)
        self.process = subprocess.Popen(
            [*COMMAND, *args],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def interrupt(self, until: str, seconds: float = 10) -> None:
        """Ctrl-C, up to what it leads to; again where the first was lost.

        Python drops a signal that comes inside a destructor, and one that comes between printing a
        prompt and waiting for a key is seen with the next signal.
        """
        self.type("\x03")
        try:
            self.read_until(until, seconds=seconds)
        except AssertionError:
            self.type("\x03")
            self.read_until(until)

    def read_until(self, pattern: str, seconds: float = 120) -> str:
        """Output up to a match, which is taken off what was seen."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.seen[-500:]!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode(errors="replace")
                except OSError:  # the program has ended
                    assert re.search(pattern, self.seen), self.seen[-500:]
        text, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return text

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for t in opened:
        t.close()


def test_ctrl_c_stops_the_answer_not_the_chat(terminal: list[Terminal], endless: Path):
    terminal.append(chat := Terminal("chat", "--model", endless))
    chat.read_until(r"Ctrl-C stops an answer")
    for _ in range(2):
        chat.read_until(r"> ")
        chat.type("hello\n")
        chat.read_until(r"[a-p ]{40}")  # an answer that would take minutes
        chat.interrupt(r"\[stopped", seconds=60)
    chat.read_until(r"> ")
    chat.type("/reset\n")
    chat.read_until(r"forgotten")
    chat.read_until(r"> ")
    chat.interrupt(r"\[stopped")
    chat.read_until(r"> ")
    assert chat.process.poll() is None
    chat.interrupt(r"\[stopped")
    assert chat.process.wait(timeout=30) == 0
    assert "Traceback" not in chat.seen


def test_end_of_input_ends_the_chat(terminal: list[Terminal], short: Path):
    terminal.append(chat := Terminal("chat", "--model", short))
    chat.read_until(r"> ")
    chat.type("\x04")
    assert chat.process.wait(timeout=30) == 0


def test_conversation_feeds_only_new_tokens(shakespeare):
    model, tokenizer = shakespeare
    conversation = Conversation(model, tokenizer)
    "".join(conversation.answer("Who art thou?", max_new_tokens=10))
    before = conversation.cache.length
    assert before == len(conversation.ids) - 1  # the last token drawn was not fed
    stream = conversation.answer("And thy name?", max_new_tokens=10)
    "".join(stream)
    assert stream.timing.prompt_tokens == len(conversation.ids) - stream.timing.new_tokens - before
    text = tokenizer.decode(conversation.ids, skip_special_tokens=False)
    assert text.count("<bos>") == 1
    first, second = re.fullmatch(
        r"<bos><start_of_turn>user\nWho art thou\?<end_of_turn>\n<start_of_turn>model\n(.*)"
        r"<end_of_turn>\n<start_of_turn>user\nAnd thy name\?<end_of_turn>\n"
        r"<start_of_turn>model\n(.*)",
        text,
        re.DOTALL,
    ).groups()
    assert first and second


@pytest.mark.parametrize("drawn", [0, 1, 7])
def test_conversation_goes_on_after_an_answer_broken_off(drawn: int, shakespeare):
    """The cache holds what the conversation says it does, wherever an answer was broken off."""
    tokenizer = shakespeare[1]
    model = Gemma2.from_pretrained(shipped_model(), dtype=torch.float32)
    conversation = Conversation(model, tokenizer)
    "".join(conversation.answer("Who art thou?", max_new_tokens=100))
    pieces = iter(conversation.answer("What news?"))
    for _ in range(drawn):
        next(pieces)
    pieces.close()
    stream = conversation.answer("Speak again.", max_new_tokens=30)
    prompt = list(conversation.ids)
    "".join(stream)
    again = model.generate(torch.tensor([prompt]), max_new_tokens=30)[0, len(prompt) :]
    assert stream.new_ids == again.tolist()


def test_conversation_survives_an_interrupt_while_it_reads(shakespeare):
    tokenizer = shakespeare[1]
    model = Gemma2.from_pretrained(shipped_model(), dtype=torch.float32)
    conversation = Conversation(model, tokenizer)
    calls = 0

    def interrupt(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:  # in the second chunk of the message
            raise KeyboardInterrupt

    chunk = model._chunk
    model._chunk = lambda *args: (interrupt(), chunk(*args))[1]  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        "".join(conversation.answer("O brave new world! " * 12))
    model._chunk = chunk  # type: ignore[method-assign]
    assert 0 < conversation.cache.length < len(conversation.ids)
    stream = conversation.answer("Speak again.", max_new_tokens=30)
    prompt = list(conversation.ids)
    "".join(stream)
    again = model.generate(torch.tensor([prompt]), max_new_tokens=30)[0, len(prompt) :]
    assert stream.new_ids == again.tolist()


def test_conversation_seeds_answers_apart(shakespeare):
    model, tokenizer = shakespeare
    answers = []
    for _ in range(2):
        conversation = Conversation(model, tokenizer, seed=3, temperature=1.0)
        answers.append(["".join(conversation.answer("Speak.", max_new_tokens=20)) for _ in "ab"])
    assert answers[0] == answers[1]
    assert answers[0][0] != answers[0][1]


def test_the_stop_token_is_no_text(tmp_path: Path):
    folder = model_folder(tmp_path, stops=True)
    model, tokenizer = Gemma2.from_pretrained(folder), Tokenizer.from_pretrained(folder)
    ids = tokenizer.encode("a b c")
    # Hot enough that each of the 17 tokens is drawn within a few dozen.
    stream = TextStream(model, tokenizer, ids, max_new_tokens=1000, temperature=20.0, top_k=17)
    text = "".join(stream)
    assert stream.stop_reason == "stop"
    assert stream.new_ids[-1] == END_OF_TURN
    assert END_OF_TURN not in stream.new_ids[:-1]
    assert text == tokenizer.decode(stream.new_ids[:-1])
    assert "<" not in text

    conversation = Conversation(model, tokenizer, temperature=20.0, top_k=17)
    for _ in range(2):
        "".join(conversation.answer("a b c"))
    # Each stop token stands once, whether drawn or put there by the format.
    assert conversation.ids.count(END_OF_TURN) == 4
    assert conversation.ids[-1] == END_OF_TURN


# ---- perplexity ----------------------------------------------------------------------------------

VERSE = (
    "O, she doth teach the torches to burn bright!\nIt seems she hangs upon the cheek of night\n"
)


def test_perplexity(shakespeare, main, tmp_path: Path):
    model, tokenizer = shakespeare
    file = tmp_path / "verse.txt"
    file.write_bytes(VERSE.encode() * 4)
    ids = tokenizer.encode(VERSE * 4)
    num_bytes = len(VERSE.encode()) * 4
    expected = perplexity(model, ids, context=64, stride=16, num_bytes=num_bytes)
    result = run("perplexity", file, "--context", "64", "--stride", "16")
    assert result.returncode == 0
    assert result.stdout.decode() == (
        f"perplexity {expected.perplexity:.4f} per token\n"
        f"bits per byte {expected.bits_per_byte:.4f}\n"
    )
    line = rf"\[{len(ids) - 1} tokens, {num_bytes} bytes, [\d.]+ token/s\]\n"
    assert re.fullmatch(line, result.stderr.decode())

    code, out, err = main("perplexity", file, "--context", 64, "--stride", 16, "--json")
    summary = json.loads(out)
    assert (code, err) == (0, "")
    assert summary["nll"] == pytest.approx(expected.nll)
    assert summary["perplexity"] == pytest.approx(expected.perplexity)
    assert summary["bits_per_byte"] == pytest.approx(expected.bits_per_byte)
    assert (summary["num_tokens"], summary["num_bytes"]) == (len(ids) - 1, num_bytes)

    _, out, _ = main("perplexity", file, "--max-tokens", 20, "--json")
    first = perplexity(model, ids[:21])
    assert json.loads(out)["nll"] == pytest.approx(first.nll)
    assert json.loads(out)["num_bytes"] == len(tokenizer.decode(ids[:21]).encode())

    _, out, _ = main("perplexity", file, "--cache", "int8", "--json")
    small = Gemma2.from_pretrained(shipped_model(), cache_dtype=torch.int8)
    assert json.loads(out)["nll"] == pytest.approx(perplexity(small, ids).nll)
    assert json.loads(out)["nll"] != perplexity(model, ids).nll

    _, out, _ = main("perplexity", file, "--sliding-window", 4, "--json")
    narrow = Gemma2.from_pretrained(shipped_model(), sliding_window=4)
    assert json.loads(out)["nll"] == pytest.approx(perplexity(narrow, ids).nll)


def test_perplexity_shows_progress_on_a_terminal(terminal: list[Terminal], tmp_path: Path):
    (tmp_path / "verse.txt").write_text(VERSE)
    terminal.append(program := Terminal("perplexity", tmp_path / "verse.txt"))
    program.read_until(r"scoring: +\d+%")
    program.read_until(r"bits per byte [\d.]+")
    assert program.process.wait(timeout=30) == 0


# ---- quantize ------------------------------------------------------------------------------------


def test_quantize(main, tmp_path: Path):
    out_folder = tmp_path / "packed"
    result = run("quantize", shipped_model(), out_folder, "--to", "int4")
    assert result.returncode == 0
    assert result.stdout.decode() == f"{out_folder}: 2.10 MB of weights in int4\n"
    assert re.fullmatch(r"\[[\d.]+ s\]\n", result.stderr.decode())

    _, packed, _ = main("generate", "ROMEO:", "--model", out_folder, "--max-new-tokens", 8)
    _, loaded, _ = main("generate", "ROMEO:", "--quantize", "int4", "--max-new-tokens", 8)
    assert packed == loaded != ""

    for more in ((), ("--dtype", "float32")):
        _, out, _ = main("info", "--model", out_folder, "--json", *more)
        summary = json.loads(out)
        assert summary["model"]["quantization"] == "int4"
        _, out, _ = main("info", "--quantize", "int4", "--json", *more)
        assert json.loads(out)["memory"] == summary["memory"] | {
            "available_bytes": json.loads(out)["memory"]["available_bytes"]
        }
    _, out, _ = main("info", "--model", out_folder)
    assert "parameters, matrices in int4, the rest in bfloat16" in out

    code, out, err = main("quantize", shipped_model(), out_folder, "--to", "int8")
    assert (code, out) == (2, "")
    assert "has a config.json already; name a new folder" in err
    code, _, err = main("generate", "x", "--model", out_folder, "--quantize", "int8")
    assert (code, "is packed in int4, not in int8" in err) == (2, True)
    code, _, err = main("info", "--model", out_folder, "--quantize", "int8")
    assert (code, "is packed in int4, not in int8" in err) == (2, True)


def test_quantize_shows_progress_on_a_terminal(terminal: list[Terminal], tmp_path: Path):
    args = ("quantize", shipped_model(), tmp_path / "packed", "--to", "int8")
    terminal.append(program := Terminal(*args))
    program.read_until(r"weights: +\d+%")
    program.read_until(r"3\.89 MB of weights in int8")
    assert program.process.wait(timeout=30) == 0


# ---- info ----------------------------------------------------------------------------------------


def test_info_needs_no_weights(main, tmp_path: Path):
    """Memory is told for a model of which only the configuration is here."""
    Gemma2Config.gemma2_2b().save_pretrained(tmp_path)
    args = ("info", "--model", tmp_path, "--dtype", "bfloat16", "--batch", 2)
    code, out, _ = main(*args, "--json")
    assert code == 0
    summary = json.loads(out)
    config = Gemma2Config.gemma2_2b()
    assert summary["model"]["parameters"] == config.num_parameters == 2_614_341_888
    memory = summary["memory"]
    assert memory["weights_bytes"] == 2 * config.num_parameters
    assert memory["cache_bytes"] == cache_bytes(config, 2, 8192, torch.bfloat16)
    assert memory["cache_bytes"] < memory["cache_without_rings_bytes"] == 2 * 26 * 2 * 8192 * 2048
    assert memory["total_bytes"] == memory["weights_bytes"] + memory["cache_bytes"]
    assert memory["available_bytes"] > 0

    _, out, _ = main(*args, "--cache", "int8", "--json")
    assert json.loads(out)["memory"]["cache_bytes"] == cache_bytes(config, 2, 8192, torch.int8)

    _, out, _ = main(*args)
    assert "2,614,341,888 parameters" in out
    assert "weights 5.23 GB" in out


def test_info_on_this_build():
    result = run("info", "--json")
    summary = json.loads(result.stdout)
    assert summary["build"] == json.loads(json.dumps(gemma2_ext.build_info()))
    assert summary["threads"] >= 1
    assert summary["model"]["folder"] == str(shipped_model())


# ---- errors --------------------------------------------------------------------------------------

BAD_ARGUMENTS = [
    ([], "COMMAND"),
    (["sing"], "invalid choice: 'sing'"),
    (["generate", "x", "--loud"], "--loud"),
    (["generate", "x", "--file", "y"], "not allowed with argument"),
    (["generate", "x", "--temperature", "-1"], "temperature must be at least 0, got -1.0"),
    (["generate", "x", "--temperature", "nan"], "temperature must be at least 0, got nan"),
    (["generate", "x", "--temperature", "warm"], "--temperature: invalid float value: 'warm'"),
    (["generate", "x", "--top-p", "1.5"], r"top_p must be in \(0, 1\], got 1.5"),
    (["chat", "--min-p", "-0.1"], r"min_p must be in \[0, 1\], got -0.1"),
    (["chat", "--top-k", "0"], "--top-k: must be a whole number, at least 1, got '0'"),
    (["chat", "--seed", "-3"], "--seed: must be a whole number, at least 0, got '-3'"),
    (["generate", "x", "--seed", "9" * 20], "--seed: must be a whole number"),
    (["generate", "x", "--max-new-tokens", "0"], "--max-new-tokens: .* at least 1, got '0'"),
    (["generate", "x", "--max-new-tokens", "few"], "--max-new-tokens: .* got 'few'"),
    (["generate", "x", "--threads", "1000000"], "--threads: must be a whole number, 1 to"),
    (["generate", "x", "--dtype", "int3"], "--dtype: invalid choice: 'int3'"),
    (["generate", "x", "--device", "cuda"], "device cuda: "),
    (["generate", "x", "--device", "toaster"], "toaster"),
    (["generate", "x", "--sliding-window", "0"], "--sliding-window: .* at least 1, got '0'"),
    (["generate", ""], "the prompt is empty"),
    (["generate", "--chat", " \n"], "the prompt is empty"),
    (["generate", "\udcff"], "the prompt is not UTF-8"),
    (["generate", "word " * 2000], r"the prompt's \d+ tokens exceed the context"),
    (["generate", "--file", "/nowhere/prompt.txt"], "/nowhere/prompt.txt: No such file"),
    (["generate", "--file", "/"], "/: Is a directory"),
    (["chat", "--max-length", "10000"], "--max-length must be at most max_position.* = 512, got"),
    (["chat", "--model", "/nowhere"], "/nowhere"),
    (["perplexity"], "FILE"),
    (["perplexity", "/nowhere.txt"], "/nowhere.txt: No such file"),
    (["perplexity", "/dev/null"], "/dev/null: there is no text in it"),
    (["perplexity", __file__, "--context", "1000000"], "context must be between 1 and"),
    (["perplexity", __file__, "--context", "8", "--stride", "9"], "between 1 and context = 8"),
    (["info", "--max-length", "10000"], "--max-length must be at most max_position.* = 512, got"),
    (["info", "--model", "/nowhere"], "/nowhere"),
    (["quantize", "/nowhere", "/tmp/x", "--to", "int8"], "/nowhere"),
    (["quantize", "/nowhere", "/tmp/x", "--to", "int3"], "--to: invalid choice: 'int3'"),
    (["quantize", "/nowhere", "/tmp/x"], "the following arguments are required: --to"),
]


@pytest.mark.parametrize(("args", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_one_line_and_code_2(args: list[str], message: str, main):
    code, out, err = main(*args)
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"gemma2-ext: error: .*{message}.*\n", err), err


def test_errors_of_a_real_process(tmp_path: Path):
    missing = run("generate", "x", "--model", tmp_path)
    assert (missing.returncode, missing.stdout) == (2, b"")
    assert re.fullmatch(rb"gemma2-ext: error: .*config\.json.*\n", missing.stderr)

    latin = run("generate", stdin=b"caf\xe9")
    assert latin.returncode == 2
    assert latin.stderr == (
        b"gemma2-ext: error: standard input is not UTF-8: unexpected end of data at byte 3\n"
    )
    for unbuffered in ("", "1"):
        with open("/dev/full", "wb") as full:
            result = subprocess.run(
                [*COMMAND, "info"],
                stdout=full,
                stderr=subprocess.PIPE,
                env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
                timeout=120,
            )
        assert result.returncode == 2
        assert result.stderr == b"gemma2-ext: error: [Errno 28] No space left on device\n"

    traceback = run("chat", "--model", tmp_path, "--debug")
    assert traceback.returncode == 2
    assert b"Traceback" in traceback.stderr
    assert traceback.stderr.splitlines()[-1].startswith(b"gemma2-ext: error: ")


def test_no_prompt_on_a_terminal(terminal: list[Terminal]):
    terminal.append(program := Terminal("generate"))
    program.read_until(r"gemma2-ext: error: there is no prompt")
    assert program.process.wait(timeout=30) == 2


def test_memory_that_is_not_there_is_one_line(main, tmp_path: Path):
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256}
    huge = model_folder(tmp_path, max_position_embeddings=1 << 24, **sizes)  # 275 GB a tensor
    code, _, err = main("chat", "--model", huge)
    assert code == 2
    assert re.fullmatch(r"gemma2-ext: error: .*allocate.*\n", err)


def test_version_and_help(main):
    assert main("--version")[:2] == (0, f"gemma2-ext {gemma2_ext.__version__}\n")
    for command in ("generate", "chat", "perplexity", "info"):
        code, out, err = main(command, "--help")
        assert (code, err) == (0, "")
        assert "--model DIR" in out
