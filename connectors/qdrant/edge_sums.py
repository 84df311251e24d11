"""Checksums of an embedded collection: of each row, of its files at rest, of the last row written.

The engine replays its log up to the first entry it cannot read and says nothing of the rest, and it
trusts its data files. So each row carries a sum in its payload, a collection that was closed keeps
sums of its files, and one that was not keeps the last row that was acknowledged.

    vdr_sums.json   sums of the files; there only while the collection is closed
    vdr_last.json   points written last with their sums, and the one deleted last
    vdr_lost.txt    what an opening found missing; it stays until someone deletes it
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from vdr_db.connectors.validation import RESERVED_PREFIX

__all__ = ["SUM_FIELD", "RowDamage", "Sums", "row_sum"]

SUM_FIELD = RESERVED_PREFIX + "sum"
"""Payload field of the sum of a row."""

_SUMS, _LAST, _LOST = "vdr_sums.json", "vdr_last.json", "vdr_lost.txt"
_LATEST = 8
_BLOCK = 1 << 16
_ZEROS = bytes(_BLOCK)
_States: TypeAlias = dict[str, tuple[int, int]]


def row_sum(
    point: int | str, indices: npt.ArrayLike, values: npt.ArrayLike, payload: Mapping[str, Any]
) -> int:
    """CRC-32 of a row: its point, weights as float32, and payload but for the sum itself.

    Args:
        point: Its point.
        indices: `[nnz]` token ids.
        values: `[nnz]` weights.
        payload: Of JSON types.
    """
    told = {name: one for name, one in payload.items() if name != SUM_FIELD}
    text = json.dumps([str(point), told], sort_keys=True, separators=(",", ":"))
    found = zlib.crc32(text.encode("utf-8", "surrogatepass"))
    found = zlib.crc32(np.asarray(indices, np.uint32).tobytes(), found)
    return zlib.crc32(np.asarray(values, np.float32).tobytes(), found)


@dataclass(frozen=True)
class RowDamage:
    """What reading all rows of a collection showed.

    Attributes:
        rows: Rows read.
        without: Rows without a sum, written by earlier versions.
        damaged: Points whose rows do not fit their sums.
        lost: What an opening found missing, or `""`.
    """

    rows: int
    without: int
    damaged: Sequence[int | str]
    lost: str


class Sums:
    """The checksums of the files of one shard.

    Args:
        shard: Folder of the engine's files.
    """

    def __init__(self, shard: Path) -> None:
        self._shard = shard
        self._kept: dict[str, int] = {}
        self._states: _States = {}
        self._last: int | None = None
        self._latest: dict[int | str, int | None] = {}

    def damaged(self) -> list[str] | None:
        """What differs from when the collection was closed; `None` when it was not closed.

        Only while nobody has it open.
        """
        kept = self._read(_SUMS)
        if kept is None:
            return None
        there = set(_files(self._shard))
        problems = [f"{name} is gone" for name in sorted(set(kept["files"]) - there)]
        for name in sorted(there):
            if name not in kept["files"]:
                problems.append(f"{name} was not there")
            elif _file_sum(self._shard / name) != kept["files"][name]:
                problems.append(f"{name} is not what it was")
        return problems

    @property
    def count(self) -> int | None:
        """Documents when the collection was closed; `None` when it was not."""
        kept = self._read(_SUMS)
        return None if kept is None else int(kept["count"])

    def lost(self) -> str:
        """What an opening found missing, or `""`."""
        with contextlib.suppress(OSError, ValueError):
            return (self._shard / _LOST).read_text("utf-8")
        return ""

    def note_lost(self, where: str) -> None:
        """Keeps a sentence for every later opening and check."""
        told = (
            f"the log of {where} ended early when it was replayed: what was written last is not "
            "there, and more before it may be missing; write them again, or restore the folder "
            f"from a backup, and then delete {self._shard / _LOST}."
        )
        with contextlib.suppress(OSError):
            (self._shard / _LOST).write_text(told, "utf-8")

    def begin(self) -> dict[int | str, int | None]:
        """Takes the sums away while the collection is open.

        Returns:
            Points and the sums they must have, `None` for one that must not be there. Empty where
            the collection was closed.
        """
        kept = self._read(_SUMS)
        self._kept = {} if kept is None else kept["files"]
        self._states = _states(self._shard)
        (self._shard / _SUMS).unlink(missing_ok=True)
        last = None if kept is not None else self._read(_LAST)
        return {} if last is None else dict(last["points"])

    def wrote(self, totals: Mapping[int | str, int | None]) -> None:
        """Notes points and their new sums, `None` for a deleted one; survives the process's death.

        The latest few are kept, and of deleted ones the last.
        """
        for point, total in totals.items():
            self._latest.pop(point, None)
            self._latest[point] = total
        gone = [point for point, total in self._latest.items() if total is None]
        there = [point for point, total in self._latest.items() if total is not None]
        for point in (*gone[:-1], *there[:-_LATEST]):
            del self._latest[point]
        if self._last is None:
            self._last = os.open(self._shard / _LAST, os.O_WRONLY | os.O_CREAT, 0o666)
        content = json.dumps({"points": list(self._latest.items())}).encode()
        os.pwrite(self._last, content, 0)
        os.ftruncate(self._last, len(content))

    def end(self, count: int | None) -> None:
        """Writes the sums, once the engine has let go of its files; `None` leaves them out.

        Files that nobody touched meanwhile keep their sums, so that damage stays to be seen.
        """
        last, self._last = self._last, None
        if last is not None:
            os.close(last)
        if count is None:
            return
        now = _states(self._shard)
        files = {
            name: self._kept[name]
            if name in self._kept and self._states.get(name) == state
            else _file_sum(self._shard / name)
            for name, state in now.items()
        }
        new = self._shard / f"{_SUMS}.new"
        new.write_text(json.dumps({"count": count, "files": files}), "utf-8")
        new.replace(self._shard / _SUMS)

    def _read(self, name: str) -> Any:
        with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
            told = json.loads((self._shard / name).read_text("utf-8"))
            if name == _SUMS:
                return {"count": int(told["count"]), "files": dict(told["files"])}
            return {"points": [(point, total) for point, total in told["points"]]}
        return None


def _files(folder: Path) -> Iterator[str]:
    """Files with data by their paths in the folder; ours tell of themselves."""
    for top, _, names in os.walk(folder):
        for name in names:
            if name not in (_SUMS, f"{_SUMS}.new", _LAST, _LOST):
                yield os.path.relpath(os.path.join(top, name), folder)


def _states(folder: Path) -> _States:
    found = {}
    for name in _files(folder):
        told = (folder / name).stat()
        found[name] = (told.st_size, told.st_mtime_ns)
    return found


def _file_sum(file: Path) -> int:
    """CRC-32 of size and blocks; blocks of zeros are left out, as holes are not read."""
    found = zlib.crc32(str(file.stat().st_size).encode())
    with file.open("rb", buffering=0) as stream:
        place = 0
        while True:
            place = _next_data(stream.fileno(), place)
            stream.seek(place)
            block = stream.read(_BLOCK)
            if not block:
                return found
            if block != _ZEROS[: len(block)]:
                found = zlib.crc32(block, zlib.crc32(str(place).encode(), found))
            place += len(block)


def _next_data(descriptor: int, place: int) -> int:
    """The start of the first block from `place` on that may hold something."""
    try:
        return os.lseek(descriptor, place, os.SEEK_DATA) // _BLOCK * _BLOCK
    except (AttributeError, OSError):  # no more data, or a system that cannot tell
        return max(place, os.fstat(descriptor).st_size)
