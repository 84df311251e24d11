"""Why a document is a hit: an explanation of each side, and what both share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vdr_db.explain.explanation import Explanation, Match
from vdr_db.explain.items import explain_image, explain_text
from vdr_db.explain.records import explain_record
from vdr_db.explain.spans import token_spans
from vdr_db.explain.words import TermLike, reasons
from vdr_db.sparse import SparseRows

if TYPE_CHECKING:
    from vdr_db.connectors.base import Id, Record
    from vdr_db.connectors.collections.collection import Collection, Mode
    from vdr_db.encoders.cross_modal import CrossModalEncoder
    from vdr_db.encoders.image import ImageEncoder
    from vdr_db.encoders.text import SparseEncoder
    from vdr_db.images.reading import ImageSource

__all__ = ["join_match", "make_match", "match_of", "match_of_image"]


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
    document = explain_record(
        encoder,
        record,
        text_key=text_key,
        follow=follow and not document_is_bag,
        images=images,
        open_files=open_files,
    )
    asked = explain_text(
        encoder, query, side="query", row=query_row, follow=follow and not query_is_bag
    )
    return join_match(encoder, asked, document, terms, record.id)


def join_match(
    encoder: SparseEncoder,
    query: Explanation,
    document: Explanation,
    terms: Sequence[TermLike],
    id: Id,
) -> Match:
    """A match of two explanations.

    Args:
        encoder: Its tokens say which pieces of the texts are one word.
        query: The query's explanation.
        document: The document's.
        terms: What each shared token adds to the score.
        id: Of the document.
    """
    gap = sorted(encoder.vocabulary.special_ids)[:1]
    own, read = (token_spans(encoder, one.text)[0] for one in (query, document))
    found = reasons(encoder.vocabulary, [*own, *gap, *read], terms)
    score = math.fsum(reason.product for reason in found)
    return Match(query=query, document=document, reasons=found, score=score, id=id)


def match_of_image(
    collection: Collection,
    encoder: CrossModalEncoder,
    image: ImageSource,
    id: Id,
    *,
    follow: bool = True,
    open_files: bool = False,
) -> Match:
    """Why a document, a text or an image, matches an image.

    Args:
        collection: Holds the document.
        encoder: The collection's.
        image: The query: a path, the bytes of a file, a PIL image or an array.
        id: Of the document.
        follow: Whether to follow weights back to tokens and patches.
        open_files: As in `match_of`.

    Raises:
        InputError: The image cannot be read, or there is no document with this id.
    """
    query = explain_image(encoder.image, image, heading="query")
    row = encoder.encode_images([image]).rows
    terms = collection.explain(row, id)
    (record,) = collection.get([id], with_rows=True)
    document = explain_record(
        encoder.text,
        record,
        text_key=collection.text_key,
        follow=follow and collection.documents != "tokens",
        images=encoder.image,
        open_files=open_files,
    )
    return join_match(encoder.text, query, document, terms, id)
