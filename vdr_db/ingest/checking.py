"""`check`: whether a store or a spool still holds what was put in, as far as that can be told."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from vdr_db.connectors.base import Store
from vdr_db.connectors.documents import documents_of
from vdr_db.connectors.qdrant.edge_folder import CollectionFolder
from vdr_db.connectors.qdrant.edge_sums import Sums
from vdr_db.connectors.store import BaseStore
from vdr_db.errors import InputError, StoreError
from vdr_db.ingest.ledger import Ledger, Ranges, Sampled
from vdr_db.ingest.source import Window
from vdr_db.ingest.spool_source import SpoolSource
from vdr_db.ingest.verify import verify

__all__ = ["CheckReport", "check_files", "check_spool", "check_store", "is_spool"]

_SAMPLE = 64
_NAMED = 5


@dataclass
class CheckReport:
    """What a check found.

    Attributes:
        problems: A sentence for each; empty when all is well.
        remarks: What is worth knowing and no fault.
        rows: Documents there are.
        checked: Documents whose checksums were compared; of a server, those read back.
        leftovers: Collections or indices that nothing needs -> why.
        removed: Those of them that were deleted, because that was asked for.
    """

    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    rows: int = 0
    checked: int = 0
    leftovers: dict[str, str] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)


def is_spool(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a finished slice of a spool."""
    return any(Path(folder).glob("manifest-*.json"))


def check_files(folder: str | os.PathLike[str], report: CheckReport) -> int | None:
    """Compares the files of an embedded collection with what they were when it was closed.

    An engine that opens damaged files may take the process down with it, so this comes first.

    Args:
        folder: Of the collection, which nobody may have open.
        report: Gets what is wrong.

    Returns:
        Documents there were at the end of the last use; `None` where it was not closed.

    Raises:
        StoreUnavailable: Another process has it open.
    """
    place = CollectionFolder(Path(folder), f"the collection in {folder}")
    if not place.holds_shard():
        return None
    place.take()
    try:
        sums = Sums(place.shard)
        damaged = sums.damaged()
        if damaged is None:
            report.remarks.append(
                "it was not closed after its last use, so its files cannot be compared"
            )
        else:
            report.problems.extend(f"the file {place.shard.name}/{one}" for one in damaged)
        return sums.count
    finally:
        place.release()


def check_store(
    store: Store,
    report: CheckReport,
    *,
    expected: int | None = None,
    ledger: str | os.PathLike[str] | None = None,
    remove_leftovers: bool = False,
) -> None:
    """Reads a collection: all rows with their sums where it is embedded, a sample on a server.

    A server keeps no sums of ours: only a ledger knows what was written there.

    Args:
        store: That is made.
        report: Gets what is found.
        expected: Documents there must be, where that is known.
        ledger: Of the ingest that wrote it, to compare with.
        remove_leftovers: Deletes what killed rebuilds left behind.

    Raises:
        StoreError: It cannot be read.
        ConfigError: The ledger is none, or in use.
    """
    rows, report.rows = store.count(), documents_of(store).count()
    if expected is not None and rows != expected:
        what = "documents" if store.passages is None else "passages"
        report.problems.append(f"{expected} {what} were acknowledged, {rows} are there")
    read = getattr(store, "damage", None)
    damage = None if read is None else read()
    if damage is not None:
        report.checked = damage.rows - damage.without
        if damage.damaged:
            named = ", ".join(map(str, damage.damaged[:_NAMED]))
            report.problems.append(
                f"{len(damage.damaged)} rows are not what was written (points {named})"
            )
        if damage.without:
            report.remarks.append(f"{damage.without} rows are from before checksums")
        if damage.lost:
            report.problems.append(damage.lost)
    least, sample = 0, _sample(store)
    if ledger is not None:
        least, sample = Ledger.acknowledged(ledger, str(getattr(store, "name", None)))
        if not sample:
            report.remarks.append(f"the ledger {os.fspath(ledger)} knows nothing of it")
    found = verify(
        store if ledger is None else documents_of(store),
        sample,
        least_count=least,
        width=store.width or 1,
        call=lambda function, _: function(),
    )
    report.problems.extend(found.problems)
    report.checked = report.checked or found.read_back
    any_store: object = store
    if isinstance(any_store, BaseStore):
        left = report.leftovers = any_store.leftovers()
        report.removed = any_store.remove_leftovers() if remove_leftovers and left else []


def check_spool(folder: str | os.PathLike[str]) -> CheckReport:
    """Compares every part of a spool with the digest in its manifest, and reads its rows.

    Args:
        folder: The spool.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    report = CheckReport()
    try:
        source = SpoolSource(folder)
        for block in source.blocks(Ranges(), Window()):
            report.rows += len(block.records)
    except InputError as error:
        report.problems.append(str(error))
    report.checked = report.rows
    return report


def _sample(store: Store) -> Sequence[Sampled]:
    ids = list(islice(store.ids(), _SAMPLE))
    found = []
    for record in store.get(ids, with_rows=True):
        if record.row is not None:
            indices, weights = record.row.row(0)
            found.append(Sampled(record.id, indices, weights))
    if len(ids) and not store.get(ids[:1]):
        raise StoreError("a document that was listed cannot be read; run the check in quiet.")
    return found
