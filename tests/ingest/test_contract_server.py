"""The contract server itself: the official client gets the embedded engine's answers from it."""

from __future__ import annotations

import json
import urllib.request

import numpy as np
import pytest
from faults import FaultPlan
from hashing_encoder import HashingEncoder
from qdrant_client import QdrantClient, models
from qdrant_contract_server import VERSION, QdrantContractServer

from vdr_db.connectors.memory import MemoryStore
from vdr_db.connectors.qdrant.store import QdrantStore


@pytest.fixture(params=["rest", "grpc"])
def client(request, tmp_path):
    with QdrantContractServer(tmp_path / "server") as server:
        client = QdrantClient(
            url=server.url,
            grpc_port=server.grpc_port,
            prefer_grpc=request.param == "grpc",
            timeout=5,
            check_compatibility=False,  # it asks from a thread of its own, in vain once we are done
        )
        yield client
        client.close()


def test_a_collection_lives_and_dies(client):
    assert not client.collection_exists("a")
    client.create_collection(
        "a",
        vectors_config={"dense": models.VectorParams(size=2, distance=models.Distance.DOT)},
        sparse_vectors_config={
            "vdr": models.SparseVectorParams(
                index=models.SparseIndexParams(
                    full_scan_threshold=500, datatype=models.Datatype.FLOAT32
                )
            )
        },
        metadata={"stamp": {"k": 1, "names": ["x"]}},
    )
    about = client.get_collection("a")
    assert about.config.metadata == {"stamp": {"k": 1, "names": ["x"]}}
    assert about.config.params.sparse_vectors["vdr"].index.full_scan_threshold == 500
    client.create_payload_index(
        "a", "tenant", field_schema=models.KeywordIndexParams(type="keyword", is_tenant=True)
    )
    client.create_payload_index("a", "year", field_schema="integer")
    assert set(client.get_collection("a").payload_schema) == {"tenant", "year"}
    client.update_collection_aliases(
        [
            models.CreateAliasOperation(
                create_alias=models.CreateAlias(collection_name="a", alias_name="now")
            )
        ]
    )
    assert client.collection_exists("now")
    assert [one.alias_name for one in client.get_aliases().aliases] == ["now"]
    assert client.info().version == VERSION
    client.delete_collection("a")
    assert not client.collection_exists("a")


def test_dense_and_sparse_meet_in_one_query(client):
    client.create_collection(
        "a",
        vectors_config={"dense": models.VectorParams(size=2, distance=models.Distance.DOT)},
        sparse_vectors_config={"vdr": models.SparseVectorParams()},
    )
    client.upsert(
        "a",
        [
            models.PointStruct(
                id=i,
                vector={
                    "vdr": models.SparseVector(indices=[1, i + 2], values=[1.0, 2.0]),
                    "dense": [float(i), 1.0],
                },
                payload={"n": i},
            )
            for i in range(6)
        ],
    )
    answer = client.query_points(
        "a",
        prefetch=[
            models.Prefetch(
                query=models.SparseVector(indices=[3], values=[1.0]), using="vdr", limit=3
            ),
            models.Prefetch(query=[1.0, 0.0], using="dense", limit=3),
        ],
        query=models.FusionQuery(fusion=models.Fusion.RRF),
        limit=2,
    )
    assert {point.id for point in answer.points} == {1, 5}


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_a_server_store_ranks_as_memory_does(tmp_path, protocol):
    encoder = HashingEncoder(24, width=600)
    rows = encoder.encode_documents([f"text {i}" for i in range(500)])
    queries = encoder.encode_documents([f"query {i}" for i in range(20)])
    ids = [i if i % 3 else f"d{i}" for i in range(500)]
    payloads = [
        {"year": 1990 + i % 30, "tags": ["even" if i % 2 == 0 else "odd"]} for i in range(500)
    ]
    with (
        QdrantContractServer(tmp_path / "server") as server,
        QdrantStore(
            "a",
            url=server.url,
            prefer_grpc=protocol == "grpc",
            client_options={"grpc_port": server.grpc_port},
            payload_indexes={"year": "integer"},
        ) as store,
        MemoryStore() as exact,
    ):
        for one in (store, exact):
            one.create(600, encoder.stamp())
            one.upsert(rows, ids, payloads)
        assert server.requests["upsert"] == 2  # 500 rows in batches of at most 256
        before = server.requests.copy()
        store.upsert(rows[:1], ids[:1], payloads[:1])
        assert server.requests - before == {"upsert": 1, "info": 1}, "one look before a write"
        for filter in (None, {"tags": "odd", "year": {"gte": 2000}}):
            for ours, truth in zip(
                store.search_batch(queries, 10, filter),
                exact.search_batch(queries, 10, filter),
                strict=True,
            ):
                np.testing.assert_allclose(
                    [hit.score for hit in ours], [hit.score for hit in truth], rtol=1e-6
                )
                assert [hit.id for hit in ours] == [hit.id for hit in truth]
        assert store.count({"tags": "odd"}) == 250
        assert store.delete([1, "d0", "never"]) == 2
        assert store.count() == 498
        again = QdrantStore(
            "a",
            url=server.url,
            prefer_grpc=protocol == "grpc",
            client_options={"grpc_port": server.grpc_port},
        )
        assert again.stamp == encoder.stamp()
        again.close()


def test_a_bad_point_fails_its_request_and_those_before_it_are_kept(client):
    client.create_collection(
        "a", vectors_config={}, sparse_vectors_config={"vdr": models.SparseVectorParams()}
    )
    good = models.PointStruct(id=1, vector={"vdr": models.SparseVector(indices=[1], values=[1.0])})
    bad = models.PointStruct(id=2, vector={"no": models.SparseVector(indices=[1], values=[1.0])})
    with pytest.raises(Exception, match="Not existing vector name"):
        client.upsert("a", [good, bad, models.PointStruct(id=3, vector={})])
    assert [point.id for point in client.retrieve("a", [1, 2, 3])] == [1]


def test_faults_repeat_from_their_seed(tmp_path):
    def drawn():
        plan = FaultPlan(rates={"503": 0.2, "slow": 0.1}, seed=7)
        return [plan.choose("upsert", 4) for _ in range(200)]

    assert drawn() == drawn()
    assert 20 < sum(fault == "503" for fault in drawn()) < 60
    burst = FaultPlan(bursts=(10, 3, "reset"))
    faults = [burst.choose("upsert", 4) for _ in range(20)]
    assert faults == ([None] * 7 + ["reset"] * 3) * 2
    assert burst.choose("create", 0) is None


def test_names_never_become_paths(tmp_path):
    with QdrantContractServer(tmp_path / "server") as server:
        body = json.dumps({"sparse_vectors": {"vdr": {}}}).encode()
        url = f"{server.url}/collections/..%2F..%2Foutside"
        request = urllib.request.Request(url, data=body, method="PUT")
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 200
        assert [path.name for path in tmp_path.iterdir()] == ["server"]
