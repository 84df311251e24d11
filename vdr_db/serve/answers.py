"""What the JSON API answers; the OpenAPI description is made of these."""

from __future__ import annotations

from typing import Any

from pydantic import AliasPath, BaseModel, ConfigDict, Field, model_validator

from vdr_db.explain.explanation import Explanation, Match
from vdr_db.serve.service import Found

__all__ = ["ExplainAnswer", "InfoAnswer", "SearchAnswer", "explain_answer", "search_answer"]


class _Answer(BaseModel):
    """Read from the attributes of what is shown, or from a tuple in the order of the fields."""

    model_config = ConfigDict(from_attributes=True)

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return dict(zip(cls.model_fields, value, strict=True)) if type(value) is tuple else value


class WordAnswer(_Answer):
    """A word and how much it counts."""

    word: str
    weight: float


class ProductAnswer(_Answer):
    """A word that both sides carry, and what it adds to the score."""

    word: str
    product: float


class MarkAnswer(_Answer):
    """A part of a snippet that matched."""

    start: int = Field(description="first character")
    stop: int = Field(description="first character after it")
    product: float = Field(
        validation_alias="share", description="what it adds to the score, a product of weights"
    )


class PassageAnswer(_Answer):
    """Which part of a document a hit is."""

    number: int = Field(description="its place among the passages of the document, from 0")
    count: int = Field(description="passages of the document")
    start: int = Field(description="its first character in the text of the document")
    stop: int = Field(description="the first character after it")


class HitAnswer(_Answer):
    """One hit."""

    id: int | str
    score: float
    title: str
    snippet: str = Field(description="the part of the text that matches best")
    marks: list[MarkAnswer] = Field(description="what matched in the snippet")
    words: list[ProductAnswer] = Field(description="shared words; the products add up to the score")
    payload: dict[str, Any]
    passage: PassageAnswer | None = Field(
        description="the passage that matches best, in a collection of passages"
    )


class FacetValueAnswer(_Answer):
    """A value of a facet."""

    value: str
    count: int
    chosen: bool


class FacetAnswer(_Answer):
    """A payload field with its most frequent values among the best hits."""

    key: str = Field(validation_alias=AliasPath("facet", "key"))
    values: list[FacetValueAnswer] = Field(validation_alias="counts")


class SearchAnswer(_Answer):
    """One page of hits."""

    query: str
    limit: int
    offset: int
    counted: int = Field(description="hits counted: the best 200, or to the end of this page")
    has_more: bool = Field(description="whether there are more than were counted")
    took_ms: float
    hits: list[HitAnswer]
    facets: list[FacetAnswer]


class TermAnswer(_Answer):
    """What one token adds to a score."""

    token: str
    query_weight: float
    document_weight: float
    product: float


class ReasonAnswer(_Answer):
    """What one word adds to a score."""

    word: str
    product: float
    terms: list[TermAnswer]


class PositionAnswer(_Answer):
    """What fires on one word of a text."""

    label: str
    special: bool = Field(validation_alias="is_special")
    words: list[WordAnswer]


class SideAnswer(_Answer):
    """What the vector of a text says."""

    text: str
    nonzeros: int
    words: list[WordAnswer]
    positions: list[PositionAnswer] = Field(description="which words fire on which word")

    @model_validator(mode="before")
    @classmethod
    def _with_positions(cls, shown: Any) -> Any:
        return {**vars(shown), "positions": shown.fired()}


class ExplainAnswer(_Answer):
    """What a query says, and with an id why that document matches."""

    query: SideAnswer
    document: SideAnswer | None = None
    id: int | str | None = None
    score: float | None = None
    reasons: list[ReasonAnswer] = Field(default=[])


class InfoAnswer(_Answer):
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
    page = {**vars(found), "query": query, "limit": limit, "offset": offset}
    return SearchAnswer.model_validate(page | {"took_ms": round(found.took_ms, 3)})


def explain_answer(shown: Match | Explanation) -> ExplainAnswer:
    """A match, or what a query alone says, as JSON types."""
    parts = {"query": shown} if isinstance(shown, Explanation) else shown
    return ExplainAnswer.model_validate(parts)
