"""Every kind of store by its address: embedded, Qdrant by REST and gRPC, Elasticsearch, OpenSearch.

The servers are stand-ins, and each wants its key: the Qdrant of `qdrant_contract_server`, and the
Elasticsearch of `noida` behind a proxy that refuses requests without the key. In front of the same
stand-in, a proxy that says of itself what an OpenSearch says is the OpenSearch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fault_proxy import Answer, Fault, Request, running_proxy

KINDS = ("embedded", "rest", "grpc", "elasticsearch", "opensearch", "real opensearch")
KEY = "a-key-that-nobody-shows-4711"
OPENSEARCH_ROOT = {
    "name": "stand-in",
    "version": {"distribution": "opensearch", "number": "2.19.6"},
    "tagline": "The OpenSearch Project: https://opensearch.org/",
}


@dataclass(frozen=True)
class Place:
    """A store: its address, and what `info` says of it."""

    kind: str
    address: str
    told: str


def guarded(request: Request, *, root: dict[str, object] | None = None) -> Fault | None:
    """Refuses requests without the key; `root` is what the server says it is."""
    if request.headers.get("authorization") != f"ApiKey {KEY}":
        body = json.dumps({"error": {"type": "security_exception", "reason": "missing"}}).encode()
        name = "OpenSearch Security" if root else "security"
        product = () if root else (("X-Elastic-Product", "Elasticsearch"),)
        return Answer(401, (("WWW-Authenticate", f'Basic realm="{name}"'), *product), body)
    if root is not None and request.path == "/":
        return Answer(200, (("content-type", "application/json"),), json.dumps(root).encode())
    return None


@contextmanager
def running_place(kind: str, folder: Path, upstream: str | None) -> Iterator[Place]:
    """A store of a kind, for the time of the block; `upstream` is the server behind the proxy."""
    if kind == "embedded":
        yield Place(kind, str(folder / "store"), "")
    elif kind in ("rest", "grpc"):
        from qdrant_contract_server import VERSION, QdrantContractServer

        with QdrantContractServer(folder / "server", api_key=KEY) as server:
            port = server.rest_port if kind == "rest" else server.grpc_port
            told = "REST" if kind == "rest" else f"gRPC ({port})"
            yield Place(kind, f"http://127.0.0.1:{port}", f"Qdrant {VERSION} over {told}")
    else:
        assert upstream is not None
        product = kind.removeprefix("real ")
        with running_proxy(upstream) as proxy:
            root = OPENSEARCH_ROOT if kind == "opensearch" else None
            proxy.decide = lambda request: guarded(request, root=root)
            told = "OpenSearch " if product == "opensearch" else "Elasticsearch 8.15"
            yield Place(kind, f"{product}+http://127.0.0.1:{proxy.port}", told)
