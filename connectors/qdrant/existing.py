"""What a collection on a server is: read from what we wrote about it, or from what it shows."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from vdr_db.connectors.base import Documents, Id
from vdr_db.connectors.ids import point_id
from vdr_db.connectors.qdrant.engine import DATATYPES, DenseVector, Distance, Manifest, PointId
from vdr_db.errors import ConfigError, StoreMismatch

__all__ = ["Existing", "check_width_of", "point_of", "read_manifest"]


@dataclass(frozen=True)
class Existing:
    """How to open a collection that is there already, perhaps made by others.

    Attributes:
        adopt: Take one that has no description by this library.
        width: Vocabulary size, for one that is adopted.
        documents: What its document side is, when it is adopted.
    """

    adopt: bool = False
    width: int | None = None
    documents: Documents = "encoded"


def read_manifest(
    about: Any, data: Any, name: str, where: str, *, vector: str | None, existing: Existing | None
) -> Manifest:
    """What a collection is: by `data`, what we wrote about it, or by what `about` shows of it."""
    sparse = about.config.params.sparse_vectors or {}
    dense = _dense_vectors(about.config.params.vectors)
    if data is not None or existing is None:
        manifest = Manifest.from_dict(data, where)
        if vector in (None, manifest.vector):
            if manifest.vector not in sparse:
                raise StoreMismatch(
                    f"{where} has no sparse vector {manifest.vector!r} any more; build it again."
                )
            _check_modifier(sparse[manifest.vector], where)
            return replace(manifest, dense=dense)
        if existing is None:  # what we wrote is about another vector
            raise StoreMismatch(
                f"{where} has the sparse vector {manifest.vector!r}, not {vector!r}; leave "
                "`vector_name` out, or open another sparse vector with `from_existing`."
            )
    chosen = _chosen(sparse, vector, where)
    _check_modifier(sparse[chosen], where)
    if not existing.adopt:
        raise StoreMismatch(
            f"{where} does not tell which model made the sparse vector {chosen!r}: it was not made "
            "by this library; if your encoder is that model, pass adopt=True with it (or with "
            "width=... for rows only)."
        )
    if existing.width is None:
        raise ConfigError(
            f"to adopt {where}, the vocabulary size is needed; pass the encoder, or width=...."
        )
    index = sparse[chosen].index
    datatype = getattr(getattr(index, "datatype", None), "value", None)
    threshold = getattr(index, "full_scan_threshold", None)
    return Manifest(
        collection=name,
        width=existing.width,
        documents=existing.documents,
        datatype=datatype if datatype in DATATYPES else "float32",
        full_scan_threshold=500 if threshold is None else threshold,
        dense=dense,
        vector=chosen,
        foreign_points=True,
    )


def check_width_of(largest: int | None, width: int, where: str) -> None:
    """Refuses to adopt vectors whose largest token id, `None` without any, the vocabulary lacks."""
    if largest is not None and largest >= width:
        raise StoreMismatch(
            f"{where} has vectors with the index {largest}, the vocabulary has {width} tokens; "
            "open it with the model that made its vectors."
        )


def point_of(made: Manifest, id: Id) -> PointId:
    """The point of an id.

    In a collection that was adopted every UUID is a point of its own, whatever its version.
    """
    if made.foreign_points and isinstance(id, str):
        try:
            return str(uuid.UUID(id))
        except ValueError:
            pass
    return point_id(id)


def _dense_vectors(vectors: Any) -> dict[str, DenseVector]:
    """Named dense vectors, and `""` for one without a name; several-row vectors are left out."""
    named = vectors if isinstance(vectors, Mapping) else {"": vectors} if vectors else {}
    known: dict[str, Distance] = {one: one for one in get_args(Distance)}
    return {
        name: DenseVector(int(one.size), known[one.distance.value.lower()])
        for name, one in named.items()
        if one.multivector_config is None and one.distance.value.lower() in known
    }


def _chosen(sparse: Mapping[str, Any], vector: str | None, where: str) -> str:
    told = ", ".join(map(repr, sorted(sparse))) or "none"
    if vector is not None:
        if vector not in sparse:
            raise StoreMismatch(
                f"{where} has no sparse vector {vector!r}, its sparse vectors are: {told}; pass "
                "one of them as `vector_name`."
            )
        return vector
    if len(sparse) != 1:
        raise StoreMismatch(
            f"{where} must have one sparse vector to be opened without `vector_name`, its sparse "
            f"vectors are: {told}; name one, or choose another collection."
        )
    return next(iter(sparse))


def _check_modifier(params: Any, where: str) -> None:
    modifier = getattr(params.modifier, "value", params.modifier)
    if modifier not in (None, "none"):
        raise StoreMismatch(
            f"{where} multiplies weights by {modifier}, which changes what the "
            "model learned; build a collection without a modifier."
        )
