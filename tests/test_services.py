"""How tests find real servers, and that none is taken for granted."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import inspect
import socket
import sys
import threading
import types

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
