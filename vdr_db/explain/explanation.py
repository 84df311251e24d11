"""What a vector says, gathered: its words, where they come from, and why two of them match."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vdr_db.errors import ConfigError
from vdr_db.explain.attribution import Evidence, text_evidence
from vdr_db.explain.spans import NOWHERE, Mark, marks, token_spans, word_groups
from vdr_db.explain.words import Reason, TermLike, reasons, vector_words
from vdr_db.sparse import SparseRows
from vdr_db.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from vdr_db.connectors.base import Id, Record
    from vdr_db.connectors.collections.collection import Collection, Mode
    from vdr_db.encoders.image import ImageEncoder
    from vdr_db.encoders.text import SparseEncoder

__all__ = [
    "Fired",
    "Match",
    "Picture",
    "Portrait",
    "join_match",
    "make_match",
    "match_of",
    "portrait_of_image",
    "portrait_of_text",
]

IMAGE_TYPES = ("image/gif", "image/jpeg", "image/png", "image/webp")


@dataclass(frozen=True)
class Picture:
    """An image as a browser shows it: what the patches were cut from, crop included.

    Attributes:
        data: The bytes of the file.
        media_type: One of `IMAGE_TYPES`.
        width: In pixels.
        height: In pixels.

    Raises:
        ConfigError: The type is another one, or a side is not positive.
    """

    data: bytes
    media_type: str
    width: int
    height: int

    def __post_init__(self) -> None:
        if self.media_type not in IMAGE_TYPES:
            raise ConfigError(
                f"`media_type` must be one of {list(IMAGE_TYPES)}, got {self.media_type!r}; "
                "save the image as PNG."
            )
        if self.width < 1 or self.height < 1:
            raise ConfigError(f"a picture must have pixels, got {self.width} x {self.height}.")


@dataclass(frozen=True)
class Fired:
    """A word of a text, or a special token, with what fires on it.

    Attributes:
        label: The word as it is written, or the token.
        words: Words of the vector whose weight comes from here, heaviest first.
        is_special: Whether it is a token around the text, not in it.
    """

    label: str
    words: Sequence[tuple[str, float]]
    is_special: bool


@dataclass(frozen=True)
class Portrait:
    """What the vector of one text or image says.

    Attributes:
        heading: What it is, such as `"query"`.
        text: The text, `""` for an image.
        words: Words with weights, heaviest first.
        nonzeros: Weights in the vector.
        vocabulary: Names of token ids.
        evidence: Which position fires which word, where that is known.
        picture: The image, if it is one.
        thumbnail: A `data:` address of a small copy, where the image itself is not at hand.
    """

    heading: str
    text: str
    words: Sequence[tuple[str, float]]
    nonzeros: int
    vocabulary: Vocabulary
    evidence: Evidence | None = None
    picture: Picture | None = None
    thumbnail: str = ""

    @property
    def is_image(self) -> bool:
        """Whether there is something to look at."""
        return self.picture is not None or bool(self.thumbnail)

    def fired(self) -> list[Fired]:
        """Every word of the text in order with what fires on it; empty without evidence."""
        evidence = self.evidence
        if evidence is None or not evidence.spans:
            return []
        found = []
        for group in word_groups(self.text, evidence.spans):
            weights = dict(pair for position in group for pair in evidence.fired(position))
            start, stop = evidence.spans[group[0]][0], evidence.spans[group[-1]][1]
            is_special = evidence.spans[group[0]] == NOWHERE
            label = evidence.positions[group[0]] if is_special else self.text[start:stop]
            pieces = [] if is_special else self._ids(evidence, group)
            words = self.vocabulary.merge_word_pieces(pieces, weights)
            found.append(Fired(label, words, is_special))
        return found

    def marks(self, shares: dict[int, float] | None = None) -> list[Mark]:
        """Parts of the text that count.

        Args:
            shares: Token id -> how much it counts; None for the weights of the vector itself.
        """
        evidence = self.evidence
        if evidence is None or not evidence.spans:
            return []
        totals = evidence.totals if shares is None else evidence.totals_of(shares)
        return marks(self.text, evidence.spans, totals.tolist())

    def _ids(self, evidence: Evidence, group: Sequence[int]) -> list[int]:
        return [self.vocabulary.id(evidence.positions[position]) for position in group]


@dataclass(frozen=True)
class Match:
    """Why a document is a hit.

    Attributes:
        query: The query's portrait.
        document: The document's.
        reasons: Each shared word with its share of the score, largest first.
        score: Their sum.
        id: Of the document.
    """

    query: Portrait
    document: Portrait
    reasons: Sequence[Reason]
    score: float
    id: Id

    def shares(self) -> dict[int, float]:
        """Token id -> its share of the score."""
        return {term.id: term.product for reason in self.reasons for term in reason.terms}


def portrait_of_text(
    encoder: SparseEncoder,
    text: str,
    *,
    side: Literal["document", "query"] = "document",
    heading: str = "",
    row: SparseRows | None = None,
    follow: bool = True,
) -> Portrait:
    """The portrait of a text.

    Args:
        encoder: What made, or makes, the vector.
        text: The text.
        side: Whether it is a document or a query.
        heading: What it is called; by default the side.
        row: Its vector, one row, when it is there already.
        follow: Whether to follow weights back to tokens; that runs the model once more.
    """
    if row is None:
        encode = encoder.encode_documents if side == "document" else encoder.encode_queries
        row = encode([text])
    own, _ = token_spans(encoder, text)
    return Portrait(
        heading or side,
        text,
        vector_words(encoder.vocabulary, own, row.to_dicts()[0]),
        row.nnz,
        encoder.vocabulary,
        text_evidence(encoder, text, side=side, row=row) if follow else None,
    )


def portrait_of_image(
    vocabulary: Vocabulary,
    row: SparseRows,
    picture: Picture,
    *,
    evidence: Evidence | None = None,
    heading: str = "image",
) -> Portrait:
    """The portrait of an image.

    Args:
        vocabulary: Of its encoder.
        row: Its vector, one row.
        picture: The image.
        evidence: Weights per patch, see `Evidence.of_patches`.
        heading: What it is called.
    """
    words = vector_words(vocabulary, [], row.to_dicts()[0])
    return Portrait(heading, "", words, row.nnz, vocabulary, evidence, picture)


def match_of(
    collection: Collection,
    encoder: SparseEncoder,
    query: str,
    id: Id,
    *,
    mode: Mode | None = None,
    follow: bool = True,
    images: ImageEncoder | None = None,
    open_files: bool = False,
) -> Match:
    """Why a document, a text or an image, matches a query.

    Args:
        collection: Holds the document.
        encoder: The collection's, of texts.
        query: The query, a text; for an image see `match_of_image`.
        id: Of the document.
        mode: How the query is represented; None for the collection's usual one.
        follow: As in `make_match`.
        images: The collection's image encoder, to follow the weights of an image.
        open_files: Whether the file that the payload of an image names may be opened.

    Raises:
        InputError: There is no document with this id.
    """
    encode = encoder.bag_of_tokens if mode == "alpha" else encoder.encode_queries
    row = encode([query])
    terms = collection.explain(row, id, mode=mode)
    (record,) = collection.get([id], with_rows=True)
    return make_match(
        encoder,
        query,
        row,
        record,
        terms,
        text_key=collection.text_key,
        query_is_bag=mode == "alpha",
        document_is_bag=collection.documents == "tokens",
        follow=follow,
        images=images,
        open_files=open_files,
    )


def make_match(
    encoder: SparseEncoder,
    query: str,
    query_row: SparseRows,
    record: Record,
    terms: Sequence[TermLike],
    *,
    text_key: str = "text",
    query_is_bag: bool = False,
    document_is_bag: bool = False,
    follow: bool = True,
    images: ImageEncoder | None = None,
    open_files: bool = False,
) -> Match:
    """A match out of what a store answered; no store is asked.

    Args:
        encoder: The collection's, of texts.
        query: The query.
        query_row: Its vector.
        record: The document with its vector.
        terms: What each shared token adds to the score.
        text_key: Payload field of the text.
        query_is_bag: Whether the query's vector is a bag of tokens.
        document_is_bag: Whether the document's is.
        follow: Whether to follow weights back to tokens; that runs the model on both texts. A bag
            of tokens is not followed: each weight is its own token's.
        images: As in `match_of`.
        open_files: As in `match_of`.

    Raises:
        InputError: The record came without its vector.
    """
    from vdr_db.explain.records import portrait_of_record

    document = portrait_of_record(
        encoder,
        record,
        text_key=text_key,
        follow=follow and not document_is_bag,
        images=images,
        open_files=open_files,
    )
    asked = portrait_of_text(
        encoder, query, side="query", row=query_row, follow=follow and not query_is_bag
    )
    return join_match(encoder, asked, document, terms, record.id)


def join_match(
    encoder: SparseEncoder,
    query: Portrait,
    document: Portrait,
    terms: Sequence[TermLike],
    id: Id,
) -> Match:
    """A match of two portraits.

    Args:
        encoder: Its tokens say which pieces of the texts are one word.
        query: The query's portrait.
        document: The document's.
        terms: What each shared token adds to the score.
        id: Of the document.
    """
    gap = sorted(encoder.vocabulary.special_ids)[:1]
    own, read = (token_spans(encoder, one.text)[0] for one in (query, document))
    found = reasons(encoder.vocabulary, [*own, *gap, *read], terms)
    score = math.fsum(reason.product for reason in found)
    return Match(query=query, document=document, reasons=found, score=score, id=id)
