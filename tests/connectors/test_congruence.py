"""Every store answers as `MemoryStore` does, which computes exact float64 inner products."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_servers import on_opensearch
from store_samples import (
    WIDTH,
    assert_same_hits,
    filters,
    opened,
    payloads,
    row,
    rows,
    some_ids,
    some_rows,
)

from vdr_db.connectors import ElasticsearchStore, MemoryStore
from vdr_db.errors import ConfigError, InputError, ShapeError, StoreError, StoreMismatch
from vdr_db.sparse import SparseRows
from vdr_db.stamp import EncoderStamp

KINDS = ["memory", "edge", "client"]
STAMP = EncoderStamp("model", "tokens", "all", "mlm", "log1p_relu")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=[*KINDS, "OpenSearch"])
def store(request):
    if request.param == "OpenSearch":
        with on_opensearch(request) as store:
            store.create(WIDTH, STAMP)
            yield store
        return
    with opened(request.param) as store:
        store.create(WIDTH, STAMP)
        yield store


def oracle_of(some: SparseRows, ids, given_payloads=None) -> MemoryStore:
    oracle = MemoryStore()
    oracle.create(some.width)
    oracle.upsert(some, ids, given_payloads)
    return oracle


@pytest.fixture(scope="module")
def kept_stores():
    """One store of each kind for property tests: making one takes longer than an example."""
    with opened("edge") as edge, opened("client") as client:
        for store in (edge, client):
            store.create(WIDTH)
        yield {"edge": edge, "client": client}


def emptied(store):
    store.delete(list(store.ids()))
    return store


@pytest.mark.parametrize("kind", ["edge", "client"])
@settings(max_examples=40)
@given(data=st.data(), some=some_rows, queries=some_rows)
def test_the_same_hits_for_random_rows(kept_stores, kind, data, some, queries):
    ids = data.draw(st.lists(some_ids, min_size=len(some), max_size=len(some), unique=True))
    limit = data.draw(st.integers(1, 15))
    oracle = oracle_of(some, ids)
    store = emptied(kept_stores[kind])
    written = store.upsert(some, ids)
    assert (written.count, written.empty) == (len(some), int((some.counts == 0).sum()))
    assert store.count() == len(some)
    for query, found in zip(queries, store.search_batch(queries, limit), strict=True):
        exact = oracle.search(query, limit=100)
        assert_same_hits(found, exact, limit)
        assert_same_hits(store.search(query, limit), exact, limit)
    for record, id, vector in zip(store.get(ids, with_rows=True), ids, some, strict=True):
        assert record.id == id
        assert type(record.id) is type(id)
        assert record.row == vector
    assert set(store.ids()) == set(ids)


@settings(max_examples=100)
@given(
    some_payloads=st.lists(payloads, min_size=1, max_size=10),
    conditions=st.lists(filters, min_size=1, max_size=8),
)
def test_the_same_filters_in_the_embedded_engine(kept_stores, some_payloads, conditions):
    ids = list(range(len(some_payloads)))
    some = SparseRows.from_dicts([{1: 1.0 + i / 8} for i in ids], WIDTH)
    oracle = oracle_of(some, ids, some_payloads)
    store = emptied(kept_stores["edge"])
    store.upsert(some, ids, some_payloads)
    for condition in conditions:
        exact = oracle.search(row({1: 1.0}), 100, condition)
        assert store.search(row({1: 1.0}), 100, condition) == exact
        assert store.count(condition) == oracle.count(condition) == len(exact)


FILTERS = [
    {"topic": "games"},
    {"topic": ["games", "law"]},
    {"year": {"gte": 2000, "lt": 2010}},
    {"year": 2001},
    {"year": [2001, 2003.0, 1999]},
    {"tags": "a"},
    {"author.name": "Ada"},
    {"authors[].name": "Bob"},
    {"date": {"gte": "2020-06-01"}},
    {"topic": None},
    {"not": {"topic": "games"}},
    {"any": [{"topic": "law"}, {"year": {"lt": 1990}}]},
    {"topic": "games", "year": {"gt": 2000}},
    {"tags": []},
    {"any": []},
    {},
]
DOCUMENTS = [
    {"topic": "games", "year": 2001, "tags": ["a", "b"], "date": "2020-05-01T00:00:00Z"},
    {"topic": "games", "year": 1985, "tags": ["c"], "author": {"name": "Ada"}},
    {"topic": "law", "year": 2003.0, "date": "2020-07-01T00:00:00Z"},
    {"topic": None, "authors": [{"name": "Ada"}, {"name": "Bob"}]},
    {"topic": [], "year": [1970, 2005]},
    {},
]


@pytest.mark.parametrize("condition", FILTERS, ids=str)
def test_filters_of_every_kind(store, condition):
    some = SparseRows.from_dicts([{1: 1.0 + i} for i in range(len(DOCUMENTS))], WIDTH)
    ids = [f"d{i}" for i in range(len(DOCUMENTS))]
    store.upsert(some, ids, DOCUMENTS)
    exact = oracle_of(some, ids, DOCUMENTS).search(row({1: 1.0}), 10, condition)
    assert store.search(row({1: 1.0}), 10, condition) == exact
    assert store.search_batch(row({1: 1.0}), 10, condition) == [exact]
    assert store.count(condition) == len(exact)


def test_documents_without_a_shared_token_are_no_hits(store):
    store.upsert(SparseRows.from_dicts([{1: 1.0}, {2: 1.0}, {}], WIDTH), ["one", "two", "none"])
    assert [hit.id for hit in store.search(row({1: 2.0}))] == ["one"]
    assert store.search(row({7: 1.0})) == []
    assert store.search(row({})) == []
    assert store.search_batch(SparseRows.from_dicts([{}, {2: 1.0}], WIDTH))[0] == []
    assert store.search_batch(SparseRows.empty(0, WIDTH)) == []


def test_equal_scores_come_by_ascending_id(store):
    ids = ["b", 10, "a", 9]
    store.upsert(SparseRows.from_dicts([{1: 0.5}] * 4, WIDTH), ids)
    assert [hit.id for hit in store.search(row({1: 1.0}))] == [9, 10, "a", "b"]


def test_pages_of_hits(store):
    store.upsert(SparseRows.from_dicts([{1: 1.0 + i} for i in range(9)], WIDTH), list(range(9)))
    assert [hit.id for hit in store.search(row({1: 1.0}), 3, offset=2)] == [6, 5, 4]
    assert store.search(row({1: 1.0}), 3, offset=9) == []
    assert len(store.search(row({1: 1.0}), 10**9)) == 9


def test_upsert_replaces_vector_and_payload(store):
    store.upsert(rows(2), ["a", "b"], [{"old": 1}, {"old": 2}])
    store.upsert(row({3: 5.0}), ["a"], [{"new": True}])
    assert store.count() == 2
    (record,) = store.get(["a"], with_rows=True)
    assert record.payload == {"new": True}
    assert record.row == row({3: 5.0})
    assert store.search(row({3: 1.0}))[0].id == "a"


def test_payloads_come_back_as_they_went_in(store):
    payload = {
        "text": "größer 😀 \u0000 \u2028 العربية",
        "nested": {"list": [1, 2.5, None, True, "x", {"deep": []}], "empty": {}},
        "big": 2**63 - 1,
        "small": -(2**63),
        "float": 0.1,
        "whole float": 2.0,
        "none": None,
        "a.b[]": 1,
    }
    if not isinstance(store, ElasticsearchStore):
        payload[""] = "empty name"
    store.upsert(row({1: 1.0}), ["x"], [payload])
    (record,) = store.get(["x"])
    assert record.payload == payload
    assert isinstance(record.payload["whole float"], float)
    assert record.payload["nested"]["list"][3] is True
    assert store.search(row({1: 1.0}))[0].payload == payload


def test_an_integer_and_its_text_are_two_documents(store):
    uuid = "0b0e7b2a-6f0f-4a4e-9f3f-0d6c6f1f2a11"
    ids = [1, "1", uuid, uuid.upper(), uuid.replace("-", ""), 0, 2**64 - 1, str(2**64 - 1)]
    store.upsert(SparseRows.from_dicts([{1: 1.0 + i} for i in range(8)], WIDTH), ids)
    assert store.count() == 8
    assert [record.id for record in store.get(ids)] == ids
    assert [hit.id for hit in store.search(row({1: 1.0}))] == ids[::-1]
    assert store.delete(["1", "nobody", "1"]) == 1
    assert [record.id for record in store.get([1, "1"])] == [1]


def test_get_keeps_the_order_asked_for(store):
    store.upsert(rows(4), ["a", "b", "c", "d"])
    assert [record.id for record in store.get(["d", "x", "a"])] == ["d", "a"]
    assert store.get([]) == []
    assert store.get(["a"])[0].row is None


def test_delete_then_write_again(store):
    store.upsert(rows(3), [1, 2, 3])
    assert store.delete([2, 3]) == 2
    assert store.delete([]) == 0
    assert (store.count(), list(store.ids())) == (1, [1])
    store.upsert(rows(1), [2])
    assert store.count() == 2


def test_more_rows_than_one_batch(store):
    many = rows(2500, seed=3)
    store.upsert(many, list(range(2500)))
    assert store.count() == 2500
    assert sorted(store.ids()) == list(range(2500))
    assert len(store.get(list(range(2500)))) == 2500
    oracle = oracle_of(many, list(range(2500)))
    for query in rows(5, seed=4):
        exact = oracle.search(query, 2500)
        if isinstance(store, ElasticsearchStore):
            scores = [hit.score for hit in store.search(query, 20)]
            assert scores == pytest.approx([hit.score for hit in exact[:20]], rel=2**-7)
        else:
            assert_same_hits(store.search(query, 20), exact, 20)
    assert store.delete(list(range(1200))) == 1200
    assert store.count() == 1300


def test_policies_for_empty_rows(store):
    some = SparseRows.from_dicts([{1: 1.0}, {}], WIDTH)
    assert store.upsert(some, ["a", "b"], empty="skip").skipped == ("b",)
    assert store.count() == 1
    assert store.upsert(some, ["a", "b"]).empty == 1
    assert store.count() == 2
    assert store.get(["b"], with_rows=True)[0].row == row({})


def test_a_store_is_made_once_for_one_encoder(store):
    store.create(WIDTH, STAMP)
    assert (store.width, store.stamp, store.documents) == (WIDTH, STAMP, "encoded")
    other = EncoderStamp("other", "tokens 2", "all", "mlm", "log1p_relu")
    with pytest.raises(StoreMismatch, match=r"'model'.*'other'.*'tokens'.*'tokens 2'"):
        store.create(WIDTH, other)
    with pytest.raises(StoreMismatch, match=r"vocabulary size 40 .store. against 41"):
        store.create(WIDTH + 1, STAMP)
    with pytest.raises(StoreMismatch, match="documents 'encoded'"):
        store.create(WIDTH, STAMP, documents="tokens")


def test_a_store_that_was_never_written(kind):
    with opened(kind) as store:
        assert store.width is None
        assert store.stamp is None
        assert store.count() == 0
        for use in (
            lambda: store.search(row({1: 1.0})),
            lambda: store.get(["a"]),
            lambda: store.delete(["a"]),
            lambda: list(store.ids()),
            lambda: store.upsert(row({1: 1.0}), ["a"]),
        ):
            with pytest.raises(StoreError, match="holds nothing yet"):
                use()


def test_a_closed_store_says_so(kind):
    with opened(kind) as store:
        store.create(WIDTH)
        store.upsert(rows(1), ["a"])
        store.flush()
        store.optimize()
    store.close()
    for use in (
        lambda: store.search(row({1: 1.0})),
        lambda: store.search_batch(row({1: 1.0})),
        lambda: store.get(["a"]),
        lambda: store.upsert(rows(1), ["a"]),
        lambda: store.count(),
        lambda: store.flush(),
        lambda: store.optimize(),
        lambda: store.create(WIDTH),
    ):
        with pytest.raises(StoreError, match="is closed"):
            use()


def test_impossible_searches(store):
    store.upsert(rows(1), ["a"])
    for limit, offset in ((0, 0), (-1, 0), (True, 0), (1.5, 0), (1, -1)):
        with pytest.raises(ConfigError, match="must be an integer of at least"):
            store.search(row({1: 1.0}), limit, None, offset)
    with pytest.raises(ShapeError, match="takes one row, got 2"):
        store.search(rows(2))
    with pytest.raises(InputError, match="width 40, got width 41"):
        store.search(row({1: 1.0}, width=41))
    with pytest.raises(TypeError, match="SparseRows"):
        store.search({1: 1.0})
    with pytest.raises(InputError, match="a filter must be a dictionary"):
        store.search(row({1: 1.0}), filter="topic=games")
    with pytest.raises(TypeError, match="pass \\['a'\\]"):
        store.get("a")
    with pytest.raises(TypeError, match="pass \\['a'\\]"):
        store.delete("a")
