"""Data for training: files, shards, cutting, packing, order."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2_ext.models import shipped_model
from gemma2_ext.tokenizer import Tokenizer
from gemma2_ext.training import data
from gemma2_ext.training.data import Batches, Documents, load_documents, pack, split_held_out

TOKENIZER = Tokenizer.from_pretrained(shipped_model())
TEXT = "".join(
    f"ROMEO:\nBut soft, what light number {i} through yonder window breaks?\n\n" for i in range(40)
)


def documents(*lengths: int, name: str = "made up") -> Documents:
    """Documents of these lengths whose tokens are 200, 201, ..."""
    tokens = np.arange(200, 200 + sum(lengths), dtype=np.uint16)
    return Documents(name, tokens, np.cumsum(lengths, dtype=np.int64))


def batches(sources: list[Documents], length: int, tokens: int, **options: object) -> Batches:
    return Batches(sources, 2, 1 << 15, length, tokens, **{"seed": 0, **options})  # type: ignore[arg-type]


def epoch(made: Batches, number: int) -> list[data.Batch]:
    return [made.get(number, i) for i in range(made.count(number))]


def test_text_and_json_lines_are_documents_that_end_with_eos(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Hello, world")
    lines = [{"text": "one"}, {"text": ""}, {"text": "two\nlines", "more": 1}]
    (tmp_path / "b.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    (tmp_path / "c.jsonl").write_text(json.dumps({"body": "one"}))
    text, rows = load_documents([tmp_path / "a.txt", tmp_path / "b.jsonl"], TOKENIZER)
    assert text.tokens.tolist() == [*TOKENIZER.encode("Hello, world", add_bos=False), 1]
    expected = [[*TOKENIZER.encode(t, add_bos=False), 1] for t in ("one", "two\nlines")]
    assert rows.tokens.tolist() == [*expected[0], *expected[1]]
    assert rows.ends.tolist() == [len(expected[0]), len(expected[0]) + len(expected[1])]
    assert (text.num_bytes, rows.num_bytes) == (12, 12)
    (other,) = load_documents([tmp_path / "c.jsonl"], TOKENIZER, text_field="body")
    assert other.tokens.tolist() == expected[0]


def test_control_tokens_count_unless_the_text_is_plain(tmp_path: Path) -> None:
    path = tmp_path / "chat.txt"
    path.write_text("<start_of_turn>user\nHi<end_of_turn>\n")
    (control,) = load_documents([path], TOKENIZER)
    (plain,) = load_documents([path], TOKENIZER, plain=True)
    assert 106 in control.tokens and 107 in control.tokens
    assert 106 not in plain.tokens and 107 not in plain.tokens


def test_a_long_text_is_encoded_in_parts_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = data.encode_document(TOKENIZER, TEXT)
    monkeypatch.setattr(data, "TEXT_CHARACTERS", 100)
    assert data.encode_document(TOKENIZER, TEXT) == whole


def test_a_shard_holds_what_the_text_does(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    (text,) = load_documents([path], TOKENIZER)
    pairs = [(t, data.encode_document(TOKENIZER, t)) for t in (TEXT, "short")]
    data.write_shard(tmp_path / "a.tokens", pairs, TOKENIZER)
    (shard,) = load_documents([tmp_path / "a.tokens"], TOKENIZER)
    assert isinstance(shard.tokens, np.memmap)
    assert np.array_equal(shard.tokens[: shard.ends[0]], text.tokens)
    assert len(shard.ends) == 2 and shard.num_bytes == len(TEXT) + 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tokens", "a.txt"]


def test_bad_files_are_named(tmp_path: Path) -> None:
    def refused(name: str, content: bytes, match: str, **options: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=match) as error:
            load_documents([tmp_path / name], TOKENIZER, **options)  # type: ignore[arg-type]
        assert str(tmp_path / name) in str(error.value)

    refused("a.txt", b"abc\xff", r"a.txt: not UTF-8 \(invalid start byte at byte 3\)")
    refused("b.txt", b"", "holds no text")
    refused("c.jsonl", b'{"text": "a"}\n{"text": }\n', r"c.jsonl:2: not valid JSON")
    refused("d.jsonl", b'{"text": "a"}\n\n["b"]\n', r"d.jsonl:3: must hold a JSON object")
    refused("e.jsonl", b'{"body": "a"}\n', r"e.jsonl:1: has no field 'text', only \['body'\]")
    refused("f.jsonl", b'{"text": 5}\n', r"f.jsonl:1: 'text' must be a text, got int")
    refused("g.jsonl", b'{"text": "\\ud800"}\n', r"g.jsonl:1: 'text' holds half a character")
    refused("h.jsonl", b'{"text": "\xff"}\n', r"h.jsonl:1: not UTF-8")
    refused("i.jsonl", b"\n\n", "holds no text")
    with pytest.raises(FileNotFoundError, match="missing.txt"):
        load_documents([tmp_path / "missing.txt"], TOKENIZER)


def test_bad_shards_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    data.write_shard(path, [(TEXT, data.encode_document(TOKENIZER, TEXT))], TOKENIZER)
    good = path.read_bytes()

    def refused(content: bytes, match: str) -> None:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=match):
            load_documents([path], TOKENIZER)

    refused(good[:100], "not a shard of tokens, or truncated")
    refused(good[:5000], r"is truncated: array \w+ ends at byte \d+, the file at 5000")
    refused(good.replace(b'"format": 1', b'"format": 9'), "format must be 1, got 9")
    refused(good.replace(b"tokenizer", b"tokenizzz"), "was made with another tokenizer")
    refused(good.replace(b'"uint16"', b'"object"'), "header: array 'tokens' is")
    refused(good.replace(b'"ends"', b'"eggs"'), "header: array 'eggs' is")
    refused(good[:8] + b"\xff" * 8 + good[16:], "the header must have at most")
    count = len(data.encode_document(TOKENIZER, TEXT))
    refused(good.replace(count.to_bytes(8, "little"), bytes(8)), "ends must ascend from 1")
    with pytest.raises(ValueError, match="there is no document to write"):
        data.write_shard(tmp_path / "b.tokens", [], TOKENIZER)
    assert not (tmp_path / "b.tokens").exists()


@given(st.lists(st.integers(1, 20), min_size=1, max_size=80), st.integers(20, 60))
@settings(max_examples=50, deadline=None)
def test_bins_hold_no_more_than_they_can(lengths: list[int], capacity: int) -> None:
    bins = pack(np.array(lengths), capacity)
    filled = np.bincount(bins, weights=lengths)
    assert filled.max() <= capacity and filled.min() > 0
    assert (filled <= capacity / 2).sum() <= 1


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=12),
    st.integers(1, 20),
    st.integers(0, 30),
    st.sampled_from([None, 0, 7]),
)
@settings(max_examples=50, deadline=None)
def test_every_token_is_a_target_once_an_epoch(
    lengths: list[int], length: int, more: int, seed: int | None
) -> None:
    half = len(lengths) // 2
    parts = [lengths[:half], lengths[half:]] if half else [lengths]
    sources, offset = [], 0
    for part in parts:
        source = documents(*part)
        source.tokens[:] += offset
        offset += sum(part)
        sources.append(source)
    made = batches(sources, length, length + more, seed=seed)
    firsts = {200 + int(e) for e in np.cumsum([0, *lengths])[:-1]}
    for number in range(2):
        seen = []
        for index, batch in enumerate(epoch(made, number)):
            assert len(batch.targets) == made.size(number, index) <= length + more
            assert batch.cu_seqlens[-1] == len(batch.targets)
            assert batch.max_seqlen == int(batch.cu_seqlens.diff().max()) <= length
            assert torch.equal(batch.rows, batch.targets - 200)
            for begin, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
                inputs, targets = batch.input_ids[begin:end], batch.targets[begin:end]
                assert inputs[0] == 2 and torch.equal(inputs[1:], targets[:-1])
                run = targets.tolist()
                assert run == list(range(run[0], run[0] + len(run)))
                assert not firsts & set(run[1:]), "a sequence reaches over two documents"
            seen += batch.targets.tolist()
        assert sorted(seen) == list(range(200, 200 + sum(lengths)))


def test_order_is_that_of_seed_and_epoch() -> None:
    source = documents(*range(1, 40))

    def order(made: Batches, number: int) -> list[int]:
        return [t for batch in epoch(made, number) for t in batch.targets.tolist()]

    made = batches([source], 8, 16)
    first, second = order(made, 0), order(made, 1)
    assert first != second
    again = batches([source], 8, 16)
    assert order(again, 1) == second and order(again, 0) == first  # in any order of asking
    assert order(batches([source], 8, 16, seed=1), 0) != first
    plain = batches([source], 8, 16, seed=None)
    assert order(plain, 0) == order(plain, 5)


def test_long_documents_are_cut_elsewhere_each_epoch_unless_told_not_to() -> None:
    def begins(made: Batches, number: int) -> set[int]:
        return {
            int(batch.targets[begin])
            for batch in epoch(made, number)
            for begin in batch.cu_seqlens[:-1]
        }

    shifted = batches([documents(1000)], 100, 200)
    assert len({frozenset(begins(shifted, e)) for e in range(4)}) > 1
    fixed = batches([documents(1000)], 100, 200, shift=False)
    assert all(begins(fixed, e) == set(range(200, 1200, 100)) for e in range(4))


def test_positions_run_on_over_epochs() -> None:
    made = batches([documents(64)], 8, 16, shift=False)
    assert made.count(0) == 4
    assert made.following((0, 2), 4) == [(0, 2), (0, 3), (1, 0), (1, 1)]
    assert made.following((0, 4), 1) == [(1, 0)]


def test_a_batch_names_its_tokens_and_wrong_ids() -> None:
    made = batches([documents(30, name="a.txt"), documents(10, name="b.txt")], 30, 40, seed=None)
    assert made.get(0, 0).name == "batch 0 of epoch 0: tokens a.txt[0:30], b.txt[0:10]"
    small = Batches([documents(5, name="a.txt")], 2, 203, 8, 8, seed=0)
    message = "a.txt: token ids must be below vocab_size = 203, got 204"
    with pytest.raises(ValueError, match=message):
        small.get(0, 0)
    with pytest.raises(ValueError, match="sequence_length must be between 1 and batch_tokens = 4"):
        batches([documents(5)], 5, 4)


def test_the_held_out_share_is_the_last_one() -> None:
    ids = np.array(data.encode_document(TOKENIZER, TEXT), np.uint16)
    one = Documents("one", ids, np.array([len(ids)]), len(TEXT))
    first, second = split_held_out(one, 0.25, TOKENIZER)
    assert np.array_equal(np.concatenate([first.tokens, second.tokens]), ids)
    assert len(second.tokens) == len(ids) - int(len(ids) * 0.75)
    assert first.ends.tolist() == [len(first.tokens)] and second.ends.tolist() == [
        len(second.tokens)
    ]
    assert (first.num_bytes or 0) + (second.num_bytes or 0) == len(TEXT)
    assert second.first == len(first.tokens)

    several = documents(10, 10, 10, 10)
    first, second = split_held_out(several, 0.3, TOKENIZER)
    assert first.ends.tolist() == [10, 20, 30] and second.ends.tolist() == [10]
    with pytest.raises(ValueError, match="too short to hold 0.1 of it out"):
        split_held_out(documents(1), 0.1, TOKENIZER)
