"""The embedded engine works in the thread that calls it."""

from __future__ import annotations

import time

import numpy as np
import pytest

from vdr_db.connectors import QdrantStore
from vdr_db.sparse import SparseRows


@pytest.mark.skipif(not hasattr(time, "thread_time"), reason="no clock of a single thread here")
@pytest.mark.parametrize("reopened", [False, True])
def test_a_search_is_done_by_the_thread_that_asks(tmp_path, reopened):
    n, k, width = 3000, 64, 400
    random = np.random.default_rng(0)
    ids = np.argsort(random.random((n, width)), axis=1)[:, :k]
    weights = random.random(n * k, np.float32) + 0.1
    documents = SparseRows(np.arange(n + 1) * k, np.sort(ids, axis=1).ravel(), weights, width)
    store = QdrantStore("documents", path=tmp_path / "documents")
    store.create(width)
    store.upsert(documents, range(n))
    if reopened:
        store.close()
        store = QdrantStore("documents", path=tmp_path / "documents")
    store.search(documents[0], 10)
    own, all_threads = time.thread_time(), time.process_time()
    for i in range(100):
        store.search(documents[i], 10)
    own, all_threads = time.thread_time() - own, time.process_time() - all_threads
    store.close()
    assert own > 0.8 * all_threads  # with a pool, two thirds
