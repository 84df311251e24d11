"""What an operator does with an index: load it fast, rebuild it, put another one in its place."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vdr_db.connectors.base import OpenStore
from vdr_db.connectors.elasticsearch.index import VersionedIndex
from vdr_db.stamp import EncoderStamp

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["IndexLifecycle"]


class IndexLifecycle(OpenStore):
    """The part of `ElasticsearchStore` that works on whole indices."""

    _index: VersionedIndex

    @contextmanager
    def loading(self) -> Iterator[Self]:
        """Faster writes inside the block: no refreshes and no replicas, restored at its end.

        Restored as well when the block fails; after a kill, by the next `loading`. Use it for one
        writing process at a time.
        """
        self._check_open()
        with self._index.loading():
            yield self

    def create_template(self) -> str:
        """Writes a composable template with this index's mapping for all indices `name-*`.

        Rollovers by this class do not need it; those that the cluster does by itself do. Returns
        the template's name.
        """
        self._check_open()
        return self._index.create_template()

    @contextmanager
    def rebuild(
        self,
        *,
        width: int | None = None,
        stamp: EncoderStamp | None = None,
        expected: int | None = None,
        keep_old: bool = False,
    ) -> Iterator[Self]:
        """Fills a new index inside the block, and moves the alias to it at its end, in one step.

        Searches see the old documents until then. When the block fails, or the number of documents
        is not `expected`, the new index is deleted and nothing has changed.

        Args:
            width: Width of the new rows; the same as now without.
            stamp: Encoder of the new rows; with a new one the name may change its model.
            expected: Documents the new index must have.
            keep_old: Leaves the old index, without the alias.

        Raises:
            StoreError: The number of documents is another one, or the name is no alias.
        """
        self._check_open()
        with self._index.rebuild(
            width=width, stamp=stamp, expected=expected, keep_old=keep_old
        ) as fresh:
            target = copy.copy(self)
            target._index = fresh
            yield target

    def rollover(self, *, keep_old: bool = False) -> str:
        """Copies all documents into a new index on the server and moves the alias to it.

        For a change of the cluster that only new indices get. Writes are refused meanwhile, so that
        none is lost. Returns the name of the new index.

        Raises:
            StoreError: Documents cannot be copied without their vectors (`store_vectors=False`), or
                the numbers of documents differ afterwards; the alias stays with the old index.
        """
        self._check_open()
        return self._index.rollover(keep_old=keep_old)

    @property
    def _where(self) -> str:
        return self._index.where
