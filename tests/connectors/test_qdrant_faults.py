"""What real Qdrant servers showed: pages, ports, limits, refusals. On the stand-in, in their words.

With `VDR_TEST_QDRANT_URL` the tests that plant nothing run on that server as well.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import services
from qdrant_contract_engine import Refused
from search_servers import note_real_server
from store_samples import WIDTH, row, rows

from vdr_db.connectors import QdrantStore, work
from vdr_db.connectors.failures import classify, told
from vdr_db.connectors.qdrant.errors import shown_url
from vdr_db.connectors.qdrant.versions import Versions
from vdr_db.connectors.retry import RetryPolicy
from vdr_db.errors import ConfigError, RejectedRows, StoreError, StoreUnavailable
from vdr_db.sparse import SparseRows

qdrant_client = pytest.importorskip("qdrant_client")

QUICK = RetryPolicy(tries=8, base_s=0.001, cap_s=0.01)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    from qdrant_contract_server import QdrantContractServer

    with QdrantContractServer(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(params=["rest", "grpc"])
def protocol(request):
    return request.param


def options_of(server, protocol):
    return {
        "url": server.url,
        "prefer_grpc": protocol == "grpc",
        "client_options": {"grpc_port": server.grpc_port},
        "retry": QUICK,
    }


@pytest.fixture
def connect(server, protocol):
    with contextlib.ExitStack() as opened:

        def open_one(name=None, **more):
            place = {**options_of(server, protocol), **more}
            return opened.enter_context(QdrantStore(name or services.unique_name(), **place))

        yield open_one


@pytest.fixture(params=["embedded", "rest", "grpc", "real"])
def anywhere(request):
    """Opens stores embedded, on the stand-in, and on a real server when there is one."""
    with contextlib.ExitStack() as opened:
        if request.param == "embedded":
            place = {"path": ":memory:"}
        elif request.param == "real":
            service = opened.enter_context(services.running_qdrant())
            note_real_server(request, "Qdrant")
            given = {} if service.grpc_port is None else {"grpc_port": service.grpc_port}
            place = {"url": service.url, "api_key": service.api_key, "client_options": given}
        else:
            place = options_of(request.getfixturevalue("server"), request.param)

        def open_one(**more):
            store = QdrantStore(services.unique_name(), **place, **more)
            opened.enter_context(store)
            if request.param == "real":
                opened.callback(store._engine.versions.drop, store.name)
            return store

        yield open_one


# Pages


def test_pages_of_both_rankings_show_every_document_once(anywhere):
    store = anywhere(dense={"d": 8})
    store.create(WIDTH)
    vectors = np.random.default_rng(1).standard_normal((300, 8)).astype(np.float32)
    some = SparseRows.from_dicts([{1: k % 7 + 1.0} for k in range(300)], WIDTH)
    store.upsert(some, list(range(300)), [{"k": k} for k in range(300)], dense={"d": vectors})
    query = row({1: 1.0})
    pages = [
        store.search_with_dense(query, vectors[5], 10, offset=offset)
        for offset in range(0, 300, 10)
    ]
    found = [hit.id for page in pages for hit in page]
    assert sorted(found) == list(range(300))
    assert all(hit.payload == {"k": hit.id} for page in pages for hit in page)
    for _ in range(20):
        assert store.search_with_dense(query, vectors[5], 10) == pages[0]
    assert store.search_with_dense(query, vectors[5], 300) == [h for page in pages for h in page]


def test_large_ids_and_integers(anywhere):
    store = anywhere()
    store.create(WIDTH)
    ids = [0, 2**63 - 1, 2**63, 2**64 - 1, "x"]
    store.upsert(rows(5), ids, [{"n": n} for n in range(5)])
    assert [record.id for record in store.get(ids)] == ids
    assert set(store.ids()) == set(ids)
    assert {hit.id for hit in store.search(rows(5)[3], 5)} >= {2**64 - 1}
    assert store.get([2**64 - 1])[0].payload == {"n": 3}
    with pytest.raises(
        RejectedRows, match=r"`deep\.n` is the integer 9223372036854775808"
    ) as caught:
        store.upsert(rows(2), [7, 8], [{"deep": {"n": 2**63}}, {"n": -(2**63)}])
    assert caught.value.ids == [7]
    assert store.delete([2**64 - 1, 2**63]) == 2


def test_indexes_over_what_is_there(anywhere):
    store = anywhere()
    store.create(WIDTH)
    store.upsert(rows(9), list(range(9)), [{"n": n, "who": "ab"[n % 2]} for n in range(9)])
    store.index_payloads({"n": "integer", "who": "tenant"})
    assert store.count({"n": {"gte": 4}, "who": "a"}) == 3


def test_weights_that_float16_does_not_hold_are_refused(anywhere):
    store = anywhere(datatype="float16")
    store.create(WIDTH)
    some = SparseRows.from_dicts([{1: 70_000.0}, {1: 65_504.0}, {2: 1.0}], WIDTH)
    with pytest.raises(RejectedRows, match="65,504, the largest number of float16") as caught:
        store.upsert(some, ["large", "fits", "small"])
    assert caught.value.ids == ["large"]
    assert store.search(row({1: 1.0}))[0].score == 65_504.0


# Addresses


@pytest.mark.parametrize("url", ["", "http://", "http://host:99999", "http://host:x"])
def test_what_is_no_address_is_refused_by_name(url):
    with pytest.raises(ConfigError, match="must be the address of a server"):
        QdrantStore("c", url=url)


def test_the_given_port_is_the_one_that_is_asked(server):
    with QdrantStore("port", url=server.url) as store:  # no grpc_port, and gRPC is preferred
        store.create(WIDTH)
        assert store._engine._client.init_options["prefer_grpc"] is False
        assert "port" in server.engine.names()


def test_addresses_are_shown_as_they_are_written():
    assert shown_url("http://user:secret@[::1]:7833/x?key=1") == "http://[::1]:7833/x"


def test_grpc_comes_back_soon_and_requests_tell_their_limit(server):
    given = {"grpc_port": server.grpc_port, "grpc_options": {"a": 1}}
    with QdrantStore("opts", url=server.url, client_options=given, timeout=120) as store:
        options = store._engine._client.init_options["grpc_options"]
        assert options.items() >= {"grpc.max_reconnect_backoff_ms": 2000, "a": 1}.items()
        assert store._engine._read_options["timeout"] == 120


def test_the_limit_of_a_request_reaches_the_server(connect, monkeypatch):
    store = connect(timeout=120)
    store.create(WIDTH)
    seen = {}
    client = store._engine._client
    for name in ("query_batch_points", "count", "scroll", "retrieve", "delete"):
        note(monkeypatch, client, name, seen)
    store.upsert(rows(3), [1, 2, 3])
    store.search(rows(1))
    store.count()
    list(store.ids())
    store.get([1])
    store.delete([1])
    assert {name: given["timeout"] for name, given in seen.items()} == dict.fromkeys(seen, 120)
    assert len(seen) == 5


def note(monkeypatch, client, name, seen):
    import functools

    method = getattr(client, name)

    @functools.wraps(method)
    def noting(*arguments, **options):
        seen[name] = options
        return method(*arguments, **options)

    monkeypatch.setattr(client, name, noting)


def test_options_pass_through(connect, monkeypatch):
    store = connect(
        read_options={"consistency": "majority", "with_payload": ["a"]},
        write_options={"ordering": "strong"},
    )
    store.create(WIDTH)
    seen = {}
    for name in ("query_batch_points", "upsert", "delete", "retrieve"):
        note(monkeypatch, store._engine._client, name, seen)
    store.upsert(rows(3), [1, "b", 3], [{"a": 1, "c": 2}] * 3)
    hits = store.search(rows(1), 3)
    assert {hit.id for hit in hits} <= {1, "b", 3}
    assert all(hit.payload == {"a": 1} for hit in hits)
    assert store.get([1])[0].payload == {"a": 1, "c": 2}
    store.delete([1])
    assert seen["upsert"]["ordering"] == seen["delete"]["ordering"] == "strong"
    assert (
        seen["query_batch_points"]["consistency"] == seen["retrieve"]["consistency"] == "majority"
    )
    assert seen["retrieve"]["with_payload"] is False  # a deletion reads no payloads


# Refusals


@pytest.mark.parametrize(
    "said",
    ["Wrong input: Shard key not specified", "Wrong input: Not existing vector name error: vdr"],
)
def test_what_is_wrong_with_the_collection_is_not_blamed_on_rows(
    connect, server, monkeypatch, said
):
    store = connect()
    store.create(WIDTH)
    sizes = []

    def refuse(name, points):
        sizes.append(len(points))
        raise Refused(400, said)

    monkeypatch.setattr(server.engine, "upsert", refuse)
    with pytest.raises(StoreError, match="how the collection was made") as caught:
        store.upsert(rows(30), list(range(30)))
    assert not isinstance(caught.value, (RejectedRows, StoreUnavailable))
    assert classify(caught.value).kind == "setup"
    assert sizes == [30]


def test_a_bad_point_is_found_although_those_before_it_are_kept(connect, server, monkeypatch):
    store = connect()
    store.create(WIDTH)
    upsert = server.engine.upsert

    def picky(name, points):
        for point in points:
            if point["id"] in (3, 17):
                raise Refused(400, "Wrong input: this point is bad")
            upsert(name, [point])

    monkeypatch.setattr(server.engine, "upsert", picky)
    with pytest.raises(RejectedRows, match="this point is bad") as caught:
        store.upsert(rows(30), list(range(30)))
    assert caught.value.ids == [3, 17]
    assert sorted(store.ids()) == [i for i in range(30) if i not in (3, 17)]


def test_the_sentence_of_a_refusal_is_shown_and_not_its_bytes():
    content = (
        b'{"status":{"error":"Wrong input: Index required but not found for \\"s\\""},"time":0}'
    )
    error = qdrant_client.http.exceptions.UnexpectedResponse(400, "Bad Request", content, None)
    assert told(error) == 'Wrong input: Index required but not found for "s"'
    other = qdrant_client.http.exceptions.UnexpectedResponse(502, "Bad Gateway", b"<html>", None)
    assert "502" in told(other)


@pytest.mark.parametrize("status", [400, 500])
@pytest.mark.parametrize(
    "said",
    [
        "2 out of 6 shards failed to apply operation. First error: currently unavailable",
        "1 of 1 read operations failed",
        "Timeout error: Operation 'Search' timed out after 1s",
    ],
)
def test_a_shard_that_is_down_passes(connect, server, monkeypatch, said, status):
    store = connect()
    store.create(WIDTH)
    store.upsert(rows(3), [1, 2, 3])
    count, failures = server.engine.count, iter(range(3))

    def down(name, filter):
        if next(failures, None) is not None:
            raise Refused(status, said)
        return count(name, filter)

    monkeypatch.setattr(server.engine, "count", down)
    assert store.count() == 3


def test_a_shard_that_is_down_when_a_store_is_opened_passes(connect, server, monkeypatch):
    connect("opened").create(WIDTH)
    exists, failures = server.engine.exists, iter(range(2))

    def down(name):
        if next(failures, None) is not None:
            raise Refused(500, "2 out of 6 shards failed, currently unavailable")
        return exists(name)

    monkeypatch.setattr(server.engine, "exists", down)
    assert connect("opened").width == WIDTH


# A strict mode


def test_the_largest_page_of_a_server_is_kept_to(connect, server, monkeypatch):
    store = connect(dense={"d": 4})
    store.create(WIDTH)
    dense = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32)
    same = SparseRows.from_dicts([{1: 1.0 + n / 64} for n in range(40)], WIDTH)
    store.upsert(same, list(range(40)), dense={"d": dense})
    whole = store.search(row({1: 1.0}), 40)
    both = store.search_with_dense(row({1: 1.0}), dense[0], 40)
    asked = []

    def strict(method):
        def limited(name, body):
            asked.append(body.get("limit", 10))
            if asked[-1] > 5:
                said = f'Forbidden: Limit exceeded {asked[-1]} > 5 for "limit". Help: use less'
                raise Refused(403, said)
            return method(name, body)

        return limited

    for name in ("scroll", "query"):
        monkeypatch.setattr(server.engine, name, strict(getattr(server.engine, name)))
    assert sorted(store.ids()) == list(range(40))
    assert store.search(row({1: 1.0}), 40) == whole
    assert store.search(row({1: 1.0}), 12, offset=7) == whole[7:19]
    assert store.search_with_dense(row({1: 1.0}), dense[0], 40) == both
    assert sum(limit > 5 for limit in asked) == 1  # told once, known since


def test_the_largest_batch_of_a_server_is_kept_to(connect, server, monkeypatch):
    store = connect()
    store.create(WIDTH)
    upsert = server.engine.upsert

    def strict(name, points):
        if len(points) > 7:
            raise Refused(400, f'Limit exceeded {len(points)} > 7 for "upsert limit"')
        upsert(name, points)

    monkeypatch.setattr(server.engine, "upsert", strict)
    assert store.upsert(rows(60), list(range(60))).count == 60


@pytest.mark.parametrize("capacity", [8, 40])
def test_a_rate_smaller_than_the_batch_takes_its_time_and_ends(
    connect, server, monkeypatch, capacity
):
    """Tokens come back only while one waits; what is asked at once must fit."""
    store = connect(retry=RetryPolicy(tries=3, base_s=0.001, deadline_s=2.0))
    store.create(WIDTH)
    upsert, left, waits = server.engine.upsert, [capacity], []

    def limited(name, points):
        if len(points) > left[0]:
            told = left[0]
            left[0] = capacity
            waits.append(len(points))
            raise Refused(
                429,
                "Rate limiting exceeded: request larger than rate limiter capacity, please try to "
                "split your request"
                if len(points) > capacity
                else f"Operation requires {len(points)} tokens but only {told}.9 were available. "
                "Retry after 0.01s",
            )
        left[0] -= len(points)
        upsert(name, points)

    monkeypatch.setattr(server.engine, "upsert", limited)
    assert store.upsert(rows(200), list(range(200))).count == 200
    assert store.count() == 200


def test_a_rollover_keeps_its_requests_small(connect, server, monkeypatch):
    store = connect(versioned=True)
    store.create(WIDTH)
    text = "x" * 500_000
    store.upsert(rows(60), list(range(60)), [{"text": text}] * 60)
    upsert, sizes = server.engine.upsert, []

    def noting(name, points):
        sizes.append(len(points))
        upsert(name, points)

    monkeypatch.setattr(server.engine, "upsert", noting)
    assert store.rollover().endswith("-000002")
    assert max(sizes) * len(text) < 10 << 20
    assert store.count() == 60


def test_indexes_made_on_the_server_are_known(connect):
    name = services.unique_name()
    connect(name).create(WIDTH)
    client = connect(name)._engine._client
    client.create_payload_index(name, field_name="n", field_schema="integer", wait=True)
    again = connect(name, payload_indexes={"n": "integer"})
    again.upsert(rows(2), [1, 2], [{"n": 1}, {"n": 2}])
    assert again.count({"n": 2}) == 1


def test_what_a_killed_rebuild_left_behind_is_listed_and_removed(connect, monkeypatch):
    store = connect(versioned=True)
    store.create(WIDTH)
    killed = connect(store.name).rebuild()
    killed.__enter__()
    assert store.leftovers() == {}  # its process is alive
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(work.socket, "gethostname", lambda: "another host")
        (reason,) = store.leftovers().values()
        assert "or still fills it" in reason
    monkeypatch.setattr(work.os, "kill", no_process)
    assert list(store.leftovers()) == [f"{store.name}-000002"]
    assert store.remove_leftovers() == [f"{store.name}-000002"]
    assert store.leftovers() == {}
    killed.gen.close()


@pytest.mark.parametrize("keep_old", [True, False])
def test_a_collection_that_was_to_be_kept_is_no_leftover(connect, monkeypatch, keep_old):
    store = connect(versioned=True)
    store.create(WIDTH)
    with monkeypatch.context() as lost:
        lost.setattr(Versions, "drop", lambda *_, **__: None)  # as when killed right before
        with store.rebuild(keep_old=keep_old):
            pass
    monkeypatch.setattr(work.os, "kill", no_process)
    left = [] if keep_old else [f"{store.name}-000001"]
    assert list(store.leftovers()) == left
    with store.rebuild(keep_old=keep_old):
        pass
    assert list(store.leftovers()) == left


def no_process(*_):
    raise ProcessLookupError


def test_an_embedded_collection_has_no_groups():
    with QdrantStore("c", path=":memory:") as store:
        store.create(WIDTH)
        with pytest.raises(ConfigError, match="is embedded and has no aliases and groups"):
            store.search_groups(rows(1), "d")


def test_groups_are_asked_for_and_read(connect, monkeypatch):
    """The stand-in has none: what is asked for is compared with the client's own models."""
    models = qdrant_client.models
    store = connect()
    store.create(WIDTH)
    seen = {}

    def groups(name, **given):
        seen.update(given)
        hit = models.ScoredPoint(id=7, version=0, score=2.0, payload={"_vdr_id": "x", "d": 1})
        return models.GroupsResult(groups=[models.PointGroup(hits=[hit], id=1)])

    monkeypatch.setattr(store._engine._client, "query_points_groups", groups)
    ((value, hits),) = store.search_groups(row({1: 2.0}), "d", limit=2, size=1, filter={"d": 1})
    assert (value, [(h.id, h.score, h.payload) for h in hits]) == (1, [("x", 2.0, {"d": 1})])
    assert (seen["group_by"], seen["limit"], seen["group_size"], seen["using"]) == (
        "d",
        2,
        1,
        "vdr",
    )
    assert seen["query"].indices == [1]
    assert seen["query_filter"] is not None
