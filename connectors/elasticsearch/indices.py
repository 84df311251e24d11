"""Indices of ours: versioned names behind an alias, replaced without a gap, loaded fast.

`articles` is an alias of `articles-000001`. A rebuild fills `articles-000002` and moves the alias
in one step, so a search sees all of the old index or all of the new one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from vdr_db.connectors.base import next_version
from vdr_db.connectors.elasticsearch.transport import Transport, error_reason
from vdr_db.errors import ConfigError, StoreError, StoreMismatch

__all__ = ["META_KEY", "IndexState", "check_name", "create_index", "load_settings", "read_state"]

META_KEY = "vdr_db"
_OF_ONE_INDEX = re.compile(
    r"index\.(uuid|creation_date|provided_name|version|blocks|resize|history|routing)\b"
)
_LOAD_SETTINGS = {"index.refresh_interval": "-1", "index.number_of_replicas": "0"}


@dataclass(frozen=True)
class IndexState:
    """What the server holds under a name.

    Attributes:
        backing: Name of the index itself.
        is_alias: Whether the name is an alias of it.
        mapping: Its mapping.
    """

    backing: str
    is_alias: bool
    mapping: Mapping[str, Any]

    @property
    def meta(self) -> Mapping[str, Any]:
        """What we wrote about it, from `_meta`; empty for an index that is not ours."""
        return (self.mapping.get("_meta") or {}).get(META_KEY) or {}


def check_name(name: str) -> str:
    """The name, if Elasticsearch and our numbering allow it."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]{0,199}", name):
        raise ConfigError(
            "an index name must be lower-case letters, digits, '_', '.' and '-', start with a "
            f"letter or digit, and have at most 200 characters, got {name!r}."
        )
    return name


def read_state(transport: Transport, name: str) -> IndexState | None:
    """What the server holds under `name`, or `None`; an alias of several is a `StoreMismatch`."""
    reply = transport.call("GET", f"/{quote(name)}/_mapping", allow=(404,))
    if reply.status == 404:
        return None
    backings = sorted(reply.body)
    if len(backings) != 1:
        raise StoreMismatch(
            f"{name!r} must be an index or an alias of one index, got an alias of {backings}; "
            "open one of them by its own name."
        )
    mapping = reply.body[backings[0]].get("mappings") or {}
    return IndexState(backings[0], backings[0] != name, mapping)


def read_settings(transport: Transport, index: str) -> dict[str, Any]:
    """The settings of an index that a new one of the same kind should get, as flat names."""
    answer = transport.call(
        "GET", f"/{quote(index)}/_settings", params={"flat_settings": "true"}
    ).body
    settings = answer[index]["settings"]
    return {n: value for n, value in settings.items() if not _OF_ONE_INDEX.match(n)}


def next_backing(transport: Transport, name: str) -> str:
    """The first unused name of the form `name-000001`."""
    taken = transport.call("GET", f"/{quote(name)}-*/_alias", allow=(404,))
    return next_version(name, taken.body if taken.status == 200 else ())


def create_index(
    transport: Transport,
    backing: str,
    *,
    alias: str | None,
    mapping: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> bool:
    """Creates an index; False when another process, or our own lost request, made it already."""
    body: dict[str, Any] = {"mappings": dict(mapping), "settings": dict(settings)}
    if alias is not None:
        body["aliases"] = {alias: {"is_write_index": True}}
    reply = transport.call("PUT", f"/{quote(backing)}", body, allow=(400,))
    if reply.status < 400:
        return True
    text = str(reply.body)
    if "resource_already_exists_exception" in text or "more than one write index" in text:
        return False
    raise StoreError(
        f"index {backing!r} could not be created ({error_reason(reply.body)}); check `settings`, "
        "`payload_types` and the server's version."
    )


def put_template(
    transport: Transport, name: str, *, mapping: Mapping[str, Any], settings: Mapping[str, Any]
) -> str:
    """Writes a composable template for all indices `name-*`; returns its name."""
    template = f"vdr-{name}"
    body = {
        "index_patterns": [f"{name}-*"],
        "priority": 200,
        "template": {"mappings": dict(mapping), "settings": dict(settings)},
    }
    transport.call("PUT", f"/_index_template/{quote(template)}", body)
    return template


def swap_alias(transport: Transport, alias: str, *, old: str, new: str) -> None:
    """Moves an alias to another index in one step."""
    gone = {"remove": {"index": old, "alias": alias}}
    made = {"add": {"index": new, "alias": alias, "is_write_index": True}}
    transport.call("POST", "/_aliases", {"actions": [gone, made]})


def refresh_index(transport: Transport, index: str) -> None:
    """Makes all written documents visible to searches."""
    transport.call("POST", f"/{quote(index)}/_refresh")


def count_documents(transport: Transport, index: str) -> int:
    """Documents visible to searches."""
    return int(transport.call("GET", f"/{quote(index)}/_count").body["count"])


def delete_index(transport: Transport, index: str) -> None:
    """Deletes an index; one that is gone is no error."""
    transport.call("DELETE", f"/{quote(index)}", allow=(404,))


def copy_documents(transport: Transport, old: str, new: str) -> None:
    """Copies all documents on the server and waits until it is done."""
    body = {"source": {"index": old}, "dest": {"index": new}}
    answer = run_task(transport, "/_reindex", body)
    failures = answer.get("failures") or answer.get("error")
    if failures:
        raise StoreError(
            f"copying {old!r} to {new!r} failed ({str(failures)[:300]}); the old index is in use "
            "as before."
        )


def merge_segments(transport: Transport, index: str) -> None:
    """Merges an index to one segment and waits until it is done; searches go on meanwhile."""
    run_task(transport, f"/{quote(index)}/_forcemerge", None, {"max_num_segments": 1})


def run_task(
    transport: Transport,
    path: str,
    body: Mapping[str, Any] | None,
    params: Mapping[str, Any] | None = None,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Starts long work on the server and asks for its end, so that no request has to be long.

    Returns what the work reports; nothing when the server has forgotten a finished task.
    """
    params = {**(params or {}), "wait_for_completion": "false"}
    # Not repeated when the answer is lost: two copies of such work would get in each other's way.
    started = transport.once("POST", path, body, params=params).body
    if "task" not in started:
        return dict(started)
    pause_s = 0.05
    while True:
        reply = transport.call(
            "GET", f"/_tasks/{quote(str(started['task']), safe=':')}", allow=(404,)
        )
        if reply.status == 404:
            return {}
        if reply.body.get("completed"):
            ended = {"error": reply.body["error"]} if reply.body.get("error") else {}
            return {**(reply.body.get("response") or {}), **ended}
        sleep(pause_s)
        pause_s = min(5.0, pause_s * 1.5)


@contextmanager
def blocked_writes(transport: Transport, index: str) -> Iterator[None]:
    """Refuses writes to an index meanwhile, so that none is lost between two indices."""
    path = f"/{quote(index)}/_settings"
    transport.call("PUT", path, {"index.blocks.write": True})
    try:
        yield
    finally:
        transport.call("PUT", path, {"index.blocks.write": None}, allow=(404,))


@contextmanager
def load_settings(transport: Transport, index: str, meta: Mapping[str, Any]) -> Iterator[None]:
    """No refreshes and no replicas meanwhile; both come back as they were, and one refresh runs.

    The values to come back to are written into the index first. A process killed in between
    leaves the index in this state; the next load restores what was there before that process.
    """
    path = f"/{quote(index)}"
    before = meta.get("before_load")
    if before is None:
        current = read_settings(transport, index)
        before = {name: current.get(name) for name in _LOAD_SETTINGS}
    marked = {META_KEY: {**meta, "before_load": before}}
    transport.call("PUT", f"{path}/_mapping", {"_meta": marked})
    try:
        transport.call("PUT", f"{path}/_settings", _LOAD_SETTINGS)
        yield
    finally:
        transport.call("PUT", f"{path}/_settings", dict(before))
        # Said rather than left out: a server may merge what it is told with what it had.
        clean = {META_KEY: {**meta, "before_load": None}}
        transport.call("PUT", f"{path}/_mapping", {"_meta": clean})
        refresh_index(transport, index)
