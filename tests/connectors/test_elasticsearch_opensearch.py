"""The same requests through `opensearch-py`, on the stand-in of `tests/support/noida.py`.

Proved here: the client's calls, answers and errors are understood. Not proved here: that an
OpenSearch server takes the requests; its `rank_features` and `rank_feature` are those of the
Elasticsearch version it was split from.
"""

from __future__ import annotations

import numpy as np
import pytest
from fault_proxy import Answer, LostAnswer, Reset
from sparse_samples import truncated, zipf_rows

from vdr_db.errors import RejectedRows, StoreError, StoreUnavailable

opensearchpy = pytest.importorskip("opensearchpy")

WIDTH = 500
ROWS = zipf_rows(50, 20, WIDTH, seed=1)


@pytest.fixture
def store(proxy, open_store):
    client = opensearchpy.OpenSearch(hosts=[proxy.url], max_retries=0, pool_maxsize=1)
    made = open_store(client=client, payload_types={"year": "long"})
    made.create(WIDTH)
    yield made
    client.close()


def test_everything_works_alike(store):
    ids = list(range(50))
    with store.loading():
        assert store.upsert(ROWS, ids, [{"n": n} for n in ids]).count == 50
    oracle = truncated(ROWS).dot(ROWS[:3])
    for number, hits in enumerate(store.search_batch(ROWS[:3], 10)):
        scores = [hit.score for hit in hits]
        np.testing.assert_allclose(scores, oracle[[hit.id for hit in hits], number], rtol=1e-6)
    assert len(store.search(ROWS[0], 5, {"n": {"lt": 3}})) <= 3
    assert store.get([7], with_rows=True)[0].row == ROWS[7]
    assert list(store.ids()) == ids
    assert store.rollover().endswith("-000002")
    assert store.delete([0, 99]) == 1
    assert store.count() == 49


def test_failures_are_understood(store, proxy):
    proxy.plan(Answer(429), Answer(503), Reset(), LostAnswer(), None)
    assert store.upsert(ROWS[:2], [1, 2]).count == 2
    assert store.transport.retrier.retries == 4
    with pytest.raises(RejectedRows) as caught:
        store.upsert(ROWS[:2], [3, 4], [{"year": 1}, {"year": "x"}])
    assert caught.value.ids == [4]
    proxy.plan(Answer(401), match="_search")
    with pytest.raises(StoreError, match="credentials"):
        store.search(ROWS[0])
    proxy.is_down = True
    try:
        with pytest.raises(StoreUnavailable):
            store.search(ROWS[0])
    finally:
        proxy.is_down = False
