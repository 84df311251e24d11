"""What a server is asked for when a collection is made, opened, filtered and searched.

Through the real client over REST and gRPC against our server in front of the embedded engine, which
keeps what it was told. Only a real server proves that it does the same with it.
"""

from __future__ import annotations

import pytest
from store_samples import WIDTH, rows

from vdr_db.connectors import QdrantStore, VDRQdrant
from vdr_db.connectors.qdrant import server as server_module
from vdr_db.errors import ConfigError
from vdr_db.stamp import EncoderStamp

qdrant_client = pytest.importorskip("qdrant_client")
models = qdrant_client.models

STAMP = EncoderStamp("model", "tokens", "all", "mlm", "log1p_relu")
KEY = "a-secret-key-4711"


@pytest.fixture
def server(tmp_path):
    from qdrant_contract_server import QdrantContractServer

    with QdrantContractServer(tmp_path / "server", api_key=KEY) as server:
        yield server


@pytest.fixture(params=["rest", "grpc"])
def place(request, server):
    """Arguments of a store on the server, by address and key."""
    return {
        "url": server.url,
        "api_key": KEY,
        "prefer_grpc": request.param == "grpc",
        "client_options": {"grpc_port": server.grpc_port},
    }


pytestmark = pytest.mark.filterwarnings("ignore:Api key is used with an insecure")


def about(store):
    return store._engine._client.get_collection(store.name)


def test_an_address_and_a_key_or_a_ready_client(place, server):
    with VDRQdrant("places", **place) as articles:
        articles.add_rows(rows(2), ["a", "b"])
    client = qdrant_client.QdrantClient(
        url=server.url,
        api_key=KEY,
        grpc_port=server.grpc_port,
        prefer_grpc=place["prefer_grpc"],
        check_compatibility=False,
    )
    assert VDRQdrant("places", client=client).count() == 2
    client.close()


def test_grpc_is_preferred(server):
    options = {"grpc_port": server.grpc_port}
    with QdrantStore("c", url=server.url, api_key=KEY, client_options=options) as store:
        store.create(WIDTH)
        store.upsert(rows(1), ["a"])
        # Nothing of the above needed the REST port.
        assert store._engine._client.init_options["prefer_grpc"] is True
        server._http.shutdown()
        assert store.count() == 1
        assert len(store.search(rows(1)[0])) == 1


@pytest.mark.parametrize("datatype", ["float32", "float16", "uint8"])
def test_datatype_threshold_and_no_idf(place, datatype):
    with QdrantStore("c", datatype=datatype, full_scan_threshold=321, **place) as store:
        store.create(WIDTH)
        vector = about(store).config.params.sparse_vectors["vdr"]
        assert vector.index.datatype == models.Datatype(datatype)
        assert vector.index.full_scan_threshold == 321
        assert vector.modifier in (None, models.Modifier.NONE)


def test_the_threshold_is_low_by_default(place):
    with QdrantStore("c", **place) as store:
        store.create(WIDTH)
        assert about(store).config.params.sparse_vectors["vdr"].index.full_scan_threshold == 500


@pytest.mark.parametrize(
    ("version", "told"),
    [
        ((1, 20), {"memory": models.Memory.COLD, "on_disk": None}),
        ((1, 18), {"memory": None, "on_disk": True}),
    ],
)
def test_where_the_index_lives_is_said_in_the_words_of_the_server(
    place, version, told, monkeypatch
):
    monkeypatch.setattr(server_module.ServerEngine, "_version", lambda self: version)
    with QdrantStore("c", index_memory="cold", **place) as store:
        store.create(WIDTH)
        index = about(store).config.params.sparse_vectors["vdr"].index
        assert {name: getattr(index, name) for name in told} == told


def test_shards_tenants_and_indexes_before_the_load(place, server):
    order = []
    for name in ("create", "create_index", "upsert"):
        call = getattr(server.engine, name)

        def noting(*given, call=call, name=name):
            order.append(name)
            return call(*given)

        setattr(server.engine, name, noting)
    kinds = {"owner": "tenant", "year": "integer", "tag": "keyword", "seen": "datetime"}
    with QdrantStore(
        "c", payload_indexes=kinds, collection_options={"shard_number": 4}, **place
    ) as store:
        store.create(WIDTH)
        store.upsert(rows(2), ["a", "b"], [{"owner": "x", "year": 2000}] * 2)
        assert order == ["create", *["create_index"] * 4, "upsert"]
        info = about(store)
        assert info.config.params.shard_number == 4
        assert info.payload_schema["owner"].params.is_tenant is True
        assert {name: str(one.data_type.value) for name, one in info.payload_schema.items()} == {
            "owner": "keyword",
            "year": "integer",
            "tag": "keyword",
            "seen": "datetime",
        }
        assert store.count({"owner": "x", "year": {"gte": 2000}}) == 2


def test_an_index_that_a_killed_process_did_not_make_is_made_at_the_next_opening(place):
    with QdrantStore("c", payload_indexes={"n": "integer"}, **place) as store:
        store.create(WIDTH)
        store._engine._client.delete_payload_index("c", "n")
        assert not about(store).payload_schema
        with QdrantStore("c", **place) as again:
            assert set(about(again).payload_schema) == {"n"}


def test_filters_as_dictionaries_or_as_qdrants_own(place):
    with QdrantStore("c", **place) as store:
        store.create(WIDTH)
        store.upsert(rows(20), list(range(20)), [{"n": i % 4} for i in range(20)])
        own = models.Filter(
            must=[models.FieldCondition(key="n", match=models.MatchValue(value=2))],
            must_not=[models.HasIdCondition(has_id=[2])],
        )
        assert (store.count({"n": 2}), store.count(own)) == (5, 4)
        kept = {hit.id for hit in store.search(rows(20)[2], 20, own)}
        assert kept == {hit.id for hit in store.search(rows(20)[2], 20, {"n": 2})} - {2}
        assert kept == {hit.id for hit in store.search_batch(rows(20)[2:3], 20, own)[0]}


def test_many_queries_in_one_request(place, server):
    with QdrantStore("c", **place) as store:
        store.create(WIDTH)
        store.upsert(rows(30), list(range(30)))
        before = server.requests.copy()
        assert len(store.search_batch(rows(30, seed=2), 5)) == 30
        assert server.requests - before == {"query_batch": 1}


def test_the_stamp_is_in_the_metadata_beside_the_callers(place):
    with QdrantStore("c", collection_options={"metadata": {"team": "search"}}, **place) as store:
        store.create(WIDTH, STAMP)
        metadata = about(store).config.metadata
        assert metadata["team"] == "search"
        assert EncoderStamp.from_dict(metadata["vdr_db"]["stamp"]) == STAMP
        assert metadata["vdr_db"]["width"] == WIDTH
        with QdrantStore("c", **place) as again:
            assert again.stamp == STAMP


@pytest.mark.parametrize(
    "options", [{"versioned": True}, {"vector_name": "x"}, {"index_memory": "cold"}]
)
def test_what_only_a_server_can_do_is_told(options):
    with pytest.raises(ConfigError, match="goes with `url` or `client`"):
        QdrantStore("c", path=":memory:", **options)
