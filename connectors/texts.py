"""Texts, ids and payloads taken from callers in batches, however they come.

Any of the three may be a list or a generator. What is wrong with them is found out at once where it
can be, and in any case before the batch concerned is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from vdr_db.connectors.base import Id, Payload
from vdr_db.connectors.ids import checked_ids, content_id
from vdr_db.connectors.validation import clean_payload
from vdr_db.errors import ConfigError, InputError, ShapeError

__all__ = ["TextBatch", "refuse_string", "text_batches"]


@dataclass(frozen=True)
class TextBatch:
    """Some texts of a call.

    Attributes:
        ids: The id of every text, in order.
        texts: Texts to encode: those that were not in the call before and can be stored.
        fresh_ids: Their ids.
        payloads: Their payloads, with the text in it when that is wanted.
        refused: Id → reason, for texts that cannot be stored.
    """

    ids: list[Id]
    texts: list[str]
    fresh_ids: list[Id]
    payloads: list[Payload | None]
    refused: dict[Id, str]


def refuse_string(values: Any, name: str) -> None:
    """Refuses one string where several are expected.

    Raises:
        TypeError: It is one string.
    """
    if isinstance(values, (str, bytes)):
        shown = values if len(values) <= 40 else values[:40]
        raise TypeError(f"`{name}` must be a sequence of strings, got one string; pass [{shown!r}]")


def text_batches(
    texts: Iterable[str],
    ids: Iterable[Id] | None,
    payloads: Iterable[Mapping[str, Any] | None] | None,
    *,
    size: int,
    text_key: str | None,
) -> Iterator[TextBatch]:
    """Batches of at most `size` texts with their ids and payloads.

    Args:
        texts: Documents.
        ids: One for each, or `None` for ids made of the content.
        payloads: One mapping or `None` for each, or `None` for no payloads.
        size: Texts of a batch.
        text_key: Payload field for the text, `None` to keep no text.

    Raises:
        TypeError: One string or mapping came instead of several, or an item is of a wrong type.
        ShapeError: The three are not equally many.
        InputError: An id is unusable or given twice, two payloads fight for one text without an id,
            or a payload has another value in the field of the text.
    """
    refuse_string(texts, "texts")
    if isinstance(ids, (str, bytes)):
        raise TypeError(f"`ids` must be a sequence of ids, got {ids!r}; pass [{ids!r}]")
    if isinstance(payloads, Mapping):
        raise TypeError("`payloads` must be a sequence of mappings, got one; pass [payload]")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ConfigError(f"`batch_size` must be an integer of at least 1, got {size!r}.")
    _same_length(texts, ids, payloads)
    return _batches(
        iter(texts),
        None if ids is None else iter(ids),
        None if payloads is None else iter(payloads),
        size,
        text_key,
    )


def _batches(
    texts: Iterator[str],
    ids: Iterator[Id] | None,
    payloads: Iterator[Mapping[str, Any] | None] | None,
    size: int,
    text_key: str | None,
) -> Iterator[TextBatch]:
    # Id → hash of the payload it came with; only compared where ids are made of the content.
    seen: dict[Id, int] = {}
    done = 0
    while batch := list(islice(texts, size)):
        given = _take(payloads, len(batch), "payloads", done) or [None] * len(batch)
        whole = [
            _with_text(text, payload, text_key) for text, payload in zip(batch, given, strict=True)
        ]
        batch_ids = _take(ids, len(batch), "ids", done)
        if batch_ids is None:
            batch_ids = [content_id(text) for text in batch]
            fresh = _first_of_each(batch_ids, whole, seen)
        else:
            batch_ids = checked_ids(batch_ids, unique=True)
            _refuse_repeated(batch_ids, seen)
            fresh = list(range(len(batch)))
        refused = {batch_ids[i]: reason for i in fresh if (reason := _unfit(batch[i])) is not None}
        fresh = [i for i in fresh if batch_ids[i] not in refused]
        yield TextBatch(
            ids=batch_ids,
            texts=[batch[i] for i in fresh],
            fresh_ids=[batch_ids[i] for i in fresh],
            payloads=[whole[i] for i in fresh],
            refused=refused,
        )
        done += len(batch)
    for name, rest in (("ids", ids), ("payloads", payloads)):
        if rest is not None and next(rest, rest) is not rest:
            raise ShapeError(f"`{name}` goes on after the {done} texts, which are all written.")


def _with_text(text: str, payload: Mapping[str, Any] | None, key: str | None) -> Payload | None:
    if not isinstance(text, str):
        raise TypeError(f"texts must be strings, got {type(text).__name__}: {text!r}")
    if payload is not None and not isinstance(payload, Mapping):
        raise TypeError(f"payloads must be mappings, got {type(payload).__name__}: {payload!r}")
    if key is None:
        return None if payload is None else dict(payload)
    joined = {} if payload is None else dict(payload)
    if joined.setdefault(key, text) != text:
        raise InputError(
            f"the payload has another value in {key!r}, where the text is kept; rename that field, "
            "or open the collection with another `text_key` or store_text=False."
        )
    return joined


def _same_length(texts: Any, ids: Any, payloads: Any) -> None:
    sizes = {
        name: len(values)
        for name, values in (("texts", texts), ("ids", ids), ("payloads", payloads))
        if hasattr(values, "__len__") and not isinstance(values, (str, bytes, Mapping))
    }
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{size} {name}" for name, size in sizes.items())
        raise ShapeError(f"texts, ids and payloads must be equally many, got {told}.")


def _take(source: Iterator[Any] | None, count: int, name: str, done: int) -> list[Any] | None:
    if source is None:
        return None
    taken = list(islice(source, count))
    if len(taken) < count:
        raise ShapeError(
            f"`{name}` ended after {done + len(taken)}, and there are more texts; the first {done} "
            "texts are written."
        )
    return taken


def _refuse_repeated(ids: list[Id], seen: dict[Id, int]) -> None:
    for id in ids:
        if id in seen:
            raise InputError(
                f"every id of a call must be different, got {id!r} again in a later batch; "
                "earlier batches are written, add the later version in a call of its own."
            )
    seen.update(dict.fromkeys(ids, 0))


def _first_of_each(
    ids: list[Id], payloads: Sequence[Payload | None], seen: dict[Id, int]
) -> list[int]:
    """Positions of texts not seen before; a text seen with another payload is an error."""
    fresh = []
    for i, (id, payload) in enumerate(zip(ids, payloads, strict=True)):
        told = hash(repr(payload))
        if id not in seen:
            seen[id] = told
            fresh.append(i)
        elif seen[id] != told:
            raise InputError(
                "a text occurs twice in this call with different payloads, and without ids both "
                f"would be one document ({payload!r:.80}); pass ids."
            )
    return fresh


def _unfit(text: str) -> str | None:
    try:
        clean_payload({"text": text})
    except InputError as error:
        return str(error)
    return None
