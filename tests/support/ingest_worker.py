"""An ingest in a process of its own, made to be killed.

Run as `python ingest_worker.py JSON`. Each acknowledgement of the store is written to standard
output as a line of ids, right after the store returned and before anything else happens.
"""

from __future__ import annotations

import json
import os
import sys
import time
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


def main() -> int:
    job = json.loads(sys.argv[1])
    if "file_limit" in job:  # no file may grow beyond: to SQLite this is a disk that is full
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"],) * 2)
    store = make_store(job["place"])
    write = store.upsert

    def upsert(rows: Any, ids: Any, payloads: Any = None, **more: Any) -> Any:
        written = write(rows, ids, payloads, **more)
        os.write(1, (json.dumps(list(ids)) + "\n").encode())
        time.sleep(job.get("pause_s", 0))
        return written

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
    os.write(1, (json.dumps({"report": report.to_dict()}) + "\n").encode())
    return 130 if report.is_interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
