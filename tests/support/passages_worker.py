"""An ingest of passages in a process of its own, which kills itself at the n-th request it makes.

Run as `python passages_worker.py JSON`: `place` as in `ingest_worker`, `file`, `ledger`, and
`kill`, the number of the request (a write or a removal) and whether it is `before` or `after`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from typing import Any

from hashing_encoder import HashingEncoder
from ingest_worker import make_store

from vdr_db.connectors.base import BatchLimits
from vdr_db.connectors.passages import Passages
from vdr_db.connectors.qdrant.store import QdrantStore
from vdr_db.ingest import FileSource, IngestOptions, ingest
from vdr_db.text.passages import passage_spans

CUT = Passages(8, 2)


class CuttingEncoder(HashingEncoder):
    """Rows of a hash of each passage, whose tokens are words."""

    def cut_passages(
        self, texts: list[str], *, tokens: int, overlap: int
    ) -> list[list[tuple[int, int]]]:
        words = [[found.span() for found in re.finditer(r"\w+", text)] for text in texts]
        return [
            passage_spans(text, own, tokens=tokens, overlap=overlap)
            for text, own in zip(texts, words, strict=True)
        ]


def run(job: dict[str, Any]) -> Any:
    """Ingests and returns the report, unless it is killed."""
    store = make_store(job["place"])
    kill = tuple(job.get("kill", ()))
    requests = 0

    def counted(method: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal requests
            requests += 1
            if kill == (requests, "before"):
                os.kill(os.getpid(), signal.SIGKILL)
            found = method(*arguments, **options)
            if kill == (requests, "after"):
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return call

    # Requests of few rows, so that a document is written by several of them.
    limits = BatchLimits(rows=2, bytes=1 << 20, row_bytes=1 << 20)
    if isinstance(store, QdrantStore):
        store._engine.limits = limits
        store._engine.upsert = counted(store._engine.upsert)
        store._engine.delete = counted(store._engine.delete)
    else:
        store.limits = limits
        store._writer.write = counted(store._writer.write)
    options = IngestOptions(passages=CUT, skip="unchanged", writers=1)
    encoder = CuttingEncoder(nonzeros=4)
    source = FileSource([job["file"]])
    with store:
        return ingest(source, store, encoder=encoder, options=options, ledger=job["ledger"])


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
