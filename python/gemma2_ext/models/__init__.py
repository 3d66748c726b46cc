"""The small model that ships in the package."""

from __future__ import annotations

from pathlib import Path


def shipped_model() -> Path:
    """The folder of the small Gemma 2 that writes Shakespeare, for `Gemma2.from_pretrained`.

    Raises:
        FileNotFoundError: the package was installed without its models.
    """
    folder = Path(__file__).parent / "shakespeare"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder}: this installation lacks the model that ships in the package; "
            "name a model folder instead"
        )
    return folder
