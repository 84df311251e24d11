"""Where a model and its tokenizer are: a folder, a model known by name, or one of the hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vdr_db.checkpoints.assets import fetch, is_known
from vdr_db.checkpoints.tokenizers import TOKENIZER_FILES, read_tokenizer, tokenizer_of
from vdr_db.errors import ConfigError, require
from vdr_db.text.tokenization import AnyTokenizer, TextTokenizer

__all__ = ["find_tokenizer", "locate_model"]

# Everything any layout reads, and nothing else: no code, no ONNX copies, no TensorFlow weights.
_HUB_FILES = ("*.json", "*.txt", "*.safetensors", "*.model", "sparse_linear.pt")
_HUB_BIN = "pytorch_model*.bin"
_TOKENIZER_PATTERNS = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("*.model",),
)


def locate_model(name: str | os.PathLike[str], revision: str | None) -> tuple[Path, str]:
    """Folder of a model and its revision, `""` for a folder of the caller's or a known model.

    A folder wins over a name of `assets`, and that over the id of a model on the hub.

    Raises:
        ConfigError: There is no such folder, no model of that name, and none on the hub.
        MissingExtraError: A hub id needs `huggingface_hub`.
    """
    text = os.fspath(name)
    path = Path(text).expanduser()
    if text and path.is_dir():
        return path, revision or ""
    if is_known(text):
        return fetch(text), ""
    if path.is_file() or text.startswith((".", "/", "~")) or text.count("/") > 1 or not text:
        raise ConfigError(
            f"{text!r} must be a model folder or the id of a model on the hub, got "
            f"{'a file' if path.is_file() else 'a path where nothing is'}; check the path."
        )
    folder = _download(text, revision, _HUB_FILES)
    if not any(folder.rglob("*.safetensors")):
        folder = _download(text, revision, (*_HUB_FILES, _HUB_BIN))
    return folder, folder.name


def _download(name: str, revision: str | None, files: tuple[str, ...]) -> Path:
    hub = require("huggingface_hub", "torch")
    try:
        found = hub.snapshot_download(name, revision=revision, allow_patterns=list(files))
    except Exception as error:  # no network, no such model, no right to it: many kinds
        raise ConfigError(
            f"{name!r} is no folder here and cannot be had from the hub: {error}; "
            "check the spelling, or fetch the model and pass its folder."
        ) from error
    return Path(found)


def find_tokenizer(
    places: Sequence[Path],
    given: AnyTokenizer | None,
    *,
    hub_id: str | None = None,
    lower_case: bool = False,
) -> TextTokenizer:
    """The tokenizer of a model.

    Args:
        places: Folders that may hold it, the likeliest first.
        given: What the caller passed instead, or None.
        hub_id: Model on the hub whose tokenizer is meant when no folder holds one.
        lower_case: Lower-case texts first.

    Raises:
        ConfigError: There is none, or it is damaged.
    """
    if given is not None:
        return tokenizer_of(given, lower_case=lower_case)
    for place in places:
        if any((place / name).is_file() for name in TOKENIZER_FILES):
            return read_tokenizer(place, lower_case=lower_case)
    if hub_id is None:
        return read_tokenizer(places[-1])  # says what is missing
    try:
        place = _download(hub_id, None, _TOKENIZER_PATTERNS)
    except ConfigError as error:
        raise ConfigError(
            f"{places[-1]} holds no tokenizer, and that of {hub_id!r} cannot be had from "
            "the hub; pass `tokenizer=` with a folder that holds its tokenizer.json."
        ) from error
    return read_tokenizer(place, lower_case=lower_case)
