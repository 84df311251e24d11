"""`StoredDocuments`: what a collection does with documents that are there, without an encoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vdr_db.connectors.base import Id, Page, Record, Store
from vdr_db.connectors.documents import documents_of
from vdr_db.errors import ConfigError, InputError

__all__ = ["StoredDocuments"]

_PAGE = 10_000


class StoredDocuments:
    """The part of `Collection` that goes by ids and filters."""

    store: Store
    text_key: str
    store_text: bool

    @property
    def _view(self) -> Store:
        """The store as one of documents."""
        return documents_of(self.store, self.text_key)

    def delete(self, ids: Sequence[Id] | None = None, *, filter: Any = None) -> int:
        """Removes documents; returns how many were there.

        Args:
            ids: Their ids.
            filter: Removes all documents that it keeps, instead of ids; see `vdr_db.filters`.

        Raises:
            TypeError: One id or condition came instead of ids, or not exactly one of `ids` and
                `filter`.
            ConfigError: The filter is empty, which would remove everything.
        """
        if isinstance(ids, (str, bytes, Mapping)) or (ids is None) == (filter is None):
            raise TypeError(
                f"`delete` takes a sequence of ids or one condition, got ids={ids!r} and "
                f"filter={filter!r}; pass delete([id, ...]) or delete(filter={{field: value}})"
            )
        if ids is not None:
            return self._view.delete(ids)
        if filter == {}:
            raise ConfigError(
                "an empty filter keeps every document, so nothing is deleted by it; pass "
                "delete(list(collection.ids())) to remove all."
            )
        found = list(self._view.ids(filter))
        pages = (found[start : start + _PAGE] for start in range(0, len(found), _PAGE))
        return sum(map(self._view.delete, pages))

    def update_payloads(self, ids: Sequence[Id], payloads: Sequence[Mapping[str, Any]]) -> int:
        """Sets fields of payloads, and leaves vectors and other fields, without encoding anything.

        Args:
            ids: Documents; unknown ones are passed over.
            payloads: The fields to set, one mapping for each id.

        Returns:
            How many of the documents were there.

        Raises:
            InputError: A payload sets the text that the vector is made of, an id is unusable or
                given twice, or ids and payloads are not equally many.
        """
        for id, payload in zip(ids, payloads, strict=False):
            if self.store_text and self.text_key in payload:
                raise InputError(
                    f"the field {self.text_key!r} of {id!r} is the text its vector is made of; "
                    "write a changed text by `add_texts`."
                )
        return self._view.update_payloads(ids, payloads)

    def get(self, ids: Sequence[Id], with_rows: bool = False) -> list[Record]:
        """The documents of these ids in this order; unknown ids are left out."""
        return self._view.get(ids, with_rows)

    def ids(self, filter: Any = None) -> Iterator[Id]:
        """All ids, of documents the filter keeps when one is given, in the order of the store."""
        return self._view.ids(filter)

    def scroll(self, limit: int = 100, filter: Any = None, *, after: str | None = None) -> Page:
        """Documents in the order of the store, a page at a time.

        ```python
        page = articles.scroll(100, {"section": "games"})
        while page.next is not None:
            page = articles.scroll(100, {"section": "games"}, after=page.next)
        ```

        Args:
            limit: Documents of a page.
            filter: Leaves documents out; the same one for all pages.
            after: `next` of the page before.

        Raises:
            InputError: `after` is no such text.
        """
        return self._view.scroll(limit, filter, after)

    def count(self, filter: Any = None) -> int:
        """Number of documents, of those the filter keeps when one is given."""
        return self._view.count(filter)

    def flush(self) -> None:
        """Makes everything written survive a loss of power."""
        self._view.flush()

    def optimize(self) -> None:
        """Reorganises the index after much was written; searches are right with and without."""
        self._view.optimize()
