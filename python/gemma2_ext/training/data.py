"""Training data: documents of token ids, in memory or mapped, cut into sequences and packed.

A document is its text's ids with <eos> behind. It is cut into pieces of at most `sequence_length`
tokens; a piece of ids t becomes the sequence <bos> t[:-1] with the targets t, so that every token
is a target once an epoch. Whole pieces are packed, best fit first, into batches of at most
`batch_tokens`; attention keeps to a piece. Which pieces a batch holds is a function of seed, epoch
and index alone: a run resumes anywhere without a state.

A shard (`gemma2-ext tokenize`, `teach`) is: 8 bytes of magic; 8 bytes, the length of the header
(little-endian); the header, a JSON object that places each array; the arrays, 64-byte aligned:
`tokens`, `ends` (of documents), and from `teach` `top_ids` and `top_log_probs`.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import named, open_regular, parse_json, shown
from ..tokenizer import Tokenizer

MAGIC = b"GEMMA2TK"
FORMAT = 1
HEADER_BYTES = 4096  # reserved in front of the arrays: their number is known before their sizes
ALIGNMENT = 64
# Characters encoded at a time, from a line's start to a line's end.
TEXT_CHARACTERS = 1 << 20
_ARRAYS = {
    "tokens": ("uint16", "uint32"),
    "ends": ("int64",),
    "top_ids": ("uint16", "uint32"),
    "top_log_probs": ("float16",),
}


@dataclass(frozen=True)
class Documents:
    """Token ids of documents that lie one behind another.

    Args:
        name: where they come from, for messages.
        tokens: (tokens,) uint16 or uint32; every document ends with <eos>.
        ends: (documents,) int64, where each ends, ascending.
        num_bytes: UTF-8 bytes of their text; None: not known.
        top_ids, top_log_probs: (tokens, top_k), the teacher's most probable tokens in each token's
            place and their log-probabilities; None: none are stored.
        teacher: what the shard's header says about that teacher.
        first: index of tokens[0] in what `name` holds.
    """

    name: str
    tokens: np.ndarray
    ends: np.ndarray
    num_bytes: int | None = None
    top_ids: np.ndarray | None = None
    top_log_probs: np.ndarray | None = None
    teacher: dict[str, Any] = field(default_factory=dict)
    first: int = 0


def fingerprint(tokenizer: Tokenizer) -> str:
    """What tells vocabularies apart: a digest of the text and ids of sample strings."""
    probe = [tokenizer.vocab_size, tokenizer.bos_id, *tokenizer.eos_ids]
    probe += tokenizer.encode(_PROBE, add_bos=False)
    step = max(1, tokenizer.vocab_size // 997)
    pieces = [tokenizer.decode([i], False) for i in range(0, tokenizer.vocab_size, step)]
    return hashlib.sha256(json.dumps([probe, pieces]).encode()).hexdigest()


_PROBE = (
    "The quick brown fox; 3.14159, \u00e4\u00f6\u00fc \u4f60\u597d\n\n\tdef f(x):\n    return x\n"
)


# Reading


def read_documents(path: Path, text_field: str | None) -> Iterator[str]:
    """The texts of a file: a JSON Lines file's field, or the whole of any other.

    Args:
        path: *.jsonl, or UTF-8 text.
        text_field: the field of a line's object.

    Raises:
        OSError: it cannot be read.
        ValueError: names file and line or byte: not UTF-8, not JSON, no such field, no text.
    """
    with named(path), open(open_regular(path), "rb") as file:
        if path.suffix != ".jsonl":
            yield _decoded(file.read(), str(path))
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            values = parse_json(line, where)
            if text_field not in values:
                raise ValueError(
                    f"{where}: has no field {shown(text_field)}, only {shown(sorted(values))}"
                )
            text = values[text_field]
            if not isinstance(text, str):
                raise ValueError(
                    f"{where}: {shown(text_field)} must be a text, got {type(text).__name__}"
                )
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise ValueError(f"{where}: {shown(text_field)} holds half a character") from None
            yield text


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None


def encode_document(tokenizer: Tokenizer, text: str, plain: bool = False) -> list[int]:
    """Ids of a text and <eos>; a long one in parts that begin with a line.

    Args:
        tokenizer: the vocabulary.
        text: a document.
        plain: whether control tokens written in it are letters like others.
    """
    ids: list[int] = []
    begin = 0
    while begin < len(text):
        end = begin + TEXT_CHARACTERS
        # No token of a Gemma reaches over a newline into a word.
        while end < len(text) and (text[end - 1] != "\n" or text[end].isspace()):
            end += 1
        part = text[begin:end]
        ids += tokenizer.encode_plain(part) if plain else tokenizer.encode(part, add_bos=False)
        begin = end
    return [*ids, tokenizer.eos_ids[0]]


def load_documents(
    paths: Sequence[str | os.PathLike[str]],
    tokenizer: Tokenizer,
    *,
    text_field: str = "text",
    plain: bool = False,
) -> list[Documents]:
    """Files of text, JSON Lines (*.jsonl) or shards, one Documents each.

    Args:
        paths: the files; a shard is known by its first bytes and is mapped, not read.
        tokenizer: encodes text; a shard must have been made with it.
        text_field: of the objects in JSON Lines.
        plain: whether control tokens written in a text are letters like others.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged, holds no text, or was made with another tokenizer.
    """
    result = []
    for path in map(Path, paths):
        with named(path), open(open_regular(path), "rb") as file:
            is_shard = file.read(len(MAGIC)) == MAGIC
        if is_shard:
            result.append(open_shard(path, tokenizer))
            continue
        ids: list[np.ndarray] = []
        num_bytes = 0
        for text in read_documents(path, text_field):
            if text:
                ids.append(np.array(encode_document(tokenizer, text, plain), _id_dtype(tokenizer)))
                num_bytes += len(text.encode("utf-8"))
        if not ids:
            raise ValueError(f"{path}: holds no text")
        ends = np.cumsum([len(i) for i in ids], dtype=np.int64)
        result.append(Documents(str(path), np.concatenate(ids), ends, num_bytes))
    return result


def open_shard(path: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> Documents:
    """Maps a shard; its arrays are read where and when they are used.

    Args:
        path: the file.
        tokenizer: that it must have been made with; None: not checked.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no shard, is truncated, or was made with another tokenizer.
    """
    path = Path(path)
    with named(path), open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(HEADER_BYTES)
    if start[: len(MAGIC)] != MAGIC or len(start) < HEADER_BYTES:
        raise ValueError(f"{path}: not a shard of tokens, or truncated")
    length = int.from_bytes(start[8:16], "little")
    if length > HEADER_BYTES - 16:
        raise ValueError(f"{path}: the header must have at most {HEADER_BYTES - 16} bytes")
    header = parse_json(start[16 : 16 + length], f"{path}: header")
    if header.get("format") != FORMAT:
        raise ValueError(f"{path}: format must be {FORMAT}, got {shown(header.get('format'))}")
    if tokenizer is not None and header.get("tokenizer") != fingerprint(tokenizer):
        raise ValueError(f"{path}: was made with another tokenizer")
    arrays = {
        name: _mapped(path, name, entry, size)
        for name, entry in _object(path, header, "arrays").items()
    }
    for name in ("tokens", "ends"):
        if name not in arrays:
            raise ValueError(f"{path}: header: arrays lack {name}")
    tokens, ends = arrays["tokens"], np.array(arrays["ends"])
    if len(ends) == 0 or ends[0] < 1 or (np.diff(ends) < 1).any() or ends[-1] != len(tokens):
        raise ValueError(f"{path}: ends must ascend from 1 to the number of tokens")
    top_ids, top_log_probs = arrays.get("top_ids"), arrays.get("top_log_probs")
    shapes = {a.shape for a in (top_ids, top_log_probs) if a is not None}
    if (top_ids is None) != (top_log_probs is None) or len(shapes) > 1:
        raise ValueError(f"{path}: top_ids and top_log_probs must be there both, of one shape")
    if top_ids is not None and (top_ids.ndim != 2 or len(top_ids) != len(tokens)):
        raise ValueError(f"{path}: top_ids must have shape (tokens, top_k), got {top_ids.shape}")
    num_bytes = header.get("bytes")
    return Documents(
        str(path),
        tokens,
        ends,
        num_bytes if type(num_bytes) is int else None,
        top_ids,
        top_log_probs,
        _object(path, header, "teacher") if top_ids is not None else {},
    )


def _object(path: Path, header: dict[str, Any], name: str) -> dict[str, Any]:
    value = header.get(name)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: header: {name} must be an object, got {shown(value)}")
    return value


def _mapped(path: Path, name: str, entry: Any, size: int) -> np.ndarray:
    if (
        name not in _ARRAYS
        or not isinstance(entry, dict)
        or entry.get("dtype") not in _ARRAYS[name]
        or not isinstance(entry.get("shape"), list)
        or not all(type(n) is int and 0 <= n < 1 << 48 for n in entry["shape"])
        or len(entry["shape"]) not in (1, 2)
        or type(entry.get("offset")) is not int
    ):
        raise ValueError(f"{path}: header: array {shown(name)} is {shown(entry)}")
    dtype, shape, offset = np.dtype(entry["dtype"]), tuple(entry["shape"]), entry["offset"]
    count = shape[0] * (shape[1] if len(shape) == 2 else 1)
    if offset < HEADER_BYTES or offset + count * dtype.itemsize > size:
        raise ValueError(
            f"{path}: is truncated: array {name} ends at byte {offset + count * dtype.itemsize}, "
            f"the file at {size}"
        )
    if count == 0:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", offset, shape)


# Writing


def _id_dtype(tokenizer: Tokenizer) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _header(arrays: dict[str, tuple[Any, tuple[int, ...]]], **facts: Any) -> tuple[bytes, int]:
    """The first HEADER_BYTES of a shard with these dtypes and shapes, and the whole file's size."""
    offset, places = HEADER_BYTES, {}
    for name, (dtype, shape) in arrays.items():
        places[name] = {"dtype": np.dtype(dtype).name, "shape": list(shape), "offset": offset}
        offset = _aligned(offset + int(np.prod(shape)) * np.dtype(dtype).itemsize)
    text = json.dumps({"format": FORMAT, **facts, "arrays": places}).encode()
    if len(text) > HEADER_BYTES - 16:
        raise ValueError("shard: the header is too long; shorten the teacher's path")
    return (MAGIC + len(text).to_bytes(8, "little") + text).ljust(HEADER_BYTES, b" "), offset


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A name beside path to write to; it takes path's place when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_shard(
    path: str | os.PathLike[str], documents: Iterable[tuple[str, list[int]]], tokenizer: Tokenizer
) -> Documents:
    """Writes documents' ids to a shard as they come.

    Args:
        path: the file, replaced at once when all is written.
        documents: (text, ids with <eos>) of each.
        tokenizer: that made them.

    Returns:
        The shard, mapped.

    Raises:
        ValueError: there is no document.
        OSError: the file cannot be written.
    """
    path, dtype = Path(path), np.dtype(_id_dtype(tokenizer))
    ends: list[int] = []
    total = num_bytes = 0
    with replaced(path) as partial, open(partial, "wb") as file:
        file.seek(HEADER_BYTES)
        for text, ids in documents:
            file.write(np.array(ids, dtype).tobytes())
            total += len(ids)
            num_bytes += len(text.encode("utf-8"))
            ends.append(total)
        if not ends:
            raise ValueError(f"{path}: there is no document to write")
        header, size = _header(
            {"tokens": (dtype, (total,)), "ends": (np.int64, (len(ends),))},
            bytes=num_bytes,
            vocab_size=tokenizer.vocab_size,
            tokenizer=fingerprint(tokenizer),
        )
        file.seek(_aligned(HEADER_BYTES + total * dtype.itemsize))
        file.write(np.array(ends, np.int64).tobytes())
        file.truncate(size)
        file.seek(0)
        file.write(header)
    return open_shard(path)


@contextmanager
def new_teacher_shard(
    path: str | os.PathLike[str],
    tokens: np.ndarray,
    ends: np.ndarray,
    num_bytes: int | None,
    tokenizer: Tokenizer,
    top_k: int,
    teacher: dict[str, Any],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A shard with room for a teacher's log-probabilities, which the block fills.

    Args:
        path: the file, replaced at once when the block ends.
        tokens, ends, num_bytes: as in Documents.
        tokenizer: that made the tokens.
        top_k: most probable tokens stored for each token.
        teacher: facts for the header.

    Yields:
        top_ids and top_log_probs, (tokens, top_k), mapped.
    """
    path, dtype = Path(path), _id_dtype(tokenizer)
    arrays: dict[str, tuple[Any, tuple[int, ...]]] = {
        "tokens": (tokens.dtype, tokens.shape),
        "ends": (np.int64, ends.shape),
        "top_ids": (dtype, (len(tokens), top_k)),
        "top_log_probs": (np.float16, (len(tokens), top_k)),
    }
    header, size = _header(
        arrays,
        bytes=num_bytes,
        vocab_size=tokenizer.vocab_size,
        tokenizer=fingerprint(tokenizer),
        teacher=teacher,
    )
    places = json.loads(header[16:].strip())["arrays"]
    with replaced(path) as partial:
        with open(partial, "wb") as file:
            file.truncate(size)
            file.write(header)
        maps = {
            name: np.memmap(partial, np_dtype, "r+", places[name]["offset"], shape)
            for name, (np_dtype, shape) in arrays.items()
        }
        maps["tokens"][:], maps["ends"][:] = tokens, ends
        yield maps["top_ids"], maps["top_log_probs"]
        for array in maps.values():
            array.flush()


# Cutting and packing


def split_held_out(
    documents: Documents, share: float, tokenizer: Tokenizer
) -> tuple[Documents, Documents]:
    """Documents without their last share of tokens, and that share.

    The cut is between documents, or inside where there is one only.

    Raises:
        ValueError: one side would be empty.
    """
    tokens, ends = documents.tokens, documents.ends
    cut = int(len(tokens) * (1 - share))
    if len(ends) > 1:
        cut = int(ends[np.abs(ends[:-1] - cut).argmin()])
    if not 0 < cut < len(tokens):
        raise ValueError(f"{documents.name}: too short to hold {share:g} of it out")
    at = int(np.searchsorted(ends, cut, side="right"))
    first_ends = ends[:at] if at and ends[at - 1] == cut else np.append(ends[:at], cut)
    parts = []
    for begin, stop, part_ends in ((0, cut, first_ends), (cut, len(tokens), ends[at:] - cut)):
        text = tokenizer.decode(tokens[begin:stop].tolist())
        part = replace(
            documents,
            tokens=tokens[begin:stop],
            ends=part_ends,
            num_bytes=len(text.encode("utf-8")),
            first=documents.first + begin,
        )
        if documents.top_ids is not None and documents.top_log_probs is not None:
            part = replace(
                part,
                top_ids=documents.top_ids[begin:stop],
                top_log_probs=documents.top_log_probs[begin:stop],
            )
        parts.append(part)
    return parts[0], parts[1]


@dataclass(frozen=True)
class Batch:
    """Sequences packed one behind another.

    Args:
        input_ids: (tokens,) int64.
        targets: (tokens,) int64, the token behind each.
        cu_seqlens: (sequences + 1,) int32.
        max_seqlen: length of the longest sequence.
        name: which tokens of which files these are.
        rows: (tokens,) int64, where each target lies among all tokens of the sources.
        top_ids, top_log_probs: (tokens, top_k), a stored teacher's, or None.
    """

    input_ids: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    name: str
    rows: Tensor
    top_ids: Tensor | None = None
    top_log_probs: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on a device."""
        values: dict[str, Any] = {
            k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()
        }
        return Batch(**values)


class _Plan(NamedTuple):
    """Pieces in the order of batches, and where each batch begins among them."""

    begins: np.ndarray
    ends: np.ndarray
    bounds: np.ndarray


class Batches:
    """Documents as batches, in an order of its own for each epoch.

    Args:
        sources: the documents.
        bos_id: the token in front of every sequence.
        vocab_size: of the model.
        sequence_length: the most tokens of a sequence.
        batch_tokens: the most tokens of a batch, at least sequence_length.
        seed: of the orders; None: as the documents lie, every epoch.
        shift: whether an epoch cuts long documents at other places than the last; a stored teacher
            needs its own cuts.

    Raises:
        ValueError: batch_tokens is below sequence_length.
    """

    def __init__(
        self,
        sources: Sequence[Documents],
        bos_id: int,
        vocab_size: int,
        sequence_length: int,
        batch_tokens: int,
        *,
        seed: int | None,
        shift: bool = True,
    ) -> None:
        if not 1 <= sequence_length <= batch_tokens:
            raise ValueError(
                f"batches: sequence_length must be between 1 and batch_tokens = {batch_tokens}, "
                f"got {sequence_length}"
            )
        self.sources = list(sources)
        self.bos_id = bos_id
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.batch_tokens = batch_tokens
        self.seed = seed
        self.shift = shift and seed is not None
        # Index of each source's first token among all, and one past the last.
        self.offsets = np.cumsum([0, *(len(s.tokens) for s in self.sources)], dtype=np.int64)
        self._plans: dict[int, _Plan] = {}

    @property
    def num_tokens(self) -> int:
        """Targets of an epoch."""
        return int(self.offsets[-1])

    def count(self, epoch: int) -> int:
        """Batches of an epoch."""
        return len(self._plan(epoch).bounds) - 1

    def size(self, epoch: int, index: int) -> int:
        """Tokens of a batch, without reading them."""
        plan = self._plan(epoch)
        pieces = slice(plan.bounds[index], plan.bounds[index + 1])
        return int((plan.ends[pieces] - plan.begins[pieces]).sum())

    def following(self, position: tuple[int, int], count: int) -> list[tuple[int, int]]:
        """The (epoch, index) of `count` batches from a position on."""
        epoch, index = position
        result: list[tuple[int, int]] = []
        while len(result) < count:
            if index >= self.count(epoch):
                epoch, index = epoch + 1, 0
            result.append((epoch, index))
            index += 1
        return result

    def get(self, epoch: int, index: int) -> Batch:
        """Reads a batch.

        Raises:
            ValueError: a file holds an id outside the vocabulary.
        """
        plan = self._plan(epoch)
        inputs, targets, lengths, names, spans = [], [], [], [], []
        top_ids, top_log_probs = [], []
        for piece in range(plan.bounds[index], plan.bounds[index + 1]):
            begin, end = int(plan.begins[piece]), int(plan.ends[piece])
            at = int(np.searchsorted(self.offsets, begin, side="right")) - 1
            source, rows = self.sources[at], slice(begin - self.offsets[at], end - self.offsets[at])
            ids = source.tokens[rows].astype(np.int64)
            if ids.max() >= self.vocab_size:
                raise ValueError(
                    f"{source.name}: token ids must be below vocab_size = {self.vocab_size}, "
                    f"got {ids.max()}"
                )
            targets.append(ids)
            inputs += [np.array([self.bos_id]), ids[:-1]]
            lengths.append(end - begin)
            spans.append((begin, end))
            names.append(f"{source.name}[{rows.start + source.first}:{rows.stop + source.first}]")
            if source.top_ids is not None and source.top_log_probs is not None:
                top_ids.append(source.top_ids[rows].astype(np.int64))
                top_log_probs.append(source.top_log_probs[rows].astype(np.float32))
        stored = len(top_ids) == len(targets)
        return Batch(
            torch.from_numpy(np.concatenate(inputs)),
            torch.from_numpy(np.concatenate(targets)),
            torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
            max(lengths),
            f"batch {index} of epoch {epoch}: tokens " + ", ".join(names),
            torch.cat([torch.arange(*span) for span in spans]),
            torch.from_numpy(np.concatenate(top_ids)) if stored else None,
            torch.from_numpy(np.concatenate(top_log_probs)) if stored else None,
        )

    def _plan(self, epoch: int) -> _Plan:
        """An epoch cut and packed; the last two are kept, as a step may reach over both."""
        if epoch in self._plans:
            return self._plans[epoch]
        generator = None if self.seed is None else np.random.default_rng((self.seed, epoch))
        begins, ends = self._pieces(generator)
        if generator is not None:
            order = generator.permutation(len(begins))
            begins, ends = begins[order], ends[order]
        batch_of = pack(ends - begins, self.batch_tokens)
        count = int(batch_of.max()) + 1
        if generator is not None:
            batch_of = generator.permutation(count)[batch_of]
        order = np.argsort(batch_of, kind="stable")
        bounds = np.searchsorted(batch_of[order], np.arange(count + 1))
        self._plans = {
            **dict(list(self._plans.items())[-1:]),
            epoch: _Plan(begins[order], ends[order], bounds),
        }
        return self._plans[epoch]

    def _pieces(self, generator: np.random.Generator | None) -> tuple[np.ndarray, np.ndarray]:
        """Begins and ends of all pieces among all tokens."""
        ends = np.concatenate(
            [s.ends + o for s, o in zip(self.sources, self.offsets, strict=False)]
        )
        begins = np.concatenate([[0], ends[:-1]])
        length, sizes = self.sequence_length, ends - begins
        first = np.minimum(sizes, length)
        if generator is not None and self.shift:
            drawn = generator.integers(1, length + 1, len(sizes))
            first = np.where(sizes > length, drawn, first)
        counts = 1 + -(-(sizes - first) // length)
        document = np.repeat(np.arange(len(sizes)), counts)
        index = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
        piece_ends = np.minimum(begins[document] + first[document] + index * length, ends[document])
        piece_begins = np.where(
            index == 0, begins[document], begins[document] + first[document] + (index - 1) * length
        )
        return piece_begins, piece_ends


def pack(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each piece: the longest first, each where it leaves the least room.

    Args:
        lengths: (pieces,), each from 1 to capacity.
        capacity: of a bin.

    Returns:
        (pieces,) int64, bins counted from 0. At most one bin stays half empty.
    """
    result = np.empty(len(lengths), np.int64)
    rooms: list[int] = []  # what open bins have left, each number once, ascending
    bins_with: dict[int, list[int]] = {}
    count = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, bin_ = capacity, count
            count += 1
        else:
            room = rooms[at]
            bin_ = bins_with[room].pop()
            if not bins_with[room]:
                del bins_with[room], rooms[at]
        left = room - length
        if left:
            if left not in bins_with:
                bins_with[left] = []
                insort(rooms, left)
            bins_with[left].append(bin_)
        result[piece] = bin_
    return result
