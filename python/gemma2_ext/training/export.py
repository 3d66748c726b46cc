"""A trained model as a Hugging Face folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..config import Gemma2Config, read_json
from ..weights import save_weights

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"),
    *("special_tokens_map.json", "added_tokens.json"),
)
GENERATION_CONFIG = "generation_config.json"


def export_model(
    folder: Path, weights: Mapping[str, Tensor], config: Gemma2Config, tokenizer: Path | None
) -> None:
    """Writes weights, config.json, generation_config.json and the tokenizer's files.

    Args:
        folder: made where it is not there; a checkpoint in it is replaced.
        weights: fused, of one dtype.
        config: of the model.
        tokenizer: a folder whose tokenizer files are copied; None: none are.

    Raises:
        OSError: a file cannot be read or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generation: dict[str, object] = {}
    if tokenizer is not None:
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file() and tokenizer.resolve() != folder.resolve():
                partial = folder / f".{name}.{os.getpid()}"
                shutil.copyfile(tokenizer / name, partial)
                os.replace(partial, folder / name)
        if (tokenizer / GENERATION_CONFIG).is_file():
            generation = read_json(tokenizer / GENERATION_CONFIG)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name)
        generation[name] = list(value) if isinstance(value, tuple) else value
    config.save_pretrained(folder, dtype=next(iter(weights.values())).dtype)
    partial = folder / f".{GENERATION_CONFIG}.{os.getpid()}"
    partial.write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / GENERATION_CONFIG)
    save_weights(folder, weights, config)
