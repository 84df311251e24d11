"""Digests of weights and graphs of folders of this library, compared when they are loaded."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vdr_db.checkpoints.folders import settings_of
from vdr_db.checkpoints.weights import Weight, digest
from vdr_db.digest import file_digest
from vdr_db.errors import ConfigError
from vdr_db.towers.stored import StoredTensor

__all__ = [
    "DIGESTS",
    "check_digests",
    "graph_digests",
    "known_digest",
    "note_digest",
    "weight_digests",
]

DIGESTS = "digests"
"""Key of a settings file: path of each file of weights or of a graph -> SHA-256 (hex)."""

WEIGHTS = "weights"
"""Key of a settings file: digest of where all weights of an encoder lie -> that of their values."""


def weight_digests(folder: Path) -> dict[str, str]:
    """Path below a folder -> SHA-256 of every file of weights in it."""
    files = sorted(file for kind in ("safetensors", "bin") for file in folder.rglob(f"*.{kind}"))
    return {file.relative_to(folder).as_posix(): file_digest(file) for file in files}


def graph_digests(settings: Path, graphs: Iterable[Path]) -> dict[str, str]:
    """The digests in a settings file with those of graphs, which may lie beside its folder."""
    told = dict(settings_of(settings).get(DIGESTS) or {})
    for graph in graphs:
        told[Path(os.path.relpath(graph, settings.parent)).as_posix()] = file_digest(graph)
    return told


def check_digests(settings: Path) -> None:
    """Compares files of weights and graphs with their digests, where a settings file has them.

    Raises:
        ConfigError: A file is gone or another one.
    """
    told = settings_of(settings).get(DIGESTS)
    if told is None:
        return
    if not isinstance(told, Mapping):
        raise ConfigError(f"`{DIGESTS}` in {settings} must be an object, got {told!r}.")
    for name, expected in told.items():
        file = settings.parent / name
        try:
            if not file.is_file():  # a device has no end
                raise FileNotFoundError("there is no such file")
            found = file_digest(file)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file} cannot be read: {error}; fetch the model again.") from error
        if found != expected:
            raise ConfigError(
                f"{file} is damaged or was changed: its SHA-256 must be {expected}, got {found}; "
                f"fetch the model again, or take its name out of `{DIGESTS}` in {settings.name}."
            )


def note_digest(settings: Path, weights: Mapping[str, Weight]) -> None:
    """Writes the digest of an encoder's weights into a settings file, for `known_digest`.

    Args:
        settings: The file, which has the digests of the files that the weights lie in.
        weights: All of the encoder.
    """
    content = settings_of(settings)
    places = _digest_of_places(settings.parent, content, weights)
    if places is not None:
        told = {**content, WEIGHTS: {places: digest(weights)}}
        settings.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", "utf-8")


def known_digest(settings: Path, weights: Mapping[str, Weight]) -> str:
    """What `digest` gives, if a settings file tells it for just these places; else `""`.

    Only to be asked after `check_digests`: then the same places hold the same values, and to read
    a small file takes a thousandth of reading all weights.
    """
    content = settings_of(settings)
    told = content.get(WEIGHTS)
    if not isinstance(told, Mapping):
        return ""
    known = told.get(_digest_of_places(settings.parent, content, weights))
    return known if isinstance(known, str) else ""


def _digest_of_places(
    folder: Path, content: Mapping[str, Any], weights: Mapping[str, Weight]
) -> str | None:
    """SHA-256 (hex) of which bytes of which files all weights are; None where that is not known.

    Args:
        folder: Of the settings file.
        content: What that file holds.
        weights: All of an encoder.
    """
    told = content.get(DIGESTS) or {}
    digests = {(folder / name).resolve(): found for name, found in told.items()}
    stored = {weight.file for weight in weights.values() if isinstance(weight, StoredTensor)}
    files = {file: digests.get(file.resolve()) for file in stored}
    total = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name]
        if isinstance(weight, StoredTensor) and files[weight.file] is not None:
            place = f"{files[weight.file]} {weight.dtype} {weight.offset}"
        elif isinstance(weight, np.ndarray):
            place = hashlib.sha256(np.ascontiguousarray(weight).data).hexdigest()
        else:
            return None
        total.update(f"{name} {list(weight.shape)} {place}\n".encode())
    return total.hexdigest()
