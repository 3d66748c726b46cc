"""Configurations: the published models, transformers' own files, and whatever else files hold."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2_ext import Gemma2Config
from gemma2_ext.models import shipped_model
from gemma2_ext.weights import memory_needed

MODELS = {
    "2b": Gemma2Config.gemma2_2b(),
    "9b": Gemma2Config.gemma2_9b(),
    "27b": Gemma2Config.gemma2_27b(),
}
SMALL = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
# Every field at another value than its default.
UNUSUAL = Gemma2Config(
    **SMALL,
    max_position_embeddings=77,
    rms_norm_eps=1e-5,
    rope_theta=500.0,
    query_pre_attn_scalar=20,
    sliding_window=9,
    layer_types=("full_attention", "sliding_attention", "full_attention"),
    attn_logit_softcapping=None,
    final_logit_softcapping=12.5,
    pad_token_id=3,
    eos_token_id=(1, 63),
    bos_token_id=None,
)
# As the release of Gemma 2 wrote it.
PUBLISHED_27B = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 128,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 4608,
    "initializer_range": 0.02,
    "intermediate_size": 36864,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 144,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "sliding_window_size": 4096,
    "torch_dtype": "float32",
    "transformers_version": "4.42.0.dev0",
    "use_cache": True,
    "vocab_size": 256000,
}


def from_dict(**changes: Any) -> Gemma2Config:
    return Gemma2Config.from_dict({**SMALL, **changes}, source="a file")


@pytest.mark.parametrize(
    ("name", "parameters"), [("2b", 2614341888), ("9b", 9241705984), ("27b", 27227128320)]
)
def test_parameters_of_the_published_models(name: str, parameters: int) -> None:
    config = MODELS[name]
    assert config.num_parameters == parameters
    # Their every tensor fills whole cache lines.
    assert memory_needed(config, torch.bfloat16) == 2 * parameters
    assert config.layer_types[:3] == ("sliding_attention", "full_attention", "sliding_attention")
    assert [config.is_local(i) for i in range(4)] == [True, False, True, False]


def test_attention_scale_is_not_from_the_head_size() -> None:
    assert MODELS["2b"].softmax_scale == 256**-0.5
    assert MODELS["9b"].softmax_scale == 256**-0.5 == 1 / 16  # 3584 / 16 heads would be 224
    assert MODELS["27b"].softmax_scale == 144**-0.5 == 1 / 12  # head_dim is 128


def test_num_parameters_is_that_of_transformers() -> None:
    from transformers import Gemma2Config as Theirs
    from transformers import Gemma2ForCausalLM

    for config in (MODELS["27b"], UNUSUAL):
        with torch.device("meta"):
            model = Gemma2ForCausalLM(Theirs(**config.to_dict()))
        assert config.num_parameters == model.num_parameters()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden_size", [2304, 3584, 4608, 24, 1])
def test_embedding_scale(hidden_size: int, dtype: torch.dtype) -> None:
    from transformers.models.gemma2 import modeling_gemma2

    scale = dataclasses.replace(UNUSUAL, hidden_size=hidden_size).embedding_scale(dtype)
    assert scale == torch.tensor(math.sqrt(hidden_size)).to(dtype).item()
    theirs = modeling_gemma2.Gemma2TextScaledWordEmbedding(
        1, hidden_size, 0, embed_scale=hidden_size**0.5
    )
    with torch.no_grad():
        theirs.to(dtype).weight.fill_(1.0)
    assert (theirs(torch.tensor([0])) == scale).all()


def test_embedding_scale_rounds() -> None:
    # sqrt(3584) = 59.867, which bfloat16 holds as 59.75 or 60.
    assert MODELS["9b"].embedding_scale(torch.bfloat16) == 59.75
    assert MODELS["9b"].embedding_scale(torch.float16) == 59.875
    assert MODELS["2b"].embedding_scale(torch.bfloat16) == 48.0


# What files say


def test_reads_what_transformers_writes(tmp_path: Path) -> None:
    from transformers import Gemma2Config as Theirs

    # The defaults of transformers are Gemma 2 2B.
    assert Gemma2Config.from_dict(Theirs().to_dict()) == MODELS["2b"]
    for config in (*MODELS.values(), UNUSUAL):
        theirs = Theirs(**config.to_dict())
        assert Gemma2Config.from_dict(theirs.to_dict()) == config
        theirs.save_pretrained(tmp_path)
        assert Gemma2Config.from_pretrained(tmp_path) == config


def test_transformers_reads_ours(tmp_path: Path) -> None:
    from transformers import AutoConfig

    for config in (*MODELS.values(), UNUSUAL):
        config.save_pretrained(tmp_path)
        theirs = AutoConfig.from_pretrained(tmp_path)
        assert type(theirs).__name__ == "Gemma2Config"
        assert theirs.rope_parameters == {"rope_theta": config.rope_theta, "rope_type": "default"}
        for name, value in config.to_dict().items():
            if name != "rope_theta":
                assert getattr(theirs, name) == value, name


def test_reads_the_published_file() -> None:
    assert Gemma2Config.from_dict(PUBLISHED_27B) == MODELS["27b"]


@pytest.mark.parametrize("config", [*MODELS.values(), UNUSUAL], ids=[*MODELS, "unusual"])
def test_round_trip(config: Gemma2Config, tmp_path: Path) -> None:
    assert Gemma2Config.from_dict(config.to_dict()) == config
    config.save_pretrained(tmp_path / "new" / "folder")
    assert Gemma2Config.from_pretrained(tmp_path / "new" / "folder") == config
    assert os.listdir(tmp_path / "new" / "folder") == ["config.json"]
    assert hash(config) == hash(dataclasses.replace(config))


def test_reads_the_shipped_model() -> None:
    config = Gemma2Config.from_pretrained(str(shipped_model()))
    assert config.eos_token_id == (1, 107)


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"hidden_activation": None}, "hidden_activation", "gelu_pytorch_tanh"),
        ({"hidden_act": "gelu"}, "hidden_activation", "gelu_pytorch_tanh"),
        # hidden_activation rules where both are there, as in transformers.
        (
            {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"},
            "hidden_activation",
            "gelu_pytorch_tanh",
        ),
        ({"tie_word_embeddings": None}, "tie_word_embeddings", True),
        ({"layer_types": None}, "layer_types", (*UNUSUAL.layer_types[1:], "sliding_attention")),
        ({"rope_theta": None}, "rope_theta", 10000.0),
        ({"rope_theta": 500}, "rope_theta", 500),
        ({"rope_parameters": {"rope_theta": 7.0}}, "rope_theta", 7.0),
        ({"rope_parameters": {"rope_theta": 7.0, "factor": None}}, "rope_theta", 7.0),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_type": "default"}}, "rope_theta", 7.0),
        ({"rope_scaling": {"type": "default", "rope_theta": 7}}, "rope_theta", 7),
        (
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_theta": 7.0, "partial_rotary_factor": 1.0},
                    "full_attention": {"rope_theta": 7.0, "rope_type": "default"},
                }
            },
            "rope_theta",
            7.0,
        ),
        ({"rope_parameters": {"full_attention": None}}, "rope_theta", 10000.0),
        ({"attn_logit_softcapping": None}, "attn_logit_softcapping", None),
        ({"final_logit_softcapping": None}, "final_logit_softcapping", None),
        ({"final_logit_softcapping": 30}, "final_logit_softcapping", 30),
        ({"eos_token_id": [1, 63]}, "eos_token_id", (1, 63)),
        ({"eos_token_id": None}, "eos_token_id", None),
        ({"pad_token_id": None}, "pad_token_id", None),
        ({"architectures": None, "attention_bias": None}, "attention_bias", None),
        ({"attention_dropout": 0.1, "use_cache": False, "": {}}, "use_cache", None),
    ],
)
def test_accepts(changes: dict[str, Any], field: str, value: Any) -> None:
    assert getattr(from_dict(**changes), field, None) == value


NOT_AN_INT = (True, False, 4.0, "4", None, [4], {}, float("nan"))
SIZES = (*SMALL, "max_position_embeddings", "sliding_window")


@pytest.mark.parametrize("field", SIZES)
def test_bad_sizes(field: str) -> None:
    for value in (0, -1, -(10**30), 1 << 40, 10**30, 10**5000):
        with pytest.raises(ValueError, match=rf"^a file: {field} must be between 1 and \d+, got "):
            from_dict(**{field: value})
    for value in NOT_AN_INT:
        kind, match = TypeError, r"an int, got .* \(\w+\)$"
        if field == "sliding_window" and value is None:
            kind, match = NotImplementedError, "an int, got None: make a layer global by layer_type"
        with pytest.raises(kind, match=f"^a file: {field} must be {match}"):
            from_dict(**{field: value})


@pytest.mark.parametrize(
    "field",
    [
        "rms_norm_eps",
        "rope_theta",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    ],
)
def test_bad_numbers(field: str) -> None:
    nan, inf = float("nan"), float("inf")
    for value in (0, 0.0, -0.0, -1, -50.0, nan, inf, -inf, 1e39, 1e-39, 10**400, -(10**400)):
        with pytest.raises(ValueError, match=f"^a file: {field} must be positive and finite"):
            from_dict(**{field: value})
    optional = field.endswith("softcapping")
    for value in (
        True,
        "50.0",
        [50.0],
        {},
        *(() if optional or field == "rope_theta" else (None,)),
    ):
        with pytest.raises(TypeError, match=f"^a file: {field} must be a number.*, got "):
            from_dict(**{field: value})


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_key_value_heads": 3}, ValueError, "multiple of num_key_value_heads = 3, got 4"),
    ({"num_key_value_heads": 8}, ValueError, "multiple of num_key_value_heads = 8, got 4"),
    ({"head_dim": 12}, ValueError, "head_dim must be a multiple of 8 of at most 256, got 12"),
    ({"head_dim": 264}, ValueError, "head_dim must be a multiple of 8 of at most 256, got 264"),
    ({"layer_types": []}, ValueError, "layer_types .* num_hidden_layers = 3, got 0"),
    ({"layer_types": ["full_attention"] * 4}, ValueError, "num_hidden_layers = 3, got 4"),
    (
        {"layer_types": ["full_attention", "chunked_attention", None]},
        ValueError,
        r"layer_types\[1\] must be 'sliding_attention' or 'full_attention', got 'chunked",
    ),
    ({"layer_types": ["full_attention"] * 2 + [["x"]]}, ValueError, r"layer_types\[2\].*\['x'\]"),
    ({"layer_types": "full_attention"}, TypeError, "layer_types must be a list, got 'full_atten"),
    ({"layer_types": 3}, TypeError, "layer_types must be a list, got 3"),
    ({"hidden_activation": "gelu"}, NotImplementedError, "hidden_activation must .*, got 'gelu'"),
    ({"hidden_activation": "\n" + "x" * 999}, NotImplementedError, r"got '\\nx+\.\.\.$"),
    ({"hidden_activation": 1}, TypeError, r"hidden_activation must be a string, got 1 \(int\)"),
    ({"hidden_act": "silu"}, NotImplementedError, "hidden_act must be 'gelu_pytorch_tanh', got "),
    ({"hidden_act": ["gelu"]}, NotImplementedError, "hidden_act must be .*got"),
    ({"tie_word_embeddings": False}, NotImplementedError, "tie_word_embeddings must be true, got"),
    ({"tie_word_embeddings": 1}, TypeError, "tie_word_embeddings must be true or false, got 1"),
    ({"pad_token_id": 64}, ValueError, "pad_token_id must be between 0 and 63, got 64"),
    ({"bos_token_id": -1}, ValueError, "bos_token_id must be between 0 and 63, got -1"),
    ({"bos_token_id": True}, TypeError, "bos_token_id must be an int, got True"),
    ({"bos_token_id": [2]}, TypeError, r"bos_token_id must be an int, got \[2\]"),
    ({"eos_token_id": [1, 107]}, ValueError, "eos_token_id must be between 0 and 63, got 107"),
    ({"eos_token_id": 1.0}, TypeError, "eos_token_id must be an int, got 1.0"),
    ({"eos_token_id": [True]}, TypeError, "eos_token_id must be an int, got True"),
    ({"eos_token_id": [[1]]}, TypeError, r"eos_token_id must be an int, got \[1\]"),
    ({"eos_token_id": {"a": 1}}, TypeError, "eos_token_id must be an int, got {'a': 1}"),
    ({"vocab_size": 2}, ValueError, "bos_token_id must be between 0 and 1, got 2"),
    ({"model_type": "gemma3_text"}, NotImplementedError, "model_type must be .*'gemma3_text'"),
    ({"model_type": None}, NotImplementedError, "model_type must be 'gemma2', got None"),
    (
        {"architectures": ["Gemma2ForSequenceClassification"]},
        NotImplementedError,
        "architectures must be of .*, got 'Gemma2ForSequenceClassification'",
    ),
    ({"architectures": "Gemma2Model"}, TypeError, "architectures must be a list"),
    ({"attention_bias": True}, NotImplementedError, "attention_bias must be false, got True: bias"),
    ({"attention_bias": 1}, TypeError, "attention_bias must be true or false, got 1"),
    ({"use_bidirectional_attention": True}, NotImplementedError, "bidirectional attention is not"),
    ({"is_encoder_decoder": True}, NotImplementedError, "is_encoder_decoder must be false"),
    ({"add_cross_attention": True}, NotImplementedError, "add_cross_attention must be false"),
    (
        {"quantization_config": {"bits": 4}},
        NotImplementedError,
        "quantization_config must be absent, got {'bits': 4}",
    ),
    (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        NotImplementedError,
        "rope_scaling.type must be 'default', got 'linear'",
    ),
    (
        {"rope_parameters": {"rope_type": "yarn"}},
        NotImplementedError,
        "rope_parameters.rope_type must be 'default', got 'yarn'",
    ),
    (
        {"rope_parameters": {"full_attention": {"rope_type": "llama3"}}},
        NotImplementedError,
        "rope_parameters.full_attention.rope_type must be 'default', got 'llama3'",
    ),
    (
        {"rope_parameters": {"factor": 8.0}},
        NotImplementedError,
        "rope_parameters.'factor' must be absent, got 8.0",
    ),
    ({"rope_parameters": {"rope_theta": -1}}, ValueError, "rope_parameters.rope_theta must be pos"),
    (
        {"rope_parameters": {"rope_theta": "1"}},
        TypeError,
        "rope_parameters.rope_theta must be a nu",
    ),
    ({"rope_parameters": []}, TypeError, "rope_parameters must be an object, got"),
    (
        {"rope_parameters": {"sliding_attention": 1}},
        TypeError,
        "rope_parameters.sliding_attention must be an object, got 1",
    ),
    (
        {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}},
        NotImplementedError,
        "rope_parameters.rope_theta must equal rope_theta = 5.0, got 6.0",
    ),
    (
        {
            "rope_parameters": {
                "sliding_attention": {"rope_theta": 1e4},
                "full_attention": {"rope_theta": 1e6},
            }
        },
        NotImplementedError,
        r"full_attention.rope_theta must equal .*sliding_attention.rope_theta = 10000.0, got 1000",
    ),
    ({"partial_rotary_factor": 0.5}, NotImplementedError, "partial_rotary_factor must be 1, got"),
    ({"partial_rotary_factor": True}, NotImplementedError, "partial_rotary_factor must be 1, got"),
    (
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        NotImplementedError,
        "rope_parameters.partial_rotary_factor must be 1, got 0.5",
    ),
]


@pytest.mark.parametrize(("changes", "kind", "match"), BAD)
def test_refuses(changes: dict[str, Any], kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=f"(?s)^a file: .*{match}"):
        from_dict(**changes)


def test_an_error_without_a_file_names_the_class() -> None:
    with pytest.raises(ValueError, match="^Gemma2Config: sliding_window must be between"):
        dataclasses.replace(UNUSUAL, sliding_window=-1)
    with pytest.raises(ValueError, match="^Gemma2Config: layer_types must have an entry"):
        dataclasses.replace(UNUSUAL, num_hidden_layers=4)


def test_missing_fields() -> None:
    for name in SMALL:
        values = {key: value for key, value in SMALL.items() if key != name}
        with pytest.raises(ValueError, match=f"^a file: lacks {name}$"):
            Gemma2Config.from_dict(values, source="a file")
    with pytest.raises(
        ValueError, match="^config: lacks vocab_size, hidden_size, inter.*head_dim$"
    ):
        Gemma2Config.from_dict({})


# Files that are not right


def write_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**SMALL, **changes}))


def assert_refused(folder: Path | str, kind: type[Exception], match: str) -> None:
    """That the error is exactly of this kind, in one line, and names what it is about."""
    with pytest.raises(kind, match=match) as info:
        Gemma2Config.from_pretrained(folder)
    assert type(info.value) is kind
    assert "\n" not in str(info.value)


def test_folder_errors(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere", FileNotFoundError, "nowhere: no such folder; a checkpoint")
    assert_refused("a\0b", FileNotFoundError, r"'a\\x00b': no such folder")
    (tmp_path / "file").touch()
    assert_refused(tmp_path / "file", NotADirectoryError, "file: not a folder")
    assert_refused(tmp_path, FileNotFoundError, "No such file.*/config.json")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_not_a_regular_file(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tmp_path)
    path = tmp_path / name
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / "nowhere")
    assert_refused(tmp_path, FileNotFoundError, f"No such file.*/{name}")
    path.unlink()
    path.symlink_to(path)
    assert_refused(tmp_path, OSError, f"symbolic links.*/{name}")
    path.unlink()
    path.mkdir()
    assert_refused(tmp_path, ValueError, f"/{name}: not a regular file$")
    path.rmdir()
    os.mkfifo(path)
    assert_refused(tmp_path, ValueError, f"/{name}: not a regular file$")
    path.unlink()
    path.symlink_to("/dev/zero")
    assert_refused(tmp_path, ValueError, f"/{name}: not a regular file$")
    path.unlink()
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        assert_refused(tmp_path, OSError, f"/{name}")


def test_a_link_to_a_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    write_config(tmp_path / "blobs")
    (tmp_path / "snapshot" / "config.json").symlink_to("../blobs/config.json")
    assert Gemma2Config.from_pretrained(tmp_path / "snapshot") == Gemma2Config(**SMALL)


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder in which any user may look around, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_unreadable(public_folder: Path) -> None:
    write_config(public_folder)
    (public_folder / "config.json").chmod(0)
    uid = os.geteuid()
    if uid == 0:  # root reads anything
        os.seteuid(65534)
    try:
        assert_refused(public_folder, PermissionError, "Permission denied.*/config.json")
    finally:
        os.seteuid(uid)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "not valid JSON: Expecting value"),
        (b"{", "not valid JSON"),
        (b"{} {}", "not valid JSON: Extra data"),
        (b'{"vocab_size": 1' + b"0" * 5000 + b"}", "not valid JSON: Exceeds the limit"),
        (b"\xff\xfe{\x00}\x00", r"not UTF-8 \(byte 0\)"),
        (b'{"vocab_size\xe9": 1}', r"not UTF-8 \(byte 12\)"),
        (b"\xef\xbb\xbf{}", "not valid JSON: Unexpected UTF-8 BOM"),
        (b"\x00" * 100, "not valid JSON"),
        (b"[" * 100_000, "not valid JSON: nested too deeply"),
        (b'{"a":' * 100_000, "not valid JSON: nested too deeply"),
        (b"[]", r"must hold a JSON object, got \[\]"),
        (b"null", "must hold a JSON object, got None"),
        (b'"' + b"x" * 500 + b'"', r"must hold a JSON object, got 'x{76}\.\.\.$"),
        (b'{"vocab_size": 1, "a": 2, "vocab_size": 3}', "field 'vocab_size' stands there twice"),
        (b'{"rope_scaling": {"b": 1, "b": 1}}', "field 'b' stands there twice"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7\nsize 1\n", "a Git LFS poin"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_not_json(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    write_config(tmp_path)
    (tmp_path / name).write_bytes(content)
    assert_refused(tmp_path, ValueError, f"/{name}: .*{match}")


def test_not_larger_than_any_configuration(tmp_path: Path) -> None:
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    assert_refused(tmp_path, ValueError, "config.json: must be at most 67108864 bytes, is larger")


def test_errors_name_the_file(tmp_path: Path) -> None:
    write_config(tmp_path, num_attention_heads=0)
    assert_refused(tmp_path, ValueError, "/config.json: num_attention_heads must be .*, got 0")
    # Python's parser takes these words for numbers.
    (tmp_path / "config.json").write_text(
        json.dumps({**SMALL, "attn_logit_softcapping": float("nan")})
    )
    assert_refused(tmp_path, ValueError, "/config.json: attn_logit_softcapping must .*, got nan")


def test_nesting_up_to_what_the_parser_bears(tmp_path: Path) -> None:
    """A value that can just be parsed cannot always be printed."""
    limit = sys.getrecursionlimit()
    for depth in range(limit - 150, limit + 10):
        nested = "[" * depth + "]" * depth
        text = json.dumps({**SMALL, "hidden_size": "X"}).replace('"X"', nested)
        (tmp_path / "config.json").write_text(text)
        with pytest.raises((TypeError, ValueError), match="nested too deeply|hidden_size must be"):
            Gemma2Config.from_pretrained(tmp_path)


def test_end_tokens_of_generation_config(tmp_path: Path) -> None:
    def eos(**values: Any) -> Any:
        (tmp_path / "generation_config.json").write_text(json.dumps(values))
        return Gemma2Config.from_pretrained(tmp_path).eos_token_id

    write_config(tmp_path, vocab_size=256, eos_token_id=5)
    assert Gemma2Config.from_pretrained(tmp_path).eos_token_id == 5
    assert eos(eos_token_id=[1, 107]) == (1, 107)
    assert eos(eos_token_id=7) == 7
    assert eos(eos_token_id=None) == eos() == 5
    for bad, kind in (
        (256, ValueError),
        ([1, 256], ValueError),
        (True, TypeError),
        ("1", TypeError),
    ):
        with pytest.raises(kind, match="generation_config.json: eos_token_id must be .*, got"):
            eos(eos_token_id=bad)
    # A fault of config.json is not blamed on the other file.
    write_config(tmp_path, eos_token_id=64)
    assert_refused(tmp_path, ValueError, "/config.json: eos_token_id must be")


def test_interrupted_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    UNUSUAL.save_pretrained(tmp_path)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, name, interrupted)
            MODELS["2b"].save_pretrained(tmp_path)
        assert Gemma2Config.from_pretrained(tmp_path) == UNUSUAL
        assert os.listdir(tmp_path) == ["config.json"]


# Whatever JSON can say

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 20)
    | st.floats()
    | st.text(max_size=10)
    | st.sampled_from(["sliding_attention", "full_attention", "default", "gelu_pytorch_tanh"]),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(max_size=5), inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["rope_theta", "rope_type", "type", "factor", "full_attention"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
FIELDS = sorted(
    {field.name for field in dataclasses.fields(Gemma2Config)}
    | PUBLISHED_27B.keys()
    | {"rope_parameters", "rope_scaling", "partial_rotary_factor", "quantization_config"}
    | {"use_bidirectional_attention", "is_encoder_decoder", "add_cross_attention"}
)
field_values = st.dictionaries(
    st.sampled_from(FIELDS) | st.text(max_size=5), json_values, min_size=1, max_size=3
)


def check_valid_or_refused(read: Callable[[], Gemma2Config], source: str) -> None:
    try:
        config = read()
    except (ValueError, TypeError, NotImplementedError) as error:
        assert type(error) in (ValueError, TypeError, NotImplementedError)
        assert str(error).startswith(f"{source}: ")
        assert str(error).isascii() and "\n" not in str(error)
        assert len(str(error)) < len(source) + 400
        return
    assert Gemma2Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert len(config.layer_types) == config.num_hidden_layers
    assert 0 < config.num_parameters <= memory_needed(config, torch.float32) < 1 << 63
    assert 0 < config.softmax_scale < float("inf")
    assert 0 < config.embedding_scale(torch.float16) < float("inf")


@settings(max_examples=400, deadline=None)
@given(changes=field_values)
def test_any_value_is_valid_or_refused(changes: dict[str, Any]) -> None:
    check_valid_or_refused(lambda: from_dict(**changes), "a file")


@settings(max_examples=150, deadline=None)
@given(values=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), json_values))
def test_any_object_is_valid_or_refused(values: dict[str, Any]) -> None:
    check_valid_or_refused(lambda: Gemma2Config.from_dict(values, "a file"), "a file")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_file_is_valid_or_refused(data: st.DataObject) -> None:
    text = bytearray(json.dumps({**SMALL, **data.draw(field_values)}).encode())
    for _ in range(data.draw(st.integers(0, 3))):
        begin = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(begin, min(begin + 9, len(text))))
        text[begin:end] = data.draw(st.binary(max_size=4))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_bytes(text)
        check_valid_or_refused(lambda: Gemma2Config.from_pretrained(folder), str(path))
