"""Filters made of the classes of `qdrant_client`, for the embedded engine."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vdr_db.errors import ConfigError

__all__ = ["from_client", "is_of_client"]


def is_of_client(filter: object) -> bool:
    """Whether it is a `qdrant_client.models.Filter`, without importing that package."""
    kind = type(filter)
    return kind.__name__ == "Filter" and kind.__module__.startswith("qdrant_client.http.")


def from_client(filter: Any, edge: Any) -> Any:
    """The filter of `qdrant_edge` that keeps what one of `qdrant_client` keeps.

    Raises:
        ConfigError: The embedded engine has no such condition.
    """
    return _Reader(edge).filter(filter.model_dump(mode="json", exclude_none=True))


class _Reader:
    """Reads the JSON of the client's models into the engine's classes."""

    def __init__(self, edge: Any) -> None:
        self._edge = edge
        self._matches: Mapping[str, Callable[[Any], Any]] = {
            # The engine takes a plain True for the integer 1; NumPy's boolean is not an integer.
            "value": lambda one: edge.MatchValue(np.bool_(one) if isinstance(one, bool) else one),
            "any": edge.MatchAny,
            "except": edge.MatchExcept,
            "except_": edge.MatchExcept,
            "text": edge.MatchText,
            "text_any": edge.MatchTextAny,
            "phrase": edge.MatchPhrase,
            "prefix": edge.MatchPrefix,
            "substring": edge.MatchSubstring,
        }
        self._conditions: Mapping[str, Callable[[Any], Any]] = {
            "is_empty": lambda one: edge.IsEmptyCondition(one["key"]),
            "is_null": lambda one: edge.IsNullCondition(one["key"]),
            "has_id": lambda ids: edge.HasIdCondition(set(map(_point, ids))),
            "has_vector": edge.HasVectorCondition,
            "nested": lambda one: edge.NestedCondition(one["key"], self.filter(one["filter"])),
        }
        self._parts: Mapping[str, Callable[[Any], Any]] = {
            "match": lambda one: _only(one, self._matches),
            "range": self._range,
            "geo_bounding_box": lambda one: edge.GeoBoundingBox(
                edge.GeoPoint(**one["top_left"]), edge.GeoPoint(**one["bottom_right"])
            ),
            "geo_radius": lambda one: edge.GeoRadius(edge.GeoPoint(**one["center"]), one["radius"]),
            "geo_polygon": lambda one: edge.GeoPolygon(
                self._ring(one["exterior"]), list(map(self._ring, one.get("interiors") or ()))
            ),
            "values_count": lambda one: edge.ValuesCount(**one),
            "is_empty": bool,
            "is_null": bool,
        }

    def filter(self, given: Mapping[str, Any]) -> Any:
        """Conditions joined."""
        joined: dict[str, Any] = {}
        for name in ("must", "should", "must_not"):
            if given.get(name) is not None:
                several = given[name] if isinstance(given[name], list) else [given[name]]
                joined[name] = list(map(self._condition, several))
        if "min_should" in given:
            conditions = list(map(self._condition, given["min_should"]["conditions"]))
            joined["min_should"] = self._edge.MinShould(
                conditions, given["min_should"]["min_count"]
            )
        return self._edge.Filter(**joined)

    def _condition(self, given: Mapping[str, Any]) -> Any:
        if "key" in given:
            parts = {n: _known(n, self._parts)(one) for n, one in given.items() if n != "key"}
            return self._edge.FieldCondition(given["key"], **parts)
        if not given or given.keys() & {"must", "should", "must_not", "min_should"}:
            return self.filter(given)
        return _only(given, self._conditions)

    def _range(self, given: Mapping[str, Any]) -> Any:
        kind = self._edge.RangeFloat
        if any(isinstance(bound, str) for bound in given.values()):
            kind = self._edge.RangeDateTime
        return kind(**given)

    def _ring(self, given: Mapping[str, Any]) -> Any:
        return [self._edge.GeoPoint(**point) for point in given["points"]]


def _only(given: Mapping[str, Any], known: Mapping[str, Callable[[Any], Any]]) -> Any:
    ((name, value),) = given.items()
    return _known(name, known)(value)


def _known(name: str, known: Mapping[str, Callable[[Any], Any]]) -> Callable[[Any], Any]:
    if name not in known:
        raise ConfigError(
            f"the embedded Qdrant knows no condition {name!r} of qdrant_client; write the filter "
            "as a dictionary, see vdr_db.filters."
        )
    return known[name]


def _point(given: int | str) -> int | uuid.UUID:
    return given if isinstance(given, int) else uuid.UUID(given)
