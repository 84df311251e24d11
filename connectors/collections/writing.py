"""Batches on their way into a store."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError
from contextvars import ContextVar

from vdr_db.connectors.base import EmptyRows, Id, Written
from vdr_db.connectors.feed import Batch
from vdr_db.errors import RejectedRows

__all__ = ["STOP", "write"]

STOP: ContextVar[threading.Event | None] = ContextVar("vdr_db_stop", default=None)
"""An event that ends what is written in this context, after the batch at hand."""


def write(batches: Iterable[Batch], upsert: Callable[..., Written], empty: EmptyRows) -> list[Id]:
    """Writes all batches through `upsert` of a store; the ids of what is there then, in order.

    Raises:
        RejectedRows: Some could not be stored; all others are written.
        CancelledError: `STOP` was set meanwhile.
    """
    stop = STOP.get()
    written: list[Id] = []
    refused: dict[Id, str] = {}
    for batch in batches:
        refused.update(batch.refused)
        skipped: set[Id] = set()
        if batch.rows is not None:
            try:
                report = upsert(batch.rows, batch.fresh, batch.payloads, empty=empty)
                skipped.update(report.skipped)
            except RejectedRows as rejection:
                refused.update(zip(rejection.ids, rejection.reasons, strict=True))
        written += [id for id in batch.ids if id not in skipped]
        if stop is not None and stop.is_set():
            raise CancelledError
    if refused:
        raise RejectedRows(list(refused), list(refused.values()))
    return written
