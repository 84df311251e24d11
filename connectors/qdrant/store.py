"""`QdrantStore`: a collection in an embedded Qdrant or on a server.

Validation, ids, payloads, batches and order are handled here, once; what differs between the
embedded engine and a server is behind `Engine`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vdr_db.connectors.base import (
    Documents,
    EmptyRows,
    Id,
    Payload,
    Written,
)
from vdr_db.connectors.halving import deliver
from vdr_db.connectors.ids import checked_ids
from vdr_db.connectors.qdrant.documents import (
    Upload,
)
from vdr_db.connectors.qdrant.engine import (
    DATATYPES,
    Batch,
    Datatype,
    DenseVector,
    Engine,
    IndexKind,
    PointId,
    checked_dense,
    checked_indexes,
)
from vdr_db.connectors.qdrant.existing import Existing, point_of
from vdr_db.connectors.qdrant.search import POINTS_AT_ONCE, CollectionReader
from vdr_db.errors import ConfigError, RejectedRows
from vdr_db.sparse import SparseRows

if TYPE_CHECKING:
    from vdr_db.connectors.qdrant.requests import IndexMemory
    from vdr_db.connectors.retry import RetryPolicy

__all__ = ["QdrantStore"]


class QdrantStore(CollectionReader):
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

    def index_payloads(self, indexes: Mapping[str, IndexKind]) -> None:
        """Makes payload indexes over documents that are there already; see `payload_indexes`."""
        made, checked = self._made(), checked_indexes(indexes)
        self._engine.index(checked)
        whole = {**made.payload_indexes, **checked}
        self._manifest = replace(made, payload_indexes=whole)

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
            for start in range(0, len(wanted), POINTS_AT_ONCE):
                part = wanted[start : start + POINTS_AT_ONCE]
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
        for start in range(0, len(wanted), POINTS_AT_ONCE):
            part = wanted[start : start + POINTS_AT_ONCE]
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


def _opened_again(kind: type[QdrantStore], given: dict[str, Any]) -> QdrantStore:
    return kind(**given)
