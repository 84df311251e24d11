"""LlamaIndex: what its Qdrant store calls to make sparse vectors of documents and queries.

```python
from llama_index.vector_stores.qdrant import QdrantVectorStore
from vdr_db.integrations.llamaindex import sparse_doc_fn, sparse_query_fn

store = QdrantVectorStore(
    "articles",
    client=client,
    enable_hybrid=True,
    sparse_doc_fn=sparse_doc_fn(encoder),
    sparse_query_fn=sparse_query_fn(encoder),
)
```

The functions themselves need no package of LlamaIndex. The store wants a dense vector of each node
besides; nodes queried with `VectorStoreQueryMode.SPARSE` are ranked by the sparse one alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from vdr_db.connectors.collections.collection import Mode
from vdr_db.integrations.sides import (
    TextEncoder,
    checked_mode,
    document_rows,
    id_weight_lists,
    query_rows,
)
from vdr_db.sparse import SparseRows

__all__ = ["SparseFunction", "sparse_doc_fn", "sparse_query_fn"]

SparseFunction: TypeAlias = Callable[[Sequence[str]], tuple[list[list[int]], list[list[float]]]]
"""Texts to the token ids and the weights of each."""


def sparse_doc_fn(encoder: TextEncoder, *, mode: Mode = "full") -> SparseFunction:
    """The `sparse_doc_fn` of `QdrantVectorStore`.

    LlamaIndex hands in a node's text with its metadata in front; what of it is encoded is decided
    by `excluded_embed_metadata_keys` of the node.

    Args:
        encoder: Makes vectors of texts.
        mode: `"beta"` stores bags of tokens; see `Mode`.

    Raises:
        ConfigError: The mode is unknown.
    """
    checked_mode(mode)
    return lambda texts: _lists(document_rows(encoder, texts, mode))


def sparse_query_fn(encoder: TextEncoder, *, mode: Mode = "full") -> SparseFunction:
    """The `sparse_query_fn` of `QdrantVectorStore`.

    Args:
        encoder: Makes vectors of texts.
        mode: `"alpha"` asks with bags of tokens; see `Mode`.

    Raises:
        ConfigError: The mode is unknown.
    """
    checked_mode(mode)
    return lambda texts: _lists(query_rows(encoder, texts, mode))


def _lists(rows: SparseRows) -> tuple[list[list[int]], list[list[float]]]:
    pairs = list(id_weight_lists(rows))
    return [ids for ids, _ in pairs], [weights for _, weights in pairs]
