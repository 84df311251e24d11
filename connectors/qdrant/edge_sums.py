"""Checksums of an embedded collection: of each row, of its files at rest, of the last row written.

The engine replays its log up to the first entry it cannot read and says nothing of the rest, and it
trusts its data files. So each row carries a sum in its payload, a collection that was closed keeps
sums of its files, and one that was not keeps the rows acknowledged last and the number of all.

    vdr_sums.json   sums of the files; there only while the collection is closed
    vdr_last.json   points written last with their sums, the one deleted last, number of all
    vdr_lost.txt    what an opening found missing; it stays until someone deletes it
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from vdr_db.connectors.validation import RESERVED_PREFIX

if TYPE_CHECKING:
    from vdr_db.connectors.base import Payload
    from vdr_db.connectors.qdrant.engine import Stored
    from vdr_db.sparse import SparseRows

__all__ = ["SUM_FIELD", "LastUse", "RowDamage", "Sums", "row_sum"]

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


@dataclass(frozen=True)
class LastUse:
    """What a collection that was not closed must hold, once its log was replayed.

    Attributes:
        sums: Points and the sums they must have, `None` for one that must not be there.
        least: Documents there must be at least.
        most: Documents there may be at most, more than `least` where a write was going on; `None`
            where that is not known.
        is_whole: Whether every row has a sum, as in collections that no earlier version wrote.
        was_closed: Whether it was closed, so that its files hold all there is.
    """

    sums: Mapping[int | str, int | None] = field(default_factory=dict)
    least: int = 0
    most: int | None = None
    is_whole: bool = False
    was_closed: bool = False

    @property
    def is_counted(self) -> bool:
        """Whether it is known how many documents there may be."""
        return self.most is not None

    def told(self, sum_of: Callable[[int | str], int | None], count: int) -> str:
        """What is wrong, or `""`: a sentence without its end."""
        if any(sum_of(point) != total for point, total in self.sums.items()):
            return (
                "its log ended early when it was replayed: what was written last is not there, and "
                "more before it may be missing"
            )
        if self.most is not None and not self.least <= count <= self.most:
            return f"{self.least} documents were acknowledged, {count} are there"
        return ""


class Sums:
    """The checksums of the files of one shard.

    Args:
        shard: Folder of the engine's files.

    Attributes:
        is_whole: Whether every row has a sum.
    """

    is_whole = False

    def __init__(self, shard: Path) -> None:
        self._shard = shard
        self._kept: dict[str, int] = {}
        self._states: _States = {}
        self._last: int | None = None
        self._latest: dict[int | str, int | None] = {}

    def signed(
        self, points: Sequence[int | str], rows: SparseRows, payloads: Sequence[Payload]
    ) -> list[Payload]:
        """Payloads of rows with their sums."""
        made = []
        for i, (point, payload) in enumerate(zip(points, payloads, strict=True)):
            span = slice(rows.indptr[i], rows.indptr[i + 1])
            total = row_sum(point, rows.indices[span], rows.values[span], payload)
            made.append({**payload, SUM_FIELD: total})
        return made

    def renewed(self, one: Stored, fields: Payload) -> Payload:
        """The sum of a row once fields of its payload are set.

        A damaged row keeps its sum, so that it stays to be found: nothing comes for it.
        """
        if self._is_damaged(one):
            return {}
        new = {**one.payload, **fields}
        return {SUM_FIELD: row_sum(one.point, one.indices or (), one.values or (), new)}

    def damage(self, rows: Iterable[Stored]) -> RowDamage:
        """Compares all rows, with their vectors and whole payloads, with their sums."""
        count = without = 0
        damaged: list[int | str] = []
        for one in rows:
            count += 1
            if self._is_damaged(one):
                damaged.append(one.point)
            elif SUM_FIELD not in one.payload:
                without += 1
        return RowDamage(count, without, damaged, self.lost())

    def _is_damaged(self, one: Stored) -> bool:
        known = one.payload.get(SUM_FIELD)
        if known is None:
            return self.is_whole  # the sum of a damaged row may have lost its name
        found = row_sum(one.point, one.indices or (), one.values or (), one.payload)
        return bool(known != found)

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

    def note_lost(self, where: str, why: str) -> None:
        """Keeps a sentence for every later opening and check."""
        told = (
            f"{where} was not closed, and {why}; write that again, or restore the folder from a "
            f"backup, and then delete {self._shard / _LOST}."
        )
        with contextlib.suppress(OSError):
            (self._shard / _LOST).write_text(told, "utf-8")

    def begin(self) -> LastUse:
        """Takes the sums away while the collection is open.

        Returns:
            What must be there; nothing is known where the collection was closed.
        """
        kept = self._read(_SUMS)
        self._kept = {} if kept is None else kept["files"]
        self._states = _states(self._shard)
        (self._shard / _SUMS).unlink(missing_ok=True)
        last = (
            self._read(_LAST) or LastUse()
            if kept is None
            else LastUse(is_whole=kept["is_whole"], was_closed=True)
        )
        self.is_whole = last.is_whole
        return last

    def start(self) -> None:
        """Notes that the collection is new, so that every row will have a sum."""
        self.is_whole = True
        self._write(0, 0)

    def expect(self, count: int | None, change: int, points: Iterable[int | str]) -> None:
        """Notes that a write begins, which the process may not live to see the end of.

        Args:
            count: Documents now; `None` where that is not known.
            change: How many may come, or go where it is below 0.
            points: What is written: nothing is known of them until `wrote`.
        """
        for point in points:
            self._latest.pop(point, None)
        self._write(count, change)

    def wrote(self, totals: Mapping[int | str, int | None], count: int | None) -> None:
        """Notes points and their new sums, `None` for a deleted one; survives the process's death.

        The latest few are kept, and of deleted ones the last; `count` is of all documents, `None`
        where that is not known.
        """
        for point, total in totals.items():
            self._latest.pop(point, None)
            self._latest[point] = total
        gone = [point for point, total in self._latest.items() if total is None]
        there = [point for point, total in self._latest.items() if total is not None]
        for point in (*gone[:-1], *there[:-_LATEST]):
            del self._latest[point]
        self._write(count, 0)

    def _write(self, count: int | None, change: int) -> None:
        ends = () if count is None else (count, max(0, count + change))
        if self._last is None:
            self._last = os.open(self._shard / _LAST, os.O_WRONLY | os.O_CREAT, 0o666)
        told = {
            "points": list(self._latest.items()),
            "range": [min(ends, default=0), max(ends, default=None)],
            "is_whole": self.is_whole,
        }
        content = json.dumps(told).encode()
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
        told = {"count": count, "files": files, "is_whole": self.is_whole}
        new.write_text(json.dumps(told), "utf-8")
        new.replace(self._shard / _SUMS)

    def _read(self, name: str) -> Any:
        with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
            told = json.loads((self._shard / name).read_text("utf-8"))
            is_whole = told.get("is_whole") is True  # earlier versions do not keep it
            if name == _SUMS:
                return {
                    "count": int(told["count"]),
                    "files": dict(told["files"]),
                    "is_whole": is_whole,
                }
            sums = dict(told["points"])
            least, most = told.get("range") or (0, None)
            return LastUse(sums, least, most, is_whole)
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
