"""Qdrant on a server, through `qdrant-client` over gRPC or REST."""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

from vdr_db.connectors.base import BatchLimits, Payload
from vdr_db.connectors.qdrant_engine import (
    VECTOR_NAME,
    Found,
    Manifest,
    PointId,
    RefusedBatch,
    Stored,
)
from vdr_db.connectors.qdrant_filters import ClientDialect, to_qdrant
from vdr_db.errors import ConfigError, StoreError, StoreMismatch, StoreUnavailable, require
from vdr_db.filters import Filter, parse_filter
from vdr_db.sparse import SparseRows

__all__ = ["IndexMemory", "ServerEngine"]

IndexMemory: TypeAlias = Literal["pinned", "cached", "cold"]
"""Where the sparse index lives: locked in memory, in the page cache, on disk."""

_METADATA_KEY = "vdr_db"
# Servers before 1.16 keep no metadata with a collection; manifests then have a collection of their
# own, one point each.
_METADATA_SINCE = (1, 16)
_MANIFESTS = "vdr_db_manifests"
_MEMORY_SINCE = (1, 19)

_QUERIES_AT_ONCE = 64
_PASSING_CODES = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "CANCELLED"}
_PASSING_STATUS = {408, 429, 500, 502, 503, 504}
_PASSING_ERRORS = {"ResponseHandlingException", "ResourceExhaustedResponse"}
_REFUSING_STATUS = {400, 413, 422}
_TOO_LARGE = re.compile(r"larger than|too large|message size", re.IGNORECASE)


class ServerEngine:
    """An `Engine` over `QdrantClient`.

    Args:
        collection: Name of the collection, or an alias of one.
        url: Address of the server.
        client: A ready client instead of `url`; `close` leaves it open.
        api_key: For `url`; it is never shown.
        prefer_grpc: Speak gRPC (port 6334 unless `client_options` says otherwise).
        timeout: Seconds for one request.
        index_memory: Where the sparse index lives; `None` is the server's default (pinned).
        client_options: More arguments of `QdrantClient`, such as `grpc_port` or TLS settings.
        collection_options: More arguments of `create_collection`, such as `shard_number`.
    """

    # The server's own limit for a request is 32 MiB; its documentation asks for far smaller ones.
    limits = BatchLimits(rows=256, bytes=4 << 20, row_bytes=24 << 20)

    def __init__(
        self,
        collection: str,
        *,
        url: str | None = None,
        client: Any = None,
        api_key: str | None = None,
        prefer_grpc: bool = True,
        timeout: int = 60,
        index_memory: IndexMemory | None = None,
        client_options: Mapping[str, Any] | None = None,
        collection_options: Mapping[str, Any] | None = None,
    ) -> None:
        module = require("qdrant_client", "qdrant")
        self._models: Any = module.models
        self._dialect = ClientDialect(self._models)
        self._collection = collection
        self._index_memory = index_memory
        self._collection_options = dict(collection_options or {})
        self._secret = api_key
        self._owns_client = client is None
        if client is not None:
            if not isinstance(client, module.QdrantClient):
                raise ConfigError(
                    f"`client` must be a qdrant_client.QdrantClient, got {type(client).__name__}."
                )
            self._where = f"collection {collection!r} of the given client"
            self._client: Any = client
            return
        self._where = f"collection {collection!r} at {_shown(url or '')}"
        with self._translated("be reached"):
            # The first request tells whether the server is there and what it is.
            self._client = module.QdrantClient(
                url=url,
                api_key=api_key,
                prefer_grpc=prefer_grpc,
                timeout=timeout,
                check_compatibility=False,
                **(client_options or {}),
            )

    @property
    def where(self) -> str:
        """The collection and its server, without secrets."""
        return self._where

    def open(self) -> Manifest | None:
        """Looks the collection up; `None` when it is not made yet.

        Raises:
            StoreMismatch: It was not made by this library, or was changed since.
            StoreUnavailable: The server cannot be reached.
        """
        with self._translated("be opened"):
            if not self._client.collection_exists(self._collection):
                return None
            about = self._client.get_collection(self._collection)
        data = (getattr(about.config, "metadata", None) or {}).get(_METADATA_KEY)
        if data is None:
            data = self._sidecar_manifest()
        manifest = Manifest.from_dict(data, self._where)
        self._check_vectors(about)
        # An index is missing when the process that made the collection was killed in between.
        present = set(about.payload_schema or {})
        self._make_indexes({k: v for k, v in manifest.payload_indexes.items() if k not in present})
        return manifest

    def create(self, manifest: Manifest) -> None:
        """Makes the collection with its payload indexes."""
        models = self._models
        with self._translated("be made"):
            version = self._version()
            index: dict[str, Any] = {
                "full_scan_threshold": manifest.full_scan_threshold,
                "datatype": models.Datatype(manifest.datatype),
            }
            if self._index_memory is not None:
                if version >= _MEMORY_SINCE:
                    index["memory"] = self._index_memory
                else:
                    index["on_disk"] = self._index_memory != "pinned"
            options = dict(self._collection_options)
            metadata = dict(options.pop("metadata", None) or {})
            if version >= _METADATA_SINCE and "metadata" in models.CreateCollection.model_fields:
                metadata[_METADATA_KEY] = manifest.to_dict()
            else:
                self._write_sidecar(manifest)
            if metadata:
                options["metadata"] = metadata
            # No modifier: weights are learned, and IDF on top would change every score.
            sparse = models.SparseVectorParams(index=models.SparseIndexParams(**index))
            self._client.create_collection(
                self._collection,
                vectors_config=options.pop("vectors_config", {}),
                sparse_vectors_config={VECTOR_NAME: sparse},
                **options,
            )
        self._make_indexes(manifest.payload_indexes)

    def upsert(
        self,
        points: Sequence[PointId],
        rows: SparseRows,
        payloads: Sequence[Payload],
        size: int,
    ) -> None:
        """Writes one batch and waits until it is visible; see `Engine.upsert`."""
        models = self._models
        bounds = rows.indptr.tolist()
        indices, values = rows.indices.tolist(), rows.values.tolist()
        batch = [
            # Checked data needs no second validation by the client's models, which costs most.
            models.PointStruct.model_construct(
                id=point,
                vector={
                    VECTOR_NAME: models.SparseVector.model_construct(
                        indices=indices[a:b], values=values[a:b]
                    )
                },
                payload=payload,
            )
            for point, payload, a, b in zip(points, payloads, bounds[:-1], bounds[1:], strict=True)
        ]
        with self._translated("be written", refusable=True):
            self._client.upsert(self._collection, points=batch, wait=True)

    def search(self, rows: SparseRows, limit: int, offset: int, filter: Any) -> list[list[Found]]:
        """The best points of each row, several queries in one request."""
        models = self._models
        native = self._native(filter)
        requests = []
        for i in range(len(rows)):
            indices, values = rows.row(i)
            vector = models.SparseVector(indices=indices.tolist(), values=values.tolist())
            requests.append(
                models.QueryRequest(
                    query=vector,
                    using=VECTOR_NAME,
                    limit=limit,
                    offset=offset,
                    filter=native,
                    with_payload=True,
                )
            )
        answers = []
        with self._translated("be searched"):
            for start in range(0, len(requests), _QUERIES_AT_ONCE):
                part = requests[start : start + _QUERIES_AT_ONCE]
                answers += self._client.query_batch_points(self._collection, requests=part)
        return [
            [Found(hit.id, hit.score, hit.payload or {}) for hit in answer.points]
            for answer in answers
        ]

    def retrieve(self, points: Sequence[PointId], with_rows: bool) -> list[Stored]:
        """The points that are there; see `Engine.retrieve`."""
        with self._translated("be read"):
            records = self._client.retrieve(
                self._collection,
                ids=list(points),
                with_payload=True,
                with_vectors=[VECTOR_NAME] if with_rows else False,
            )
        return [_stored(record, with_rows) for record in records]

    def scroll(
        self, after: PointId | None, limit: int, fields: Sequence[str]
    ) -> tuple[list[Stored], PointId | None]:
        """A page of points; see `Engine.scroll`."""
        with self._translated("be read"):
            records, following = self._client.scroll(
                self._collection, offset=after, limit=limit, with_payload=list(fields)
            )
        return [_stored(record, False) for record in records], following

    def count(self, filter: Any) -> int:
        """Number of points the filter keeps."""
        native = self._native(filter)
        with self._translated("be counted"):
            return int(self._client.count(self._collection, count_filter=native, exact=True).count)

    def delete(self, points: Sequence[PointId]) -> None:
        """Removes points and waits until they are gone."""
        selector = self._models.PointIdsList(points=list(points))
        with self._translated("be written"):
            self._client.delete(self._collection, points_selector=selector, wait=True)

    def flush(self) -> None:
        """Does nothing: the server answers when a write is in its log."""

    def optimize(self) -> None:
        """Does nothing: the server optimises in the background."""

    def close(self) -> None:
        """Closes the connection, unless the client was given ready."""
        if self._owns_client and hasattr(self, "_client"):
            self._client.close()

    def _version(self) -> tuple[int, int]:
        """Major and minor version of the server; a very new one when it does not tell."""
        told = str(getattr(self._client.info(), "version", ""))
        match = re.match(r"(\d+)\.(\d+)", told)
        return (int(match[1]), int(match[2])) if match else (99, 0)

    def _check_vectors(self, about: Any) -> None:
        sparse = (about.config.params.sparse_vectors or {}).get(VECTOR_NAME)
        if sparse is None:
            raise StoreMismatch(
                f"{self._where} has no sparse vector {VECTOR_NAME!r} any more; build it again."
            )
        if sparse.modifier not in (None, self._models.Modifier.NONE):
            raise StoreMismatch(
                f"{self._where} multiplies weights by {sparse.modifier}, which changes what the "
                "model learned; build a collection without a modifier."
            )

    def _make_indexes(self, indexes: Mapping[str, str]) -> None:
        with self._translated("be indexed"):
            for path, kind in indexes.items():
                schema = self._dialect.index(kind)
                self._client.create_payload_index(
                    self._collection, field_name=path, field_schema=schema, wait=True
                )

    def _sidecar_manifest(self) -> Any:
        with self._translated("be opened"):
            if not self._client.collection_exists(_MANIFESTS):
                return None
            points = self._client.retrieve(_MANIFESTS, ids=[_manifest_point(self._collection)])
        return points[0].payload.get(_METADATA_KEY) if points else None

    def _write_sidecar(self, manifest: Manifest) -> None:
        if not self._client.collection_exists(_MANIFESTS):
            self._client.create_collection(_MANIFESTS, vectors_config={})
        point = self._models.PointStruct(
            id=_manifest_point(self._collection),
            vector={},
            payload={_METADATA_KEY: manifest.to_dict()},
        )
        self._client.upsert(_MANIFESTS, points=[point], wait=True)

    @contextlib.contextmanager
    def _translated(self, action: str, *, refusable: bool = False) -> Iterator[None]:
        try:
            yield
        except (StoreError, RefusedBatch):
            raise
        except Exception as error:
            status = getattr(error, "status_code", None)
            code = getattr(getattr(error, "code", lambda: None)(), "name", None)
            told = self._told(error)
            too_large = code == "RESOURCE_EXHAUSTED" and _TOO_LARGE.search(told)
            refused = status in _REFUSING_STATUS or code == "INVALID_ARGUMENT" or too_large
            if refusable and refused:
                raise RefusedBatch(told) from error
            if status in (401, 403) or code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
                raise StoreError(
                    f"{self._where} cannot {action}: the server refuses the credentials; check "
                    "`api_key` and its rights."
                ) from error
            passing = (
                status in _PASSING_STATUS
                or code in _PASSING_CODES
                or isinstance(error, (OSError, TimeoutError))
                or type(error).__name__
                in ("ResponseHandlingException", "ResourceExhaustedResponse")
            )
            kind = StoreUnavailable if passing else StoreError
            advice = "; check the address, or try again later" if passing else ""
            raise kind(f"{self._where} cannot {action}: {told}{advice}.") from error

    def _told(self, error: Exception) -> str:
        """What the error says, short and without the key."""
        details = getattr(error, "details", None)
        text = str(details()) if callable(details) else str(error)
        text = " ".join(text.split()) or type(error).__name__
        if self._secret:
            text = text.replace(self._secret, "***")
        return text if len(text) <= 300 else text[:300] + "…"

    def _native(self, filter: Any) -> Any:
        if filter is None or isinstance(filter, self._models.Filter):
            return filter
        tree = filter if isinstance(filter, Filter) else parse_filter(filter)
        return to_qdrant(tree, self._dialect)


def _stored(record: Any, with_rows: bool) -> Stored:
    vector = (record.vector or {}).get(VECTOR_NAME) if with_rows else None
    return Stored(
        record.id,
        record.payload or {},
        None if vector is None else vector.indices,
        None if vector is None else vector.values,
    )


def _manifest_point(collection: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"vdr_db:manifest:{collection}"))


def _shown(url: str) -> str:
    """The address without user, password and query, which may hold secrets."""
    parts = urlsplit(url if "//" in url else f"//{url}")
    host = parts.hostname or ""
    port = "" if parts.port is None else f":{parts.port}"
    return f"{parts.scheme or 'http'}://{host}{port}{parts.path}"
