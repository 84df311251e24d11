"""A server's limits are answers to adapt to, and its partial answers are none.

The last part starts an OpenSearch of its own whose limits are so low that small collections meet
them, kills it, and starts it again on the same data.
"""

from __future__ import annotations

import html
import json
import os
import threading

import opensearch_node
import pytest
import services
from fault_proxy import Answer
from search_servers import note_real_server
from sparse_samples import zipf_rows

from vdr_db.connectors.elasticsearch.store import ElasticsearchStore
from vdr_db.connectors.retry import RetryPolicy
from vdr_db.errors import ConfigError, RejectedRows, StoreError, StoreUnavailable
from vdr_db.sparse import SparseRows

WIDTH = 3000
ROWS = zipf_rows(40, 10, WIDTH, seed=3)
IDS = list(range(40))
PAYLOADS = [{"n": n, "body": f"word{n} apple"} for n in IDS]


@pytest.fixture
def made(open_store):
    def make(**options):
        store = open_store(**options)
        store.create(WIDTH)
        return store

    return make


def filled(store):
    store.upsert(ROWS, IDS, PAYLOADS)
    return store


# Partial answers


def test_a_document_that_cannot_be_read_is_not_taken_for_absent(made, proxy, server):
    store = filled(made(retry=RetryPolicy(tries=3, base_s=0.001)))
    busy = {"type": "es_rejected_execution_exception", "reason": "full"}
    docs = [{"_id": "1", "error": busy}, {"_id": "2", "found": False}]
    answer = Answer(200, body=json.dumps({"docs": docs}).encode())
    proxy.plan(answer, None, match="_mget")
    assert [record.id for record in store.get([1, 2])] == [1, 2]
    proxy.plan(answer, answer, answer, match="_mget")
    with pytest.raises(StoreUnavailable, match="es_rejected_execution_exception"):
        store.get([1, 2])
    if server.is_real:
        backing = store._index.state().backing
        store.transport.call("POST", f"/{backing}/_close")
        with pytest.raises(StoreError, match="index_closed_exception"):
            store.get([1])
        with pytest.raises(StoreError, match="closed"):
            store.count()
        store.transport.call("POST", f"/{backing}/_open")


@pytest.mark.parametrize("path", ["_count", "_search", "_refresh"])
def test_the_answer_of_some_shards_is_none(made, proxy, path):
    store = filled(made(retry=RetryPolicy(tries=2, base_s=0.001)))
    shards = {"total": 2, "successful": 1, "failed": 1}
    body = {"_shards": shards, "count": 3, "hits": {"hits": []}}
    some = Answer(200, body=json.dumps(body).encode())
    calls = {"_count": store.count, "_search": lambda: list(store.ids()), "_refresh": store.flush}
    proxy.plan(some, None, match=path)
    assert calls[path]() in (40, IDS, None)
    proxy.plan(some, some, match=path)
    with pytest.raises(StoreUnavailable, match="1 of 2 shards failed"):
        calls[path]()


def test_every_search_refuses_partial_answers(made, proxy):
    store = filled(made(text_fields=["body"]))
    proxy.requests.clear()
    list(store.ids())
    store.search(ROWS[0])
    store.search_batch(ROWS[:3])
    store.search_with_text(ROWS[0], "apple", "body")
    for request in proxy.seen("search"):
        told = request.path + request.body.decode()
        assert "allow_partial_search_results" in told


def test_a_server_that_is_none_of_its_kind_is_told(made, proxy, open_store):
    foreign = Answer(404, body=b'{"status":"none","time":0.1}')
    proxy.plan(foreign, match="_mapping")
    with pytest.raises(StoreError, match="no search server"):
        open_store()


def test_a_redirection_is_no_success(made, proxy):
    store = filled(made())
    proxy.plan(Answer(301, (("Location", "http://x/"),), b""), match="_count")
    with pytest.raises(StoreError, match="sends the request elsewhere"):
        store.count()


def test_an_asynchronous_client_is_refused_by_name(server):
    if server.is_real:
        client = pytest.importorskip("opensearchpy").AsyncOpenSearch([server.proxy.url])
    else:
        client = pytest.importorskip("elasticsearch").AsyncElasticsearch(server.proxy.url)
    with pytest.raises(ConfigError, match="asynchronous clients are not supported"):
        ElasticsearchStore("a", client=client)


# Limits


def test_a_request_too_large_for_the_memory_is_halved(made, proxy):
    store = made()
    broken = {"error": {"type": "circuit_breaking_exception", "reason": "too large"}}
    proxy.decide = lambda request: (
        Answer(429, body=json.dumps(broken).encode())
        if "_bulk" in request.path and request.documents > 10
        else None
    )
    assert store.upsert(ROWS, IDS, PAYLOADS).count == 40
    assert store.count() == 40


@pytest.mark.parametrize("window", [7, 10_000])
def test_more_hits_than_the_window_come_by_pages(made, server, window):
    if not server.is_real and window == 7:
        pytest.skip("the stand-in has no window")
    store = made(settings={"max_result_window": window})
    same = SparseRows.from_dicts([{1: 1.0 + n % 3} for n in IDS], WIDTH)
    store.upsert(same, IDS)
    query = SparseRows.from_dicts([{1: 2.0}], WIDTH)
    whole = store.search(query, 40)
    assert len(whole) == 40
    assert [hit.score for hit in whole] == sorted((hit.score for hit in whole), reverse=True)
    assert store.search(query, 9, offset=20) == whole[20:29]
    assert store.search(query, 100, offset=35) == whole[35:]
    assert store.search_batch(SparseRows.concat([query, query]), 12) == [whole[:12]] * 2
    assert list(store.ids()) == IDS
    assert (store._window == 7) is (window == 7)


def test_long_filters_are_few_clauses(made, server, monkeypatch):
    store = filled(made())
    many = [{"n": n} for n in range(1500)]
    assert store.count({"any": many}) == 40
    monkeypatch.setattr("vdr_db.connectors.elasticsearch.filters._MOST_TERMS", 65_536)
    if server.is_real:
        assert store.count({"n": list(range(70_000))}) == 40
        with pytest.raises(StoreError, match="conditions of a filter count; shorten"):
            store.search(ROWS[0], filter={"all": [{"not": {"n": n}} for n in range(100, 1600)]})
    monkeypatch.setattr("vdr_db.connectors.elasticsearch.filters._MOST_TERMS", 7)
    assert store.count({"n": IDS}) == 40


def test_a_long_text_is_told_to_be_the_cause(made, server):
    store = filled(made(text_fields=["body"]))
    if server.is_real:
        with pytest.raises(StoreError, match="words of a text"):
            store.search_with_text(ROWS[0], " ".join(f"w{n}" for n in range(3000)), "body")


@pytest.mark.parametrize(
    "options", [{}, {"text_fields": ["body"]}, {"payload_types": {"n": "long"}}]
)
@pytest.mark.parametrize("key", ["", ".", ".x", "x.", "a..b", " "])
def test_a_field_without_a_name_is_refused_whatever_else_is_indexed(made, options, key):
    store = made(**options)
    with pytest.raises(RejectedRows, match="empty part") as caught:
        store.upsert(ROWS[:3], [1, 2, 3], [{}, {"deep": [{key: 1}]}, {"a.b": 1}])
    assert caught.value.ids == [2]
    assert store.count() == 2


def test_a_key_that_may_write_alone_is_enough_to_write(made, proxy):
    store = made(max_docs=10)
    forbidden = Answer(403, body=b'{"error":{"type":"security_exception","reason":"no"}}')
    proxy.decide = lambda request: forbidden if "_refresh" in request.path else None
    assert store.upsert(ROWS[:5], IDS[:5]).count == 5
    assert store.count() == 5  # the bulk request refreshed by itself
    assert store.upsert(ROWS, IDS).count == 40
    assert store.delete(IDS[:2]) == 2


def test_words_are_analysed_as_the_field_says(made, server):
    if not server.is_real:
        pytest.skip("the stand-in has one analyser")
    store = made(text_fields={"body": "english", "plain": None})
    payloads = [{"body": "running dogs", "plain": "running dogs"}]
    store.upsert(ROWS[:1], [1], payloads)
    empty = SparseRows.empty(1, WIDTH)
    assert [hit.id for hit in store.search_with_text(empty, "dog", "body")] == [1]
    assert store.search_with_text(empty, "dog", "plain") == []


@pytest.mark.parametrize("fusion", ["rrf", "sum"])
def test_words_of_the_query_are_marked_in_the_text(open_store, server, fusion):
    if not server.is_real:
        pytest.skip("the stand-in does not mark words")
    store = open_store(text_fields=["body"])
    store.create(WIDTH)
    texts = ["a red apple & <b>an apple</b> tree", "pears alone", "one apple more"]
    store.upsert(ROWS[:3], [1, 2, 3], [{"body": text} for text in texts])
    found = store.search_with_text(ROWS[1], "apple", "body", fusion=fusion, highlight=True)
    marked = {hit.id: hit.highlights for hit in found}
    assert set(marked) == {1, 2, 3}
    marks = "a red <em>apple</em> &amp; &lt;b&gt;an <em>apple</em>&lt;/b&gt; tree"
    assert [html.unescape(text) for text in marked[1]] == [html.unescape(marks)]
    assert "<b>" not in marked[1][0]
    assert marked[2] == ()
    assert marked[3] == ("one <em>apple</em> more",)
    plain = store.search_with_text(ROWS[1], "apple", "body", fusion=fusion)
    assert [(hit.id, hit.score) for hit in plain] == [(hit.id, hit.score) for hit in found]
    assert all(hit.highlights == () for hit in plain)


# A server with low limits of its own


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("low") / "node"


LOW = {
    "http.max_content_length": "64kb",
    "thread_pool.write.queue_size": 1,
    "thread_pool.write.size": 1,
    "thread_pool.search.queue_size": 1,
    "thread_pool.search.size": 1,
    "indices.query.bool.max_clause_count": 64,
}


@pytest.fixture(scope="module")
def low_node(home):
    if reason := opensearch_node.why_missing():
        services.skip(reason)
    node = opensearch_node.OpenSearchNode(home, os.getpid(), **LOW)
    yield node
    node.stop()


def store_on(node, name, **options):
    import opensearchpy

    options.setdefault("retry", RetryPolicy(tries=30, base_s=0.05, cap_s=1.0, deadline_s=120.0))
    client = opensearchpy.OpenSearch([node.url], timeout=60, max_retries=0)
    return ElasticsearchStore(name, client=client, replicas=0, **options)


def test_real_limits_are_met_by_smaller_requests_and_patience(low_node, home, request):
    note_real_server(request, services.version_of(low_node.url))
    name, rows = services.unique_name(), zipf_rows(600, 60, WIDTH, seed=5)
    with store_on(low_node, name) as store:
        store.create(WIDTH)
        # 413: half a megabyte in one request, of which the server takes 64 KB
        assert store.upsert(rows, list(range(600))).count == 600
        assert store._writer.max_bytes < 64 << 10
        huge = [{"text": "x" * 100_000}]
        with pytest.raises(RejectedRows, match="larger than the server takes"):
            store.upsert(rows[:1], ["huge"], huge)
        # 429: many at once, where one waits and all others are refused
        failures: list[BaseException] = []

        def work(number):
            try:
                with store_on(low_node, name) as own:
                    ids = [f"{number}-{n}" for n in range(100)]
                    assert own.upsert(rows[:100], ids).count == 100
                    for _ in range(5):
                        assert all(own.search_batch(rows[:8].topk(30), 3))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert store.count() == 1200
        # 64 clauses
        with pytest.raises(StoreError, match="fewer with `query_top_k`"):
            store.search(zipf_rows(1, 200, WIDTH, seed=6))
        with store_on(low_node, name, query_top_k=50) as few:
            assert few.search(zipf_rows(1, 200, WIDTH, seed=6))
        # kill -9 in the middle of a load, and a second life on the same data
        loading = store.loading()
        loading.__enter__()
        store.upsert(rows[:10], [f"late-{n}" for n in range(10)])
        low_node.kill()
        short = RetryPolicy(tries=2, base_s=0.01)
        with pytest.raises(StoreUnavailable):
            store_on(low_node, name, retry=short).count()
        store.close()
        with pytest.raises(StoreError):
            loading.gen.close()
    again = opensearch_node.OpenSearchNode(home, os.getpid(), **LOW)
    try:
        with store_on(again, name) as store:
            with store.loading():
                store.upsert(rows[:1], ["last"])
            assert store.count() == 1211
    finally:
        again.stop()
