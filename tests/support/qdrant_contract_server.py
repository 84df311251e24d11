"""A small Qdrant server for tests: REST and gRPC in front of the embedded engine, with faults.

What a test against it proves: what the official `qdrant-client` puts on the wire for our calls,
over REST and over gRPC, is understood by an independent reading of the protocol; scores, filters
and payloads come from the real engine; our code copes with each fault of `faults.py`, also with an
acknowledgement that never arrives.

What only a real server proves: that the server of a certain version reads these requests the same
way and refuses the same things; replication, sharding across nodes, write consistency and
durability of its own write-ahead log; optimisers running meanwhile; its rate limits and its true
messages; TLS; speed.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import grpc
from faults import FaultPlan
from qdrant_client.grpc import collections_service_pb2_grpc as collections_grpc
from qdrant_client.grpc import points_service_pb2_grpc as points_grpc
from qdrant_client.grpc import qdrant_pb2_grpc
from qdrant_contract_engine import ContractEngine, Refused
from qdrant_contract_grpc import VERSION, Collections, Points, Root

__all__ = ["VERSION", "QdrantContractServer"]

Json = dict[str, Any]


class QdrantContractServer:
    """A server on two loopback ports, for the time of a `with` block.

    Args:
        folder: Where the engine keeps its shards.
        faults: Which requests go wrong.
        api_key: Key that requests must carry.
        max_body_bytes: Larger REST bodies are refused with 413, larger gRPC messages likewise.

    Attributes:
        requests: How often each operation was asked for, faults included.
        written_points: Points in all upsert requests that were applied.
        is_down: While true, every connection is reset.
    """

    def __init__(
        self,
        folder: Path,
        *,
        faults: FaultPlan | None = None,
        api_key: str | None = None,
        max_body_bytes: int = 32 << 20,
    ) -> None:
        self.engine = ContractEngine(Path(folder))
        self.faults = faults or FaultPlan()
        self.api_key = api_key
        self.max_body_bytes = max_body_bytes
        self.requests: Counter[str] = Counter()
        self.written_points = 0
        self.is_down = False
        self._lock = threading.Lock()
        self._http = _HttpServer(("127.0.0.1", 0), _Handler)
        self._http.owner = self
        self.rest_port = int(self._http.server_address[1])
        self._grpc = grpc.server(
            ThreadPoolExecutor(8, thread_name_prefix="contract-grpc"),
            options=[
                ("grpc.max_receive_message_length", max_body_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
            ],
        )
        points_grpc.add_PointsServicer_to_server(Points(self), self._grpc)
        collections_grpc.add_CollectionsServicer_to_server(Collections(self), self._grpc)
        qdrant_pb2_grpc.add_QdrantServicer_to_server(Root(self), self._grpc)
        self.grpc_port = int(self._grpc.add_insecure_port("127.0.0.1:0"))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.rest_port}"

    def __enter__(self) -> QdrantContractServer:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        self._grpc.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_down = True
        self._http.shutdown()
        self._http.server_close()
        self._grpc.stop(grace=0).wait(5)
        self.engine.close()

    def meet(self, operation: str, points: int = 0) -> str | None:
        """Counts a request and chooses its fault."""
        with self._lock:
            self.requests[operation] += 1
        if self.is_down:
            return "reset"
        return self.faults.choose(operation, points)

    def upsert(self, name: str, points: list[Json]) -> None:
        self.engine.upsert(name, points)
        with self._lock:
            self.written_points += len(points)


# REST


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    owner: QdrantContractServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing: clients that are killed break their connections."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _HttpServer

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps test output clean."""

    def _serve(self) -> None:
        owner = self.server.owner
        length = int(self.headers.get("Content-Length") or 0)
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if length > owner.max_body_bytes:
            self.close_connection = True
            return self._error(413, f"Payload too large: limit is {owner.max_body_bytes} bytes")
        body = json.loads(self.rfile.read(length)) if length else {}
        operation = _operation(self.command, parts)
        fault = owner.meet(operation, len(body.get("points") or ()) if body else 0)
        if fault == "reset":
            return self._reset()
        if owner.api_key is not None and self.headers.get("api-key") != owner.api_key:
            return self._error(401, "Must provide an API key or an Authorization bearer token")
        if fault == "429":
            return self._error(
                429, "Too many requests", {"Retry-After": str(owner.faults.retry_after_s)}
            )
        if fault == "503":
            return self._error(503, "Service temporarily unavailable")
        if fault == "413":
            return self._error(413, "Payload too large")
        if fault == "timeout":
            time.sleep(owner.faults.hang_s)
            return self._reset()
        if fault == "slow":
            time.sleep(owner.faults.slow_s)
        try:
            result = _answer(owner, operation, parts, body)
        except Refused as refused:
            return self._error(refused.status, str(refused))
        if fault == "lost_ack":
            return self._reset()
        if operation == "root":
            return self._reply(200, {"title": "qdrant", "version": VERSION, "commit": ""})
        return self._reply(200, {"result": result, "status": "ok", "time": 0.0})

    do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = _serve

    def _error(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self._reply(status, {"status": {"error": message}, "time": 0.0}, headers)

    def _reply(self, status: int, body: Json, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _reset(self) -> None:
        """Drops the connection with RST, as a dying server or a proxy does."""
        self.close_connection = True
        with suppress(OSError):
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()


_POINT_OPERATIONS = {
    ("PUT", ()): "upsert",
    ("POST", ()): "retrieve",
    ("POST", ("scroll",)): "scroll",
    ("POST", ("count",)): "count",
    ("POST", ("delete",)): "delete_points",
    ("POST", ("query",)): "query",
    ("POST", ("query", "batch")): "query_batch",
    ("POST", ("payload",)): "set_payload",
    ("PUT", ("payload",)): "overwrite_payload",
}
_COLLECTION_OPERATIONS = {
    ("GET", ()): "info",
    ("PUT", ()): "create",
    ("PATCH", ()): "update",
    ("DELETE", ()): "delete",
    ("GET", ("exists",)): "exists",
    ("GET", ("aliases",)): "aliases",
    ("PUT", ("index",)): "create_index",
}


def _operation(method: str, parts: list[str]) -> str:
    if parts == [""]:
        return "root"
    if parts == ["aliases"]:
        return "all_aliases"
    if parts == ["collections"]:
        return "names"
    if parts == ["collections", "aliases"] and method == "POST":
        return "change_aliases"
    if parts[0] == "collections" and parts[2:3] == ["points"]:
        return _POINT_OPERATIONS.get((method, tuple(parts[3:])), "unknown")
    if parts[0] == "collections" and parts[2:3] == ["index"] and method == "DELETE":
        return "delete_index"
    return _COLLECTION_OPERATIONS.get((method, tuple(parts[2:])), "unknown")


def _answer(owner: QdrantContractServer, operation: str, parts: list[str], body: Json) -> Any:
    engine = owner.engine
    name = parts[1] if len(parts) > 1 else ""
    acknowledged = {"operation_id": 1, "status": "completed"}
    if operation == "upsert":
        owner.upsert(name, _rest_points(body))
        return acknowledged
    if operation in ("delete_points", "set_payload", "overwrite_payload"):
        if operation == "delete_points":
            engine.delete_points(name, body)
        else:
            engine.set_payload(name, body, replace=operation == "overwrite_payload")
        return acknowledged
    if operation == "create_index":
        engine.create_index(name, body["field_name"], body.get("field_schema") or "keyword")
        return acknowledged
    if operation == "delete_index":
        engine.delete_index(name, parts[3])
        return acknowledged
    answers: dict[str, Callable[[], Any]] = {
        "root": lambda: None,
        "names": lambda: {"collections": [{"name": one} for one in engine.names()]},
        "all_aliases": lambda: {"aliases": engine.aliases()},
        "aliases": lambda: {"aliases": engine.aliases(name)},
        "change_aliases": lambda: engine.change_aliases(body["actions"]),
        "exists": lambda: {"exists": engine.exists(name)},
        "create": lambda: engine.create(name, body),
        "update": lambda: engine.update(name, body),
        "delete": lambda: engine.delete(name),
        "info": lambda: engine.info(name),
        "retrieve": lambda: engine.retrieve(
            name, body["ids"], body.get("with_payload", True), body.get("with_vector", False)
        ),
        "scroll": lambda: engine.scroll(name, body),
        "count": lambda: {"count": engine.count(name, body.get("filter"))},
        "query": lambda: {"points": engine.query(name, body)},
        "query_batch": lambda: [{"points": engine.query(name, one)} for one in body["searches"]],
    }
    if operation not in answers:
        raise Refused(404, f"this test server does not know {'/'.join(parts)}")
    return answers[operation]()


def _rest_points(body: Json) -> list[Json]:
    if "points" in body:
        return list(body["points"])
    batch = body["batch"]
    payloads = batch.get("payloads") or [None] * len(batch["ids"])
    return [
        {
            "id": id,
            "payload": payloads[i],
            "vector": {name: column[i] for name, column in batch["vectors"].items()},
        }
        for i, id in enumerate(batch["ids"])
    ]
