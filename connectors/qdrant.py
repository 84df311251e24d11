"""`QdrantStore`: a collection in an embedded Qdrant or on a server.

Validation, ids, payloads, batches and order are handled here, once; what differs between the
embedded engine and a server is behind `Engine`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from vdr_db.connectors.base import (
    Documents,
    EmptyRows,
    Hit,
    Id,
    Payload,
    Record,
    Written,
    check_stamp,
    checked_page,
)
from vdr_db.connectors.ids import checked_ids, id_order, point_id
from vdr_db.connectors.qdrant_engine import (
    DATATYPES,
    Datatype,
    Engine,
    IndexKind,
    Manifest,
    PointId,
    RefusedBatch,
    Stored,
    checked_indexes,
)
from vdr_db.connectors.validation import RESERVED_PREFIX, checked_query, prepare
from vdr_db.errors import ConfigError, RejectedRows, StoreError
from vdr_db.sparse import SparseRows
from vdr_db.stamp import EncoderStamp

if TYPE_CHECKING:
    from vdr_db.connectors.qdrant_server import IndexMemory

__all__ = ["QdrantStore"]

_ID_FIELD = RESERVED_PREFIX + "id"
_PAGE = 1000


class QdrantStore:
    """A `Store` in Qdrant.

    Args:
        collection: Name of the collection.
        path: Folder for the embedded engine, or `":memory:"` for a temporary one.
        url: Address of a server.
        client: A ready `qdrant_client.QdrantClient`, instead of `url`; it is not closed here.
        api_key: For `url`.
        prefer_grpc: Speak gRPC to the server, several times smaller than REST for sparse vectors.
        timeout: Seconds for one request to a server.
        datatype: How the index keeps weights: `"float32"` (the default), or `"float16"`, `"uint8"`
            for less memory and other scores. Vectors read back are float32 in any case.
        payload_indexes: Payload key → `"keyword"`, `"integer"`, `"float"`, `"bool"`, `"datetime"`,
            `"uuid"` or `"tenant"`, made with the collection; they speed filters up.
        full_scan_threshold: With a filter that keeps fewer documents than this, they are scored one
            by one. The engine's own default is slow for long queries.
        index_memory: On a server, where the index lives: `"pinned"`, `"cached"` or `"cold"`.
        client_options: For `url`, more arguments of `QdrantClient`, such as `grpc_port` or TLS.
        collection_options: On a server, more arguments of `create_collection`, such as
            `shard_number`.

    Raises:
        ConfigError: Not exactly one of `path`, `url` and `client` is given, or an option is
            impossible.
        MissingExtraError: The engine's package is not installed.
        StoreMismatch: The place holds something else, or a collection of another name or kind.
        StoreUnavailable: It cannot be reached, or another process has it open.
    """

    def __init__(
        self,
        collection: str,
        *,
        path: str | os.PathLike[str] | None = None,
        url: str | None = None,
        client: Any = None,
        api_key: str | None = None,
        prefer_grpc: bool = True,
        timeout: int = 60,
        datatype: Datatype | None = None,
        payload_indexes: Mapping[str, IndexKind] | None = None,
        full_scan_threshold: int = 500,
        index_memory: IndexMemory | None = None,
        client_options: Mapping[str, Any] | None = None,
        collection_options: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(collection, str) or not collection:
            raise ConfigError(f"`collection` must be a name, got {collection!r}.")
        if sum(place is not None for place in (path, url, client)) != 1:
            raise ConfigError(
                "exactly one of `path` (a folder or ':memory:'), `url` and `client` is needed; "
                "pass path=':memory:' to try things out."
            )
        for name, option, place, fits in (
            ("api_key", api_key, "url", url is not None),
            ("client_options", client_options, "url", url is not None),
            ("collection_options", collection_options, "url` or `client", path is None),
            ("index_memory", index_memory, "url` or `client", path is None),
        ):
            if option is not None and not fits:
                raise ConfigError(f"`{name}` goes with `{place}`; leave it out here.")
        if datatype is not None and datatype not in DATATYPES:
            raise ConfigError(f"`datatype` must be one of {DATATYPES}, got {datatype!r}.")
        if isinstance(full_scan_threshold, bool) or not 0 <= full_scan_threshold < 2**32:
            raise ConfigError(
                f"`full_scan_threshold` must lie in [0, 2^32), got {full_scan_threshold!r}."
            )
        self.name = collection
        self._datatype: Datatype | None = datatype
        self._payload_indexes = checked_indexes(payload_indexes)
        self._full_scan_threshold = full_scan_threshold
        # An embedded engine writes one batch at a time; a server takes several streams.
        self.concurrent_writers = 1 if path is not None else 2
        self._closed = False
        self._engine: Engine
        if path is not None:
            from vdr_db.connectors.qdrant_edge import EdgeEngine

            self._engine = EdgeEngine(collection, path)
        else:
            from vdr_db.connectors.qdrant_server import ServerEngine

            self._engine = ServerEngine(
                collection,
                url=url,
                client=client,
                api_key=api_key,
                prefer_grpc=prefer_grpc,
                timeout=timeout,
                index_memory=index_memory,
                client_options=client_options,
                collection_options=collection_options,
            )
        try:
            self._manifest = self._engine.open()
            if self._manifest is not None:
                self._manifest.check_options(
                    self._engine.where, self._datatype, self._payload_indexes
                )
        except BaseException:
            self._engine.close()
            raise

    @property
    def width(self) -> int | None:
        """Width of all rows, `None` while the collection is not made."""
        return None if self._manifest is None else self._manifest.width

    @property
    def stamp(self) -> EncoderStamp | None:
        """The encoder the collection was made for, as far as known."""
        return None if self._manifest is None else self._manifest.stamp

    @property
    def documents(self) -> Documents:
        """What the document side is."""
        return "encoded" if self._manifest is None else self._manifest.documents

    @property
    def datatype(self) -> Datatype:
        """How the index keeps weights."""
        kept = self._datatype if self._manifest is None else self._manifest.datatype
        return kept or "float32"

    def __repr__(self) -> str:
        """The collection and its place, without secrets."""
        state = ", closed" if self._closed else ""
        return f"QdrantStore({self._engine.where}{state})"

    def create(
        self, width: int, stamp: EncoderStamp | None = None, *, documents: Documents = "encoded"
    ) -> None:
        """Makes the collection, or checks the one that is there; see `Store.create`."""
        self._check_open()
        if self._manifest is not None:
            kept = (self._manifest.width, self._manifest.stamp, self._manifest.documents)
            check_stamp(self._engine.where, kept, (width, stamp, documents))
            return
        SparseRows.empty(0, width)  # checks the width
        manifest = Manifest(
            collection=self.name,
            width=width,
            stamp=stamp,
            documents=documents,
            datatype=self.datatype,
            full_scan_threshold=self._full_scan_threshold,
            payload_indexes=self._payload_indexes,
        )
        self._engine.create(manifest)
        self._manifest = manifest

    def upsert(
        self,
        rows: SparseRows,
        ids: Sequence[Id],
        payloads: Sequence[Mapping[str, Any] | None] | None = None,
        *,
        empty: EmptyRows = "store",
    ) -> Written:
        """Writes rows; see `Store.upsert`."""
        made = self._made()
        limits = self._engine.limits
        ready = prepare(
            rows,
            ids,
            payloads,
            width=made.width,
            empty=empty,
            limits=limits,
            where=self._engine.where,
        )
        refused = dict(ready.refused)
        points = [point_id(id) for id in ready.ids]
        # The caller's id travels in the payload: a string id cannot be read off its point.
        kept: list[Payload] = [
            {_ID_FIELD: id, **payload}
            for id, payload in zip(ready.ids, ready.payloads, strict=True)
        ]
        for part in ready.batches(limits):
            size = int(ready.sizes[part].sum())
            reasons = self._write(points[part], ready.rows[part], kept[part], size)
            refused.update((ready.ids[part.start + i], reason) for i, reason in reasons.items())
        if refused:
            raise RejectedRows(list(refused), list(refused.values()))
        return Written(len(ready.ids), ready.empty, ready.skipped)

    def search(
        self, row: SparseRows, limit: int = 10, filter: Any = None, offset: int = 0
    ) -> list[Hit]:
        """The best documents; see `Store.search`.

        Args:
            row: The query, one row.
            limit: Hits wanted.
            filter: A dictionary (see `vdr_db.filters`), or a filter object of the engine's package.
            offset: Hits to leave out at the start.
        """
        checked_page(limit, offset)
        query = checked_query(row, self._made().width, self._engine.where, single=True)
        return self._search(query, limit, offset, filter)[0]

    def search_batch(
        self, rows: SparseRows, limit: int = 10, filter: Any = None
    ) -> list[list[Hit]]:
        """`search` for each row, in as few requests as possible."""
        checked_page(limit, 0)
        queries = checked_query(rows, self._made().width, self._engine.where)
        return self._search(queries, limit, 0, filter)

    def get(self, ids: Sequence[Id], with_rows: bool = False) -> list[Record]:
        """The documents of these ids in this order; unknown ids are left out."""
        width = self._made().width
        wanted = [point_id(id) for id in checked_ids(ids)]
        found: dict[PointId, Stored] = {}
        for start in range(0, len(wanted), _PAGE):
            page = self._engine.retrieve(wanted[start : start + _PAGE], with_rows)
            found.update((stored.point, stored) for stored in page)
        return [
            _record(found[point], width if with_rows else None)
            for point in wanted
            if point in found
        ]

    def ids(self) -> Iterator[Id]:
        """All ids, in the order of the points; documents written meanwhile may be missed."""
        self._made()
        after: PointId | None = None
        while True:
            self._check_open()
            page, after = self._engine.scroll(after, _PAGE, [_ID_FIELD])
            for stored in page:
                yield stored.payload.get(_ID_FIELD, stored.point)
            if after is None:
                return

    def count(self, filter: Any = None) -> int:
        """Number of documents, of those the filter keeps when one is given."""
        self._check_open()
        return 0 if self._manifest is None else self._engine.count(filter)

    def delete(self, ids: Sequence[Id]) -> int:
        """Removes documents; returns how many were there."""
        self._made()
        wanted = list(dict.fromkeys(point_id(id) for id in checked_ids(ids)))
        removed = 0
        for start in range(0, len(wanted), _PAGE):
            there = [s.point for s in self._engine.retrieve(wanted[start : start + _PAGE], False)]
            if there:
                self._engine.delete(there)
            removed += len(there)
        return removed

    def flush(self) -> None:
        """Makes everything written survive a loss of power."""
        self._check_open()
        self._engine.flush()

    def optimize(self) -> None:
        """Reorganises the index after much was written; searches are right with and without."""
        self._check_open()
        self._engine.optimize()

    def close(self) -> None:
        """Releases the store; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self._engine.close()

    def __enter__(self) -> QdrantStore:
        """The store itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the store."""
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"{self._engine.where} is closed; open it again to use it.")

    def _made(self) -> Manifest:
        self._check_open()
        if self._manifest is None:
            raise StoreError(
                f"{self._engine.where} holds nothing yet; add documents first, or check its name "
                "and place."
            )
        return self._manifest

    def _write(
        self, points: list[PointId], rows: SparseRows, payloads: list[Payload], size: int
    ) -> dict[int, str]:
        """Writes a batch, halving it around what a server refuses; position → reason."""
        try:
            self._engine.upsert(points, rows, payloads, size)
        except RefusedBatch as refusal:
            if len(points) == 1:
                return {0: str(refusal)}
            middle = len(points) // 2
            reasons = self._write(points[:middle], rows[:middle], payloads[:middle], size)
            later = self._write(points[middle:], rows[middle:], payloads[middle:], size)
            return reasons | {middle + i: reason for i, reason in later.items()}
        return {}

    def _search(self, queries: SparseRows, limit: int, offset: int, filter: Any) -> list[list[Hit]]:
        results: list[list[Hit]] = [[] for _ in range(len(queries))]
        asked = np.flatnonzero(queries.counts)
        if asked.size:
            answers = self._engine.search(queries[asked], limit, offset, filter)
            for i, answer in zip(asked, answers, strict=True):
                hits = [
                    Hit(found.payload.get(_ID_FIELD, found.point), found.score, _own(found.payload))
                    for found in answer
                ]
                results[i] = sorted(hits, key=lambda hit: (-hit.score, *id_order(hit.id)))
        return results


def _own(payload: Payload) -> Payload:
    return {name: v for name, v in payload.items() if not name.startswith(RESERVED_PREFIX)}


def _record(stored: Stored, width: int | None) -> Record:
    row = None
    if width is not None:
        indices = np.asarray(stored.indices if stored.indices is not None else [], np.int64)
        values = np.asarray(stored.values if stored.values is not None else [], np.float32)
        row = SparseRows([0, indices.size], indices, values, width)
    payload = {name: value for name, value in stored.payload.items() if name != _ID_FIELD}
    return Record(stored.payload.get(_ID_FIELD, stored.point), payload, row)
