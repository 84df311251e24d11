"""Writes through a network that fails: what was reported as stored is there, once, and unchanged.

Real requests of the official client go through a proxy that resets, loses, delays and refuses them,
to the stand-in of `tests/support/noida.py`.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
from fault_proxy import Answer, HalfAnswer, LostAnswer, RefusedItems, Reset, Slow, running_proxy
from sparse_samples import zipf_rows

from vdr_db import SparseRows
from vdr_db.connectors.elasticsearch.store import ElasticsearchStore
from vdr_db.connectors.retry import RetryPolicy
from vdr_db.errors import RejectedRows, StoreError, StoreUnavailable

WIDTH = 1000
ROWS = zipf_rows(100, 20, WIDTH, seed=5)
IDS = [n if n % 2 else f"doc {n}" for n in range(100)]
PAYLOADS = [{"n": n} for n in range(100)]

FAULTS = {
    "busy": Answer(429, (("Retry-After", "0"),)),
    "unavailable": Answer(503),
    "bad gateway": Answer(502, body=b"<html>bad gateway</html>"),
    "reset": Reset(),
    "lost answer": LostAnswer(),
    "half an answer": HalfAnswer(),
    "items refused for now": RefusedItems((0, 2)),
    "slower than the timeout": Slow(0.3),
}


@pytest.fixture
def made(open_store):
    def make(**options):
        store = open_store(**options)
        store.create(WIDTH)
        return store

    return make


def check_exact(store, rows=ROWS, ids=IDS, payloads=PAYLOADS):
    assert store.count() == len(ids)
    records = store.get(ids, with_rows=True)
    assert [record.id for record in records] == ids
    assert [record.payload for record in records] == payloads
    assert SparseRows.concat([record.row for record in records]) == rows


def every(fault, rate, seed):
    random = np.random.default_rng(seed)

    def decide(request):
        return fault if "_bulk" in request.path and random.random() < rate else None

    return decide


def in_bursts(fault, length, gap):
    state = {"seen": 0}

    def decide(request):
        if "_bulk" not in request.path:
            return None
        state["seen"] += 1
        return fault if state["seen"] % (length + gap) < length else None

    return decide


@pytest.mark.parametrize("pattern", ["1 %", "10 %", "bursts"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_final_state_is_exact(made, server, proxy, fault, pattern):
    if server.is_real and fault.startswith("slower"):
        pytest.skip("on a busy machine all answers of a real server are slower than that")
    options = {"request_timeout": 0.1} if fault.startswith("slower") else {}
    store = made(max_docs=4, client_options={"request_timeout": 10.0, **options})
    planned = FAULTS[fault]
    proxy.decide = {
        "1 %": every(planned, 0.01, seed=1),
        "10 %": every(planned, 0.1, seed=2),
        "bursts": in_bursts(planned, 3, 9),
    }[pattern]
    rounds = 1 if fault.startswith("slower") else 3
    requests = 0
    start = time.monotonic()
    for _ in range(rounds):
        assert store.upsert(ROWS, IDS, PAYLOADS).count == 100
        requests += len(proxy.seen("_bulk"))
        proxy.requests.clear()
    proxy.decide = None
    assert time.monotonic() - start < 20
    # A quarter of the requests fails at most, and each is sent again.
    assert requests < rounds * 25 * 2
    check_exact(store)


def test_items_refused_for_now_are_sent_again_alone(made, proxy):
    store = made()
    proxy.plan(RefusedItems((1, 3)), RefusedItems((1,)), None)
    store.upsert(ROWS[:5], IDS[:5], PAYLOADS[:5])
    assert [request.documents for request in proxy.seen("_bulk")] == [5, 2, 1]
    assert b'"_id":"3"' in proxy.seen("_bulk")[2].body
    assert store.transport.retrier.retries == 2
    check_exact(store, ROWS[:5], IDS[:5], PAYLOADS[:5])


def test_an_endlessly_busy_item_ends_in_an_error_and_the_others_are_there(made, proxy):
    store = made()
    proxy.decide = lambda request: RefusedItems((0,)) if "_bulk" in request.path else None
    with pytest.raises(StoreUnavailable, match=r"failed 8 times .*queue is full"):
        store.upsert(ROWS[:3], IDS[:3], PAYLOADS[:3])
    assert len(proxy.seen("_bulk")) <= 2 + 8
    proxy.clear()
    store.flush()
    assert sorted(store.ids(), key=str) == [1, "doc 2"]
    store.upsert(ROWS[:3], IDS[:3], PAYLOADS[:3])
    check_exact(store, ROWS[:3], IDS[:3], PAYLOADS[:3])


def test_requests_above_the_servers_limit_are_halved_and_the_limit_is_remembered(made, proxy):
    store = made()
    proxy.largest_body = 4000
    assert store.upsert(ROWS, IDS, PAYLOADS).count == 100
    sizes = [len(request.body) for request in proxy.seen("_bulk")]
    refused = [size for size in sizes if size > 4000]
    assert refused == sizes[: len(refused)]
    assert 1 <= len(refused) <= 5
    proxy.requests.clear()
    store.upsert(ROWS, IDS, PAYLOADS)
    assert max(len(request.body) for request in proxy.seen("_bulk")) <= 4000
    proxy.clear()
    check_exact(store)


def test_one_document_above_the_servers_limit_is_refused_alone(made, proxy):
    store = made()
    payloads = [{"n": n, "long": "x" * (6000 if n == 7 else 1)} for n in range(20)]
    proxy.largest_body = 4000
    with pytest.raises(RejectedRows, match="larger than the server takes") as caught:
        store.upsert(ROWS[:20], IDS[:20], payloads)
    assert caught.value.ids == [7]
    rest = [n for n in range(20) if n != 7]
    ids = [IDS[n] for n in rest]
    check_exact(store, ROWS[np.array(rest)], ids, [payloads[n] for n in rest])


def test_a_request_refused_as_a_whole_is_taken_apart_to_find_the_culprit(made, proxy):
    store = made()
    body = b'{"error":{"type":"illegal_argument_exception","reason":"doc 4 is odd"},"status":400}'

    def decide(request):
        return Answer(400, body=body) if b'"_id":"doc 4"' in request.body else None

    proxy.decide = decide
    with pytest.raises(RejectedRows) as caught:
        store.upsert(ROWS[:20], IDS[:20], PAYLOADS[:20])
    assert caught.value.ids == ["doc 4"]
    assert caught.value.reasons == ["illegal_argument_exception: doc 4 is odd"]
    assert len(proxy.seen("_bulk")) <= 11
    assert store.count() == 19


def test_a_forbidden_write_stops_at_once(made, proxy):
    store = made()
    proxy.plan(RefusedItems((0,), 403, "cluster_block_exception"))
    with pytest.raises(StoreError, match="cluster_block_exception"):
        store.upsert(ROWS[:2], IDS[:2])
    assert len(proxy.seen("_bulk")) == 1


def test_keeping_what_is_there_survives_a_lost_answer(made, proxy):
    store = made()
    proxy.plan(LostAnswer())
    written = store.upsert(ROWS[:5], IDS[:5], PAYLOADS[:5], existing="keep")
    # The second time they were there, so they count as kept; what matters is that all are.
    assert written.count == 0
    check_exact(store, ROWS[:5], IDS[:5], PAYLOADS[:5])


@pytest.mark.parametrize("fault", [Answer(503), Reset(), LostAnswer(), HalfAnswer()])
def test_every_other_request_survives_one_failure_as_well(made, proxy, fault):
    seen = set()

    def decide(request):
        key = (request.method, request.path.split("?")[0])
        # Work that must not run twice is not repeated; see `run_task`.
        if key in seen or "_forcemerge" in key[1] or "_reindex" in key[1]:
            return None
        seen.add(key)
        return fault

    proxy.decide = decide
    store = made()
    with store.loading():
        store.upsert(ROWS, IDS, PAYLOADS)
    assert len(store.search(ROWS[0], 5)) == 5
    assert [len(hits) for hits in store.search_batch(ROWS[:3], 5)] == [5, 5, 5]
    assert store.count({"n": 3}) == 1
    assert len(list(store.ids())) == 100
    with store.rebuild(expected=100) as fresh:
        fresh.upsert(ROWS, IDS, PAYLOADS)
    store.create_template()
    store.flush()
    store.optimize()
    assert store.rollover().endswith("-000003")
    assert store.delete(IDS[:1]) in (0, 1)
    assert store.count() == 99
    assert len(seen) > 15


def test_searches_refused_one_by_one_are_asked_again(made, proxy):
    store = made()
    store.upsert(ROWS[:10], IDS[:10])
    expected = store.search_batch(ROWS[:3], 5)
    refused = b'{"error":{"type":"es_rejected_execution_exception","reason":"full"},"status":429}'
    body = b'{"responses":[%b,%b,%b]}' % ((refused,) * 3)
    proxy.plan(Answer(200, body=body), match="_msearch")
    assert store.search_batch(ROWS[:3], 5) == expected
    broken = b'{"responses":[{"error":{"type":"x","reason":"broken"},"status":400}]}'
    proxy.plan(Answer(200, body=broken.replace(b"[", b"[" + refused + b",", 1)), match="_msearch")
    with pytest.raises(StoreError, match="broken"):
        store.search_batch(ROWS[:2], 5)


def test_an_answer_cut_by_a_proxy_is_not_taken_for_success(made, proxy):
    store = made()
    cut = Answer(200, body=b'{"errors":false,"items":[]}')
    proxy.decide = lambda request: cut if "_bulk" in request.path else None
    with pytest.raises(StoreUnavailable, match="must list as many, got 0"):
        store.upsert(ROWS[:2], IDS[:2])
    proxy.decide = None
    proxy.plan(cut)  # once: the same is sent again
    assert store.upsert(ROWS[:2], IDS[:2]).count == 2


def test_a_server_that_is_gone_is_an_error_in_bounded_time(server, open_store):
    with running_proxy(server.proxy.upstream) as dying:
        store = open_store(url=dying.url, retry=RetryPolicy(base_s=0.01, deadline_s=5.0))
        store.create(WIDTH)
    start = time.monotonic()
    for call in (lambda: store.upsert(ROWS[:5], IDS[:5]), lambda: store.search(ROWS[0])):
        with pytest.raises(StoreUnavailable, match="run the same call again"):
            call()
    assert time.monotonic() - start < 10
    store.close()
    with pytest.raises(StoreUnavailable):
        ElasticsearchStore(
            "a", retry=RetryPolicy(tries=2, base_s=0.01), **server.options(dying.url)
        )
