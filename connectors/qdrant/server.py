"""Qdrant on a server, through `qdrant-client` over gRPC or REST."""

from __future__ import annotations

import copy
import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any
from urllib.parse import urlsplit

from vdr_db.connectors.base import BatchLimits
from vdr_db.connectors.failures import classify, is_passing
from vdr_db.connectors.qdrant.engine import (
    IndexKind,
    Manifest,
    Stored,
)
from vdr_db.connectors.qdrant.errors import NameTaken, shown_url
from vdr_db.connectors.qdrant.existing import Existing, check_width_of, read_manifest
from vdr_db.connectors.qdrant.requests import METADATA_KEY, IndexMemory, Requests
from vdr_db.connectors.qdrant.server_calls import ServerCalls
from vdr_db.connectors.qdrant.versions import Versions
from vdr_db.connectors.retry import Retrier, RetryPolicy
from vdr_db.connectors.work import WORK_KEY, Work
from vdr_db.errors import ConfigError, StoreError, StoreUnavailable, require

__all__ = ["SERVER_LIMITS", "ServerEngine"]

SERVER_LIMITS = BatchLimits(rows=256, bytes=4 << 20, row_bytes=24 << 20)
"""The server's own limit for a request is 32 MiB; its documentation asks for far smaller ones."""

# Servers before 1.16 keep no metadata with a collection; manifests then have a collection of their
# own, one point each.
_METADATA_SINCE = (1, 16)
_MANIFESTS = "vdr_db_manifests"
_LOOKED_AT = 64
_REST_PORT = 6333


class ServerEngine(ServerCalls):
    """An `Engine` over `QdrantClient`; `QdrantStore` explains the arguments.

    Opening is tried once, so that a wrong address is told at once. A client that was given is not
    closed, and a key is never shown.
    """

    limits = SERVER_LIMITS

    def __init__(
        self,
        collection: str,
        *,
        url: str | None = None,
        client: Any = None,
        api_key: str | None = None,
        prefer_grpc: bool = True,
        timeout: int = 60,
        retry: RetryPolicy | None = None,
        index_memory: IndexMemory | None = None,
        client_options: Mapping[str, Any] | None = None,
        collection_options: Mapping[str, Any] | None = None,
        vector_name: str | None = None,
        versioned: bool | None = None,
        existing: Existing | None = None,
        read_options: Mapping[str, Any] | None = None,
        write_options: Mapping[str, Any] | None = None,
    ) -> None:
        module = require("qdrant_client", "qdrant")
        self._models: Any = module.models
        self._collection = collection
        self._index_memory = index_memory
        self._collection_options = dict(collection_options or {})
        self._vector_name = vector_name
        self._versioned = versioned
        self._existing = existing
        self._secret = api_key
        self._retrier = Retrier(retry)
        self._read_options = dict(read_options or {})
        self._write_options = dict(write_options or {})
        # Over gRPC the client takes no plain words for these.
        for given, name, kind in (
            (self._read_options, "consistency", "ReadConsistencyType"),
            (self._write_options, "ordering", "WriteOrdering"),
        ):
            if isinstance(given.get(name), str):
                given[name] = getattr(self._models, kind)(given[name])
        self._owns_client = client is None
        if client is not None:
            self._where = f"collection {collection!r} of the given client"
            if not isinstance(client, module.QdrantClient):
                raise ConfigError(
                    f"`client` must be a qdrant_client.QdrantClient, got {type(client).__name__}."
                )
            self._client: Any = client
            self._requests = self._new_requests()
            return
        options = dict(client_options or {})
        # Only the usual port is known to have gRPC beside it; another one is not left for that.
        if _checked_port(url or "") not in (None, _REST_PORT) and "grpc_port" not in options:
            prefer_grpc = False
        if prefer_grpc:
            # Without it a channel that saw a long outage waits for up to two minutes.
            backoff = {"grpc.max_reconnect_backoff_ms": 2_000}
            options["grpc_options"] = {**backoff, **(options.get("grpc_options") or {})}
        # The server has a limit of its own, which gives way to the one of a request.
        for given in (self._read_options, self._write_options):
            given.setdefault("timeout", timeout)
        self._where = f"collection {collection!r} at {shown_url(url or '')}"
        with self._translated("be reached"):
            self._client = module.QdrantClient(
                url=url,
                api_key=api_key,
                prefer_grpc=prefer_grpc,
                timeout=timeout,
                check_compatibility=False,
                **options,
            )
        self._requests = self._new_requests()

    @property
    def where(self) -> str:
        """The collection and its server, without secrets."""
        return self._where

    @property
    def versions(self) -> Versions:
        """What is done with whole collections."""
        return Versions(self._client, self._models, self._where, self._secret)

    def open(self) -> Manifest | None:
        """Looks the collection up; `None` when it is not made yet.

        Raises:
            StoreMismatch: It was not made by this library, or was changed since.
            StoreUnavailable: The server cannot be reached.
        """
        try:
            about = self._look()
        except StoreUnavailable as error:
            # A wrong address is told at once; a cluster with a shard down is one that answers.
            if not is_passing(str(error)):
                raise
            about = self._retrier.call(self._look)
        if about is None:
            if self._existing is None:
                return None
            raise StoreError(f"{self._where} is not there; check its name and place.")
        data = (getattr(about.config, "metadata", None) or {}).get(METADATA_KEY)
        if data is None:
            data = self._sidecar_manifest()
        manifest = read_manifest(
            about,
            data,
            self._collection,
            self._where,
            vector=self._vector_name,
            existing=self._existing,
        )
        self._requests.vector = manifest.vector
        if self._existing is not None:
            if self._existing.adopt:
                check_width_of(self._largest_index(), manifest.width, self._where)
            return manifest
        found = {key: self._requests.dialect.kind(s) for key, s in about.payload_schema.items()}
        known: dict[str, IndexKind] = {k: kind for k, kind in found.items() if kind is not None}
        manifest = replace(manifest, payload_indexes={**manifest.payload_indexes, **known})
        # An index is missing when the process that made the collection was killed in between.
        present = set(about.payload_schema or {})
        missing = {k: v for k, v in manifest.payload_indexes.items() if k not in present}
        self._make_indexes(
            self._collection, {k: self._requests.dialect.index(v) for k, v in missing.items()}
        )
        return manifest

    def current(self) -> Manifest | None:
        """What is behind the name by now, `None` when it is gone."""
        about = self._retrier.call(self._look)
        if about is None:
            return None
        data = (getattr(about.config, "metadata", None) or {}).get(METADATA_KEY)
        return read_manifest(
            about,
            self._sidecar_manifest() if data is None else data,
            self._collection,
            self._where,
            vector=self._vector_name,
            existing=self._existing,
        )

    def _look(self) -> Any:
        """What the server tells about the collection, `None` when it has no such one."""
        with self._translated("be opened"):
            try:
                return self._client.get_collection(self._collection)
            except Exception as error:
                # One request where it is there, as before every write; only then is it asked for.
                may_pass = classify(error).kind in ("transient", "timeout")
                if may_pass or self._client.collection_exists(self._collection):
                    raise
                return None

    def create(self, manifest: Manifest) -> None:
        """Makes the collection with its payload indexes."""
        self._requests.vector = manifest.vector
        with self._translated("be made"):
            version = self._version()
        arguments = self._requests.collection(
            manifest,
            version,
            index_memory=self._index_memory,
            with_metadata=self._keeps_metadata(version),
            options=self._collection_options,
        )
        indexes = {
            key: self._requests.dialect.index(k) for key, k in manifest.payload_indexes.items()
        }
        if not self._versioned:
            self._make(self._collection, manifest, arguments, indexes)
            return
        name = f"{self._collection}-000001"
        try:
            self._make(name, manifest, arguments, indexes)
        except NameTaken:
            # Either another process makes the same just now, or was killed before it made the
            # alias, or a rebuild left a collection. The first two are joined.
            if not self._is_unfinished(name, manifest):
                name = self.versions.free_name(self._collection)
                self._make(name, manifest, arguments, indexes)
            target = self.versions.target(self._collection)
            if target is not None:
                if target != name:
                    self.versions.drop(name)
                raise
        self.versions.point_alias(self._collection, name)

    def describe(self, manifest: Manifest) -> None:
        """Puts another description in the place of the one that is there."""
        name = self.versions.target(self._collection) or self._collection
        with self._translated("be described"):
            if self._keeps_metadata(self._version()):
                told = {METADATA_KEY: manifest.to_dict()}
                self._client.update_collection(name, metadata=told)
            else:
                self._write_sidecar(name, manifest)

    def beside(
        self, name: str, old: str, manifest: Manifest, changes: Mapping[str, Any]
    ) -> ServerEngine:
        """Makes another collection like `old`, with `changes`, and gives an engine for it."""
        settings = {**self.versions.settings(old), **changes}
        with self._translated("be made"):
            version = self._version()
        sparse = settings.pop("sparse_vectors_config", {})
        kept = sparse.get(manifest.vector)
        with_metadata = self._keeps_metadata(version)
        if with_metadata:
            work = asdict(Work.of_this_process())
            settings["metadata"] = {**settings.get("metadata", {}), WORK_KEY: work}
        asked = self._requests.collection(
            manifest,
            version,
            index_memory=self._index_memory,
            with_metadata=with_metadata,
            options={**settings, "sparse_vectors_config": sparse},
        )
        index = getattr(kept, "index", None)
        if index is not None:
            # What the store does not decide, such as where the index lives, stays as it was.
            fresh = asked["sparse_vectors_config"][manifest.vector].index
            told = fresh.model_dump(exclude_none=True)
            asked["sparse_vectors_config"][manifest.vector] = kept.model_copy(
                update={"index": index.model_copy(update=told)}
            )
        indexes = self.versions.indexes(old)
        indexes.update(
            (k, self._requests.dialect.index(v)) for k, v in manifest.payload_indexes.items()
        )
        engine = self.renamed(name)
        engine._make(name, manifest, asked, indexes)
        return engine

    def renamed(self, name: str) -> ServerEngine:
        """An engine for another collection of the same server."""
        engine = copy.copy(self)
        engine._collection = name
        engine._where = self._where.replace(repr(self._collection), repr(name), 1)
        engine._owns_client = False
        engine._retrier = Retrier(self._retrier.policy)
        engine._versioned = False
        return engine

    def index(self, indexes: Mapping[str, IndexKind]) -> None:
        """Makes payload indexes over what is there."""
        native = {key: self._requests.dialect.index(kind) for key, kind in indexes.items()}
        self._make_indexes(self._collection, native)

    def flush(self) -> None:
        """Does nothing: the server answers when a write is in its log."""

    def optimize(self) -> None:
        """Does nothing: the server does it in the background."""

    def close(self) -> None:
        """Ends waits, and closes the connection unless the client was given ready."""
        self._retrier.stop.set()
        if self._owns_client and hasattr(self, "_client"):
            self._client.close()

    def _version(self) -> tuple[int, int]:
        """Major and minor version of the server; a very new one when it does not tell."""
        told = str(getattr(self._client.info(), "version", ""))
        match = re.match(r"(\d+)\.(\d+)", told)
        return (int(match[1]), int(match[2])) if match else (99, 0)

    def _keeps_metadata(self, version: tuple[int, int]) -> bool:
        known = self._models.CreateCollection.model_fields
        return version >= _METADATA_SINCE and "metadata" in known

    def _make(
        self,
        name: str,
        manifest: Manifest,
        arguments: Mapping[str, Any],
        indexes: Mapping[str, Any],
    ) -> None:
        """Makes a collection, described and with its indexes before anything is in it."""
        with self._translated("be made"):
            if METADATA_KEY not in (arguments.get("metadata") or {}):
                self._write_sidecar(name, manifest)
            self._client.create_collection(name, **arguments)
        self._make_indexes(name, indexes)

    def _is_unfinished(self, name: str, manifest: Manifest) -> bool:
        with self._translated("be opened"):
            about = self._client.get_collection(name)
        data = (getattr(about.config, "metadata", None) or {}).get(METADATA_KEY)
        return data == manifest.to_dict() and self.versions.count(name) == 0

    def _make_indexes(self, name: str, indexes: Mapping[str, Any]) -> None:
        with self._translated("be indexed"):
            for path, schema in indexes.items():
                self._client.create_payload_index(
                    name, field_name=path, field_schema=schema, wait=True
                )

    def _largest_index(self) -> int | None:
        options: dict[str, Any] = {"with_payload": False, "with_vectors": [self._requests.vector]}
        records, _ = self._asked("be read", self._client.scroll, limit=_LOOKED_AT, **options)
        stored = [Stored.of(record, record.id, self._requests.vector).indices for record in records]
        return max((max(indices) for indices in stored if indices), default=None)

    def _sidecar_manifest(self) -> Any:
        """What an old server keeps about the collection, `None` when there is nothing."""
        try:
            with self._translated("be opened"):
                if not self._client.collection_exists(_MANIFESTS):
                    return None
            name = self.versions.target(self._collection) or self._collection
            with self._translated("be opened"):
                points = self._client.retrieve(_MANIFESTS, ids=[_manifest_point(name)])
        except StoreUnavailable:
            raise
        except StoreError:
            # A key for one collection alone may not look at others.
            return None
        return points[0].payload.get(METADATA_KEY) if points else None

    def _write_sidecar(self, name: str, manifest: Manifest) -> None:
        if not self._client.collection_exists(_MANIFESTS):
            self._client.create_collection(_MANIFESTS, vectors_config={})
        point = self._models.PointStruct(
            id=_manifest_point(name), vector={}, payload={METADATA_KEY: manifest.to_dict()}
        )
        self._client.upsert(_MANIFESTS, points=[point], wait=True)

    def _new_requests(self) -> Requests:
        return Requests(
            self._models,
            client=self._client,
            shard_key=self._read_options.get("shard_key_selector"),
            payload=self._read_options.pop("with_payload", True),
        )


def _checked_port(url: str) -> int | None:
    """The port of an address, `None` without one.

    Raises:
        ConfigError: It is no address.
    """
    try:
        parts = urlsplit(url if "//" in url else f"//{url}")
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"`url` must be the address of a server, got {url!r}: {error}.") from None
    if not parts.hostname:
        raise ConfigError(f"`url` must be the address of a server, got {url!r}; name its host.")
    return port


def _manifest_point(collection: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"vdr_db:manifest:{collection}"))
