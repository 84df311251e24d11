"""The search servers of the tests, each behind a proxy that can fail on request.

`server` is one of two: the Elasticsearch stand-in, met through the official client, and a real
OpenSearch, met through its own. A test with that fixture (or with `proxy` or `open_store`, which
rest on it) runs on each; what only the stand-in can do takes `stand_in`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import noida
import pytest
import services
from fault_proxy import FaultProxy, running_proxy

if TYPE_CHECKING:
    from vdr_db.connectors.elasticsearch.store import ElasticsearchStore

REAL = "real_server"
"""Property of a test's report: the server that it ran on."""


@dataclass(frozen=True)
class SearchServer:
    """A server behind its proxy.

    Attributes:
        name: What it is, with its version when it is a real one.
        is_real: Whether it is no stand-in.
        proxy: In front of it.
    """

    name: str
    is_real: bool
    proxy: FaultProxy

    def options(self, url: str | None = None, **client_options: Any) -> dict[str, Any]:
        """How a store is opened there, or behind another proxy at `url`."""
        url = url or self.proxy.url
        if not self.is_real:
            return {"url": url, "client_options": client_options or None}
        import opensearchpy

        timeout = client_options.get("request_timeout", 60)
        return {"client": opensearchpy.OpenSearch([url], timeout=timeout, max_retries=0)}


def remove_indices(store: ElasticsearchStore) -> None:
    """Deletes the indices behind the name of a store, each by its own name."""
    found = store.transport.call("GET", f"/{store.name}-*/_alias", allow=(404,))
    for index in found.body if found.status == 200 else ():
        store.transport.call("DELETE", f"/{index}", allow=(404,))
    store.transport.call("DELETE", f"/_index_template/vdr-{store.name}", allow=(404,))


@pytest.fixture(scope="session")
def noida_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SearchServer]:
    """The running stand-in."""
    reason = noida.why_missing()
    if reason is not None:
        services.skip(reason)
    with (
        noida.running_noida(tmp_path_factory.mktemp("noida")) as port,
        running_proxy(f"http://127.0.0.1:{port}") as proxy,
    ):
        yield SearchServer("stand-in", False, proxy)


@pytest.fixture(scope="session")
def opensearch_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the one real OpenSearch of this run, whatever the number of its processes."""
    folder, owner = tmp_path_factory.getbasetemp(), os.getpid()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder, owner = folder.parent, os.getppid()
    with services.running_opensearch(folder, owner) as service:
        yield service.url


@pytest.fixture(scope="session")
def opensearch_server(opensearch_url: str) -> Iterator[SearchServer]:
    """A real OpenSearch."""
    with running_proxy(opensearch_url) as proxy:
        yield SearchServer(services.version_of(opensearch_url), True, proxy)


@pytest.fixture(scope="session", params=["stand_in", "real"])
def any_server(request: pytest.FixtureRequest) -> SearchServer:
    """Each server in turn."""
    name = {"stand_in": "noida_server", "real": "opensearch_server"}[request.param]
    found: SearchServer = request.getfixturevalue(name)
    return found


@pytest.fixture
def server(any_server: SearchServer, request: pytest.FixtureRequest) -> Iterator[SearchServer]:
    """A server whose proxy has no faults and memories of other tests."""
    if any_server.is_real:
        note_real_server(request, any_server.name)
    any_server.proxy.clear()
    yield any_server
    any_server.proxy.clear()


def note_real_server(request: pytest.FixtureRequest, name: str) -> None:
    """Lets the summary of the run count the test among those on a real server."""
    request.node.user_properties.append((REAL, name))


@contextmanager
def on_opensearch(request: pytest.FixtureRequest, **options: Any) -> Iterator[ElasticsearchStore]:
    """A store on the real OpenSearch, of a test that runs on other kinds of stores as well."""
    from vdr_db.connectors.elasticsearch.store import ElasticsearchStore

    server: SearchServer = request.getfixturevalue("opensearch_server")
    note_real_server(request, server.name)
    name = services.unique_name()
    with ElasticsearchStore(name, replicas=0, **server.options(), **options) as store:
        yield store
        remove_indices(store)


@pytest.fixture
def proxy(server: SearchServer) -> FaultProxy:
    """The proxy in front of each server in turn."""
    return server.proxy


@pytest.fixture
def stand_in(noida_server: SearchServer) -> Iterator[FaultProxy]:
    """The proxy in front of the stand-in alone."""
    noida_server.proxy.clear()
    yield noida_server.proxy
    noida_server.proxy.clear()


@pytest.fixture
def open_store(server: SearchServer) -> Iterator[Callable[..., ElasticsearchStore]]:
    """Opens stores on each server in turn, under a name of their own unless one is given."""
    from vdr_db.connectors.elasticsearch.store import ElasticsearchStore
    from vdr_db.connectors.retry import RetryPolicy

    with ExitStack() as opened:

        def open_one(name: str | None = None, **options: Any) -> ElasticsearchStore:
            # Waits are as short as they may be; how long they are is tested elsewhere.
            options.setdefault("retry", RetryPolicy(base_s=0.001, cap_s=0.01, deadline_s=30.0))
            options.setdefault("replicas", 0)
            if "client" not in options:
                given = options.pop("client_options", None) or {}
                place = server.options(options.pop("url", None), **given)
                options = {**place, **options}
            store = ElasticsearchStore(name or services.unique_name(), **options)
            opened.callback(end, store)
            return store

        def end(store: ElasticsearchStore) -> None:
            server.proxy.clear()
            if not store._is_closed:
                remove_indices(store)
                store.close()

        yield open_one


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says which real servers the tests met, and how often."""
    met: dict[str, int] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, ()):
            for name, value in getattr(report, "user_properties", ()):
                if name == REAL and report.when == "call":
                    met[value] = met.get(value, 0) + 1
    told = ", ".join(f"{count} on {name}" for name, count in sorted(met.items()))
    terminalreporter.write_line(f"cases on real servers: {told or 'none'}")
