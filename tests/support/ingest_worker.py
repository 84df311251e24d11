"""An ingest in a process of its own, made to be killed."""

from __future__ import annotations

import os
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hashing_encoder import HashingEncoder

from vdr_db.connectors.qdrant.store import QdrantStore
from vdr_db.ingest import (
    FileSource,
    ImageFolderSource,
    IngestOptions,
    RetryPolicy,
    Stop,
    ingest,
    stop_on_signals,
)


def make_store(place: dict[str, Any]) -> Any:
    """A store from the keywords in `place`: `path`, `url` with more, or `opensearch` and `name`."""
    if "opensearch" in place:
        from vdr_db.connectors.address import Access
        from vdr_db.connectors.elasticsearch.opensearch import opensearch_client
        from vdr_db.connectors.elasticsearch.store import ElasticsearchStore

        client = opensearch_client([place["opensearch"]], Access())
        store = ElasticsearchStore(place["name"], client=client, replicas=0)
        store._owns_client = True
        return store
    if "url" not in place:
        return QdrantStore("articles", **place)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the client warns of keys without TLS, also on loopback
        return QdrantStore("articles", **place)


def work(job: dict[str, Any], folder: Path, told: Connection) -> None:
    """Ingests; the exit status is that of the command.

    Each acknowledgement of the store is sent as a list of ids, right after the store returned and
    before anything else happens; the report is sent as a dictionary. Complaints go to `worker.err`
    in the folder.
    """
    os.chdir(folder)
    os.dup2(os.open("worker.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    if "file_limit" in job:  # no file may grow beyond: to SQLite this is a disk that is full
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"],) * 2)
    store = make_store(job["place"])
    write = store.upsert

    def upsert(rows: Any, ids: Any, payloads: Any = None, **more: Any) -> Any:
        written = write(rows, ids, payloads, **more)
        with sending:
            told.send(list(ids))
        time.sleep(job.get("pause_s", 0))
        return written

    sending = threading.Lock()
    store.upsert = upsert  # type: ignore[method-assign]
    options = IngestOptions(retry=RetryPolicy(**job.get("retry", {})), **job.get("options", {}))
    with store, stop_on_signals(Stop()) as stop:
        report = ingest(
            ImageFolderSource(job["images"]) if "images" in job else FileSource(job["files"]),
            store,
            encoder=HashingEncoder(**job.get("encoder", {})),
            options=options,
            ledger=job["ledger"],
            stop=stop,
        )
    told.send(report.to_dict())
    sys.exit(130 if report.is_interrupted else 0)
