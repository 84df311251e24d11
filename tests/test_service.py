"""`serve` as a service: encoding, batching, writing, keys, limits, numbers, and stopping."""

from __future__ import annotations

import base64
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from served_command import commanded
from tiny_png import png

from vdr_db.errors import ConfigError, InputError, StoreUnavailable
from vdr_db.sparse import SparseRows

httpx = pytest.importorskip("httpx")
for module in ("fastapi", "uvicorn", "prometheus_client", "orjson"):
    pytest.importorskip(module)

from vdr_db.budget import Budget  # noqa: E402
from vdr_db.serve import SearchService, listen, make_app  # noqa: E402
from vdr_db.serve.batching import Batcher  # noqa: E402
from vdr_db.serve.server import make_server  # noqa: E402
from vdr_db.serve.watch import ACCESS_LOG  # noqa: E402

TEXTS = ["the tallest animal is a giraffe", "hot water on green leaves", "a game of cards"]
KEY = "correct horse"
JSON = {"content-type": "application/json"}
BUDGET = Budget(texts=8, text_characters=2000, upload_bytes=200_000, body_s=1.0)


@contextmanager
def running(app):
    """The application behind a real server on a free port."""
    address = listen("127.0.0.1", 0)
    server = make_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [address.socket]}, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.02)
        yield address
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        address.socket.close()


@contextmanager
def served(encoder, *, budget=BUDGET, images=None, **options):
    """A service over an embedded collection of `TEXTS`, and a client of it."""
    from vdr_db.connectors import VDRQdrant

    collection = VDRQdrant("texts", encoder, path=":memory:")
    collection.add_texts(TEXTS, ids=["zoo", "tea", 3], payloads=[{"n": n} for n in range(3)])
    service = SearchService(collection, encoder, images=images, budget=budget)
    with running(make_app(service, **options)) as address:
        base = address.url.rstrip("/")
        with httpx.Client(base_url=base, timeout=60, trust_env=False) as client:
            yield client


@pytest.fixture(scope="module")
def client(tiny_splade):
    with served(tiny_splade, writes=True) as made:
        yield made


def rows_of(answer, width):
    assert answer.status_code == 200, answer.text
    rows = [{one["index"]: one["value"] for one in row} for row in answer.json()]
    return SparseRows.from_dicts(rows, width)


def same_bits(one, other):
    return (
        one.indptr.tolist() == other.indptr.tolist()
        and one.indices.tolist() == other.indices.tolist()
        and one.values.tobytes() == other.values.tobytes()
    )


# Encoding


def test_embed_sparse_is_that_of_text_embeddings_inference(client, tiny_splade):
    # The request of the project's README, and what its clients send besides.
    width = tiny_splade.vocabulary.size
    alone = client.post("/embed_sparse", json={"inputs": "I like you."})
    assert same_bits(rows_of(alone, width), tiny_splade.encode_documents(["I like you."]))
    request = {"inputs": [*TEXTS, ""], "truncate": True, "truncation_direction": "Right"}
    many = client.post("/embed_sparse", json=request | {"prompt_name": None, "normalize": True})
    assert same_bits(rows_of(many, width), tiny_splade.encode_documents([*TEXTS, ""]))
    queries = client.post("/embed_sparse", json={"inputs": TEXTS, "prompt_name": "query"})
    assert same_bits(rows_of(queries, width), tiny_splade.encode_queries(TEXTS))


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({"inputs": []}, 422),
        ({}, 422),
        ({"inputs": 7}, 422),
        ({"inputs": ["x"] * 9}, 413),
        ({"inputs": "x" * 2001}, 413),
        ({"inputs": "giraffe " * 200, "truncate": False}, 422),
        ({"inputs": "x", "truncation_direction": "Left"}, 422),
        ({"inputs": "x", "prompt_name": "nobody"}, 422),
        ({"inputs": ["fine", "\ud800"]}, 422),
    ],
)
def test_what_embed_sparse_refuses(client, request_, status):
    content = json.dumps(request_)  # with the lone surrogate as an escape
    answer = client.post("/embed_sparse", content=content, headers=JSON)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error", "error_type", "detail"}
    assert answer.json()["error_type"] == "validation"


def test_long_texts_are_cut_unless_that_is_refused(client, tiny_splade):
    text = "giraffe " * 200
    with pytest.warns(UserWarning, match="were cut") if not tiny_splade.truncated else noise():
        expected = tiny_splade.encode_documents([text])
    answer = client.post("/embed_sparse", json={"inputs": text})
    assert same_bits(rows_of(answer, tiny_splade.vocabulary.size), expected)
    refused = client.post("/embed_sparse", json={"inputs": ["x", text], "truncate": False})
    assert "text 1 must have at most" in refused.json()["error"]


@contextmanager
def noise():
    yield


def test_encode_gives_vectors_of_texts(client, tiny_splade):
    for side, encode in (
        ("document", tiny_splade.encode_documents),
        ("query", tiny_splade.encode_queries),
    ):
        answer = client.post("/api/encode", json={"texts": TEXTS, "side": side})
        assert answer.status_code == 200
        for vector, row in zip(answer.json()["vectors"], encode(TEXTS), strict=True):
            assert vector["indices"] == row.indices.tolist()
            assert np.array(vector["values"], np.float32).tobytes() == row.values.tobytes()
    for wrong in ({}, {"texts": ["x"], "images": [""]}, {"texts": ["x"], "k": 3}, {"texts": "x"}):
        refused = client.post("/api/encode", json=wrong)
        assert refused.status_code == 422, wrong
    assert "k: " in client.post("/api/encode", json={"texts": ["x"], "k": 3}).json()["detail"]
    image = base64.b64encode(png(8, 8, lambda x, y: (x, y, 9))).decode()
    refused = client.post("/api/encode", json={"images": [image]})
    assert (refused.status_code, "reads no images" in refused.text) == (422, True)


@pytest.mark.filterwarnings("ignore:.* were cut:UserWarning")
def test_encode_gives_vectors_of_images(tmp_path):
    pytest.importorskip("PIL.Image")
    from image_folders import write_cross_modal

    from vdr_db import CrossModalEncoder
    from vdr_db.serve import ImageUploads

    encoder = CrossModalEncoder.from_pretrained(write_cross_modal(tmp_path / "m"), device="cpu")
    files = [png(20 + i, 16, lambda x, y: (7 * x, 9 * y, 90)) for i in range(3)]
    budget = Budget(upload_pixels=400)
    uploads = ImageUploads(encoder.image, encoder.text, budget=budget)
    with served(encoder.text, images=uploads, budget=budget) as client:
        sent = {"images": [base64.b64encode(file).decode() for file in files]}
        answer = client.post("/api/encode", json=sent)
        expected = encoder.encode_images(files).rows
        for vector, row in zip(answer.json()["vectors"], expected, strict=True):
            assert vector["indices"] == row.indices.tolist()
            assert np.array(vector["values"], np.float32).tobytes() == row.values.tobytes()
        large = base64.b64encode(png(30, 20, lambda x, y: (1, 2, 3))).decode()
        refused = client.post("/api/encode", json={"images": [sent["images"][0], large]})
        assert refused.status_code == 422
        assert "image 1 cannot be read: it has 30 by 20 pixels" in refused.json()["detail"]
        assert client.post("/api/encode", json={"images": ["?"]}).status_code == 422


# Batching


class Slow:
    """An encoder whose calls wait until they are let go; it keeps what they were given."""

    def __init__(self):
        self.calls, self.go = [], threading.Event()

    def encode_queries(self, texts):
        self.calls.append(list(texts))
        self.go.wait(30)
        if "bad" in texts:
            raise InputError("a bad text")
        return SparseRows.from_dicts([{len(text): 1.0} for text in texts], 99)

    encode_documents = encode_queries


def test_what_waits_is_encoded_together():
    encoder, seen = Slow(), []
    batcher = Batcher(encoder, most=6, watch=lambda texts, seconds: seen.append(texts))
    first = batcher.submit("query", ["a"])
    while not encoder.calls:
        time.sleep(0.01)
    jobs = [batcher.submit("query", ["b" * n, "c"]) for n in range(1, 5)]
    other = batcher.submit("document", ["dd"])
    gone = batcher.submit("query", ["nobody waits"])
    assert gone.cancel()
    bad = batcher.submit("query", ["bad"])
    encoder.go.set()
    assert first.result(30).to_dicts() == [{1: 1.0}]
    assert [job.result(30).to_dicts()[0] for job in jobs] == [{n: 1.0} for n in range(1, 5)]
    assert other.result(30).to_dicts() == [{2: 1.0}]
    with pytest.raises(InputError, match="a bad text"):
        bad.result(30)
    batcher.close()
    assert encoder.calls[:2] == [["a"], ["b", "c", "bb", "c", "bbb", "c"]]
    assert encoder.calls[2:5] == [["bbbb", "c", "bad"], ["bbbb", "c"], ["bad"]]
    assert encoder.calls[5:] == [["dd"]]
    assert sum(seen) == 1 + 8 + 1
    with pytest.raises(StoreUnavailable, match="has stopped"):
        batcher.submit("query", ["x"])


def test_many_clients_share_calls_and_get_the_same_bits(client, tiny_splade):
    texts = [f"{text} {n}" for n in range(20) for text in TEXTS]
    expected = [tiny_splade.encode_documents([text]) for text in texts]
    with ThreadPoolExecutor(16) as pool:
        answers = list(
            pool.map(lambda text: client.post("/embed_sparse", json={"inputs": text}), texts)
        )
    width = tiny_splade.vocabulary.size
    for answer, row in zip(answers, expected, strict=True):
        assert same_bits(rows_of(answer, width), row)
    counts = numbers(client)
    assert counts["vdr_db_batch_texts_sum"] > counts["vdr_db_batch_texts_count"]


def numbers(client):
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = (line for line in answer.text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


# Writing


def test_documents_are_written_and_removed(client):
    new = [
        {"id": "moon", "text": "the moon is made of cheese", "payload": {"kind": "tale"}},
        {"id": 70, "text": "sheep count themselves", "payload": {}},
    ]
    try:
        answer = client.post("/documents", json={"documents": new})
        assert answer.json() == {"ids": ["moon", 70], "refused": []}
        hits = client.get("/api/search", params={"q": "cheese moon"}).json()["hits"]
        assert (hits[0]["id"], hits[0]["payload"]["kind"]) == ("moon", "tale")
        assert client.get("/api/info").json()["texts"] == 5
    finally:
        removed = client.request("DELETE", "/documents", json={"ids": ["moon", 70, "nobody"]})
    assert removed.json() == {"deleted": 2}
    assert client.get("/api/info").json()["texts"] == 3


@pytest.mark.parametrize(
    ("method", "body", "status", "said"),
    [
        ("POST", {"documents": []}, 422, "documents: "),
        ("POST", {"documents": [{"text": "x"}]}, 422, "documents.0.id: "),
        ("POST", {"documents": [{"id": -1, "text": "x"}]}, 422, "id"),
        ("POST", {"documents": [{"id": 1, "text": "x", "vector": []}]}, 422, "documents.0.vector"),
        ("POST", {"documents": [{"id": 1, "text": "x"}] * 2}, 422, "twice"),
        ("POST", {"documents": [{"id": n, "text": "x"} for n in range(9)]}, 413, "8 documents"),
        ("POST", {"documents": [{"id": 1, "text": "x" * 2001}]}, 413, "2,000 characters"),
        ("POST", {"documents": [{"id": 1, "text": "x", "payload": {"text": 3}}]}, 422, "text"),
        ("DELETE", {"ids": []}, 422, "ids: "),
        ("DELETE", {"ids": [True]}, 422, "ids"),
    ],
)
def test_what_writing_refuses(client, method, body, status, said):
    answer = client.request(method, "/documents", json=body)
    assert (answer.status_code, said in answer.json()["detail"]) == (status, True), answer.text
    assert client.get("/api/info").json()["texts"] == 3


# Who may ask


def test_a_key_is_asked_for(tiny_splade):
    with served(tiny_splade, api_key=KEY) as client:
        paths = ["/", "/api/search?q=tea", "/api/info", "/metrics", "/openapi.json", "/nowhere"]
        for path in paths:
            answer = client.get(path)
            assert answer.status_code == 401, path
            is_page = path in ("/", "/nowhere")
            assert answer.headers["www-authenticate"].startswith("Basic" if is_page else "Bearer")
        body = {"inputs": ["x" * 2000] * 8}
        assert client.post("/embed_sparse", json=body).status_code == 401
        for wrong in ({"api-key": "x"}, {"authorization": "Bearer"}, {"authorization": "Basic ?"}):
            assert client.get("/api/info", headers=wrong).status_code == 401
        assert client.get("/api/info", auth=("me", "wrong")).status_code == 401
        for right in ({"api-key": KEY}, {"authorization": f"Bearer {KEY}"}):
            assert client.get("/api/info", headers=right).status_code == 200
            assert client.post("/embed_sparse", json={"inputs": "x"}, headers=right).is_success
        assert client.get("/", auth=("anybody", KEY)).status_code == 200
        for path in ("/healthz", "/readyz"):
            assert client.get(path).status_code == 200
        described = client.get("/openapi.json", headers={"api-key": KEY}).json()
        assert described["paths"]["/api/info"]["get"]["security"] == [{"key": []}]
        assert "401" not in described["paths"]["/healthz"]["get"]["responses"]
        # There is nothing to write to unless it was asked for.
        body = {"documents": [{"id": 1, "text": "x"}]}
        assert client.post("/documents", json=body, headers={"api-key": KEY}).status_code == 404
        assert "/documents" not in described["paths"]


def test_an_empty_key_is_refused(tiny_splade):
    with pytest.raises(ConfigError, match="`api_key` must not be empty"):
        make_app(None, api_key="")


# The truth about it


def test_every_operation_answers_as_it_is_described(client):
    described = client.get("/openapi.json").json()
    assert "HTTPValidationError" not in described["components"]["schemas"]
    for path, operations in described["paths"].items():
        methods = {method.upper() for method in operations}
        assert ("HEAD" in methods) == ("GET" in methods)
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH"):
            answer = client.request(method, path, json={})
            if method in methods:
                assert str(answer.status_code) in operations[method.lower()]["responses"]
                continue
            assert answer.status_code == 405, (method, path)
            assert set(answer.headers["allow"].split(", ")) == methods
            assert "405" in next(iter(operations.values()))["responses"]
            assert answer.headers["content-type"] == "application/json"
    wrong = client.get("/api/search", params={"q": "tea", "limit": 0})
    assert set(wrong.json()) == {"detail"}
    schema = described["paths"]["/api/search"]["get"]["responses"]["422"]["content"]
    assert schema["application/json"]["schema"]["$ref"].endswith("/Refusal")


def test_head_is_get_without_its_body(client):
    for path in ("/", "/?q=tea", "/style.css", "/api/search?q=tea", "/api/info", "/healthz"):
        whole, head = client.get(path), client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == whole.headers["content-type"]
        if "search" not in path and path != "/?q=tea":  # those tell their time
            assert head.headers["content-length"] == str(len(whole.content))
    assert client.head("/nowhere").status_code == 404


def test_programs_get_json_and_people_get_pages(client):
    asked = {"accept": "application/json"}
    assert client.get("/nowhere", headers=asked).json()["detail"]
    assert "Search again" in client.get("/nowhere", headers={"accept": "text/html"}).text
    assert client.get("/?q=" + "x" * 1001, headers=asked).status_code == 422
    assert client.put("/").headers["allow"] == "GET, HEAD"


def test_requests_are_counted_and_logged(client, caplog):
    with caplog.at_level(logging.INFO, ACCESS_LOG):
        before = numbers(client)
        client.get("/api/info", params={})
        client.get("/secret/place?with=more")
        client.post("/embed_sparse", json={"inputs": []})
        after = numbers(client)

    def more(name):
        return after.get(name, 0) - before.get(name, 0)

    assert more('vdr_db_requests_total{method="GET",path="/api/info",status="200"}') == 1
    assert more('vdr_db_requests_total{method="GET",path="other",status="404"}') == 1
    assert more('vdr_db_requests_total{method="POST",path="/embed_sparse",status="422"}') == 1
    assert more('vdr_db_request_seconds_count{path="/api/info"}') == 1
    assert "secret" not in client.get("/metrics").text
    lines = [json.loads(record.message) for record in caplog.records if record.name == ACCESS_LOG]
    seen = [(line["method"], line["path"], line["status"]) for line in lines]
    assert ("GET", "/secret/place", 404) in seen
    assert ("POST", "/embed_sparse", 422) in seen
    assert all(line["ms"] >= 0 and line["client"] == "127.0.0.1" for line in lines)
    assert all("more" not in json.dumps(line) for line in lines)


# Budgets


def connect(client):
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=30)


def all_of(connection, end):
    """What comes until a text."""
    found = b""
    while not found.endswith(end):
        part = connection.recv(65536)
        assert part, found
        found += part
    return found


def test_connections_that_say_nothing_are_closed_and_others_are_served(tiny_splade):
    with served(tiny_splade, budget=Budget(connections=40, first_byte_s=1.0)) as client:
        start = time.monotonic()
        idle = [connect(client) for _ in range(64)]
        idle[-1].sendall(b"GET / HTTP/1.1\r\nhost: local")  # headers that never end
        assert client.get("/api/search", params={"q": "tea"}).status_code == 200
        assert time.monotonic() - start < 1.0
        said = [one.recv(4096) for one in idle[:-1]] + [all_of(idle[-1], b" s.")]
        assert time.monotonic() - start < 2.0
        # The oldest had to make room, the others were told.
        assert sum(one == b"" for one in said) >= 64 - 40
        assert said[-1].startswith(b"HTTP/1.1 408 ")
        assert b"No request came within 1 s." in said[-1]
        assert client.get("/api/search", params={"q": "tea"}).status_code == 200
        for one in idle:
            one.close()


def test_a_kept_connection_may_wait_and_then_must_be_quick(tiny_splade):
    with (
        served(tiny_splade, budget=Budget(first_byte_s=0.3, idle_s=2.0)) as client,
        connect(client) as kept,
    ):
        request = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"
        for _ in range(3):
            kept.sendall(request)
            assert all_of(kept, b'"ok"}').startswith(b"HTTP/1.1 200 ")
            time.sleep(0.6)
        kept.sendall(request[:20])
        assert all_of(kept, b" s.").startswith(b"HTTP/1.1 408 ")


def test_a_body_that_trickles_is_refused(client):
    with connect(client) as slow:
        slow.sendall(
            b"POST /embed_sparse HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99\r\n\r\n{"
        )
        start = time.monotonic()
        answer = all_of(slow, b"}")
        assert time.monotonic() - start < 2.5
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"No part of the body came within 1 s." in answer


def test_too_many_requests_at_once_are_told_to_come_again(tiny_splade):
    budget = Budget(requests=4)
    with served(tiny_splade, budget=budget) as client:
        slow = []
        for _ in range(4):
            slow.append(connect(client))
            slow[-1].sendall(
                b"POST /embed_sparse HTTP/1.1\r\nhost: localhost\r\ncontent-length: 16\r\n"
                b"content-type: application/json\r\n\r\n"
            )
        deadline = time.monotonic() + 10
        while client.get("/api/info").status_code == 200 and time.monotonic() < deadline:
            time.sleep(0.02)
        busy = client.get("/api/info")
        assert (busy.status_code, busy.headers["retry-after"]) == (503, "1")
        busy = client.post("/embed_sparse", json={"inputs": "x"})
        assert (busy.status_code, busy.json()["error_type"]) == (429, "overloaded")
        assert client.get("/healthz").status_code == 200
        for one in slow:
            one.sendall(b'{"inputs": "ab"}')
            assert all_of(one, b"]]").startswith(b"HTTP/1.1 200 ")
            one.close()
        assert client.get("/api/info").status_code == 200


def test_an_answer_that_is_too_large_is_refused(tiny_splade):
    with served(tiny_splade, budget=Budget(answer_bytes=600)) as client:
        refused = client.get("/api/search", params={"q": "tea leaves giraffe cards"})
        assert (refused.status_code, "more than the 600" in refused.text) == (413, True)
        assert client.get("/healthz").status_code == 200


# The command


@pytest.fixture
def notes(tmp_path, tiny_splade_folder):
    from vdr_db.cli.main import main

    lines = [json.dumps({"_id": str(n), "text": text}) for n, text in enumerate(TEXTS)]
    (tmp_path / "notes.jsonl").write_text("\n".join(lines))
    index = ["index", str(tmp_path / "notes.jsonl"), "--store", str(tmp_path / "notes")]
    assert main([*index, "--model", "tiny-splade"]) == 0
    return tmp_path


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_no_request_is_lost_when_it_stops(notes):
    lost, answered, refused = [], [], []
    with commanded(notes, "--store", "notes") as (process, url):
        stop = threading.Event()

        def ask(number):
            with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
                while not stop.is_set():
                    try:
                        answer = client.post("/embed_sparse", json={"inputs": f"tea {number}"})
                    except httpx.ConnectError:
                        refused.append(number)  # nobody took the request
                        return
                    except httpx.HTTPError as error:
                        lost.append(repr(error))
                        return
                    answered.append(answer.status_code)

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        while len(answered) < 100:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        stop.set()
        for thread in threads:
            thread.join(timeout=30)
    assert process.returncode == 0, err
    assert not lost
    assert set(answered) == {200}
    assert len(refused) == 8  # each went on until the port was closed


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_the_command_asks_for_a_key_writes_and_logs(notes, capsys):
    from vdr_db.cli.main import main

    options = ["--store", "notes", "--writes", "--access-log"]
    with (
        commanded(notes, *options, environment={"VDR_DB_SERVE_KEY": KEY}) as (process, url),
        httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
    ):
        assert client.get("/api/info").status_code == 401
        body = {"documents": [{"id": "moon", "text": "a moon of cheese"}]}
        assert client.post("/documents", json=body, headers={"api-key": KEY}).is_success
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    lines = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert [(line["path"], line["status"]) for line in lines] == [
        ("/api/info", 401),
        ("/documents", 200),
    ]
    assert main(["search", "cheese moon", "--store", str(notes / "notes"), "--json"]) == 0
    assert '"moon"' in capsys.readouterr().out.splitlines()[0]
    open_to_all = ["serve", "--store", str(notes / "notes"), "--port", "0", "--host", "0.0.0.0"]
    assert main([*open_to_all, "--writes"]) == 2
    assert "lets everybody write" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_workers_share_a_port_and_their_numbers(tmp_path, tiny_splade):
    pytest.importorskip("qdrant_client")
    pytest.importorskip("grpc")
    import service_worker
    from qdrant_contract_server import QdrantContractServer

    from vdr_db.connectors import VDRQdrant

    with QdrantContractServer(tmp_path) as server:
        options = {"url": server.url, "client_options": {"grpc_port": server.grpc_port}}
        with VDRQdrant("texts", tiny_splade, **options) as collection:
            collection.add_texts(TEXTS, ids=[0, 1, 2])
        command = [sys.executable, service_worker.__file__]
        ports = [str(server.rest_port), str(server.grpc_port)]
        process = subprocess.Popen([*command, *ports], stdout=subprocess.PIPE, text=True)
        try:
            url = process.stdout.readline().strip().rstrip("/")

            def ask(_):
                # A connection each, so that either worker may take it.
                answer = httpx.get(f"{url}/api/search?q=giraffe", timeout=120, trust_env=False)
                return answer.json()["hits"][0]["id"]

            with ThreadPoolExecutor(8) as pool:
                assert set(pool.map(ask, range(40))) == {0}
            workers = children(process)
            assert len(workers) == 2
            # One that is killed is replaced, and nobody notices.
            os.kill(workers[0], signal.SIGKILL)
            assert {ask(n) for n in range(5)} == {0}
            with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
                counted = 'vdr_db_requests_total{method="GET",path="/api/search",status="200"}'
                assert numbers(client)[counted] == 45
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
            process.communicate()


def children(process):
    """Processes of the workers, which serve; another one tracks what they share."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    lines = {number: Path(f"/proc/{number}/cmdline").read_bytes() for number in found}
    return [int(number) for number, line in lines.items() if b"spawn_main" in line]


def test_a_worker_that_cannot_start_ends_all(capsys, tmp_path):
    from service_worker import fail

    from vdr_db.cli.main import main
    from vdr_db.serve import serve_many

    code, was_interrupted = serve_many(fail, listen("127.0.0.1", 0), 2, started=lambda: None)
    assert (code, was_interrupted) == (7, False)
    assert main(["serve", "--store", str(tmp_path), "--workers", "2"]) == 2
    assert "--workers must be 1 for a folder" in capsys.readouterr().err
