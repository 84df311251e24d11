"""The strategy and embedding service in the official client's own `VectorStore`."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
import services
from store_samples import WordEncoder

from vdr_db.connectors.elasticsearch.bodies import row_query, truncate_weights
from vdr_db.errors import ConfigError
from vdr_db.sparse import SparseRows

vectorstore = pytest.importorskip(
    "elasticsearch.helpers.vectorstore", reason="the elasticsearch client is not installed"
)
elasticsearch = pytest.importorskip("elasticsearch")

from vdr_db.integrations.elasticsearch import (  # noqa: E402
    VDREmbeddingService,
    VDRRetrievalStrategy,
)

TEXTS = ["Einstein published the theory", "a theory of chess", "chess is a game", ""]
IDS = ["einstein", "mind", "game", "empty"]


@pytest.fixture(params=["rank_features", "sparse_vector"])
def store(request, stand_in):
    # The client closes no connection of copies of itself, which `VectorStore` makes.
    with closing(elasticsearch.Elasticsearch(stand_in.url)) as client:
        name = services.unique_name()
        yield vectorstore.VectorStore(
            client,
            index=name,
            retrieval_strategy=VDRRetrievalStrategy(kind=request.param),
            embedding_service=VDREmbeddingService(WordEncoder()),
        )
        client.indices.delete(index=name, ignore_unavailable=True)


def test_scores_are_inner_products_with_weights_of_nine_bits(store):
    encoder = WordEncoder()
    metadatas = [{"n": n} for n in range(4)]
    assert store.add_texts(TEXTS, metadatas=metadatas, ids=IDS) == IDS
    rows = encoder.encode_documents(TEXTS)
    kept = SparseRows(rows.indptr, rows.indices, truncate_weights(rows.values), rows.width)
    for question in ("theory of chess", "Einstein published", "game"):
        exact = encoder.encode_queries([question]).dot(kept)[0]
        found = store.search(query=question, k=4)
        assert [hit["_id"] for hit in found] == [
            IDS[i] for i in np.argsort(-exact, kind="stable") if exact[i] > 0
        ]
        for hit in found:
            assert hit["_score"] == pytest.approx(exact[IDS.index(hit["_id"])], rel=1e-6)
    assert found[0]["_source"] == {"text_field": TEXTS[2], "metadata": {"n": 2}}


def test_filters_vectors_and_deletion(store):
    store.add_texts(TEXTS, metadatas=[{"n": n} for n in range(4)], ids=IDS)
    only = store.search(query="theory", filter=[{"term": {"metadata.n": 1}}])
    unfiltered = {hit["_id"]: hit["_score"] for hit in store.search(query="theory")}
    assert [(hit["_id"], hit["_score"]) for hit in only] == [("mind", unfiltered["mind"])]
    assert len(unfiltered) == 2
    vector = store.embedding_service.embed_query("game")
    assert [hit["_id"] for hit in store.search(query_vector=vector)] == ["game"]
    assert store.search(query="nothing known") == []
    assert store.delete(ids=["game"])
    assert store.search(query="game") == []


def es_query(strategy, vector, **more):
    names = {"query": None, "text_field": "t", "vector_field": "v", "k": 4, "num_candidates": 50}
    return strategy.es_query(query_vector=vector, **{**names, **more})


def test_bodies_are_those_of_our_own_store():
    ids, weights = np.array([3, 999], np.int32), np.array([0.1, 2.5], np.float32)
    for kind in ("rank_features", "sparse_vector"):
        body = es_query(VDRRetrievalStrategy(kind=kind), {"3": 0.1, "999": 2.5})
        assert body == {"query": row_query(ids, weights, field="v", kind=kind)}
    mapping, settings = VDRRetrievalStrategy().es_mappings_settings(
        text_field="t", vector_field="v", num_dimensions=7
    )
    assert mapping == {"properties": {"t": {"type": "text"}, "v": {"type": "rank_features"}}}
    assert settings == {}
    filtered = es_query(VDRRetrievalStrategy(), {"3": 1.0}, filter=[{"term": {"x": 1}}])
    assert filtered["query"]["bool"]["filter"] == [{"term": {"x": 1}}]


def test_only_the_heaviest_tokens_and_no_large_boosts():
    strategy = VDRRetrievalStrategy(query_top_k=2)
    (query,) = es_query(strategy, {"1": 1.0, "2": 500.0, "3": 300.0}).values()
    clauses = [clause["rank_feature"] for clause in query["bool"]["should"]]
    assert [(clause["field"], clause["boost"]) for clause in clauses] == [
        ("v.2", 62.5), ("v.3", 37.5),
    ]  # fmt: skip


def test_vectors_carry_the_shortest_digits_and_nothing_the_engine_refuses():
    class Tiny(WordEncoder):
        def encode_documents(self, texts):
            return SparseRows.from_dicts([{1: 0.1, 2: 1e-38}], self.vocabulary.size)

    assert VDREmbeddingService(Tiny()).embed_documents(["x"]) == [{"1": 0.1}]
    assert VDREmbeddingService(WordEncoder()).embed_query("") == {}
    bag = VDREmbeddingService(WordEncoder(), mode="alpha").embed_query("chess game")
    assert set(bag.values()) == {1.0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VDRRetrievalStrategy(kind="dense_vector"), "`kind` must be 'rank_features'"),
        (lambda: VDRRetrievalStrategy(query_top_k=0), "`query_top_k` must be at least 1"),
        (lambda: VDREmbeddingService(WordEncoder(), mode="x"), "`mode` must be"),
        (lambda: es_query(VDRRetrievalStrategy(), None), "embedding_service=VDREmbeddingService"),
        (lambda: es_query(VDRRetrievalStrategy(), [0.5, 0.25]), "mapping of token id to weight"),
        (lambda: es_query(VDRRetrievalStrategy(), {"chess": 1.0}), "mapping of token id to weight"),
    ],
)
def test_impossible_things_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
