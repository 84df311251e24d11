"""`QdrantStore`: a collection in an embedded Qdrant or on a server.

Validation, ids, payloads, batches and order are handled here, once; what differs between the
embedded engine and a server is behind `Engine`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vdr_db.connectors.base import (
    Documents,
    EmptyRows,
    Hit,
    Id,
    Page,
    Payload,
    Record,
    Written,
    checked_page,
    page_token,
)
from vdr_db.connectors.fusion import checked_weight, paged
from vdr_db.connectors.halving import deliver
from vdr_db.connectors.ids import checked_ids, id_order
from vdr_db.connectors.qdrant.documents import (
    Upload,
    checked_fusion,
    checked_nearest,
    hits_of,
    id_of,
    point_of_text,
    record_of,
    shown,
)
from vdr_db.connectors.qdrant.engine import (
    DATATYPES,
    ID_FIELD,
    Batch,
    Datatype,
    DenseVector,
    Engine,
    HybridQuery,
    IndexKind,
    PointId,
    Stored,
    checked_dense,
    checked_indexes,
)
from vdr_db.connectors.qdrant.existing import Existing, point_of
from vdr_db.connectors.qdrant.lifecycle import CollectionLifecycle
from vdr_db.connectors.qdrant.server import ServerEngine
from vdr_db.connectors.renamed import renamed
from vdr_db.connectors.store import TRUSTED_S
from vdr_db.connectors.validation import DOCUMENT_FIELD, checked_query
from vdr_db.errors import ConfigError, RejectedRows
from vdr_db.sparse import SparseRows

if TYPE_CHECKING:
    from vdr_db.connectors.qdrant.requests import IndexMemory
    from vdr_db.connectors.retry import RetryPolicy

__all__ = ["QdrantStore"]

_PAGE = 1000
RANK_CONSTANT = 2
"""What Qdrant uses for its own fusion when a request names none; it counts ranks from 0."""


class QdrantStore(CollectionLifecycle):
    """A `Store` in Qdrant.

    Args:
        collection: Name of the collection.
        path: Folder for the embedded engine, or `":memory:"` for a temporary one.
        url: Address of a server.
        client: A ready `qdrant_client.QdrantClient`, instead of `url`; it is not closed here.
        api_key: For `url`.
        prefer_grpc: Speak gRPC to the server, several times smaller than REST for sparse vectors.
        timeout: Seconds for one request to a server.
        retry: When and how long to try again what a server fails to do for a passing reason. The
            first look at a server is not repeated, so that a wrong address is told at once.
        datatype: How the index keeps weights: `"float32"` (the default), or `"float16"`, `"uint8"`
            for less memory and other scores. Vectors read back are float32 in any case. float16
            ends at 65,504, which is refused beyond, and knows no weight below 6e-8; uint8 divides
            the range of weights evenly, so a heavy tail costs much: 16 % mean error of scores, 1.2
            % among the ten best.
        payload_indexes: Payload key → `"keyword"`, `"integer"`, `"float"`, `"bool"`, `"datetime"`,
            `"uuid"` or `"tenant"`, made with the collection; they speed filters up.
        full_scan_threshold: With a filter that keeps fewer documents than this, they are scored one
            by one. The engine's own default is slow for long queries.
        index_memory: On a server, where the index lives: `"pinned"`, `"cached"` or `"cold"`.
        client_options: For `url`, more arguments of `QdrantClient`, such as `grpc_port` or TLS.
        collection_options: On a server, more arguments of `create_collection`, such as
            `shard_number`.
        dense: Dense vectors that documents may have beside the sparse one: name → size (compared
            by cosine) or `DenseVector`.
        vector_name: On a server, name of the sparse vector, `"vdr"` by default.
        versioned: On a server, make `collection-000001` with `collection` as its alias, so that
            `rebuild` can put another one in its place.
        existing: Open what is there, and never make or change it; see `from_existing`.
        read_options: On a server, arguments that all reading methods of the client get where they
            have them: `{"consistency": "majority", "shard_key_selector": "a"}`, and
            `{"with_payload": ["title"]}` for the fields that hits show.
        write_options: The same for writing: `{"ordering": "strong", "shard_key_selector": "a"}`.

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
        retry: RetryPolicy | None = None,
        datatype: Datatype | None = None,
        payload_indexes: Mapping[str, IndexKind] | None = None,
        full_scan_threshold: int = 500,
        index_memory: IndexMemory | None = None,
        client_options: Mapping[str, Any] | None = None,
        collection_options: Mapping[str, Any] | None = None,
        dense: Mapping[str, DenseVector | int] | None = None,
        vector_name: str | None = None,
        versioned: bool = False,
        existing: Existing | None = None,
        read_options: Mapping[str, Any] | None = None,
        write_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._given = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        if not isinstance(collection, str) or not collection:
            raise ConfigError(f"`collection` must be a name, got {collection!r}.")
        if sum(place is not None for place in (path, url, client)) != 1:
            raise ConfigError(
                "exactly one of `path` (a folder or ':memory:'), `url` and `client` is needed; "
                "pass path=':memory:' to try things out."
            )
        server: dict[str, Any] = {
            "api_key": api_key,
            "client_options": client_options,
            "retry": retry,
            "collection_options": collection_options,
            "index_memory": index_memory,
            "vector_name": vector_name,
            "versioned": versioned or None,
            "existing": existing,
            "read_options": read_options,
            "write_options": write_options,
        }
        for name, option in server.items():
            place, fits = "url` or `client", path is None
            if name in ("api_key", "client_options"):
                place, fits = "url", url is not None
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
        self._dense = checked_dense(dense)
        self._vector_name = vector_name
        self._full_scan_threshold = full_scan_threshold
        # An embedded engine writes one batch at a time; a server takes several streams.
        self.concurrent_writers = 1 if path is not None else 2
        self._engine: Engine
        if path is not None:
            from vdr_db.connectors.qdrant.edge import EdgeEngine

            self._engine = EdgeEngine(collection, path)
        else:
            from vdr_db.connectors.qdrant.server import ServerEngine

            server.update(url=url, client=client, prefer_grpc=prefer_grpc, timeout=timeout)
            self._engine = ServerEngine(collection, **server)
        try:
            self._manifest = self._engine.open()
            if self._manifest is not None:
                self._manifest.check_options(
                    self._where, self._datatype, self._payload_indexes, self._dense
                )
        except BaseException:
            self._engine.close()
            raise

    @classmethod
    def from_existing(
        cls,
        collection: str,
        *,
        vector_name: str | None = None,
        adopt: bool = False,
        width: int | None = None,
        documents: Documents = "encoded",
        **options: Any,
    ) -> QdrantStore:
        """Opens a collection that is on a server already, and neither makes nor changes it.

        Args:
            collection: Its name, or an alias.
            vector_name: Its sparse vector; needed when it has several.
            adopt: Take one that this library did not make, so that nothing tells which model made
                its vectors: the caller vouches for that.
            width: Vocabulary size of that model.
            documents: What its document side is, when it is adopted.
            options: `url` or `client`, and more options of `QdrantStore`.

        Raises:
            StoreError: There is no such collection.
            StoreMismatch: It is not described and not to be adopted, has no such sparse vector or
                several, holds larger token ids than the vocabulary, or multiplies its weights.
            ConfigError: It is to be adopted, and the width is not told.
        """
        existing = Existing(adopt=adopt, width=width, documents=documents)
        return cls(collection, vector_name=vector_name, existing=existing, **options)

    def __repr__(self) -> str:
        state = ", closed" if self._is_closed else ""
        return f"QdrantStore({self._where}{state})"

    def __reduce__(self) -> tuple[Callable[..., QdrantStore], tuple[type, dict[str, Any]]]:
        """Pickles how it was opened, the key included; unpickled it is opened again.

        Raises:
            TypeError: It is in memory, or has a client of the caller's.
        """
        if str(self._given["path"]) == ":memory:" or self._given["client"] is not None:
            raise TypeError(
                f"{self._where} is of this process alone and cannot be pickled; open it by the "
                "path of a folder or the `url` of a server."
            )
        return _opened_again, (type(self), self._given)

    def upsert(
        self,
        rows: SparseRows,
        ids: Sequence[Id],
        payloads: Sequence[Mapping[str, Any] | None] | None = None,
        *,
        empty: EmptyRows = "store",
        dense: Mapping[str, Any] | None = None,
    ) -> Written:
        """Writes rows; see `Store.upsert`.

        Args:
            rows: Sparse vectors.
            ids: One for each row.
            payloads: One mapping (or `None`) for each row.
            empty: What becomes of rows without entries.
            dense: Name → `[N, size]` dense vectors of the same documents. A document is replaced as
                a whole: without them, those it had are gone.
        """
        self._look_again()
        upload = Upload(
            rows,
            ids,
            payloads,
            dense,
            made=self._made(),
            limits=self._engine.limits,
            empty=empty,
            where=self._where,
        )

        def refuse(one: Batch, error: Exception) -> None:
            upload.refused[one.ids[0]] = str(error)

        for batch in upload.batches():
            deliver(batch, self._engine.upsert, refuse)
        if upload.refused:
            raise RejectedRows(list(upload.refused), list(upload.refused.values()))
        return upload.written

    def search_with_dense(
        self,
        row: SparseRows,
        vector: Any,
        limit: int = 10,
        filter: Any = None,
        offset: int = 0,
        *,
        using: str | None = None,
        depth: int = 100,
        rank_constant: int | None = None,
        dense_weight: float = 1.0,
    ) -> list[Hit]:
        """The best documents by sparse and dense vector together: reciprocal rank fusion (RRF).

        Args:
            row: The sparse query, one row.
            vector: The dense query, `[size]`.
            limit: Hits wanted.
            filter: Conditions on payloads, for both sides.
            offset: Hits to leave out at the start.
            using: Name of the dense vector; needed when there are several.
            depth: Hits of each side that the fusion looks at; those below follow after them.
            rank_constant: Larger values give the first ranks less weight; `None` is Qdrant's, 2.
            dense_weight: Weight of the dense ranking, where the sparse one has 1.

        Raises:
            ConfigError: There is no such dense vector, or a number is impossible.
            ShapeError: A query has another shape.
        """
        limit, offset = checked_page(limit, offset)
        depth, rank_constant = checked_fusion(depth, rank_constant)
        made = self._made()
        self._look_again(TRUSTED_S)
        query = checked_query(row, made.width, self._where, single=True)
        using, numbers = checked_nearest(vector, using, made.dense, self._where)
        asked = HybridQuery(query, using, numbers, filter)
        weights = [1.0, checked_weight("dense_weight", dense_weight)]

        def rankings(count: int) -> list[list[tuple[tuple[Id, PointId], float]]]:
            answers = self._engine.rankings(asked, count)
            return [[((id_of(one), one.point), one.score) for one in answer] for answer in answers]

        page = paged(
            rankings,
            RANK_CONSTANT if rank_constant is None else rank_constant,
            lambda one: id_order(one[0]),
            depth=depth,
            limit=limit,
            offset=offset,
            weights=weights if query.nnz else weights[1:],
        )
        records = self._engine.retrieve([point for (_, point), _ in page], False)
        payloads = {one.point: shown(one.payload) for one in records}
        # One that was deleted meanwhile is not there any more.
        return [Hit(id, x, payloads[point]) for (id, point), x in page if point in payloads]

    search_hybrid = renamed("search_hybrid", search_with_dense)

    def search_groups(
        self, row: SparseRows, group_by: str, limit: int = 10, size: int = 3, filter: Any = None
    ) -> list[tuple[Any, list[Hit]]]:
        """The best values of a payload field, each with its best documents; on a server.

        Args:
            row: The query, one row.
            group_by: A payload field, such as the document that passages belong to.
            limit: Values wanted.
            size: Documents of each at most.
            filter: Conditions on payloads.

        Raises:
            ConfigError: The collection is embedded.
        """
        limit, _ = checked_page(limit, 0)
        size, _ = checked_page(size, 0)
        query = checked_query(row, self._made_width(), self._where, single=True)
        engine = self._server()
        if not query.nnz:
            return []
        found = engine.groups(query, group_by, limit, size, filter)
        return [(value, hits_of(points)) for value, points in found]

    def search_documents(
        self, rows: SparseRows, limit: int, filter: Any = None
    ) -> list[list[Hit]] | None:
        """The best passages of the best documents; see `Store.search_documents`."""
        if not isinstance(self._engine, ServerEngine):
            return None
        self._look_again(TRUSTED_S)
        queries = checked_query(rows, self._made_width(), self._where)
        return [
            [hits[0] for _, hits in self.search_groups(row, DOCUMENT_FIELD, limit, 1, filter)]
            for row in queries
        ]

    def index_payloads(self, indexes: Mapping[str, IndexKind]) -> None:
        """Makes payload indexes over documents that are there already; see `payload_indexes`."""
        made, checked = self._made(), checked_indexes(indexes)
        self._engine.index(checked)
        whole = {**made.payload_indexes, **checked}
        self._manifest = replace(made, payload_indexes=whole)

    def get(self, ids: Sequence[Id], with_rows: bool = False) -> list[Record]:
        """The documents of these ids in this order; unknown ids are left out."""
        made = self._made()
        width = made.width
        wanted = [point_of(made, id) for id in checked_ids(ids)]
        found: dict[PointId, Stored] = {}
        for start in range(0, len(wanted), _PAGE):
            page = self._engine.retrieve(wanted[start : start + _PAGE], with_rows)
            found.update((stored.point, stored) for stored in page)
        return [
            record_of(found[point], width if with_rows else None)
            for point in wanted
            if point in found
        ]

    def ids(self, filter: Any = None) -> Iterator[Id]:
        """All ids, or those the filter keeps, in the order of the points.

        Documents written meanwhile may be missed.
        """
        self._made()
        after: PointId | None = None
        while True:
            self._check_open()
            page, after = self._engine.scroll(after, _PAGE, [ID_FIELD], filter)
            for stored in page:
                yield id_of(stored)
            if after is None:
                return

    def scroll(self, limit: int = 100, filter: Any = None, after: str | None = None) -> Page:
        """Documents in the order of the points; see `Store.scroll`."""
        self._made()
        limit, _ = checked_page(limit, 0)
        start = None if after is None else page_token(after, point_of_text, self._where)
        stored, following = self._engine.scroll(start, limit, None, filter)
        records = [record_of(one, None) for one in stored]
        return Page(records, None if following is None else str(following))

    def count(self, filter: Any = None) -> int:
        """Number of documents, of those the filter keeps when one is given."""
        self._check_open()
        return 0 if self._manifest is None else self._engine.count(filter)

    def update_payloads(self, ids: Sequence[Id], payloads: Sequence[Mapping[str, Any]]) -> int:
        """Sets fields of payloads; see `Store.update_payloads`. Equal ones go in one request."""
        made, changes = self._made(), self._checked_changes(ids, payloads)
        self._look_again()
        groups: dict[str, tuple[Payload, list[PointId]]] = {}
        for id, payload in changes.items():
            point = point_of(made, id)
            groups.setdefault(json.dumps(payload, sort_keys=True), (payload, []))[1].append(point)
        updated = 0
        for payload, wanted in groups.values():
            for start in range(0, len(wanted), _PAGE):
                part = wanted[start : start + _PAGE]
                there = [s.point for s in self._engine.retrieve(part, False, with_payload=False)]
                if there and payload:
                    self._engine.set_payload(payload, there)
                updated += len(there)
        return updated

    def delete(self, ids: Sequence[Id]) -> int:
        """Removes documents; returns how many were there."""
        made = self._made()
        self._look_again()
        wanted = list(dict.fromkeys(point_of(made, id) for id in checked_ids(ids)))
        removed = 0
        for start in range(0, len(wanted), _PAGE):
            part = wanted[start : start + _PAGE]
            there = [s.point for s in self._engine.retrieve(part, False, with_payload=False)]
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

    def _hits(self, queries: SparseRows, limit: int, offset: int, filter: Any) -> list[list[Hit]]:
        return list(map(hits_of, self._engine.search(queries, limit, offset, filter)))


def _opened_again(kind: type[QdrantStore], given: dict[str, Any]) -> QdrantStore:
    return kind(**given)
