"""A Gemma 2 model's configuration: Hugging Face's config.json, checked field by field.

What transformers' Gemma2Config can say either works here or is refused by name: nothing that
changes the result is ignored.
Source: transformers `models/gemma2` (4.42 to 5.x); arXiv 2408.00118.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

LOCAL, GLOBAL = "sliding_attention", "full_attention"

MAX_HEAD_DIM = 256
MAX_JSON_BYTES = 64 << 20

# Sizes without a default, and limits far past any Gemma 2: the bytes of all weights, or of a cache,
# stay below 2^63. Positions are rounded to float32 in RoPE, which holds integers up to 2^24.
_REQUIRED = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
}
_LIMITS = {**_REQUIRED, "max_position_embeddings": 1 << 24, "sliding_window": (1 << 31) - 1}
# Fields that are no part of the computation here unless they say more than this.
_REFUSED_FLAGS = {
    "attention_bias": "biases in the attention projections are",
    "use_bidirectional_attention": "bidirectional attention is",
    "is_encoder_decoder": "an encoder is",
    "add_cross_attention": "cross attention is",
}
_ARCHITECTURES = ("Gemma2ForCausalLM", "Gemma2Model")


@dataclass(frozen=True)
class Gemma2Config:
    """A model's sizes and constants, by Hugging Face's names; checked when made.

    Args:
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width of the gate, and of up.
        num_hidden_layers: layers.
        num_attention_heads: query heads, a multiple of num_key_value_heads.
        num_key_value_heads: key and value heads.
        head_dim: of every head; a multiple of 8, at most 256.
        hidden_activation: "gelu_pytorch_tanh".
        max_position_embeddings: the context, in tokens.
        rms_norm_eps: added to the mean of squares.
        rope_theta: base of RoPE's wavelengths.
        query_pre_attn_scalar: attention scores are multiplied by its power -0.5.
        sliding_window: keys that a local layer's query sees, itself included.
        layer_types: "sliding_attention" or "full_attention" for each layer; None: in turns,
            beginning with sliding_attention.
        attn_logit_softcapping: cap of attention scores; None: no cap.
        final_logit_softcapping: cap of logits; None: no cap.
        pad_token_id, bos_token_id: ids in the vocabulary, or None.
        eos_token_id: one id or several that end a text, or None.
        tie_word_embeddings: True: the embedding gives the logits too.

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a value out of range, or values that do not fit together.
        NotImplementedError: a feature outside Gemma 2 as published.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    query_pre_attn_scalar: float = 256
    sliding_window: int = 4096
    # None only until __post_init__ has put the default there.
    layer_types: tuple[str, ...] = None  # type: ignore[assignment]
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0
    pad_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    bos_token_id: int | None = 2
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.sliding_window is None:
            raise NotImplementedError(
                f"{_OWN}sliding_window must be an int, got None: make a layer global by layer_types"
            )
        for name, limit in _LIMITS.items():
            _check_int(name, getattr(self, name), 1, limit)
        for name in ("rms_norm_eps", "rope_theta", "query_pre_attn_scalar"):
            _check_positive(name, getattr(self, name))
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name), " or null for no cap")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{_OWN}num_attention_heads must be a multiple of num_key_value_heads = "
                f"{self.num_key_value_heads}, got {self.num_attention_heads}"
            )
        if self.head_dim % 8 or self.head_dim > MAX_HEAD_DIM:
            raise ValueError(
                f"{_OWN}head_dim must be a multiple of 8 of at most {MAX_HEAD_DIM}, "
                f"got {self.head_dim}"
            )
        if not isinstance(self.hidden_activation, str):
            raise TypeError(_wrong("hidden_activation", "a string", self.hidden_activation))
        if self.hidden_activation != "gelu_pytorch_tanh":
            raise NotImplementedError(
                f"{_OWN}hidden_activation must be 'gelu_pytorch_tanh', "
                f"got {shown(self.hidden_activation)}"
            )
        if not isinstance(self.tie_word_embeddings, bool):
            raise TypeError(
                _wrong("tie_word_embeddings", "true or false", self.tie_word_embeddings)
            )
        if not self.tie_word_embeddings:
            raise NotImplementedError(
                f"{_OWN}tie_word_embeddings must be true, got False: "
                "an output matrix apart from the embedding is not supported"
            )
        object.__setattr__(self, "layer_types", self._checked_layer_types())
        for name in ("pad_token_id", "bos_token_id"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, self.vocab_size - 1)
        eos = self.eos_token_id
        if isinstance(eos, list | tuple):
            object.__setattr__(self, "eos_token_id", tuple(eos))
        for token in eos if isinstance(eos, list | tuple) else () if eos is None else (eos,):
            _check_int("eos_token_id", token, 0, self.vocab_size - 1)

    def _checked_layer_types(self) -> tuple[str, ...]:
        layers = self.num_hidden_layers
        kinds: Any = self.layer_types
        if kinds is None:
            return tuple((LOCAL, GLOBAL)[i % 2] for i in range(layers))
        if not isinstance(kinds, list | tuple):
            raise TypeError(_wrong("layer_types", "a list", kinds))
        if len(kinds) != layers:
            raise ValueError(
                f"{_OWN}layer_types must have an entry for each of num_hidden_layers = {layers}, "
                f"got {len(kinds)}"
            )
        for i, kind in enumerate(kinds):
            if kind not in (LOCAL, GLOBAL):
                raise ValueError(
                    f"{_OWN}layer_types[{i}] must be '{LOCAL}' or '{GLOBAL}', got {shown(kind)}"
                )
        return tuple(kinds)

    @classmethod
    def gemma2_2b(cls) -> Gemma2Config:
        """Gemma 2 2B."""
        return cls(256000, 2304, 9216, 26, 8, 4, 256)

    @classmethod
    def gemma2_9b(cls) -> Gemma2Config:
        """Gemma 2 9B."""
        return cls(256000, 3584, 14336, 42, 16, 8, 256)

    @classmethod
    def gemma2_27b(cls) -> Gemma2Config:
        """Gemma 2 27B; its attention scale is 144 ** -0.5, not from head_dim."""
        return cls(256000, 4608, 36864, 46, 32, 16, 128, query_pre_attn_scalar=144)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config") -> Gemma2Config:
        """The configuration that a config.json's object says.

        Args:
            values: the object, with what any version of transformers writes; fields that do not
                touch the computation (dropout, dtype, cache_implementation, ...) are passed over.
            source: where it comes from, for error messages.

        Raises:
            ValueError, TypeError, NotImplementedError: each names source, field and value.
        """
        try:
            return cls(**_fields_of(values))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise type(error)(f"{source}: {str(error).removeprefix(_OWN)}") from None

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Gemma2Config:
        """Reads config.json, and from generation_config.json, where there is one, eos_token_id.

        Raises:
            FileNotFoundError: no such folder, or no config.json in it.
            OSError: a file cannot be read.
            ValueError, TypeError, NotImplementedError: each names file, field and value.
        """
        folder = check_folder(folder)
        path = folder / "config.json"
        values = read_json(path)
        config = cls.from_dict(values, source=str(path))
        path = folder / "generation_config.json"
        # A link to nowhere is an error, not an absent file.
        if os.path.lexists(path):
            eos = read_json(path).get("eos_token_id")
            if eos is not None:
                config = cls.from_dict({**values, "eos_token_id": eos}, source=str(path))
        return config

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds; every transformers since 4.42 reads it."""
        values: dict[str, Any] = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}
        for field in fields(self):
            value = getattr(self, field.name)
            values[field.name] = list(value) if isinstance(value, tuple) else value
        return values

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        quantization: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Writes config.json; an interruption leaves the old file or the new one.

        quantization: "int8" or "int4" beside weights that are packed so.
        dtype: of the weights beside it, which others then load it in; None: not said.
        """
        os.makedirs(folder, exist_ok=True)
        path = Path(folder) / "config.json"
        partial = path.with_name(f".config.json.{os.getpid()}")
        values = self.to_dict()
        if dtype is not None:
            values["dtype"] = str(dtype).removeprefix("torch.")
        if quantization is not None:
            values["quantization_config"] = quantization_config(quantization)
        try:
            with open(partial, "w", encoding="utf-8") as file:
                file.write(json.dumps(values, indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @property
    def softmax_scale(self) -> float:
        """query_pre_attn_scalar ** -0.5, by which attention scores are multiplied."""
        return self.query_pre_attn_scalar**-0.5

    @property
    def num_parameters(self) -> int:
        """Weights of the model, the embedding counted once."""
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        layer = self.hidden_size * (heads * self.head_dim + 3 * self.intermediate_size + 4)
        return self.hidden_size * (self.vocab_size + 1) + self.num_hidden_layers * layer

    def embedding_scale(self, dtype: torch.dtype) -> float:
        """sqrt(hidden_size) rounded to float32, then to the weights' dtype."""
        return torch.tensor(self.hidden_size**0.5).to(dtype).item()

    def is_local(self, layer: int) -> bool:
        """Whether layer (0-based) sees only the sliding window."""
        return self.layer_types[layer] == LOCAL


def check_folder(folder: str | os.PathLike[str]) -> Path:
    """The path of a checkpoint's folder.

    Raises:
        FileNotFoundError: there is none.
        NotADirectoryError: it is a file.
    """
    path = Path(folder)
    if "\0" in os.fspath(path):
        raise FileNotFoundError(f"{shown(os.fspath(path))}: no such folder")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such folder; a checkpoint has to be downloaded first")
    if not path.is_dir():
        raise NotADirectoryError(f"{path}: not a folder; a checkpoint is a folder with config.json")
    return path


def read_bytes(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """A whole small file.

    Raises:
        FileNotFoundError, PermissionError, OSError: it cannot be read.
        ValueError: it is larger than limit bytes, not a regular file, or a Git LFS pointer.
    """
    with named(path), open(open_regular(path), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path}: must be at most {limit} bytes, is larger")
    check_not_lfs_pointer(path, data)
    return data


def open_regular(path: Path) -> int:
    """A descriptor to read a file from, which the caller closes.

    Raises:
        FileNotFoundError, PermissionError, OSError: it cannot be opened.
        ValueError: it is a folder, a pipe or a device.
    """
    with named(path):
        # Without O_NONBLOCK, opening a pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path}: not a regular file")
    return descriptor


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Puts a file's name into any OSError of the block."""
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from None


def check_not_lfs_pointer(path: Path, start: bytes) -> None:
    """Raises ValueError where a file is what Git LFS leaves in place of one it did not fetch."""
    if start.startswith(b"version https://git-lfs.github.com/"):
        raise ValueError(
            f"{path}: is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
        )


def parse_json(text: bytes, source: str) -> dict[str, Any]:
    """A JSON object in UTF-8.

    Raises:
        ValueError: it is something else, or names a field twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"field {shown(twice)} stands there twice")
        return values

    try:
        values = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 (byte {error.start})") from None
    except ValueError as error:
        raise ValueError(f"{source}: not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{source}: not valid JSON: nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"{source}: must hold a JSON object, got {shown(values)}")
    return values


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file; raises what `read_bytes` and `parse_json` raise."""
    return parse_json(read_bytes(path, limit), str(path))


# In front of a message until a file's name takes its place.
_OWN = "Gemma2Config: "


def shown(value: object) -> str:
    """A value for an error message, in at most 80 characters of ASCII."""
    try:
        text = ascii(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        text = f"{type(value).__name__} of thousands of digits"
    except RecursionError:  # as deep as the JSON parser just bears
        text = f"{type(value).__name__} nested too deeply"
    return text if len(text) <= 80 else text[:77] + "..."


def quantization_config(format: str) -> dict[str, str]:
    """What config.json says beside packed weights, which keeps other programs from loading them."""
    return {"quant_method": "gemma2_ext", "format": format}


def _wrong(name: str, expected: str, value: object) -> str:
    return f"{_OWN}{name} must be {expected}, got {shown(value)} ({type(value).__name__})"


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int:
        raise TypeError(_wrong(name, "an int", value))
    if not low <= value <= high:
        raise ValueError(f"{_OWN}{name} must be between {low} and {high}, got {shown(value)}")


def _check_positive(name: str, value: object, otherwise: str = "") -> None:
    if type(value) not in (int, float):
        raise TypeError(_wrong(name, f"a number{otherwise}", value))
    # Bounds: float32, in which kernels compute, without its subnormal numbers.
    low, high = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    if not low <= value <= high:  # type: ignore[operator]  # false for NaN too
        raise ValueError(f"{_OWN}{name} must be positive and finite{otherwise}, got {shown(value)}")


def _fields_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma2Config's arguments from a config.json's object; refuses what they cannot say."""
    model_type = values.get("model_type", "gemma2")
    if model_type != "gemma2":
        raise NotImplementedError(f"model_type must be 'gemma2', got {shown(model_type)}")
    architectures = values.get("architectures") or []
    if not isinstance(architectures, list):
        raise TypeError(_wrong("architectures", "a list", architectures))
    for architecture in architectures:
        if architecture not in _ARCHITECTURES:
            raise NotImplementedError(
                f"architectures must be of {_ARCHITECTURES}, got {shown(architecture)}"
            )
    for name, what in _REFUSED_FLAGS.items():
        value = values.get(name)
        if value is True:
            raise NotImplementedError(f"{name} must be false, got True: {what} not supported")
        if value is not None and value is not False:
            raise TypeError(_wrong(name, "true or false", value))
    packed = [None, *(quantization_config(format) for format in ("int8", "int4"))]
    if values.get("quantization_config") not in packed:
        raise NotImplementedError(
            "quantization_config must be absent, "
            f"got {shown(values['quantization_config'])}: load a checkpoint that is not quantized"
        )
    missing = [name for name in _REQUIRED if name not in values]
    if missing:
        raise ValueError(f"{_OWN}lacks {', '.join(missing)}")
    names = [field.name for field in fields(Gemma2Config)]
    arguments = {name: values[name] for name in names if name in values}
    for name in ("hidden_activation", "tie_word_embeddings"):
        if arguments.get(name, "") is None:
            del arguments[name]
    # Early checkpoints say "gelu" in hidden_act and mean tanh-GELU: hidden_activation rules, and
    # where it is absent transformers takes tanh-GELU too.
    hidden_act = values.get("hidden_act")
    if "hidden_activation" not in arguments and hidden_act not in (
        None,
        "gelu",
        "gelu_pytorch_tanh",
    ):
        raise NotImplementedError(
            f"hidden_act must be 'gelu_pytorch_tanh', got {shown(hidden_act)}"
        )
    arguments["rope_theta"] = _rope_theta(values)
    return arguments


def _rope_theta(values: Mapping[str, Any]) -> object:
    """RoPE's base from `rope_theta` (transformers before 5) and `rope_parameters` (from 5 on)."""
    thetas = {}
    if values.get("rope_theta") is not None:
        thetas["rope_theta"] = values["rope_theta"]
    _check_whole_rotation("partial_rotary_factor", values.get("partial_rotary_factor"))
    for name in ("rope_parameters", "rope_scaling"):
        parameters = values.get(name)
        if parameters is None:
            continue
        if not isinstance(parameters, dict):
            raise TypeError(_wrong(name, "an object", parameters))
        nested = {
            f"{name}.{kind}": parameters[kind] for kind in (LOCAL, GLOBAL) if kind in parameters
        }
        rest = {key: value for key, value in parameters.items() if key not in (LOCAL, GLOBAL)}
        for path, part in {name: rest, **nested}.items():
            if part is None:
                continue
            if not isinstance(part, dict):
                raise TypeError(_wrong(path, "an object", part))
            theta = _unscaled_theta(path, part)
            if theta is not None:
                thetas[f"{path}.rope_theta"] = theta
    for path, theta in thetas.items():
        _check_positive(path, theta)
    (first, theta), *others = thetas.items() or {"rope_theta": 10000.0}.items()
    for path, other in others:
        if other != theta:
            raise NotImplementedError(
                f"{_OWN}{path} must equal {first} = {theta}, got {other}: "
                "one rotation for all layers is supported"
            )
    return theta


def _unscaled_theta(path: str, parameters: Mapping[str, Any]) -> object:
    for key, value in parameters.items():
        if key in ("rope_type", "type"):
            if value not in (None, "default"):
                raise NotImplementedError(
                    f"{path}.{key} must be 'default', got {shown(value)}: "
                    "scaled RoPE is not supported"
                )
        elif key == "partial_rotary_factor":
            _check_whole_rotation(f"{path}.{key}", value)
        elif key != "rope_theta" and value is not None:
            raise NotImplementedError(
                f"{path}.{shown(key)} must be absent, got {shown(value)}: "
                "scaled RoPE is not supported"
            )
    return parameters.get("rope_theta")


def _check_whole_rotation(name: str, value: object) -> None:
    if value is not None and (isinstance(value, bool) or value != 1):
        raise NotImplementedError(
            f"{name} must be 1, got {shown(value)}: rotating a part of a head is not supported"
        )
