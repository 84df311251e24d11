"""Addresses: one grammar, what answers there, and one sentence with the fix for each wrong case."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from contextlib import contextmanager

import pytest
import services
from fault_proxy import Answer, running_proxy
from store_samples import WordEncoder
from store_servers import KEY, OPENSEARCH_ROOT, running_place

from vdr_db.connectors import VDRElasticsearch, VDRQdrant, open_collection
from vdr_db.connectors.address import Access, Address, parse_address, server_url
from vdr_db.connectors.asking import ask
from vdr_db.connectors.retry import RetryPolicy
from vdr_db.errors import ConfigError, StoreError, StoreMismatch, StoreUnavailable

pytestmark = pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection")
NAMES = ("API_KEY", "USER", "PASSWORD", "CA_CERTS", "VERIFY_CERTS")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for store in ("", "QDRANT_", "ELASTICSEARCH_", "OPENSEARCH_"):
        for name in NAMES:
            monkeypatch.delenv(f"VDR_DB_{store}{name}", raising=False)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("articles.qdrant", Address(None, "articles.qdrant")),
        ("/a/b c", Address(None, "/a/b c")),
        (":memory:", Address(None, ":memory:")),
        ("http://localhost", Address("qdrant", "http://localhost:6333")),
        ("qdrant://h:1/", Address("qdrant", "http://h:1")),
        ("https://h.example/prefix/", Address("qdrant", "https://h.example:6333/prefix")),
        ("http://[::1]:7", Address("qdrant", "http://[::1]:7")),
        ("elasticsearch+http://h", Address("elasticsearch", "http://h:9200")),
        ("elasticsearch+https://h:443", Address("elasticsearch", "https://h:443")),
        ("opensearch+https://h:9201/os", Address("opensearch", "https://h:9201/os")),
    ],
)
def test_the_grammar(text, address):
    assert parse_address(text) == address


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "got an empty one"),
        ("s3://bucket/x", "must be a folder, :memory:, http(s)://HOST:PORT"),
        ("elasticsearch://h:9200", "write elasticsearch+http:// or elasticsearch+https://"),
        ("localhost:6333", "write http://localhost:6333 for Qdrant, elasticsearch+http://local"),
        ("127.0.0.1:9200", "elasticsearch+http://127.0.0.1:9200"),
        ("http://", "needs a host"),
        ("http://h:99999", "is no address (Port out of range"),
        ("http://h?key=secret-4711", "got http://h with a query"),
        ("elasticsearch+https://me:secret-4711@h", "set VDR_DB_USER and VDR_DB_PASSWORD"),
    ],
)
def test_what_is_no_address(text, told):
    with pytest.raises(ConfigError) as caught:
        parse_address(text)
    assert told in str(caught.value)
    assert "4711" not in str(caught.value)


def test_a_host_without_a_scheme():
    assert server_url("127.0.0.1:9200", "elasticsearch") == "http://127.0.0.1:9200"
    assert server_url("localhost", "qdrant") == "http://localhost:6333"


def test_what_the_environment_says(monkeypatch):
    assert Access.from_environment("qdrant") == Access()
    monkeypatch.setenv("VDR_DB_API_KEY", "one-for-all")
    monkeypatch.setenv("VDR_DB_QDRANT_API_KEY", "its-own")
    monkeypatch.setenv("VDR_DB_VERIFY_CERTS", "0")
    monkeypatch.setenv("OTHER", "elsewhere")
    assert Access.from_environment("qdrant") == Access("its-own", verify_certs=False)
    assert Access.from_environment("opensearch").api_key == "one-for-all"
    assert Access.from_environment("qdrant", key="OTHER").api_key == "elsewhere"
    assert "its-own" not in repr(Access.from_environment("qdrant"))
    monkeypatch.setenv("VDR_DB_USER", "me")
    with pytest.raises(ConfigError, match="go together"):
        Access.from_environment("qdrant")
    monkeypatch.setenv("VDR_DB_PASSWORD", "secret")
    assert Access.from_environment("opensearch").basic_auth == ("me", "secret")


@contextmanager
def answering(status, body, headers=()):
    """A web server that answers everything alike."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


ELASTIC = json.dumps({"version": {"number": "9.4.3"}, "tagline": "You Know, for Search"}).encode()
OPEN = json.dumps(OPENSEARCH_ROOT).encode()
QDRANT = b'{"title":"qdrant - vector search engine","version":"1.18.3"}'


@pytest.mark.parametrize(
    ("status", "body", "headers", "product", "told"),
    [
        (200, ELASTIC, (), "elasticsearch", "Elasticsearch 9.4.3"),
        (200, OPEN, (), "elasticsearch", "OpenSearch 2.19.6"),
        (200, QDRANT, (), "qdrant", "Qdrant 1.18.3 over REST"),
        (403, b"{}", (("X-Elastic-Product", "Elasticsearch"),), "elasticsearch", "Elasticsearch"),
        (503, b"not now", (), "opensearch", "OpenSearch"),
    ],
)
def test_a_server_says_what_it_is(status, body, headers, product, told):
    with answering(status, body, headers) as url:
        assert str(ask(url, product, Access())) == told


@pytest.mark.parametrize(
    ("status", "body", "product", "kind", "told"),
    [
        (200, QDRANT, "elasticsearch", StoreMismatch, "is Qdrant, not Elasticsearch; open it by h"),
        (200, OPEN, "qdrant", StoreMismatch, "open it by opensearch+http://127.0.0.1"),
        (200, b"<html>hello", "qdrant", StoreMismatch, "is neither Qdrant nor Elasticsearch nor"),
        (404, b"{}", "opensearch", StoreMismatch, "is neither Qdrant nor Elasticsearch nor"),
        (400, b"sent to an HTTPS server", "qdrant", StoreMismatch, "or write https://"),
        (
            401,
            b"{}",
            "qdrant",
            StoreError,
            "lets nobody in without credentials; set VDR_DB_API_KEY",
        ),
        (401, b"", "opensearch", StoreError, "or VDR_DB_USER and VDR_DB_PASSWORD"),
    ],
)
def test_another_answer_is_told_with_the_fix(status, body, product, kind, told):
    with answering(status, body) as url, pytest.raises(kind) as caught:
        ask(url, product, Access())
    assert told in str(caught.value)
    assert url.split("//")[1] in str(caught.value)
    assert str(caught.value).count(". ") == 0


def test_nothing_answers_and_no_http():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(StoreUnavailable, match=r"nothing answers at .* \(Connection refused\)"):
            ask(url, "qdrant", Access())
    with answering(200, QDRANT) as url, pytest.raises(StoreMismatch, match="write http://"):
        ask(url.replace("http", "https"), "qdrant", Access())


@pytest.fixture
def qdrant(tmp_path):
    pytest.importorskip("qdrant_client")
    from qdrant_contract_server import QdrantContractServer

    with QdrantContractServer(tmp_path / "server", api_key=KEY) as server:
        yield server


def test_qdrant_is_spoken_to_on_the_port_that_is_given(qdrant):
    grpc_url = f"qdrant://127.0.0.1:{qdrant.grpc_port}"
    access = Access(KEY)
    with open_collection(grpc_url, "a", WordEncoder(), access=access) as articles:
        articles.add_texts(["chess"], ["x"])
        assert articles.server.grpc_port == qdrant.grpc_port
    before = qdrant.requests["upsert"]
    with VDRQdrant("a", WordEncoder(), url=qdrant.url, api_key=KEY) as articles:
        assert articles.search("chess")[0].id == "x"
        assert articles.server.grpc_port is None
        articles.add_texts(["kings"], ["y"])
    assert qdrant.requests["upsert"] == before + 1
    for url, grpc in ((qdrant.url, True), (grpc_url.replace("qdrant", "http"), False)):
        with pytest.raises(StoreMismatch, match="leave `prefer_grpc` out to take what it speaks"):
            VDRQdrant("a", url=url, api_key=KEY, prefer_grpc=grpc)
    for key, told in ((None, "lets nobody in"), ("wrong", "refuses the credentials")):
        for port in (qdrant.rest_port, qdrant.grpc_port):
            with pytest.raises(StoreError, match=told):
                VDRQdrant("a", url=f"http://127.0.0.1:{port}", api_key=key)


def test_a_qdrant_is_no_elasticsearch(qdrant):
    for _ in range(2):
        told = r"is Qdrant, not Elasticsearch; open it by http://"
        with pytest.raises(StoreMismatch, match=told):
            VDRElasticsearch("a", url=qdrant.url)
        qdrant.api_key = None


def test_a_client_of_another_major_version_is_told_at_opening(noida_server):
    body = {"type": "media_type_header_exception", "reason": "Invalid media-type value"}
    told = {"type": "status_exception", "reason": "must be either version 8 or 7, but found 9."}
    refusal = json.dumps({"error": {**body, "caused_by": told}, "status": 400}).encode()

    def of_version_8(request):
        header = (("X-Elastic-Product", "Elasticsearch"),)
        speaks_9 = "compatible-with=9" in request.headers.get("accept", "")
        return Answer(400, header, refusal) if speaks_9 else None

    with running_proxy(noida_server.proxy.url) as proxy:
        proxy.decide = of_version_8
        with pytest.raises(ConfigError, match=r"run: pip install 'elasticsearch==8\.\*'"):
            VDRElasticsearch("articles", WordEncoder(), url=proxy.url)
    pytest.importorskip("qdrant_client")
    told = r"is Qdrant 2\.0\.1 over REST and .* pip install 'qdrant-client==2\.\*'"
    with (
        answering(200, QDRANT.replace(b"1.18.3", b"2.0.1")) as url,
        pytest.raises(ConfigError, match=told),
    ):
        VDRQdrant("articles", WordEncoder(), url=url)


@pytest.mark.parametrize("kind", ["elasticsearch", "opensearch"])
def test_elasticsearch_and_opensearch_are_told_apart(kind, noida_server, tmp_path):
    pytest.importorskip("opensearchpy")
    name, retry = services.unique_name(), RetryPolicy(base_s=0.001)
    with running_place(kind, tmp_path, noida_server.proxy.url) as place:
        url = place.address.split("//")[1]  # as people type it
        options = {"url": url, "api_key": KEY, "replicas": 0, "retry": retry}
        with VDRElasticsearch(name, WordEncoder(), **options) as articles:
            articles.add_texts(["chess"], ["x"])
            assert articles.search("chess")[0].id == "x"
            assert str(articles.server).startswith(place.told)
            assert KEY not in repr(articles)
        other = "opensearch" if kind == "elasticsearch" else "elasticsearch"
        with open_collection(f"{other}+http://{url}", name, access=Access(KEY)) as articles:
            assert articles.count() == 1, "the two stand for each other"
        if kind == "opensearch":
            with pytest.raises(ConfigError, match="OpenSearch has no field type sparse_vector"):
                VDRElasticsearch(name, kind="sparse_vector", **options)
        with pytest.raises(StoreMismatch, match=rf"not Qdrant; open it by {kind}\+http://"):
            open_collection(f"http://{url}", name, access=Access(KEY))


def test_a_busy_server_is_asked_again_by_the_store(noida_server):
    with running_proxy(noida_server.proxy.url) as proxy:
        proxy.plan(Answer(503), match="/")
        options = {"url": proxy.url, "replicas": 0, "retry": RetryPolicy(base_s=0.001)}
        with VDRElasticsearch(services.unique_name(), WordEncoder(), **options) as articles:
            assert articles.count() == 0
            assert articles.server.version == ""


def test_what_open_collection_needs(tmp_path):
    with pytest.raises(ConfigError, match="pass the `name`"):
        open_collection(tmp_path / "none")
    with open_collection(tmp_path / "a", "my articles", WordEncoder()) as articles:
        articles.add_texts(["chess"], ["x"])
    with open_collection(tmp_path / "a", encoder=WordEncoder()) as articles:
        assert articles.store.name == "my articles"
        assert articles.search("chess")[0].id == "x"
    with open_collection(":memory:", "b", WordEncoder()) as articles:
        assert articles.count() == 0
