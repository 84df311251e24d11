"""An ingest that fills a new collection or index and puts it in the place of the old one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from vdr_db.errors import ConfigError, StoreError
from vdr_db.ingest.options import IngestOptions
from vdr_db.ingest.pipeline import ingest
from vdr_db.ingest.progress import Progress, ProgressKind
from vdr_db.ingest.report import IngestReport
from vdr_db.ingest.source import Source
from vdr_db.ingest.stop import Stop
from vdr_db.readers import Record

__all__ = ["ingest_versioned"]


class _Interrupted(Exception):
    def __init__(self, report: IngestReport) -> None:
        super().__init__("stopped on request")
        self.report = report


def ingest_versioned(
    source: Source | Sequence[str | os.PathLike[str]] | Iterable[Record],
    collection: Any,
    *,
    encoder: Any = None,
    options: IngestOptions | None = None,
    quarantine: str | os.PathLike[str] | None = None,
    progress: Progress | ProgressKind = "none",
    stop: Stop | None = None,
    keep_old: bool = False,
) -> IngestReport:
    """Ingests a whole input beside what is searched now; the name moves to it at the end.

    Searches see the old documents until everything is written and checked, and from then on the new
    ones, which the name goes over to in one request. A run that is stopped, fails, or whose checks
    fail leaves nothing behind but the old documents, and there is no ledger: the next one begins
    anew. After a kill the half-filled collection stays, under a name with a number, for you to
    delete. With a collection that is not there yet, this is an `ingest`.

    Args:
        source: As in `ingest`.
        collection: A `VDRQdrant` on a server, made with `versioned=True`, or a `VDRElasticsearch`.
        encoder: What turns texts into rows; `None` takes the collection's. With another one than
            now, the name changes its model.
        options: How to run; checks at the end belong to it.
        quarantine: File that takes refused documents.
        progress: Who is told how far it is.
        stop: Lets another thread or a signal handler end the run early.
        keep_old: Leave the old documents, without the name.

    Returns:
        What was done; the name has moved when `is_complete`.

    Raises:
        ConfigError: The collection has no versions, or the checks are turned off.
        StoreError: The checks failed, the name is no alias, or someone else moved it meanwhile.

    And what `ingest` raises.
    """
    options = options or IngestOptions()
    if not options.is_verified:
        raise ConfigError("a new version takes the old one's place only checked: keep is_verified.")
    if not hasattr(collection, "rebuild"):
        raise ConfigError(
            "`collection` must be a VDRQdrant or VDRElasticsearch, got "
            f"{type(collection).__name__}; other stores have no versions."
        )

    def run(target: Any) -> IngestReport:
        return ingest(
            source,
            target,
            encoder=encoder,
            options=options,
            quarantine=quarantine,
            progress=progress,
            stop=stop,
        )

    if collection.store.width is None:
        return run(collection)
    try:
        with collection.rebuild(encoder, keep_old=keep_old) as fresh:
            report = run(fresh)
            if report.is_interrupted:
                raise _Interrupted(report)
            checks = report.verification
            if checks is None or not checks.is_passed:
                told = "; ".join(() if checks is None else checks.problems)
                raise StoreError(
                    f"the new version did not pass its checks, so nothing is changed: {told}."
                )
    except _Interrupted as stopped:
        return stopped.report
    return report
