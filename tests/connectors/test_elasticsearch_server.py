"""A real Elasticsearch, when there is one: see `tests/support/services.py`.

Only this proves that a server of a real version accepts the mapping, scores clauses with boosts as
we expect, merges segments without changing scores, and moves aliases without a gap.
"""

from __future__ import annotations

import numpy as np
import pytest
import services
from search_servers import remove_indices
from sparse_samples import ranking, truncated, zipf_rows

from vdr_db import SparseRows
from vdr_db.connectors.elasticsearch.store import ElasticsearchStore

pytestmark = pytest.mark.elasticsearch

WIDTH = 4000


@pytest.fixture(scope="module")
def rows():
    return zipf_rows(2000, 128, WIDTH, seed=1)


@pytest.fixture(scope="module")
def queries():
    return zipf_rows(20, 128, WIDTH, seed=2)


@pytest.fixture(scope="module")
def service():
    with services.running_elasticsearch() as running:
        yield running


@pytest.fixture(params=["rank_features", "sparse_vector"])
def store(request, service):
    made = ElasticsearchStore(
        services.unique_name(),
        url=service.url,
        api_key=service.api_key,
        kind=request.param,
        text_fields=["text"],
        replicas=0,
    )
    with made:
        made.create(WIDTH)
        yield made
        remove_indices(made)


def check_scores(store, rows, queries):
    oracle = truncated(rows).dot(queries)
    for number, hits in enumerate(store.search_batch(queries, 50)):
        expected = ranking(oracle[:, number], 50)
        scores = [hit.score for hit in hits]
        np.testing.assert_allclose(scores, oracle[expected, number], rtol=1e-6)
        np.testing.assert_allclose(scores, oracle[[hit.id for hit in hits], number], rtol=1e-6)


def test_a_real_server_does_what_the_stand_in_does(store, rows, queries):
    payloads = [{"n": n, "text": f"text number {n}"} for n in range(2000)]
    with store.loading():
        assert store.upsert(rows, list(range(2000)), payloads).count == 2000
    assert store.count() == 2000
    check_scores(store, rows, queries)
    store.optimize()
    check_scores(store, rows, queries)
    assert store.count({"n": {"gte": 10, "lt": 20}}) == 10
    assert (
        SparseRows.concat([record.row for record in store.get(list(range(50)), with_rows=True)])
        == rows[:50]
    )
    assert len(list(store.ids())) == 2000
    heavy = SparseRows.from_dicts([{int(rows.row(0)[0][0]): 1000.0}], WIDTH)
    assert store.search(heavy, 1)[0].score > 500 * float(rows.row(0)[1][0])
    assert store.search_with_text(queries[0], "number 7", "text", 5)
    store.create_template()
    assert store.rollover() == f"{store.name}-000002"
    check_scores(store, rows, queries)
    assert store.delete([0, 1, 5000]) == 2
