"""Kill −9 at random moments of rebuilds and rollovers: the alias stays right, nothing is unlisted.

Each runs in a process of its own, forked from one that has imported everything. After each kill all
documents must be behind the name, which must take writes, and every numbered collection that is
not behind the name must be listed as a leftover.
"""

from __future__ import annotations

import random
import time

import pytest
import services
from forking import FORKS
from ingest_worker import make_store
from qdrant_contract_server import QdrantContractServer
from rebuild_worker import COUNT, ROWS, WIDTH, replace_forever, replace_once
from search_servers import note_real_server, remove_indices

KILLS = 22
pytestmark = pytest.mark.usefixtures("forks")


@pytest.fixture(params=["opensearch", "qdrant"])
def place(request, tmp_path):
    """A store of a kind, as the keywords of `make_store`."""
    if request.param == "opensearch":
        pytest.importorskip("opensearchpy")
        url = request.getfixturevalue("opensearch_url")
        note_real_server(request, services.version_of(url))
        place = {"opensearch": url, "name": services.unique_name()}
        yield place
        with make_store(place) as store:
            remove_indices(store)
        return
    with QdrantContractServer(tmp_path / "server") as server:
        yield {"url": server.url, "prefer_grpc": False, "versioned": True}


def kill_in_turn(place, kind, after_s):
    """Starts such work, and kills it some time after a turn began."""
    told, report = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=replace_forever, args=(place, kind, report))
    process.start()
    report.close()
    began = told.recv()
    time.sleep(max(0.0, began + after_s - time.monotonic()))
    process.kill()
    process.join(30)
    told.close()


def collections(store):
    """The one behind the name, and all numbered ones."""
    if hasattr(store, "transport"):
        there = store.transport.call("GET", f"/{store.name}-*/_alias").body
        store._index.forget()  # the alias may have moved since the store was opened
        return store._index.state().backing, set(there)
    versions = store._engine.versions
    there = {one.name for one in store._engine._client.get_collections().collections}
    return versions.target(store.name), {n for n in there if n.startswith(f"{store.name}-")}


def settled(store):
    """What is there once the server has carried out what the killed process asked last."""
    before, now = None, collections(store)
    while now != before:
        time.sleep(0.3)
        before, now = now, collections(store)
    return now


@pytest.mark.slow
def test_killed_while_a_collection_is_replaced(place):
    chance = random.Random(22)
    took = {}
    with make_store(place) as store:
        store.create(WIDTH)
        store.upsert(ROWS, list(range(COUNT)))
        for kind in ("rebuild", "rollover"):
            began = time.monotonic()
            replace_once(store, kind)
            took[kind] = time.monotonic() - began
    left = 0
    for turn in range(KILLS):
        kind = ("rebuild", "rollover")[turn % 2]
        kill_in_turn(place, kind, chance.uniform(0, 1.2) * took[kind])
        with make_store(place) as store:
            assert store.count() == COUNT
            assert store.upsert(ROWS[turn], [turn]).count == 1
            assert store.search(ROWS[turn], COUNT)[-1].score > 0
            live, there = settled(store)
            leftovers = store.leftovers()
            assert there == {live, *leftovers}, (kind, turn)
            left += len(leftovers)
            if turn % 3 == 0:
                assert store.remove_leftovers() == list(leftovers)
                assert collections(store) == (live, {live})
    assert left > 0  # at least some kills came in the middle
