"""`VersionedIndex`: an alias, the index behind it, and what we remember about it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any
from urllib.parse import quote

from vdr_db.connectors.base import Documents, check_stamp
from vdr_db.connectors.elasticsearch import indices
from vdr_db.connectors.elasticsearch.bodies import FieldKind, index_mapping, index_settings
from vdr_db.connectors.elasticsearch.transport import Transport
from vdr_db.connectors.passages import Passages, check_passages
from vdr_db.errors import ConfigError, StoreError, StoreMismatch
from vdr_db.sparse import SparseRows
from vdr_db.stamp import EncoderStamp

__all__ = ["IndexMeta", "NewIndex", "VersionedIndex"]

_FORMAT = 1


@dataclass(frozen=True)
class NewIndex:
    """How an index is made when there is none.

    The arguments of `ElasticsearchStore` with the same names explain them.
    """

    kind: FieldKind = "rank_features"
    field: str = "vdr"
    store_vectors: bool = True
    text_fields: Mapping[str, str | None] | None = None
    payload_types: Mapping[str, Mapping[str, Any] | str] | None = None
    shards: int | None = None
    replicas: int | None = None
    settings: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("rank_features", "sparse_vector"):
            raise ConfigError(
                f"`kind` must be 'rank_features' or 'sparse_vector', got {self.kind!r}."
            )
        least = {"shards": 1, "replicas": 0}
        given = {name: getattr(self, name) for name in least}
        if any(number is not None and number < least[name] for name, number in given.items()):
            raise ConfigError(
                "`shards` must be at least 1 and `replicas` at least 0, got "
                f"{self.shards} and {self.replicas}."
            )


@dataclass(frozen=True)
class IndexMeta:
    """What an index of ours remembers under `_meta`.

    Attributes:
        width: Width of all rows.
        stamp: The encoder's identity as JSON types, or `None`.
        documents: What the document side is.
        kind: Type of the vector field.
        field: Name of the vector field.
        store_vectors: Whether `_source` keeps vectors.
        text_fields: Payload fields indexed as text.
        before_load: What versions before 0.9 wrote when they began to load; `None` since.
        format: Version of this description.
        made_by: Random name of the request that made the index, so that a process whose answer got
            lost recognises its own.
        passages: How documents are cut, as JSON types; `None` where each one is whole.
    """

    width: int
    stamp: Mapping[str, Any] | None
    documents: Documents
    kind: FieldKind
    field: str
    store_vectors: bool
    text_fields: Sequence[str]
    before_load: Mapping[str, Any] | None = None
    format: int = _FORMAT
    made_by: str = ""
    passages: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """What is written; without passages as versions write it that know none."""
        data = asdict(self)
        return data if self.passages else {k: v for k, v in data.items() if k != "passages"}

    @property
    def encoder(self) -> EncoderStamp | None:
        """The stamp as an object."""
        return EncoderStamp.from_dict(self.stamp) if self.stamp else None


class VersionedIndex:
    """An alias of one index of ours. Reads the server when first asked, then remembers.

    Attributes:
        name: The alias, or the name of an index opened by itself.
        loader: Tells the server that a `loading` block runs, while one does.
    """

    def __init__(self, transport: Transport, name: str, new: NewIndex) -> None:
        self.name = indices.check_name(name)
        self.loader: Callable[[], None] | None = None
        self.transport = transport
        self.new = new
        self._state: indices.IndexState | None = None

    @property
    def where(self) -> str:
        """The name for messages."""
        return f"index {self.name!r}"

    @property
    def path(self) -> str:
        """The name for addresses."""
        return quote(self.name)

    @property
    def is_alias(self) -> bool:
        """Whether the name is an alias."""
        return self.state().is_alias

    def state(self) -> indices.IndexState:
        """What the server holds under the name; nothing is a `StoreError`."""
        self.made()
        assert self._state is not None
        return self._state

    def meta(self) -> IndexMeta | None:
        """What is known about the index, `None` without any; foreign ones are a `StoreMismatch`."""
        if self._state is None:
            self._state = indices.read_state(self.transport, self.name)
        if self._state is None:
            return None
        stored = self._state.meta
        try:
            meta = IndexMeta(**stored)
        except TypeError as error:
            raise StoreMismatch(
                f"{self.where} was not made by this version of the library (its `_meta` has "
                f"{sorted(stored) or 'nothing of ours'}); choose another name, or use the "
                "version that made it."
            ) from error
        if meta.format != _FORMAT:
            raise StoreMismatch(
                f"{self.where} has format {meta.format}, this version reads {_FORMAT}; use the "
                "library version that made it."
            )
        return meta

    def made(self) -> IndexMeta:
        """`meta` of an index that is there; none is a `StoreError`."""
        meta = self.meta()
        if meta is None:
            raise StoreError(f"{self.where} holds nothing yet; add documents first.")
        return meta

    def create(
        self,
        width: int,
        stamp: EncoderStamp | None,
        documents: Documents,
        passages: Passages | None,
    ) -> None:
        """Makes index and alias, or checks what is there; see `Store.create`."""
        SparseRows.empty(0, width)  # checks the width
        if self.meta() is None:
            meta = IndexMeta(
                width=width,
                stamp=None if stamp is None else stamp.to_dict(),
                documents=documents,
                kind=self.new.kind,
                field=self.new.field,
                store_vectors=self.new.store_vectors,
                text_fields=list(self.new.text_fields or ()),
                passages=None if passages is None else passages.to_dict(),
            )
            # Processes that come at once all ask for the first name, and one of them gets it.
            # Another name is taken only when that index is there without the alias.
            mapping = index_mapping(
                {indices.META_KEY: meta.to_dict()},
                field=meta.field,
                kind=meta.kind,
                version=self._version(),
                store_vectors=meta.store_vectors,
                text_fields=self.new.text_fields,
                payload_types=self.new.payload_types,
                is_grouped=passages is not None,
            )
            settings = index_settings(
                shards=self.new.shards,
                replicas=self.new.replicas,
                kind=self.new.kind,
                version=self._version(),
                extra=self.new.settings,
            )
            bodies = {"mapping": mapping, "settings": settings}
            first = f"{self.name}-000001"
            is_ours = indices.create_index(self.transport, first, alias=self.name, **bodies)
            if not is_ours and self.meta() is None:
                free = indices.next_backing(self.transport, self.name)
                indices.create_index(self.transport, free, alias=self.name, **bodies)
        stored = self.made()
        check_stamp(
            self.where, (stored.width, stored.encoder, stored.documents), (width, stamp, documents)
        )
        check_passages(self.where, Passages.from_dict(stored.passages), passages)

    def write_stamp(self, stamp: EncoderStamp) -> None:
        """Puts another stamp in the place of the one that is there."""
        state = self.state()
        meta = {**state.meta, "stamp": stamp.to_dict()}
        indices.write_meta(self.transport, state.backing, meta, state.work)
        self.forget()

    def _version(self) -> tuple[int, int]:
        # Only this type's mapping depends on the version; others may use servers that hide theirs.
        return self.transport.version() if self.new.kind == "sparse_vector" else (8, 11)

    def forget(self) -> None:
        """Reads the server again when next asked."""
        self._state = None

    def mapping_of(self, meta: IndexMeta) -> dict[str, Any]:
        """The mapping of another index like the one that is there."""
        clean = replace(meta, before_load=None).to_dict()
        return {**self.state().mapping, "_meta": {indices.META_KEY: clean}}

    def put_right(self) -> None:
        """Ends what a killed process left undone, as far as the credentials allow it."""
        if self.meta() is not None:
            with contextlib.suppress(StoreError):
                if indices.put_right(self.transport, self.state()):
                    self.forget()

    def settings_of(self, backing: str) -> dict[str, Any]:
        """The settings of another index like `backing`."""
        settings = indices.read_settings(self.transport, backing)
        # Work that goes on, or was not ended, has its own values; the right ones are remembered.
        settings.update(indices.undone(self.state()))
        settings.pop("index.blocks.write", None)
        return {name: value for name, value in settings.items() if value is not None}
