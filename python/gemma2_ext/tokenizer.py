"""Text to token ids and back, and Gemma's chat format.

`tokenizer.json` is read with `tokenizers`; a folder that has only `tokenizer.model` needs the
extra `sentencepiece`. A turn is `<start_of_turn>{role}\\n{text}<end_of_turn>\\n`, the assistant's
role is written `model`, there is no system role.
Source: arXiv 2408.00118, section 5; transformers `models/gemma`.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from .config import check_folder, read_bytes, read_json

START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"


class Backend(Protocol):
    """What the two file formats have in common."""

    vocab_size: int
    special: dict[str, int]  # control tokens, which text must not contain by accident

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, None where the vocabulary lacks it."""

    def vocabulary(self) -> dict[str, int]:
        """The ids of all tokens."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text without control tokens; adds none."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids, control tokens included."""


class Tokenizer:
    """A model's vocabulary.

    Made by `Tokenizer.from_pretrained(folder)`.

    Attributes:
        vocab_size: number of tokens.
        bos_id: `<bos>`.
        eos_ids: the tokens that end an answer: `<eos>` and, where there is one, `<end_of_turn>`.
    """

    def __init__(
        self, backend: Backend, *, settings: Mapping[str, Any] | None = None, source: str = ""
    ) -> None:
        settings = settings or {}
        self._backend = backend
        self._source = source
        self.vocab_size = backend.vocab_size
        self._bos = _token_name(settings, "bos_token", "<bos>", source)
        self._eos = _token_name(settings, "eos_token", "<eos>", source)
        self._chat_template = _chat_template(settings, source)
        names = (self._bos, self._eos, "<pad>", START_OF_TURN, END_OF_TURN)
        named = {name: backend.token_to_id(name) for name in names}
        self._special = backend.special | {n: i for n, i in named.items() if i is not None}
        self._special_ids = frozenset(self._special.values())
        longest_first = sorted(self._special, key=len, reverse=True)
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        for name in (self._bos, self._eos):
            if named[name] is None:
                raise ValueError(f"{source}: the vocabulary has no {name}")
        self.bos_id = self._special[self._bos]
        stops = (self._special.get(name) for name in (self._eos, END_OF_TURN))
        self.eos_ids = tuple(i for i in stops if i is not None)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Reads tokenizer.json, or else tokenizer.model, and tokenizer_config.json where present.

        Raises:
            FileNotFoundError: there is no such folder, or neither file in it.
            OSError: a file cannot be read.
            ValueError: a file is damaged or not a regular one, or the vocabulary lacks `<bos>` or
                `<eos>`.
            ImportError: tokenizer.model without the extra `sentencepiece`.
        """
        folder = check_folder(folder)
        settings: dict[str, Any] = {}
        if (path := folder / "tokenizer_config.json").exists():
            settings = read_json(path)
        if (path := folder / "chat_template.jinja").exists():
            settings["chat_template"] = _read_text(path)
        backend: Backend
        if (path := folder / "tokenizer.json").exists():
            backend = _HuggingFace(path)
        elif (path := folder / "tokenizer.model").exists():
            backend = _SentencePiece(path)
        else:
            raise FileNotFoundError(f"{folder}: no tokenizer.json and no tokenizer.model")
        return cls(backend, settings=settings, source=str(path))

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids of a text; control tokens written in it, such as `<start_of_turn>`, count.

        Args:
            text: any text.
            add_bos: whether exactly one `<bos>` leads, even where the text begins with one.

        Raises:
            TypeError: text is no str.
            ValueError: text holds surrogates, which have no UTF-8 form.
        """
        ids: list[int] = []
        for part in self._special_pattern.split(_checked_text(text)):
            if part in self._special:
                ids.append(self._special[part])
            elif part:
                ids += self._backend.encode(part)
        if add_bos:
            leading = 0
            while leading < len(ids) and ids[leading] == self.bos_id:
                leading += 1
            ids[:leading] = [self.bos_id]
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a text in which control tokens are letters like others; no `<bos>`.

        Raises:
            TypeError, ValueError: as `encode`.
        """
        ids, begin = [], 0
        text = _checked_text(text)
        for match in self._special_pattern.finditer(text):  # cut behind its first character
            ids += self._backend.encode(text[begin : match.start() + 1])
            begin = match.start() + 1
        return ids + (self._backend.encode(text[begin:]) if begin < len(text) else [])

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD.

        Args:
            ids: any token ids.
            skip_special_tokens: whether control tokens are left out.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(
                    f"{self._source}: token ids must be in [0, {self.vocab_size}), got {i}"
                )
        if skip_special_tokens:
            ids = [i for i in ids if i not in self._special_ids]
        return self._backend.decode(ids)

    def difference(self, other: Tokenizer) -> int | None:
        """The first id that stands for another token in `other`, None where all are the same."""
        ours, theirs = self._backend.vocabulary(), other._backend.vocabulary()
        return min((i for _, i in ours.items() ^ theirs.items()), default=None)

    def stream_decoder(self) -> StreamDecoder:
        """Decodes one token at a time, in whole characters."""
        return StreamDecoder(self)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, str]],
        add_generation_prompt: bool = True,
        *,
        use_checkpoint_template: bool = False,
    ) -> list[int]:
        """Token ids of a conversation. What a message says cannot forge a turn.

        Args:
            messages: `{"role": ..., "content": ...}`; roles "user" and "assistant" (or "model") in
                turns, "user" first. Contents are trimmed.
            add_generation_prompt: whether the model's turn is opened.
            use_checkpoint_template: render the template that came with the checkpoint, which needs
                the extra `chat-template`, in place of Gemma's own format.

        Raises:
            ValueError: there is no message, a role is out of turn or unknown, the vocabulary has
                no turns, the checkpoint has no template or its template refuses.
            TypeError: a message is no mapping, or its content no str.
            ImportError: use_checkpoint_template without jinja2.
        """
        messages = _checked_messages(messages)
        if use_checkpoint_template:
            return self._render(messages, add_generation_prompt)
        for name in (START_OF_TURN, END_OF_TURN):
            if name not in self._special:
                raise ValueError(f"{self._source}: no chat, the vocabulary has no {name}")
        start, end = self._special[START_OF_TURN], self._special[END_OF_TURN]
        newline = self._backend.encode("\n")
        ids = [self.bos_id]
        for message in messages:
            turn = f"{_gemma_role(message['role'])}\n{message['content'].strip()}"
            ids += [start, *self.encode_plain(turn), end, *newline]
        return ids + ([start, *self._backend.encode("model\n")] if add_generation_prompt else [])

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> list[int]:
        if self._chat_template is None:
            raise ValueError(f"{self._source}: the checkpoint has no chat template")
        try:
            import jinja2
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as e:
            raise ImportError(
                "the checkpoint's chat template needs jinja2: "
                "pip install 'gemma2_ext[chat-template]'"
            ) from e

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        # Control tokens in what people wrote are hidden from the parser of the rendered text.
        hidden = {name: uuid.uuid4().hex for name in self._special}

        def hide(text: str) -> str:
            return self._special_pattern.sub(lambda match: hidden[match[0]], text)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        try:
            text = environment.from_string(self._chat_template).render(
                messages=[m | {"content": hide(_checked_text(m["content"]))} for m in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token=self._bos,
                eos_token=self._eos,
            )
        except jinja2.TemplateError as e:
            raise ValueError(f"{self._source}: the chat template refuses: {e}") from e
        ids = []
        for part in self._special_pattern.split(text):
            if part in self._special:
                ids.append(self._special[part])
            elif part:
                for name, mark in hidden.items():
                    part = part.replace(mark, name)
                ids += self.encode_plain(part)
        return ids


class StreamDecoder:
    """Text of tokens that come one by one; all pieces together are `Tokenizer.decode`'s text."""

    # Tokens that are held back for a character to become whole. One has four bytes at most; longer
    # runs are no UTF-8 and stay U+FFFD.
    _LONGEST = 16

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # the tokens given out last: some decoders look back
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """What the token adds, as far as its characters are whole: "" while one is not.

        Raises:
            ValueError: the id is outside the vocabulary.
        """
        self._held.append(token)
        text = self._text()
        if text.endswith("\ufffd") and len(self._held) < self._LONGEST:
            return ""
        self._context, self._held = self._held, []
        return text

    def flush(self) -> str:
        """What was held back; to be called behind the last token."""
        text = self._text() if self._held else ""
        self._context, self._held = [], []
        return text

    def _text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._held)[len(before) :]


class _HuggingFace:
    """tokenizer.json."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        text = _read_text(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as e:  # the library raises nothing narrower
            raise ValueError(f"{path}: not a tokenizer: {e}") from e
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special}

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def vocabulary(self) -> dict[str, int]:
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class _SentencePiece:
    """tokenizer.model."""

    def __init__(self, path: Path) -> None:
        try:
            import sentencepiece
        except ImportError as e:
            raise ImportError(
                f"{path}: reading it needs sentencepiece: pip install 'gemma2_ext[sentencepiece]'"
            ) from e
        model = read_bytes(path)
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(model)
        except RuntimeError as e:
            raise ValueError(f"{path}: not a sentencepiece model") from e
        self.vocab_size = len(self._pieces)
        if self.vocab_size == 0:
            raise ValueError(f"{path}: not a sentencepiece model")
        control = (i for i in range(self.vocab_size) if self._pieces.IsControl(i))
        self.special = {self._pieces.IdToPiece(i): i for i in control}
        self._control = frozenset(self.special.values())

    def token_to_id(self, token: str) -> int | None:
        i = self._pieces.PieceToId(token)
        return i if self._pieces.IdToPiece(i) == token else None

    def vocabulary(self) -> dict[str, int]:
        return {self._pieces.IdToPiece(i): i for i in range(self.vocab_size)}

    def encode(self, text: str) -> list[int]:
        return self._pieces.EncodeAsIds(text)

    def decode(self, ids: list[int]) -> str:
        text, begin = "", 0
        for end in range(len(ids) + 1):  # the library writes nothing for a control token
            if end == len(ids) or ids[end] in self._control:
                text += self._pieces.DecodeIds(ids[begin:end]) if end > begin else ""
                text += self._pieces.IdToPiece(ids[end]) if end < len(ids) else ""
                begin = end + 1
        return text


def _read_text(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not UTF-8 (byte {e.start})") from None


def _token_name(settings: Mapping[str, Any], key: str, default: str, source: str) -> str:
    """A token's text in tokenizer_config.json: a string, or an object with its `content`."""
    value = settings.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    if value is None:
        return default
    if not isinstance(value, str) or not value:
        raise ValueError(f"{source}: {key} must be a token's text, got {value!r}")
    return value


def _chat_template(settings: Mapping[str, Any], source: str) -> str | None:
    """The template of tokenizer_config.json: a string, or a list in which one is the default."""
    value = settings.get("chat_template")
    if isinstance(value, list):
        named = [t for t in value if isinstance(t, dict) and t.get("name") == "default"]
        value = named[0].get("template") if named else None
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{source}: chat_template must be a text, got {type(value).__name__}")
    return value


def _checked_text(text: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"tokenizer: text must be a str, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise ValueError(
            f"tokenizer: text is not Unicode: {text[e.start]!r} at character {e.start}"
        ) from e
    return text


def _gemma_role(role: str) -> str:
    return "model" if role == "assistant" else role


def _checked_messages(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    if not messages:
        raise ValueError("chat: there is no message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"chat: message {i} must be a mapping, got {type(message).__name__}")
        role, content = message.get("role"), message.get("content")
        if role == "system":
            raise ValueError(
                f"chat: message {i} has the role 'system', which Gemma lacks; say it in the first "
                "message of the user"
            )
        if role not in ("user", "assistant", "model"):
            raise ValueError(f"chat: message {i} must be by 'user' or 'assistant', got {role!r}")
        if (role == "user") != (i % 2 == 0):
            raise ValueError(f"chat: roles alternate, 'user' first: message {i} is by {role!r}")
        if not isinstance(content, str):
            raise TypeError(
                f"chat: the content of message {i} must be a str, got {type(content).__name__}"
            )
    return [dict(message) for message in messages]
