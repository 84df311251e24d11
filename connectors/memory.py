"""`MemoryStore`: the exact answer, for tests and small collections.

Scores are float64 inner products over all rows, so this store is what every other one is measured
against. It costs one pass over all entries per query and keeps everything in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vdr_db.connectors.base import (
    BatchLimits,
    Documents,
    EmptyRows,
    Hit,
    Id,
    Page,
    Payload,
    Record,
    Written,
    check_stamp,
    checked_page,
    page_token,
)
from vdr_db.connectors.ids import checked_ids, id_order
from vdr_db.connectors.passages import Passages, check_passages
from vdr_db.connectors.store import About, BaseStore
from vdr_db.connectors.validation import prepare
from vdr_db.errors import RejectedRows
from vdr_db.filters import Filter, parse_filter
from vdr_db.sparse import SparseRows
from vdr_db.stamp import EncoderStamp

__all__ = ["MemoryStore"]

_LIMITS = BatchLimits(rows=1 << 30, bytes=1 << 60, row_bytes=32 << 20)


class MemoryStore(BaseStore):
    """A `Store` in plain Python objects, exact and without persistence.

    Args:
        name: Name of the collection, for messages.
    """

    def __init__(self, name: str = "memory") -> None:
        self.name = name
        self._made_for: About | None = None
        self._passages: Passages | None = None
        self._rows: dict[Id, SparseRows] = {}
        self._payloads: dict[Id, Payload] = {}
        self._joined: tuple[list[Id], SparseRows] | None = None

    def __repr__(self) -> str:
        return f"MemoryStore({self.name!r}, {len(self._rows)} documents)"

    @property
    def passages(self) -> Passages | None:
        """How its documents are cut; `None` where each row is a document."""
        return self._passages

    def create(
        self,
        width: int,
        stamp: EncoderStamp | None = None,
        *,
        documents: Documents = "encoded",
        passages: Passages | None = None,
    ) -> None:
        """Makes the collection, or checks the one that is there; see `Store.create`."""
        self._check_open()
        if self._made_for is not None:
            check_stamp(self._where, self._made_for, (width, stamp, documents))
            check_passages(self._where, self._passages, passages)
            return
        SparseRows.empty(0, width)  # checks the width
        self._made_for, self._passages = (width, stamp, documents), passages

    def upsert(
        self,
        rows: SparseRows,
        ids: Sequence[Id],
        payloads: Sequence[Mapping[str, Any] | None] | None = None,
        *,
        empty: EmptyRows = "store",
    ) -> Written:
        """Writes rows; see `Store.upsert`."""
        ready = prepare(
            rows,
            ids,
            payloads,
            width=self._made_width(),
            empty=empty,
            limits=_LIMITS,
            where=self._where,
        )
        for i, (id, payload) in enumerate(zip(ready.ids, ready.payloads, strict=True)):
            self._rows[id] = ready.rows[i]
            self._payloads[id] = payload
        self._joined = None
        if ready.refused:
            raise RejectedRows(list(ready.refused), list(ready.refused.values()))
        return Written(len(ready.ids), ready.empty, ready.skipped)

    def get(self, ids: Sequence[Id], with_rows: bool = False) -> list[Record]:
        """The documents of these ids in this order; unknown ids are left out."""
        self._made_width()
        return [
            Record(id, copy.deepcopy(self._payloads[id]), self._rows[id] if with_rows else None)
            for id in checked_ids(ids)
            if id in self._rows
        ]

    def ids(self, filter: Filter | Mapping[str, Any] | None = None) -> Iterator[Id]:
        """All ids, or those the filter keeps, in the order they were first written."""
        self._made_width()
        ids = list(self._rows)
        return iter([id for id, kept in zip(ids, self._mask(filter, ids), strict=True) if kept])

    def scroll(
        self,
        limit: int = 100,
        filter: Filter | Mapping[str, Any] | None = None,
        after: str | None = None,
    ) -> Page:
        """Documents in the order they were first written; see `Store.scroll`."""
        limit, _ = checked_page(limit, 0)
        ids = list(self.ids(filter))
        start = 0 if after is None else page_token(after, int, self._where)
        records = self.get(ids[start : start + limit])
        return Page(records, str(start + limit) if start + limit < len(ids) else None)

    def count(self, filter: Filter | Mapping[str, Any] | None = None) -> int:
        """Number of documents, of those the filter keeps when one is given."""
        self._check_open()
        return int(self._mask(filter, list(self._rows)).sum())

    def delete(self, ids: Sequence[Id]) -> int:
        """Removes documents; returns how many were there."""
        self._made_width()
        present = {id for id in checked_ids(ids) if id in self._rows}
        for id in present:
            del self._rows[id], self._payloads[id]
        self._joined = None
        return len(present)

    def flush(self) -> None:
        """Does nothing: memory has no disk."""
        self._check_open()

    def optimize(self) -> None:
        """Does nothing: there is no index."""
        self._check_open()

    @property
    def _where(self) -> str:
        return f"collection {self.name!r}"

    def _about(self) -> About | None:
        return self._made_for

    def _write_stamp(self, stamp: EncoderStamp) -> None:
        assert self._made_for is not None
        width, _, documents = self._made_for
        self._made_for = width, stamp, documents

    def _release(self) -> None:
        self._rows, self._payloads, self._joined = {}, {}, None

    def _hits(self, queries: SparseRows, limit: int, offset: int, filter: Any) -> list[list[Hit]]:
        ids, rows = self._all_rows()
        kept = self._mask(filter, ids)
        answers = []
        for scores in rows.dot(queries).T:
            found = sorted(
                ((float(scores[i]), ids[i]) for i in np.flatnonzero(kept & (scores > 0))),
                key=lambda pair: (-pair[0], *id_order(pair[1])),
            )
            answers.append(
                [
                    Hit(id, score, copy.deepcopy(self._payloads[id]))
                    for score, id in found[offset : offset + limit]
                ]
            )
        return answers

    def _all_rows(self) -> tuple[list[Id], SparseRows]:
        if self._joined is None:
            parts = [SparseRows.empty(0, self._made_width()), *self._rows.values()]
            self._joined = list(self._rows), SparseRows.concat(parts)
        return self._joined

    def _mask(
        self, filter: Filter | Mapping[str, Any] | None, ids: list[Id]
    ) -> npt.NDArray[np.bool_]:
        if filter is None:
            return np.ones(len(ids), np.bool_)
        tree = parse_filter(filter)
        return np.array([tree.matches(self._payloads[id]) for id in ids], np.bool_)
