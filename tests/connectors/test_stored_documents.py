"""Documents that are there: pages, payloads without encoding, least scores; and names made anew.

On every kind of store: memory, embedded, Qdrant by REST and gRPC, Elasticsearch, OpenSearch.
"""

from __future__ import annotations

import asyncio
import contextlib
import warnings

import pytest
import services
from search_servers import on_opensearch, remove_indices
from store_samples import WIDTH, WordEncoder, row, rows

from vdr_db.connectors import AsyncCollection, Collection, MemoryStore, QdrantStore
from vdr_db.connectors import store as stores
from vdr_db.connectors.elasticsearch.store import ElasticsearchStore
from vdr_db.errors import ConfigError, InputError, StoreError, StoreMismatch
from vdr_db.sparse import SparseRows
from vdr_db.stamp import EncoderStamp

pytestmark = pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection")
KINDS = ("memory", "edge", "rest", "grpc", "Elasticsearch", "OpenSearch")
SERVERS = KINDS[2:]
STAMP = EncoderStamp("one", "tokens", "all", "mlm", "log1p_relu")
OTHER = EncoderStamp("other", "other tokens", "all", "mlm", "log1p_relu")


@pytest.fixture(scope="module")
def qdrant(tmp_path_factory):
    pytest.importorskip("qdrant_client")
    from qdrant_contract_server import QdrantContractServer

    with QdrantContractServer(tmp_path_factory.mktemp("qdrant")) as server:
        yield server


@contextlib.contextmanager
def opener(kind, request, name):
    """Opens handles of one name in a store of a kind."""
    with contextlib.ExitStack() as kept:
        if kind in ("Elasticsearch", "OpenSearch"):
            server = "noida_server" if kind == "Elasticsearch" else "opensearch_server"
            place = request.getfixturevalue(server).options()

            def open_one(**more):
                store = ElasticsearchStore(name, replicas=0, **place, **more)
                return kept.enter_context(store)

            kept.callback(lambda: remove_indices(open_one()))
        else:
            server = request.getfixturevalue("qdrant")
            place = {"url": server.url, "prefer_grpc": kind == "grpc"}
            place["client_options"] = {"grpc_port": server.grpc_port}

            def open_one(**more):
                return kept.enter_context(QdrantStore(name, **place, **more))

        yield open_one


@pytest.fixture(params=KINDS)
def store(request):
    """A new store with the width of the samples."""
    with contextlib.ExitStack() as kept:
        if request.param == "memory":
            made = kept.enter_context(MemoryStore())
        elif request.param == "edge":
            made = kept.enter_context(QdrantStore("c", path=":memory:"))
        elif request.param == "OpenSearch":
            made = kept.enter_context(on_opensearch(request))
        else:
            name = services.unique_name()
            made = kept.enter_context(opener(request.param, request, name))()
        made.create(WIDTH, STAMP)
        yield made


def all_pages(store, limit, filter=None):
    records, after = [], None
    while True:
        page = store.scroll(limit, filter, after)
        assert len(page.records) <= limit
        records += page.records
        if page.next is None:
            return records
        after = page.next


def test_pages_hold_every_document_once_in_the_order_of_the_ids(store):
    ids = [*range(11), *(f"doc {i}" for i in range(12))]
    store.upsert(rows(23), ids, [{"even": i % 2 == 0, "n": i} for i in range(23)])
    for limit in (1, 5, 23, 100):
        found = all_pages(store, limit)
        assert [one.id for one in found] == list(store.ids())
        assert {one.id: one.payload["n"] for one in found} == dict(zip(ids, range(23), strict=True))
    even = all_pages(store, 4, {"even": True})
    assert [one.id for one in even] == list(store.ids({"even": True}))
    assert len(even) == 12
    assert store.scroll(5, {"n": -1}).records == []
    for wrong in ("elsewhere", ""):
        with pytest.raises(InputError, match="must be the `next` of a page"):
            store.scroll(5, None, wrong)
    with pytest.raises(ConfigError, match="limit"):
        store.scroll(0)


def test_payloads_change_and_vectors_stay(store):
    some, ids = rows(6), [*range(5), "six"]
    store.upsert(some, ids, [{"a": {"x": 1, "y": 2}, "b": i} for i in range(6)])
    told = [{"a": {"x": 3}}, {"a": {"x": 3}}, {"c": "new"}, {"d": 1}]
    assert store.update_payloads([0, "six", 2, "unknown"], told) == 3
    found = {one.id: one for one in store.get(ids, with_rows=True)}
    assert found[0].payload == {"a": {"x": 3}, "b": 0}
    assert found["six"].payload == {"a": {"x": 3}, "b": 5}
    assert found[2].payload == {"a": {"x": 1, "y": 2}, "b": 2, "c": "new"}
    assert found[1].payload == {"a": {"x": 1, "y": 2}, "b": 1}
    assert [found[id].row for id in ids] == list(some)
    assert store.count() == 6
    assert store.count({"a.x": 3}) == 2
    assert store.count({"a.y": 2}) == 4
    assert {hit.id for hit in store.search(some[2], 9, {"c": "new"})} == {2}
    assert store.update_payloads([], []) == 0
    for wrong, told in (
        (([0, 0], [{}, {}]), "twice"),
        (([0], []), "each id needs a payload"),
        (([0], [{"_vdr_id": 1}]), "belong to the library"),
        (([0], [{"x": float("nan")}]), "JSON cannot hold"),
    ):
        with pytest.raises(InputError, match=told):
            store.update_payloads(*wrong)


def test_changed_payloads_pass_the_check_of_a_folder(tmp_path):
    with QdrantStore("c", path=tmp_path / "c") as store:
        store.create(WIDTH)
        store.upsert(rows(6), list(range(6)), [{"n": i} for i in range(6)])
        assert store.update_payloads([1, 4], [{"n": 9}, {"m": "new"}]) == 2
        assert store.update_payloads([4], [{"n": 7}]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with QdrantStore("c", path=tmp_path / "c") as store:
            assert store.get([4])[0].payload == {"n": 7, "m": "new"}
            damage = store._engine.damage()
            assert (damage.rows, damage.without, list(damage.damaged)) == (6, 0, [])


def test_least_scores_and_pages_of_batches(store):
    # No two scores of a query are equal, and all have 8 bits, which Elasticsearch keeps.
    some = SparseRows.from_dicts([{1: 1.0 + i / 128, 2 + i: 1.0} for i in range(12)], WIDTH)
    store.upsert(some, list(range(12)))
    whole = store.search_batch(some, 12)
    for query, hits in zip(some, whole, strict=True):
        least = hits[len(hits) // 2].score
        better = [hit for hit in hits if hit.score >= least]
        assert store.search(query, 12, min_score=least) == better
    assert store.search_batch(some, 4, None, 3) == [hits[3:7] for hits in whole]
    least = whole[0][1].score
    kept = store.search_batch(some, 12, min_score=least)
    assert kept == [[hit for hit in hits if hit.score >= least] for hits in whole]


@pytest.mark.parametrize("kind", SERVERS)
def test_a_handle_notices_that_its_name_was_made_anew(request, monkeypatch, kind):
    """Dropped and made again by another process for another model: writes at once, reads soon."""
    with opener(kind, request, services.unique_name()) as open_one:
        store, other = open_one(), open_one()
        store.create(WIDTH, STAMP)
        store.upsert(rows(3), [1, 2, 3])
        assert store.search(rows(3)[0])
        drop(other)
        with pytest.raises(StoreError, match="is gone"):
            store.upsert(rows(1), [4])
        open_one().create(WIDTH, OTHER)
        for write in (
            lambda: store.upsert(rows(1), [4]),
            lambda: store.delete([1]),
            lambda: store.update_payloads([1], [{"x": 1}]),
        ):
            with pytest.raises(
                StoreMismatch, match="made anew since it was opened here: tokenizer"
            ):
                write()
        monkeypatch.setattr(stores, "TRUSTED_S", 0.0)
        with pytest.raises(StoreMismatch, match="open it again, with the model it is of now"):
            store.search(rows(1)[0])
        drop(open_one())
        open_one().create(WIDTH, STAMP)
        assert store.upsert(rows(2), [7, 8]).count == 2  # of the same model: as if never dropped
        assert {hit.id for hit in store.search(rows(2)[0])} == {7, 8} & {
            hit.id for hit in open_one().search(rows(2)[0])
        }


def drop(store):
    if isinstance(store, ElasticsearchStore):
        remove_indices(store)
    else:
        store._engine.versions.drop(store.name)


@pytest.mark.parametrize("kind", SERVERS)
def test_a_rebuild_for_another_model_is_noticed_elsewhere_and_not_here(request, kind):
    name, more = services.unique_name(), {}
    with opener(kind, request, name) as open_one:
        if kind in ("rest", "grpc"):
            more["versioned"] = True
        store = open_one(**more)
        store.create(WIDTH, STAMP)
        store.upsert(rows(3), [1, 2, 3])
        other = open_one()
        assert other.count() == 3
        with store.rebuild(stamp=OTHER) as fresh:
            fresh.upsert(rows(2), [1, 2])
        assert store.upsert(rows(1), [9]).count == 1
        with pytest.raises(StoreMismatch, match="made anew"):
            other.upsert(rows(1), [4])
        with contextlib.suppress(StoreError):
            store.remove_leftovers()


def test_a_collection_changes_payloads_and_pages_awaited_as_well():
    with Collection(MemoryStore(), WordEncoder()) as articles:
        articles.add_texts(["chess", "kings", "paris"], ["a", "b", "c"], [{"n": 1}] * 3)
        assert articles.update_payloads(["a", "c"], [{"n": 2}, {"read": True}]) == 2
        assert articles.search("chess")[0].payload == {"n": 2, "text": "chess"}
        with pytest.raises(InputError, match="is the text its vector is made of"):
            articles.update_payloads(["a"], [{"text": "go"}])
        page = articles.scroll(2)
        assert [one.id for one in page.records] == ["a", "b"]
        assert [one.id for one in articles.scroll(2, after=page.next).records] == ["c"]
        assert articles.search("chess", min_score=1e9) == []
        assert articles.search_batch(["chess", "paris"], 1, offset=1) == [[], []]

        async def awaited():
            async with AsyncCollection(articles) as same:
                assert await same.update_payloads(["b"], [{"n": 5}]) == 1
                assert (await same.scroll(1, {"n": 5})).records[0].id == "b"

        asyncio.run(awaited())


def test_an_empty_query_still_has_no_hits(store):
    store.upsert(rows(2), [1, 2])
    assert store.search(row({}), 3, min_score=0.0) == []
