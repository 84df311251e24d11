"""How tests find real servers, and that none is taken for granted."""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import importlib.util
import inspect
import json
import os
import socket
import sys
import threading
import types
from pathlib import Path

import opensearch_node
import pytest
import services

VARIABLES = (
    "VDR_TEST_ES_URL",
    "VDR_TEST_ES_API_KEY",
    "VDR_TEST_QDRANT_URL",
    "VDR_TEST_QDRANT_API_KEY",
    "VDR_TEST_QDRANT_GRPC_PORT",
    "VDR_TEST_REQUIRE_SERVICES",
    "DOCKER_HOST",
)
RUNNING = {"ES": services.running_elasticsearch, "QDRANT": services.running_qdrant}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["ES", "QDRANT"])
def kind(request):
    return request.param


@pytest.fixture
def no_engine(monkeypatch, tmp_path):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")


@pytest.fixture
def engine(monkeypatch):
    """Something that answers as a Docker engine does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{server.getsockname()[1]}")

        def serve():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(100)
                    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\nOK")

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.fixture
def containers(monkeypatch):
    """A double of the testcontainers package; notes what was started and stopped."""
    events: list[str] = []

    class Container:
        def __init__(self, image, mem_limit=None):
            self.image = image

        def with_env(self, name, value):
            return self

        def __enter__(self):
            events.append(f"start {self.image}")
            return self

        def __exit__(self, *_):
            events.append("stop")

        def get_container_host_ip(self):
            return "docker.host"

        def get_exposed_port(self, port):
            return 10_000 + port

    for path, names in {
        "testcontainers": {"__path__": []},
        "testcontainers.community": {"__path__": []},
        "testcontainers.community.qdrant": {"QdrantContainer": Container},
        "testcontainers.community.elasticsearch": {"ElasticSearchContainer": Container},
    }.items():
        module = types.ModuleType(path)
        module.__spec__ = importlib.machinery.ModuleSpec(path, None)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, path, module)
    return events


def enter(kind):
    with RUNNING[kind]() as running:
        return running


def test_an_address_that_does_not_answer_fails(monkeypatch, kind, engine, containers):
    monkeypatch.setenv(f"VDR_TEST_{kind}_URL", "http://127.0.0.1:9")
    with pytest.raises(pytest.fail.Exception, match="nothing answers there"):
        enter(kind)
    assert containers == []


def test_an_address_that_answers_goes_before_any_engine(
    monkeypatch, stand_in, kind, engine, containers
):
    monkeypatch.setenv(f"VDR_TEST_{kind}_URL", stand_in.url + "/")
    monkeypatch.setenv(f"VDR_TEST_{kind}_API_KEY", "sesame")
    monkeypatch.setenv("VDR_TEST_QDRANT_GRPC_PORT", "6334")
    service = enter(kind)
    assert service.url == stand_in.url
    assert service.api_key == "sesame"
    assert service.grpc_port == (6334 if kind == "QDRANT" else None)
    assert "sesame" not in repr(service)
    assert containers == []


def test_an_engine_that_answers_gets_a_container_of_a_pinned_image(kind, engine, containers):
    with RUNNING[kind]() as service:
        assert len(containers) == 1
    image = {"ES": services.ELASTICSEARCH_IMAGE, "QDRANT": services.QDRANT_IMAGE}[kind]
    assert containers == [f"start {image}", "stop"]
    assert image.rpartition(":")[2].count(".") == 2
    port = {"ES": 19_200, "QDRANT": 16_333}[kind]
    assert service.url == f"http://docker.host:{port}"
    assert service.grpc_port == (16_334 if kind == "QDRANT" else None)


def test_an_engine_without_the_package_is_told(monkeypatch, kind, engine):
    monkeypatch.setitem(sys.modules, "testcontainers", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(pytest.skip.Exception, match="the testcontainers package is not installed"):
        enter(kind)
    monkeypatch.setenv("VDR_TEST_REQUIRE_SERVICES", "1")
    with pytest.raises(pytest.fail.Exception, match="the testcontainers package is not installed"):
        enter(kind)


def test_without_an_address_and_an_engine_tests_are_skipped_or_fail(monkeypatch, kind, no_engine):
    with pytest.raises(pytest.skip.Exception, match="no URL and no Docker engine"):
        enter(kind)
    monkeypatch.setenv("VDR_TEST_REQUIRE_SERVICES", "1")
    with pytest.raises(pytest.fail.Exception, match="no URL and no Docker engine"):
        enter(kind)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        ("qdrant", "QdrantContainer", {"image"}),
        ("elasticsearch", "ElasticSearchContainer", {"image"}),
    ],
)
def test_the_real_package_has_what_is_used_of_it(module, name, arguments):
    pytest.importorskip("testcontainers")
    found = getattr(importlib.import_module(f"testcontainers.community.{module}"), name)
    assert arguments <= set(inspect.signature(found).parameters)
    for method in ("with_env", "get_container_host_ip", "get_exposed_port", "__enter__"):
        assert callable(getattr(found, method))


@pytest.mark.parametrize(
    ("answer", "expected"), [(b"HTTP/1.1 200 OK\r\n\r\nOK", True), (b"", False), (None, False)]
)
def test_an_engine_is_there_when_it_answers_in_time(monkeypatch, answer, expected):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{server.getsockname()[1]}")
        done = threading.Event()

        def serve():
            connection, _ = server.accept()
            with connection:
                if answer is None:
                    done.wait(10)
                else:
                    connection.recv(100)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        assert services.docker_answers(timeout_s=0.3) is expected
        done.set()
        thread.join()


def test_names_are_never_used_twice():
    assert len({services.unique_name() for _ in range(100)}) == 100


ONLY_ON_THE_STAND_IN = {
    "connectors/test_defaults.py::test_elasticsearch_of_the_environment",
    "integrations/test_elasticsearch.py::store",
    "integrations/test_examples.py::test_elasticsearch",
    "integrations/test_langchain.py::articles",
    "integrations/test_ray.py::test_elasticsearch",
    "integrations/test_semantic_search.py::test_an_elasticsearch_index_can_be_kept_and_searched_again",
    "integrations/test_semantic_search.py::test_elasticsearch_scores_by_inner_product_and_cleans_up",
    "test_services.py::test_an_address_that_answers_goes_before_any_engine",
}
"""Each makes a client of the `elasticsearch` package itself, which OpenSearch does not answer."""


def test_what_a_stand_in_alone_proves_is_known_and_short():
    tests = Path(__file__).parent
    found = set()
    for path in tests.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                text = ast.unparse(node)
                takes = any(one.arg == "stand_in" for one in node.args.args)
                if takes or "getfixturevalue('stand_in')" in text:
                    found.add(f"{path.relative_to(tests).as_posix()}::{node.name}")
    found.discard("test_services.py::test_what_a_stand_in_alone_proves_is_known_and_short")
    assert found == ONLY_ON_THE_STAND_IN


def test_a_node_that_runs_serves_all_processes_of_a_run(opensearch_url, tmp_path):
    port = int(opensearch_url.rsplit(":", 1)[1])
    (tmp_path / "opensearch.json").write_text(json.dumps({"port": port}))
    with opensearch_node.shared_node(tmp_path, os.getpid()) as url:
        assert url == opensearch_url
    assert opensearch_node.is_ready(port)  # who did not start it does not stop it


def test_jars_of_another_content_are_found_out(tmp_path):
    pinned = tmp_path / "jars.sha256"
    digest = hashlib.sha256(b"right").hexdigest()
    pinned.write_text("".join(f"{digest}  {name}.jar\n" for name in ("good", "bad", "gone")))
    for name, content in (("good", b"right"), ("bad", b"wrong"), ("more", b"right")):
        (tmp_path / f"{name}.jar").write_bytes(content)
    assert opensearch_node.wrong_jars(tmp_path, pinned) == ["bad.jar", "gone.jar", "more.jar"]
