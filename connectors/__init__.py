"""Stores for sparse vectors: `VDRQdrant`, `VDRElasticsearch` and what they are made of.

```python
from vdr_db.connectors import VDRElasticsearch, VDRQdrant
```

Importing this package imports no client; each is imported by the class that needs it. Nothing here
needs torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vdr_db.connectors.base import (
        Hit,
        Id,
        Passage,
        Payload,
        Record,
        Store,
        Term,
        Written,
    )
    from vdr_db.connectors.collections.asynchronous import (
        AsyncCollection,
        AsyncVDRElasticsearch,
        AsyncVDRQdrant,
    )
    from vdr_db.connectors.collections.collection import Collection
    from vdr_db.connectors.collections.elasticsearch import VDRElasticsearch
    from vdr_db.connectors.collections.encoding import Encoder
    from vdr_db.connectors.collections.opening import open_collection
    from vdr_db.connectors.collections.vdr_qdrant import VDRQdrant
    from vdr_db.connectors.elasticsearch.store import ElasticsearchStore
    from vdr_db.connectors.memory import MemoryStore
    from vdr_db.connectors.passages import Passages
    from vdr_db.connectors.qdrant.engine import DenseVector
    from vdr_db.connectors.qdrant.store import QdrantStore

__all__ = [
    "AsyncCollection",
    "AsyncVDRElasticsearch",
    "AsyncVDRQdrant",
    "Collection",
    "DenseVector",
    "ElasticsearchStore",
    "Encoder",
    "Hit",
    "Id",
    "MemoryStore",
    "Passage",
    "Passages",
    "Payload",
    "QdrantStore",
    "Record",
    "Store",
    "Term",
    "VDRElasticsearch",
    "VDRQdrant",
    "Written",
    "open_collection",
]

_HOME = {
    "AsyncCollection": "collections.asynchronous",
    "AsyncVDRElasticsearch": "collections.asynchronous",
    "AsyncVDRQdrant": "collections.asynchronous",
    "Collection": "collections.collection",
    "DenseVector": "qdrant.engine",
    "ElasticsearchStore": "elasticsearch.store",
    "Encoder": "collections.encoding",
    "Hit": "base",
    "Id": "base",
    "MemoryStore": "memory",
    "Passage": "base",
    "Passages": "passages",
    "Payload": "base",
    "QdrantStore": "qdrant.store",
    "Record": "base",
    "Store": "base",
    "Term": "base",
    "VDRElasticsearch": "collections.elasticsearch",
    "VDRQdrant": "collections.vdr_qdrant",
    "Written": "base",
    "open_collection": "collections.opening",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used (PEP 562)."""
    if name in _HOME:
        from importlib import import_module

        value = getattr(import_module(f"vdr_db.connectors.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Public names, imported or not yet."""
    return sorted(__all__)
