"""The official client's `VectorStore`, and what is built on it, with vectors of this library.

`docs/integrations.md` has an example.

The client's own sparse strategy runs a model inside the cluster and takes no vectors. `VectorStore`
writes without retries and knows no encoder stamp; `VDRElasticsearch` does both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from vdr_db.connectors.elasticsearch.bodies import (
    FieldKind,
    feature_objects,
    query_scale,
    row_query,
)
from vdr_db.connectors.validation import without_tiny
from vdr_db.errors import ConfigError, require
from vdr_db.integrations.sides import TextSides
from vdr_db.sparse import SparseRows

require("elasticsearch.helpers.vectorstore", "elasticsearch")

from elasticsearch.helpers.vectorstore import EmbeddingService, RetrievalStrategy  # noqa: E402

__all__ = ["VDREmbeddingService", "VDRRetrievalStrategy"]


class VDREmbeddingService(TextSides, EmbeddingService):  # type: ignore[misc]
    """An encoder whose vectors are `{token id in decimal: weight}`, as the fields take them.

    Arguments and errors are those of `TextSides`.
    """

    def embed_documents(self, texts: list[str]) -> list[dict[str, float]]:
        """Vectors of documents, in their order."""
        return _features(self.document_rows(texts))

    def embed_query(self, query: str) -> dict[str, float]:
        """The vector of a query."""
        return _features(self.query_rows([query]))[0]


class VDRRetrievalStrategy(RetrievalStrategy):  # type: ignore[misc]
    """Scores by the inner product of query and document, with the bodies of `ElasticsearchStore`.

    Document weights count with 9 significant bits, so a score is up to 0.4 % below the exact one.
    Query weights above 64 are scaled down by a power of two, and so are the scores of that query.

    Args:
        kind: Field type of a new index: `"rank_features"` works everywhere, `"sparse_vector"`
            needs Elasticsearch 8.15.
        query_top_k: Sends only that many of the heaviest tokens of a query; `None` sends all.

    Raises:
        ConfigError: An option is impossible.
    """

    def __init__(
        self, *, kind: FieldKind = "rank_features", query_top_k: int | None = None
    ) -> None:
        if kind not in ("rank_features", "sparse_vector"):
            raise ConfigError(f"`kind` must be 'rank_features' or 'sparse_vector', got {kind!r}.")
        if query_top_k is not None and query_top_k < 1:
            raise ConfigError(f"`query_top_k` must be at least 1 or None, got {query_top_k}.")
        self.kind: FieldKind = kind
        self.query_top_k = query_top_k

    def es_query(
        self,
        *,
        query: str | None,
        query_vector: Mapping[str, float] | None,
        text_field: str,
        vector_field: str,
        k: int,
        num_candidates: int,
        filter: list[dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """The body of a search, which is exact.

        It takes the vector (token id in decimal → weight, from `VDREmbeddingService.embed_query`),
        the name of its field, and as `filter` Elasticsearch queries that must be true besides,
        without a say in the score; nothing else counts.

        Raises:
            ConfigError: There is no vector: the store was made without an embedding service.
        """
        if query_vector is None:
            raise ConfigError(
                "the strategy needs the vector of the query; make the store with "
                "embedding_service=VDREmbeddingService(encoder), or pass `query_vector`."
            )
        row = _row(query_vector)
        if self.query_top_k is not None:
            row = row.topk(self.query_top_k)
        ids, weights = row.row(0)
        if not ids.size:
            return {"query": {"match_none": {}}}
        scored = row_query(
            ids, weights, field=vector_field, kind=self.kind, scale=query_scale(weights)
        )
        if filter:
            return {"query": {"bool": {"must": [scored], "filter": list(filter)}}}
        return {"query": scored}

    def es_mappings_settings(
        self, *, text_field: str, vector_field: str, num_dimensions: int | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Mappings and settings of a new index, whose fields have no fixed width.

        The text field is searchable by BM25 in queries of your own.
        """
        fields = {text_field: {"type": "text"}, vector_field: {"type": self.kind}}
        return {"properties": fields}, {}

    def needs_inference(self) -> bool:
        """Vectors are made here and not in the cluster."""
        return True


def _features(rows: SparseRows) -> list[dict[str, float]]:
    # Through the shortest digits, so that requests do not carry 17 digits of a float32.
    return [json.loads(features) for features in feature_objects(without_tiny(rows))]


def _row(vector: Mapping[str, float]) -> SparseRows:
    try:
        weights = {int(id): float(weight) for id, weight in vector.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            "`query_vector` must be a mapping of token id to weight, got "
            f"{type(vector).__name__}; make it with VDREmbeddingService.embed_query."
        ) from error
    return without_tiny(SparseRows.from_dicts([weights], int(np.iinfo(np.int32).max)))
