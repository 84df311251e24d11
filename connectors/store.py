"""`BaseStore`: what every store of ours does alike, before and after its engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from vdr_db.connectors.base import Documents, Hit, checked_page
from vdr_db.connectors.passages import Passages
from vdr_db.connectors.validation import checked_query
from vdr_db.errors import StoreError
from vdr_db.sparse import SparseRows
from vdr_db.stamp import EncoderStamp

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["About", "BaseStore"]

About: TypeAlias = tuple[int, EncoderStamp | None, Documents]
"""What a collection is: its width, its encoder as far as known, its kind of documents."""


class BaseStore:
    """A place, a width, checked queries, and an end that may come with a `with` block."""

    _is_closed = False

    @property
    def width(self) -> int | None:
        """Width of all rows, `None` while the collection is not made."""
        about = self._about()
        return None if about is None else about[0]

    @property
    def stamp(self) -> EncoderStamp | None:
        """The encoder the collection was made for, as far as known."""
        about = self._about()
        return None if about is None else about[1]

    @property
    def documents(self) -> Documents:
        """What the document side is."""
        about = self._about()
        return "encoded" if about is None else about[2]

    @property
    def passages(self) -> Passages | None:
        """How its documents are cut; `None` where each row is a document."""
        raise NotImplementedError

    def search(
        self, row: SparseRows, limit: int = 10, filter: Any = None, offset: int = 0
    ) -> list[Hit]:
        """The best documents; see `Store.search`.

        Args:
            row: The query, one row.
            limit: Hits wanted.
            filter: A dictionary (see `vdr_db.filters`), or a filter object of the engine's package.
            offset: Hits to leave out at the start.
        """
        limit, offset = checked_page(limit, offset)
        query = checked_query(row, self._made_width(), self._where, single=True)
        return self._hits(query, limit, offset, filter)[0] if query.nnz else []

    def search_batch(
        self, rows: SparseRows, limit: int = 10, filter: Any = None
    ) -> list[list[Hit]]:
        """`search` for each row, in as few requests as possible."""
        limit, _ = checked_page(limit, 0)
        queries = checked_query(rows, self._made_width(), self._where)
        results: list[list[Hit]] = [[] for _ in range(len(queries))]
        asked = np.flatnonzero(queries.counts)
        if asked.size:
            answers = self._hits(queries[asked], limit, 0, filter)
            for i, answer in zip(asked, answers, strict=True):
                results[i] = answer
        return results

    def leftovers(self) -> dict[str, str]:
        """Name → why nothing needs it: collections that killed rebuilds and rollovers left behind.

        One that a living process of this machine fills is none, and an embedded store has none.
        """
        self._check_open()
        return {}

    def remove_leftovers(self) -> list[str]:
        """Deletes what `leftovers` lists; returns the names."""
        found = list(self.leftovers())
        for name in found:
            self._drop(name)
        return found

    def search_documents(
        self, rows: SparseRows, limit: int, filter: Any = None
    ) -> list[list[Hit]] | None:
        """The best passages of the best documents; see `Store.search_documents`."""
        return None

    def close(self) -> None:
        """Releases the store; a second call does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # For the stores

    @property
    def _where(self) -> str:
        """The collection and its place, for messages, without secrets."""
        raise NotImplementedError

    def _about(self) -> About | None:
        """What the collection is, `None` while it is not made."""
        raise NotImplementedError

    def _hits(self, queries: SparseRows, limit: int, offset: int, filter: Any) -> list[list[Hit]]:
        """The best documents of each query; there is at least one, and none is empty."""
        raise NotImplementedError

    def _drop(self, name: str) -> None:
        """Deletes one of the `leftovers`."""
        raise NotImplementedError

    def _release(self) -> None:
        """What `close` does once."""
        raise NotImplementedError

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreError(f"{self._where} is closed; open it again to use it.")

    def _made_width(self) -> int:
        self._check_open()
        about = self._about()
        if about is None:
            raise StoreError(
                f"{self._where} holds nothing yet; add documents first, or check its name and "
                "place."
            )
        return about[0]
