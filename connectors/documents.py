"""`DocumentView`: a store whose rows are passages, seen as a store of documents.

The first passage of a document has its id, so that it is fetched without a search; the others have
ids of their own, made of that id and their number. A write takes this order, so that whatever is
killed when, no passage outlives its document's text and no half-written document looks whole:

1. passages that the new text has no place for are deleted,
2. the others are replaced, the first one last: it carries what tells that a document is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from vdr_db.connectors.base import (
    Documents,
    EmptyRows,
    Hit,
    Id,
    Page,
    Payload,
    Record,
    Store,
    Written,
    checked_page,
)
from vdr_db.connectors.ids import checked_ids, id_of, id_order, sort_key
from vdr_db.connectors.merging import groups_of, ranked, shown
from vdr_db.connectors.passages import PASSAGE_PREFIX, PassageRows, Passages, Span, passage_id
from vdr_db.connectors.validation import (
    COUNT_FIELD,
    DOCUMENT_FIELD,
    NUMBER_FIELD,
    PASSAGE_FIELDS,
    SPAN_FIELD,
)
from vdr_db.counts import counted
from vdr_db.errors import ConfigError, InputError, RejectedRows, ShapeError
from vdr_db.filters import AllOf, Equals, Filter, Key, OneOf, parse_filter
from vdr_db.sparse import SparseRows
from vdr_db.stamp import EncoderStamp

__all__ = ["DocumentView", "documents_of"]

_DOCUMENT, _NUMBER = Key.parse(DOCUMENT_FIELD), Key.parse(NUMBER_FIELD)
_IDS_AT_ONCE = 256
_FIRST_GUESS = 4  # passages asked for each document wanted, where the engine does not group
_MORE_DOCUMENTS = (2, 8, 32)  # documents summed for each one wanted


def documents_of(store: Store, text_key: str | None = "text") -> Store:
    """A store as a store of documents: itself, or a view of its passages."""
    return store if store.passages is None else DocumentView(store, text_key)


class DocumentView:
    """A `Store` of documents over a store of their passages; both are open as long as one is.

    Args:
        store: Made with `passages`.
        text_key: Payload field of the text, which each passage has its own part of.
    """

    def __init__(self, store: Store, text_key: str | None = "text") -> None:
        self.store = store
        self.text_key = text_key

    def __repr__(self) -> str:
        """The store."""
        return repr(self.store)

    @property
    def width(self) -> int | None:
        """Width of all rows, `None` while the collection is not made."""
        return self.store.width

    @property
    def stamp(self) -> EncoderStamp | None:
        """The encoder the collection was made for, as far as known."""
        return self.store.stamp

    @property
    def documents(self) -> Documents:
        """What the document side is."""
        return self.store.documents

    @property
    def passages(self) -> Passages | None:
        """How documents are cut."""
        return self.store.passages

    def create(
        self,
        width: int,
        stamp: EncoderStamp | None = None,
        *,
        documents: Documents = "encoded",
        passages: Passages | None = None,
    ) -> None:
        """Checks the collection against the arguments; see `Store.create`."""
        self.store.create(width, stamp, documents=documents, passages=passages)

    def record_images(self, stamp: EncoderStamp) -> None:
        """Writes down the encoder of images; see `Store.record_images`."""
        self.store.record_images(stamp)

    # Writing

    def upsert(
        self,
        rows: SparseRows | PassageRows,
        ids: Sequence[Id],
        payloads: Sequence[Mapping[str, Any] | None] | None = None,
        *,
        empty: EmptyRows = "store",
    ) -> Written:
        """Writes documents; see `Store.upsert`.

        A row of `SparseRows` is a document of one passage. Of a document with a passage that cannot
        be stored nothing stays.
        """
        parts = rows if isinstance(rows, PassageRows) else _whole(rows)
        checked = _own_ids(ids)
        given: Sequence[Mapping[str, Any] | None] = payloads or [None] * len(checked)
        if not len(parts) == len(checked) == len(given):
            raise ShapeError(
                "rows, ids and payloads must be equally many, got "
                f"{len(parts)} documents, {len(checked)} ids and {len(given)} payloads."
            )
        if empty not in ("store", "skip", "error"):
            raise ConfigError(f"`empty` must be 'store', 'skip' or 'error', got {empty!r}.")
        is_empty = parts.counts == 0
        skipped = [checked[i] for i in np.flatnonzero(is_empty)] if empty == "skip" else []
        refused: dict[Id, str] = {}
        if empty == "error":
            refused = {checked[i]: "the row has no entries" for i in np.flatnonzero(is_empty)}
        kept = range(len(checked)) if empty == "store" else np.flatnonzero(~is_empty).tolist()
        names: list[Id] = []
        order: list[int] = []
        written: list[Payload] = []
        for i in kept:
            own = range(int(parts.bounds[i]), int(parts.bounds[i + 1]))
            # The first one last: see the top of this module.
            for place in (*own[1:], own[0]):
                names.append(_name(checked[i], place - own[0]))
                order.append(place)
                number, span = place - own[0], parts.spans[place]
                written.append(self._payload(given[i], checked[i], number, len(own), span))
        if names:
            kept_ids = [checked[i] for i in kept]
            self._delete(set(self._passage_ids(kept_ids)) - set(names))
            try:
                self.store.upsert(parts.rows[np.array(order, np.int64)], names, written)
            except RejectedRows as rejection:
                owners = (id_of(one[DOCUMENT_FIELD]) for one in written)
                owner = dict(zip(names, owners, strict=True))
                for name, reason in zip(rejection.ids, rejection.reasons, strict=True):
                    refused.setdefault(owner[name], reason)
                self.delete([id for id in kept_ids if id in refused])
        if refused:
            raise RejectedRows(list(refused), list(refused.values()))
        found_empty = int(is_empty.sum()) if empty == "store" else 0
        return Written(len(kept), found_empty, tuple(skipped))

    def delete(self, ids: Sequence[Id]) -> int:
        """Removes documents with all their passages; returns how many were there."""
        checked = list(dict.fromkeys(checked_ids(ids)))
        there = {record.id for record in self.store.get(checked)}
        self._delete(set(self._passage_ids(checked)) - there)
        return self.store.delete(list(there)) if there else 0

    def update_payloads(self, ids: Sequence[Id], payloads: Sequence[Mapping[str, Any]]) -> int:
        """Sets fields of documents, in all their passages; see `Store.update_payloads`."""
        checked = checked_ids(ids, unique=True)
        if len(payloads) != len(checked):
            raise InputError(f"each id needs a payload, got {len(checked)} and {len(payloads)}.")
        given = dict(zip(checked, payloads, strict=True))
        firsts = self.store.get(checked)
        names, fields = [], []
        for record in firsts:
            for number in range(int(record.payload.get(COUNT_FIELD, 1))):
                names.append(_name(record.id, number))
                fields.append(given[record.id])
        self.store.update_payloads(names, fields)
        return len(firsts)

    def _payload(
        self, given: Mapping[str, Any] | None, id: Id, number: int, count: int, span: Span
    ) -> Payload:
        payload = dict(given or {})
        for name in PASSAGE_FIELDS:
            if name in payload:
                raise InputError(
                    f"the payload field {name!r} belongs to the library, got it for id {id!r}; "
                    "give the field another name."
                )
        text = None if self.text_key is None else payload.get(self.text_key)
        start, stop = span
        if isinstance(text, str):
            stop = len(text) if stop < 0 else stop
            payload[self.text_key or ""] = text[start:stop]
        about = (sort_key(id), number, count, [start, max(stop, start)])
        return {**payload, **dict(zip(PASSAGE_FIELDS, about, strict=True))}

    def _passage_ids(self, ids: Sequence[Id]) -> Iterator[Id]:
        """Ids of what the store has of these documents, more where that costs less."""
        for start in range(0, len(ids), _IDS_AT_ONCE):
            part = ids[start : start + _IDS_AT_ONCE]
            # What is written already but not yet searchable is known by its first passage, and
            # what was cut short before that was written is found by its document.
            for record in self.store.get(part):
                for number in range(int(record.payload.get(COUNT_FIELD, 1))):
                    yield _name(record.id, number)
            yield from self.store.ids(OneOf(_DOCUMENT, tuple(map(sort_key, part))))

    def _delete(self, ids: set[Id]) -> None:
        if ids:
            self.store.delete(sorted(ids, key=id_order))

    # Reading

    def search(
        self,
        row: SparseRows,
        limit: int = 10,
        filter: Any = None,
        offset: int = 0,
        *,
        min_score: float | None = None,
        best: int = 1,
    ) -> list[Hit]:
        """The best documents; see `Store.search`. A document scores the sum of its `best` passages.

        A hit shows the passage that matches best. Sums are of the documents with the best passages,
        32 times as many as are wanted at most.
        """
        if len(row) != 1:
            raise ShapeError(f"`search` takes one row, got {len(row)}; use `search_batch`.")
        return self.search_batch(row, limit, filter, offset, min_score=min_score, best=best)[0]

    def search_batch(
        self,
        rows: SparseRows,
        limit: int = 10,
        filter: Any = None,
        offset: int = 0,
        *,
        min_score: float | None = None,
        best: int = 1,
    ) -> list[list[Hit]]:
        """`search` for each row."""
        limit, offset = checked_page(limit, offset)
        found = self._ranked_documents(rows, limit + offset, filter, counted("best_passages", best))
        least = -np.inf if min_score is None else min_score
        return [[hit for hit in hits[offset:] if hit.score >= least] for hits in found]

    def _ranked_documents(
        self, rows: SparseRows, limit: int, filter: Any, best: int
    ) -> list[list[Hit]]:
        if best > 1:
            return [self._summed(row, limit, filter, best) for row in rows]
        grouped = self.store.search_documents(rows, limit, filter)
        found = []
        for i, row in enumerate(rows):
            hits = [] if grouped is None else grouped[i]
            # Fewer may be all there are, or all that the engine had the patience for.
            if len(hits) < limit and row.nnz:
                found.append(self.merged(partial(self._passages, row, filter), limit))
            else:
                found.append(ranked([hit] for hit in hits))
        return found

    def merged(self, ask: Callable[[int], list[Hit]], limit: int) -> list[Hit]:
        """The best documents of a ranking of passages, which is asked for more until it is enough.

        Args:
            ask: The best passages, so many at most, the best first.
            limit: Documents wanted.
        """
        count = limit * _FIRST_GUESS
        while True:
            hits = ask(count)
            best = ranked(groups_of(hits))
            # A passage as good as the last one may be of a document whose id comes first.
            is_enough = len(best) >= limit and best[limit - 1].score > hits[-1].score
            if is_enough or len(hits) < count:
                return best[:limit]
            count *= 4

    def _passages(self, row: SparseRows, filter: Any, count: int) -> list[Hit]:
        return self.store.search(row, count, filter)

    def _summed(self, row: SparseRows, limit: int, filter: Any, best: int) -> list[Hit]:
        """The best documents by the sum of their best passages."""
        for wanted in (limit * factor for factor in _MORE_DOCUMENTS):
            chosen = self._ranked_documents(row, wanted, filter, 1)[0]
            if not chosen:
                return []
            count = sum(hit.passage.count if hit.passage else 1 for hit in chosen)
            keys = tuple(sort_key(hit.id) for hit in chosen)
            hits = self.store.search(row, count, OneOf(_DOCUMENT, keys))
            documents = ranked(groups_of(hits), best)
            # No other document has a passage above the last one's best.
            most = best * chosen[-1].score
            if len(chosen) < wanted or documents[limit - 1].score >= most:
                break
        return documents[:limit]

    def get(self, ids: Sequence[Id], with_rows: bool = False) -> list[Record]:
        """The documents of these ids in this order, with the text of all their passages."""
        return self._with_rest(self.store.get(checked_ids(ids), with_rows))

    def _with_rest(self, firsts: Sequence[Record]) -> list[Record]:
        rest = [
            _name(record.id, number)
            for record in firsts
            for number in range(1, int(record.payload.get(COUNT_FIELD, 1)))
        ]
        more = {record.id: record for record in self.store.get(rest)} if rest else {}
        return [self._joined(record, more) for record in firsts]

    def passages_of(self, hits: Sequence[Hit]) -> list[Record]:
        """The passage of each hit with its vector; hits that are gone are left out."""
        names = [_name(hit.id, hit.passage.number if hit.passage else 0) for hit in hits]
        found = {record.id: record for record in self.store.get(names, with_rows=True)}
        return [
            Record(hit.id, shown(found[name].payload), found[name].row)
            for hit, name in zip(hits, names, strict=True)
            if name in found
        ]

    def best_passage(self, row: SparseRows, id: Id) -> Record | None:
        """The passage of a document that scores highest, with its vector; `None` without one."""
        first = self.store.get([id], with_rows=True)
        if not first:
            return None
        count = int(first[0].payload.get(COUNT_FIELD, 1))
        rest = [_name(first[0].id, number) for number in range(1, count)]
        records = first + (self.store.get(rest, with_rows=True) if rest else [])
        rows = [record.row for record in records if record.row is not None]
        if len(rows) < len(records):
            return first[0]
        chosen = records[int(np.argmax(SparseRows.concat(rows).dot(row)[:, 0]))]
        return Record(first[0].id, shown(chosen.payload), chosen.row)

    def ids(self, filter: Any = None) -> Iterator[Id]:
        """All ids, of documents the filter keeps when one is given."""
        return self.store.ids(_of_documents(filter))

    def scroll(self, limit: int = 100, filter: Any = None, after: str | None = None) -> Page:
        """Documents in the order of the store, a page at a time; see `Store.scroll`."""
        page = self.store.scroll(limit, _of_documents(filter), after)
        return Page(self._with_rest(page.records), page.next)

    def count(self, filter: Any = None) -> int:
        """Number of documents, of those the filter keeps when one is given."""
        return self.store.count(_of_documents(filter))

    def search_documents(
        self, rows: SparseRows, limit: int, filter: Any = None
    ) -> list[list[Hit]] | None:
        """What the store answers; see `Store.search_documents`."""
        return self.store.search_documents(rows, limit, filter)

    # Life

    def flush(self) -> None:
        """Makes everything written survive a loss of power."""
        self.store.flush()

    def optimize(self) -> None:
        """Reorganises the index after much was written."""
        self.store.optimize()

    def close(self) -> None:
        """Closes the store; a second call does nothing."""
        self.store.close()

    def __enter__(self) -> DocumentView:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _joined(self, first: Record, more: Mapping[Id, Record]) -> Record:
        payload = shown(first.payload)
        count = int(first.payload.get(COUNT_FIELD, 1))
        text = "" if self.text_key is None else payload.get(self.text_key)
        if self.text_key is not None and isinstance(text, str):
            for number in range(1, count):
                record = more.get(_name(first.id, number))
                if record is None:
                    break  # it is being written just now
                start = int(record.payload[SPAN_FIELD][0])
                text = text[:start] + str(record.payload.get(self.text_key, ""))
            payload[self.text_key] = text
        return Record(first.id, payload, first.row)


def _whole(rows: SparseRows) -> PassageRows:
    """Documents of one passage each, which is the whole text, however long."""
    return PassageRows(rows, np.arange(len(rows) + 1, dtype=np.int64), [(0, -1)] * len(rows))


def _own_ids(ids: Sequence[Id]) -> list[Id]:
    checked = checked_ids(ids, unique=True)
    for id in checked:
        if isinstance(id, str) and id.startswith(PASSAGE_PREFIX):
            raise InputError(
                f"ids that start with {PASSAGE_PREFIX!r} are of passages, got {id!r}; give the "
                "document another id."
            )
    return checked


def _name(id: Id, number: int) -> Id:
    return id if number == 0 else passage_id(sort_key(id), number)


def _of_documents(filter: Any) -> Filter:
    """A filter of passages that keeps one of each document that `filter` keeps."""
    first = Equals(_NUMBER, 0)
    if filter is None:
        return first
    if not isinstance(filter, (Mapping, Filter)):
        raise ConfigError(
            "documents in passages are counted by a filter of this library, got "
            f"{type(filter).__name__}; write it as a dictionary, see vdr_db.filters."
        )
    return AllOf((parse_filter(filter), first))
