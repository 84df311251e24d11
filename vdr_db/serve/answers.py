"""What the JSON API answers; the OpenAPI description is made of these."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from vdr_db.explain.explanation import Explanation, Match
from vdr_db.serve.service import Found, HitView

__all__ = [
    "ExplainAnswer",
    "FacetAnswer",
    "HitAnswer",
    "InfoAnswer",
    "SearchAnswer",
    "TermAnswer",
    "WordAnswer",
    "explain_answer",
    "search_answer",
]


class WordAnswer(BaseModel):
    """A word and how much it counts."""

    word: str
    weight: float


class MarkAnswer(BaseModel):
    """A part of a snippet that matched."""

    start: int = Field(description="first character")
    stop: int = Field(description="first character after it")
    share: float = Field(description="share of the score")


class HitAnswer(BaseModel):
    """One hit."""

    id: int | str
    score: float
    title: str
    snippet: str = Field(description="the part of the text that matches best")
    marks: list[MarkAnswer] = Field(description="what matched in the snippet")
    words: list[WordAnswer] = Field(description="shared words with their shares of the score")
    payload: dict[str, Any]


class FacetValueAnswer(BaseModel):
    """A value of a facet."""

    value: str
    count: int
    chosen: bool


class FacetAnswer(BaseModel):
    """A payload field with its most frequent values among the best hits."""

    key: str
    values: list[FacetValueAnswer]


class SearchAnswer(BaseModel):
    """One page of hits."""

    query: str
    limit: int
    offset: int
    total: int = Field(description="hits known")
    has_more: bool = Field(description="whether there are more than `total`")
    took_ms: float
    hits: list[HitAnswer]
    facets: list[FacetAnswer]


class TermAnswer(BaseModel):
    """What one token adds to a score."""

    token: str
    query_weight: float
    document_weight: float
    product: float


class ReasonAnswer(BaseModel):
    """What one word adds to a score."""

    word: str
    product: float
    terms: list[TermAnswer]


class PositionAnswer(BaseModel):
    """What fires on one word of a text."""

    label: str
    special: bool
    words: list[WordAnswer]


class SideAnswer(BaseModel):
    """What the vector of a text says."""

    text: str
    nonzeros: int
    words: list[WordAnswer]
    positions: list[PositionAnswer] = Field(description="which words fire on which word")


class ExplainAnswer(BaseModel):
    """What a query says, and with an id why that document matches."""

    query: SideAnswer
    document: SideAnswer | None = None
    id: int | str | None = None
    score: float | None = None
    reasons: list[ReasonAnswer] = []


class InfoAnswer(BaseModel):
    """What is served."""

    texts: int
    model: str
    head: str
    activation: str
    k: int | None
    documents: str
    facets: list[str]
    images: bool
    version: str


def search_answer(query: str, found: Found, *, limit: int, offset: int) -> SearchAnswer:
    """A page of hits as JSON types."""
    return SearchAnswer(
        query=query,
        limit=limit,
        offset=offset,
        total=found.total,
        has_more=found.has_more,
        took_ms=round(found.took_ms, 3),
        hits=[_hit(hit) for hit in found.hits],
        facets=[
            FacetAnswer(
                key=counts.facet.key,
                values=[
                    FacetValueAnswer(value=text, count=count, chosen=chosen)
                    for text, count, chosen in counts.counts
                ],
            )
            for counts in found.facets
        ],
    )


def explain_answer(shown: Match | Explanation) -> ExplainAnswer:
    """A match, or what a query alone says, as JSON types."""
    if isinstance(shown, Explanation):
        return ExplainAnswer(query=_explanation(shown))
    return ExplainAnswer(
        query=_explanation(shown.query),
        document=_explanation(shown.document),
        id=shown.id,
        score=shown.score,
        reasons=[
            ReasonAnswer(
                word=reason.word,
                product=reason.product,
                terms=[
                    TermAnswer(
                        token=term.token,
                        query_weight=term.query_weight,
                        document_weight=term.document_weight,
                        product=term.product,
                    )
                    for term in reason.terms
                ],
            )
            for reason in shown.reasons
        ],
    )


def _words(words: Any) -> list[WordAnswer]:
    return [WordAnswer(word=word, weight=weight) for word, weight in words]


def _hit(hit: HitView) -> HitAnswer:
    return HitAnswer(
        id=hit.id,
        score=hit.score,
        title=hit.title,
        snippet=hit.snippet,
        marks=[MarkAnswer(start=m.start, stop=m.stop, share=m.share) for m in hit.marks],
        words=_words(hit.words),
        payload=dict(hit.payload),
    )


def _explanation(explanation: Explanation) -> SideAnswer:
    return SideAnswer(
        text=explanation.text,
        nonzeros=explanation.nonzeros,
        words=_words(explanation.words),
        positions=[
            PositionAnswer(label=fired.label, special=fired.is_special, words=_words(fired.words))
            for fired in explanation.fired()
        ],
    )
