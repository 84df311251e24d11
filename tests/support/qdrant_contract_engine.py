"""The inside of the contract server: Qdrant's JSON requests answered by the embedded engine."""

from __future__ import annotations

import math
import shutil
import threading
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import qdrant_edge as edge

__all__ = ["ContractEngine", "Refused"]

Json = dict[str, Any]


class Refused(Exception):
    """An answer other than success.

    Attributes:
        status: HTTP status.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Collection:
    """One shard and what a server remembers beside it."""

    def __init__(self, path: Path, body: Json) -> None:
        self.lock = threading.RLock()
        self.params = {
            "vectors": body.get("vectors") or {},
            "sparse_vectors": body.get("sparse_vectors") or {},
            "shard_number": body.get("shard_number") or 1,
            "replication_factor": 1,
            "write_consistency_factor": 1,
            "on_disk_payload": body.get("on_disk_payload", True),
        }
        self.metadata: Json = dict(body.get("metadata") or {})
        self.schema: dict[str, Json] = {}
        dense = self.params["vectors"]
        if "size" in dense:
            dense = {"": dense}
        self.dense_names = set(dense)
        self.sparse_names = set(self.params["sparse_vectors"])
        self.path = path
        path.mkdir(parents=True)
        self.shard = edge.EdgeShard.create(
            str(path),
            edge.EdgeConfig(
                vectors={
                    name: edge.EdgeVectorParams(
                        size=one["size"], distance=getattr(edge.Distance, one["distance"])
                    )
                    for name, one in dense.items()
                }
                or None,
                sparse_vectors={
                    name: _sparse_params(one) for name, one in self.params["sparse_vectors"].items()
                },
            ),
        )


class ContractEngine:
    """Collections by name, with the semantics the official client relies on.

    One bad point fails the request, and the points before it are kept, as real servers do it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._collections: dict[str, _Collection] = {}
        self._aliases: dict[str, str] = {}
        self._lock = threading.RLock()

    def close(self) -> None:
        for one in self._collections.values():
            with one.lock:
                one.shard.close()
        self._collections.clear()

    def _named(self, name: str) -> _Collection:
        found = self._collections.get(self._aliases.get(name, name))
        if found is None:
            raise Refused(404, f"Not found: Collection `{name}` doesn't exist!")
        return found

    # Collections

    def names(self) -> list[str]:
        return sorted(self._collections)

    def exists(self, name: str) -> bool:
        return self._aliases.get(name, name) in self._collections

    def create(self, name: str, body: Json) -> bool:
        with self._lock:
            if self.exists(name):
                raise Refused(409, f"Wrong input: Collection `{name}` already exists!")
            # The name never becomes a path: what a client sends must not choose folders.
            folder = self._folder / f"collection-{uuid.uuid4().hex}"
            self._collections[name] = _Collection(folder, body)
        return True

    def update(self, name: str, body: Json) -> bool:
        self._named(name).metadata.update(body.get("metadata") or {})
        return True

    def delete(self, name: str) -> bool:
        with self._lock:
            found = self._collections.pop(name, None)
        if found is None:
            return False
        with found.lock:
            found.shard.close()
        shutil.rmtree(found.path)
        return True

    def info(self, name: str) -> Json:
        found = self._named(name)
        with found.lock:
            count = found.shard.count(edge.CountRequest(exact=True))
        return {
            "status": "green",
            "optimizer_status": "ok",
            "indexed_vectors_count": count,
            "points_count": count,
            "segments_count": 1,
            "config": {
                "params": found.params,
                "hnsw_config": {"m": 16, "ef_construct": 100, "full_scan_threshold": 10000},
                "optimizer_config": {
                    "deleted_threshold": 0.2,
                    "vacuum_min_vector_number": 1000,
                    "default_segment_number": 0,
                    "flush_interval_sec": 5,
                },
                "wal_config": {"wal_capacity_mb": 32, "wal_segments_ahead": 0},
                "metadata": found.metadata or None,
            },
            "payload_schema": found.schema,
        }

    def change_aliases(self, actions: Sequence[Json]) -> bool:
        """All actions or none."""
        with self._lock:
            aliases = dict(self._aliases)
            for action in actions:
                if "create_alias" in action:
                    one = action["create_alias"]
                    if one["collection_name"] not in self._collections:
                        raise Refused(404, f"Not found: Collection `{one['collection_name']}`")
                    aliases[one["alias_name"]] = one["collection_name"]
                elif "delete_alias" in action:
                    aliases.pop(action["delete_alias"]["alias_name"], None)
                else:
                    one = action["rename_alias"]
                    if one["old_alias_name"] not in aliases:
                        raise Refused(404, f"Not found: Alias `{one['old_alias_name']}`")
                    aliases[one["new_alias_name"]] = aliases.pop(one["old_alias_name"])
            self._aliases = aliases
        return True

    def aliases(self, name: str | None = None) -> list[Json]:
        return [
            {"alias_name": alias, "collection_name": target}
            for alias, target in sorted(self._aliases.items())
            if name is None or target == name
        ]

    def create_index(self, name: str, field: str, schema: Any) -> None:
        found = self._named(name)
        given = schema if isinstance(schema, dict) else {"type": schema}
        kind = str(given["type"])
        params: Any = getattr(edge.PayloadSchemaType, kind.capitalize())
        if kind == "keyword" and given.get("is_tenant") is not None:
            params = edge.KeywordIndexParams(is_tenant=given["is_tenant"])
        with found.lock:
            found.shard.update(edge.UpdateOperation.create_field_index(field, params))
            found.schema[field] = {"data_type": kind, "points": 0}
            if isinstance(schema, dict):
                found.schema[field]["params"] = schema

    def delete_index(self, name: str, field: str) -> None:
        found = self._named(name)
        with found.lock:
            found.shard.update(edge.UpdateOperation.delete_field_index(field))
            found.schema.pop(field, None)

    # Points

    def upsert(self, name: str, points: Iterable[Json]) -> None:
        """Writes points; those before a bad one stay, as a server's do."""
        found = self._named(name)
        ready = []
        try:
            for one in points:
                ready.append(_point(found, one))
        finally:
            with found.lock:
                found.shard.update(edge.UpdateOperation.upsert_points(ready))

    def delete_points(self, name: str, body: Json) -> None:
        found = self._named(name)
        if "filter" in body:
            operation = edge.UpdateOperation.delete_points_by_filter(_filter(body["filter"]))
        else:
            operation = edge.UpdateOperation.delete_points([_id(one) for one in body["points"]])
        with found.lock:
            found.shard.update(operation)

    def set_payload(self, name: str, body: Json, *, replace: bool = False) -> None:
        found = self._named(name)
        ids = [_id(one) for one in body["points"]]
        make = (
            edge.UpdateOperation.overwrite_payload if replace else edge.UpdateOperation.set_payload
        )
        with found.lock:
            found.shard.update(make(ids, body["payload"]))

    def retrieve(self, name: str, ids: Sequence[Any], payload: Any, vector: Any) -> list[Json]:
        found = self._named(name)
        with found.lock:
            records = found.shard.retrieve([_id(one) for one in ids], payload, vector)
        return [_record(one) for one in records]

    def count(self, name: str, filter: Json | None) -> int:
        found = self._named(name)
        with found.lock:
            return int(found.shard.count(edge.CountRequest(exact=True, filter=_filter(filter))))

    def scroll(self, name: str, body: Json) -> Json:
        found = self._named(name)
        offset = body.get("offset")
        with found.lock:
            records, following = found.shard.scroll(
                edge.ScrollRequest(
                    offset=None if offset is None else _id(offset),
                    limit=body.get("limit") or 10,
                    filter=_filter(body.get("filter")),
                    with_payload=body.get("with_payload", True),
                    with_vector=body.get("with_vector", False),
                )
            )
        return {
            "points": [_record(one) for one in records],
            "next_page_offset": None if following is None else _json_id(following),
        }

    def query(self, name: str, body: Json) -> list[Json]:
        found = self._named(name)
        request = edge.QueryRequest(
            limit=body.get("limit") or 10,
            offset=body.get("offset") or 0,
            query=_query(found, body.get("query"), body.get("using")),
            prefetches=[_prefetch(found, one) for one in _listed(body.get("prefetch"))],
            with_vector=body.get("with_vector") or False,
            with_payload=body.get("with_payload") or False,
            filter=_filter(body.get("filter")),
            score_threshold=body.get("score_threshold"),
        )
        with found.lock:
            points = found.shard.query(request)
        return [{**_record(one), "version": one.version, "score": one.score} for one in points]


def _sparse_params(given: Json) -> edge.EdgeSparseVectorParams:
    index = given.get("index") or {}
    datatype = index.get("datatype")
    datatypes = edge.VectorStorageDatatype
    return edge.EdgeSparseVectorParams(
        full_scan_threshold=index.get("full_scan_threshold"),
        modifier=edge.Modifier.Idf if given.get("modifier") == "idf" else None,
        datatype=None if datatype is None else getattr(datatypes, datatype.title()),
    )


def _point(found: _Collection, given: Json) -> edge.Point:
    vectors = given.get("vector") or {}
    if isinstance(vectors, list):
        vectors = {"": vectors}
    ready = {}
    for name, vector in vectors.items():
        is_sparse = isinstance(vector, dict)
        if name not in (found.sparse_names if is_sparse else found.dense_names):
            raise Refused(400, f"Wrong input: Not existing vector name error: {name}")
        ready[name] = _sparse(vector) if is_sparse else vector
    return edge.Point(_id(given["id"]), ready, given.get("payload") or {})


def _sparse(vector: Json) -> edge.SparseVector:
    indices, values = vector["indices"], vector["values"]
    if len(indices) != len(values):
        raise Refused(
            422, "Validation error in JSON body: must be the same length as indices (values)"
        )
    if len(set(indices)) != len(indices):
        raise Refused(422, "Validation error in JSON body: must be unique (indices)")
    if not all(math.isfinite(value) for value in values):
        raise Refused(400, "Format error in JSON body: not a number")
    return edge.SparseVector(indices, values)


def _id(given: Any) -> Any:
    if isinstance(given, str):
        try:
            return uuid.UUID(given)
        except ValueError:
            pass
    elif isinstance(given, int) and not isinstance(given, bool) and given >= 0:
        return given
    raise Refused(
        400,
        f"Format error in JSON body: value {given!r} is not a valid point ID, valid values are "
        "either an unsigned integer or a UUID",
    )


def _json_id(given: Any) -> int | str:
    return given if isinstance(given, int) else str(given)


def _record(given: Any) -> Json:
    vector = given.vector
    if isinstance(vector, dict):
        vector = {
            name: {"indices": list(one.indices), "values": list(one.values)}
            if isinstance(one, edge.SparseVector)
            else one
            for name, one in vector.items()
        }
    return {"id": _json_id(given.id), "payload": given.payload, "vector": vector}


def _listed(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, list) else [given]


def _query(found: _Collection, given: Any, using: str | None) -> Any:
    if given is None:
        return None
    if isinstance(given, dict):
        if "nearest" in given:
            return _query(found, given["nearest"], using)
        if "fusion" in given:
            return edge.Fusion.Rrf(2) if given["fusion"] == "rrf" else edge.Fusion.Dbsf()
        if "rrf" in given:
            weights = given["rrf"].get("weights")
            return edge.Fusion.Rrf(given["rrf"].get("k") or 2, weights)
        if "indices" in given:
            if using not in found.sparse_names:
                raise Refused(400, f"Wrong input: Not existing vector name error: {using}")
            return edge.Query.Nearest(_sparse(given), using)
    if isinstance(given, list):
        if (using or "") not in found.dense_names:
            raise Refused(400, f"Wrong input: Not existing vector name error: {using}")
        return edge.Query.Nearest(given, using)
    raise Refused(400, f"this test server does not know the query {str(given)[:80]}")


def _prefetch(found: _Collection, given: Json) -> edge.Prefetch:
    return edge.Prefetch(
        limit=given.get("limit") or 10,
        query=_query(found, given.get("query"), given.get("using")),
        prefetches=[_prefetch(found, one) for one in _listed(given.get("prefetch"))],
        filter=_filter(given.get("filter")),
        score_threshold=given.get("score_threshold"),
    )


def _filter(given: Json | None) -> edge.Filter | None:
    if given is None:
        return None
    parts = {
        name: [_condition(one) for one in _listed(given.get(name))] or None
        for name in ("must", "should", "must_not")
    }
    least = given.get("min_should")
    if least is not None:
        conditions = [_condition(one) for one in least["conditions"]]
        parts["min_should"] = edge.MinShould(conditions, least["min_count"])
    return edge.Filter(**parts)


def _condition(given: Json) -> Any:
    if "has_id" in given:
        return edge.HasIdCondition({_id(one) for one in given["has_id"]})
    if "is_empty" in given:
        return edge.IsEmptyCondition(given["is_empty"]["key"])
    if "is_null" in given:
        return edge.IsNullCondition(given["is_null"]["key"])
    if "has_vector" in given:
        return edge.HasVectorCondition(given["has_vector"])
    if "nested" in given:
        nested = given["nested"]
        return edge.NestedCondition(nested["key"], _filter(nested["filter"]))
    if "key" not in given:
        return _filter(given)
    match, bounds, values = given.get("match"), given.get("range"), given.get("values_count")
    return edge.FieldCondition(
        given["key"],
        match=None if match is None else _match(match),
        range=None if bounds is None else _bounds(bounds),
        values_count=None if values is None else edge.ValuesCount(**values),
        is_empty=given.get("is_empty"),
        is_null=given.get("is_null"),
    )


def _match(given: Json) -> Any:
    if "value" in given:
        value = given["value"]
        # The engine takes a plain True for the integer 1; NumPy's boolean is not an integer.
        return edge.MatchValue(np.bool_(value) if isinstance(value, bool) else value)
    if "any" in given:
        return edge.MatchAny(given["any"])
    if "except" in given:
        return edge.MatchExcept(given["except"])
    return edge.MatchText(given["text"])


def _bounds(given: Json) -> Any:
    bounds = {name: value for name, value in given.items() if value is not None}
    if any(isinstance(value, str) for value in bounds.values()):
        return edge.RangeDateTime(**bounds)
    return edge.RangeFloat(**{name: float(value) for name, value in bounds.items()})
