"""Model folders as wholes: their JSON files read, and new ones put in place all at once."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from vdr_db.border import foreign
from vdr_db.errors import ConfigError

__all__ = ["settings_of", "understood", "written_folder"]


def settings_of(file: Path) -> dict[str, Any]:
    """A JSON object out of a file.

    Raises:
        ConfigError: The file is missing or no JSON object.
    """
    try:
        loaded = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{file} is missing; fetch the whole model folder.") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}; fetch it again.") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{file} must hold a JSON object, got {type(loaded).__name__}.")
    return loaded


def understood(folder: Path) -> AbstractContextManager[None]:
    """Names the folder where a file of it holds something of a kind that nobody expected.

    Raises:
        ConfigError: Instead of the errors of Python and other libraries for such values and sizes.
    """
    return foreign(f"a file in {folder}", ConfigError, "fetch the model again")


@contextmanager
def written_folder(folder: str | os.PathLike[str], marker: str) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `folder` when all went well.

    Args:
        folder: Where to; made with its parents if need be.
        marker: A file that only encoders of this kind have: a folder with it may be replaced.

    Raises:
        ConfigError: The place holds something else, or cannot be written.
    """
    target = Path(folder).absolute()
    replaces = (target / marker).is_file()
    if target.exists() and not replaces and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(
            f"{target} must be free, empty or an encoder saved before, got something else; "
            "choose another folder."
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _replaced(target) as fresh:
            yield fresh
    except OSError as error:
        raise ConfigError(
            f"{target} cannot be written: {error}; choose a folder on a disk that can be "
            "written and has room."
        ) from error


@contextmanager
def _replaced(target: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `target` when all went well."""
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".new", dir=target.parent))
    try:
        yield fresh
        fresh.chmod(0o755)
        if not target.exists() or not any(target.iterdir()):
            fresh.replace(target)
            return
        old = fresh.with_suffix(".old")
        target.rename(old)
        try:
            fresh.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
