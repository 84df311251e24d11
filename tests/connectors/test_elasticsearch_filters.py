"""Filters as queries on terms, evaluated on the terms of a payload, say what `matches` says.

The evaluation follows the definition of each query on one keyword field; that the engine keeps to
it is tested against a server's protocol.
"""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vdr_db.connectors.elasticsearch.filters import filter_query, payload_facts
from vdr_db.connectors.validation import clean_payload
from vdr_db.filters import parse_filter


def holds(query: dict, facts: set[str]) -> bool:
    ((kind, body),) = query.items()
    if kind == "match_all":
        return True
    if kind == "match_none":
        return False
    if kind == "term":
        return body["facts"] in facts
    if kind == "terms":
        return any(term in facts for term in body["facts"])
    if kind == "range":
        return any(in_range(fact.encode(), body["facts"]) for fact in facts)
    assert kind == "bool"
    assert set(body) <= {"filter", "should", "must_not", "minimum_should_match"}
    if "should" in body:
        assert body["minimum_should_match"] == 1
    return (
        all(holds(part, facts) for part in body.get("filter", []))
        and not any(holds(part, facts) for part in body.get("must_not", []))
        and ("should" not in body or any(holds(part, facts) for part in body["should"]))
    )


def in_range(fact: bytes, bounds: dict) -> bool:
    compare = {
        "gt": fact.__gt__,
        "gte": fact.__ge__,
        "lt": fact.__lt__,
        "lte": fact.__le__,
    }
    return all(compare[name](bound.encode()) for name, bound in bounds.items())


def agree(payload: dict, conditions: dict) -> bool:
    payload = clean_payload(payload)[0]
    tree = parse_filter(conditions)
    expected = tree.matches(payload)
    assert holds(filter_query(tree), set(payload_facts(payload))) == expected
    return expected


BIG = 2**53
NUMBERS = st.sampled_from(
    [0, 0.0, -0.0, 1, 1.0, -1, 1.5, -2.5, 1e300, -1e300, 5e-324, BIG, BIG + 1, -BIG - 1, 2**63 - 1]
)
TIMES = st.sampled_from(
    ["2024-05-01", "2024-05-01T12:00:00Z", "2024-05-01T12:00:00+02:00", "1969-12-31", "0001-01-02"]
)
TEXTS = st.sampled_from(["", "a", "b", "a.b", "true", "1", "\U0001f600", "￿", "a" * 600])
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TIMES, TEXTS)
NAMES = st.sampled_from(["a", "b", "c", "a.b", "not", 'x"y', " ", ""])
PAYLOADS = st.dictionaries(
    NAMES,
    st.recursive(
        SCALARS,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)
        ),
        max_leaves=6,
    ),
    max_size=4,
)
KEYS = st.sampled_from(
    ["a", "b", "c", "a.b", "a.c", '"a.b"', "a[]", "a[].b", "a[][]", "b[].a.c", '"not"', '" "', '""']
)
PLAIN_KEYS = KEYS.filter(lambda key: "[]" not in key)
BOUNDS = st.sampled_from(["gt", "gte", "lt", "lte"])
CONDITIONS = st.recursive(
    st.one_of(
        st.dictionaries(KEYS, SCALARS.filter(lambda x: x is not None), max_size=2),
        st.dictionaries(PLAIN_KEYS, SCALARS, max_size=2),
        st.dictionaries(PLAIN_KEYS, st.lists(SCALARS, max_size=3), max_size=1),
        st.dictionaries(KEYS, st.dictionaries(BOUNDS, NUMBERS, min_size=1), max_size=1),
        st.dictionaries(KEYS, st.dictionaries(BOUNDS, TIMES, min_size=1), max_size=1),
    ),
    lambda inner: st.one_of(
        st.fixed_dictionaries({"not": inner}),
        st.fixed_dictionaries({"any": st.lists(inner, max_size=3)}),
        st.fixed_dictionaries({"all": st.lists(inner, max_size=3)}),
    ),
    max_leaves=4,
)


@settings(max_examples=600)
@given(PAYLOADS, CONDITIONS)
@example({"a": 1}, {"a": {"gt": 1, "gte": 0}})
@example({"a": 1}, {"a": {"gt": 1, "gte": 1}})
@example({"a": [1, 9]}, {"a": {"gte": 2, "lte": 8}})
@example({"a": BIG + 1}, {"a": BIG})
@example({"a": float(BIG)}, {"a": BIG})
@example({"a": [[1]]}, {"a[]": 1})
def test_queries_say_what_filters_say(payload, conditions):
    agree(payload, conditions)


@pytest.mark.parametrize(
    ("payload", "conditions", "expected"),
    [
        ({"topic": "games"}, {"topic": "games"}, True),
        ({"n": 2000}, {"n": 2000.0}, True),
        ({"n": True}, {"n": 1}, False),
        ({"n": "1"}, {"n": 1}, False),
        ({"n": -0.0}, {"n": 0}, True),
        ({"n": 3}, {"n": {"gte": -1.5, "lt": 3}}, False),
        ({"n": -3}, {"n": {"lt": -2.5}}, True),
        ({"n": None}, {"n": None}, True),
        ({"n": []}, {"n": None}, True),
        ({"n": {}}, {"n": None}, False),
        ({}, {}, True),
        ({}, {"any": []}, False),
        ({"tags": ["a", "b"]}, {"tags": ["x", "b"]}, True),
        ({"tags": []}, {"tags": []}, False),
        ({"a.b": 1}, {"a.b": 1}, False),
        ({"a.b": 1}, {'"a.b"': 1}, True),
        ({"people": [{"name": "Ada"}]}, {"people[].name": "Ada"}, True),
        ({"people": [{"name": "Ada"}]}, {"people.name": "Ada"}, False),
        ({"day": "2024-05-01"}, {"day": {"gte": "2024-04-30", "lt": "2024-05-02"}}, True),
        ({"day": "1"}, {"day": {"gte": "0001-01-01"}}, False),
        ({"t": "x" * 5000}, {"t": "x" * 5000}, True),
        ({"t": "x" * 5000}, {"t": "x" * 5001}, False),
        ({"k" * 3000: 1}, {"k" * 3000: 1}, True),
    ],
)
def test_examples(payload, conditions, expected):
    assert agree(payload, conditions) is expected


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=2))
def test_numbers_sort_as_terms(pair):
    low, high = sorted(pair)
    (fact,) = [f for f in payload_facts({"n": low}) if "=n" in f]
    (other,) = [f for f in payload_facts({"n": high}) if "=n" in f]
    assert (fact == other) == (low == high)
    assert fact <= other


@given(st.datetimes(dt.datetime(1, 1, 2), dt.datetime(9998, 1, 1)), st.timedeltas(dt.timedelta(0)))
def test_times_sort_as_terms(time, step):
    try:
        later = time + step
    except OverflowError:
        later = dt.datetime(9999, 12, 31)
    facts = [
        next(f for f in payload_facts({"t": moment.isoformat()}) if "=t" in f)
        for moment in (time, later)
    ]
    assert facts == sorted(facts)


def test_terms_stay_below_the_limit_of_the_engine():
    payload = {"k" * 40_000: "v" * 40_000, "t": "\U0001f600" * 200}
    facts = payload_facts(payload)
    assert facts
    assert max(len(fact.encode()) for fact in facts) < 2_000
