"""What is stored for good, in a small SQLite file that survives any kill.

Records of an input are numbered from 0 in reading order. The ledger holds which numbers are
settled (acknowledged by the store, refused into the quarantine, or skipped on request) as a few
ranges; the range that starts at 0 ends at the watermark. A number enters the file only after the
store acknowledged it *and* the store's `flush` returned, so a settled record survives what the
store itself survives after a flush. What was written but not yet settled is written again after a
kill; writes are upserts, so that changes nothing.

Nothing of the documents is kept but a sample of at most 64 ids with their vectors, for the checks
at the end and at resume. Addresses and keys of stores are never written.
"""

from __future__ import annotations

import json
import sqlite3
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vdr_db.errors import ConfigError, StoreUnavailable

__all__ = ["Ledger", "Ranges", "Sampled"]

_FORMAT = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS run (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS settled (start INTEGER PRIMARY KEY, stop INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sample
    (slot INTEGER PRIMARY KEY, id TEXT NOT NULL, indices BLOB NOT NULL, weights BLOB NOT NULL);
"""


class Ranges:
    """A set of whole numbers kept as disjoint half-open ranges, for sets with few gaps."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for start, stop in ranges:
            self.add(start, stop)

    def add(self, start: int, stop: int) -> None:
        """Adds `[start, stop)`, joining ranges that touch."""
        if stop <= start:
            return
        first = bisect_left(self._stops, start)
        last = bisect_right(self._starts, stop)
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def update(self, numbers: Iterable[int]) -> None:
        """Adds single numbers, in any order."""
        run_start = run_stop = -1
        for number in numbers:
            if number == run_stop:
                run_stop += 1
                continue
            self.add(run_start, run_stop)
            run_start, run_stop = number, number + 1
        self.add(run_start, run_stop)

    def __contains__(self, number: int) -> bool:
        """Whether the number is in the set."""
        i = bisect_right(self._starts, number) - 1
        return i >= 0 and number < self._stops[i]

    def __len__(self) -> int:
        """How many numbers the set holds."""
        return sum(self._stops) - sum(self._starts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """The ranges, ascending."""
        return iter(list(zip(self._starts, self._stops, strict=True)))

    def __eq__(self, other: object) -> bool:
        """Same numbers."""
        return isinstance(other, Ranges) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    @property
    def watermark(self) -> int:
        """Smallest number that is not in the set."""
        return self._stops[0] if self._starts and self._starts[0] == 0 else 0

    def copy(self) -> Ranges:
        """An independent copy."""
        twin = Ranges()
        twin._starts, twin._stops = self._starts[:], self._stops[:]
        return twin


@dataclass(frozen=True)
class Sampled:
    """A stored document to check: token ids `[nnz]` int32, weights `[nnz]` float32, as written."""

    id: int | str
    indices: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]


class Ledger:
    """The file behind one ingest; opened by one process at a time.

    Args:
        path: The file; made when missing. SQLite keeps a `-wal` file beside it while open.
        description: What is being ingested into what; a ledger of something else is refused.
        restart: Forget what the file holds instead of resuming.

    Attributes:
        settled: Numbers of settled records as of the last commit.
        counters: Totals as of the last commit.
        sample: Documents to check.
        is_resumed: Whether the file already knew settled records.

    Raises:
        ConfigError: The file is no ledger, belongs to another input, encoder, store or slice, or
            is open in another process.
        StoreUnavailable: The file cannot be written.
    """

    def __init__(
        self, path: str | Path, description: Mapping[str, Any], *, restart: bool = False
    ) -> None:
        self.path = Path(path)
        self._wanted = json.loads(json.dumps(description, sort_keys=True))
        self._connection = self._open()
        try:
            self._adopt(restart)
        except BaseException:
            self._connection.close()
            raise
        self.settled = Ranges(self._connection.execute("SELECT start, stop FROM settled"))
        self.counters = dict(self._connection.execute("SELECT name, value FROM counters"))
        self.sample = [
            Sampled(json.loads(id), np.frombuffer(ids, np.int32), np.frombuffer(w, np.float32))
            for id, ids, w in self._connection.execute("SELECT id, indices, weights FROM sample")
        ]
        self.is_resumed = len(self.settled) > 0

    def _open(self) -> sqlite3.Connection:
        if not self.path.parent.is_dir():
            raise ConfigError(
                f"the ledger {self.path} must lie in a folder that exists; make "
                f"{self.path.parent} first."
            )
        try:
            connection = sqlite3.connect(
                self.path, isolation_level=None, check_same_thread=False, timeout=1.0
            )
            # The lock taken by the first write is kept until close, or until the kernel drops it
            # with a killed process: two ingests never share a ledger.
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.executescript("BEGIN IMMEDIATE;" + _SCHEMA + "COMMIT;")
        except sqlite3.Error as error:
            raise self._translated(error) from error
        return connection

    def _adopt(self, restart: bool) -> None:
        """Checks that the file is about the wanted run, or makes it so."""
        stored = self._read("description")
        number = self._read("format")
        if number is not None and number != _FORMAT:
            raise ConfigError(
                f"the ledger {self.path} has format {number}, this version writes {_FORMAT}; "
                "finish with the version that began, or restart."
            )
        if stored is not None and not restart:
            differences = [
                name
                for name in sorted({*stored, *self._wanted})
                if stored.get(name) != self._wanted.get(name)
            ]
            if differences:
                shown = "; ".join(
                    f"{name}: {_short(stored.get(name))} (ledger) against "
                    f"{_short(self._wanted.get(name))} (now)"
                    for name in differences
                )
                raise ConfigError(
                    f"the ledger {self.path} belongs to another run ({shown}); give this run a "
                    "ledger of its own, or restart to write everything again."
                )
            return
        with self._transaction() as connection:
            for table in ("settled", "counters", "sample"):
                connection.execute(f"DELETE FROM {table}")
            self._write(connection, "format", _FORMAT)
            self._write(connection, "description", self._wanted)
            self._write(connection, "is_complete", False)

    @property
    def is_complete(self) -> bool:
        """Whether the run that this ledger describes came to its end."""
        return bool(self._read("is_complete"))

    def commit(
        self,
        settled: Ranges,
        counters: Mapping[str, int],
        sample: Sequence[Sampled] = (),
        *,
        is_complete: bool = False,
    ) -> None:
        """Makes a state durable, all of it or nothing.

        Raises:
            StoreUnavailable: The file cannot be written, for example because the disk is full; the
                last committed state is untouched.
        """
        with self._transaction() as connection:
            connection.execute("DELETE FROM settled")
            connection.executemany("INSERT INTO settled VALUES (?, ?)", list(settled))
            connection.executemany(
                "INSERT OR REPLACE INTO counters VALUES (?, ?)", list(counters.items())
            )
            connection.execute("DELETE FROM sample")
            connection.executemany(
                "INSERT INTO sample VALUES (?, ?, ?, ?)",
                [
                    (slot, json.dumps(one.id), one.indices.tobytes(), one.weights.tobytes())
                    for slot, one in enumerate(sample)
                ],
            )
            self._write(connection, "is_complete", is_complete)
        self.settled = settled.copy()
        self.counters = dict(counters)
        self.sample = list(sample)

    def close(self) -> None:
        """Releases the file; committed state is already durable."""
        self._connection.close()

    def __enter__(self) -> Ledger:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes."""
        self.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Commits what the block did, or nothing of it; `StoreUnavailable` if it cannot."""
        connection = self._connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
        except BaseException as error:
            if connection.in_transaction:  # SQLite itself may have rolled back already
                connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise self._translated(error) from error
            raise

    def _read(self, name: str) -> Any:
        row = self._connection.execute("SELECT value FROM run WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    @staticmethod
    def _write(connection: sqlite3.Connection, name: str, value: Any) -> None:
        text = json.dumps(value, sort_keys=True)
        connection.execute("INSERT OR REPLACE INTO run VALUES (?, ?)", (name, text))

    def _translated(self, error: sqlite3.Error) -> ConfigError | StoreUnavailable:
        text = str(error)
        if "locked" in text or "busy" in text:
            return ConfigError(
                f"the ledger {self.path} is in use by another process; wait for it, or give this "
                "run a ledger of its own."
            )
        if "not a database" in text or "malformed" in text:
            return ConfigError(
                f"{self.path} is not a ledger ({text}); name another file, or delete this one."
            )
        return StoreUnavailable(
            f"the ledger {self.path} cannot be written ({text}); free space or mend permissions "
            "and run the same command again: everything committed so far is kept."
        )


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 120 else text[:117] + "..."
