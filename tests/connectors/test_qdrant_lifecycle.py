"""Rebuilding a collection on a server behind its alias, over REST and gRPC.

The server is ours in front of the embedded engine. Only a real one proves that it applies the two
alias changes of one request as one, on all nodes.
"""

from __future__ import annotations

import threading

import pytest
from store_samples import WIDTH, WordEncoder, row, rows

from vdr_db.connectors import QdrantStore, VDRQdrant
from vdr_db.errors import ConfigError, StoreError, StoreMismatch, StoreUnavailable
from vdr_db.stamp import EncoderStamp

qdrant_client = pytest.importorskip("qdrant_client")
models = qdrant_client.models

STAMP = EncoderStamp("model", "tokens", "all", "mlm", "log1p_relu")


@pytest.fixture
def server(tmp_path):
    from qdrant_contract_server import QdrantContractServer

    with QdrantContractServer(tmp_path / "server") as server:
        yield server


@pytest.fixture(params=["rest", "grpc"])
def client(request, server):
    client = qdrant_client.QdrantClient(
        url=server.url,
        grpc_port=server.grpc_port,
        prefer_grpc=request.param == "grpc",
        check_compatibility=False,
        timeout=20,
    )
    yield client
    client.close()


def versioned(client, **options):
    return QdrantStore("articles", client=client, versioned=True, **options)


def filled(client, count=20, **options):
    store = versioned(client, **options)
    store.create(WIDTH, STAMP)
    store.upsert(rows(count), list(range(count)), [{"n": i, "owner": "a"} for i in range(count)])
    return store


def target_of(client, name="articles"):
    return next(a.collection_name for a in client.get_aliases().aliases if a.alias_name == name)


def names(client):
    return sorted(one.name for one in client.get_collections().collections)


def test_the_name_is_an_alias_of_a_numbered_collection(client):
    store = filled(client)
    assert (names(client), target_of(client)) == (["articles-000001"], "articles-000001")
    again = QdrantStore("articles", client=client)
    assert (again.width, again.stamp, again.count()) == (WIDTH, STAMP, 20)
    assert again.search(row({1: 1.0})) == store.search(row({1: 1.0}))


def test_a_rebuild_shows_all_of_the_old_or_all_of_the_new(client, server):
    store = filled(client, payload_indexes={"owner": "tenant"})
    seen, done = set(), threading.Event()

    def watch():
        while not done.is_set():
            seen.add(client.count("articles", exact=True).count)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with store.rebuild(expected=7) as fresh:
        assert fresh.name == "articles-000002"
        # Indexes are there before anything is loaded.
        assert set(client.get_collection(fresh.name).payload_schema) == {"owner"}
        fresh.upsert(rows(7, seed=3), list(range(7)))
        assert (fresh.count(), store.count()) == (7, 20)
    done.set()
    watcher.join()
    assert seen <= {20, 7}
    assert server.requests["change_aliases"] == 2  # one when it was made, one for the swap
    assert (names(client), target_of(client)) == (["articles-000002"], "articles-000002")
    assert store.count() == 7
    schema = client.get_collection("articles").payload_schema["owner"]
    assert schema.params.is_tenant is True
    with pytest.raises(StoreError, match="is closed"):
        fresh.count()


def test_the_alias_moves_in_one_request(client, monkeypatch):
    store, asked = filled(client), []
    change = client.update_collection_aliases

    def noting(change_aliases_operations, **options):
        asked.append(change_aliases_operations)
        return change(change_aliases_operations=change_aliases_operations, **options)

    monkeypatch.setattr(client, "update_collection_aliases", noting)
    with store.rebuild(keep_old=True) as fresh:
        fresh.upsert(rows(3), [1, 2, 3])
    [(gone, made)] = asked
    assert gone.delete_alias.alias_name == made.create_alias.alias_name == "articles"
    assert made.create_alias.collection_name == "articles-000002"
    assert names(client) == ["articles-000001", "articles-000002"]
    assert client.count("articles-000001").count == 20


def test_what_goes_wrong_changes_nothing(client):
    store = filled(client)
    with (
        pytest.raises(StoreError, match="must have 8 documents, got 7; the alias stays"),
        store.rebuild(expected=8) as fresh,
    ):
        fresh.upsert(rows(7), list(range(7)))
    with pytest.raises(RuntimeError, match="stop"), store.rebuild() as fresh:
        raise RuntimeError("stop")
    assert (names(client), target_of(client), store.count()) == (
        ["articles-000001"],
        "articles-000001",
        20,
    )


def test_two_rebuilds_at_once_end_with_one_winner(client):
    store, other = filled(client), versioned(client)

    def both():
        with store.rebuild() as slow:
            slow.upsert(rows(1), [1])
            with other.rebuild() as fast:
                fast.upsert(rows(2), [1, 2])

    with pytest.raises(StoreError, match="someone else rebuilt it meanwhile"):
        both()
    assert (target_of(client), other.count()) == ("articles-000003", 2)
    assert names(client) == ["articles-000003"]


def test_a_lost_answer_to_the_swap_is_looked_up(client, server):
    store = filled(client)
    with store.rebuild() as fresh:
        fresh.upsert(rows(2), [1, 2])
        server.faults.rates = {"lost_ack": 1.0}
        server.faults.operations = ("change_aliases",)
    assert (target_of(client), store.count()) == ("articles-000002", 2)


def test_a_swap_that_is_refused_keeps_both_collections(client, server):
    store = filled(client)

    def refused():
        with store.rebuild() as fresh:
            fresh.upsert(rows(2), [1, 2])
            server.faults.rates = {"503": 1.0}
            server.faults.operations = ("change_aliases",)

    with pytest.raises(StoreUnavailable, match="cannot get its alias"):
        refused()
    assert (target_of(client), store.count()) == ("articles-000001", 20)
    assert names(client) == ["articles-000001", "articles-000002"]


def test_another_model_takes_the_name_over(client):
    old, new = WordEncoder(), WordEncoder("new", tokens=("[PAD]", "chess", "kings", "theory"))
    with VDRQdrant("articles", old, client=client, versioned=True) as articles:
        articles.add_texts(["Einstein published the theory", "chess of kings"], ["e", "c"])
        with articles.rebuild(new, expected=2) as fresh:
            fresh.add_texts(["Einstein published the theory", "chess of kings"], ["e", "c"])
        assert [hit.id for hit in articles.search("kings")] == ["c"]
        assert articles.store.width == 4
    with pytest.raises(StoreMismatch, match="cannot be opened"):
        VDRQdrant("articles", old, client=client)
    assert VDRQdrant("articles", new, client=client).count() == 2


def test_rollover_copies_everything_into_new_settings(client):
    store = filled(client, payload_indexes={"n": "integer"}, full_scan_threshold=77)
    before = store.get(list(range(20)), with_rows=True)
    new = store.rollover(datatype="float16", collection_options={"shard_number": 3})
    assert (new, names(client)) == ("articles-000002", ["articles-000002"])
    assert store.get(list(range(20)), with_rows=True) == before
    about = client.get_collection(new)
    index = about.config.params.sparse_vectors["vdr"].index
    assert (index.datatype, index.full_scan_threshold) == (models.Datatype.FLOAT16, 77)
    assert about.config.params.shard_number == 3
    assert about.payload_schema["n"].data_type == "integer"
    assert QdrantStore("articles", client=client, datatype="float16").stamp == STAMP


def test_rollover_notices_writes_meanwhile(client, monkeypatch):
    store = filled(client)
    versions = type(store._engine.versions)
    copied = versions.copy

    def copy(self, old, new):
        copied(self, old, new)
        store.upsert(rows(1), [99])

    monkeypatch.setattr(versions, "copy", copy)
    with pytest.raises(StoreError, match="has 21 documents and its copy 20"):
        store.rollover()
    assert names(client) == ["articles-000001"]


def test_an_old_collection_with_another_name_stays(client):
    store = filled(client)
    alias = models.CreateAlias(collection_name="articles-000001", alias_name="archive")
    client.update_collection_aliases([models.CreateAliasOperation(create_alias=alias)])
    with store.rebuild() as fresh:
        fresh.upsert(rows(1), [1])
    assert client.count("archive").count == 20


def test_what_has_no_alias_cannot_be_replaced(client):
    plain = QdrantStore("plain", client=client)
    plain.create(WIDTH)
    with pytest.raises(StoreError, match="is no alias"), plain.rebuild():
        pass
    alias = models.CreateAlias(collection_name="plain", alias_name="named")
    client.update_collection_aliases([models.CreateAliasOperation(create_alias=alias)])
    named = QdrantStore("named", client=client)
    with named.rebuild() as fresh:
        fresh.upsert(rows(2), [1, 2])
    assert (target_of(client, "named"), named.count()) == ("named-000001", 2)
    with QdrantStore("c", path=":memory:") as embedded:
        embedded.create(WIDTH)
        with pytest.raises(ConfigError, match="embedded and has no aliases"):
            embedded.rollover()
    with pytest.raises(ConfigError, match="`versioned` goes with"):
        QdrantStore("c", path=":memory:", versioned=True)


def test_processes_that_make_it_at_once_share_one_collection(client):
    first, second = versioned(client), versioned(client)
    third = versioned(client, datatype="uint8")
    first.create(WIDTH, STAMP)
    second.create(WIDTH, STAMP)
    second.upsert(rows(1), ["x"])
    assert (first.count(), names(client)) == (1, ["articles-000001"])
    with pytest.raises(StoreMismatch, match="keeps weights as float32"):
        third.create(WIDTH, STAMP)
    plain, late = (QdrantStore("plain", client=client) for _ in range(2))
    plain.create(WIDTH)
    late.create(WIDTH)
    assert late.width == WIDTH


def test_what_a_killed_process_left_is_finished(client):
    made = versioned(client)
    made.create(WIDTH, STAMP)
    gone = models.DeleteAlias(alias_name="articles")
    client.update_collection_aliases([models.DeleteAliasOperation(delete_alias=gone)])
    again = versioned(client)
    assert again.width is None
    again.create(WIDTH, STAMP)
    assert names(client) == ["articles-000001"]
    again.upsert(rows(1), ["x"])
    client.update_collection_aliases([models.DeleteAliasOperation(delete_alias=gone)])
    # One with documents is not taken for unfinished.
    versioned(client).create(WIDTH, STAMP)
    assert target_of(client) == "articles-000002"
    assert client.count("articles-000001").count == 1
