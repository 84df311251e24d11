"""Indices of ours: versioned names behind an alias, replaced without a gap, loaded fast.

`articles` is an alias of `articles-000001`. A rebuild fills `articles-000002` and moves the alias
in one step, so a search sees all of the old index or all of the new one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any
from urllib.parse import quote

from vdr_db.connectors.base import next_version
from vdr_db.connectors.elasticsearch.transport import Transport, error_reason
from vdr_db.connectors.work import WORK_KEY, Work
from vdr_db.errors import ConfigError, StoreError, StoreMismatch
from vdr_db.failure import Failure

__all__ = ["META_KEY", "IndexState", "check_name", "create_index", "read_state"]

META_KEY = "vdr_db"
# Aliases that tell what becomes of an index in a rebuild; nothing else is called like that.
UNFINISHED, REPLACED = "-unfinished", "-replaced"
_OF_ONE_INDEX = re.compile(
    r"index\.(uuid|creation_date|provided_name|version|blocks|resize|history|routing)\b"
)
_COMPARED = 100
REPLICAS = "index.number_of_replicas"
LOAD_SETTINGS = {"index.refresh_interval": "-1", REPLICAS: "0"}


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

    @property
    def work(self) -> Work | None:
        """What a process is doing with it, or was when it was killed."""
        told = (self.mapping.get("_meta") or {}).get(WORK_KEY)
        return Work(**told) if told else None

    def leaves_out(self, field: str) -> bool:
        """Whether its documents do not keep a field in `_source`."""
        return field in ((self.mapping.get("_source") or {}).get("excludes") or ())


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
        if not isinstance(reply.body, Mapping) or "error" not in reply.body:
            raise StoreError(
                f"what answers for {name!r} is no search server, it says "
                f"{str(reply.body)[:100]!r}; check the address.",
                failure=Failure("setup", "no search server"),
            )
        return None
    backings = sorted(reply.body)
    if len(backings) != 1:
        raise StoreMismatch(
            f"{name!r} must be an index or an alias of one index, got an alias of {backings}; "
            "open one of them by its own name."
        )
    mapping = reply.body[backings[0]].get("mappings") or {}
    return IndexState(backings[0], backings[0] != name, mapping)


def write_meta(
    transport: Transport, index: str, meta: Mapping[str, Any], work: Work | None
) -> None:
    """Writes what we remember about an index; one that is gone is no error."""
    # Work is said rather than left out: a server may merge what it is told with what it had.
    told = {META_KEY: dict(meta), WORK_KEY: work and asdict(work)}
    transport.call("PUT", f"/{quote(index)}/_mapping", {"_meta": told}, allow=(404,))


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
    alias: str,
    mapping: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> bool:
    """Creates an index; False when another process, or our own lost request, made it already."""
    body: dict[str, Any] = {"mappings": dict(mapping), "settings": dict(settings)}
    body["aliases"] = {alias: {"is_write_index": True}}
    reply = transport.call("PUT", f"/{quote(backing)}", body, allow=(400,))
    if reply.status < 400:
        _check_made(transport, backing, mapping)
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
    """Writes a composable template for the numbered indices of a name; returns its own name."""
    template = f"vdr-{name}"
    body = {
        # Not all of `name-*`: `news-en` is an index of its own beside `news`.
        "index_patterns": [f"{name}-0*"],
        "priority": 200,
        "template": {"mappings": dict(mapping), "settings": dict(settings)},
    }
    transport.call("PUT", f"/_index_template/{quote(template)}", body)
    return template


def _check_made(transport: Transport, backing: str, wanted: Mapping[str, Any]) -> None:
    """Takes back a new index that a template of the cluster made another one than was asked for."""
    made = read_state(transport, backing)
    if made is None:
        return
    told = made.mapping
    differing = [
        part
        for part, is_same in (
            ("_meta", made.meta == wanted["_meta"][META_KEY]),
            ("_source", told.get("_source") == wanted.get("_source")),
            ("properties", _types(told) == _types(wanted)),
        )
        if not is_same
    ]
    if differing:
        delete_index(transport, backing)
        raise StoreMismatch(
            f"the server made {backing!r} with another {' and '.join(differing)} than asked for: a "
            "template takes it in; change the pattern of that template, or choose another name."
        )


def _types(mapping: Mapping[str, Any]) -> dict[str, str]:
    fields: Mapping[str, Mapping[str, Any]] = mapping.get("properties") or {}
    return {name: str(about.get("type", "object")) for name, about in fields.items()}


def aliases_of(transport: Transport, index: str) -> dict[str, dict[str, Any]]:
    """Name → options of each alias of an index; empty when it is gone."""
    reply = transport.call("GET", f"/{quote(index)}/_alias", allow=(404,))
    found: dict[str, dict[str, Any]] = {}
    for about in reply.body.values() if reply.status == 200 else ():
        found.update(about["aliases"])
    return found


def swap_aliases(transport: Transport, alias: str, *, old: str, new: str, keep_old: bool) -> None:
    """Moves an alias, and all others of the old index, to the new one in one step.

    Source of truth is the server: when an answer is lost, or the second try of a request whose
    first one got through is refused, it is asked where the alias is.
    """
    actions: list[dict[str, Any]] = [{"remove": {"index": new, "alias": f"{new}{UNFINISHED}"}}]
    moving = aliases_of(transport, old)
    if alias not in moving:
        raise StoreError(
            f"{alias!r} does not stand for {old!r} any more: someone else rebuilt it meanwhile, so "
            "nothing is changed."
        )
    for name, options in moving.items():
        actions.append({"remove": {"index": old, "alias": name}})
        is_write = {"is_write_index": True} if name == alias else {}
        actions.append({"add": {"index": new, "alias": name, **_as_asked(options), **is_write}})
    if not keep_old:
        actions.append({"add": {"index": old, "alias": f"{old}{REPLACED}"}})
    try:
        transport.call("POST", "/_aliases", {"actions": actions})
    except StoreError:
        if alias not in aliases_of(transport, new):
            raise


def _as_asked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of an alias as a request has them; an answer splits `routing` in two."""
    names = {"index_routing", "search_routing", "filter", "is_write_index", "is_hidden"}
    return {name: value for name, value in options.items() if name in names}


def leftovers(transport: Transport, name: str) -> dict[str, str]:
    """Index → why nothing needs it: what killed rebuilds of a name left behind."""
    reply = transport.call("GET", f"/{quote(name)}-*", allow=(404,))
    pattern = re.compile(re.escape(name) + r"-\d{6}")
    found: dict[str, str] = {}
    for index, about in reply.body.items() if reply.status == 200 else ():
        aliases = set(about.get("aliases") or ())
        work = IndexState(index, False, about.get("mappings") or {}).work
        if not pattern.fullmatch(index) or not aliases:
            continue
        if aliases == {f"{index}{REPLACED}"}:
            found[index] = "it was replaced by a rebuild"
        elif aliases == {f"{index}{UNFINISHED}"} and (work is None or work.is_abandoned):
            found[index] = "the rebuild that made it did not end"
    return dict(sorted(found.items()))


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
    """Merges an index to one segment and waits until it is done; searches go on meanwhile.

    Nothing is done where the server does it by itself (410, serverless projects).
    """
    path = f"/{quote(index)}/_forcemerge"
    run_task(transport, path, None, {"max_num_segments": 1}, allow=(410,))


def run_task(
    transport: Transport,
    path: str,
    body: Mapping[str, Any] | None,
    params: Mapping[str, Any] | None = None,
    *,
    allow: Sequence[int] = (),
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Starts long work on the server and asks for its end, so that no request has to be long.

    Returns what the work reports; nothing when the server has forgotten a finished task.
    """
    params = {**(params or {}), "wait_for_completion": "false"}
    # Not repeated when the answer is lost: two copies of such work would get in each other's way.
    started = transport.once("POST", path, body, params=params, allow=allow).body
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
def changed_settings(
    transport: Transport, index: str, changes: Mapping[str, Any]
) -> Iterator[Callable[[], None]]:
    """Other settings of an index meanwhile; they come back as they were, and a refresh runs.

    What undoes the change is written into the index first, so that whoever opens it after this
    process was killed can put it right. What is yielded tells that the process is alive.
    """
    path = f"/{quote(index)}"
    state = read_state(transport, index)
    if state is None:
        raise StoreError(f"index {index!r} is gone; run the same again.")
    # Those of work that was never ended come first: its own settings are no ones to come back to.
    current = {**read_settings(transport, index), **undone(state)}
    if REPLICAS not in current:  # serverless projects have none to set
        changes = {name: value for name, value in changes.items() if name != REPLICAS}
    work = Work.of_this_process({name: current.get(name) for name in changes})

    def tell(what: Work | None) -> None:
        # Read anew: images may have come meanwhile, whose encoder is written there too.
        now = read_state(transport, index)
        if now is not None:
            write_meta(transport, index, {**now.meta, "before_load": None}, what)

    def is_alive() -> None:
        nonlocal work
        if work.is_due:
            work = replace(work, since=time.time())
            tell(work)

    tell(work)
    try:
        transport.call("PUT", f"{path}/_settings", changes)
        yield is_alive
    finally:
        transport.call("PUT", f"{path}/_settings", dict(work.undo), allow=(404,))
        tell(None)
        transport.call("POST", f"{path}/_refresh", allow=(404,))


def undone(state: IndexState) -> dict[str, Any]:
    """The settings that put an index right when its work was not ended."""
    # Versions before 0.9 kept them elsewhere.
    return {**(state.meta.get("before_load") or {}), **(state.work.undo if state.work else {})}


def put_right(transport: Transport, state: IndexState) -> bool:
    """Ends the work of a process that was killed; whether there was such work."""
    work = state.work
    if not undone(state) or (work is not None and not work.is_abandoned):
        return False
    path = f"/{quote(state.backing)}"
    transport.call("PUT", f"{path}/_settings", undone(state))
    write_meta(transport, state.backing, {**state.meta, "before_load": None}, None)
    transport.call("POST", f"{path}/_refresh")
    return True


def check_copied(transport: Transport, old: str, new: str, field: str) -> None:
    """Compares documents of a copy, drawn by chance, with what they were made of.

    Raises:
        StoreError: They differ.
    """
    query: dict[str, Any] = {"function_score": {"query": {"match_all": {}}, "random_score": {}}}
    body = {"query": query, "size": _COMPARED, "_source": [field]}
    params = {"allow_partial_search_results": "false"}
    drawn = transport.call("POST", f"/{quote(old)}/_search", body, params=params).body
    hits = {hit["_id"]: hit["_source"].get(field) for hit in drawn["hits"]["hits"]}
    if not hits:
        return
    docs = {"docs": [{"_id": id, "_source": [field]} for id in hits]}
    copies = transport.call("POST", f"/{quote(new)}/_mget", docs).body["docs"]
    found = {copy["_id"]: (copy.get("_source") or {}).get(field) for copy in copies}
    differing = [id for id, vector in hits.items() if found.get(id) != vector]
    if differing:
        raise StoreError(
            f"{len(differing)} of {len(hits)} documents have other vectors in {new!r} than in "
            f"{old!r}, {differing[0]!r} for one; the alias stays with the old index."
        )
