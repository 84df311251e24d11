"""Digests of weights and graphs of folders of this library, compared when they are loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from vdr_db.checkpoints.folders import settings_of
from vdr_db.digest import file_digest
from vdr_db.errors import ConfigError

__all__ = ["DIGESTS", "check_digests", "graph_digests", "weight_digests"]

DIGESTS = "digests"
"""Key of a settings file: path of each file of weights or of a graph -> SHA-256 (hex)."""


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
