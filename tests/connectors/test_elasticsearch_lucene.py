"""The arithmetic of the scores, asked of Lucene itself.

Lucene 8 from Debian is the engine of Elasticsearch 7, whose encoding of features later versions
kept. Proved here: the truncated oracle that all other tests of this store compare with is what the
engine computes. Not proved here: that Elasticsearch hands our requests to it as we think; for that
there are the protocol tests and, with a server at hand, `test_elasticsearch_server.py`.
"""

from __future__ import annotations

import lucene
import numpy as np
import pytest
import services
from sparse_samples import ranking, truncated, zipf_rows

from vdr_db import SparseRows
from vdr_db.connectors.elasticsearch.bodies import truncate_weights
from vdr_db.connectors.memory import MemoryStore


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    reason = lucene.why_missing()
    if reason is not None:
        services.skip(reason)
    return lucene.build(tmp_path_factory.mktemp("lucene"))


@pytest.mark.parametrize(("nnz", "query_nnz"), [(40, 32), (256, 256)])
def test_lucene_scores_as_the_truncated_oracle(classes, tmp_path, nnz, query_nnz):
    documents = zipf_rows(600, nnz, 4000, seed=nnz)
    queries = zipf_rows(30, query_nnz, 4000, seed=nnz + 1)
    oracle = truncated(documents).dot(queries)
    for number, hits in enumerate(lucene.search(classes, documents, queries, tmp_path)):
        expected = ranking(oracle[:, number], len(documents))
        assert len(hits) == len(expected)
        found = dict(hits)
        assert set(found) == set(expected)
        scores = np.array([found[document] for document in expected])
        np.testing.assert_allclose(scores, oracle[expected, number], rtol=1e-6)
        # Neighbours may change places only where float32 cannot tell them apart.
        order = oracle[[document for document, _ in hits], number]
        assert (np.diff(order) <= 1e-6 * order[:-1]).all()


def test_lucene_cuts_every_weight_as_we_do(classes, tmp_path):
    random = np.random.default_rng(7)
    exponents = random.uniform(-29, 38, 3000)
    weights = np.concatenate(
        [
            (10.0**exponents).astype(np.float32),
            np.float32([1e-30, 1.0, 1.99999988, 2.0, 64.0, 3.4e38, np.finfo(np.float32).tiny]),
            np.nextafter(np.float32(2.0) ** np.arange(-20, 20, dtype=np.float32), np.float32(0)),
        ]
    )
    documents = SparseRows(np.arange(weights.size + 1), np.full(weights.size, 5), weights, 10)
    query = SparseRows.from_dicts([{5: 1.0}], 10)
    found = dict(lucene.search(classes, documents, query, tmp_path)[0])
    scores = np.array([found[number] for number in range(weights.size)], np.float32)
    assert np.array_equal(scores, truncate_weights(weights))
    assert np.array_equal(scores, truncated(documents).values)


def test_nine_bits_find_what_exact_weights_find(classes, tmp_path):
    documents = zipf_rows(1000, 64, 4000, seed=11)
    queries = zipf_rows(40, 32, 4000, seed=12)
    exact = MemoryStore()
    exact.create(4000)
    exact.upsert(documents, list(range(1000)))
    found = total = 0
    rankings = zip(
        exact.search_batch(queries, 10),
        lucene.search(classes, documents, queries, tmp_path),
        strict=True,
    )
    for wanted, hits in rankings:
        ours = {document for document, _ in hits[:10]}
        found += sum(hit.id in ours for hit in wanted)
        total += len(wanted)
    assert found / total >= 0.99
