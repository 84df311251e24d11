"""`repr` never raises: of what is open, closed, gone, or holds odd things."""

from __future__ import annotations

import shutil

import pytest
import services

from vdr_db.budget import Budget
from vdr_db.connectors import (
    AsyncCollection,
    Collection,
    MemoryStore,
    QdrantStore,
    VDRElasticsearch,
    VDRQdrant,
)
from vdr_db.connectors.passages import Passages
from vdr_db.errors import StoreError
from vdr_db.sparse import SparseRows
from vdr_db.stamp import EncoderStamp

ROWS = SparseRows.from_dicts([{1: 1.0}, {}], 9)


def told(*objects):
    for one in objects:
        assert type(one).__name__ in repr(one)
        assert str(one)


def test_plain_objects():
    told(ROWS, ROWS[:0], SparseRows.empty(0, 1), Budget(), Passages())
    told(EncoderStamp("\ud800\0", "", "all", "mlm", "none"))


def test_collections_that_are_open_closed_and_gone(tmp_path):
    folder = tmp_path / "c"
    memory, store = MemoryStore("\ud800"), QdrantStore("documents", path=folder)
    collection = Collection(memory)
    waiting = AsyncCollection(lambda: Collection(memory))
    opened = VDRQdrant("d", encoder="no such model", path=":memory:")
    objects = (memory, store, collection, waiting, AsyncCollection(collection), opened)
    told(*objects)
    for one in (memory, store):
        one.create(9)
        one.upsert(ROWS, ["a", 2])
    told(*objects)
    shutil.rmtree(folder)
    told(store)
    with pytest.raises(StoreError):
        store.close()  # what it would flush has no place
    for one in (memory, store, opened):
        one.close()
    told(*objects)


def test_servers_that_went_away(tmp_path, request):
    client = pytest.importorskip("qdrant_client")
    from qdrant_contract_server import QdrantContractServer

    with QdrantContractServer(tmp_path / "server") as server:
        place = {"url": server.url, "prefer_grpc": False}
        store = QdrantStore("documents", **place)
        collection = VDRQdrant("documents", **place)
        store.create(9)
        direct = client.QdrantClient(url=server.url, check_compatibility=False)
        given = QdrantStore("documents", client=direct)
        told(store, collection, given)
    told(store, collection, given)
    for one in (store, collection, given):
        one.close()
    told(store, collection, given)
    search = request.getfixturevalue("noida_server")
    index = VDRElasticsearch(services.unique_name(), replicas=0, **search.options())
    told(index, index.store)
    search.proxy.decide = lambda _: "reset"
    try:
        told(index, index.store)
    finally:
        search.proxy.decide = None
        search.proxy.clear()
    index.close()
    told(index, index.store)


def test_encoders_of_folders_that_are_gone(tmp_path):
    pytest.importorskip("torch")
    from image_folders import write_cross_modal

    from vdr_db import CrossModalEncoder

    folder = write_cross_modal(tmp_path / "m")
    both = CrossModalEncoder.from_pretrained(folder, device="cpu")
    shutil.rmtree(folder)
    told(both, both.text, both.image, both.vocabulary, both.text.tokenizer)
    both.model = both.text.model = "\ud800"
    told(both, both.text)
