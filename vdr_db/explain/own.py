"""Which part of a weight, and of a score, a text's own words have, and which the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from vdr_db.sparse import SparseRows

if TYPE_CHECKING:
    from vdr_db.encoders.text import SparseEncoder

__all__ = ["own_part", "own_score"]


def own_part(
    encoder: SparseEncoder, text: str, side: Literal["document", "query"], row: SparseRows
) -> dict[int, float]:
    """Token id -> how much of its weight in a vector is the text's own word.

    Args:
        encoder: That made the vector; one without own weights gives nothing.
        text: The text.
        side: Which it was encoded as.
        row: Its vector, one row.
    """
    own = encoder.own_weights
    if own is None or not text:
        return {}
    ((weights,), (kept,)) = (
        own.rows(side, encoder.own_tokens(text, side)).to_dicts(),
        row.to_dicts(),
    )
    return {id: min(weight, kept[id]) for id, weight in weights.items() if id in kept}


def own_score(query: Mapping[int, float], document: Mapping[int, float]) -> float:
    """What a score would be by own words alone; what is left is the model's.

    Args:
        query: `own_part` of the query.
        document: `own_part` of the document.
    """
    return sum(weight * document[id] for id, weight in query.items() if id in document)
