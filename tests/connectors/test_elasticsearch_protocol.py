"""`ElasticsearchStore` through the official client on the stand-in of `tests/support/noida.py`.

Proved here: requests are accepted, answers are read, small collections score as the oracle with
9-bit weights says. Not proved here: anything about speed, replicas, security, or other versions.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
import services
from search_servers import remove_indices
from sparse_samples import ranking, truncated, zipf_rows

from vdr_db import SparseRows
from vdr_db.connectors.elasticsearch import search as elasticsearch_search
from vdr_db.connectors.elasticsearch.store import ElasticsearchStore
from vdr_db.connectors.memory import MemoryStore
from vdr_db.errors import (
    ConfigError,
    InputError,
    RejectedRows,
    StoreError,
    StoreMismatch,
)
from vdr_db.filters import parse_filter
from vdr_db.stamp import EncoderStamp

WIDTH = 1000
ROWS = zipf_rows(100, 40, WIDTH, seed=1)
QUERIES = zipf_rows(8, 32, WIDTH, seed=2)
STAMP = EncoderStamp(
    model="m", tokenizer="t" * 64, vocabulary="all", head="vdr", activation="elu1p", k=40
)


def row(*dicts, width=WIDTH):
    return SparseRows.from_dicts(list(dicts), width)


@pytest.fixture
def made(open_store):
    """An index of the width of the samples."""

    def make(**options):
        store = open_store(**options)
        store.create(WIDTH, STAMP)
        return store

    return make


# Scores


@pytest.mark.parametrize("kind", ["rank_features", "sparse_vector"])
def test_scores_and_order_are_those_of_nine_bit_weights(made, kind, server):
    if server.is_real and kind == "sparse_vector":
        pytest.skip("sparse_vector is no type of OpenSearch")
    store = made(kind=kind)
    assert store.upsert(ROWS, list(range(100))).count == 100
    oracle = truncated(ROWS).dot(QUERIES)
    for number, hits in enumerate(store.search_batch(QUERIES, 100)):
        expected = ranking(oracle[:, number], 100)
        assert len(hits) == len(expected) > 50
        by_id = {hit.id: hit.score for hit in hits}
        assert set(by_id) == set(expected)
        np.testing.assert_allclose(
            [by_id[id] for id in expected], oracle[expected, number], rtol=1e-6
        )
        assert [hit.score for hit in hits] == sorted(by_id.values(), reverse=True)
        one = store.search(QUERIES[number], 100)
        assert one == hits


def test_the_exact_store_finds_the_same_documents(made):
    store, memory = made(), MemoryStore()
    memory.create(WIDTH, STAMP)
    for target in (store, memory):
        target.upsert(ROWS, list(range(100)))
    found = total = 0
    for query in QUERIES:
        exact = memory.search(query, 10)
        ours = {hit.id: hit.score for hit in store.search(query, 10)}
        total += len(exact)
        found += sum(hit.id in ours for hit in exact)
        for hit in exact:
            if hit.id in ours:
                assert 0 <= (hit.score - ours[hit.id]) / hit.score < 2**-8
    assert found / total >= 0.99


def test_equal_scores_come_by_ascending_id_integers_first(made):
    store = made()
    ids = ["b", 10, 9, "a", "10", 2**64 - 1, "ä"]
    store.upsert(row(*[{5: 1.5}] * len(ids)), ids)
    expected = [9, 10, 2**64 - 1, "10", "a", "b", "ä"]
    assert [hit.id for hit in store.search(row({5: 2.0}))] == expected
    assert [hit.id for hit in store.search(row({5: 2.0}), 2, offset=1)] == expected[1:3]
    assert list(store.ids()) == expected


def test_query_weights_of_any_size_keep_their_product(made):
    store = made()
    store.upsert(row({5: 1.5, 6: 0.25}), [1])
    (hit,) = store.search(row({5: 1000.0, 6: 0.5}))
    assert hit.score == pytest.approx(1500.125, rel=1e-6)


def test_query_top_k_keeps_the_heaviest_tokens(made):
    store = made(query_top_k=1)
    store.upsert(row({5: 1.0}, {6: 1.0}), [5, 6])
    assert [hit.id for hit in store.search(row({5: 0.1, 6: 2.0}))] == [6]


def test_nothing_in_common_is_no_hit_and_no_entries_is_no_request(made, proxy):
    store = made()
    store.upsert(row({5: 1.0}, {}), [1, 2])
    proxy.requests.clear()
    assert store.search(row({})) == []
    assert store.search_batch(row({}, {})) == [[], []]
    assert proxy.requests == []
    assert store.search(row({6: 1.0})) == []
    assert [len(hits) for hits in store.search_batch(row({}, {5: 1.0}, {6: 1.0}))] == [0, 1, 0]


def test_many_queries_take_few_requests(made, proxy):
    store = made()
    store.upsert(ROWS[:20], list(range(20)))
    many = SparseRows.concat([row({n: 1.0}) for n in range(150)])
    proxy.requests.clear()
    hits = store.search_batch(many, 3)
    assert len(proxy.requests) == 3
    assert hits == [store.search(one, 3) for one in many]


# Documents


def test_documents_come_back_as_they_were(made):
    store = made()
    payload = {
        "text": "é\n",
        "n": [1, 2.5, None, True],
        "a.b": {"c": {"d e": []}},
        "big": 2**63 - 1,
    }
    ids = [7, "7", "text:7", "9" * 512, "a/b?c#d", " "]
    store.upsert(ROWS[: len(ids)], ids, [payload] + [None] * (len(ids) - 1))
    records = store.get(["missing", *ids, 7], with_rows=True)
    assert [record.id for record in records] == [*ids, 7]
    for number, record in enumerate(records[:-1]):
        assert record.row == ROWS[number]
    assert records[0].payload == payload
    assert records[1].payload == {}
    assert store.get(ids)[0].row is None
    assert store.delete([7, "missing", 7]) == 1
    assert store.count() == len(ids) - 1
    assert [record.id for record in store.get([7, "7"])] == ["7"]


@pytest.mark.parametrize("count", [0, 6, 7, 8, 21])
def test_ids_and_documents_are_read_page_by_page(made, monkeypatch, count):
    monkeypatch.setattr(elasticsearch_search, "_PAGE", 7)
    store = made()
    ids = list(range(count))
    store.upsert(ROWS[:count], ids)
    assert list(store.ids()) == ids
    assert [record.id for record in store.get(ids[::-1])] == ids[::-1]


def test_a_second_write_replaces_and_keep_leaves(made):
    store = made()
    store.upsert(row({1: 1.0}), ["x"], [{"v": 1}])
    assert store.upsert(row({2: 1.0}, {3: 1.0}), ["x", "y"], existing="keep").count == 1
    assert store.get(["x"])[0].payload == {"v": 1}
    assert store.upsert(row({2: 1.0}), ["x"]).count == 1
    assert store.search(row({1: 1.0})) == []
    assert store.get(["x"], with_rows=True)[0].row == row({2: 1.0})
    assert store.count() == 2


def test_rows_without_entries_follow_the_policy(made):
    store = made()
    written = store.upsert(row({}, {1: 1.0}), ["e", "f"])
    assert (written.count, written.empty) == (2, 1)
    assert store.get(["e"], with_rows=True)[0].row == row({})
    skipped = store.upsert(row({}, {1: 1.0}), ["g", "h"], empty="skip")
    assert (skipped.count, skipped.skipped) == (1, ("g",))
    with pytest.raises(RejectedRows) as caught:
        store.upsert(row({}, {1: 1.0}), ["i", "j"], empty="error")
    assert caught.value.ids == ["i"]
    assert store.count() == 4


@pytest.mark.parametrize(
    "conditions",
    [
        {"topic": "games"},
        {"topic": None},
        {"topic": ["games", "other"]},
        {"year": {"gte": 2000, "lt": 2003}},
        {"year": 2001.0},
        {"year": {"gt": -5}},
        {"tags": "b"},
        {"flag": True},
        {"people[].name": "Ada"},
        {"day": {"gte": "2024-05-02T00:00:00Z"}},
        {"not": {"any": [{"topic": "games"}, {"year": {"lte": 0}}]}},
        {"all": []},
        {"any": []},
    ],
)
def test_filters_keep_what_they_keep_everywhere(made, conditions):
    store = made()
    payloads = [
        {"topic": "games", "year": 2001, "tags": ["a", "b"], "flag": True},
        {"topic": "Games", "year": -3.5, "tags": [], "flag": 1},
        {"topic": ["games", "x"], "year": "2001", "day": "2024-05-01T23:30:00-01:00"},
        {"people": [{"name": "Ada"}, {"name": "Bob"}], "year": 2003},
        {"people": {"name": "Ada"}, "flag": "true", "tags": "b"},
        None,
    ]
    ids = list(range(len(payloads)))
    store.upsert(row(*[{1: 1.0}] * len(ids)), ids, payloads)
    tree = parse_filter(conditions)
    expected = [id for id in ids if tree.matches(payloads[id] or {})]
    assert [hit.id for hit in store.search(row({1: 1.0}), filter=conditions)] == expected
    assert [hit.id for hit in store.search_batch(row({1: 1.0}, {2: 1.0}), 10, tree)[0]] == expected
    assert store.count(conditions) == len(expected)


def test_payloads_of_any_shape_are_stored_side_by_side(made):
    store = made()
    payloads = [{"v": 1}, {"v": "one"}, {"v": {"x": [1]}}, {"v": [[True]]}, {"a.b": 1, "a": 2}]
    assert store.upsert(ROWS[:5], list(range(5)), payloads).count == 5
    assert [record.payload for record in store.get(list(range(5)))] == payloads


def test_vector_and_text_are_searched_together(made):
    store = made(text_fields=["body"])
    texts = ["red apple", "green pear", "apple apple pie", "nothing"]
    rows = row({1: 1.0}, {1: 3.0}, {2: 1.0}, {1: 2.0})
    store.upsert(rows, list(range(4)), [{"body": text} for text in texts])
    fused = store.search_with_text(row({1: 1.0}), "apple", "body")
    by_vector, by_text = [1, 3, 0], [2, 0]
    ranks = {id: 1 / (61 + place) for place, id in enumerate(by_vector)}
    for place, id in enumerate(by_text):
        ranks[id] = ranks.get(id, 0) + 1 / (61 + place)
    assert {hit.id: pytest.approx(hit.score) for hit in fused} == ranks
    assert fused[0].id == 0
    with pytest.warns(DeprecationWarning, match="`search_hybrid` is called `search_with_text`"):
        assert store.search_hybrid(row({1: 1.0}), "apple", "body") == fused
    summed = store.search_with_text(row({1: 1.0}), "apple", "body", fusion="sum", text_weight=100.0)
    assert [hit.id for hit in summed][:2] == [2, 0] or [hit.id for hit in summed][:2] == [0, 2]
    only = store.search_with_text(row({}), "pear", "body", filter={"body": "green pear"})
    assert [hit.id for hit in only] == [1]
    with pytest.raises(ConfigError, match="no text field 'title'"):
        store.search_with_text(row({1: 1.0}), "x", "title")
    with pytest.raises(ConfigError, match="fusion"):
        store.search_with_text(row({1: 1.0}), "x", "body", fusion="max")


# Refusals


def test_a_document_the_engine_refuses_does_not_take_its_neighbours_along(made):
    store = made(payload_types={"year": "long"})
    with pytest.raises(RejectedRows) as caught:
        store.upsert(ROWS[:3], ["a", "b", "c"], [{"year": 1}, {"year": "soon"}, {"year": 3}])
    assert caught.value.ids == ["b"]
    assert "year" in caught.value.reasons[0]
    assert sorted(store.ids()) == ["a", "c"]


POISON = {
    "unsorted": ([0, 2], [2, 1], [1.0, 1.0]),
    "repeated": ([0, 2], [1, 1], [1.0, 2.0]),
    "more ids than weights": ([0, 2], [1, 2], [1.0]),
    "more weights than ids": ([0, 1], [1], [1.0, 2.0]),
    "NaN": ([0, 1], [1], [float("nan")]),
    "infinite": ([0, 1], [1], [float("inf")]),
    "negative": ([0, 1], [1], [-1.0]),
    "zero": ([0, 1], [1], [0.0]),
    "negative id": ([0, 1], [-1], [1.0]),
    "id out of range": ([0, 1], [WIDTH], [1.0]),
    "id beyond 32 bits": ([0, 1], [2**32], [1.0]),
}


@pytest.mark.parametrize("kind", [*POISON, "too small for float32 arithmetic"])
def test_no_poisoned_vector_reaches_the_engine(made, proxy, kind):
    store = made()
    proxy.requests.clear()
    if kind in POISON:
        with pytest.raises((InputError, ValueError)):
            store.upsert(SparseRows(*POISON[kind], WIDTH), ["p"])
        assert proxy.seen("_bulk") == []
    else:
        tiny = SparseRows([0, 2], [1, 2], np.array([1e-40, 1.0], np.float32), WIDTH)
        store.upsert(tiny, ["p"])
        assert b'"vdr":{"2":1.0}' in proxy.seen("_bulk")[0].body
    store.upsert(ROWS[:1], ["good"])
    assert "good" in list(store.ids())


def test_wrong_calls_are_told_apart(made, open_store):
    store = made()
    with pytest.raises(InputError, match="width 1000, got width 7"):
        store.upsert(row({1: 1.0}, width=7), [1])
    with pytest.raises(InputError, match="got width 7"):
        store.search(row({1: 1.0}, width=7))
    with pytest.raises(InputError, match="twice"):
        store.upsert(ROWS[:2], [1, 1])
    with pytest.raises(ConfigError, match="limit"):
        store.search(ROWS[0], 0)
    with pytest.raises(StoreError, match="refused the request"):
        store.transport.call("POST", f"/{store.name}/_search", {"nonsense": 1})
    unmade = open_store()
    assert unmade.width is None
    assert unmade.count() == 0
    for call in (lambda: unmade.search(ROWS[0]), lambda: unmade.upsert(ROWS[:1], [1])):
        with pytest.raises(StoreError, match="holds nothing yet"):
            call()
    store.close()
    store.close()
    with pytest.raises(StoreError, match="is closed"):
        store.count()


def test_a_lost_index_is_not_made_anew_with_guessed_types(made, monkeypatch):
    store = made()
    remove_indices(store)
    with pytest.raises(StoreError, match="is gone: it was deleted"):
        store.upsert(ROWS[:1], [1])
    # Gone between the look and the write.
    store = made()
    store.upsert(ROWS[:1], [1])
    remove_indices(store)
    monkeypatch.setattr(store, "_look_again", lambda *_: None)
    with pytest.raises(StoreError, match="cannot write there"):
        store.upsert(ROWS[:1], [1])
    reply = store.transport.call("GET", f"/{store.name}", allow=(404,))
    assert reply.status == 404


# The index


def test_an_index_is_opened_with_what_it_was_made_for_only(made, open_store):
    store = made(store_vectors=False, vector_field="other")
    again = open_store(store.name)
    assert (again.width, again.stamp, again.documents) == (WIDTH, STAMP, "encoded")
    again.create(WIDTH, STAMP)
    again.create(WIDTH)
    again.upsert(ROWS[:1], [1])
    assert len(again.search(ROWS[0])) == 1
    other = EncoderStamp(**{**STAMP.to_dict(), "model": "n", "tokenizer": "u"})
    with pytest.raises(StoreMismatch, match=r"made for 'm', cannot be opened with 'n': tokenizer"):
        again.create(WIDTH, other)
    with pytest.raises(StoreMismatch, match="vocabulary size"):
        again.create(WIDTH + 1, STAMP)
    with pytest.raises(StoreMismatch, match="documents"):
        again.create(WIDTH, STAMP, documents="tokens")


def test_a_foreign_index_is_left_alone(made, open_store):
    store = made()
    foreign = services.unique_name()
    store.transport.call(
        "PUT", f"/{foreign}", {"mappings": {"properties": {"a": {"type": "long"}}}}
    )
    try:
        with pytest.raises(StoreMismatch, match="not made by this version"):
            open_store(foreign)
    finally:
        store.transport.call("DELETE", f"/{foreign}")


def test_two_processes_may_create_at_once(open_store):
    name = services.unique_name()
    stores = [open_store(name) for _ in range(6)]
    errors: list[BaseException] = []

    def make(store):
        try:
            store.create(WIDTH, STAMP)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=make, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    backings = {store._index.state().backing for store in stores}
    assert backings == {f"{name}-000001"}


def test_without_stored_vectors_what_needs_them_says_so(made):
    store = made(store_vectors=False)
    store.upsert(ROWS[:3], [0, 1, 2], [{"a": 1}] * 3)
    assert len(store.search(ROWS[0])) == 3
    assert store.get([0])[0].payload == {"a": 1}
    for call in (lambda: store.get([0], with_rows=True), store.rollover):
        with pytest.raises(StoreError, match="store_vectors=False"):
            call()


def flat_settings(store):
    path = f"/{store._index.state().backing}/_settings"
    answer = store.transport.call("GET", path, params={"flat_settings": "true"}).body
    settings = next(iter(answer.values()))["settings"]
    names = ("index.refresh_interval", "index.number_of_replicas")
    return tuple(settings.get(name) for name in names)


def test_loading_changes_settings_and_restores_them(made):
    store = made(settings={"refresh_interval": "7s"})
    with store.loading() as loader:
        assert flat_settings(store) == ("-1", "0")
        loader.upsert(ROWS[:5], list(range(5)))
        assert store.count() == 0
    assert flat_settings(store) == ("7s", "0")
    assert store.count() == 5
    with pytest.raises(KeyError), store.loading():
        raise KeyError
    assert flat_settings(store) == ("7s", "0")
    assert store._index.made().before_load is None


def test_a_killed_load_is_repaired_by_the_next(made, open_store):
    store = made(settings={"refresh_interval": "7s"})
    abandoned = open_store(store.name).loading()
    abandoned.__enter__()
    assert flat_settings(store) == ("-1", "0")
    after = open_store(store.name)
    with after.loading():
        after.upsert(ROWS[:2], [0, 1])
    assert flat_settings(after) == ("7s", "0")
    abandoned.gen.close()


def test_a_rebuild_replaces_everything_in_one_step(made, proxy, open_store):
    store = made(text_fields=["body"], settings={"refresh_interval": "7s"})
    store.upsert(ROWS[:5], list(range(5)), [{"body": "apple"}] * 5)
    reader = open_store(store.name)
    new_stamp = EncoderStamp(**{**STAMP.to_dict(), "model": "n", "head": "mlm"})
    proxy.requests.clear()
    with store.rebuild(stamp=new_stamp, expected=3) as fresh:
        fresh.upsert(ROWS[5:8], [5, 6, 7], [{"body": "pear"}] * 3)
        assert reader.count() == 5
    assert sorted(reader.ids()) == [5, 6, 7]
    assert store._index.state().backing == f"{store.name}-000002"
    assert store.stamp == new_stamp
    assert flat_settings(store) == ("7s", "0")
    assert len(proxy.seen("_aliases")) == 1
    assert len(store.search_with_text(row({}), "pear", "body")) == 3
    old = store.transport.call("GET", f"/{store.name}-000001", allow=(404,))
    assert old.status == 404


def test_a_failed_rebuild_changes_nothing(made):
    store = made()
    store.upsert(ROWS[:5], list(range(5)))
    with (
        pytest.raises(StoreError, match="must have 4 documents, got 3"),
        store.rebuild(expected=4) as fresh,
    ):
        fresh.upsert(ROWS[:3], [0, 1, 2])
    with pytest.raises(KeyError), store.rebuild():
        raise KeyError
    assert store.count() == 5
    names = store.transport.call("GET", f"/{store.name}-*/_alias").body
    assert list(names) == [f"{store.name}-000001"]


def test_a_rollover_copies_everything_and_blocks_writes_meanwhile(made, server, proxy):
    store = made()
    store.upsert(ROWS[:20], list(range(20)), [{"n": n} for n in range(20)])
    before = store.search(QUERIES[0], 20)
    assert store.rollover() == f"{store.name}-000002"
    assert store.search(QUERIES[0], 20) == before
    assert store.count({"n": {"lt": 5}}) == 5
    blocks = [r.body for r in proxy.requests if "_settings" in r.path and b"blocks" in r.body]
    assert [b"true" in body for body in blocks] == [True, False]
    assert store.rollover(keep_old=True) == f"{store.name}-000003"
    kept = ElasticsearchStore(
        f"{store.name}-000002", retry=store.transport.retrier.policy, **server.options()
    )
    with kept:
        assert kept.count() == 20
        assert kept.upsert(ROWS[:1], ["more"]).count == 1
        with pytest.raises(StoreError, match="no alias"), kept.rebuild():
            pass


def test_a_template_carries_the_mapping(made):
    store = made()
    template = store.create_template()
    reply = store.transport.call("GET", f"/_index_template/{template}").body
    body = reply["index_templates"][0]["index_template"]
    assert body["index_patterns"] == [f"{store.name}-0*"]
    assert body["template"]["mappings"]["properties"]["vdr"] == {"type": "rank_features"}
    store.transport.call("PUT", f"/{store.name}-000007")
    made_by_cluster = store.transport.call("GET", f"/{store.name}-000007/_mapping").body
    mapping = made_by_cluster[f"{store.name}-000007"]["mappings"]
    assert mapping["_meta"] == store._index.state().mapping["_meta"]


def test_flush_and_optimize_change_no_answer(made):
    store = made()
    store.upsert(ROWS[:10], list(range(10)))
    before = store.search(QUERIES[0])
    store.flush()
    store.optimize()
    assert store.search(QUERIES[0]) == before
