"""The gRPC side of the contract server: the protocol's messages as the JSON requests of REST."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc
from qdrant_client import grpc as wire
from qdrant_client.conversions.conversion import GrpcToRest, RestToGrpc
from qdrant_client.grpc import collections_service_pb2_grpc as collections_grpc
from qdrant_client.grpc import points_service_pb2_grpc as points_grpc
from qdrant_client.grpc import qdrant_pb2, qdrant_pb2_grpc
from qdrant_client.http import models
from qdrant_contract_engine import Refused

if TYPE_CHECKING:
    from qdrant_contract_server import QdrantContractServer as Owner

__all__ = ["VERSION", "Collections", "Points", "Root"]

VERSION = "1.20.0"
Json = dict[str, Any]

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.ALREADY_EXISTS,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    403: grpc.StatusCode.PERMISSION_DENIED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
}


def _call(
    owner: Owner,
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


class Points(points_grpc.PointsServicer):
    def __init__(self, owner: Owner) -> None:
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


class Collections(collections_grpc.CollectionsServicer):
    def __init__(self, owner: Owner) -> None:
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


class Root(qdrant_pb2_grpc.QdrantServicer):
    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    def HealthCheck(self, request: Any, context: Any) -> Any:
        def apply() -> Any:
            return qdrant_pb2.HealthCheckReply(title="qdrant", version=VERSION)

        return _call(self._owner, context, "root", apply)
