"""Texts on their way into a collection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from vdr_db.connectors.base import Id, Payload
from vdr_db.connectors.feed import Batch, Feed, refuse_string
from vdr_db.connectors.ids import content_id
from vdr_db.connectors.passages import PassageRows
from vdr_db.connectors.validation import clean_payload
from vdr_db.errors import InputError
from vdr_db.sparse import SparseRows

__all__ = ["text_batches"]


def text_batches(
    encode: Callable[[list[str]], SparseRows | PassageRows],
    texts: Iterable[str],
    ids: Iterable[Id] | None,
    payloads: Iterable[Mapping[str, Any] | None] | None,
    *,
    size: int,
    text_key: str | None,
) -> Iterator[Batch]:
    """Encoded batches of at most `size` texts with their ids and payloads.

    Args:
        encode: Makes one row for each text, or the rows of its passages.
        texts: Documents.
        ids: One for each, or `None` for ids made of the content.
        payloads: One mapping or `None` for each, or `None` for no payloads.
        size: Texts of a batch.
        text_key: Payload field for the text, `None` to keep no text.
    """
    refuse_string(texts, "texts")
    feed = Feed(texts, ids, payloads, size=size, one="a text")
    return _batches(encode, feed, text_key)


def _batches(
    encode: Callable[[list[str]], SparseRows | PassageRows], feed: Feed[str], text_key: str | None
) -> Iterator[Batch]:
    for part in feed:
        texts = part.items
        whole = [_with_text(*pair, text_key) for pair in zip(texts, part.payloads, strict=True)]
        own: list[Id] = part.ids or [content_id(text) for text in texts]
        fresh = list(range(len(own))) if part.ids else feed.first_of_each(own, whole)
        refused = {own[i]: reason for i in fresh if (reason := _unfit(texts[i])) is not None}
        kept = [i for i in fresh if own[i] not in refused]
        yield Batch(
            ids=own,
            fresh=[own[i] for i in kept],
            rows=encode([texts[i] for i in kept]) if kept else None,
            payloads=[whole[i] for i in kept],
            refused=refused,
        )


def _with_text(text: str, payload: Mapping[str, Any] | None, key: str | None) -> Payload | None:
    if not isinstance(text, str):
        raise TypeError(f"texts must be strings, got {type(text).__name__}: {text!r}")
    if key is None:
        return None if payload is None else dict(payload)
    joined = dict(payload or {})
    if joined.setdefault(key, text) != text:
        raise InputError(
            f"the payload has another value in {key!r}, where the text is kept; rename that field, "
            "or open the collection with another `text_key` or store_text=False."
        )
    return joined


def _unfit(text: str) -> str | None:
    try:
        clean_payload({"text": text})
    except InputError as error:
        return str(error)
    return None
