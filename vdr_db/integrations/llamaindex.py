"""LlamaIndex: what its Qdrant store calls to make sparse vectors of documents and queries.

`docs/integrations.md` has an example.

The functions themselves need no package of LlamaIndex. The store wants a dense vector of each node
besides; nodes queried with `VectorStoreQueryMode.SPARSE` are ranked by the sparse one alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

from vdr_db.connectors.collections.encoding import AnyEncoder, Mode
from vdr_db.integrations.sides import TextSides, id_weight_lists
from vdr_db.sparse import SparseRows

__all__ = ["SparseFunction", "sparse_doc_fn", "sparse_query_fn"]

SparseFunction: TypeAlias = Callable[[Sequence[str]], tuple[list[list[int]], list[list[float]]]]
"""Texts to the token ids and the weights of each."""


def sparse_doc_fn(encoder: AnyEncoder, *, mode: Mode = "full") -> SparseFunction:
    """The `sparse_doc_fn` of `QdrantVectorStore`.

    LlamaIndex hands in a node's text with its metadata in front; what of it is encoded is decided
    by `excluded_embed_metadata_keys` of the node.

    Args:
        encoder: Makes vectors of texts; the name or folder of a model is loaded when first needed.
        mode: `"beta"` stores bags of tokens; see `Mode`.

    Raises:
        ConfigError: The mode is unknown.
    """
    return partial(_lists, TextSides(encoder, mode=mode).document_rows)


def sparse_query_fn(encoder: AnyEncoder, *, mode: Mode = "full") -> SparseFunction:
    """The `sparse_query_fn`; as `sparse_doc_fn`, but `"alpha"` asks with bags of tokens."""
    return partial(_lists, TextSides(encoder, mode=mode).query_rows)


def _lists(
    encode: Callable[[Sequence[str]], SparseRows], texts: Sequence[str]
) -> tuple[list[list[int]], list[list[float]]]:
    pairs = list(id_weight_lists(encode(texts)))
    return [ids for ids, _ in pairs], [weights for _, weights in pairs]
