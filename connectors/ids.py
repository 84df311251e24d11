"""Ids: what callers may use, and the point ids Qdrant stores them under.

Qdrant knows unsigned 64-bit integers and UUIDs. The mapping below gives every caller's id a point
id of its own: integers keep their value; the canonical text of a UUID of any version but 5 keeps
its value; every other string becomes a UUID of version 5. A caller's own version 5 UUID is hashed
like any other string, so that no string can be chosen to meet the hash of another one.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vdr_db.connectors.base import Id
from vdr_db.errors import InputError

__all__ = [
    "MAX_ID_BYTES",
    "checked_id",
    "checked_ids",
    "content_id",
    "id_of",
    "id_order",
    "point_id",
    "sort_key",
]

# Elasticsearch's limit for `_id`; one limit for all stores keeps collections portable.
MAX_ID_BYTES = 512

_STRING_IDS = uuid.uuid5(uuid.NAMESPACE_URL, "vdr_db:string-id").bytes
_TEXT_IDS = uuid.uuid5(uuid.NAMESPACE_URL, "vdr_db:text").bytes


def checked_id(id: Any) -> Id:
    """The id as `int` or `str`.

    Raises:
        InputError: It is neither, negative, above 64 bits, empty, too long, or not valid Unicode.
    """
    if isinstance(id, (int, np.integer)) and not isinstance(id, bool):
        if not 0 <= id < 2**64:
            raise InputError(
                f"integer ids must lie in [0, 2^64), got {id}; use a string for other names."
            )
        return int(id)
    if not isinstance(id, str):
        raise InputError(
            f"ids must be integers or strings, got {id!r} ({type(id).__name__}); "
            "pass str(id) to keep other kinds."
        )
    try:
        size = len(id.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise InputError(
            f"ids must be valid Unicode, got {id!r} with a lone surrogate; clean it first."
        ) from error
    if not 1 <= size <= MAX_ID_BYTES:
        shown = repr(id) if len(id) < 40 else repr(id[:40]) + "…"
        raise InputError(
            f"string ids must have 1 to {MAX_ID_BYTES} bytes in UTF-8, got {size} ({shown}); "
            "use a hash of a longer name."
        )
    return str(id)


def checked_ids(ids: Sequence[Any], *, unique: bool = False) -> list[Id]:
    """All ids checked, and that none occurs twice if they must be `unique`."""
    if isinstance(ids, (str, bytes, int, np.integer)):
        raise TypeError(f"`ids` must be a sequence of ids, got {ids!r}; pass [{ids!r}]")
    if isinstance(ids, Mapping):
        raise TypeError(
            f"`ids` must be a sequence of ids, got {ids!r}; a condition goes where `filter` is "
            "taken, as in delete(filter=...) and count(filter=...) of a collection"
        )
    checked = [checked_id(id) for id in ids]
    if unique:
        seen: set[Id] = set()
        for id in checked:
            if id in seen:
                raise InputError(
                    f"every id of a call must be different, got {id!r} twice; "
                    "add the later version in a call of its own."
                )
            seen.add(id)
    return checked


def point_id(id: Id) -> int | str:
    """The Qdrant point id of a checked id: an integer, or the text of a UUID."""
    if isinstance(id, int):
        return id
    if len(id) == 36:
        try:
            parsed = uuid.UUID(id)
        except ValueError:
            pass
        else:
            if str(parsed) == id and parsed.version != 5:
                return id
    return _uuid5(_STRING_IDS, id.encode())


def content_id(text: str) -> str:
    """The id of a text without one: a UUID of version 5 of the text, the same in every run."""
    return _uuid5(_TEXT_IDS, text.encode("utf-8", "surrogatepass"))


def _uuid5(space: bytes, name: bytes) -> str:
    """The text of `uuid.uuid5`, without making a `UUID` on the way: every row written needs one."""
    text = hashlib.sha1(space + name, usedforsecurity=False).hexdigest()
    variant = "89ab"[int(text[16], 16) & 3]
    return f"{text[:8]}-{text[8:12]}-5{text[13:16]}-{variant}{text[17:20]}-{text[20:32]}"


def id_order(id: Id) -> tuple[bool, Id]:
    """Sort key of ids: integers first, then strings."""
    return isinstance(id, str), id


def sort_key(id: Id) -> str:
    """A text that sorts as `id_order` does, integers first, and holds the whole id."""
    return f"1{id}" if isinstance(id, str) else f"0{id:020d}"


def id_of(key: str) -> Id:
    """The id that `sort_key` wrote."""
    return key[1:] if key.startswith("1") else int(key)
