"""What tells one input from another, and one state of an input from a later one.

An input is known by the names of its files and its slice. Its state is told by sizes and times of
change, or, where the times differ, by a hash of the contents, which is made of inputs up to 4 GiB
(and of larger ones where it is asked for): a file that was only touched is the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from vdr_db.digest import file_digest

__all__ = [
    "HASHED_BYTES",
    "file_identities",
    "input_change",
    "is_same_input",
    "of_format_1",
    "run_difference",
]

HASHED_BYTES = 4 << 30
_KINDS = ("files", "images", "spool", "identity")


def file_identities(paths: Iterable[str], *, digest: bool) -> list[dict[str, Any]]:
    """Name, size, time and hash of each file; with `digest`, no time and always a hash.

    Raises:
        OSError: A file is missing, or cannot be read.
    """
    files = [(path, os.stat(path)) for path in paths]
    is_hashed = digest or sum(status.st_size for _, status in files) <= HASHED_BYTES
    told: list[dict[str, Any]] = []
    for path, status in files:
        one: dict[str, Any] = {"name": os.path.basename(path), "size": status.st_size}
        if not digest:
            one["mtime_ns"] = status.st_mtime_ns
        if is_hashed:
            one["sha256"] = file_digest(path)
        told.append(one)
    return told


def is_same_input(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether two descriptions are of one input, whatever it contained then and contains now.

    It has the same names and slice, and either the same content or, if that is known, the same
    place.
    """
    if stored.get("slice", "0/1") != wanted.get("slice", "0/1"):
        return False
    if [_names(stored, kind) for kind in _KINDS] != [_names(wanted, kind) for kind in _KINDS]:
        return False
    places = stored.get("place"), wanted.get("place")
    return None in places or places[0] == places[1] or input_change(stored, wanted) is None


def input_change(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """How an input differs from what it was, as the end of a sentence; `None` when it does not."""
    for name in sorted({*stored, *wanted} - {"slice", "place"}):
        then, now = stored.get(name), wanted.get(name)
        if then == now:
            continue
        if name == "files" and then and now:
            for one, other in zip(then, now, strict=False):
                if not _is_same(one, other):
                    sizes = f"{one['size']:,} then, {other['size']:,} now"
                    return f"{other['name']} has changed since (bytes: {sizes})"
        elif name == "images" and then and now:
            if not _is_same(then, now):
                return (
                    f"its images have changed since ({then['count']:,} then, {now['count']:,} now)"
                )
        elif name == "spool":
            return "the parts of the spool have changed since"
        else:
            return f"its {name} was {_short(then)} then and is {_short(now)} now"
    return None


def of_format_1(described: Mapping[str, Any]) -> dict[str, Any]:
    """A description as spools and ledgers of format 1 know it."""
    facts = {name: one for name, one in described.items() if name not in ("slice", "place")}
    if "files" in facts:
        facts["files"] = [
            {k: v for k, v in one.items() if k != "sha256" or "mtime_ns" not in one}
            for one in facts["files"]
        ]
    if "images" in facts:
        facts["images"] = {k: v for k, v in facts["images"].items() if k != "content"}
    return facts


def run_difference(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """How a run differs from what it was, as the end of a sentence; `None` when it does not."""
    change = input_change(stored.get("input", {}), wanted.get("input", {}))
    if change is not None:
        return change
    for part, what in (("store", "store"), ("encoder", "encoder"), ("policy", "run")):
        then, now = stored.get(part) or {}, wanted.get(part) or {}
        names = {*then, *now}
        if part == "encoder" and ("settings" not in then or "settings" not in now):
            names.discard("settings")  # of an earlier version, which did not write them down
        for name in sorted(names):
            if then.get(name) != now.get(name):
                told = f"{_short(then.get(name))} then and {_short(now.get(name))} now"
                return f"another {what} ({name} {told})"
    return None


def _names(described: Mapping[str, Any], kind: str) -> Any:
    content = described.get(kind)
    if kind == "files" and content is not None:
        return [one["name"] for one in content]
    return content if kind == "identity" else content is not None


def _is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two states of a file, or of a folder of images, are of the same content.

    Sizes and times alone are as good as a hash where there is none.
    """
    if any(one.get(name) != other.get(name) for name in ("size", "count")):
        return False
    for name in ("content", "sha256", "mtime_ns"):
        if None not in (one.get(name), other.get(name)):
            return bool(one[name] == other[name])
    return False


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:23] + "…"
