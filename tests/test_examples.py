"""The examples run, and so does every block of Python and gemma2-ext in README and docs."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch

from gemma2_ext import cli

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A line above a block that says why it is not run here, such as a download or a GPU.
NOT_RUN = "<!-- not run:"
# Commands that are run; of the others the arguments are parsed.
QUICK = ("generate", "chat", "perplexity", "info")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "transformers" in path.read_text():
        pytest.importorskip("transformers", "4.57")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


def blocks(path: Path, language: str) -> list[tuple[int, str]]:
    """(line, text) of the page's fenced blocks in a language, but those marked as not run."""
    found, begin, skipped = [], None, False
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        if begin is None and line.startswith("```"):
            begin, kind = number + 1, line.strip("` ")
            above = [text for text in lines[max(0, number - 2) : number] if text]
            skipped = bool(above) and above[-1].startswith(NOT_RUN)
        elif begin is not None and line.startswith("```"):
            if kind == language and not skipped:
                found.append((begin, "\n".join(lines[begin:number])))
            begin = None
    return found


@pytest.mark.parametrize(
    "path", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_python_of_a_page(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace, as a reader would paste them; torch's state is put back."""
    monkeypatch.chdir(tmp_path)
    if "transformers" in "".join(text for _, text in blocks(path, "python")):
        pytest.importorskip("transformers", "4.57")
    namespace: dict[str, object] = {"__name__": "__main__"}
    grad = torch.is_grad_enabled()
    try:
        for line, text in blocks(path, "python"):
            # Blank lines in front: a traceback then names the line of the page.
            exec(compile("\n" * line + text, str(path), "exec"), namespace)
    finally:
        torch.set_grad_enabled(grad)


def commands(path: Path) -> list[str]:
    """The lines of the page's plain and shell blocks that call gemma2-ext."""
    text = "\n".join(t for kind in ("", "sh", "bash") for _, t in blocks(path, kind))
    joined = re.sub(r"\\\n\s*", "", text)
    return [line for line in joined.splitlines() if line.startswith("gemma2-ext ")]


@pytest.mark.parametrize(
    "path", [p for p in PAGES if commands(p)], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_commands_of_a_page(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All parse; quick ones that need no file of the reader's run, with few tokens, untyped."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("To be, or not to be, that is the question.\n")
    Path("prompt.txt").write_text("ROMEO:")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    for command in commands(path):
        words = shlex.split(command, comments=True)[1:]
        if re.search(r"[A-Z]{3,}\b(?![:\"'])|\[|\|", re.sub(r'"[^"]*"', "", command)):
            continue  # a synopsis, with placeholders
        args = cli.build_parser().parse_args(words)
        if words[0] not in QUICK or "path/to/" in command or "--help" in words:
            continue
        if getattr(args, "max_new_tokens", None) is not None:
            words += ["--max-new-tokens", "3"]
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert cli.main(words) == 0, command
        assert out.getvalue() or words[0] == "chat", command


def test_pictures_are_as_drawn() -> None:
    pictures = runpy.run_path(str(ROOT / "scripts" / "draw_pictures.py"))["PICTURES"]
    images = ROOT / "docs" / "images"
    for name, draw in pictures.items():
        assert (images / f"{name}.svg").read_text() == draw().svg(), "run scripts/draw_pictures.py"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", path.read_text()):
        if not link.startswith("http"):
            assert (path.parent / link).exists(), link
