"""Documents as Qdrant's points and back, for the store and its asynchronous twin."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vdr_db.connectors.base import BatchLimits, EmptyRows, Hit, Id, Payload, Record, Written
from vdr_db.connectors.ids import checked_ids, id_order
from vdr_db.connectors.qdrant.edge_sums import SUM_FIELD
from vdr_db.connectors.qdrant.engine import (
    ID_FIELD,
    Batch,
    DenseVector,
    Found,
    Manifest,
    PointId,
    Stored,
)
from vdr_db.connectors.qdrant.existing import point_of
from vdr_db.connectors.validation import PASSAGE_FIELDS, RESERVED_PREFIX, Prepared, prepare
from vdr_db.counts import counted
from vdr_db.errors import ConfigError, InputError, ShapeError, StoreError
from vdr_db.sparse import SparseRows

__all__ = [
    "Upload",
    "checked_fusion",
    "checked_nearest",
    "hits_of",
    "id_of",
    "point_of_text",
    "record_of",
    "shown",
]

_BYTES_OF_FLOAT = 4


class Upload:
    """One call of `upsert`, checked: what goes to the engine and what is refused before.

    Attributes:
        refused: Id → reason; the engine's own refusals are added by the caller.
        written: What was done when all batches are through and nothing was refused.
    """

    def __init__(
        self,
        rows: SparseRows,
        ids: Sequence[Id],
        payloads: Sequence[Mapping[str, Any] | None] | None,
        dense: Mapping[str, Any] | None,
        *,
        made: Manifest,
        limits: BatchLimits,
        empty: EmptyRows,
        where: str,
    ) -> None:
        ready = prepare(
            rows, ids, payloads, width=made.width, empty=empty, limits=limits, where=where
        )
        self.refused: dict[Id, str] = dict(ready.refused)
        if made.datatype == "float16":
            ready = self._without(ready, _too_large(ready))
        columns = _checked_columns(dense, made.dense, len(rows), where)
        self._dense: dict[str, npt.NDArray[np.float32]] = {}
        if columns:
            ready = self._with_dense(ready, checked_ids(ids), columns)
        self._ready = ready
        self._limits = limits
        self._made = made
        self.written = Written(len(ready.ids), ready.empty, ready.skipped)

    def batches(self) -> Iterator[Batch]:
        """The documents in requests within the limits."""
        ready = self._ready
        for part in ready.batches(self._limits):
            ids = ready.ids[part]
            yield Batch(
                ids=ids,
                points=[point_of(self._made, id) for id in ids],
                rows=ready.rows[part],
                payloads=[
                    # Beyond 64 bits with a sign a payload holds no integer; the point is the id.
                    {**payload}
                    if isinstance(id, int) and id >= 2**63
                    else {ID_FIELD: id, **payload}
                    for id, payload in zip(ids, ready.payloads[part], strict=True)
                ],
                dense={name: column[part] for name, column in self._dense.items()},
                size=int(ready.sizes[part].sum()),
            )

    def _with_dense(
        self, ready: Prepared, ids: Sequence[Id], columns: Mapping[str, npt.NDArray[np.float32]]
    ) -> Prepared:
        """Dense vectors in the order of the kept rows; rows with impossible numbers are refused."""
        place = {id: i for i, id in enumerate(ids)}
        for name, column in columns.items():
            for i in np.flatnonzero(~np.isfinite(column).all(axis=1)).tolist():
                self.refused.setdefault(ids[i], f"the dense vector {name!r} is not finite")
        ready = self._without(ready, {})
        taken = np.array([place[id] for id in ready.ids], np.int64)
        self._dense = {name: column[taken] for name, column in columns.items()}
        more = _BYTES_OF_FLOAT * sum(column.shape[1] for column in columns.values())
        return replace(ready, sizes=ready.sizes + more)

    def _without(self, ready: Prepared, refused: Mapping[Id, str]) -> Prepared:
        """What is left when these rows are refused, and those that are refused already."""
        self.refused.update(refused)
        keep = [i for i, id in enumerate(ready.ids) if id not in self.refused]
        if len(keep) == len(ready.ids):
            return ready
        rows = ready.rows[np.array(keep, np.int64)]
        return replace(
            ready,
            rows=rows,
            ids=[ready.ids[i] for i in keep],
            payloads=[ready.payloads[i] for i in keep],
            sizes=ready.sizes[keep],
            empty=int(np.count_nonzero(rows.counts == 0)),
        )


def _too_large(ready: Prepared) -> dict[Id, str]:
    """Rows with weights that float16 does not hold."""
    most = float(np.finfo(np.float16).max)
    rows = np.repeat(np.arange(len(ready.rows)), ready.rows.counts)
    return {
        ready.ids[i]: f"a weight is above {most:,.0f}, the largest number of float16"
        for i in np.unique(rows[ready.rows.values > most]).tolist()
    }


def _checked_columns(
    dense: Mapping[str, Any] | None, known: Mapping[str, DenseVector], count: int, where: str
) -> dict[str, npt.NDArray[np.float32]]:
    columns = {}
    for name, given in (dense or {}).items():
        size = _known(known, name, where).size
        column = np.asarray(given, np.float32)
        if column.shape != (count, size):
            raise ShapeError(
                f"the dense vectors {name!r} must have the shape [{count}, {size}] (documents, "
                f"size), got {list(column.shape)}; encode each document once."
            )
        columns[name] = column
    return columns


def checked_nearest(
    vector: Any, using: str | None, known: Mapping[str, DenseVector], where: str
) -> tuple[str, npt.NDArray[np.float32]]:
    """Name and numbers of a dense query, `[size]` float32."""
    if using is None:
        if len(known) != 1:
            raise ConfigError(
                f"{where} has the dense vectors {sorted(known) or 'nothing'}; "
                + ("name one with `using`." if known else "make it with dense={name: size}.")
            )
        using = next(iter(known))
    size = _known(known, using, where).size
    numbers = np.asarray(vector, np.float32)
    if numbers.shape == (1, size):
        numbers = numbers[0]
    if numbers.shape != (size,):
        raise ShapeError(
            f"a query for the dense vector {using!r} must have the shape [{size}], got "
            f"{list(numbers.shape)}; pass one vector of the model that made the documents'."
        )
    if not np.isfinite(numbers).all():
        raise InputError("a dense query must have finite numbers; check the model that made it.")
    return using, numbers


def checked_fusion(depth: int, rank_constant: int | None) -> tuple[int, int | None]:
    """Both as `int`; numbers that no fusion can use are a `ConfigError`."""
    if rank_constant is not None:
        rank_constant = counted("rank_constant", rank_constant)
    return counted("depth", depth), rank_constant


def _known(known: Mapping[str, DenseVector], name: str, where: str) -> DenseVector:
    if name not in known:
        raise ConfigError(
            f"{where} has no dense vector {name!r}, it has {sorted(known) or 'none'}; make the "
            "collection with dense={name: size}."
        )
    return known[name]


def hits_of(found: Sequence[Found]) -> list[Hit]:
    """What a search shows of its points: the best first, equal scores by ascending id."""
    hits = [Hit(id_of(one), one.score, shown(one.payload)) for one in found]
    return sorted(hits, key=lambda hit: (-hit.score, *id_order(hit.id)))


def record_of(stored: Stored, width: int | None) -> Record:
    """A document that was read back; without a width, without its row."""
    row = None
    if width is not None:
        indices = np.asarray(stored.indices if stored.indices is not None else [], np.int64)
        values = np.asarray(stored.values if stored.values is not None else [], np.float32)
        order = np.argsort(indices)
        try:
            row = SparseRows([0, indices.size], indices[order], values[order], width)
        except ValueError as error:
            raise StoreError(
                f"the stored vector of the document {id_of(stored)!r} is none: {error} Its row is "
                "damaged, see `vdr-db check`; write the document again."
            ) from error
    own = (ID_FIELD, SUM_FIELD)
    payload = {name: value for name, value in stored.payload.items() if name not in own}
    return Record(id_of(stored), payload, row)


def id_of(one: Found | Stored) -> Id:
    """The caller's id of a point; the point itself in a collection that others made."""
    id: Id = one.payload.get(ID_FIELD, one.point)
    return id


def point_of_text(text: str) -> PointId:
    """The point that a page token names; others are a `ValueError`."""
    return int(text) if text.isdecimal() else str(uuid.UUID(text))


def shown(payload: Payload) -> Payload:
    """The payload without the fields of the library, but for what a passage tells of itself."""
    return {
        name: v
        for name, v in payload.items()
        if not name.startswith(RESERVED_PREFIX) or name in PASSAGE_FIELDS
    }
