"""How tests find real servers, and that none is taken for granted."""

from __future__ import annotations

import socket
import threading

import pytest
import services

ES_VARIABLES = ("VDR_TEST_ES_URL", "VDR_TEST_REQUIRE_SERVICES", "DOCKER_HOST")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ES_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def enter():
    with services.running_elasticsearch() as running:
        return running


def test_an_address_that_does_not_answer_fails(monkeypatch):
    monkeypatch.setenv("VDR_TEST_ES_URL", "http://127.0.0.1:9")
    with pytest.raises(pytest.fail.Exception, match="nothing answers there"):
        enter()


def test_an_address_that_answers_is_used_as_it_is(monkeypatch, proxy):
    monkeypatch.setenv("VDR_TEST_ES_URL", proxy.url + "/")
    monkeypatch.setenv("VDR_TEST_ES_API_KEY", "sesame")
    service = enter()
    assert service.url == proxy.url
    assert service.api_key == "sesame"
    assert "sesame" not in repr(service)


def test_without_an_address_and_an_engine_tests_are_skipped_or_fail(monkeypatch, tmp_path):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    with pytest.raises(pytest.skip.Exception, match="no URL and no Docker engine"):
        enter()
    monkeypatch.setenv("VDR_TEST_REQUIRE_SERVICES", "1")
    with pytest.raises(pytest.fail.Exception, match="no URL and no Docker engine"):
        enter()


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
