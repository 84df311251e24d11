"""Documents of one call in batches, however they come: the feed of texts and of images.

Documents, ids and payloads may each be a list or a generator. What is wrong with them is found out
at once where it can be, and in any case before the batch concerned is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

from vdr_db.connectors.base import Id, Payload
from vdr_db.connectors.ids import checked_ids
from vdr_db.connectors.passages import PassageRows
from vdr_db.counts import counted
from vdr_db.errors import InputError, ShapeError
from vdr_db.sparse import SparseRows

__all__ = ["Batch", "Feed", "Part", "refuse_string"]

Item = TypeVar("Item")


@dataclass(frozen=True)
class Batch:
    """Some documents of a call, encoded; a collection writes it.

    Attributes:
        ids: The id of every document, in order.
        fresh: Ids of those to write: not in the call before, and fit to be stored.
        rows: Their vectors, each document's one or its passages', `None` when there are none.
        payloads: Their payloads.
        refused: Id → reason, for documents that cannot be stored.
    """

    ids: list[Id]
    fresh: list[Id]
    rows: SparseRows | PassageRows | None
    payloads: list[Payload | None]
    refused: dict[Id, str]


@dataclass(frozen=True)
class Part(Generic[Item]):
    """Some documents of a call, as they came.

    Attributes:
        start: Place of the first in the call.
        items: The documents.
        ids: The ids the caller gave, checked; `None` when there are none.
        payloads: What the caller gave, one for each document.
    """

    start: int
    items: list[Item]
    ids: list[Id] | None
    payloads: list[Mapping[str, Any] | None]


class Feed(Generic[Item]):
    """The documents of one call, at most `size` at a time; `one` is such a document: `"a text"`.

    Raises:
        TypeError: One id or mapping came instead of several, or a payload is no mapping.
        ConfigError: `size` is no positive integer.
        ShapeError: Items, ids and payloads are not equally many.
        InputError: An id is unusable or given twice.
    """

    def __init__(
        self,
        items: Iterable[Item],
        ids: Iterable[Id] | None,
        payloads: Iterable[Mapping[str, Any] | None] | None,
        *,
        size: int,
        one: str,
    ) -> None:
        if isinstance(ids, (str, bytes)):
            raise TypeError(f"`ids` must be a sequence of ids, got {ids!r}; pass [{ids!r}]")
        if isinstance(payloads, Mapping):
            raise TypeError("`payloads` must be a sequence of mappings, got one; pass [payload]")
        self._one, self._several = one, f"{one.split()[-1]}s"
        named: dict[str, object] = {self._several: items, "ids": ids, "payloads": payloads}
        sizes = {name: len(some) for name, some in named.items() if isinstance(some, Sized)}
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{size} {name}" for name, size in sizes.items())
            raise ShapeError(f"{self._several}, ids and payloads must be equally many, got {told}.")
        self._size = counted("batch_size", size)
        self._items = iter(items)
        self._ids = None if ids is None else iter(ids)
        self._payloads = None if payloads is None else iter(payloads)
        # Id → hash of the payload it came with; only compared where ids are made of the content.
        self._seen: dict[Id, int] = {}

    def __iter__(self) -> Iterator[Part[Item]]:
        done = 0
        while items := list(islice(self._items, self._size)):
            payloads = self._take(self._payloads, len(items), "payloads", done)
            for payload in payloads or ():
                if payload is not None and not isinstance(payload, Mapping):
                    raise TypeError(
                        f"payloads must be mappings, got {type(payload).__name__}: {payload!r}"
                    )
            ids = self._take(self._ids, len(items), "ids", done)
            if ids is not None:
                ids = checked_ids(ids, unique=True)
                self._refuse_repeated(ids)
            yield Part(done, items, ids, payloads or [None] * len(items))
            done += len(items)
        for name, rest in (("ids", self._ids), ("payloads", self._payloads)):
            if rest is not None and next(rest, rest) is not rest:
                raise ShapeError(
                    f"`{name}` goes on after the {done} {self._several}, which are all written."
                )

    def first_of_each(self, ids: Sequence[Id], payloads: Sequence[Payload | None]) -> list[int]:
        """Places of documents that were not in the call before, by ids made of their content."""
        fresh = []
        for i, (id, payload) in enumerate(zip(ids, payloads, strict=True)):
            told = hash(repr(payload))
            if id not in self._seen:
                self._seen[id] = told
                fresh.append(i)
            elif self._seen[id] != told:
                raise InputError(
                    f"{self._one} occurs twice in this call with different payloads, and without "
                    f"ids both would be one document ({payload!r:.80}); pass ids."
                )
        return fresh

    def _take(
        self, source: Iterator[Any] | None, count: int, name: str, done: int
    ) -> list[Any] | None:
        if source is None:
            return None
        taken = list(islice(source, count))
        if len(taken) < count:
            raise ShapeError(
                f"`{name}` ended after {done + len(taken)}, and there are more {self._several}; "
                f"the first {done} {self._several} are written."
            )
        return taken

    def _refuse_repeated(self, ids: list[Id]) -> None:
        for id in ids:
            if id in self._seen:
                raise InputError(
                    f"every id of a call must be different, got {id!r} again in a later batch; "
                    "earlier batches are written, add the later version in a call of its own."
                )
        self._seen.update(dict.fromkeys(ids, 0))


def refuse_string(values: Any, name: str) -> None:
    """Refuses one string where several are expected."""
    if isinstance(values, (str, bytes)):
        shown = values if len(values) <= 40 else values[:40]
        raise TypeError(f"`{name}` must be a sequence of strings, got one string; pass [{shown!r}]")
