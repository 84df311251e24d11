"""Requests to a Qdrant server and what its answers hold, for `QdrantClient` and its async twin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from vdr_db.connectors.base import Payload
from vdr_db.connectors.qdrant.engine import (
    VECTOR_NAME,
    DenseRows,
    Found,
    HybridQuery,
    Manifest,
    PointId,
    Stored,
)
from vdr_db.connectors.qdrant.filters import ClientDialect, to_qdrant
from vdr_db.connectors.qdrant.messages import PointMessages
from vdr_db.errors import StoreError
from vdr_db.filters import parse_filter
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
        client: Who writes points, a `QdrantClient` or an `AsyncQdrantClient`.
    """

    def __init__(self, models: Any, vector: str = VECTOR_NAME, *, client: Any = None) -> None:
        self.models = models
        self.vector = vector
        self._client = client
        self._messages = PointMessages.of(client)
        self._dialect = ClientDialect(models)

    def filter(self, filter: Any) -> Any:
        """A filter in any of its forms as the client's own."""
        if filter is None or isinstance(filter, self.models.Filter):
            return filter
        return to_qdrant(parse_filter(filter), self._dialect)

    def index(self, kind: str) -> Any:
        """The schema of a kind of payload index."""
        return self._dialect.index(kind)

    def collection(
        self,
        manifest: Manifest,
        version: tuple[int, int],
        *,
        index_memory: IndexMemory | None,
        with_metadata: bool,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The arguments of `create_collection` but the name.

        Args:
            manifest: What the collection is to be.
            version: Major and minor version of the server.
            index_memory: Where the sparse index lives.
            with_metadata: Whether the server keeps metadata with a collection.
            options: The caller's own arguments of `create_collection`.
        """
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

    def upsert(
        self,
        collection: str,
        points: Sequence[PointId],
        rows: SparseRows,
        payloads: Sequence[Payload],
        dense: DenseRows,
    ) -> Any:
        """Writes one batch and waits until it is visible; to be awaited with an async client.

        Raises:
            RefusedBatch: A payload holds what gRPC cannot carry.
        """
        if self._messages is not None:
            return self._messages.upsert(collection, points, rows, payloads, dense, self.vector)
        batch = self.points(points, rows, payloads, dense)
        return self._client.upsert(collection, points=batch, wait=True)

    def points(
        self,
        points: Sequence[PointId],
        rows: SparseRows,
        payloads: Sequence[Payload],
        dense: DenseRows,
    ) -> list[Any]:
        """The points of one batch, as models."""
        models = self.models
        bounds = rows.indptr.tolist()
        indices, values = rows.indices.tolist(), rows.values.tolist()
        others = {name: column.tolist() for name, column in dense.items()}
        batch = []
        for i, point in enumerate(points):
            a, b = bounds[i], bounds[i + 1]
            # Checked data needs no second validation by the client's models, which costs most.
            vector: dict[str, Any] = {
                self.vector: models.SparseVector.model_construct(
                    indices=indices[a:b], values=values[a:b]
                )
            }
            for name, column in others.items():
                vector[name] = column[i]
            batch.append(
                models.PointStruct.model_construct(id=point, vector=vector, payload=payloads[i])
            )
        return batch

    def searches(self, rows: SparseRows, limit: int, offset: int, filter: Any) -> list[Any]:
        """One query for each row."""
        native = self.filter(filter)
        return [
            self.models.QueryRequest(
                query=self._sparse(rows, i),
                using=self.vector,
                limit=limit,
                offset=offset,
                filter=native,
                with_payload=True,
            )
            for i in range(len(rows))
        ]

    def hybrid(self, asked: HybridQuery) -> Any:
        """One query that joins the rankings by the sparse and by the dense vector."""
        models = self.models
        native = self.filter(asked.filter)
        sides = [(asked.vector.tolist(), asked.using)]
        if asked.row.nnz:
            sides.insert(0, (self._sparse(asked.row, 0), self.vector))
        prefetch = [
            models.Prefetch(query=query, using=using, limit=asked.depth, filter=native)
            for query, using in sides
        ]
        if asked.rank_constant is None:
            # Known to every server that has the query API; a constant of one's own is newer.
            fusion = models.FusionQuery(fusion=models.Fusion.RRF)
        elif hasattr(models, "RrfQuery"):
            fusion = models.RrfQuery(rrf=models.Rrf(k=asked.rank_constant))
        else:
            raise StoreError(
                "this qdrant-client knows no `rank_constant`; install a newer one, or leave the "
                "argument out."
            )
        return models.QueryRequest(
            prefetch=prefetch,
            query=fusion,
            limit=asked.limit,
            offset=asked.offset,
            with_payload=True,
        )

    def found(self, answer: Any) -> list[Found]:
        """The points of one answer."""
        return [Found(hit.id, hit.score, hit.payload or {}) for hit in answer.points]

    def stored(self, record: Any, with_rows: bool) -> Stored:
        """A point that was read back."""
        vector = (record.vector or {}).get(self.vector) if with_rows else None
        return Stored(
            record.id,
            record.payload or {},
            None if vector is None else vector.indices,
            None if vector is None else vector.values,
        )

    def _sparse(self, rows: SparseRows, i: int) -> Any:
        indices, values = rows.row(i)
        return self.models.SparseVector(indices=indices.tolist(), values=values.tolist())
