"""An ingest that fills a new collection or index and puts it in the place of the old one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol

from vdr_db.connectors.base import Store
from vdr_db.connectors.encoder import Encoder, Target
from vdr_db.errors import ConfigError, StoreError
from vdr_db.ingest.ledger import Ledger
from vdr_db.ingest.options import IngestOptions
from vdr_db.ingest.pipeline import as_source, ingest
from vdr_db.ingest.progress import Progress, ProgressKind
from vdr_db.ingest.report import IngestReport
from vdr_db.ingest.source import Source
from vdr_db.ingest.stop import Stop
from vdr_db.readers import Record

__all__ = ["Versioned", "VersionedStore", "ingest_versioned"]


class VersionedStore(Store, Protocol):
    """A store whose name can go over to a new backing collection or index."""

    @property
    def name(self) -> str:
        """Of the backing collection or index."""

    def is_unfinished(self, name: str, /) -> bool:
        """Whether a backing collection or index is of a `rebuild` that never ended."""

    def drop_unfinished(self, name: str, /) -> None:
        """Deletes it."""


class Versioned(Protocol):
    """A collection over such a store: `VDRQdrant` on a server, and `VDRElasticsearch`."""

    @property
    def store(self) -> VersionedStore:
        """Where documents go."""

    def rebuild(
        self,
        encoder: Encoder | None = None,
        *,
        keep_old: bool = False,
        into: str | None = None,
        keep_unfinished: bool = False,
    ) -> AbstractContextManager[Versioned]:
        """Fills a new backing collection or index inside the block."""


class _Failed(StoreError):
    pass


class _Interrupted(Exception):
    def __init__(self, report: IngestReport) -> None:
        super().__init__("stopped on request")
        self.report = report


def ingest_versioned(
    source: Source | Sequence[str | os.PathLike[str]] | Iterable[Record],
    collection: Versioned,
    *,
    encoder: Encoder | None = None,
    options: IngestOptions | None = None,
    ledger: str | os.PathLike[str] | None = None,
    quarantine: str | os.PathLike[str] | None = None,
    progress: Progress | ProgressKind = "none",
    stop: Stop | None = None,
    keep_old: bool = False,
) -> IngestReport:
    """Ingests a whole input beside what is searched now; the name moves to it at the end.

    Searches see the old documents until everything is written and checked, and from then on the new
    ones, which the name goes over to in one request. With a ledger, a run that is stopped, killed
    or fails is taken up by the next one with the same input, in the collection or index that it
    began; without, it leaves nothing behind but the old documents, and after a kill a half-filled
    collection under a name with a number. With a collection that is not there yet, this is an
    `ingest`.

    Args:
        source: As in `ingest`.
        collection: A `VDRQdrant` on a server, made with `versioned=True`, or a `VDRElasticsearch`.
        encoder: What turns texts into rows; `None` takes the collection's. With another one than
            now, the name changes its model.
        options: How to run; checks at the end belong to it.
        ledger: File that remembers what is settled in the new version; needed to resume.
        quarantine: As in `ingest`.
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
    origin = as_source(source)

    def run(target: Target, options: IngestOptions) -> IngestReport:
        return ingest(
            origin,
            target,
            encoder=encoder,
            options=options,
            ledger=ledger,
            quarantine=quarantine,
            progress=progress,
            stop=stop,
        )

    store = collection.store
    last = None
    if ledger is not None and origin.description is not None:
        last = Ledger.last_of(ledger, origin.description)
    goes_on = last is not None and last.is_same and not options.restart
    if store.width is None:
        return run(collection, options)
    if last is not None and goes_on and last.store == store.name and not last.is_complete:
        return run(collection, options)  # the very first fill was cut short
    into = None
    if last is not None and store.is_unfinished(last.store):
        into = last.store if goes_on else None
        # A version that was finished may be an old one that `keep_old` asked for.
        if into is None and not last.is_complete:
            store.drop_unfinished(last.store)
    options = options if into is not None else replace(options, restart=True)
    try:
        with collection.rebuild(
            encoder, keep_old=keep_old, into=into, keep_unfinished=ledger is not None
        ) as fresh:
            name = fresh.store.name
            report = run(fresh, options)
            if report.is_interrupted:
                raise _Interrupted(report)
            checks = report.verification
            if checks is None or not checks.is_passed:
                told = "; ".join(() if checks is None else checks.problems)
                raise _Failed(
                    f"the new version did not pass its checks, so nothing is changed: {told}."
                )
    except _Interrupted as stopped:
        return stopped.report
    except _Failed as error:
        if ledger is not None:
            store.drop_unfinished(name)
        raise StoreError(str(error)) from error
    return report
