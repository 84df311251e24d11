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


def write(
    batches: Iterable[Batch],
    upsert: Callable[..., Written],
    empty: EmptyRows,
    *,
    total: int | None = None,
    unit: str = "text",
) -> list[Id]:
    """Writes all batches through `upsert` of a store; the ids of what is there then, in order.

    On a terminal, what takes longer than a second shows a progress bar on stderr.

    Args:
        batches: Each made when it is asked for.
        upsert: Of a store.
        empty: What to do with rows without weights.
        total: How many items there are, if known.
        unit: What an item is.

    Raises:
        RejectedRows: Some could not be stored; all others are written.
        CancelledError: `STOP` was set meanwhile.
    """
    from tqdm import tqdm

    stop = STOP.get()
    written: list[Id] = []
    refused: dict[Id, str] = {}
    bar = tqdm(total=total, unit=unit, desc="add", disable=None, delay=1, leave=False)
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
        bar.update(len(batch.ids))
        if stop is not None and stop.is_set():
            raise CancelledError
    bar.close()
    if refused:
        raise RejectedRows(list(refused), list(refused.values()))
    return written
