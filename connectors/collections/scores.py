"""What scores are made of, and made anew from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vdr_db.connectors.base import Hit, Term
from vdr_db.connectors.ids import id_order
from vdr_db.errors import StoreError
from vdr_db.sparse import SparseRows

__all__ = ["reranked", "shared_terms"]


def shared_terms(
    query: SparseRows, document: SparseRows, token: Callable[[int], str]
) -> list[Term]:
    """What every shared token adds to the score of two rows, the largest part first."""
    query_ids, query_weights = query.row(0)
    document_ids, document_weights = document.row(0)
    shared, in_query, in_document = np.intersect1d(
        query_ids, document_ids, assume_unique=True, return_indices=True
    )
    left = query_weights[in_query].astype(np.float64).tolist()
    right = document_weights[in_document].astype(np.float64).tolist()
    terms = [
        Term(token(id), id, weight, other, weight * other)
        for id, weight, other in zip(shared.tolist(), left, right, strict=True)
    ]
    return sorted(terms, key=lambda term: (-term.product, term.id))


def reranked(
    hits: Sequence[Hit], query: SparseRows, encode: Callable[[list[str]], SparseRows], key: str
) -> list[Hit]:
    """Hits with the full score of their texts in the payload field `key`, best first.

    Raises:
        StoreError: A hit has no text.
    """
    if not hits:
        return []
    texts = [hit.payload.get(key) for hit in hits]
    known = [text for text in texts if isinstance(text, str)]
    if len(known) < len(texts):
        raise StoreError(
            f"`rerank` needs the text of every hit in the payload field {key!r}, "
            f"{len(texts) - len(known)} of {len(texts)} have none; add texts with store_text=True."
        )
    scores = encode(known).dot(query)[:, 0].tolist()
    fresh = [Hit(hit.id, score, hit.payload) for hit, score in zip(hits, scores, strict=True)]
    return sorted(fresh, key=lambda hit: (-hit.score, *id_order(hit.id)))
