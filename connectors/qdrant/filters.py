"""Payload filters in the words of Qdrant, for the embedded engine and for the client alike.

Both packages build filters from classes of their own; a `Dialect` names the pieces needed.
"""

from __future__ import annotations

import datetime as dt
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from vdr_db.connectors.qdrant.client_filters import from_client, is_of_client
from vdr_db.filters import (
    EXACT_INTEGERS,
    AllOf,
    AnyFilter,
    Equals,
    Filter,
    Key,
    Negation,
    OneOf,
    Range,
    TimeRange,
    parse_filter,
)

__all__ = ["Dialect", "EdgeDialect", "json_path"]

_PLAIN = re.compile(r"[A-Za-z0-9_-]+")
INDEX_KINDS = ("keyword", "integer", "float", "bool", "datetime", "uuid", "tenant")
_BOUNDS = ("gt", "gte", "lt", "lte")


class Dialect:
    """The filter classes of one package; what both spell alike is here.

    Args:
        models: The module that has them.
    """

    def __init__(self, models: Any) -> None:
        self.models = models

    def match(self, path: str, value: str | int | bool) -> Any:
        """The value equals."""
        return self.models.FieldCondition(key=path, match=self.models.MatchValue(value=value))

    def match_any(self, path: str, values: list[str] | list[int]) -> Any:
        """The value equals one of several."""
        return self.models.FieldCondition(key=path, match=self.models.MatchAny(any=values))

    def numbers(self, path: str, bounds: dict[str, float]) -> Any:
        """The number lies in a range."""
        return self.models.FieldCondition(key=path, range=self.models.Range(**bounds))

    def times(self, path: str, bounds: dict[str, dt.datetime]) -> Any:
        """The time lies in a range."""
        return self.models.FieldCondition(key=path, range=self.models.DatetimeRange(**bounds))

    def no_value(self, path: str) -> Any:
        """The field is absent, null or an empty list."""
        return self.models.IsEmptyCondition(is_empty=self.models.PayloadField(key=path))

    def group(
        self, *, must: Sequence[Any] = (), should: Sequence[Any] = (), must_not: Sequence[Any] = ()
    ) -> Any:
        """Conditions joined into a filter, which is a condition again."""
        return self.models.Filter(
            must=list(must) or None, should=list(should) or None, must_not=list(must_not) or None
        )

    def index(self, kind: str) -> Any:
        """The schema of a kind of payload index."""
        if kind == "tenant":
            return self.models.KeywordIndexParams(type="keyword", is_tenant=True)
        return self.models.PayloadSchemaType(kind)

    def kind(self, schema: Any) -> Any:
        """The kind of a payload index that a server has, `None` for one that we do not make."""
        if getattr(schema.params, "is_tenant", False):
            return "tenant"
        kind = str(getattr(schema.data_type, "value", schema.data_type))
        return kind if kind in INDEX_KINDS else None

    def native(self, filter: Any) -> Any:
        """A filter in any of its forms as the package's own."""
        if filter is None or isinstance(filter, self.models.Filter):
            return filter
        return to_qdrant(parse_filter(filter), self)


class EdgeDialect(Dialect):
    """The classes of `qdrant_edge` where they differ from those of `qdrant_client.models`."""

    def native(self, filter: Any) -> Any:
        """A filter in any of its forms, those of `qdrant_client` too, as the package's own."""
        if is_of_client(filter):
            return from_client(filter, self.models)
        return super().native(filter)

    def match(self, path: str, value: str | int | bool) -> Any:
        """The value equals."""
        # A plain True would be taken for the integer 1; NumPy's boolean is not an integer.
        plain: Any = np.bool_(value) if isinstance(value, bool) else value
        return super().match(path, plain)

    def numbers(self, path: str, bounds: dict[str, float]) -> Any:
        """The number lies in a range."""
        return self.models.FieldCondition(path, range=self.models.RangeFloat(**bounds))

    def times(self, path: str, bounds: dict[str, dt.datetime]) -> Any:
        """The time lies in a range."""
        texts = {name: time.isoformat() for name, time in bounds.items()}
        return self.models.FieldCondition(path, range=self.models.RangeDateTime(**texts))

    def no_value(self, path: str) -> Any:
        """The field is absent, null or an empty list."""
        return self.models.IsEmptyCondition(path)

    def index(self, kind: str) -> Any:
        """The schema of a kind of payload index."""
        if kind == "tenant":
            return self.models.KeywordIndexParams(is_tenant=True)
        return getattr(self.models.PayloadSchemaType, kind.capitalize())


def json_path(key: Key) -> str:
    """The key as a JSON path of Qdrant: names with other than plain characters are quoted."""
    names = ((n if _PLAIN.fullmatch(n) else f'"{n}"', depth) for n, depth in key.parts)
    return ".".join(name + "[]" * depth for name, depth in names)


def to_qdrant(filter: Filter, dialect: Dialect) -> Any:
    """The filter object of the dialect that keeps what `filter.matches` keeps.

    An integer payload index holds integers only: once there is one, `{"year": 2000}` no longer
    finds a stored `2000.0`.
    """
    return dialect.group(must=[_condition(filter, dialect)])


def _condition(filter: Filter, dialect: Dialect) -> Any:
    if isinstance(filter, Equals):
        return _one_of(filter.key, (filter.value,), dialect)
    if isinstance(filter, OneOf):
        return _one_of(filter.key, filter.values, dialect)
    if isinstance(filter, Range):
        return _between(filter, dialect)
    if isinstance(filter, TimeRange):
        return dialect.times(json_path(filter.key), _bounds(filter))
    if isinstance(filter, Negation):
        return dialect.group(must_not=[_condition(filter.part, dialect)])
    if isinstance(filter, AllOf):
        return dialect.group(must=[_condition(part, dialect) for part in filter.parts])
    if isinstance(filter, AnyFilter):
        return _any([_condition(part, dialect) for part in filter.parts], dialect)
    raise TypeError(f"no translation of {type(filter).__name__} to Qdrant")


def _one_of(key: Key, values: Sequence[Any], dialect: Dialect) -> Any:
    path = json_path(key)
    texts = [value for value in values if isinstance(value, str)]
    integers = [v for v in values if isinstance(v, int) and not isinstance(v, bool)]
    conditions = []
    for group in (texts, integers):
        if len(group) == 1:
            conditions.append(dialect.match(path, group[0]))
        elif group:
            conditions.append(dialect.match_any(path, group))
    for value in values:
        if value is None:
            conditions.append(dialect.no_value(path))
        elif isinstance(value, bool):
            conditions.append(dialect.match(path, value))
        elif isinstance(value, float) or (isinstance(value, int) and abs(value) < EXACT_INTEGERS):
            # Qdrant's match tells 2000 from 2000.0, its range does not.
            conditions.append(_between(Range(key, gte=value, lte=value), dialect))
    return conditions[0] if len(conditions) == 1 else _any(conditions, dialect)


def _between(condition: Range, dialect: Dialect) -> Any:
    """Some number lies between bounds, which are compared exactly.

    The engine knows bounds as float64, and compares integers as such where they are indexed, as
    float64 where not. From 2^53 on many integers are one float64. So there the range begins behind
    the first float64 F that is in it, and what that leaves out is named: the integers around F, at
    most some 1,500 of 64 bits, and F itself.
    """
    path, bounds = json_path(condition.key), _bounds(condition)
    wide = {name: float(value) for name, value in bounds.items() if not _is_coarse(value)}
    near: set[int] = set()
    edges = set()
    for name in bounds.keys() - wide.keys():
        up = 1 if name in ("gt", "gte") else -1
        first = int(bounds[name]) + (up if name in ("gt", "lt") else 0)
        edge = float(first)
        if edge < first if up > 0 else edge > first:
            edge = math.nextafter(edge, up * math.inf)
        side, tighter = ("gt", max) if up > 0 else ("lt", min)
        wide[side] = tighter(wide.get(side, edge), edge)
        edges.add(edge)
        half = int(math.ulp(edge)) // 2  # no integer further away is rounded to the edge
        near |= {*range(first, int(edge), up), *range(int(edge) - half, int(edge) + half + 1)}
    if not edges:
        return dialect.numbers(path, wide)
    conditions = [dialect.numbers(path, wide)]
    integers = sorted(value for value in near if -(2**63) <= value < 2**63)
    inside = [value for value in integers if condition.holds(value)]
    outside = [value for value in integers if not condition.holds(value)]
    if inside:
        conditions.append(dialect.match_any(path, inside))
    for edge in filter(condition.holds, edges):
        itself = dialect.numbers(path, {"gte": edge, "lte": edge})
        others = [dialect.match_any(path, outside)] if outside else []
        conditions.append(dialect.group(must=[itself], must_not=others))
    return _any(conditions, dialect)


def _is_coarse(number: float) -> bool:
    """Whether some integer of 64 bits beside it is the same float64."""
    return EXACT_INTEGERS <= abs(number) <= 2**64


def _any(conditions: list[Any], dialect: Dialect) -> Any:
    if not conditions:
        # An empty `should` would keep everything.
        return dialect.group(must_not=[dialect.group()])
    return dialect.group(should=conditions)


def _bounds(filter: Range | TimeRange) -> dict[str, Any]:
    values = {name: getattr(filter, name) for name in _BOUNDS}
    return {name: value for name, value in values.items() if value is not None}
