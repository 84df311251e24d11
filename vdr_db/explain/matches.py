"""Why a document is a hit: an explanation of each side, and what both share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vdr_db.explain.explanation import Explanation, Match
from vdr_db.explain.items import explain_image, explain_text
from vdr_db.explain.records import explain_record
from vdr_db.explain.spans import token_spans
from vdr_db.explain.words import reasons
from vdr_db.sparse import SparseRows

if TYPE_CHECKING:
    from vdr_db.connectors.base import Id, Record, Term
    from vdr_db.connectors.collections.collection import Collection, Mode
    from vdr_db.encoders.cross_modal import CrossModalEncoder
    from vdr_db.encoders.image import ImageEncoder
    from vdr_db.encoders.text import SparseEncoder
    from vdr_db.images.reading import ImageSource

__all__ = ["make_match", "match_of", "match_of_image"]


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
        follow: Whether to follow weights back to tokens and patches; that runs the model on both
            sides. A bag of tokens is not followed: each weight is its own token's.
        images: The collection's image encoder, to follow the weights of an image.
        open_files: Whether the file that the payload of an image names may be opened.

    Raises:
        InputError: There is no document with this id.
    """
    is_bag = mode == "alpha"
    if is_bag:
        row = encoder.bag_of_tokens([query], side="query")
    else:
        row = encoder.encode_queries([query])
    asked = explain_text(encoder, query, side="query", row=row, follow=follow and not is_bag)
    return _found(collection, encoder, asked, row, id, mode, follow, images, open_files)


def match_of_image(
    collection: Collection,
    encoder: CrossModalEncoder,
    image: ImageSource,
    id: Id,
    *,
    follow: bool = True,
    open_files: bool = False,
) -> Match:
    """Why a document, a text or an image, matches an image: a path, bytes, PIL image or array.

    The other arguments are those of `match_of`.

    Raises:
        InputError: The image cannot be read, or there is no document with this id.
    """
    asked = explain_image(encoder.image, image, heading="query")
    row = encoder.encode_images([image]).rows
    return _found(collection, encoder.text, asked, row, id, None, follow, encoder.image, open_files)


def make_match(
    encoder: SparseEncoder,
    query: Explanation,
    record: Record,
    terms: Sequence[Term],
    *,
    text_key: str = "text",
    follow: bool = True,
    images: ImageEncoder | None = None,
    open_files: bool = False,
) -> Match:
    """A match out of what a store answered; no store is asked.

    Args:
        encoder: The collection's, of texts.
        query: The query's explanation.
        record: The document with its vector.
        terms: What each shared token adds to the score.
        text_key: Payload field of the text.
        follow: Whether to follow the document's weights; see `match_of`, as for the rest.
        images: Its image encoder.
        open_files: Whether its file may be opened.

    Raises:
        InputError: The record came without its vector.
    """
    document = explain_record(
        encoder, record, text_key=text_key, follow=follow, images=images, open_files=open_files
    )
    gap = sorted(encoder.vocabulary.special_ids)[:1]
    own, read = (token_spans(encoder, one.text)[0] for one in (query, document))
    found = reasons(encoder.vocabulary, [*own, *gap, *read], terms)
    score = math.fsum(reason.product for reason in found)
    return Match(query, document, found, score, record.id)


def _found(
    collection: Collection,
    encoder: SparseEncoder,
    asked: Explanation,
    row: SparseRows,
    id: Id,
    mode: Mode | None,
    follow: bool,
    images: ImageEncoder | None,
    open_files: bool,
) -> Match:
    terms = collection.explain(row, id, mode=mode)
    record = collection.matched(row, id)
    return make_match(
        encoder,
        asked,
        record,
        terms,
        text_key=collection.text_key,
        follow=follow and collection.documents != "tokens",
        images=images,
        open_files=open_files,
    )
