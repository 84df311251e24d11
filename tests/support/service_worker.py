"""What workers of a service do in its tests; a module of its own, for processes that import it."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

__all__ = ["fail", "run", "work"]

MODEL = "tiny-splade"


def work(rest_port: int, grpc_port: int, address: Any) -> None:
    """Serves a collection of a server on two local ports."""
    from vdr_db import SparseEncoder
    from vdr_db.connectors import VDRQdrant
    from vdr_db.serve import SearchService, make_app, serve

    encoder = SparseEncoder.from_pretrained(MODEL)
    place = {"url": f"http://127.0.0.1:{rest_port}", "client_options": {"grpc_port": grpc_port}}
    with VDRQdrant("texts", encoder, **place) as collection:
        serve(make_app(SearchService(collection, encoder)), address)


def fail(address: Any) -> None:
    """Cannot start."""
    sys.exit(7)


def run(rest_port: int, grpc_port: int) -> int:
    """Two workers; the address goes to standard output."""
    from vdr_db.serve import listen, serve_many

    address = listen("127.0.0.1", 0)
    code, _ = serve_many(
        partial(work, rest_port, grpc_port),
        address,
        2,
        started=lambda: sys.stdout.write(f"{address.url}\n") and sys.stdout.flush(),
    )
    return code


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]), int(sys.argv[2])))
