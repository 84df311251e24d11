"""Points built as protobuf messages: on the wire they are what the client itself would send."""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_samples import WIDTH, rows

from vdr_db.connectors import AsyncVDRQdrant, QdrantStore
from vdr_db.connectors.halving import RefusedBatch
from vdr_db.connectors.qdrant.engine import Batch
from vdr_db.connectors.qdrant.messages import PointMessages
from vdr_db.connectors.qdrant.requests import Requests
from vdr_db.errors import RejectedRows
from vdr_db.sparse import SparseRows

qdrant_client = pytest.importorskip("qdrant_client")
from qdrant_client import grpc, models  # noqa: E402
from qdrant_client.conversions.conversion import RestToGrpc  # noqa: E402

CAN_PASS = (
    "sparse" in grpc.Vector.DESCRIPTOR.fields_by_name
    and PointMessages(grpc, RestToGrpc)._is_exact()
)
needs_pass = pytest.mark.skipif(
    not CAN_PASS, reason="this qdrant-client sends sparse vectors in the form before 1.16"
)

ids = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 2**64 - 1]), st.uuids().map(str))
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=20),
    st.datetimes(timezones=st.sampled_from([None, dt.timezone.utc])),
    st.dates(),
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)
payloads = st.dictionaries(st.text(max_size=8), values, max_size=5)
weights = st.floats(2.0**-99, 2.0**127, width=32)
LARGEST = 2**31 - 2
tokens = st.one_of(
    st.integers(0, 300),
    st.integers(0, LARGEST),
    st.sampled_from([0, 127, 128, 16383, 16384, 2**21 - 1, 2**21, 2**28 - 1, 2**28, LARGEST]),
)


@st.composite
def batches(draw):
    """Points, rows, payloads and dense vectors of one batch; empty rows and batches too."""
    vectors = draw(st.lists(st.dictionaries(tokens, weights, max_size=40), max_size=5))
    count = len(vectors)
    sizes = draw(st.dictionaries(st.sampled_from(["", "text", "image", "ü"]), st.integers(1, 40)))
    number = st.floats(-(2.0**100), 2.0**100, width=32)
    dense = {
        name: np.array(
            [draw(st.lists(number, min_size=size, max_size=size)) for _ in range(count)], np.float32
        ).reshape(count, size)
        for name, size in sizes.items()
    }
    return (
        [draw(ids) for _ in range(count)],
        SparseRows.from_dicts(vectors, LARGEST + 1),
        [draw(payloads) for _ in range(count)],
        dense,
    )


def wire(points):
    """Bytes of a request; fields of a map in sorted order, which is free otherwise."""
    request = grpc.UpsertPoints(collection_name="c", wait=True, points=points)
    return request.SerializeToString(deterministic=True)


@needs_pass
@settings(max_examples=150, deadline=None)
@given(batches(), st.sampled_from(["vdr", "", "größe"]))
def test_the_bytes_are_those_of_the_clients_own_conversion(batch, name):
    points, vectors, contents, dense = batch
    dense = {key: column for key, column in dense.items() if key != name}
    batch = Batch(points, points, vectors, contents, dense, 0)
    models_of = Requests(models, name).points(batch)
    converted = [RestToGrpc.convert_point_struct(point) for point in models_of]
    built = PointMessages(grpc, RestToGrpc).points(batch, name)
    assert wire(built) == wire(converted)


@needs_pass
def test_a_slice_of_rows_is_laid_out_like_the_whole():
    many = rows(300, seed=3)
    builder, ids = PointMessages(grpc, RestToGrpc), list(range(300))
    batch = Batch(ids, ids, many, [{} for _ in ids], {}, 0)
    assert builder.points(batch[100:200], "v") == builder.points(batch, "v")[100:200]


@pytest.fixture
def server(tmp_path):
    from qdrant_contract_server import QdrantContractServer

    with QdrantContractServer(tmp_path / "server") as server:
        yield server


def options_of(server, protocol):
    return {
        "url": server.url,
        "grpc_port": server.grpc_port,
        "prefer_grpc": protocol == "grpc",
        "timeout": 20,
        "check_compatibility": False,
    }


def sent_by(monkeypatch, client):
    """The requests a client hands to its gRPC stub from now on."""
    seen = []
    stub = client.grpc_points
    real = stub.Upsert

    def upsert(request, **options):
        seen.append((request.SerializeToString(deterministic=True), options))
        return real(request, **options)

    # A client may have several stubs and take them in turn.
    monkeypatch.setattr(stub, "Upsert", upsert)
    monkeypatch.setattr(type(client._client), "grpc_points", property(lambda _: stub))
    return seen


CONTENTS = [{"n": i, "t": [None, {"deep": 0.5}], "text": f"größer {i}"} for i in range(20)]
IDS = [*range(10), *(f"id {i}" for i in range(9)), str(uuid.UUID(int=2**100, version=4))]


@needs_pass
def test_what_a_store_sends_is_the_same_either_way(server, monkeypatch):
    client = qdrant_client.QdrantClient(**options_of(server, "grpc"))
    store = QdrantStore("c", client=client, dense={"text": 3})
    store.create(WIDTH)
    seen = sent_by(monkeypatch, client)
    dense = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    many = SparseRows.concat([rows(19), SparseRows.empty(1, WIDTH)])
    requests = store._engine._requests
    assert requests._messages is not None
    store.upsert(many, IDS, CONTENTS, dense={"text": dense})
    monkeypatch.setattr(requests, "_messages", None)
    store.upsert(many, IDS, CONTENTS, dense={"text": dense})
    first, second = seen
    assert first == second
    assert store.get(IDS, True)[3].payload == CONTENTS[3]
    client.close()


@needs_pass
def test_the_asynchronous_collection_sends_them_too(server, monkeypatch):
    QdrantStore("c", url=server.url, client_options={"grpc_port": server.grpc_port}).create(WIDTH)

    async def main():
        client = qdrant_client.AsyncQdrantClient(**options_of(server, "grpc"))
        async with AsyncVDRQdrant("c", client=client) as collection:
            engine = collection._collection.store._engine
            seen, requests = sent_by(monkeypatch, engine._client), engine._requests
            assert requests._messages is not None
            await collection.add_rows(rows(20), IDS, CONTENTS)
            monkeypatch.setattr(requests, "_messages", None)
            await collection.add_rows(rows(20), IDS, CONTENTS)
        await client.close()
        return seen

    first, second = asyncio.run(main())
    assert first == second


def test_other_clients_get_their_models(server):
    rest = qdrant_client.QdrantClient(**options_of(server, "rest"))
    assert PointMessages.of(rest) is None
    # Its options say gRPC, but nothing of the kind takes place in it.
    assert PointMessages.of(qdrant_client.QdrantClient(":memory:", prefer_grpc=True)) is None
    assert PointMessages.of(None) is None
    rest.close()


@needs_pass
def test_a_client_that_converts_otherwise_gets_its_models(server, monkeypatch):
    client = qdrant_client.QdrantClient(**options_of(server, "grpc"))
    assert PointMessages.of(client) is not None
    with monkeypatch.context() as patch:
        convert = RestToGrpc.convert_point_struct
        patch.setattr(
            RestToGrpc,
            "convert_point_struct",
            lambda model: convert(model.model_copy(update={"payload": None})),
        )
        assert PointMessages.of(client) is None
    with monkeypatch.context() as patch:
        patch.delattr(grpc, "SparseVector")
        assert PointMessages.of(client) is None
        store = QdrantStore("c", client=client)
    store.create(WIDTH)
    assert store._engine._requests._messages is None
    store.upsert(rows(20), IDS, CONTENTS)
    assert store.count() == 20
    client.close()


@needs_pass
def test_a_number_too_large_for_grpc_takes_no_neighbour_with_it(server):
    with pytest.raises(RefusedBatch, match="payload cannot be sent"):
        PointMessages(grpc, RestToGrpc).points(Batch([1], [1], rows(1), [{"n": 2**63}], {}, 0), "v")
    options = {"grpc_port": server.grpc_port}
    with QdrantStore("c", url=server.url, client_options=options) as store:
        store.create(WIDTH)
        contents = [{"n": 2**63 if i in (3, 17) else i} for i in range(20)]
        with pytest.raises(RejectedRows, match="64 bits with a sign") as caught:
            store.upsert(rows(20), list(range(20)), contents)
        assert caught.value.ids == [3, 17]
        assert store.count() == 18
