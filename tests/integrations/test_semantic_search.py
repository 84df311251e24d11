"""The search calls of sentence-transformers: their arguments, their results, their side effects."""

from __future__ import annotations

import inspect
from contextlib import closing

import numpy as np
import pytest
import services
from store_samples import WordEncoder

from vdr_db.connectors import VDRElasticsearch, VDRQdrant
from vdr_db.connectors.elasticsearch.bodies import truncate_weights
from vdr_db.errors import ConfigError, InputError, StoreMismatch
from vdr_db.integrations import semantic_search
from vdr_db.integrations.semantic_search import (
    semantic_search_elasticsearch,
    semantic_search_qdrant,
)
from vdr_db.sparse import SparseRows

qdrant_client = pytest.importorskip("qdrant_client", reason="qdrant-client is not installed")
elasticsearch = pytest.importorskip("elasticsearch", reason="elasticsearch is not installed")

TEXTS = ["Einstein published the theory", "a theory of chess", "", "chess is a game"]
QUERIES = ["theory of chess", "nothing known", "Einstein"]


def expected(*, truncated=False):
    encoder = WordEncoder()
    rows = encoder.encode_documents(TEXTS)
    if truncated:
        rows = SparseRows(rows.indptr, rows.indices, truncate_weights(rows.values), rows.width)
    exact = encoder.encode_queries(QUERIES).dot(rows)
    return [
        [
            {"corpus_id": int(i), "score": pytest.approx(scores[i], rel=1e-6)}
            for i in np.argsort(-scores, kind="stable")
            if scores[i] > 0
        ]
        for scores in exact
    ]


def in_every_form():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    encoder = WordEncoder()
    queries, corpus = encoder.encode_queries(QUERIES), encoder.encode_documents(TEXTS)
    dense = [torch.from_numpy(rows.to_scipy().toarray()) for rows in (queries, corpus)]
    return [
        (queries, corpus, {}),
        (dense[0], dense[1], {}),
        (dense[0].to_sparse_coo(), dense[1].to_sparse_coo().double(), {}),
        (QUERIES, TEXTS, {"encoder": encoder}),
    ]


@pytest.mark.parametrize("name", ["semantic_search_qdrant", "semantic_search_elasticsearch"])
def test_arguments_are_those_of_sentence_transformers(name):
    theirs = pytest.importorskip(
        "sentence_transformers.sparse_encoder.search_engines",
        reason="sentence-transformers is not installed",
    )
    usual = dict(inspect.signature(getattr(theirs, name)).parameters)
    ours = dict(inspect.signature(getattr(semantic_search, name)).parameters)
    assert ours.pop("encoder").kind is inspect.Parameter.KEYWORD_ONLY
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in usual.values()
    ]


@pytest.mark.parametrize("form", range(4))
def test_qdrant_answers_in_their_form(form):
    queries, corpus, options = in_every_form()[form]
    found, seconds = semantic_search_qdrant(queries, corpus, location=":memory:", **options)
    assert found == expected()
    assert 0 < seconds < 60
    assert {type(hit["corpus_id"]) for hits in found for hit in hits} == {int}


def test_a_qdrant_collection_can_be_kept_and_searched_again():
    queries, corpus, _ = in_every_form()[0]
    found, _, index = semantic_search_qdrant(
        queries, corpus, output_index=True, top_k=1, location=":memory:"
    )
    assert [len(hits) for hits in found] == [1, 0, 1]
    client, name = index
    with closing(client):
        assert client.count(name).count == len(TEXTS)
        again, _, same = semantic_search_qdrant(queries, corpus_index=index, output_index=True)
        assert again == expected()
        assert same is index
        one, _ = semantic_search_qdrant(queries[0], corpus_index=VDRQdrant(name, client=client))
        assert one == expected()[:1]
        with VDRQdrant("other", WordEncoder(), client=client) as articles:
            articles.add_texts(TEXTS, ids=["a", "b", "c", "d"])
            texts, _ = semantic_search_qdrant(QUERIES, corpus_index=articles)
            assert [hit["corpus_id"] for hit in texts[0]] == ["b", "d", "a"]
            with pytest.raises(StoreMismatch):
                semantic_search_qdrant(
                    QUERIES,
                    corpus_index=(client, "other"),
                    encoder=WordEncoder(tokens=["[PAD]", "chess"]),
                )


def test_a_qdrant_collection_nobody_asked_for_is_removed(monkeypatch):
    made = []

    class Client(qdrant_client.QdrantClient):
        def __init__(self, **options):
            made.append((self, options))
            super().__init__(":memory:")

        def close(self, **options):
            if not hasattr(self, "left"):  # it is closed once more when it is collected
                self.left = [one.name for one in self.get_collections().collections]
            super().close(**options)

    monkeypatch.setattr(qdrant_client, "QdrantClient", Client)
    queries, corpus, _ = in_every_form()[0]
    semantic_search_qdrant(queries, corpus)
    narrow = SparseRows.from_dicts([{1: 1.0}], queries.width - 1)
    with pytest.raises(InputError, match="width"):
        semantic_search_qdrant(narrow, corpus, api_key="secret")
    assert [options for _, options in made] == [
        {"url": "http://localhost:6333"},
        {"url": "http://localhost:6333", "api_key": "secret"},
    ]
    assert [client.left for client, _ in made] == [[], []]


def test_elasticsearch_scores_by_inner_product_and_cleans_up(stand_in):
    queries, corpus, _ = in_every_form()[0]
    found, seconds = semantic_search_elasticsearch(queries, corpus, hosts=stand_in.url)
    assert found == expected(truncated=True)
    assert 0 < seconds < 60
    with closing(elasticsearch.Elasticsearch(stand_in.url)) as client:
        assert not [name for name in client.indices.get(index="*") if name.startswith("sparse-")]


def test_an_elasticsearch_index_can_be_kept_and_searched_again(stand_in):
    queries, corpus, _ = in_every_form()[2]
    _, _, index = semantic_search_elasticsearch(
        queries, corpus, output_index=True, hosts=[stand_in.url]
    )
    client, name = index
    with closing(client):
        again, _ = semantic_search_elasticsearch(QUERIES, None, index, 2, encoder=WordEncoder())
        assert again == [hits[:2] for hits in expected(truncated=True)]
        with VDRElasticsearch(name, client=client) as articles:
            (one,), _ = semantic_search_elasticsearch(queries[0], corpus_index=articles)
            assert one == expected(truncated=True)[0]
        for backing in client.indices.get(index=name):
            client.indices.delete(index=backing)


def test_a_server_that_is_not_there_is_told():
    from vdr_db.errors import StoreUnavailable

    queries, corpus, _ = in_every_form()[0]
    port = _unused_port()
    with pytest.raises(StoreUnavailable):
        semantic_search_qdrant(
            queries, corpus, url=f"http://127.0.0.1:{port}", check_compatibility=False
        )


def _unused_port():
    import noida

    assert services.unique_name()
    return noida.free_port()


@pytest.mark.parametrize("search", [semantic_search_qdrant, semantic_search_elasticsearch])
def test_what_cannot_be_searched_is_an_error(search):
    rows = WordEncoder().encode_queries(QUERIES)
    with pytest.raises(ConfigError, match="give the vectors of the corpus"):
        search(rows)
    with pytest.raises(ConfigError, match="queries are texts; pass encoder="):
        search(QUERIES, rows)
    with pytest.raises(TypeError, match="got one string"):
        search("theory of chess", rows)
    with pytest.raises(TypeError, match="not decoded to tokens"):
        search([[("chess", 1.5)]], rows)
    with pytest.raises(TypeError, match="not decoded to tokens"):
        search(rows, [[("chess", 1.5)]])
    with pytest.raises(TypeError, match=r"must be \(client, name\)"):
        search(rows, corpus_index="articles")
