"""What the embedded engine is told of a collection when it makes one."""

from __future__ import annotations

from typing import Any

from vdr_db.connectors.qdrant.engine import VECTOR_NAME, Manifest

__all__ = ["edge_config"]


def edge_config(edge: Any, manifest: Manifest, *, with_log: bool) -> Any:
    """The `EdgeConfig` of a collection; `edge` is the module `qdrant_edge`."""
    vector = edge.EdgeSparseVectorParams(
        full_scan_threshold=manifest.full_scan_threshold,
        datatype=getattr(edge.VectorStorageDatatype, manifest.datatype.capitalize()),
    )
    dense = {
        name: edge.EdgeVectorParams(one.size, getattr(edge.Distance, one.distance.capitalize()))
        for name, one in manifest.dense.items()
    }
    return edge.EdgeConfig(
        vectors=dense or None,
        sparse_vectors={VECTOR_NAME: vector},
        wal_enabled=with_log,
        # One: the caller's. A pool of several is asked and waited for, for every single query.
        max_search_threads=1,
    )
