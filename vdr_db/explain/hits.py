"""Hits with the words that made them match, for whatever shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdr_db.explain.records import thumbnail_of
from vdr_db.explain.snippets import SNIPPET, moved_marks, snippet, telling_marks
from vdr_db.explain.spans import marks, token_spans
from vdr_db.explain.words import matched_words, shares_of

if TYPE_CHECKING:
    from vdr_db.connectors import Collection, Hit, Id
    from vdr_db.connectors.base import Passage
    from vdr_db.connectors.collections.collection import Mode
    from vdr_db.encoders.text import SparseEncoder
    from vdr_db.explain.spans import Mark

__all__ = ["HitView", "find_hits", "hit_view"]


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
        passage: The passage that `text` is, in a collection of passages.
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
    passage: Passage | None = None


def find_hits(
    collection: Collection,
    encoder: SparseEncoder,
    query: str | Path,
    *,
    limit: int,
    filter: Any = None,
    mode: Mode | None = None,
    length: int = SNIPPET,
    min_score: float | None = None,
) -> list[HitView]:
    """Hits of one query, a text or the path of an image, with the words that matched.

    Their snippets are about `length` characters long.
    """
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
    rows = {record.id: record.row for record in collection.records_of(hits)}
    own = [id for text in asked for id in encoder.token_ids(text)]
    key = collection.text_key
    views = []
    for hit in hits:
        shares = shares_of(row, rows.get(hit.id))
        view = hit_view(encoder, hit, shares, own, text_key=key, length=length)
        views.append(replace(view, title=view.title or str(hit.payload.get("image") or "")))
    return views


def hit_view(
    encoder: SparseEncoder,
    hit: Hit,
    shares: Mapping[int, float],
    asked: Sequence[int],
    *,
    text_key: str = "text",
    length: int = SNIPPET,
) -> HitView:
    """A hit as it is shown.

    Args:
        encoder: What made the vectors of texts.
        hit: The hit.
        shares: Token id -> share of the score, see `shares_of`.
        asked: Token ids of the query, which say what pieces are one word.
        text_key: Payload field of the text.
        length: Characters of the snippet, about.
    """
    title = str(hit.payload.get("title") or "")
    text = str(hit.payload.get(text_key) or "")
    ids, spans = token_spans(encoder, text)
    gap = sorted(encoder.vocabulary.special_ids)[:1]
    words = matched_words(encoder.vocabulary, [*asked, *gap, *ids], shares)
    found = telling_marks(text, marks(text, spans, [shares.get(id, 0.0) for id in ids]))
    rest = text
    if title and text.startswith(title):
        # `index` puts the title in front of the text; it is shown once.
        rest = text[len(title) :].lstrip()
        found = moved_marks(found, len(rest) - len(text), within=len(rest))
    shown, inside = snippet(rest, found, length=length)
    return HitView(
        id=hit.id,
        score=hit.score,
        title=title,
        text=rest,
        snippet=shown,
        marks=inside,
        words=words,
        payload=hit.payload,
        thumbnail=thumbnail_of(hit.payload),
        passage=hit.passage,
    )
