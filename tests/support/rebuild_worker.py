"""Rebuilds and rollovers in a process of their own, made to be killed."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from typing import Any

from ingest_worker import make_store
from sparse_samples import zipf_rows

WIDTH, COUNT = 200, 200
ROWS = zipf_rows(COUNT, 10, WIDTH, seed=3)


def replace_once(store: Any, kind: str) -> None:
    """Puts a new collection with the same documents in the place of the old one."""
    if kind == "rollover":
        store.rollover()
        return
    with store.rebuild(expected=COUNT) as fresh:
        fresh.upsert(ROWS, list(range(COUNT)))


def replace_forever(place: dict[str, Any], kind: str, report: Connection) -> None:
    """Goes on until it is killed, and tells when each turn begins."""
    with make_store(place) as store:
        while True:
            report.send(time.monotonic())
            replace_once(store, kind)
