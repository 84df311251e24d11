"""Tables of encoded rows on their way into a store: what a task of a cluster runs.

Knows Arrow and our stores, not who hands the tables over; see `vdr_db.integrations.ray`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from vdr_db.connectors.base import Store
from vdr_db.connectors.documents import documents_of
from vdr_db.connectors.failures import redact
from vdr_db.connectors.retry import Retrier
from vdr_db.connectors.validation import rows_from_pairs
from vdr_db.errors import (
    ConfigError,
    InputError,
    MissingExtraError,
    StoreError,
    StoreMismatch,
    VdrError,
    require,
)
from vdr_db.ingest import IngestOptions
from vdr_db.ingest.batches import BatchLimit, Piece
from vdr_db.ingest.preparation import Preparation, Prepared
from vdr_db.ingest.quarantine import Refusal
from vdr_db.ingest.source import Block
from vdr_db.ingest.writers import WriterPool
from vdr_db.readers import Record
from vdr_db.sparse import SparseRows
from vdr_db.stamp import EncoderStamp

__all__ = ["Columns", "Outcome", "StoreWriter", "UnwrittenRows", "WritePlan"]

_ROWS_AT_ONCE = 4096
_IDS_SHOWN = 10


@dataclass(frozen=True)
class Columns:
    """Names of the columns, the same for encoding and writing.

    Attributes:
        id: An integer or a text that names the row.
        text: What is encoded; kept in the payload under this name. May be absent when writing.
        indices: Token ids of the vector, `list<int32>`.
        values: Weights of the vector, `list<float32>`.
        error: Why a text could not be encoded, null for those that could. May be absent when
            writing.
        payload: Columns stored beside the vector; `None` stores all others.
    """

    id: str = "id"
    text: str = "text"
    indices: str = "indices"
    values: str = "values"
    error: str = "encode_error"
    payload: tuple[str, ...] | None = None


class UnwrittenRows(StoreError):
    """A write ended early; running it again writes what is missing.

    Attributes:
        ids: Ids of the rows of the failed task that the store did not acknowledge.
        reason: Why it ended.
    """

    def __init__(self, ids: Sequence[int | str], reason: str) -> None:
        self.ids = list(ids)
        self.reason = reason
        shown = ", ".join(repr(id) for id in self.ids[:_IDS_SHOWN])
        more = f" and {len(self.ids) - _IDS_SHOWN} more" if len(self.ids) > _IDS_SHOWN else ""
        super().__init__(
            f"{len(self.ids)} rows of one task were not written ({shown}{more}): {reason}; "
            "remove the cause and write the dataset again, what is stored stays as it is."
        )

    def __reduce__(self) -> tuple[type[UnwrittenRows], tuple[list[int | str], str]]:
        """Keeps ids and reason when the error crosses a process border."""
        return UnwrittenRows, (self.ids, self.reason)


@dataclass(frozen=True)
class WritePlan:
    """What a process needs to know to write."""

    open_store: Callable[[], Store] = field(repr=False)  # it may hold a key
    stamp: EncoderStamp | None
    width: int | None
    columns: Columns
    options: IngestOptions
    is_local: bool


@dataclass
class Outcome:
    """What became of the rows of one task."""

    written: int = 0
    refused: list[Refusal] = field(default_factory=list)


class _Tally:
    """Follows each row of a task to its end; called from several threads.

    Args:
        max_errors: Refused rows that are too many, `None` for 100 or 1 % of what was read.
    """

    def __init__(self, max_errors: int | None) -> None:
        self.outcome = Outcome()
        self.read = 0
        self._max_errors = max_errors
        self._waiting: dict[int, int | str] = {}
        self._lock = threading.Lock()

    def expect(self, ids: Sequence[int | str]) -> int:
        """Takes note of rows; the number of the first."""
        with self._lock:
            first, self.read = self.read, self.read + len(ids)
            self._waiting.update(enumerate(ids, start=first))
            return first

    def skipped(self, numbers: Iterable[int]) -> None:
        """These need no writing."""
        with self._lock:
            for number in numbers:
                self._waiting.pop(number, None)

    def acknowledged(self, piece: Piece) -> None:
        """The store has these."""
        self.skipped(piece.numbers)
        with self._lock:
            self.outcome.written += len(piece)

    def refused(self, refusals: Sequence[Refusal]) -> None:
        """These will not be stored.

        Raises:
            InputError: That was one too many.
        """
        self.skipped(one.number for one in refusals)
        with self._lock:
            self.outcome.refused.extend(refusals)
            count = len(self.outcome.refused)
        most = max(100, self.read // 100) if self._max_errors is None else self._max_errors
        if count > most:
            last = refusals[-1]
            raise InputError(
                f"{count} rows were refused, more than the {most} allowed by `max_errors`; the "
                f"last is {last.id!r}: {last.reason}"
            )

    def unwritten(self) -> list[int | str]:
        """Ids of the rows that are not in the store."""
        with self._lock:
            return [*self._waiting.values(), *(one.id for one in self.outcome.refused)]


class StoreWriter:
    """A store and the way of tables into it; lives in a task or in the actor."""

    def __init__(self, plan: WritePlan) -> None:
        self._plan = plan
        policy = plan.options.retry
        # A folder that another process holds does not get free by asking again.
        policy = replace(policy, tries=1) if plan.is_local else policy
        self._calls = Retrier(policy, seed=-1)
        self._store: Store | None = None
        self._width = 0

    def open(self) -> None:
        """Opens the store; makes the collection, or checks the one that is there."""
        plan = self._plan
        self._store = self._calls.call(plan.open_store, "opening the store")
        width = plan.width or self.store.width
        if width is None:
            raise ConfigError(
                "the collection is not made yet; pass the `encoder`, or make it before."
            )
        documents = plan.options.documents or self.store.documents
        stamp = plan.stamp or self.store.stamp
        make = partial(self.store.create, width, stamp, documents=documents)
        self._calls.call(make, "making the collection")
        self._width = width

    def close(self, *, has_written: bool = False) -> None:
        """Releases the store, after making it durable when something was written."""
        store, self._store = self._store, None
        if store is None:
            return
        try:
            if has_written:
                self._calls.call(store.flush, "flushing the store")
        finally:
            store.close()

    @property
    def store(self) -> Store:
        """The open store."""
        if self._store is None:
            raise StoreError("the store is closed; start the write again.")
        return self._store

    def write_table(self, table: Any) -> Outcome:
        """`write` for one table."""
        return self.write([table])

    def write(self, tables: Iterable[Any]) -> Outcome:
        """Writes tables and returns when every row is acknowledged or refused.

        Raises:
            UnwrittenRows: It was given up.
        """
        options = self._plan.options
        tally = _Tally(options.max_errors)
        documents = options.batch_documents or (1024 if self._plan.is_local else 256)
        pool = WriterPool(
            documents_of(self.store, self._plan.columns.text).upsert,
            writers=options.writers or 1,
            limit=BatchLimit(documents, options.batch_bytes),
            queue_bytes=options.queue_bytes,
            policy=options.retry,
            on_acknowledged=tally.acknowledged,
            on_refused=tally.refused,
            after_write=lambda: None,
        )
        try:
            for table in tables:
                ids = self._checked(table).column(self._plan.columns.id).to_pylist()
                for prepared in self._prepared(table, ids, tally.expect(ids)):
                    if prepared.refused:
                        tally.refused(prepared.refused)
                    tally.skipped(prepared.skipped)
                    pool.submit_in_parts(prepared.piece, prepared.nbytes, documents)
            pool.drain()
        except BaseException as error:
            pool.close(abort=True)
            is_setup = isinstance(error, (ConfigError, MissingExtraError, StoreMismatch))
            if is_setup or not isinstance(error, Exception):
                raise
            reason = str(error) if isinstance(error, VdrError) else redact(repr(error))
            raise UnwrittenRows(tally.unwritten(), reason.rstrip(".")) from error
        pool.close(abort=False)
        return tally.outcome

    def _checked(self, table: Any) -> Any:
        columns = self._plan.columns
        needed = (columns.id, columns.indices, columns.values, *(columns.payload or ()))
        missing = [name for name in needed if name not in table.column_names]
        if missing:
            raise ConfigError(
                f"rows need the columns {', '.join(map(repr, missing))}, got "
                f"{', '.join(map(repr, table.column_names))}; name others by `columns`."
            )
        return table

    def _prepared(self, table: Any, ids: list[Any], first: int) -> Iterator[Prepared]:
        """The rows of a table as pieces; numbers count from `first`."""
        pyarrow: Any = require("pyarrow", "parquet")
        columns, options = self._plan.columns, self._plan.options
        has_text = columns.text in table.column_names
        prepare = Preparation(
            encode=None,
            stamp=self._plan.stamp or self.store.stamp,
            width=self._width,
            text_key=columns.text if has_text and options.keeps_text is not False else None,
            options=replace(  # a fingerprint is a hash of the text
                options, has_fingerprint=options.has_fingerprint and has_text, skip=None
            ),
        )
        own = {columns.id, columns.text, columns.indices, columns.values, columns.error}
        kept = columns.payload
        if kept is None:
            kept = tuple(name for name in table.column_names if name not in own)
        for start in range(0, table.num_rows, _ROWS_AT_ONCE):
            part = table.slice(start, _ROWS_AT_ONCE)
            errors = self._errors(part)
            good = [i for i, error in enumerate(errors) if error is None]
            chosen = part.take(pyarrow.array(good, pyarrow.int64()))
            rows, bad = _sparse_rows(chosen, columns, self._width)
            for i, reason in bad.items():
                errors[good[i]] = reason
            good = [i for i in good if errors[i] is None]
            texts = part.column(columns.text).to_pylist() if has_text else [""] * part.num_rows
            payloads = part.select(list(kept)).to_pylist() if kept else [{}] * part.num_rows
            records = [
                Record(
                    ids[start + i],
                    texts[i] if texts[i] is not None else "",
                    {name: value for name, value in payloads[i].items() if value is not None},
                )
                for i in good
            ]
            prepared = prepare(Block([first + start + i for i in good], records, rows))
            unusable = [
                Refusal(first + start + i, ids[start + i], error)
                for i, error in enumerate(errors)
                if error is not None
            ]
            yield replace(prepared, refused=[*prepared.refused, *unusable])

    def _errors(self, table: Any) -> list[str | None]:
        name = self._plan.columns.error
        if name not in table.column_names:
            return [None] * int(table.num_rows)
        errors = table.column(name).to_pylist()
        return [None if error is None else f"not encoded: {error}" for error in errors]


def _sparse_rows(table: Any, columns: Columns, width: int) -> tuple[SparseRows, dict[int, str]]:
    """Rows of the vectors that are good, and position → reason for the others."""
    try:
        lists = [table.column(name).combine_chunks() for name in (columns.indices, columns.values)]
        offsets = [np.asarray(one.offsets, np.int64) for one in lists]
        bounds = offsets[0] - offsets[0][0] if len(offsets[0]) else np.zeros(1, np.int64)
        is_plain = not any(one.null_count for one in lists)
        if is_plain and np.array_equal(bounds, offsets[1] - offsets[1][0]):
            flat = [one.flatten().to_numpy(zero_copy_only=False) for one in lists]
            return SparseRows(bounds, flat[0], flat[1], width), {}
    except (AttributeError, ValueError, TypeError):
        pass  # not lists but arrays of another library, or a bad row among them: one by one
    parts, bad = [SparseRows.empty(0, width)], {}
    both = (table.column(name).to_pylist() for name in (columns.indices, columns.values))
    for i, (ids, weights) in enumerate(zip(*both, strict=True)):
        if ids is None or weights is None:
            bad[i] = "the vector is null"
            continue
        try:
            parts.append(rows_from_pairs([(ids, weights)], width))
        except (ValueError, TypeError) as error:
            bad[i] = str(error).replace(" in row 0", "")
    return SparseRows.concat(parts), bad
