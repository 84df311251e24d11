"""Dense vectors beside the sparse one, and both rankings joined, embedded and on a server."""

from __future__ import annotations

import numpy as np
import pytest
from store_samples import WIDTH, WordEncoder, row, rows

from vdr_db.connectors import DenseVector, QdrantStore, VDRQdrant
from vdr_db.errors import ConfigError, InputError, RejectedRows, ShapeError, StoreMismatch
from vdr_db.sparse import SparseRows

qdrant_client = pytest.importorskip("qdrant_client")
models = qdrant_client.models

SIZE = 8
COUNT = 60


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    from qdrant_contract_server import QdrantContractServer

    with QdrantContractServer(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(params=["edge", "rest", "grpc"])
def connect(request, server, tmp_path):
    """Opens a collection of a name, embedded or on the server."""
    opened = []

    def connect(name, **options):
        if request.param == "edge":
            store = QdrantStore(name, path=tmp_path / name, **options)
        else:
            store = QdrantStore(
                f"{name}-{request.param}",
                url=server.url,
                prefer_grpc=request.param == "grpc",
                client_options={"grpc_port": server.grpc_port},
                **options,
            )
        opened.append(store)
        return store

    yield connect
    for store in opened:
        store.close()


def dense(count=COUNT, seed=0, size=SIZE):
    return np.random.default_rng(seed).standard_normal((count, size)).astype(np.float32)


def cosine(columns, query):
    norms = np.linalg.norm(columns, axis=1) * np.linalg.norm(query)
    return columns.astype(np.float64) @ query / norms


def fused(sparse, dense_scores, constant, depth, dense_weight=1.0):
    """Reciprocal ranks, counted from zero as the engine does; id → score."""
    scores: dict[int, float] = {}
    for ranking, weight in ((sparse, 1.0), (dense_scores, dense_weight)):
        order = [i for i in np.argsort(-ranking, kind="stable") if ranking[i] > -np.inf][:depth]
        for rank, i in enumerate(order):
            scores[int(i)] = scores.get(int(i), 0.0) + weight / (constant + rank)
    return scores


def unique_rows():
    random = np.random.default_rng(5)
    return SparseRows.from_dicts(
        [
            {int(i): float(random.random() + 0.1) for i in random.choice(WIDTH, 6, False)}
            for _ in range(COUNT)
        ],
        WIDTH,
    )


@pytest.mark.parametrize("constant", [None, 60])
def test_fusion_equals_the_reciprocal_ranks_of_both_exact_rankings(connect, constant):
    store = connect(f"fusion{constant}", dense={"text": SIZE})
    store.create(WIDTH)
    documents, columns = unique_rows(), dense()
    payloads = [{"even": i % 2 == 0} for i in range(COUNT)]
    store.upsert(documents, list(range(COUNT)), payloads, dense={"text": columns})
    query, vector = unique_rows()[3], dense(1, seed=9)[0]
    exact = documents.dot(query)[:, 0]
    sparse = np.where(exact > 0, exact, -np.inf)
    for condition, kept in (
        (None, np.ones(COUNT, bool)),
        ({"even": True}, np.arange(COUNT) % 2 == 0),
    ):
        expected = fused(
            np.where(kept, sparse, -np.inf),
            np.where(kept, cosine(columns, vector), -np.inf),
            constant or 2,
            depth=20,
        )
        hits = store.search_with_dense(
            query, vector, 10, condition, depth=20, rank_constant=constant
        )
        best = sorted(expected.values(), reverse=True)[:10]
        assert [hit.score for hit in hits] == pytest.approx(best, rel=1e-5)
        for hit in hits:
            assert hit.score == pytest.approx(expected[hit.id], rel=1e-5)
    page = store.search_with_dense(query, vector, 4, offset=3, depth=20, rank_constant=constant)
    whole = store.search_with_dense(query, vector, 7, depth=20, rank_constant=constant)
    assert [hit.score for hit in page] == [hit.score for hit in whole[3:]]


@pytest.mark.parametrize("weight", [0.25, 3.0])
def test_the_dense_ranking_may_weigh_more_or_less(connect, weight):
    store = connect(f"weighted{weight}", dense={"text": SIZE})
    store.create(WIDTH)
    documents, columns = unique_rows(), dense()
    store.upsert(documents, list(range(COUNT)), dense={"text": columns})
    query, vector = unique_rows()[3], dense(1, seed=9)[0]
    exact = documents.dot(query)[:, 0]
    sparse = np.where(exact > 0, exact, -np.inf)
    expected = fused(sparse, cosine(columns, vector), 2, 20, weight)
    hits = store.search_with_dense(query, vector, 10, depth=20, dense_weight=weight)
    assert [hit.score for hit in hits] == pytest.approx(
        sorted(expected.values(), reverse=True)[:10], rel=1e-5
    )
    assert all(hit.score == pytest.approx(expected[hit.id], rel=1e-5) for hit in hits)
    for wrong in (-1.0, float("nan"), True):
        with pytest.raises(ConfigError, match="dense_weight"):
            store.search_with_dense(query, vector, dense_weight=wrong)


def test_an_empty_sparse_query_ranks_by_the_dense_vector(connect):
    store = connect("emptyquery", dense={"text": DenseVector(SIZE, "dot")})
    store.create(WIDTH)
    columns = dense(20)
    store.upsert(rows(20), list(range(20)), dense={"text": columns})
    vector = dense(1, seed=3)
    hits = store.search_with_dense(SparseRows.empty(1, WIDTH), vector, 5)
    with pytest.warns(DeprecationWarning, match="`search_hybrid` is called `search_with_dense`"):
        assert store.search_hybrid(SparseRows.empty(1, WIDTH), vector, 5) == hits
    assert [hit.id for hit in hits] == np.argsort(-(columns @ vector[0]))[:5].tolist()


def test_a_collection_knows_its_dense_vectors_again(connect):
    store = connect("known", dense={"text": SIZE, "image": DenseVector(4, "euclid")})
    store.create(WIDTH)
    store.upsert(rows(2), ["a", "b"], dense={"text": dense(2)})  # a document may lack one
    store.upsert(rows(1), ["c"])
    again = store if "edge" in repr(type(store._engine)).lower() else connect("known")
    assert again.dense == {"text": DenseVector(SIZE), "image": DenseVector(4, "euclid")}
    assert again.count() == 3
    if again is not store:
        with pytest.raises(StoreMismatch, match="has the dense vectors"):
            connect("known", dense={"text": 5})
    with pytest.raises(ConfigError, match="name one with `using`"):
        again.search_with_dense(row({1: 1.0}), dense(1)[0])
    assert len(again.search_with_dense(row({1: 1.0}), dense(1)[0], using="text")) >= 2


def test_impossible_dense_vectors_never_reach_an_engine(connect):
    store = connect("bad", dense={"text": SIZE})
    store.create(WIDTH)
    columns = dense(3)
    columns[1, 2] = np.nan
    with pytest.raises(RejectedRows, match="dense vector 'text' is not finite") as caught:
        store.upsert(rows(3), ["a", "b", "c"], dense={"text": columns})
    assert caught.value.ids == ["b"]
    assert store.count() == 2  # a refused document never takes its neighbours with it
    for wrong, error, told in (
        ({"text": dense(2)}, ShapeError, r"the shape \[3, 8\] .* got \[2, 8\]"),
        ({"text": dense(3, size=4)}, ShapeError, r"got \[3, 4\]"),
        ({"image": dense(3)}, ConfigError, r"no dense vector 'image', it has \['text'\]"),
    ):
        with pytest.raises(error, match=told):
            store.upsert(rows(3), ["a", "b", "c"], dense=wrong)
    for wrong, error in ((dense(2), ShapeError), (np.full(SIZE, np.inf), InputError)):
        with pytest.raises(error):
            store.search_with_dense(row({1: 1.0}), wrong)
    for number in ({"depth": 0}, {"rank_constant": 0}, {"limit": 0}):
        with pytest.raises(ConfigError):
            store.search_with_dense(row({1: 1.0}), dense(1)[0], **number)


def test_without_dense_vectors_the_way_to_get_them_is_told(connect):
    store = connect("none")
    store.create(WIDTH)
    with pytest.raises(ConfigError, match=r"make it with dense=\{name: size\}"):
        store.search_with_dense(row({1: 1.0}), dense(1)[0])
    for wrong in ({"text": 0}, {"text": True}, {"": 3}, {"vdr": 3}):
        with pytest.raises(ConfigError):
            connect("wrong", dense=wrong)


def test_texts_with_dense_vectors(connect):
    texts = [
        "Einstein published the theory",
        "Chess is a game of kings",
        "Chess is a game of kings",
    ]
    columns = np.eye(3, SIZE, dtype=np.float32)
    store = connect("texts", dense={"text": SIZE})
    where = {"path": store._engine._folder.path} if hasattr(store._engine, "_folder") else None
    if where is None:
        where = {"client": store._engine._client}
    name = store.name
    if "path" in where:
        store.close()
    with VDRQdrant(name, WordEncoder(), dense={"text": SIZE}, **where) as articles:
        ids = articles.add_texts(texts, dense={"text": columns}, batch_size=1)
        assert ids[1] == ids[2]
        assert articles.count() == 2
        hits = articles.search_with_dense("theory", columns[1], 2)
        assert {hit.id for hit in hits} == set(ids)
        assert hits[0].payload["text"]
        articles.add_rows(
            WordEncoder().encode_documents(texts[:1]), ["e"], dense={"text": columns[:1]}
        )
        assert articles.search_with_dense("theory", columns[0], 1)[0].id in ("e", ids[0])
        with pytest.raises(ShapeError, match="3 texts, 3 ids and 2 of 'text'"):
            articles.add_texts(texts, dense={"text": columns[:2]})


@pytest.mark.parametrize("prefer_grpc", [True, False])
def test_sparse_beside_a_dense_collection_of_others(server, prefer_grpc):
    client = qdrant_client.QdrantClient(
        url=server.url, grpc_port=server.grpc_port, prefer_grpc=prefer_grpc
    )
    name = f"dense-{prefer_grpc}"
    client.create_collection(
        name,
        vectors_config={"mini": models.VectorParams(size=SIZE, distance=models.Distance.DOT)},
        sparse_vectors_config={"splade": models.SparseVectorParams()},
    )
    store = QdrantStore.from_existing(name, client=client, adopt=True, width=WIDTH)
    assert store.dense == {"mini": DenseVector(SIZE, "dot")}
    store.upsert(rows(10), list(range(10)), dense={"mini": dense(10)})
    before = server.requests["query_batch"]
    hits = store.search_with_dense(rows(10)[4], dense(10)[4], 3)
    assert server.requests["query_batch"] == before + 1
    assert hits[0].id == 4
    kept = client.retrieve(name, [4], with_vectors=True)[0].vector
    assert kept["mini"] == pytest.approx(dense(10)[4].tolist())
    assert kept["splade"].indices == rows(10)[4].indices.tolist()
    client.close()


def test_large_dense_vectors_keep_batches_within_their_bytes(connect, monkeypatch):
    store = connect("large", dense={"text": 4096})
    store.create(WIDTH)
    sizes, upsert = [], store._engine.upsert
    monkeypatch.setattr(
        store._engine,
        "upsert",
        lambda batch: (sizes.append(len(batch)), upsert(batch)),
    )
    store.upsert(rows(300), list(range(300)), dense={"text": dense(300, size=4096)})
    if hasattr(store._engine, "_client"):
        assert sizes == [254, 46]
    assert store.count() == 300
