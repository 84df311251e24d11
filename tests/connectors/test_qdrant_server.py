"""The server path of `QdrantStore`, through the real client over REST and gRPC.

Against a test server of ours in front of the embedded engine (what that proves is written there),
and, for errors that need a server of another age or mood, the client's in-memory double.
"""

from __future__ import annotations

import threading
import warnings

import pytest
from store_samples import WIDTH, WordEncoder, assert_same_hits, row, rows

from vdr_db.connectors import MemoryStore, QdrantStore, VDRQdrant
from vdr_db.connectors.qdrant import server as server_module
from vdr_db.connectors.retry import RetryPolicy
from vdr_db.errors import (
    ConfigError,
    RejectedRows,
    StoreError,
    StoreMismatch,
    StoreUnavailable,
)
from vdr_db.sparse import SparseRows
from vdr_db.stamp import EncoderStamp

qdrant_client = pytest.importorskip("qdrant_client")
models = qdrant_client.models

STAMP = EncoderStamp("model", "tokens", "all", "mlm", "log1p_relu")
KEY = "a-secret-key-4711"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    from qdrant_contract_server import QdrantContractServer

    with QdrantContractServer(tmp_path_factory.mktemp("server"), api_key=KEY) as server:
        yield server


@pytest.fixture(params=["rest", "grpc"])
def connect(request, server):
    """Opens collections on the server by one of its two protocols."""
    opened = []

    def connect(name, **options):
        options.setdefault("api_key", KEY)
        client_options = {"grpc_port": server.grpc_port, **options.pop("client_options", {})}
        with warnings.catch_warnings():
            # The client says that the key travels without TLS, which on loopback is meant.
            warnings.filterwarnings("ignore", message="Api key is used with an insecure")
            store = QdrantStore(
                f"{name}-{request.param}",
                url=server.url,
                prefer_grpc=request.param == "grpc",
                client_options=client_options,
                **options,
            )
        opened.append(store)
        return store

    yield connect
    for store in opened:
        store.close()


def double():
    return qdrant_client.QdrantClient(":memory:")


def test_the_same_answers_as_the_oracle(connect):
    store, oracle = connect("answers"), MemoryStore()
    many = SparseRows.concat([rows(600), SparseRows.empty(1, WIDTH)])
    ids = [*range(300), *(f"id {i}" for i in range(300)), "empty"]
    payloads = [{"n": i % 10, "even": i % 2 == 0, "text": f"größer {i}"} for i in range(600)]
    for one in (store, oracle):
        one.create(WIDTH, STAMP)
        written = one.upsert(many, ids, [*payloads, None])
        assert (written.count, written.empty) == (601, 1)
    queries = SparseRows.concat([rows(4, seed=8), SparseRows.empty(1, WIDTH)])
    for condition in (
        None,
        {"n": 3},
        {"n": [1, 2.0]},
        {"n": {"gte": 4, "lt": 6}},
        {"even": True},
        {"text": "größer 7"},
        {"not": {"even": True}},
        {"any": [{"n": 0}, {"n": None}]},
        {"any": []},
        {},
    ):
        assert store.count(condition) == oracle.count(condition)
        batch = store.search_batch(queries, 10, condition)
        for query, found in zip(queries, batch, strict=True):
            exact = oracle.search(query, 1000, condition)
            assert_same_hits(found, exact, 10)
            assert_same_hits(store.search(query, 10, condition), exact, 10)
    assert [h.score for h in store.search(queries[0], 5, offset=5)] == pytest.approx(
        [h.score for h in oracle.search(queries[0], 5, offset=5)]
    )
    assert set(store.ids()) == set(ids)
    assert store.get(ids[::-1], with_rows=True) == oracle.get(ids[::-1], with_rows=True)
    assert store.delete(["id 1", 5, "nobody"]) == 2
    assert store.count() == 599
    store.upsert(row({1: 9.0}), [7], [{"new": [1.5, None, {"deep": True}]}])
    assert store.get([7], True)[0].payload == {"new": [1.5, None, {"deep": True}]}
    assert store.get([7], True)[0].row == row({1: 9.0})
    store.flush()
    store.optimize()


def test_what_the_collection_is_travels_with_it(connect):
    store = connect("manifest", datatype="float16", payload_indexes={"n": "integer"})
    assert store.width is None
    assert store.count() == 0
    store.create(WIDTH, STAMP)
    store.upsert(rows(2), ["a", "b"])
    again = connect("manifest")
    assert (again.width, again.stamp, again.datatype) == (WIDTH, STAMP, "float16")
    assert again.count() == 2
    with pytest.raises(StoreMismatch, match="'tokens 2'"):
        again.create(WIDTH, EncoderStamp("x", "tokens 2", "all", "mlm", "log1p_relu"))
    with pytest.raises(StoreMismatch, match="keeps weights as float16"):
        connect("manifest", datatype="float32")


def test_a_collection_of_texts_on_a_server(connect, server):
    encoder = WordEncoder()
    texts = ["Einstein published the theory", "Chess is a game of kings"]
    store = connect("texts")
    with VDRQdrant("texts", encoder, client=store._engine._client) as articles:
        articles.add_texts(texts, ["e", "c"])
        hits = articles.search("theory published")
        assert [hit.id for hit in hits] == ["e"]
        terms = articles.explain("theory published", "e")
        assert sum(term.product for term in terms) == pytest.approx(hits[0].score, rel=1e-6)
        assert KEY not in repr(articles)
    # A client that was given stays open.
    assert VDRQdrant("texts", encoder, client=store._engine._client).count() == 2
    store._engine._client.delete_collection("texts")


def test_a_wrong_key_is_told_without_showing_it(connect):
    for options in ({"api_key": "wrong-key-0815"}, {"api_key": None}):
        with pytest.raises(StoreError, match="refuses the credentials") as caught:
            connect("keys", **options)
        assert "0815" not in str(caught.value)
        assert not isinstance(caught.value, StoreUnavailable)


@pytest.mark.filterwarnings("ignore:Api key is used with an insecure")
@pytest.mark.parametrize("prefer_grpc", [True, False])
def test_a_server_that_is_not_there(prefer_grpc):
    with pytest.raises(StoreUnavailable, match=r"at http://127\.0\.0\.1:1/x cannot be") as caught:
        QdrantStore(
            "c",
            url="http://user:password@127.0.0.1:1/x?key=value",
            api_key=KEY,
            prefer_grpc=prefer_grpc,
            timeout=2,
            client_options={"grpc_port": 1},
        )
    for secret in (KEY, "password", "value", "user"):
        assert secret not in str(caught.value)


def test_foreign_collections_are_left_alone():
    client = double()
    client.create_collection(
        "dense", vectors_config=models.VectorParams(size=2, distance=models.Distance.DOT)
    )
    with pytest.raises(StoreMismatch, match="not a collection of this library"):
        QdrantStore("dense", client=client)
    store = QdrantStore("ours", client=client)
    store.create(WIDTH)
    metadata = client.get_collection("ours").config.metadata
    for name, vectors, told in (
        ("gone", {"other": models.SparseVectorParams()}, "no sparse vector 'vdr'"),
        ("idf", {"vdr": models.SparseVectorParams(modifier=models.Modifier.IDF)}, "multiplies"),
    ):
        client.create_collection(
            name, vectors_config={}, sparse_vectors_config=vectors, metadata=metadata
        )
        with pytest.raises(StoreMismatch, match=told):
            QdrantStore(name, client=client)


def test_old_servers_keep_the_manifest_in_a_collection(monkeypatch):
    client = double()
    monkeypatch.setattr(server_module.ServerEngine, "_version", lambda self: (1, 12))
    store = QdrantStore("old", client=client, index_memory="cold")
    store.create(WIDTH, STAMP)
    store.upsert(rows(1), ["a"])
    assert client.get_collection("old").config.metadata is None
    index = client.get_collection("old").config.params.sparse_vectors["vdr"].index
    assert (index.on_disk, index.full_scan_threshold) == (True, 500)
    again = QdrantStore("old", client=client)
    assert (again.width, again.stamp, again.count()) == (WIDTH, STAMP, 1)


def test_what_is_asked_for_when_a_collection_is_made():
    client = double()
    store = QdrantStore(
        "options",
        client=client,
        datatype="uint8",
        full_scan_threshold=7,
        index_memory="cached",
        collection_options={"metadata": {"team": "search"}, "on_disk_payload": True},
    )
    store.create(WIDTH)
    config = client.get_collection("options").config
    vector = config.params.sparse_vectors["vdr"]
    assert (vector.modifier, vector.index.datatype) == (None, models.Datatype.UINT8)
    assert (vector.index.full_scan_threshold, vector.index.memory) == (7, models.Memory.CACHED)
    assert config.metadata["team"] == "search"
    assert config.metadata["vdr_db"]["width"] == WIDTH


class Picky:
    """A client's `upsert` that refuses batches with certain points, as a server does: whole."""

    def __init__(self, client, bad, error):
        self.write, self.bad, self.error = client.upsert, bad, error
        self.sizes: list[int] = []

    def __call__(self, name, points, **options):
        self.sizes.append(len(points))
        if any(point.payload["_vdr_id"] in self.bad for point in points):
            raise self.error
        return self.write(name, points=points, **options)


def refusal(status: int) -> Exception:
    from qdrant_client.http.exceptions import UnexpectedResponse

    return UnexpectedResponse(status, "reason", b"Format error in JSON body", None)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_a_server_refuses_is_found_and_named(monkeypatch, status):
    client = double()
    store = QdrantStore("picky", client=client)
    store.create(WIDTH)
    picky = Picky(client, {3, 40}, refusal(status))
    monkeypatch.setattr(client, "upsert", picky)
    with pytest.raises(RejectedRows, match="Format error") as caught:
        store.upsert(rows(50), list(range(50)))
    assert caught.value.ids == [3, 40]
    assert store.count() == 48
    assert len(picky.sizes) < 25


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_in_trouble_is_unavailable(monkeypatch, status):
    client = double()
    policy = RetryPolicy(tries=3, base_s=0.001)
    store = QdrantStore("trouble", client=client, retry=policy)
    store.create(WIDTH)
    picky = Picky(client, {3}, refusal(status))
    monkeypatch.setattr(client, "upsert", picky)
    with pytest.raises(StoreUnavailable, match="cannot be written"):
        store.upsert(rows(50), list(range(50)))
    assert picky.sizes == [50] * 3


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_plain_calls_survive_a_restart_of_two_seconds(tmp_path, protocol):
    from qdrant_contract_server import QdrantContractServer

    with (
        QdrantContractServer(tmp_path) as server,
        QdrantStore(
            "articles",
            url=server.url,
            prefer_grpc=protocol == "grpc",
            client_options={"grpc_port": server.grpc_port},
            retry=RetryPolicy(base_s=1.0, tries=12),
        ) as store,
    ):
        store.create(WIDTH)
        store.upsert(rows(5), list(range(5)))
        for call in (lambda: store.upsert(rows(5), list(range(5))), store.count):
            server.is_down = True
            timer = threading.Timer(2.0, setattr, (server, "is_down", False))
            timer.start()
            call()
            timer.join()
        assert store.count() == 5


def test_a_limit_of_rates_gets_smaller_requests(monkeypatch):
    client = double()
    store = QdrantStore("rates", client=client, retry=RetryPolicy(base_s=0.001))
    store.create(WIDTH)
    sizes, write = [], client.upsert

    def upsert(name, points, **options):
        sizes.append(len(points))
        if len(points) > 16:
            from qdrant_client.http.exceptions import UnexpectedResponse

            told = b"request larger than rate limiter capacity, please try to split your request"
            raise UnexpectedResponse(429, "reason", told, None)
        return write(name, points=points, **options)

    monkeypatch.setattr(client, "upsert", upsert)
    assert store.upsert(rows(50), list(range(50))).count == 50
    assert max(sizes[-1:]) <= 16
    assert store.count() == 50


def test_large_batches_are_split(monkeypatch):
    client = double()
    store = QdrantStore("split", client=client)
    store.create(WIDTH)
    picky = Picky(client, set(), None)
    monkeypatch.setattr(client, "upsert", picky)
    store.upsert(rows(600), list(range(600)))
    store.upsert(rows(5), list(range(5)), [{"text": "x" * (3 << 20)}] * 5)
    assert picky.sizes == [256, 256, 88, 1, 1, 1, 1, 1]


def test_the_client_must_be_one():
    with pytest.raises(ConfigError, match=r"must be a qdrant_client\.QdrantClient, got str"):
        QdrantStore("c", client="http://localhost")
    asynchronous = qdrant_client.AsyncQdrantClient(":memory:")
    with pytest.raises(ConfigError, match="got AsyncQdrantClient"):
        QdrantStore("c", client=asynchronous)
