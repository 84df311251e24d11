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
from qdrant_client import grpc as wire
from qdrant_client.conversions.conversion import GrpcToRest, RestToGrpc
from qdrant_client.grpc import collections_service_pb2_grpc as collections_grpc
from qdrant_client.grpc import points_service_pb2_grpc as points_grpc
from qdrant_client.grpc import qdrant_pb2, qdrant_pb2_grpc
from qdrant_client.http import models
from qdrant_contract_engine import ContractEngine, Refused

__all__ = ["VERSION", "QdrantContractServer"]

VERSION = "1.20.0"
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
        points_grpc.add_PointsServicer_to_server(_Points(self), self._grpc)
        collections_grpc.add_CollectionsServicer_to_server(_Collections(self), self._grpc)
        qdrant_pb2_grpc.add_QdrantServicer_to_server(_Root(self), self._grpc)
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


# gRPC

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.ALREADY_EXISTS,
    422: grpc.StatusCode.INVALID_ARGUMENT,
}


def _call(
    owner: QdrantContractServer,
    context: Any,
    operation: str,
    function: Callable[[], Any],
    points: int = 0,
) -> Any:
    """One gRPC call with its fault."""
    fault = owner.meet(operation, points)
    if fault == "reset":
        context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset by peer")
    given = dict(context.invocation_metadata()).get("api-key")
    if owner.api_key is not None and given != owner.api_key:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "Must provide an API key")
    if fault == "429":
        context.set_trailing_metadata((("retry-after", str(owner.faults.retry_after_s)),))
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Too many requests")
    if fault == "503":
        context.abort(grpc.StatusCode.UNAVAILABLE, "Service temporarily unavailable")
    if fault == "413":
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "grpc: received message larger than max")
    if fault == "timeout":
        until = time.monotonic() + owner.faults.hang_s
        while context.is_active() and time.monotonic() < until:
            time.sleep(0.02)
        context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
    if fault == "slow":
        time.sleep(owner.faults.slow_s)
    try:
        answer = function()
    except Refused as refused:
        context.abort(_CODES[refused.status], str(refused))
    if fault == "lost_ack":
        context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
    return answer


def _json(model: Any) -> Any:
    """JSON of what the client's own conversion made of a message."""
    if hasattr(model, "model_dump"):
        return model.model_dump(mode="json", exclude_none=True)
    if isinstance(model, dict):
        return {name: _json(one) for name, one in model.items()}
    if isinstance(model, list):
        return [_json(one) for one in model]
    return model


def _optional(message: Any, field: str, convert: Callable[[Any], Any]) -> Any:
    return _json(convert(getattr(message, field))) if message.HasField(field) else None


def _vector(message: Any) -> Any:
    kind = message.WhichOneof("vector")
    if kind == "sparse":
        return {"indices": list(message.sparse.indices), "values": list(message.sparse.values)}
    if kind == "dense":
        return list(message.dense.data)
    if message.HasField("indices"):  # the older flat form
        return {"indices": list(message.indices.data), "values": list(message.data)}
    return list(message.data)


def _wire_point(message: Any) -> Json:
    vectors: Any = {}
    if message.vectors.HasField("vectors"):
        named = message.vectors.vectors.vectors
        vectors = {name: _vector(one) for name, one in named.items()}
    elif message.vectors.HasField("vector"):
        vectors = _vector(message.vectors.vector)
    return {
        "id": GrpcToRest.convert_point_id(message.id),
        "vector": vectors,
        "payload": GrpcToRest.convert_payload(message.payload),
    }


def _acknowledged() -> Any:
    result = wire.UpdateResult(operation_id=1, status=wire.UpdateStatus.Completed)
    return wire.PointsOperationResponse(result=result, time=0.0)


class _Points(points_grpc.PointsServicer):
    def __init__(self, owner: QdrantContractServer) -> None:
        self._owner = owner
        self._engine = owner.engine

    def Upsert(self, request: Any, context: Any) -> Any:
        def apply() -> Any:
            points = [_wire_point(one) for one in request.points]
            self._owner.upsert(request.collection_name, points)
            return _acknowledged()

        return _call(self._owner, context, "upsert", apply, len(request.points))

    def Delete(self, request: Any, context: Any) -> Any:
        def apply() -> Any:
            body = _json(GrpcToRest.convert_points_selector(request.points))
            self._engine.delete_points(request.collection_name, body)
            return _acknowledged()

        return _call(self._owner, context, "delete_points", apply)

    def _change_payload(self, request: Any, context: Any, *, replace: bool) -> Any:
        def apply() -> Any:
            body = _json(GrpcToRest.convert_points_selector(request.points_selector))
            body["payload"] = GrpcToRest.convert_payload(request.payload)
            self._engine.set_payload(request.collection_name, body, replace=replace)
            return _acknowledged()

        return _call(self._owner, context, "set_payload", apply)

    def SetPayload(self, request: Any, context: Any) -> Any:
        return self._change_payload(request, context, replace=False)

    def OverwritePayload(self, request: Any, context: Any) -> Any:
        return self._change_payload(request, context, replace=True)

    def CreateFieldIndex(self, request: Any, context: Any) -> Any:
        def apply() -> Any:
            if request.HasField("field_index_params"):
                schema = _json(GrpcToRest.convert_payload_schema_params(request.field_index_params))
            else:
                kinds = ("keyword", "integer", "float", "geo", "text", "bool", "datetime", "uuid")
                schema = kinds[request.field_type]
            self._engine.create_index(request.collection_name, request.field_name, schema)
            return _acknowledged()

        return _call(self._owner, context, "create_index", apply)

    def DeleteFieldIndex(self, request: Any, context: Any) -> Any:
        def apply() -> Any:
            self._engine.delete_index(request.collection_name, request.field_name)
            return _acknowledged()

        return _call(self._owner, context, "delete_index", apply)

    def Get(self, request: Any, context: Any) -> Any:
        def apply() -> Any:
            ids = [GrpcToRest.convert_point_id(one) for one in request.ids]
            payload = _optional(request, "with_payload", GrpcToRest.convert_with_payload_interface)
            vector = _optional(request, "with_vectors", GrpcToRest.convert_with_vectors_selector)
            found = self._engine.retrieve(
                request.collection_name, ids, payload or False, vector or False
            )
            return wire.GetResponse(result=[_wire_record(one) for one in found], time=0.0)

        return _call(self._owner, context, "retrieve", apply)

    def Scroll(self, request: Any, context: Any) -> Any:
        def apply() -> Any:
            body = {
                "offset": _optional(request, "offset", GrpcToRest.convert_point_id),
                "limit": request.limit if request.HasField("limit") else None,
                "filter": _optional(request, "filter", GrpcToRest.convert_filter),
                "with_payload": _optional(
                    request, "with_payload", GrpcToRest.convert_with_payload_interface
                )
                or False,
                "with_vector": _optional(
                    request, "with_vectors", GrpcToRest.convert_with_vectors_selector
                )
                or False,
            }
            page = self._engine.scroll(request.collection_name, body)
            following = page["next_page_offset"]
            return wire.ScrollResponse(
                result=[_wire_record(one) for one in page["points"]],
                next_page_offset=None
                if following is None
                else RestToGrpc.convert_extended_point_id(following),
                time=0.0,
            )

        return _call(self._owner, context, "scroll", apply)

    def Count(self, request: Any, context: Any) -> Any:
        def apply() -> Any:
            filter = _optional(request, "filter", GrpcToRest.convert_filter)
            count = self._engine.count(request.collection_name, filter)
            return wire.CountResponse(result=wire.CountResult(count=count), time=0.0)

        return _call(self._owner, context, "count", apply)

    def Query(self, request: Any, context: Any) -> Any:
        def apply() -> Any:
            return wire.QueryResponse(result=self._hits(request), time=0.0)

        return _call(self._owner, context, "query", apply)

    def QueryBatch(self, request: Any, context: Any) -> Any:
        def apply() -> Any:
            results = [
                wire.BatchResult(result=self._hits(one, request.collection_name))
                for one in request.query_points
            ]
            return wire.QueryBatchResponse(result=results, time=0.0)

        return _call(self._owner, context, "query_batch", apply)

    def _hits(self, request: Any, name: str | None = None) -> list[Any]:
        body = _json(GrpcToRest.convert_query_points(request))
        hits = self._engine.query(name or request.collection_name, body)
        return [
            RestToGrpc.convert_scored_point(
                models.ScoredPoint(**{**one, "payload": one["payload"] or {}})
            )
            for one in hits
        ]


def _wire_record(record: Json) -> Any:
    return RestToGrpc.convert_record(
        models.Record(**{**record, "payload": record["payload"] or {}})
    )


class _Collections(collections_grpc.CollectionsServicer):
    def __init__(self, owner: QdrantContractServer) -> None:
        self._owner = owner
        self._engine = owner.engine

    def _done(self, context: Any, operation: str, function: Callable[[], Any]) -> Any:
        def apply() -> Any:
            return wire.CollectionOperationResponse(result=bool(function()), time=0.0)

        return _call(self._owner, context, operation, apply)

    def Create(self, request: Any, context: Any) -> Any:
        body = {
            "vectors": _optional(request, "vectors_config", GrpcToRest.convert_vectors_config),
            "sparse_vectors": _optional(
                request, "sparse_vectors_config", GrpcToRest.convert_sparse_vector_config
            ),
            "shard_number": request.shard_number if request.HasField("shard_number") else None,
            "metadata": GrpcToRest.convert_payload(request.metadata),
        }
        return self._done(
            context, "create", lambda: self._engine.create(request.collection_name, body)
        )

    def Update(self, request: Any, context: Any) -> Any:
        body = {"metadata": GrpcToRest.convert_payload(request.metadata)}
        return self._done(
            context, "update", lambda: self._engine.update(request.collection_name, body)
        )

    def Delete(self, request: Any, context: Any) -> Any:
        return self._done(context, "delete", lambda: self._engine.delete(request.collection_name))

    def UpdateAliases(self, request: Any, context: Any) -> Any:
        actions = []
        for action in request.actions:
            kind = action.WhichOneof("action")
            one = getattr(action, kind)
            actions.append({kind: {field.name: value for field, value in one.ListFields()}})
        return self._done(context, "change_aliases", lambda: self._engine.change_aliases(actions))

    def CollectionExists(self, request: Any, context: Any) -> Any:
        def apply() -> Any:
            exists = self._engine.exists(request.collection_name)
            return wire.CollectionExistsResponse(
                result=wire.CollectionExists(exists=exists), time=0.0
            )

        return _call(self._owner, context, "exists", apply)

    def Get(self, request: Any, context: Any) -> Any:
        def apply() -> Any:
            info = models.CollectionInfo(**self._engine.info(request.collection_name))
            return wire.GetCollectionInfoResponse(
                result=RestToGrpc.convert_collection_info(info), time=0.0
            )

        return _call(self._owner, context, "info", apply)

    def List(self, request: Any, context: Any) -> Any:
        def apply() -> Any:
            found = [wire.CollectionDescription(name=one) for one in self._engine.names()]
            return wire.ListCollectionsResponse(collections=found, time=0.0)

        return _call(self._owner, context, "names", apply)

    def _listed_aliases(self, context: Any, name: str | None) -> Any:
        def apply() -> Any:
            found = [wire.AliasDescription(**one) for one in self._engine.aliases(name)]
            return wire.ListAliasesResponse(aliases=found, time=0.0)

        return _call(self._owner, context, "aliases", apply)

    def ListAliases(self, request: Any, context: Any) -> Any:
        return self._listed_aliases(context, None)

    def ListCollectionAliases(self, request: Any, context: Any) -> Any:
        return self._listed_aliases(context, request.collection_name)


class _Root(qdrant_pb2_grpc.QdrantServicer):
    def __init__(self, owner: QdrantContractServer) -> None:
        self._owner = owner

    def HealthCheck(self, request: Any, context: Any) -> Any:
        def apply() -> Any:
            return qdrant_pb2.HealthCheckReply(title="qdrant", version=VERSION)

        return _call(self._owner, context, "root", apply)
