"""Requests to a Qdrant server and what its answers hold."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal, TypeAlias

from vdr_db.connectors.qdrant.engine import (
    ID_FIELD,
    VECTOR_NAME,
    Batch,
    Found,
    HybridQuery,
    Manifest,
)
from vdr_db.connectors.qdrant.filters import Dialect
from vdr_db.connectors.qdrant.messages import PointMessages
from vdr_db.sparse import SparseRows

__all__ = ["METADATA_KEY", "QUERIES_AT_ONCE", "IndexMemory", "Requests"]

IndexMemory: TypeAlias = Literal["pinned", "cached", "cold"]
"""Where the sparse index lives: locked in memory, in the page cache, on disk."""

METADATA_KEY = "vdr_db"
"""Where the manifest is in a collection's metadata."""

QUERIES_AT_ONCE = 64
"""Queries of one request."""

_MEMORY_SINCE = (1, 19)


class Requests:
    """Builds what the client sends and reads what comes back.

    Args:
        models: `qdrant_client.models`.
        vector: Name of the sparse vector.
        client: The `QdrantClient` that writes points.
        shard_key: Of the shards that searches look at, `None` for all.
        payload: Fields of the payload that hits show, `True` for all.
    """

    def __init__(
        self,
        models: Any,
        vector: str = VECTOR_NAME,
        *,
        client: Any = None,
        shard_key: Any = None,
        payload: Any = True,
    ) -> None:
        self.models = models
        self.vector = vector
        self._client = client
        self._shard_key = shard_key
        # Ids stand in the payload, so whatever is chosen of it comes with them.
        self._payload = [ID_FIELD, *payload] if isinstance(payload, (list, tuple)) else payload
        self._messages = PointMessages.of(client)
        self.dialect = Dialect(models)

    def collection(
        self,
        manifest: Manifest,
        version: tuple[int, int],
        *,
        index_memory: IndexMemory | None,
        with_metadata: bool,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The arguments of `create_collection` but the name, `options` being the caller's own."""
        models = self.models
        index: dict[str, Any] = {
            "full_scan_threshold": manifest.full_scan_threshold,
            "datatype": models.Datatype(manifest.datatype),
        }
        if index_memory is not None:
            if version >= _MEMORY_SINCE:
                index["memory"] = index_memory
            else:
                index["on_disk"] = index_memory != "pinned"
        # No modifier: weights are learned, and IDF on top would change every score.
        sparse = models.SparseVectorParams(index=models.SparseIndexParams(**index))
        dense = {
            name: models.VectorParams(
                size=one.size, distance=models.Distance(one.distance.capitalize())
            )
            for name, one in manifest.dense.items()
        }
        arguments = dict(options)
        metadata = dict(arguments.pop("metadata", None) or {})
        if with_metadata:
            metadata[METADATA_KEY] = manifest.to_dict()
        if metadata:
            arguments["metadata"] = metadata
        given = arguments.pop("vectors_config", None) or {}
        arguments["vectors_config"] = {**dense, **given} if isinstance(given, Mapping) else given
        others = arguments.pop("sparse_vectors_config", None) or {}
        arguments["sparse_vectors_config"] = {**others, self.vector: sparse}
        return arguments

    def upsert(self, collection: str, batch: Batch, options: Mapping[str, Any]) -> None:
        """Writes one batch and waits until it is visible; `options` are those of the client.

        Raises:
            RefusedBatch: A payload holds what gRPC cannot carry.
        """
        if self._messages is not None and not options.keys() - {"timeout"}:
            self._messages.upsert(collection, batch, self.vector, options.get("timeout"))
        else:
            points = self.points(batch)
            self._client.upsert(collection, points=points, wait=True, **options)

    def points(self, batch: Batch) -> list[Any]:
        """The points of one batch, as models."""
        models, rows = self.models, batch.rows
        indices, values = rows.indices.tolist(), rows.values.tolist()
        others = {name: column.tolist() for name, column in batch.dense.items()}
        points = []
        for i, (a, b) in enumerate(pairwise(rows.indptr.tolist())):
            # Checked data needs no second validation by the client's models, which costs most.
            sparse = models.SparseVector.model_construct(indices=indices[a:b], values=values[a:b])
            vector = {self.vector: sparse, **{name: column[i] for name, column in others.items()}}
            points.append(
                models.PointStruct.model_construct(
                    id=batch.points[i], vector=vector, payload=batch.payloads[i]
                )
            )
        return points

    def searches(self, rows: SparseRows, limit: int, offset: int, filter: Any) -> list[Any]:
        """One query for each row."""
        native = self.dialect.native(filter)
        return [
            self.models.QueryRequest(
                query=self._sparse(row),
                using=self.vector,
                limit=limit,
                offset=offset,
                filter=native,
                with_payload=self._payload,
                shard_key=self._shard_key,
            )
            for row in rows
        ]

    def rankings(self, asked: HybridQuery, limit: int, offset: int) -> list[Any]:
        """One query for each side that is not empty; only ids come with the points."""
        sides = [(asked.vector.tolist(), asked.using)]
        if asked.row.nnz:
            sides.insert(0, (self._sparse(asked.row), self.vector))
        native = self.dialect.native(asked.filter)
        return [
            self.models.QueryRequest(
                query=query,
                using=using,
                limit=limit,
                offset=offset,
                filter=native,
                with_payload=[ID_FIELD],
                shard_key=self._shard_key,
            )
            for query, using in sides
        ]

    def found(self, answer: Any) -> list[Found]:
        """The points of one answer."""
        return [Found(hit.id, hit.score, hit.payload or {}) for hit in answer.points]

    def _sparse(self, row: SparseRows) -> Any:
        indices, values = row.row(0)
        return self.models.SparseVector(indices=indices.tolist(), values=values.tolist())
