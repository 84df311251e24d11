"""Payload filters as plain dictionaries, the same for every store.

| filter                                             | keeps documents whose payload …          |
|----------------------------------------------------|------------------------------------------|
| `{"topic": "games"}`                               | equals (string, number, boolean)         |
| `{"topic": None}`                                  | has no value there (absent, null, `[]`)  |
| `{"tags": ["a", "b"]}`                             | equals any of the values                 |
| `{"year": {"gte": 2000, "lt": 2010}}`              | lies in the range (`gt gte lt lte`)      |
| `{"date": {"gte": "2024-05-01"}}`                  | lies in the time range (ISO 8601, UTC)   |
| `{"author.name": "Ada"}`                           | equals, inside a nested object           |
| `{"authors[].name": "Ada"}`                        | equals, in any object of a list          |
| `{"topic": "games", "year": 2001}`                 | fulfils both                             |
| `{"not": {...}}`, `{"any": [{...}, ...]}`, `{"all": [{...}, ...]}` | not, at least one, all   |

A list in the payload matches when any of its elements does. Numbers are equal when their values are
(`2000` and `2000.0`); a boolean is not a number. Parts of a key may be quoted, which also reaches a
field named like an operator: `'"not"'`, `'"a.b"'` (a field with a dot in its name).

`parse_filter` gives a small tree: stores translate it, and must agree with `Filter.matches`.
"""

from __future__ import annotations

import datetime as dt
import math
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from vdr_db.errors import InputError

__all__ = [
    "EXACT_INTEGERS",
    "AllOf",
    "AnyFilter",
    "Conditions",
    "Equals",
    "Filter",
    "Key",
    "Negation",
    "OneOf",
    "Range",
    "TimeRange",
    "parse_filter",
    "parse_time",
]

Scalar = str | int | float | bool | None
_Bound = TypeVar("_Bound", float, dt.datetime)

# Above this, a float64 no longer tells neighbouring integers apart.
EXACT_INTEGERS = 2**53

_BOUNDS = ("gt", "gte", "lt", "lte")
# What other systems call an operator -> how it is written here.
_WRITTEN = {
    "in": "{{{key}: [value, ...]}}",
    "any": "{{{key}: [value, ...]}}",
    "eq": "{{{key}: value}}",
    "match": "{{{key}: value}}",
    "value": "{{{key}: value}}",
    "ne": "{{'not': {{{key}: value}}}}",
    "not": "{{'not': {{{key}: value}}}}",
    "nin": "{{'not': {{{key}: [value, ...]}}}}",
    "except": "{{'not': {{{key}: [value, ...]}}}}",
    "exists": "{{'not': {{{key}: None}}}}",
    "is_null": "{{{key}: None}}",
    "is_empty": "{{{key}: None}}",
    "range": "{{{key}: {{'gte': ..., 'lt': ...}}}}",
    "between": "{{{key}: {{'gte': ..., 'lte': ...}}}}",
}
_JOINED = {
    **dict.fromkeys(("or", "should"), "any"),
    **dict.fromkeys(("and", "must", "filter"), "all"),
    **dict.fromkeys(("nor", "must_not"), "not"),
}
_KEY_PART = re.compile(
    r'(?:"(?P<quoted>[^"\\]*)"|(?P<plain>[^".\\\[\]]+))(?P<each>(?:\[\])*)(?P<dot>\.|$)'
)
_TIME = re.compile(
    r"\s*(?P<year>\d{1,4})-(?P<month>\d{1,2})-(?P<day>\d{1,2})"
    r"(?:[Tt ]\s*(?P<hour>\d{1,2}):(?P<minute>\d{1,2})"
    r"(?::(?P<second>\d{1,2})(?:\.(?P<fraction>\d+))?"
    r"(?:\s*(?P<zone>[Zz]|UTC|[+-]\d{2}(?::?\d{2})?))?)?)?$"
)


@dataclass(frozen=True)
class Key:
    """Where in a payload a condition looks.

    Attributes:
        parts: (field name, number of `[]` behind it) from the outermost field inwards.
    """

    parts: tuple[tuple[str, int], ...]

    @classmethod
    def parse(cls, text: str) -> Key:
        """The key written as `a.b`, `a[].b` or `'"any name".b'`.

        Raises:
            InputError: The text is not such a key.
        """
        if not isinstance(text, str):
            raise InputError(f"filter keys must be strings, got {text!r}; name a payload field.")
        parts = []
        position, ended = 0, False
        while not ended:
            match = _KEY_PART.match(text, position)
            if match is None:
                raise InputError(
                    f"{text!r} is not a payload key; write `field`, `outer.inner`, `list[].inner`, "
                    "or quote a name with other characters: '\"my.field\"'."
                )
            name = match["plain"] if match["quoted"] is None else match["quoted"]
            parts.append((name, match["each"].count("[")))
            position, ended = match.end(), not match["dot"]
        return cls(tuple(parts))

    @property
    def quoted(self) -> str:
        """The key with every name quoted, equal for equal keys."""
        return ".".join(f'"{name}"' + "[]" * depth for name, depth in self.parts)

    @property
    def walks_lists(self) -> bool:
        """Whether a `[]` occurs."""
        return any(depth for _, depth in self.parts)

    def resolve(self, payload: Mapping[str, Any]) -> list[Any]:
        """The values found there: none when absent, several when a `[]` walks a list."""
        values: list[Any] = [payload]
        for name, depth in self.parts:
            values = [value[name] for value in values if _has(value, name)]
            for _ in range(depth):
                values = [item for value in values if isinstance(value, list) for item in value]
        return values


class Filter(ABC):
    """A condition on payloads."""

    def matches(self, payload: Mapping[str, Any]) -> bool:
        """Whether a document with this payload is kept."""
        return self._keeps(payload)

    @abstractmethod
    def _keeps(self, payload: Mapping[str, Any]) -> bool: ...


@dataclass(frozen=True)
class Equals(Filter):
    """The value at `key` equals `value`; `None` means there is no value."""

    key: Key
    value: Scalar

    def _keeps(self, payload: Mapping[str, Any]) -> bool:
        found = self.key.resolve(payload)
        if self.value is None:
            return all(value is None or value == [] for value in found)
        return any(_equal(item, self.value) for item in _elements(found))


@dataclass(frozen=True)
class OneOf(Filter):
    """The value at `key` equals one of `values`; an empty list keeps nothing."""

    key: Key
    values: tuple[Scalar, ...]

    def _keeps(self, payload: Mapping[str, Any]) -> bool:
        return any(Equals(self.key, value).matches(payload) for value in self.values)


@dataclass(frozen=True)
class _Interval(Filter, Generic[_Bound]):
    """Some value at `key` lies between bounds, which are left out or included."""

    key: Key
    gt: _Bound | None = None
    gte: _Bound | None = None
    lt: _Bound | None = None
    lte: _Bound | None = None

    @staticmethod
    @abstractmethod
    def _comparable(value: Any) -> _Bound | None:
        """The value as the bounds are, `None` for one of another kind."""

    def _keeps(self, payload: Mapping[str, Any]) -> bool:
        values = map(self._comparable, _elements(self.key.resolve(payload)))
        return any(self.holds(value) for value in values if value is not None)

    def holds(self, value: _Bound) -> bool:
        """Whether one value lies between the bounds."""
        return (
            (self.gt is None or value > self.gt)
            and (self.gte is None or value >= self.gte)
            and (self.lt is None or value < self.lt)
            and (self.lte is None or value <= self.lte)
        )


class Range(_Interval[float]):
    """The number at `key` lies in the range; integers are compared as such, never rounded."""

    @staticmethod
    def _comparable(value: Any) -> float | None:
        return value if _is_number(value) else None


class TimeRange(_Interval[dt.datetime]):
    """The ISO 8601 text at `key` lies in the range; times without a zone are UTC."""

    @staticmethod
    def _comparable(value: Any) -> dt.datetime | None:
        return parse_time(value) if isinstance(value, str) else None


@dataclass(frozen=True)
class AllOf(Filter):
    """Every part matches; without parts, everything does."""

    parts: tuple[Filter, ...]

    def _keeps(self, payload: Mapping[str, Any]) -> bool:
        return all(part.matches(payload) for part in self.parts)


@dataclass(frozen=True)
class AnyFilter(Filter):
    """At least one part matches; without parts, nothing does."""

    parts: tuple[Filter, ...]

    def _keeps(self, payload: Mapping[str, Any]) -> bool:
        return any(part.matches(payload) for part in self.parts)


@dataclass(frozen=True)
class Negation(Filter):
    """The part does not match."""

    part: Filter

    def _keeps(self, payload: Mapping[str, Any]) -> bool:
        return not self.part.matches(payload)


Conditions: TypeAlias = Filter | Mapping[str, Any]
"""What callers pass as a filter: a tree, or a dictionary as in the table above."""


def parse_filter(conditions: Conditions) -> Filter:
    """The tree of a filter dictionary; see the table at the top of this module. A tree stays one.

    Raises:
        InputError: A key, an operator or a value is not understood; the message names it.
    """
    if isinstance(conditions, Filter):
        return conditions
    if not isinstance(conditions, Mapping):
        raise InputError(
            f"a filter must be a dictionary such as {{'topic': 'games'}}, got {conditions!r}."
        )
    parts: list[Filter] = []
    for key, value in conditions.items():
        if key == "not":
            parts.append(Negation(_operand(key, value)))
        elif key in ("any", "all"):
            operands = tuple(_operand(key, item) for item in _operand_list(key, value))
            parts.append(AnyFilter(operands) if key == "any" else AllOf(operands))
        else:
            _refuse_foreign(key, value)
            parts.append(_condition(Key.parse(key), key, value))
    return parts[0] if len(parts) == 1 else AllOf(tuple(parts))


def _refuse_foreign(key: Any, value: Any) -> None:
    """Names our word for a way to join conditions that other systems call otherwise."""
    ours = _JOINED.get(str(key).lstrip("$"))
    parts = value if isinstance(value, (list, tuple)) else [value]
    if ours is not None and parts and all(isinstance(part, Mapping) for part in parts):
        form = "{'not': {...}}" if ours == "not" else f"{{'{ours}': [{{...}}, {{...}}]}}"
        raise InputError(
            f"conditions are joined by 'not', 'any' and 'all', got {key!r}; write {form}, or quote "
            f"the name to reach a payload field called so: '\"{key}\"'."
        )


def _operand(operator: str, value: Any) -> Filter:
    if not isinstance(value, Mapping):
        raise InputError(
            f"`{operator}` takes filter dictionaries, got {value!r}; "
            f"quote the name to reach a payload field called so: '\"{operator}\"'."
        )
    return parse_filter(value)


def _operand_list(operator: str, value: Any) -> Sequence[Any]:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
        raise InputError(f"`{operator}` takes a list of filter dictionaries, got {value!r}.")
    return value


def _condition(key: Key, name: str, value: Any) -> Filter:
    if isinstance(value, Mapping):
        return _range(key, name, value)
    if isinstance(value, (list, tuple, set, frozenset)):
        return OneOf(key, tuple(_scalar(key, name, item) for item in value))
    return Equals(key, _scalar(key, name, value))


def _scalar(key: Key, name: str, value: Any) -> Scalar:
    value = _plain(value)
    if value is None and key.walks_lists:
        raise InputError(
            f"`None` (no value) cannot be asked of {name!r}, which walks a list; "
            "ask it of the list itself, without `[]`."
        )
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise InputError(
                f"integers in filters must fit in 64 signed bits, got {value} for {name!r}."
            )
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    hint = "; write dates as a range, {'gte': ..., 'lt': ...}" if isinstance(value, dt.date) else ""
    raise InputError(
        "a payload field is compared with a string, a finite number, a boolean, None or a list of "
        f"these, got {value!r} for {name!r}{hint}."
    )


def _range(key: Key, name: str, bounds: Mapping[str, Any]) -> Filter:
    unknown = sorted(set(bounds) - set(_BOUNDS), key=str)
    if unknown or not bounds:
        form = _WRITTEN.get(str(unknown[0]).lstrip("$")) if unknown else None
        if unknown and str(unknown[0]).lstrip("$") in _BOUNDS:
            form = "{{{key}: {{'" + str(unknown[0]).lstrip("$") + "': ...}}}}"
        inner = unknown[0] if unknown else "inner"
        hint = f"to look inside a nested object write the key {f'{name}.{inner}'!r}"
        if form is not None:
            hint = f"write {form.format(key=repr(name))}"
        raise InputError(
            f"a range takes {', '.join(_BOUNDS)}, got {unknown or 'nothing'} for {name!r}; {hint}."
        )
    values = {bound: _plain(value) for bound, value in bounds.items()}
    if all(_is_number(v) and abs(v) <= sys.float_info.max for v in values.values()):
        return Range(key, **values)
    times = {bound: _time_bound(value) for bound, value in values.items()}
    if all(time is not None for time in times.values()):
        return TimeRange(key, **times)
    raise InputError(
        "the bounds of a range must be all finite numbers or all ISO 8601 times, "
        f"got {dict(bounds)!r} for {name!r}."
    )


def _time_bound(value: Any) -> dt.datetime | None:
    if isinstance(value, dt.datetime):
        return value.astimezone(dt.timezone.utc) if value.tzinfo else _utc(value)
    if isinstance(value, dt.date):
        return dt.datetime(value.year, value.month, value.day, tzinfo=dt.timezone.utc)
    return parse_time(value) if isinstance(value, str) else None


def parse_time(text: str) -> dt.datetime | None:
    """The time a text tells, in UTC, as the engines read it; `None` when it is not a time."""
    match = _TIME.match(text)
    if match is None:
        return None
    year, month, day, hour, minute, second = (
        int(match[name] or 0) for name in ("year", "month", "day", "hour", "minute", "second")
    )
    microsecond = int((match["fraction"] or "0")[:6].ljust(6, "0"))
    zone = match["zone"] or "Z"
    minutes = 0
    if zone[0] in "+-":
        minutes = int(zone[1:3]) * 60 + int(zone[3:].removeprefix(":") or 0)
    try:
        time = dt.datetime(year, month, day, hour, minute, second, microsecond)
        time -= dt.timedelta(minutes=-minutes if zone[0] == "-" else minutes)
    except (ValueError, OverflowError):
        return None
    return _utc(time)


def _utc(time: dt.datetime) -> dt.datetime:
    return time.replace(tzinfo=dt.timezone.utc)


def _plain(value: Any) -> Any:
    """A number of NumPy as one of Python."""
    return value.item() if hasattr(value, "item") and hasattr(value, "dtype") else value


def _has(value: Any, name: str) -> bool:
    return isinstance(value, Mapping) and name in value


def _elements(values: list[Any]) -> list[Any]:
    return [x for value in values for x in (value if isinstance(value, list) else [value])]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _equal(found: Any, wanted: Scalar) -> bool:
    if isinstance(wanted, bool) or isinstance(found, bool):
        return found is wanted
    if isinstance(wanted, str) or not _is_number(found):
        return isinstance(found, str) and found == wanted
    if isinstance(wanted, int) and abs(wanted) >= EXACT_INTEGERS:
        return isinstance(found, int) and found == wanted
    return bool(found == wanted)
