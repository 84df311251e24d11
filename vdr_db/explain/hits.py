"""Hits with the words that made them match, for whatever shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdr_db.explain.words import shared_words, shares_of

if TYPE_CHECKING:
    from vdr_db.connectors import Collection, Id
    from vdr_db.connectors.collections.collection import Mode
    from vdr_db.encoders.text import SparseEncoder
    from vdr_db.explain.spans import Mark

__all__ = ["HitView", "find_hits"]


@dataclass(frozen=True)
class HitView:
    """One hit as it is shown.

    Attributes:
        id: The caller's id.
        score: Dot product of query and document.
        title: What it is called, or `""`.
        text: The text, any length.
        words: Words both sides carry, with their share of the score, heaviest first.
        payload: All that is stored with it.
        snippet: The part of the text that matches best.
        marks: What to mark in the snippet.
        thumbnail: A `data:` address of a small image, or `""`.
    """

    id: Id
    score: float
    title: str
    text: str
    words: Sequence[tuple[str, float]]
    payload: Mapping[str, Any]
    snippet: str = ""
    marks: Sequence[Mark] = ()
    thumbnail: str = ""


def find_hits(
    collection: Collection,
    encoder: SparseEncoder,
    query: str | Path,
    *,
    limit: int,
    filter: Any = None,
    mode: Mode | None = None,
    min_score: float | None = None,
) -> list[HitView]:
    """Hits of one query, a text or the path of an image, with the words that matched."""
    if isinstance(query, Path):
        row, asked = collection.encode_query_image(query), []
    else:
        is_bag = mode == "alpha"
        row = (
            encoder.bag_of_tokens([query], side="query")
            if is_bag
            else encoder.encode_queries([query])
        )
        asked = [query]
    hits = collection.search(row, limit=limit, filter=filter, mode=mode, min_score=min_score)
    records = collection.get([hit.id for hit in hits], with_rows=True)
    rows = {record.id: record.row for record in records}
    views = []
    for hit in hits:
        text = str(hit.payload.get("text") or "")
        title = str(hit.payload.get("title") or hit.payload.get("image") or "")
        words = shared_words(encoder, [*asked, text], shares_of(row, rows.get(hit.id)))
        views.append(HitView(hit.id, hit.score, title, text, words, hit.payload))
    return views
