"""One request: when it is repeated, how long the waits are, and what its errors say."""

from __future__ import annotations

import logging
import traceback

import pytest
from fault_proxy import Answer, HalfAnswer, LostAnswer, Reset

elasticsearch = pytest.importorskip("elasticsearch")

from elastic_transport import (  # noqa: E402
    ApiResponseMeta,
    ConnectionTimeout,
    HttpHeaders,
    NodeConfig,
    ObjectApiResponse,
    TlsError,
)
from elastic_transport import ConnectionError as NoConnection  # noqa: E402

from vdr_db import SparseRows  # noqa: E402
from vdr_db.connectors.collections.elasticsearch import VDRElasticsearch  # noqa: E402
from vdr_db.connectors.elasticsearch.store import ElasticsearchStore  # noqa: E402
from vdr_db.connectors.elasticsearch.transport import (  # noqa: E402
    Transport,
    connect,
    error_reason,
)
from vdr_db.connectors.retry import Allowance, Retrier, RetryPolicy  # noqa: E402
from vdr_db.errors import ConfigError, StoreError, StoreUnavailable  # noqa: E402
from vdr_db.failure import Failure  # noqa: E402

ROW = SparseRows.from_dicts([{1: 1.0}], 10)


def meta(status, headers=None):
    node = NodeConfig("http", "server.example", 9200)
    return ApiResponseMeta(status, "1.1", HttpHeaders(headers or {}), 0.0, node)


def refused(status, headers=None, body=None):
    return elasticsearch.ApiError("error", meta(status, headers), body or {"error": "as planned"})


class StubClient:
    """A client that answers from a list; the last answer repeats."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.calls = []
        self.chosen = {}

    def options(self, **chosen):
        self.chosen = chosen
        return self

    def perform_request(self, method, path, **rest):
        self.calls.append((method, path, rest))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return ObjectApiResponse(body=answer, meta=meta(200))

    def close(self):
        pass


class Clock:
    """Time that passes only by waiting; also the event that would end a wait."""

    def __init__(self):
        self.now = 0.0
        self.pauses = []

    def is_set(self):
        return False

    def wait(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds
        return False

    def read(self):
        return self.now


class Draw:
    def __init__(self, share):
        self.share = share

    def uniform(self, least, most):
        return least + self.share * (most - least)


def retrier(clock, draw=None, **policy):
    made = Retrier(RetryPolicy(**policy), stop=clock, clock=clock.read)
    if draw is not None:
        made.chance = Draw(draw)
    return made


def transport(*answers, draw=1.0, **policy):
    clock, client = Clock(), StubClient(*answers)
    return Transport(client, retrier(clock, draw, **policy)), client, clock


PASSING = Failure("transient", "x")


def test_the_clients_own_retries_are_switched_off():
    _, client, _ = transport({})
    assert client.chosen == {"max_retries": 0, "retry_on_timeout": False}


@pytest.mark.parametrize(
    "failure",
    [
        NoConnection("refused"),
        ConnectionTimeout("slow"),
        *(refused(status) for status in (408, 429, 500, 502, 503, 504)),
    ],
)
def test_passing_failures_are_tried_again(failure):
    made, client, clock = transport(failure, failure, {"ok": True})
    assert made.call("GET", "/x").body == {"ok": True}
    assert len(client.calls) == 3
    assert clock.pauses == [0.5, 1.0]
    assert made.retrier.retries == 2


def test_waits_are_drawn_below_a_doubling_bound_up_to_the_cap():
    made, _, clock = transport(NoConnection("no"), draw=0.5, tries=9, deadline_s=1e9)
    with pytest.raises(StoreUnavailable):
        made.call("GET", "/x")
    assert clock.pauses == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0]


def test_waits_are_really_drawn():
    pauses = []
    for _ in range(200):
        clock = Clock()
        Allowance(retrier(clock)).wait(PASSING, StoreUnavailable("x"))
        pauses += clock.pauses
    assert 0 <= min(pauses) < 0.1
    assert 0.4 < max(pauses) <= 0.5


def test_retry_after_is_honoured():
    busy = refused(429, {"retry-after": "7"})
    made, _, clock = transport(
        busy, refused(503, {"retry-after": "Wed, 21 Oct 2099 07:28:00 GMT"}), {}
    )
    made.call("GET", "/x")
    assert clock.pauses == [7.5, 1.0]


def test_tries_and_time_are_counted_from_the_last_progress():
    clock = Clock()
    allowance = Allowance(retrier(clock, 1.0, tries=3, deadline_s=3.0, base_s=1.0))
    for _ in range(10):
        allowance.wait(PASSING, StoreUnavailable("x"))
        allowance.progress()
    assert clock.now == 10.0
    allowance.wait(PASSING, StoreUnavailable("x"))
    clock.now += 1.5
    with pytest.raises(StoreUnavailable, match="failed 2 times in 2 s"):
        allowance.wait(PASSING, StoreUnavailable("x"))
    with pytest.raises(StoreUnavailable, match="failed 1 times in 0 s, last with: down;"):
        Retrier(RetryPolicy(tries=1)).call(lambda: raising(StoreUnavailable("down")))


def raising(error):
    raise error


def test_a_server_that_asks_for_more_time_than_there_is_gets_none():
    made, client, clock = transport(refused(503, {"retry-after": "3600"}), deadline_s=60.0)
    with pytest.raises(StoreUnavailable, match="failed 1 times in 0 s"):
        made.call("GET", "/x")
    assert len(client.calls) == 1
    assert clock.pauses == []


def test_lasting_refusals_are_not_repeated():
    for status, text in ((400, "refused the request"), (401, "credentials"), (403, "do not allow")):
        made, client, _ = transport(refused(status))
        with pytest.raises(StoreError, match=text) as caught:
            made.call("GET", "/x")
        assert not isinstance(caught.value, StoreUnavailable)
        assert len(client.calls) == 1
    made, _, _ = transport(refused(404))
    assert made.call("GET", "/x", allow=(404,)).status == 404
    made, client, _ = transport(TlsError("certificate verify failed"))
    with pytest.raises(StoreError, match="ca_certs"):
        made.call("GET", "/x")
    assert len(client.calls) == 1


def test_too_many_clauses_point_to_query_top_k():
    body = {"error": {"type": "too_many_nested_clauses", "reason": "maxClauseCount is set to 1024"}}
    made, _, _ = transport(refused(400, body=body))
    with pytest.raises(StoreError, match="query_top_k"):
        made.call("POST", "/x/_search", {})


def test_reasons_are_read_from_the_inside():
    body = {
        "error": {
            "type": "document_parsing_exception",
            "reason": "[1:2] failed to parse",
            "caused_by": {"type": "illegal_argument_exception", "reason": "must be positive"},
        },
        "status": 400,
    }
    assert error_reason(body) == (
        "document_parsing_exception: [1:2] failed to parse; "
        "illegal_argument_exception: must be positive"
    )
    assert error_reason("<html>\nbad gateway</html>") == "<html> bad gateway</html>"
    assert error_reason(None) == "no reason given"
    assert len(error_reason("x" * 9999)) == 500


# Clients and servers


MAJORS = {
    "error": {
        "type": "media_type_header_exception",
        "reason": "Invalid media-type value on headers [Accept, Content-Type]",
        "caused_by": {
            "type": "status_exception",
            "reason": "Accept version must be either version 8 or 7, but found 9. "
            "Accept=application/vnd.elasticsearch+json; compatible-with=9",
        },
    },
    "status": 400,
}


@pytest.mark.parametrize("allow", [(), (400, 413)])
def test_a_client_newer_than_the_server_names_the_one_to_install(allow):
    made, client, _ = transport(refused(400, body=MAJORS))
    with pytest.raises(ConfigError, match=r"pip install 'elasticsearch==8\.\*'"):
        made.call("GET", "/x", allow=allow)
    assert len(client.calls) == 1


def test_a_client_older_than_the_server_is_told_so():
    reason = MAJORS["error"]["caused_by"]["reason"]
    reason = reason.replace("8 or 7", "11 or 10")
    caused = {"type": "status_exception", "reason": reason}
    made, _, _ = transport(refused(400, body={"error": {**MAJORS["error"], "caused_by": caused}}))
    with pytest.raises(ConfigError, match=r"an older major .* 'elasticsearch==11\.\*'"):
        made.call("GET", "/x")


def test_a_server_older_than_the_exception_is_recognised():
    header = "Content-Type header [application/vnd.elasticsearch+json; compatible-with=8]"
    made, _, _ = transport(
        refused(406, body={"error": f"{header} is not supported", "status": 406})
    )
    with pytest.raises(ConfigError, match="elasticsearch==<major version of the server>"):
        made.call("GET", "/x", {})


def test_another_product_is_named():
    made, _, _ = transport(elasticsearch.UnsupportedProductError("no", meta(200), {}))
    with pytest.raises(ConfigError, match=r"opensearchpy\.OpenSearch"):
        made.call("GET", "/x")


def test_versions_are_read():
    made, client, _ = transport({"version": {"number": "9.5.2-SNAPSHOT"}})
    assert made.version() == made.version() == (9, 5)
    assert len(client.calls) == 1


def test_other_objects_are_no_clients():
    with pytest.raises(ConfigError, match="asynchronous clients are not supported"):
        Transport(object())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one"),
        ({"url": "http://a:1", "cloud_id": "c"}, "exactly one"),
        ({"url": "http://a:1", "api_key": "k", "basic_auth": ("u", "p")}, "not both"),
        ({"url": "http://user:hunter2@a:1"}, "must not hold a user"),
    ],
)
def test_impossible_addresses_are_refused(options, message):
    full = {"url": None, "cloud_id": None, "api_key": None, "basic_auth": None, **options}
    with pytest.raises(ConfigError, match=message) as caught:
        connect(options={}, **full)
    assert "hunter2" not in str(caught.value)


def test_options_are_checked_before_anything_is_sent():
    for options, message in [
        ({"client": StubClient({}), "url": "http://a:1"}, "its own address"),
        ({"client": StubClient({}), "api_key": "k"}, "its own address"),
        ({"client": StubClient({}), "query_top_k": 0}, "query_top_k"),
        ({"client": StubClient({}), "kind": "dense"}, "kind"),
        ({"client": StubClient({}), "max_docs": 0}, "max_docs"),
        ({"client": StubClient({}), "shards": 0}, "shards"),
        ({"client": StubClient({}), "retry": None, "index": "Upper"}, "lower-case"),
    ]:
        name = options.pop("index", "articles")
        with pytest.raises(ConfigError, match=message):
            ElasticsearchStore(name, **options)
    with pytest.raises(TypeError, match="text_fields"):
        ElasticsearchStore("a", client=StubClient({}), text_fields="body")
    with pytest.raises(ConfigError, match="retry policy"):
        RetryPolicy(tries=0)


def test_tls_options_reach_the_client(monkeypatch):
    seen = {}

    class Recorder(StubClient):
        def __init__(self, hosts, **options):
            super().__init__({})
            seen.update(options, hosts=hosts)

        def perform_request(self, method, path, **rest):
            raise refused(404)

    monkeypatch.setattr(elasticsearch, "Elasticsearch", Recorder)
    VDRElasticsearch(
        "articles",
        url=["https://a:1", "https://b:1"],
        api_key=("id", "key"),
        ca_certs="ca.pem",
        ssl_assert_fingerprint="ab:cd",
        verify_certs=True,
        client_options={"client_cert": "me.pem", "request_timeout": 5.0},
    )
    assert seen == {
        "hosts": ["https://a:1", "https://b:1"],
        "cloud_id": None,
        "api_key": ("id", "key"),
        "basic_auth": None,
        "ca_certs": "ca.pem",
        "ssl_assert_fingerprint": "ab:cd",
        "verify_certs": True,
        "client_cert": "me.pem",
        "request_timeout": 5.0,
    }


# Secrets


@pytest.mark.parametrize(
    "credentials",
    [
        {"api_key": "sesame-open-123"},
        {"api_key": ("name", "sesame-open-123")},
        {"basic_auth": ("name", "sesame-open-123")},
    ],
)
def test_secrets_appear_nowhere(server, proxy, open_store, caplog, credentials):
    if server.is_real:
        pytest.skip("an OpenSearch client has its credentials before it comes here")
    caplog.set_level(logging.DEBUG)
    store = open_store(client_options={"request_timeout": 5.0}, **credentials)
    store.create(10)
    store.upsert(ROW, [1])
    sent = [request.headers.get("authorization", "") for request in proxy.requests]
    header = sent[0].split()[1]
    assert all(sent)
    told = [repr(store), str(store), repr(store.transport), repr(VDRElasticsearch.__init__)]
    faults = [
        [Answer(401)],
        [Answer(403)],
        *[[f] * 8 for f in (Reset(), HalfAnswer(), LostAnswer())],
    ]
    # A server may repeat what it was told. What the client logs of that at DEBUG is not ours.
    echo = b'{"error":{"type":"x","reason":"key sesame-open-123 header %b"}}' % header.encode()
    for status in (401, 400, 413):
        faults.append([Answer(status, body=echo)])
    faults.append([Answer(429, body=echo)] * 8)
    for number, fault in enumerate(faults):
        proxy.plan(*fault, match="_search")
        with pytest.raises(StoreError) as caught:
            store.search(ROW)
        told += [repr(caught.value), "".join(traceback.format_exception(caught.value))]
        if number == 4:
            told.append(caplog.text)
            caplog.set_level(logging.INFO)
            caplog.clear()
    assert not proxy.planned
    told.append(caplog.text)
    assert sum("***" in text for text in told) == 8
    for text in told:
        assert "sesame-open-123" not in text
        assert header not in text
