"""What an operator does with an index: load it fast, rebuild it, put another one in its place."""

from __future__ import annotations

import contextlib
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
from vdr_db.connectors.work import WORK_KEY, Work
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

        Restored as well when the block fails, and by whoever opens the index next after a kill.
        """
        self._check_open()
        index = self._index
        index.forget()  # another process may have put another index in its place
        backing = index.state().backing
        try:
            with indices.changed_settings(self.transport, backing, indices.LOAD_SETTINGS) as alive:
                index.loader = alive
                yield self
        finally:
            index.loader = None
            index.forget()

    def create_template(self) -> str:
        """Writes a composable template with this index's mapping for its numbered successors.

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
        into: str | None = None,
        keep_unfinished: bool = False,
    ) -> Iterator[Self]:
        """Fills a new index inside the block, and moves the alias to it at its end, in one step.

        Searches see the old documents until then. When the block fails, or the number of documents
        is not `expected`, the new index is deleted and nothing has changed.

        Args:
            width: Width of the new rows; the same as now without.
            stamp: Encoder of the new rows; with a new one the name may change its model.
            expected: Documents the new index must have.
            keep_old: Leaves the old index, without the alias.
            into: Goes on with this index, which an earlier block left unfinished.
            keep_unfinished: Leaves the new index when the block fails, for a later `into`.

        Raises:
            StoreError: The number of documents is another one, or the name is no alias.
        """
        self._check_open()
        index, transport = self._index, self.transport
        index.forget()
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
        new = (into or "").removesuffix(indices.UNFINISHED)
        new = new or indices.next_backing(transport, index.name)
        # Written to by an alias, so that it is not made anew with guessed types if it vanishes.
        alias = f"{new}{indices.UNFINISHED}"
        if into is None:
            mapping = index.mapping_of(meta)
            mapping["_meta"][WORK_KEY] = asdict(Work.of_this_process())
            settings = index.settings_of(old.backing)
            indices.create_index(transport, new, alias=alias, mapping=mapping, settings=settings)
        fresh = copy.copy(self)
        fresh._known = None
        fresh._index = VersionedIndex(transport, alias, index.new)
        if into is None and fresh._index.made().made_by != meta.made_by:
            raise StoreError(f"index {new!r} was made by someone else just now; run this again.")
        try:
            with fresh.loading():
                yield fresh
            count = indices.count_documents(transport, alias)
            if expected is not None and count != expected:
                raise StoreError(
                    f"the new index of {index.name!r} must have {expected} documents, got {count}; "
                    "the alias stays with the old one."
                )
            indices.swap_aliases(transport, index.name, old=old.backing, new=new, keep_old=keep_old)
        except BaseException:
            # It may be live although its answer was lost, or this is Ctrl-C after the swap. When
            # nobody can tell it stays, and `leftovers` lists it.
            with contextlib.suppress(StoreError):
                if not keep_unfinished and index.name not in indices.aliases_of(transport, new):
                    indices.delete_index(transport, new)
            raise
        finally:
            index.forget()
            self._known = None
        if not keep_old:
            indices.delete_index(transport, old.backing)

    def rollover(self, *, keep_old: bool = False) -> str:
        """Copies all documents into a new index on the server and moves the alias to it.

        For a change of the cluster that only new indices get. Writes are refused meanwhile, so that
        none is lost. Returns the name of the new index.

        Raises:
            StoreError: Documents cannot be copied without their vectors (`store_vectors=False`), or
                the copy differs afterwards; the alias stays with the old index.
        """
        self._check_open()
        self._index.forget()
        meta, state = self._index.made(), self._index.state()
        if not meta.store_vectors or state.leaves_out(meta.field):
            raise StoreError(
                f"{self._where} keeps no vectors (store_vectors=False, or a template leaves them "
                "out), so its documents cannot be copied; fill a new index through `rebuild`."
            )
        old = state.backing
        with indices.changed_settings(self.transport, old, {"index.blocks.write": True}):
            indices.refresh_index(self.transport, old)
            expected = indices.count_documents(self.transport, old)
            with self.rebuild(expected=expected, keep_old=keep_old) as fresh:
                new = fresh._index.state().backing
                indices.copy_documents(self.transport, old, new)
                indices.refresh_index(self.transport, new)
                indices.check_copied(self.transport, old, new, meta.field)
        return self._index.state().backing

    def is_unfinished(self, name: str) -> bool:
        """Whether this is the name, in `rebuild`, of an index of ours that it did not finish."""
        self._check_open()
        backing = name.removesuffix(indices.UNFINISHED)
        is_ours = backing != name and backing.startswith(f"{self._index.name}-")
        return is_ours and name in indices.aliases_of(self.transport, backing)

    def drop_unfinished(self, name: str) -> None:
        """Deletes an index for which `is_unfinished` holds."""
        indices.delete_index(self.transport, name.removesuffix(indices.UNFINISHED))

    def leftovers(self) -> dict[str, str]:
        """Index → why nothing needs it; see `BaseStore.leftovers`."""
        self._check_open()
        return indices.leftovers(self.transport, self._index.name)

    def _drop(self, name: str) -> None:
        indices.delete_index(self.transport, name)

    @property
    def _where(self) -> str:
        return self._index.where
