"""`BaseStore`: what every store of ours does alike, before and after its engine."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from vdr_db.connectors.base import (
    Documents,
    EmptyRows,
    Hit,
    Id,
    Payload,
    Record,
    Written,
    check_stamp,
    checked_page,
    differences,
)
from vdr_db.connectors.ids import checked_ids
from vdr_db.connectors.passages import Passages
from vdr_db.connectors.validation import checked_query, clean_payload, refuse_reserved
from vdr_db.errors import InputError, StoreError, StoreMismatch
from vdr_db.sparse import SparseRows
from vdr_db.stamp import EncoderStamp

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["TRUSTED_S", "About", "BaseStore"]

About: TypeAlias = tuple[int, EncoderStamp | None, Documents]
"""What a collection is: its width, its encoder as far as known, its kind of documents."""


TRUSTED_S = 5.0
"""So long a search may trust what it saw behind the name."""

_UPDATED_AT_ONCE = 1000


class BaseStore:
    """A place, a width, checked queries, and an end that may come with a `with` block."""

    _is_closed = False
    # What the collection was when it was opened, and when it was last seen to be so.
    _known: About | None = None
    _looked_at = 0.0

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
        self,
        row: SparseRows,
        limit: int = 10,
        filter: Any = None,
        offset: int = 0,
        *,
        min_score: float | None = None,
    ) -> list[Hit]:
        """The best documents; see `Store.search`.

        Args:
            row: The query, one row.
            limit: Hits wanted.
            filter: A dictionary (see `vdr_db.filters`), or a filter object of the engine's package.
            offset: Hits to leave out at the start.
            min_score: Least score of a hit.
        """
        limit, offset = checked_page(limit, offset)
        query = checked_query(row, self._made_width(), self._where, single=True)
        self._look_again(TRUSTED_S)
        found = self._hits(query, limit, offset, filter)[0] if query.nnz else []
        return _from(found, min_score)

    def search_batch(
        self,
        rows: SparseRows,
        limit: int = 10,
        filter: Any = None,
        offset: int = 0,
        *,
        min_score: float | None = None,
    ) -> list[list[Hit]]:
        """`search` for each row, in as few requests as possible."""
        limit, offset = checked_page(limit, offset)
        queries = checked_query(rows, self._made_width(), self._where)
        self._look_again(TRUSTED_S)
        results: list[list[Hit]] = [[] for _ in range(len(queries))]
        asked = np.flatnonzero(queries.counts)
        if asked.size:
            answers = self._hits(queries[asked], limit, offset, filter)
            for i, answer in zip(asked, answers, strict=True):
                results[i] = _from(answer, min_score)
        return results

    def update_payloads(self, ids: Sequence[Id], payloads: Sequence[Mapping[str, Any]]) -> int:
        """Sets fields of payloads; see `Store.update_payloads`.

        Documents are read and written again: what another writer changes in between is lost.
        """
        changes = self._checked_changes(ids, payloads)
        self._look_again()
        updated = 0
        for start in range(0, len(changes), _UPDATED_AT_ONCE):
            part = dict(list(changes.items())[start : start + _UPDATED_AT_ONCE])
            found = self.get(list(part), with_rows=True)
            rows = [one.row for one in found if one.row is not None]
            if rows:
                merged = [{**one.payload, **part[one.id]} for one in found]
                self.upsert(SparseRows.concat(rows), [one.id for one in found], merged)
            updated += len(found)
        return updated

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

    def record_images(self, stamp: EncoderStamp) -> None:
        """Writes down the encoder of images that are about to come; see `Store.record_images`."""
        self._look_again()
        about = self._about_now()
        known = None if about is None else about[1]
        if about is None or known is None or stamp.image is None:
            return
        wanted = about[0], stamp, about[2]
        check_stamp(self._where, about, wanted)
        if not known.reads_images:
            self._write_stamp(known.with_images_of(stamp))
            # Somebody else may have written down another encoder in the same moment.
            self._known = self._about_now()
            check_stamp(self._where, self._known or about, wanted)

    # For the stores

    def get(self, ids: Sequence[Id], with_rows: bool = False) -> list[Record]:
        """See `Store.get`."""
        raise NotImplementedError

    def upsert(
        self,
        rows: SparseRows,
        ids: Sequence[Id],
        payloads: Sequence[Mapping[str, Any] | None] | None = None,
        *,
        empty: EmptyRows = "store",
    ) -> Written:
        """See `Store.upsert`."""
        raise NotImplementedError

    @property
    def _where(self) -> str:
        """The collection and its place, for messages, without secrets."""
        raise NotImplementedError

    def _about(self) -> About | None:
        """What the collection is, `None` while it is not made."""
        raise NotImplementedError

    def _about_now(self) -> About | None:
        """`_about` of what is behind the name by now; another process may have replaced it."""
        return self._about()

    def _write_stamp(self, stamp: EncoderStamp) -> None:
        """Puts another stamp in the place of the one that is written down."""
        raise NotImplementedError

    def _look_again(self, after_s: float = 0.0) -> None:
        """Refuses a collection that was made anew for other vectors since it was opened.

        Args:
            after_s: Trusts what was seen less than so many seconds ago.

        Raises:
            StoreMismatch: It is of another encoder, width or kind of documents.
            StoreError: It is gone.
        """
        self._check_open()
        known = self._known or self._about()
        if known is None or time.monotonic() - self._looked_at < after_s:
            return
        now = self._about_now()
        if now is None:
            raise StoreError(
                f"{self._where} is gone: it was deleted after it was opened here; open it again."
            )
        reasons = differences(now, known)
        if reasons:
            raise StoreMismatch(
                f"{self._where} was made anew since it was opened here: {'; '.join(reasons)}; open "
                "it again, with the model it is of now."
            )
        self._known, self._looked_at = now, time.monotonic()

    def _checked_changes(
        self, ids: Sequence[Id], payloads: Sequence[Mapping[str, Any]]
    ) -> dict[Id, Payload]:
        """Id → fields to set.

        Raises:
            InputError: Ids are unusable or repeated, sizes disagree, or a payload is unusable.
        """
        checked = checked_ids(ids, unique=True)
        if len(payloads) != len(checked):
            raise InputError(f"each id needs a payload, got {len(checked)} and {len(payloads)}.")
        changes: dict[Id, Payload] = {}
        for id, payload in zip(checked, payloads, strict=True):
            refuse_reserved(payload, id)
            changes[id], _ = clean_payload(payload)
        return changes

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


def _from(hits: list[Hit], min_score: float | None) -> list[Hit]:
    return hits if min_score is None else [hit for hit in hits if hit.score >= min_score]
