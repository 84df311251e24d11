"""Hits of passages as hits of documents: one for each, the best first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vdr_db.connectors.base import Hit, Passage, Payload
from vdr_db.connectors.ids import id_of, id_order
from vdr_db.connectors.validation import (
    COUNT_FIELD,
    DOCUMENT_FIELD,
    NUMBER_FIELD,
    PASSAGE_FIELDS,
    SPAN_FIELD,
)

__all__ = ["groups_of", "ranked", "shown"]


def shown(payload: Payload) -> Payload:
    """A payload without what passages tell of themselves."""
    return {name: value for name, value in payload.items() if name not in PASSAGE_FIELDS}


def groups_of(hits: Iterable[Hit]) -> Iterable[list[Hit]]:
    """Passages of each document, in their order."""
    groups: dict[Any, list[Hit]] = {}
    for hit in hits:
        groups.setdefault(hit.payload.get(DOCUMENT_FIELD, hit.id), []).append(hit)
    return groups.values()


def ranked(groups: Iterable[Sequence[Hit]], best: int = 1) -> list[Hit]:
    """One hit for each group of passages, the best first, equal scores by ascending id."""
    hits = []
    for group in groups:
        first, score = group[0], sum(hit.score for hit in group[:best])
        about = first.payload
        if DOCUMENT_FIELD not in about:
            hits.append(Hit(first.id, score, about))
            continue
        start, stop = about[SPAN_FIELD]
        passage = Passage(about[NUMBER_FIELD], about[COUNT_FIELD], start, stop)
        hits.append(Hit(id_of(about[DOCUMENT_FIELD]), score, shown(about), passage))
    return sorted(hits, key=lambda hit: (-hit.score, *id_order(hit.id)))
