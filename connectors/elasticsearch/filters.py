"""Payload filters in Elasticsearch, with the meaning they have in every store.

Left to itself Elasticsearch guesses a type for each payload field from the first document that has
one, refuses later documents of another type, splits dotted names and flattens lists of objects. So
the payload is stored without being looked into, and what filters can ask of it is written out as
terms of one keyword field, `facts`:

    {"topic": "games", "year": 2001, "tags": ["a"]}
    -> "topic"=sgames, "topic"?, "year"=nc09f440000000000, "year"?, "tags"=sa, "tags"[]=sa, ...

Numbers and times are written so that their alphabetical order is their order. A filter becomes a
tree of exact terms and term ranges; no document is refused for its payload's types, and the number
of fields of an index does not grow with the payloads.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import math
import struct
from collections.abc import Mapping
from typing import Any

from vdr_db.errors import InputError
from vdr_db.filters import (
    EXACT_INTEGERS,
    AllOf,
    AnyFilter,
    Equals,
    Filter,
    Negation,
    OneOf,
    Range,
    TimeRange,
    parse_time,
)

__all__ = ["FACTS", "filter_query", "payload_facts", "refuse_nameless"]

FACTS = "facts"

# Lucene refuses terms above 32,766 bytes; longer names and texts are known by their digest.
_LONGEST = 512
# The limit of servers for one `terms` query.
_MOST_TERMS = 65_536
_EPOCH = dt.datetime(1, 1, 1, tzinfo=dt.timezone.utc)


def payload_facts(payload: Mapping[str, Any]) -> list[str]:
    """All terms of a payload: what a filter may ask of it, sorted and without repetition."""
    facts: set[str] = set()
    _collect(payload, "", facts, walks_list=False)
    return sorted(facts)


def refuse_nameless(payload: Mapping[str, Any]) -> None:
    """Refuses field names that the engine cannot index, whether or not this index would.

    Raises:
        InputError: A part of a name, between dots, is empty.
    """
    waiting: list[Any] = [payload]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            for name in value:
                if not all(map(str.strip, name.split("."))):
                    raise InputError(f"the field name {name!r} has an empty part; rename the field")
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def filter_query(filter: Filter) -> dict[str, Any]:
    """The filter as a query on the terms of `payload_facts`; it is true where `matches` is."""
    if isinstance(filter, Equals):
        path = _name(filter.key.quoted)
        if filter.value is None:
            return {"bool": {"must_not": [{"term": {FACTS: f"{path}?"}}]}}
        return {"term": {FACTS: _equality(path, filter.value)}}
    if isinstance(filter, OneOf):
        path = _name(filter.key.quoted)
        terms = [_equality(path, value) for value in filter.values if value is not None]
        either = _any_term(terms)
        return _either(
            [*either, filter_query(Equals(filter.key, None))] if None in filter.values else either
        )
    if isinstance(filter, (Range, TimeRange)):
        return _range(filter)
    if isinstance(filter, AllOf):
        if not filter.parts:
            return {"match_all": {}}
        return {"bool": {"filter": [filter_query(part) for part in filter.parts]}}
    if isinstance(filter, AnyFilter):
        # All conditions on one term are one clause together, as servers count clauses.
        parts = [filter_query(part) for part in filter.parts]
        terms = [part["term"][FACTS] for part in parts if "term" in part]
        return _either([*_any_term(terms), *(part for part in parts if "term" not in part)])
    if isinstance(filter, Negation):
        return {"bool": {"must_not": [filter_query(filter.part)]}}
    raise InputError(
        f"this store has no translation of the filter {type(filter).__name__}; "
        "write it as a dictionary."
    )


def _any_term(terms: list[str]) -> list[dict[str, Any]]:
    """Queries that are true where any term is there; none for none."""
    starts = range(0, len(terms), _MOST_TERMS)
    return [{"terms": {FACTS: terms[start : start + _MOST_TERMS]}} for start in starts]


def _either(queries: list[dict[str, Any]]) -> dict[str, Any]:
    if len(queries) == 1:
        return queries[0]
    if not queries:
        return {"match_none": {}}
    return {"bool": {"should": queries, "minimum_should_match": 1}}


def _collect(value: Any, path: str, facts: set[str], *, walks_list: bool) -> None:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            # No filter can name such a field, and quoted it would look like another one.
            if not isinstance(name, str) or '"' in name:
                continue
            place = f'{path}."{name}"' if path else f'"{name}"'
            is_there = inner is not None and inner not in ([], ())
            if is_there and not walks_list:
                facts.add(f"{_name(place)}?")
            _collect(inner, place, facts, walks_list=walks_list)
    elif isinstance(value, (list, tuple)):
        for item in value:
            # A list matches when an element does, and its elements are there to walk as well.
            if not isinstance(item, (Mapping, list, tuple)):
                _collect(item, path, facts, walks_list=walks_list)
            _collect(item, f"{path}[]", facts, walks_list=True)
    elif value is not None:
        facts.update(_scalar_facts(_name(path), value))


def _scalar_facts(path: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [_equality(path, value)]
    if isinstance(value, (int, float)):
        facts = [f"{path}=n{_sortable(value)}"]
        if isinstance(value, int) and abs(value) >= EXACT_INTEGERS:
            facts.append(_equality(path, value))
        return facts
    if isinstance(value, str):
        time = parse_time(value)
        moment = [] if time is None else [f"{path}=t{_microseconds(time)}"]
        return [_equality(path, value), *moment]
    return []


def _equality(path: str, value: str | int | float | bool) -> str:
    if isinstance(value, bool):
        return f"{path}=b{'true' if value else 'false'}"
    if isinstance(value, str):
        encoded = value.encode("utf-8", "surrogatepass")
        if len(encoded) > _LONGEST:
            return f"{path}=h{hashlib.sha256(encoded).hexdigest()}"
        return f"{path}=s{value}"
    if isinstance(value, int) and abs(value) >= EXACT_INTEGERS:
        return f"{path}=i{value}"
    return f"{path}=n{_sortable(value)}"


def _range(filter: Range | TimeRange) -> dict[str, Any]:
    path = _name(filter.key.quoted)
    kind = "n" if isinstance(filter, Range) else "t"
    # All terms of this field and kind lie between these: digits are 0-9 and a-f.
    bounds = {"gte": f"{path}={kind}0", "lt": f"{path}={kind}g"}
    # Of two bounds on one side the tighter one rules; equal ones rule as the strict one.
    lower = [(x, strict) for x, strict in ((filter.gt, True), (filter.gte, False)) if x is not None]
    upper = [(x, loose) for x, loose in ((filter.lt, False), (filter.lte, True)) if x is not None]
    if lower:
        value, strict = max(lower)
        del bounds["gte"]
        bounds["gt" if strict else "gte"] = f"{path}={kind}{_digits(value)}"
    if upper:
        value, loose = min(upper)
        del bounds["lt"]
        bounds["lte" if loose else "lt"] = f"{path}={kind}{_digits(value)}"
    return {"range": {FACTS: bounds}}


def _digits(value: float | dt.datetime) -> str:
    return _microseconds(value) if isinstance(value, dt.datetime) else _sortable(value)


def _sortable(number: float) -> str:
    """16 hexadecimal digits in the order of the float64 numbers; both zeros alike.

    An integer between two float64 numbers has 4 more, its distance from the lower one.
    """
    lower = float(number)
    if lower > number:
        lower = math.nextafter(lower, -math.inf)
    rest = int(number) - int(lower) if isinstance(number, int) else 0
    bits = int(struct.unpack(">Q", struct.pack(">d", lower + 0.0))[0])
    bits = bits ^ 0xFFFFFFFFFFFFFFFF if bits >> 63 else bits | 1 << 63
    return f"{bits:016x}{rest:04x}" if rest else f"{bits:016x}"


def _microseconds(time: dt.datetime) -> str:
    return f"{(time - _EPOCH) // dt.timedelta(microseconds=1):018d}"


def _name(path: str) -> str:
    encoded = path.encode("utf-8", "surrogatepass")
    return path if len(encoded) <= _LONGEST else f"#{hashlib.sha256(encoded).hexdigest()}"
