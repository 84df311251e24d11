"""Fixtures with the Elasticsearch stand-in, behind a proxy that can fail on request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import noida
import pytest
import services

if TYPE_CHECKING:
    from fault_proxy import FaultProxy

    from vdr_db.connectors.elasticsearch.store import ElasticsearchStore


def remove_indices(store: ElasticsearchStore) -> None:
    """Deletes the indices behind the name of a store, each by its own name."""
    found = store.transport.call("GET", f"/{store.name}-*/_alias", allow=(404,))
    for index in found.body if found.status == 200 else ():
        store.transport.call("DELETE", f"/{index}", allow=(404,))
    store.transport.call("DELETE", f"/_index_template/vdr-{store.name}", allow=(404,))


@pytest.fixture(scope="session")
def noida_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of a running stand-in."""
    reason = noida.why_missing()
    if reason is not None:
        services.skip(reason)
    with noida.running_noida(tmp_path_factory.mktemp("noida")) as port:
        yield port


@pytest.fixture(scope="session")
def session_proxy(noida_port: int) -> Iterator[FaultProxy]:
    """A proxy in front of the stand-in."""
    from fault_proxy import running_proxy

    with running_proxy(noida_port) as proxy:
        yield proxy


@pytest.fixture
def proxy(session_proxy: FaultProxy) -> Iterator[FaultProxy]:
    """The proxy without faults and memories of other tests."""
    session_proxy.clear()
    yield session_proxy
    session_proxy.clear()


@pytest.fixture
def open_store(proxy: FaultProxy) -> Iterator[Callable[..., ElasticsearchStore]]:
    """Opens stores on the stand-in, under a name of their own unless one is given."""
    from vdr_db.connectors.elasticsearch.store import ElasticsearchStore
    from vdr_db.connectors.retry import RetryPolicy

    opened: list[ElasticsearchStore] = []

    def open_one(name: str | None = None, **options: Any) -> ElasticsearchStore:
        # The waits of a test are as short as they may be; how long they are is tested elsewhere.
        options.setdefault("retry", RetryPolicy(base_s=0.001, cap_s=0.01, deadline_s=30.0))
        if "client" not in options:
            options.setdefault("url", proxy.url)
        store = ElasticsearchStore(name or services.unique_name(), replicas=0, **options)
        opened.append(store)
        return store

    yield open_one
    proxy.clear()
    for store in opened:
        if not store._is_closed:
            remove_indices(store)
            store.close()
