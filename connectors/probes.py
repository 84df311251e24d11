"""Vectors of three texts beside a collection: whether an encoder still makes what it made.

Settings and weights may be equal while vectors are not, by another version of a library or another
graph. So the heaviest weights of three texts are stored with the stamp, for each side and under the
precision they were made in, and compared when a side is first used in that precision.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import numpy as np

from vdr_db.errors import MissingExtraError, StoreMismatch
from vdr_db.sparse import SparseRows
from vdr_db.stamp import EncoderStamp

__all__ = ["PROBES", "ProbedSide", "check_probes", "with_probes"]

ProbedSide: TypeAlias = Literal["document", "query"]

PROBES = (
    "The quick brown fox jumps",
    "in 1905: energy & mass",
    "Café prices, why?",
)
"""Texts that every encoder reads: words, numbers, accents and signs."""

_KEPT = 24
_TOLERANCE = 1e-3
_BFLOAT16 = 5e-2
"""Libraries and processors round to 8 bits after other sums; .016 was the most that was seen."""


def with_probes(encoder: Any, stamp: EncoderStamp | None) -> EncoderStamp | None:
    """The stamp of an encoder of texts with the probes of both of its sides.

    A side that cannot run here, and an encoder that tells no precision, have none.
    """
    precision = _precision(encoder)
    if stamp is None or precision is None:
        return stamp
    probes = {}
    for side in ("document", "query"):
        rows = _encoded(encoder, side)
        if rows is not None:
            probes[f"{side} {precision}"] = json.dumps([_heaviest(row) for row in rows])
    return replace(stamp, probes=probes)


def check_probes(encoder: Any, stored: EncoderStamp | None, side: ProbedSide, where: str) -> None:
    """Compares what a side makes now with what a collection keeps of it, if anything.

    Args:
        encoder: Of texts.
        stored: Stamp of the collection.
        side: That is used.
        where: The collection, for the message.

    Raises:
        StoreMismatch: A weight differs by more than rounding does: 1e-3, in bfloat16 5e-2, of its
            own size where that is above 1.
    """
    kept = None if stored is None else stored.probes.get(f"{side} {_precision(encoder)}")
    if stored is None or kept is None:
        return
    if _length(encoder, side) != stored.settings.get(f"{side}_entry.max_length"):
        return  # texts are cut elsewhere, on purpose
    rows = _encoded(encoder, side)
    if rows is None:
        return
    allowed = _BFLOAT16 if _precision(encoder) == "bfloat16" else _TOLERANCE
    try:
        expected = [(list(map(int, ids)), list(map(float, w))) for ids, w in json.loads(kept)]
    except (ValueError, TypeError) as error:
        raise StoreMismatch(
            f"the stored vectors of {where} are damaged ({error}); restore it from a backup."
        ) from error
    for text, row, one in zip(PROBES, rows, expected, strict=False):
        gap = _gap(row, *one)
        if gap > allowed:
            raise StoreMismatch(
                f"the encoder makes other vectors than those in {where}: a weight of {text!r} "
                f"differs by {gap:.3g}, and at most {allowed:g} is rounding, though model and "
                "settings are the same; use the versions it was made with, or build it again."
            )


def _precision(encoder: Any) -> str | None:
    precision: str | None = getattr(getattr(encoder, "text", encoder), "precision", None)
    return precision


def _length(encoder: Any, side: str) -> str | None:
    entry = getattr(getattr(encoder, "text", encoder), f"{side}_entry", None)
    return None if entry is None else str(entry.max_length)


def _encoded(encoder: Any, side: str) -> SparseRows | None:
    encode = getattr(encoder, "encode_documents" if side == "document" else "encode_queries", None)
    if encode is None:
        return None
    counting = getattr(encoder, "text", encoder)
    before = getattr(counting, "truncated", None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of cuts, which are not the caller's texts
            rows: SparseRows = encode(list(PROBES))
    except MissingExtraError:
        return None
    finally:
        if before is not None:
            counting.truncated = before
    return rows


def _heaviest(row: SparseRows) -> tuple[list[int], list[float]]:
    order = np.argsort(-row.values, kind="stable")[:_KEPT]
    return row.indices[order].tolist(), [float(f"{x:.6g}") for x in row.values[order]]


def _gap(row: SparseRows, ids: Sequence[int], weights: Sequence[float]) -> float:
    """Largest difference; a weight that is not there counts from the smallest that is.

    So weights near the k-th, of which another may be kept, do not count.
    """
    now = dict(zip(row.indices.tolist(), row.values.tolist(), strict=True))
    least = min(now.values(), default=0.0)
    gaps = [
        abs(now[id] - weight) if id in now else weight - least
        for id, weight in zip(ids, weights, strict=True)
    ]
    sizes = [max(1.0, weight) for weight in weights]
    largest = max((gap / size for gap, size in zip(gaps, sizes, strict=True)), default=0.0)
    # Weights that are new among the heaviest.
    floor = min(weights, default=0.0)
    others = [weight for id, weight in now.items() if id not in set(ids)]
    if len(ids) == _KEPT or not ids:
        largest = max([largest, *((w - floor) / max(1.0, floor) for w in others if w > floor)])
    return largest
