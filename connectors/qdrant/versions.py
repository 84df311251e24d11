"""Collections behind aliases on a server: numbered names, settings, copies, the swap.

`articles` is an alias of `articles-000001`. A rebuild fills `articles-000002` and moves the alias
in one request, so a search sees all of the old collection or all of the new one.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

from vdr_db.connectors.base import next_version
from vdr_db.connectors.halving import deliver
from vdr_db.connectors.qdrant.errors import translated
from vdr_db.connectors.qdrant.requests import METADATA_KEY
from vdr_db.connectors.validation import clean_payload
from vdr_db.connectors.work import WORK_KEY, Work
from vdr_db.errors import StoreError

__all__ = ["Versions"]

_COPIED_AT_ONCE = 100
_COPIED_BYTES = 8 << 20
_OF_PARAMS = (
    "shard_number",
    "sharding_method",
    "replication_factor",
    "write_consistency_factor",
    "on_disk_payload",
    "payload",
    "id_tracker",
)
_OF_CONFIG = (
    # argument of create_collection, field of the answer, class of the argument
    ("hnsw_config", "hnsw_config", "HnswConfigDiff"),
    ("optimizers_config", "optimizer_config", "OptimizersConfigDiff"),
    ("wal_config", "wal_config", "WalConfigDiff"),
    ("strict_mode_config", "strict_mode_config", "StrictModeConfig"),
)


class Versions:
    """What is done with whole collections of one server, called `where`; no message shows a key."""

    def __init__(self, client: Any, models: Any, where: str, secret: str | None) -> None:
        self._client = client
        self._models = models
        self._where = where
        self._secret = secret

    def target(self, name: str) -> str | None:
        """The collection an alias stands for; `None` when the name is no alias."""
        with self._translated("be looked up"):
            found = self._client.get_aliases().aliases
        return next((str(a.collection_name) for a in found if a.alias_name == name), None)

    def aliases_of(self, collection: str) -> list[str]:
        """The aliases of a collection."""
        with self._translated("be looked up"):
            found = self._client.get_collection_aliases(collection).aliases
        return [str(alias.alias_name) for alias in found]

    def free_name(self, name: str) -> str:
        """The first unused name of the form `name-000001`."""
        with self._translated("be looked up"):
            taken = self._client.get_collections().collections
        return next_version(name, (one.name for one in taken))

    def unnamed(self, name: str) -> list[str]:
        """Collections `name-000001` and so on that no alias stands for."""
        pattern = re.compile(re.escape(name) + r"-\d{6}")
        with self._translated("be looked up"):
            there = {one.name for one in self._client.get_collections().collections}
            named = {one.collection_name for one in self._client.get_aliases().aliases}
        return sorted(one for one in there - named if pattern.fullmatch(one))

    def leftovers(self, name: str) -> dict[str, str]:
        """Of the `unnamed`, those that `keep_old` did not ask for → why nothing needs them."""
        found = {}
        for one in self.unnamed(name):
            with self._translated("be looked up"):
                config = self._client.get_collection(one).config
            metadata = getattr(config, "metadata", None) or {}
            told = metadata.get(WORK_KEY)
            if METADATA_KEY not in metadata:
                found[one] = "no alias stands for it; a rebuild did not end, or it was to be kept"
            elif told and Work(**told).is_over:
                found[one] = "the rebuild that made or replaced it did not end"
            elif told and not Work(**told).is_here:
                found[one] = (
                    f"process {told['process']} on {told['host']} made or replaced it, and did "
                    "not end, or still fills it"
                )
        return found

    def note(self, collection: str, work: Work | None) -> None:
        """Notes who works on a collection, for `leftovers`; older servers keep no notes."""
        if "metadata" in self._models.UpdateCollection.model_fields:
            told = {WORK_KEY: asdict(work) if work else {}}
            with self._translated("be described"):
                self._client.update_collection(collection, metadata=told)

    def point_alias(self, name: str, new: str, *, moved: bool = False) -> None:
        """Makes an alias, or moves the one that is there, in one request."""
        models = self._models
        actions: list[Any] = []
        if moved:
            gone = models.DeleteAlias(alias_name=name)
            actions.append(models.DeleteAliasOperation(delete_alias=gone))
        made = models.CreateAlias(collection_name=new, alias_name=name)
        actions.append(models.CreateAliasOperation(create_alias=made))
        with self._translated("get its alias"):
            self._client.update_collection_aliases(change_aliases_operations=actions)

    def settings(self, collection: str) -> dict[str, Any]:
        """Arguments of `create_collection` for another collection like this one."""
        with self._translated("be read"):
            config = self._client.get_collection(collection).config
        settings: dict[str, Any] = {
            "vectors_config": config.params.vectors or {},
            "sparse_vectors_config": config.params.sparse_vectors or {},
        }
        for name in _OF_PARAMS:
            if getattr(config.params, name, None) is not None:
                settings[name] = getattr(config.params, name)
        if "payload" in settings:
            settings.pop("on_disk_payload", None)
        for argument, field, kind in _OF_CONFIG:
            given = getattr(config, field, None)
            if given is None:
                continue
            target = getattr(self._models, kind)
            values = {
                name: value
                for name, value in given.model_dump(exclude_none=True).items()
                if name in target.model_fields
            }
            if "memory" in values:  # the older word for the same may not stand beside it
                values.pop("on_disk", None)
            settings[argument] = target(**values)
        if getattr(config, "quantization_config", None) is not None:
            settings["quantization_config"] = config.quantization_config
        if getattr(config, "metadata", None):
            settings["metadata"] = dict(config.metadata)
        return settings

    def indexes(self, collection: str) -> dict[str, Any]:
        """Payload key → schema of its index."""
        with self._translated("be read"):
            schema = self._client.get_collection(collection).payload_schema or {}
        return {key: one.params or one.data_type for key, one in schema.items()}

    def copy(self, old: str, new: str) -> None:
        """Copies all points, with all their vectors, through this process."""
        after: Any = None
        models = self._models
        while True:
            with self._translated("be copied"):
                page, after = self._client.scroll(
                    old, offset=after, limit=_COPIED_AT_ONCE, with_payload=True, with_vectors=True
                )
                points = [
                    models.PointStruct.model_construct(
                        id=one.id, vector=one.vector or {}, payload=one.payload or {}
                    )
                    for one in page
                ]
            deliver(points, lambda part: self._put(new, part), _refused, fitting=_fitting)
            if after is None:
                return

    def _put(self, collection: str, points: list[Any]) -> None:
        with translated(self._where, "be copied", self._secret, refusable=True):
            self._client.upsert(collection, points=points, wait=True)

    def count(self, collection: str) -> int:
        """Number of points."""
        with self._translated("be counted"):
            return int(self._client.count(collection, exact=True).count)

    def drop(self, collection: str, *, unless_named: bool = False) -> None:
        """Deletes a collection; one that still has an alias stays when `unless_named`."""
        if unless_named and self.aliases_of(collection):
            return
        with self._translated("lose an old collection"):
            self._client.delete_collection(collection)

    def check_target(self, name: str, expected: str) -> None:
        """Refuses an alias that stands for something else by now."""
        seen = self.target(name)
        if seen != expected:
            raise StoreError(
                f"{self._where} was an alias of {expected!r} and is one of {seen!r} by now; "
                "someone else rebuilt it meanwhile, so nothing is changed."
            )

    def move_alias(self, name: str, new: str) -> None:
        """Moves an alias to another collection, and looks when the answer gets lost."""
        try:
            self.point_alias(name, new, moved=True)
        except StoreError:
            if self.target(name) != new:
                raise

    def _translated(self, action: str) -> AbstractContextManager[None]:
        return translated(self._where, action, self._secret)


def _fitting(points: list[Any]) -> int:
    """How many points may go in one request by their payloads, which are what can be large."""
    size = 0
    for count, point in enumerate(points):
        size += clean_payload(point.payload)[1]
        if count and size > _COPIED_BYTES:
            return count
    return len(points)


def _refused(points: list[Any], error: Exception) -> None:
    raise StoreError(f"point {points[0].id!r} cannot be copied: {error}.") from error
