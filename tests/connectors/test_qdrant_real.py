"""A real Qdrant, when there is one: see `tests/support/services.py`.

Only this proves that a server of a real version reads our requests as we mean them: the
configuration of sparse and dense vectors, metadata, filters, fusion, and that an alias moves
without a gap while others search.
"""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
import services
from sparse_samples import ranking, zipf_rows

from vdr_db.connectors import AsyncVDRQdrant, QdrantStore

qdrant_client = pytest.importorskip("qdrant_client")
pytestmark = [
    pytest.mark.qdrant,
    pytest.mark.filterwarnings("ignore:Api key is used with an insecure"),
]

WIDTH = 4000
COUNT = 2000


@pytest.fixture(scope="module")
def service():
    with services.running_qdrant() as running:
        yield running


@pytest.fixture(params=["rest", "grpc"])
def options(request, service):
    if request.param == "grpc" and service.grpc_port is None:
        services.skip("no gRPC port is known (VDR_TEST_QDRANT_GRPC_PORT)")
    given = {} if service.grpc_port is None else {"grpc_port": service.grpc_port}
    return {
        "url": service.url,
        "api_key": service.api_key,
        "prefer_grpc": request.param == "grpc",
        "client_options": given,
    }


@pytest.fixture
def store(options):
    made = QdrantStore(
        services.unique_name(),
        versioned=True,
        payload_indexes={"n": "integer", "owner": "tenant"},
        dense={"text": 8},
        **options,
    )
    with made:
        made.create(WIDTH)
        yield made
        made._engine.versions.drop(made._engine.versions.target(made.name))


def check_scores(store, rows, queries):
    oracle = rows.dot(queries)
    for number, hits in enumerate(store.search_batch(queries, 50)):
        expected = ranking(oracle[:, number], 50)
        scores = [hit.score for hit in hits]
        np.testing.assert_allclose(scores, oracle[expected, number], rtol=1e-5)
        np.testing.assert_allclose(scores, oracle[[hit.id for hit in hits], number], rtol=1e-5)


def test_a_real_server_does_what_the_stand_in_does(store, options):
    rows, queries = zipf_rows(COUNT, 128, WIDTH, seed=1), zipf_rows(20, 128, WIDTH, seed=2)
    dense = np.random.default_rng(0).standard_normal((COUNT, 8)).astype(np.float32)
    payloads = [{"n": n, "owner": "ab"[n % 2]} for n in range(COUNT)]
    store.upsert(rows, list(range(COUNT)), payloads, dense={"text": dense})
    check_scores(store, rows, queries)
    assert store.count({"n": {"gte": 10, "lt": 20}, "owner": "a"}) == 5
    assert store.get([5, 9999], with_rows=True)[0].row == rows[5]
    assert len(list(store.ids())) == COUNT
    assert store.search_with_dense(rows[5], dense[5], 3)[0].id == 5
    assert store.search_with_dense(rows[5], dense[5], 3, rank_constant=60)[0].id == 5
    seen, done = set(), threading.Event()

    def watch():
        with QdrantStore(store.name, **options) as other:
            while not done.is_set():
                seen.add(other.count())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with store.rebuild(expected=100) as fresh:
            fresh.upsert(rows[:100], list(range(100)), payloads[:100])
    finally:
        done.set()
        watcher.join()
    assert seen <= {COUNT, 100}
    assert store.rollover() == f"{store.name}-000003"
    check_scores(store, rows[:100], queries)

    async def ask():
        found = AsyncVDRQdrant(store.name, **options)
        try:
            return await found.search(queries[0], 5)
        finally:
            await found.close()

    assert [h.score for h in asyncio.run(ask())] == pytest.approx(
        [h.score for h in store.search(queries[0], 5)]
    )
    assert store.delete([0, 1, 5000]) == 2
