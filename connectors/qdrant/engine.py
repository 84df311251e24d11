"""What `QdrantStore` asks of an engine: the embedded one and a server answer alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from vdr_db.connectors.base import BatchLimits, Documents, Id, Payload
from vdr_db.connectors.halving import RefusedBatch
from vdr_db.connectors.passages import Passages
from vdr_db.connectors.qdrant.filters import INDEX_KINDS, json_path
from vdr_db.connectors.store import About
from vdr_db.connectors.validation import RESERVED_PREFIX
from vdr_db.errors import ConfigError, StoreMismatch
from vdr_db.filters import Key
from vdr_db.sparse import SparseRows
from vdr_db.stamp import EncoderStamp

__all__ = [
    "ID_FIELD",
    "VECTOR_NAME",
    "Batch",
    "Datatype",
    "DenseRows",
    "DenseVector",
    "Distance",
    "Engine",
    "Found",
    "HybridQuery",
    "IndexKind",
    "Manifest",
    "PointId",
    "RefusedBatch",
    "Stored",
    "checked_dense",
    "checked_indexes",
]

VECTOR_NAME = "vdr"
"""Name of the sparse vector unless the caller has another one."""

ID_FIELD = RESERVED_PREFIX + "id"
"""Payload field of the caller's id: a string id cannot be read off its point."""

PointId: TypeAlias = int | str
"""Unsigned 64-bit integer, or the text of a UUID."""

Datatype: TypeAlias = Literal["float32", "float16", "uint8"]
"""How the index keeps weights; what is read back stays float32."""

IndexKind: TypeAlias = Literal["keyword", "integer", "float", "bool", "datetime", "uuid", "tenant"]
"""Kind of a payload index; `"tenant"` is a keyword that nearly every search filters by."""

Distance: TypeAlias = Literal["cosine", "dot", "euclid", "manhattan"]
"""How dense vectors are compared."""

DenseRows: TypeAlias = Mapping[str, npt.NDArray[np.float32]]
"""Name of a dense vector → `[N, size]`, one row for each document."""

DATATYPES = ("float32", "float16", "uint8")
DISTANCES = ("cosine", "dot", "euclid", "manhattan")
_FORMAT = 2


@dataclass(frozen=True)
class DenseVector:
    """A dense vector that documents may have beside the sparse one.

    Attributes:
        size: Its dimension.
        distance: How it is compared with a query's.

    Raises:
        ConfigError: There is no such vector.
    """

    size: int
    distance: Distance = "cosine"

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ConfigError(
                f"the size of a dense vector must be an integer of at least 1, got {self.size!r}."
            )
        if self.distance not in DISTANCES:
            raise ConfigError(
                f"the distance of a dense vector must be one of {DISTANCES}, got {self.distance!r}."
            )


@dataclass(frozen=True)
class Manifest:
    """What a collection is, kept beside its data.

    Attributes:
        collection: Name of the collection.
        width: Vocabulary size.
        stamp: The encoder, when known.
        documents: What the document side is.
        datatype: How the index keeps weights.
        full_scan_threshold: With a filter that keeps fewer vectors than this, they are scored one
            by one instead of through the index.
        payload_indexes: Payload key → kind of index.
        dense: Name → dense vector beside the sparse one.
        vector: Name of the sparse vector.
        foreign_points: Whether others chose the points, so that every UUID is one.
        passages: How documents are cut; `None` where each point is a document.
    """

    collection: str
    width: int
    stamp: EncoderStamp | None = None
    documents: Documents = "encoded"
    datatype: Datatype = "float32"
    full_scan_threshold: int = 500
    payload_indexes: Mapping[str, IndexKind] = field(default_factory=dict)
    dense: Mapping[str, DenseVector] = field(default_factory=dict)
    vector: str = VECTOR_NAME
    foreign_points: bool = False
    passages: Passages | None = None

    @property
    def about(self) -> About:
        """Width, encoder and kind of documents."""
        return self.width, self.stamp, self.documents

    def to_dict(self) -> dict[str, Any]:
        """The manifest as JSON types."""
        # Versions that know no passages would take each for a document.
        data = {"format": 1 if self.passages is None else _FORMAT, **asdict(self)}
        data["stamp"] = None if self.stamp is None else self.stamp.to_dict()
        # What is as usual is left out, so that older versions of this library read the rest.
        usual = {"dense": {}, "vector": VECTOR_NAME, "foreign_points": False, "passages": None}
        return {n: one for n, one in data.items() if n not in usual or usual[n] != one}

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Manifest:
        """The manifest that `to_dict` wrote.

        Raises:
            StoreMismatch: It is damaged, or of a newer version of this library.
        """
        if isinstance(data, dict) and isinstance(data.get("format"), int):
            if data["format"] > _FORMAT:
                raise StoreMismatch(
                    f"{where} was written in format {data['format']}, this version reads up to "
                    f"{_FORMAT}; install a newer vdr-db."
                )
            try:
                stamp = data["stamp"]
                return cls(
                    collection=str(data["collection"]),
                    width=int(data["width"]),
                    stamp=None if stamp is None else EncoderStamp.from_dict(stamp),
                    documents=data["documents"],
                    datatype=data["datatype"],
                    full_scan_threshold=int(data["full_scan_threshold"]),
                    payload_indexes=dict(data["payload_indexes"]),
                    dense={
                        str(name): DenseVector(**one)
                        for name, one in (data.get("dense") or {}).items()
                    },
                    vector=str(data.get("vector", VECTOR_NAME)),
                    foreign_points=bool(data.get("foreign_points", False)),
                    passages=Passages.from_dict(data.get("passages")),
                )
            except (AttributeError, LookupError, TypeError, ValueError, ConfigError) as error:
                raise StoreMismatch(
                    f"the description of {where} is damaged ({error!r}); restore it from a backup."
                ) from error
        raise StoreMismatch(
            f"{where} is not a collection of this library; choose another one, or open it on a "
            "server with `from_existing`."
        )

    def check_name(self, collection: str, place: str) -> None:
        """Refuses the collection of another name.

        Raises:
            StoreMismatch: The name differs.
        """
        if self.collection != collection:
            raise StoreMismatch(
                f"{place} holds the collection {self.collection!r}, not {collection!r}; "
                "open it by its name, or choose another place."
            )

    def check_options(
        self,
        where: str,
        datatype: Datatype | None,
        indexes: Mapping[str, IndexKind],
        dense: Mapping[str, DenseVector],
    ) -> None:
        """Refuses options that the collection was not made with.

        Raises:
            StoreMismatch: Precision, a payload index or a dense vector differs.
        """
        kinds = {k: kind for k, kind in indexes.items() if self.payload_indexes.get(k) != kind}
        others = {name: one for name, one in dense.items() if self.dense.get(name) != one}
        told = ""
        if datatype not in (None, self.datatype):
            told = f"keeps weights as {self.datatype}, not as {datatype}"
        elif kinds:
            told = f"has the payload indexes {dict(self.payload_indexes)}, not {kinds}"
        elif others:
            told = f"has the dense vectors {dict(self.dense) or 'nothing'}, not {others}"
        if told:
            raise StoreMismatch(f"{where} {told}; build another collection to change that.")


@dataclass(frozen=True)
class Batch:
    """Documents of one request.

    Attributes:
        ids: The caller's ids.
        points: Where they go.
        rows: Their vectors.
        payloads: Their payloads, with the fields of the library.
        dense: Their dense vectors.
        size: Estimated bytes of all that.
    """

    ids: Sequence[Id]
    points: Sequence[PointId]
    rows: SparseRows
    payloads: Sequence[Payload]
    dense: DenseRows
    size: int

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> Batch:
        points = self.points[part]
        return Batch(
            ids=self.ids[part],
            points=points,
            rows=self.rows[part],
            payloads=self.payloads[part],
            dense={name: column[part] for name, column in self.dense.items()},
            size=self.size * len(points) // max(1, len(self.points)),
        )


@dataclass(frozen=True)
class Found:
    """A point a search found."""

    point: PointId
    score: float
    payload: Payload


@dataclass(frozen=True)
class Stored:
    """A point read back; ids and weights when they were asked for."""

    point: PointId
    payload: Payload
    indices: Sequence[int] | None = None
    values: Sequence[float] | None = None

    @classmethod
    def of(cls, record: Any, point: PointId, vector: str | None) -> Stored:
        """What a client read of a point, with the sparse vector of a name or without any."""
        sparse = None if vector is None else (record.vector or {}).get(vector)
        payload = record.payload or {}
        return (
            cls(point, payload)
            if sparse is None
            else cls(point, payload, sparse.indices, sparse.values)
        )


@dataclass(frozen=True)
class HybridQuery:
    """A sparse and a dense query, whose rankings are joined by reciprocal ranks.

    Attributes:
        row: The sparse one, one row, which may be empty.
        using: Name of the dense vector.
        vector: The dense one, `[size]`.
        filter: Conditions on payloads, for both sides.
    """

    row: SparseRows
    using: str
    vector: npt.NDArray[np.float32]
    filter: Any


class Engine(Protocol):
    """One collection in one Qdrant, in terms of points.

    Everything given to an engine is checked already. Engines turn the errors of their package into
    `StoreError` and its children; no message shows a secret.
    """

    limits: BatchLimits

    @property
    def where(self) -> str:
        """The collection and its place, for messages, without secrets."""

    def open(self) -> Manifest | None:
        """Connects; `None` when the collection is not made yet."""

    def create(self, manifest: Manifest) -> None:
        """Makes the collection."""

    def describe(self, manifest: Manifest) -> None:
        """Puts another description in the place of the one that is there."""

    def upsert(self, batch: Batch) -> None:
        """Writes one batch; when it returns, searches see it and a crash does not lose it.

        Raises:
            RefusedBatch: Some of its rows are unacceptable; nothing is written.
        """

    def search(self, rows: SparseRows, limit: int, offset: int, filter: Any) -> list[list[Found]]:
        """The best points of each row, which is not empty."""

    def rankings(self, asked: HybridQuery, limit: int) -> list[list[Found]]:
        """The best points by each side that is not empty, with no more payload than their ids."""

    def retrieve(
        self, points: Sequence[PointId], with_rows: bool, *, with_payload: bool = True
    ) -> list[Stored]:
        """The points that are there, in any order."""

    def index(self, indexes: Mapping[str, IndexKind]) -> None:
        """Makes payload indexes over what is there."""

    def scroll(
        self, after: PointId | None, limit: int, fields: Sequence[str] | None, filter: Any = None
    ) -> tuple[list[Stored], PointId | None]:
        """A page of points from `after` on with these payload fields, and where the next starts.

        All fields without any. The filter, in any of its forms, leaves points out.
        """

    def count(self, filter: Any) -> int:
        """Number of points the filter keeps."""

    def set_payload(self, payload: Payload, points: Sequence[PointId]) -> None:
        """Sets these fields of the payloads of points that are there."""

    def delete(self, points: Sequence[PointId]) -> None:
        """Removes points."""

    def flush(self) -> None:
        """Makes everything written survive a loss of power."""

    def optimize(self) -> None:
        """Reorganises the index."""

    def close(self) -> None:
        """Releases everything."""


def checked_dense(dense: Mapping[str, DenseVector | int] | None) -> dict[str, DenseVector]:
    """The dense vectors a collection is to have; a bare size means cosine.

    Raises:
        ConfigError: A name or a size is impossible.
    """
    checked: dict[str, DenseVector] = {}
    for name, one in (dense or {}).items():
        if not isinstance(name, str) or name in ("", VECTOR_NAME):
            raise ConfigError(
                f"a dense vector needs a name other than {VECTOR_NAME!r}, got {name!r}."
            )
        checked[name] = one if isinstance(one, DenseVector) else DenseVector(one)
    return checked


def checked_indexes(indexes: Mapping[str, IndexKind] | None) -> dict[str, IndexKind]:
    """The payload indexes with their keys as JSON paths.

    Raises:
        ConfigError: A kind is unknown.
        InputError: A key is not one.
    """
    checked: dict[str, IndexKind] = {}
    for key, kind in (indexes or {}).items():
        if kind not in INDEX_KINDS:
            raise ConfigError(
                f"a payload index is one of {', '.join(INDEX_KINDS)}, got {kind!r} for {key!r}."
            )
        checked[json_path(Key.parse(key))] = kind
    return checked
