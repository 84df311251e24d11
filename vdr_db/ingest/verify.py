"""Checks after an ingest: counts, documents read back, documents found by their own vector."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from vdr_db.connectors.base import Store
from vdr_db.ingest.ledger import Sampled
from vdr_db.ingest.report import Verification
from vdr_db.sparse import SparseRows

__all__ = ["missing_ids", "verify"]

Call = Callable[[Callable[[], Any], str], Any]

# Elasticsearch keeps 9 significant bits of a weight (0.4 %), an index of bytes somewhat less.
_STORED_TOLERANCE = 0.005
_SCORE_TOLERANCE = 0.02
_IDS_AT_ONCE = 512
_PROBLEMS_SHOWN = 10


def verify(
    store: Store,
    sample: Sequence[Sampled],
    *,
    least_count: int,
    width: int,
    call: Call,
    refused: Iterable[int | str] = (),
    all_ids: Callable[[], Iterator[int | str]] | None = None,
) -> Verification:
    """Looks whether the store holds what was acknowledged.

    `sample` are documents with the vectors that were written. With fewer than `least_count`
    documents in the store, `all_ids` gives every id of the input anew, to tell records that share
    an id from missing ones; `refused` ids went to the quarantine. `call(function, what)` runs a
    request with retries.
    """
    problems: list[str] = []
    count = int(call(store.count, "counting documents"))
    if count < least_count:
        problems.extend(_count_problems(store, count, least_count, call, set(refused), all_ids))
    read_back = _read_back(store, sample, call, problems)
    searched = _search(store, sample, width, call, problems)
    return Verification(not problems, count, read_back, searched, tuple(problems[:_PROBLEMS_SHOWN]))


def missing_ids(store: Store, ids: Iterable[int | str], call: Call) -> list[int | str]:
    """Those of the ids that the store does not hold, at most 100."""
    missing: list[int | str] = []
    waiting = iter(ids)
    while len(missing) < 100 and (chunk := list(islice(waiting, _IDS_AT_ONCE))):
        chunk = list(dict.fromkeys(chunk))
        found = {record.id for record in call(partial(store.get, chunk), "fetching documents")}
        missing.extend(id for id in chunk if id not in found)
    return missing[:100]


def _count_problems(
    store: Store,
    count: int,
    least_count: int,
    call: Call,
    refused: set[int | str],
    all_ids: Callable[[], Iterator[int | str]] | None,
) -> list[str]:
    if all_ids is None:
        return [
            f"the store counts {count} documents, {least_count} were acknowledged; either records "
            "share an id, or documents were deleted meanwhile (the input cannot be read again)"
        ]
    missing = missing_ids(store, (id for id in all_ids() if id not in refused), call)
    if not missing:
        return []  # every id is there: records of the input share ids
    shown = ", ".join(repr(id) for id in missing[:3])
    return [
        f"{'at least 100' if len(missing) == 100 else len(missing)} ids of the input are not in "
        f"the store ({shown}); run again with a fresh ledger"
    ]


def _read_back(store: Store, sample: Sequence[Sampled], call: Call, problems: list[str]) -> int:
    if not sample:
        return 0
    ids = [one.id for one in sample]
    records = call(partial(store.get, ids, with_rows=True), "reading documents back")
    found = {record.id: record for record in records}
    good = 0
    for one in sample:
        record = found.get(one.id)
        if record is None:
            problems.append(f"document {one.id!r} was acknowledged but is not in the store")
            continue
        if record.row is None:  # a store may keep no vectors to give back
            good += 1
            continue
        indices, weights = record.row.row(0)
        if not np.array_equal(indices, one.indices) or not bool(
            (np.abs(weights - one.weights) <= _STORED_TOLERANCE * one.weights).all()
        ):
            problems.append(f"document {one.id!r} came back with another vector than was written")
            continue
        good += 1
    return good


def _search(
    store: Store, sample: Sequence[Sampled], width: int, call: Call, problems: list[str]
) -> int:
    """Searches with a document's own vector: the best score cannot be below its own square."""
    good = 0
    for one in sample[:8]:
        if not one.indices.size:
            continue
        row = SparseRows([0, one.indices.size], one.indices, one.weights, width)
        own_score = float(np.dot(one.weights.astype(np.float64), one.weights.astype(np.float64)))
        hits = call(partial(store.search, row, limit=10), "searching")
        best = max((hit.score for hit in hits), default=0.0)
        own = next((hit.score for hit in hits if hit.id == one.id), own_score)
        # Another passage of the same document may score higher.
        most = own if store.passages else own_score
        if best < own_score * (1 - _SCORE_TOLERANCE) or (
            not own_score * (1 - _SCORE_TOLERANCE) <= own <= most * (1 + _SCORE_TOLERANCE)
        ):
            problems.append(
                f"a search with the vector of document {one.id!r} should score it {own_score:.6g}, "
                f"the best hit has {best:.6g}: it is not in the index"
            )
            continue
        good += 1
    return good
