"""The folder of an embedded collection: what lies in it, who holds it, and room on its disk.

    lock                        held while the collection is open
    damaged.txt                 only after the engine panicked: what it was doing
    shard/vdr_collection.json   the manifest
    shard/...                   the engine's files

The shard is built as `shard.new` and renamed when it is complete, so that a folder holds a whole
collection or none.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from vdr_db.connectors.qdrant.folder_lock import FolderLock
from vdr_db.errors import StoreMismatch, StoreUnavailable

__all__ = ["CollectionFolder"]

_SHARD = "shard"
_UNFINISHED = "shard.new"
_LOCK = "lock"
_DAMAGED = "damaged.txt"
_MANIFEST = "vdr_collection.json"


class CollectionFolder:
    """A folder that holds one collection, or will.

    Args:
        path: The folder.
        where: The collection and its place, for messages.
    """

    def __init__(self, path: Path, where: str) -> None:
        self.path = path
        self.where = where
        self._lock: FolderLock | None = None

    @property
    def shard(self) -> Path:
        """Where the engine's files are."""
        return self.path / _SHARD

    def holds_shard(self) -> bool:
        """Whether a collection is there; anything else there is a `StoreMismatch`."""
        try:
            present = set(os.listdir(self.path))
        except FileNotFoundError:
            return False
        except NotADirectoryError as error:
            raise StoreMismatch(
                f"{self.path} is a file, and a collection is a folder; choose another path."
            ) from error
        except OSError as error:
            raise StoreUnavailable(
                f"{self.where} cannot be read ({error}); check the rights on the folder."
            ) from error
        foreign = sorted(present - {_SHARD, _UNFINISHED, _LOCK, _DAMAGED})
        if foreign:
            raise StoreMismatch(
                f"{self.path} is no collection of this library: it holds {foreign[0]!r}; "
                "choose a folder of its own for the collection."
            )
        return _SHARD in present

    def make(self) -> None:
        """Makes the folder if need be."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreUnavailable(
                f"{self.where} cannot be made ({error}); choose a folder this process may write."
            ) from error

    def take(self) -> None:
        """Takes the lock."""
        if self._lock is None:
            self._lock = FolderLock(self.path / _LOCK, self.where)

    def release(self) -> None:
        """Lets go of the lock; a second call does nothing."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    def unfinished(self) -> Path:
        """Where to build a shard; what an interrupted attempt left there is removed."""
        path = self.path / _UNFINISHED
        shutil.rmtree(path, ignore_errors=True)
        return path

    def finish(self, manifest: dict[str, Any]) -> None:
        """Writes the manifest and turns what was built into the shard, at once."""
        unfinished = self.path / _UNFINISHED
        self.write_manifest(manifest, unfinished)
        unfinished.rename(self.shard)

    def write_manifest(self, manifest: dict[str, Any], folder: Path | None = None) -> None:
        """Writes the manifest, whole or not at all."""
        place = (folder or self.shard) / _MANIFEST
        new = place.with_suffix(".new")
        with new.open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        new.replace(place)

    def read_manifest(self) -> Any:
        """The manifest as JSON types, `None` when it is not JSON."""
        try:
            return json.loads((self.shard / _MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise StoreMismatch(
                f"{self.where} lacks its description {_SHARD}/{_MANIFEST}, so its encoder is not "
                "known; restore the file from a backup, or build the collection again."
            ) from error
        except OSError as error:
            raise StoreUnavailable(
                f"{self.where} cannot be read ({error}); check the rights on the folder."
            ) from error
        except ValueError:
            return None

    def note_damage(self, told: str) -> None:
        """Leaves a sentence for whoever opens the folder next."""
        with contextlib.suppress(OSError):
            (self.path / _DAMAGED).write_text(told, encoding="utf-8")

    def damage(self) -> str:
        """The sentence `note_damage` left, or `""`."""
        try:
            return (self.path / _DAMAGED).read_text(encoding="utf-8")
        except OSError:
            return ""

    def clear_damage(self) -> None:
        """Removes that sentence: the collection opened all the same."""
        (self.path / _DAMAGED).unlink(missing_ok=True)

    def free_bytes(self) -> int:
        """Free space on the disk of the folder."""
        return shutil.disk_usage(self.path).free

    def used_bytes(self) -> int:
        """Space its files take on the disk; their apparent size is larger, they have holes."""
        total = 0
        for folder, _, files in os.walk(self.path):
            for name in files:
                with contextlib.suppress(OSError):
                    status = os.stat(os.path.join(folder, name))
                    total += getattr(status, "st_blocks", status.st_size // 512) * 512
        return total
