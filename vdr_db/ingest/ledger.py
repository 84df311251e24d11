"""What is stored for good, in a small SQLite file that survives any kill.

Records of an input are numbered from 0 in reading order. The ledger holds which numbers are
settled (acknowledged by the store, refused into the quarantine, or skipped on request) as a few
ranges; the range that starts at 0 ends at the watermark. A number enters the file only after the
store acknowledged it *and* the store's `flush` returned, so a settled record survives what the
store itself survives after a flush. What was written but not yet settled is written again after a
kill; writes are upserts, so that changes nothing.

One file holds a run for every input that went through it, told apart by the names of its files, so
that another input simply goes on. Nothing of the documents is kept but a sample of at most 64 ids
with their vectors, for the checks at the end and at resume. Addresses and keys of stores are never
written.
"""

from __future__ import annotations

import json
import os
import sqlite3
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vdr_db.border import foreign
from vdr_db.errors import ConfigError, StoreUnavailable
from vdr_db.ingest.identity import input_change, is_same_input, run_difference

__all__ = ["Ledger", "Ranges", "Sampled"]

_FORMAT = 2
_MOST_RECORDS = 1 << 48
_TABLES = ("settled", "counters", "sample")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs
    (run INTEGER PRIMARY KEY, description TEXT NOT NULL, is_complete INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS settled
    (start INTEGER NOT NULL, stop INTEGER NOT NULL, run INTEGER NOT NULL DEFAULT 1);
CREATE TABLE IF NOT EXISTS counters
    (name TEXT NOT NULL, value INTEGER NOT NULL, run INTEGER NOT NULL DEFAULT 1);
CREATE TABLE IF NOT EXISTS sample
    (slot INTEGER NOT NULL, id TEXT NOT NULL, indices BLOB NOT NULL, weights BLOB NOT NULL,
     run INTEGER NOT NULL DEFAULT 1);
"""
# Format 1 held one run, described in a table of names and values.
_OLD_RUN = "SELECT value FROM run WHERE name = ?"


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


@dataclass(frozen=True)
class LastRun:
    """What a ledger knows of an input: the store's name, and whether it ended and is unchanged."""

    store: str
    is_complete: bool
    is_same: bool


class Ledger:
    """The file behind an ingest; opened by one process at a time.

    Args:
        path: The file; made when missing. SQLite keeps a `-wal` file beside it while open.
        description: What is being ingested into what. Where the file knows the same input with
            anything settled, encoder, store and policy must be the same too.
        restart: Forget what the file holds of this input instead of resuming.

    Attributes:
        settled: Numbers of settled records as of the last commit.
        counters: Totals as of the last commit.
        sample: Documents to check.
        is_resumed: Whether the file already knew settled records.
        run: Number of this input's run in the file, from 1.

    Raises:
        ConfigError: The file is no ledger, holds settled records of the same input with another
            encoder, store or slice or of an earlier state of it, or is open in another process.
        StoreUnavailable: The file cannot be written.
    """

    def __init__(
        self, path: str | Path, description: Mapping[str, Any], *, restart: bool = False
    ) -> None:
        self.path = Path(path)
        self._wanted = json.loads(json.dumps(description, sort_keys=True))
        with self._understood():
            self._connection = self._open()
            try:
                self.run = self._adopt(restart)
                self._read()
            except BaseException as error:
                self._connection.close()
                if isinstance(error, sqlite3.Error):
                    raise self._translated(error) from error
                raise
        self.is_resumed = len(self.settled) > 0

    @classmethod
    def last_of(cls, path: str | os.PathLike[str], input: Mapping[str, Any]) -> LastRun | None:
        """The run of an input that a file knows; `None` without one.

        Raises:
            ConfigError: The file is no ledger, or open in another process.
        """
        if not Path(path).exists():
            return None
        ledger = cls.__new__(cls)
        ledger.path, ledger._wanted = Path(path), {"input": json.loads(json.dumps(input))}
        with ledger._understood():
            ledger._connection = ledger._open()
        with closing(ledger._connection), ledger._understood():
            known = ledger._known()
            if known is None:
                return None
            ledger.run, stored = known
            is_same = input_change(stored["input"], ledger._wanted["input"]) is None
            name = str((stored.get("store") or {}).get("name"))
            return LastRun(name, ledger.is_complete, is_same)

    @classmethod
    def acknowledged(cls, path: str | os.PathLike[str], store: str) -> tuple[int, list[Sampled]]:
        """What a file knows of the documents that a store has acknowledged, of whatever input.

        Args:
            path: The file.
            store: Name of the collection or index, or of the alias of its versions.

        Returns:
            How many there must be at least, and some of them as they were written.

        Raises:
            ConfigError: There is no such file, it is no ledger, or open in another process.
        """
        if not Path(path).is_file():
            raise ConfigError(f"there is no ledger {path}; name the one of the ingest (--ledger).")
        ledger = cls.__new__(cls)
        ledger.path = Path(path)
        with ledger._understood():
            ledger._connection = ledger._open()
        least, sample = 0, []
        with closing(ledger._connection), ledger._understood():
            for run, text in ledger._connection.execute("SELECT run, description FROM runs"):
                name = str((json.loads(text).get("store") or {}).get("name"))
                if name == store or name.startswith(f"{store}-"):
                    ledger.run = int(run)
                    ledger._read()
                    least = max(least, ledger.counters.get("acknowledged", 0))
                    sample += ledger.sample
        return least, sample

    def _understood(self) -> AbstractContextManager[None]:
        """Whatever a file holds that is no ledger of ours is a `ConfigError`."""
        return foreign(
            f"the ledger {self.path}", ConfigError, "name another file, or delete this one"
        )

    def _read(self) -> None:
        """What the file knows of the run, checked."""
        ranges = [(int(start), int(stop)) for start, stop in self._rows("start, stop FROM settled")]
        if any(not 0 <= start <= stop <= _MOST_RECORDS for start, stop in ranges):
            raise ValueError("a range of settled records that is none")
        self.settled = Ranges(ranges)
        counters = self._rows("name, value FROM counters")
        self.counters = {str(name): int(value) for name, value in counters}
        self.sample = [
            Sampled(json.loads(id), np.frombuffer(ids, np.int32), np.frombuffer(w, np.float32))
            for id, ids, w in self._rows("id, indices, weights FROM sample")
        ]

    def _open(self) -> sqlite3.Connection:
        if not self.path.parent.is_dir():
            raise ConfigError(
                f"the ledger {self.path} must lie in a folder that exists; make "
                f"{self.path.parent} first."
            )
        connection = sqlite3.connect(
            self.path, isolation_level=None, check_same_thread=False, timeout=1.0
        )
        try:
            # The lock taken by the first write is kept until close, or until the kernel drops it
            # with a killed process: two ingests never share a ledger.
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
            number = connection.execute("PRAGMA user_version").fetchone()[0]
            if "run" in tables:
                number = json.loads(connection.execute(_OLD_RUN, ("format",)).fetchone()[0])
            if number not in (0, 1, _FORMAT):
                raise ConfigError(
                    f"the ledger {self.path} has format {number}, this version writes {_FORMAT}; "
                    "finish with the version that began, or name another file."
                )
            renew = "" if "run" not in tables else _renewal()
            # A script ends no transaction of its own accord when one of its lines fails.
            connection.executescript(
                f"BEGIN IMMEDIATE;{renew or _SCHEMA}PRAGMA user_version = {_FORMAT};COMMIT;"
            )
        except BaseException as error:
            connection.close()
            if isinstance(error, sqlite3.Error):
                raise self._translated(error) from error
            raise
        return connection

    def _adopt(self, restart: bool) -> int:
        """The number of the wanted run, once the file is about it."""
        known = self._known()
        if known is None:
            with self._transaction() as connection:
                number = connection.execute(
                    "INSERT INTO runs (description) VALUES (?)", (self._text(),)
                ).lastrowid
            assert number is not None
            return number
        self.run, stored = known
        # What was only refused, say for a wrong name of a field, may be taken up in another way.
        stored_any = "name IN ('acknowledged', 'existing', 'unchanged') AND value > 0"
        is_empty = not self._connection.execute(
            f"SELECT 1 FROM counters WHERE run = ? AND {stored_any}", (self.run,)
        ).fetchall()
        difference = run_difference(stored, self._wanted)
        if difference is not None and not (restart or is_empty):
            raise ConfigError(
                f"the ledger {self.path} knows this input and {difference}; restart to write "
                "everything again (--restart), or give this run a ledger of its own (--ledger)."
            )
        with self._transaction() as connection:
            if difference is not None or restart:
                for table in _TABLES:
                    connection.execute(f"DELETE FROM {table} WHERE run = ?", (self.run,))
            # What does not count as a difference, such as the time of a file, is kept up.
            connection.execute(
                "UPDATE runs SET description = ?, is_complete = is_complete AND ? WHERE run = ?",
                (self._text(), difference is None and not restart, self.run),
            )
        return self.run

    def _known(self) -> tuple[int, dict[str, Any]] | None:
        """Number and description of the run of the wanted input, whatever its state was then."""
        rows = self._connection.execute("SELECT run, description FROM runs ORDER BY run")
        runs = [(int(number), json.loads(text)) for number, text in rows]
        wanted = self._wanted["input"]
        for fits in (lambda one: input_change(one, wanted) is None, lambda one: True):
            for number, stored in runs:
                if is_same_input(stored["input"], wanted) and fits(stored["input"]):
                    return number, stored
        return None

    def _text(self) -> str:
        return json.dumps(self._wanted, sort_keys=True)

    def _rows(self, what: str) -> list[Any]:
        return self._connection.execute(f"SELECT {what} WHERE run = ?", (self.run,)).fetchall()

    @property
    def is_complete(self) -> bool:
        """Whether the run that this ledger describes came to its end."""
        return bool(self._rows("is_complete FROM runs")[0][0])

    @property
    def quarantine(self) -> str:
        """The usual file for what this run refuses."""
        return f"{self.path}{'' if self.run == 1 else f'.{self.run}'}.quarantine.jsonl"

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
        run = self.run
        with self._transaction() as connection:
            for table in _TABLES:
                connection.execute(f"DELETE FROM {table} WHERE run = ?", (run,))
            connection.executemany(
                "INSERT INTO settled VALUES (?, ?, ?)", [(*one, run) for one in settled]
            )
            connection.executemany(
                "INSERT INTO counters VALUES (?, ?, ?)", [(*one, run) for one in counters.items()]
            )
            connection.executemany(
                "INSERT INTO sample VALUES (?, ?, ?, ?, ?)",
                [
                    (slot, json.dumps(one.id), one.indices.tobytes(), one.weights.tobytes(), run)
                    for slot, one in enumerate(sample)
                ],
            )
            connection.execute("UPDATE runs SET is_complete = ? WHERE run = ?", (is_complete, run))
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


def _renewal() -> str:
    """What turns a file of format 1 into one of this format."""
    moved = "".join(f"ALTER TABLE {table} RENAME TO old_{table};" for table in _TABLES)
    kept = "".join(
        f"INSERT INTO {table} SELECT *, 1 FROM old_{table};DROP TABLE old_{table};"
        for table in _TABLES
    )
    described = "(SELECT value FROM run WHERE name = 'description')"
    done = "(SELECT value = 'true' FROM run WHERE name = 'is_complete')"
    runs = f"INSERT INTO runs SELECT 1, {described}, {done} WHERE {described} IS NOT NULL;"
    return f"{moved}{_SCHEMA}{kept}{runs}DROP TABLE run;"
