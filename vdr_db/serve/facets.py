"""Facets: payload fields with few values, how often each occurs, and the filter of a choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vdr_db.errors import InputError

__all__ = [
    "Choice",
    "Facet",
    "FacetCounts",
    "both_filters",
    "count_values",
    "filter_of",
    "find_facets",
    "named_facets",
    "parse_choices",
    "values_of",
]

Value = str | int | bool

MOST_VALUES = 100
LONGEST_VALUE = 60
MOST_FACETS = 6
DEEPEST = 3
# What half of the documents lack, or where nearly each has a value of its own, helps nobody.
LEAST_COVERAGE, LEAST_PER_VALUE = 0.5, 3


@dataclass(frozen=True)
class Facet:
    """A payload field that results can be narrowed by.

    Attributes:
        key: As filters write it, such as `metadata.section`.
        path: Parts of the key.
        values: Text of a value -> the value, as far as seen.
    """

    key: str
    path: tuple[str, ...]
    values: Mapping[str, Value]

    @property
    def label(self) -> str:
        """Name for people."""
        return self.path[-1].replace("_", " ")

    def value(self, text: str) -> Value:
        """The value of a text: one that was seen, else the text itself."""
        return self.values.get(text, text)


@dataclass(frozen=True)
class Choice:
    """A value somebody wants to see only."""

    facet: Facet
    text: str


@dataclass(frozen=True)
class FacetCounts:
    """How often each value of a facet occurs among hits.

    Attributes:
        facet: The facet.
        counts: (text of the value, occurrences, whether it is chosen), most frequent first.
    """

    facet: Facet
    counts: Sequence[tuple[str, int, bool]]


def find_facets(payloads: Iterable[Mapping[str, Any]], *, without: Sequence[str]) -> list[Facet]:
    """Fields worth a facet, seen from a sample; fields at the top named by `without` are none."""
    seen: dict[tuple[str, ...], Counter[Value]] = {}
    covered: Counter[tuple[str, ...]] = Counter()
    total = 0
    for payload in payloads:
        total += 1
        kept = {name: value for name, value in payload.items() if name not in without}
        here = set()
        for path, value in _leaves(kept):
            seen.setdefault(path, Counter())[value] += 1
            here.add(path)
        covered.update(here)
    found = [
        _facet(path, counts)
        for path, counts in seen.items()
        if covered[path] >= LEAST_COVERAGE * total
        and 2 <= len(counts) <= MOST_VALUES
        and counts.total() >= LEAST_PER_VALUE * len(counts)
    ]
    # Few values first: they part a collection best.
    return sorted(found, key=lambda facet: (len(facet.values), facet.key))[:MOST_FACETS]


def named_facets(payloads: Iterable[Mapping[str, Any]], names: Sequence[str]) -> list[Facet]:
    """Facets somebody asked for, by key, whatever their values are."""
    wanted = {tuple(name.split(".")): Counter[Value]() for name in names}
    for payload in payloads:
        for path, value in _leaves(payload):
            if path in wanted:
                wanted[path][value] += 1
    return [_facet(path, counts) for path, counts in wanted.items()]


def parse_choices(given: Sequence[str], facets: Sequence[Facet]) -> list[Choice]:
    """Choices out of `KEY:VALUE` texts.

    Raises:
        InputError: The key is none of the facets.
    """
    choices = []
    for text in given:
        facet = next((facet for facet in facets if text.startswith(f"{facet.key}:")), None)
        if facet is None:
            raise InputError(
                f"a facet must be KEY:VALUE with a key of {[facet.key for facet in facets]}, got "
                f"{text[:LONGEST_VALUE]!r}."
            )
        choice = Choice(facet, text[len(facet.key) + 1 :])
        if choice not in choices:
            choices.append(choice)
    return choices


def filter_of(choices: Sequence[Choice], *, without: Facet | None = None) -> dict[str, Any] | None:
    """The filter of choices: any of the values of a facet, and all facets but `without`."""
    wanted: dict[str, Any] = {}
    for choice in choices:
        if without is None or choice.facet.key != without.key:
            wanted.setdefault(choice.facet.key, []).append(choice.facet.value(choice.text))
    return wanted or None


def both_filters(
    one: Mapping[str, Any] | None, other: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """The filter that keeps what both keep; None keeps everything."""
    return {"all": [one, other]} if one and other else one or other


def count_values(
    facet: Facet, payloads: Iterable[Mapping[str, Any]], choices: Sequence[Choice]
) -> FacetCounts:
    """How often each value occurs; chosen values come even when none does."""
    chosen = {choice.text for choice in choices if choice.facet.key == facet.key}
    counts: Counter[str] = Counter(dict.fromkeys(chosen, 0))
    for payload in payloads:
        # A value a document holds twice is still one document.
        counts.update(set(values_of(facet, payload)))
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return FacetCounts(facet, [(text, count, text in chosen) for text, count in ordered])


def values_of(facet: Facet, payload: Mapping[str, Any]) -> list[str]:
    """Texts of the values one document has."""
    return [_text(value) for path, value in _leaves(payload) if path == facet.path]


def _facet(path: tuple[str, ...], counts: Counter[Value]) -> Facet:
    key = ".".join(f'"{part}"' if _needs_quotes(part) else part for part in path)
    return Facet(key, path, {_text(value): value for value in counts})


def _needs_quotes(part: str) -> bool:
    return part in ("not", "any", "all") or any(letter in part for letter in ".[]")


def _leaves(
    payload: Mapping[str, Any], above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Value]]:
    for name, value in payload.items():
        # Keys that no filter can write, and empty ones, are left out.
        if not isinstance(name, str) or not name or '"' in name or "\\" in name:
            continue
        path = (*above, name)
        if isinstance(value, Mapping):
            if len(path) < DEEPEST:
                yield from _leaves(value, path)
            continue
        for item in value if isinstance(value, list) else [value]:
            is_short = isinstance(item, str) and 0 < len(item) <= LONGEST_VALUE
            if is_short or isinstance(item, (bool, int)):
                yield path, item


def _text(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
