"""What an operator does with a collection on a server: put a new one in its place, gapless."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vdr_db.connectors.base import Documents, check_stamp
from vdr_db.connectors.passages import Passages, check_passages
from vdr_db.connectors.qdrant.edge_sums import RowDamage
from vdr_db.connectors.qdrant.engine import (
    VECTOR_NAME,
    Datatype,
    DenseVector,
    Engine,
    IndexKind,
    Manifest,
    checked_indexes,
)
from vdr_db.connectors.qdrant.errors import NameTaken
from vdr_db.connectors.qdrant.filters import json_path
from vdr_db.connectors.qdrant.server import ServerEngine
from vdr_db.connectors.store import About, BaseStore
from vdr_db.connectors.validation import DOCUMENT_FIELD
from vdr_db.connectors.work import Work
from vdr_db.errors import ConfigError, StoreError
from vdr_db.filters import Key
from vdr_db.sparse import SparseRows
from vdr_db.stamp import EncoderStamp

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CollectionLifecycle"]


class CollectionLifecycle(BaseStore):
    """The part of `QdrantStore` for whole collections: it makes, describes and replaces them."""

    name: str
    _engine: Engine
    _manifest: Manifest | None
    _datatype: Datatype | None
    _payload_indexes: dict[str, IndexKind]
    _dense: dict[str, DenseVector]
    _vector_name: str | None
    _full_scan_threshold: int

    @property
    def datatype(self) -> Datatype:
        """How the index keeps weights."""
        kept = self._datatype if self._manifest is None else self._manifest.datatype
        return kept or "float32"

    @property
    def dense(self) -> dict[str, DenseVector]:
        """The dense vectors beside the sparse one; `""` is one without a name."""
        return self._dense if self._manifest is None else dict(self._manifest.dense)

    @property
    def passages(self) -> Passages | None:
        """How its documents are cut; `None` where each point is a document."""
        return None if self._manifest is None else self._manifest.passages

    def create(
        self,
        width: int,
        stamp: EncoderStamp | None = None,
        *,
        documents: Documents = "encoded",
        passages: Passages | None = None,
    ) -> None:
        """Makes the collection, or checks the one that is there; see `Store.create`."""
        self._check_open()
        if self._manifest is not None:
            check_stamp(self._where, self._manifest.about, (width, stamp, documents))
            check_passages(self._where, self._manifest.passages, passages)
            return
        SparseRows.empty(0, width)  # checks the width
        indexes = dict(self._payload_indexes)
        if passages is not None and self._dense:
            raise ConfigError(
                "dense vectors are of whole documents; make the collection without `dense`, or "
                "without `passages`."
            )
        if passages is not None:
            indexes.setdefault(json_path(Key.parse(DOCUMENT_FIELD)), "keyword")
        manifest = Manifest(
            collection=self.name,
            width=width,
            stamp=stamp,
            documents=documents,
            datatype=self.datatype,
            full_scan_threshold=self._full_scan_threshold,
            payload_indexes=indexes,
            dense=self._dense,
            vector=self._vector_name or VECTOR_NAME,
            passages=passages,
        )
        try:
            self._engine.create(manifest)
        except NameTaken:
            # Another process was faster; what it made must be what was asked for.
            self._manifest = self._engine.open()
            if self._manifest is None:
                raise
            self._manifest.check_options(
                self._where, self._datatype, self._payload_indexes, self._dense
            )
            self.create(width, stamp, documents=documents, passages=passages)
            return
        self._manifest = manifest

    def __copy__(self) -> Self:
        """Another handle of the same engine; a pickle would open it anew."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    @contextmanager
    def rebuild(
        self,
        *,
        width: int | None = None,
        stamp: EncoderStamp | None = None,
        expected: int | None = None,
        keep_old: bool = False,
        datatype: Datatype | None = None,
        payload_indexes: Mapping[str, IndexKind] | None = None,
        collection_options: Mapping[str, Any] | None = None,
        into: str | None = None,
        keep_unfinished: bool = False,
    ) -> Iterator[Self]:
        """Fills a new collection inside the block, and moves the alias to it in one request.

        Searches see the old documents until then. When the block fails, or the number of documents
        is not `expected`, the new collection is deleted and nothing has changed. The new one gets
        the settings and payload indexes of the old one, before it is filled.

        Args:
            width: Width of the new rows; the same as now without.
            stamp: Encoder of the new rows; with a new one the name may change its model.
            expected: Documents the new collection must have.
            keep_old: Leaves the old collection, without the alias. One that has another alias stays
                in any case.
            datatype: How the new index keeps weights; the same as now without.
            payload_indexes: More payload indexes, or other ones for the same keys.
            collection_options: Arguments of `create_collection` that change, such as
                `shard_number`.
            into: Goes on with this collection, which an earlier block left unfinished.
            keep_unfinished: Leaves the new collection when the block fails, for a later `into`.

        Raises:
            ConfigError: The collection is embedded.
            StoreError: The number of documents is another one, the name is no alias, or someone
                else rebuilt it meanwhile.
            StoreUnavailable: The server went away. When that was while the alias moved, both
                collections stay, because the new one may be in use already.
        """
        made, engine = self._made(), self._server()
        made = engine.current() or made  # images may have come since it was opened
        versions = engine.versions
        old = versions.target(self.name)
        if old is None:
            raise StoreError(
                f"{engine.where} is no alias, so nothing can be put in its place; make collections "
                "with versioned=True, or give this one an alias and open it by that."
            )
        manifest = replace(
            made,
            collection=self.name,
            width=made.width if width is None else width,
            stamp=made.stamp if stamp is None else stamp,
            datatype=datatype or made.datatype,
            payload_indexes={**made.payload_indexes, **checked_indexes(payload_indexes)},
        )
        SparseRows.empty(0, manifest.width)  # checks the width
        name = into or versions.free_name(self.name)
        try:
            if into is None:
                beside = engine.beside(name, old, manifest, collection_options or {})
            else:
                beside = engine.renamed(name)
        except NameTaken as error:
            raise StoreError(
                f"collection {name!r} was made by someone else just now; run this again."
            ) from error
        work = Work.of_this_process()
        if into is not None:
            versions.note(name, work)
        target = copy.copy(self)
        target.name, target._engine, target._manifest = name, beside, manifest
        target._known = None
        try:
            yield target
            count = versions.count(name)
            if expected is not None and count != expected:
                raise StoreError(
                    f"the new collection of {self.name!r} must have {expected} documents, got "
                    f"{count}; the alias stays with the old one."
                )
            versions.check_target(self.name, old)
            # Told before the alias moves: nothing tells afterwards whose the old one was.
            versions.note(old, None if keep_old else work)
        except BaseException:
            # What went wrong is told, rather than that the remains could not be removed.
            with contextlib.suppress(StoreError):
                if not keep_unfinished:
                    versions.drop(name)
            raise
        finally:
            target._is_closed = True
        # From here on the new collection is never deleted: it may be in use already.
        versions.move_alias(self.name, name)
        versions.note(name, None)
        self._manifest, self._known = target._manifest, None
        if not keep_old:
            versions.drop(old, unless_named=True)

    def rollover(
        self,
        *,
        keep_old: bool = False,
        datatype: Datatype | None = None,
        payload_indexes: Mapping[str, IndexKind] | None = None,
        collection_options: Mapping[str, Any] | None = None,
    ) -> str:
        """Copies all documents into a new collection and moves the alias to it; returns its name.

        For settings that only new collections get; the arguments are those of `rebuild`. The
        documents travel through this process. Write nothing meanwhile: the server cannot be told to
        refuse writes, and what changes after it was copied is not in the new collection.

        Raises:
            ConfigError: The collection is embedded.
            StoreError: The name is no alias, or the numbers of documents differ afterwards; the
                alias stays with the old collection.
        """
        versions = self._server().versions
        with self.rebuild(
            keep_old=keep_old,
            datatype=datatype,
            payload_indexes=payload_indexes,
            collection_options=collection_options,
        ) as fresh:
            old, new = versions.target(self.name) or self.name, fresh.name
            versions.copy(old, new)
            counts = versions.count(old), versions.count(new)
            if counts[0] != counts[1]:
                raise StoreError(
                    f"{old!r} has {counts[0]} documents and its copy {counts[1]}: something was "
                    "written meanwhile; the old one is in use as before, run this again in quiet."
                )
        return new

    def leftovers(self) -> dict[str, str]:
        """Collection → why nothing needs it; see `BaseStore.leftovers`.

        A process of another machine may still be filling one: the reason then names both. Servers
        before 1.16 keep no such notes, so that there all without an alias are listed.
        """
        self._check_open()
        engine = self._engine
        return engine.versions.leftovers(self.name) if isinstance(engine, ServerEngine) else {}

    def is_unfinished(self, backing: str) -> bool:
        """Whether this is a collection of this name that a rebuild may not have finished."""
        return backing in self._server().versions.unnamed(self.name)

    def drop_unfinished(self, backing: str) -> None:
        """Deletes a collection for which `is_unfinished` holds."""
        self._drop(backing)

    def _drop(self, name: str) -> None:
        self._server().versions.drop(name, unless_named=True)

    def damage(self) -> RowDamage | None:
        """What reading every row of an embedded collection shows; `None` on a server.

        Raises:
            StoreError: The rows cannot be read.
        """
        self._check_open()
        read: Callable[[], RowDamage | None] | None = getattr(self._engine, "damage", None)
        return None if read is None else read()

    def _server(self) -> ServerEngine:
        if not isinstance(self._engine, ServerEngine):
            raise ConfigError(
                f"{self._engine.where} is embedded and has no aliases and groups; build "
                "another folder and open that, or use a server."
            )
        return self._engine

    def _about(self) -> About | None:
        return None if self._manifest is None else self._manifest.about

    def _about_now(self) -> About | None:
        if not isinstance(self._engine, ServerEngine):
            return self._about()
        current = self._engine.current()
        return None if current is None else current.about

    def _write_stamp(self, stamp: EncoderStamp) -> None:
        manifest = replace(self._made(), stamp=stamp)
        self._engine.describe(manifest)
        self._manifest = manifest

    def _made(self) -> Manifest:
        self._made_width()
        assert self._manifest is not None
        return self._manifest

    def _release(self) -> None:
        self._engine.close()

    @property
    def _where(self) -> str:
        return self._engine.where
