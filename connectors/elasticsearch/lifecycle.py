"""What an operator does with an index: load it fast, rebuild it, put another one in its place."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from vdr_db.connectors.elasticsearch import indices
from vdr_db.connectors.elasticsearch.index import VersionedIndex
from vdr_db.connectors.elasticsearch.transport import Transport
from vdr_db.connectors.store import BaseStore
from vdr_db.errors import StoreError
from vdr_db.stamp import EncoderStamp

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["IndexLifecycle"]


class IndexLifecycle(BaseStore):
    """The part of `ElasticsearchStore` that works on whole indices."""

    transport: Transport
    _index: VersionedIndex

    @contextmanager
    def loading(self) -> Iterator[Self]:
        """Faster writes inside the block: no refreshes and no replicas, restored at its end.

        Restored as well when the block fails; after a kill, by the next `loading`. Use it for one
        writing process at a time.
        """
        self._check_open()
        index = self._index
        meta, backing = index.made(), index.state().backing
        index.is_loading = True
        try:
            with indices.load_settings(self.transport, backing, asdict(meta)):
                yield self
        finally:
            index.is_loading = False
            index.forget()

    def create_template(self) -> str:
        """Writes a composable template with this index's mapping for all indices `name-*`.

        Rollovers by this class do not need it; those that the cluster does by itself do. Returns
        the template's name.
        """
        self._check_open()
        mapping = self._index.mapping_of(self._index.made())
        settings = self._index.settings_of(self._index.state().backing)
        name = self._index.name
        return indices.put_template(self.transport, name, mapping=mapping, settings=settings)

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
        index, transport = self._index, self.transport
        old, meta = index.state(), index.made()
        if not old.is_alias:
            raise StoreError(
                f"{self._where} is no alias, so nothing can be put in its place; open it by its "
                "alias."
            )
        meta = replace(
            meta,
            width=width or meta.width,
            stamp=meta.stamp if stamp is None else stamp.to_dict(),
            made_by=uuid.uuid4().hex,
        )
        new = indices.next_backing(transport, index.name)
        indices.create_index(
            transport,
            new,
            alias=None,
            mapping=index.mapping_of(meta),
            settings=index.settings_of(old.backing),
        )
        fresh = copy.copy(self)
        fresh._index = VersionedIndex(transport, new, index.new)
        if fresh._index.made().made_by != meta.made_by:
            raise StoreError(f"index {new!r} was made by someone else just now; run this again.")
        try:
            with fresh.loading():
                yield fresh
            count = indices.count_documents(transport, new)
            if expected is not None and count != expected:
                raise StoreError(
                    f"the new index of {index.name!r} must have {expected} documents, got {count}; "
                    "the alias stays with the old one."
                )
            indices.swap_alias(transport, index.name, old=old.backing, new=new)
        except BaseException:
            indices.delete_index(transport, new)
            raise
        index.forget()
        if not keep_old:
            indices.delete_index(transport, old.backing)

    def rollover(self, *, keep_old: bool = False) -> str:
        """Copies all documents into a new index on the server and moves the alias to it.

        For a change of the cluster that only new indices get. Writes are refused meanwhile, so that
        none is lost. Returns the name of the new index.

        Raises:
            StoreError: Documents cannot be copied without their vectors (`store_vectors=False`), or
                the numbers of documents differ afterwards; the alias stays with the old index.
        """
        self._check_open()
        if not self._index.made().store_vectors:
            raise StoreError(
                f"{self._where} was made with store_vectors=False, so its documents cannot be "
                "copied; fill a new index through `rebuild`."
            )
        old = self._index.state().backing
        with indices.blocked_writes(self.transport, old):
            indices.refresh_index(self.transport, old)
            expected = indices.count_documents(self.transport, old)
            with self.rebuild(expected=expected, keep_old=keep_old) as fresh:
                indices.copy_documents(self.transport, old, fresh._index.name)
        return self._index.state().backing

    @property
    def _where(self) -> str:
        return self._index.where
