"""The filter language: what it keeps, and what it refuses to guess."""

from __future__ import annotations

import ast
import datetime as dt
import operator
import re
from pathlib import Path

import numpy as np
import pytest
import services
from search_servers import note_real_server, remove_indices

from vdr_db.connectors import ElasticsearchStore, QdrantStore
from vdr_db.errors import InputError
from vdr_db.filters import AllOf, Equals, Key, Range, parse_filter
from vdr_db.sparse import SparseRows

UTC = dt.timezone.utc
ROW = SparseRows.from_dicts([{1: 1.0}], 10)
NANOSECONDS = 1768907445451174112


CASES = pytest.mark.parametrize(
    ("condition", "payload", "kept"),
    [
        ({"a": "x"}, {"a": "x"}, True),
        ({"a": "x"}, {"a": ["y", "x"]}, True),
        ({"a": "x"}, {"a": [["x"]]}, False),
        ({"a": "x"}, {}, False),
        ({"a": 1}, {"a": 1.0}, True),
        ({"a": 1.0}, {"a": 1}, True),
        ({"a": 1}, {"a": True}, False),
        ({"a": True}, {"a": 1}, False),
        ({"a": True}, {"a": True}, True),
        ({"a": "1"}, {"a": 1}, False),
        ({"a": 2**53 + 1}, {"a": 2**53}, False),
        ({"a": 2**53 + 1}, {"a": 2**53 + 1}, True),
        ({"a": 2**53}, {"a": float(2**53)}, False),
        ({"a": {"gte": NANOSECONDS + 1}}, {"a": NANOSECONDS}, False),
        ({"a": {"gte": NANOSECONDS + 1}}, {"a": NANOSECONDS + 1}, True),
        ({"a": {"gt": NANOSECONDS + 1}}, {"a": NANOSECONDS + 2}, True),
        ({"a": {"lte": NANOSECONDS + 1}}, {"a": NANOSECONDS + 2}, False),
        ({"a": {"lt": -NANOSECONDS}}, {"a": -NANOSECONDS - 1}, True),
        ({"a": {"gte": 1e18, "lt": 10**18 + 1}}, {"a": 10**18}, True),
        ({"a": {"gt": 1e18, "lt": 10**18 + 1}}, {"a": [10**18, 10**18 + 1]}, False),
        ({"a": 1e18}, {"a": 10**18 + 1}, False),
        ({"a": {"lt": 10**30}}, {"a": 2**63 - 1}, True),
        ({"a": None}, {}, True),
        ({"a": None}, {"a": None}, True),
        ({"a": None}, {"a": []}, True),
        ({"a": None}, {"a": [None]}, False),
        ({"a": None}, {"a": 0}, False),
        ({"a": ["x", 1, None]}, {}, True),
        ({"a": ["x", 1]}, {"a": 1.0}, True),
        ({"a": []}, {"a": []}, False),
        ({"a": ("x",)}, {"a": "x"}, True),
        ({"a": {"gte": 1, "lt": 3}}, {"a": 1}, True),
        ({"a": {"gte": 1, "lt": 3}}, {"a": 3}, False),
        ({"a": {"gt": 1, "lt": 3}}, {"a": [0, 5]}, False),
        ({"a": {"gte": 0}}, {"a": True}, False),
        ({"a": {"gte": 0}}, {"a": "5"}, False),
        ({"a.b": 1}, {"a": {"b": 1}}, True),
        ({"a.b": 1}, {"a": [{"b": 1}]}, False),
        ({"a[].b": 1}, {"a": [{"b": 2}, {"b": 1}]}, True),
        ({"a[].b": 1}, {"a": {"b": 1}}, False),
        ({"a.b": 1}, {"a.b": 1}, False),
        ({'"a.b"': 1}, {"a.b": 1}, True),
        ({'"not"': 1}, {"not": 1}, True),
        ({"größe": 1}, {"größe": 1}, True),
        ({"not": {"a": "x"}}, {"a": "y"}, True),
        ({"any": [{"a": 1}, {"b": 2}]}, {"b": 2}, True),
        ({"any": []}, {}, False),
        ({"all": [{"a": 1}, {"a": 2}]}, {"a": [1, 2]}, True),
        ({"all": []}, {}, True),
        ({}, {}, True),
        ({"a": 1, "b": 2}, {"a": 1}, False),
        ({"a": np.int64(3)}, {"a": 3}, True),
        ({"a": {"gte": np.float32(0.5)}}, {"a": 0.5}, True),
        ({"d": {"gte": "2020-01-01"}}, {"d": "2020-01-01T00:00:00Z"}, True),
        ({"d": {"gt": "2020-01-01"}}, {"d": "2020-01-01T01:00:00+02:00"}, False),
        ({"d": {"lt": "2020-01-01T00:00:00.000001Z"}}, {"d": "2020-01-01"}, True),
        ({"d": {"gte": dt.date(2020, 1, 1)}}, {"d": "2020-01-01 00:00"}, True),
        ({"d": {"gte": dt.datetime(2020, 1, 1)}}, {"d": "2019-12-31T23:59:59-01:00"}, True),
        ({"d": {"gte": dt.datetime(2020, 1, 1, tzinfo=UTC)}}, {"d": "soon"}, False),
        ({"d": {"gte": "2020-01-01"}}, {"d": "2020-02-30"}, False),
        ({"d": {"gte": "2020-01-01"}}, {"d": 2021}, False),
    ],
    ids=str,
)


@CASES
def test_what_is_kept(condition, payload, kept):
    assert parse_filter(condition).matches(payload) is kept


@pytest.mark.parametrize("indexes", [{}, {"t": "integer"}], ids=["no index", "index"])
def test_large_integers_are_never_rounded(tmp_path, indexes):
    values = [base + step for base in (2**53, NANOSECONDS, -NANOSECONDS) for step in range(-2, 4)]
    rows = SparseRows.from_dicts([{1: 1.0}] * len(values), 10)
    with QdrantStore("times", path=tmp_path / "times", payload_indexes=indexes) as store:
        store.create(10)
        store.upsert(rows, list(range(len(values))), [{"t": value} for value in values])
        for bound in (*values, float(2**53), 1e18):
            for name in ("gt", "gte", "lt", "lte"):
                condition = {"t": {name: bound}}
                holds = getattr(operator, {"gte": "ge", "lte": "le"}.get(name, name))
                expected = {i for i, value in enumerate(values) if holds(value, bound)}
                assert set(store.ids(condition)) == expected, condition


@pytest.fixture(scope="module")
def kept_store(opensearch_server):
    """One store for all cases: making an index takes longer than a case."""
    name = services.unique_name()
    with ElasticsearchStore(name, replicas=0, **opensearch_server.options()) as store:
        store.create(10)
        yield store
        remove_indices(store)


@CASES
def test_a_real_server_keeps_the_same(
    kept_store, opensearch_server, request, condition, payload, kept
):
    note_real_server(request, opensearch_server.name)
    kept_store.upsert(SparseRows.from_dicts([{1: 1.0}], 10), ["one"], [payload])
    assert kept_store.count(condition) == kept
    assert [hit.id for hit in kept_store.search(ROW, filter=condition)] == ["one"] * kept


@pytest.mark.parametrize(
    ("condition", "told"),
    [
        ("a", "a filter must be a dictionary"),
        ([{"a": 1}], "a filter must be a dictionary"),
        ({1: 2}, "filter keys must be strings"),
        ({"": 1}, "not a payload key"),
        ({"a..b": 1}, "not a payload key"),
        ({"a.": 1}, "not a payload key"),
        ({"a[0]": 1}, "not a payload key"),
        ({'a"b': 1}, "not a payload key"),
        ({"a\\b": 1}, "not a payload key"),
        ({'"a\\"': 1}, "not a payload key"),
        ({"a": float("nan")}, "finite number"),
        ({"a": 2**63}, "64 signed bits"),
        ({"a": b"x"}, "compared with a string"),
        ({"a": [["x"]]}, "compared with a string"),
        ({"a": dt.date(2020, 1, 1)}, "write dates as a range"),
        ({"a[].b": None}, "walks a list"),
        ({"a": {}}, "got nothing"),
        ({"a": {"b": 1}}, "write the key 'a.b'"),
        ({"a": {"gte": 1, "from": 2}}, r"got \['from'\]"),
        ({"a": {"gte": "soon"}}, "ISO 8601"),
        ({"a": {"gte": 1, "lt": "2020-01-01"}}, "ISO 8601"),
        ({"a": {"gte": float("inf")}}, "finite numbers"),
        ({"a": {"gte": True}}, "finite numbers"),
        ({"not": [{"a": 1}]}, "quote the name"),
        ({"any": {"a": 1}}, "takes a list"),
        ({"any": ["x"]}, "takes filter dictionaries"),
    ],
    ids=str,
)
def test_what_is_refused(condition, told):
    with pytest.raises(InputError, match=told):
        parse_filter(condition)


def test_the_tree():
    assert parse_filter({"a.b": "x"}) == Equals(Key((("a", 0), ("b", 0))), "x")
    assert parse_filter({"a": {"lt": 2}, "b": 1}) == AllOf(
        (Range(Key.parse("a"), lt=2.0), Equals(Key.parse("b"), 1))
    )
    assert Key.parse('"a b"[].c').quoted == '"a b"[]."c"'


@pytest.mark.parametrize(
    ("foreign", "form"),
    [
        ({"year": {"in": [1, 2]}}, "write {'year': [value, ...]}"),
        ({"year": {"$in": [1, 2]}}, "write {'year': [value, ...]}"),
        ({"year": {"ne": 1}}, "write {'not': {'year': value}}"),
        ({"year": {"$gt": 1}}, "write {'year': {'gt': ...}}"),
        ({"year": {"exists": True}}, "write {'not': {'year': None}}"),
        ({"year": {"inner": 1}}, "write the key 'year.inner'"),
        ({"or": [{"a": 1}, {"b": 2}]}, "write {'any': [{...}, {...}]}"),
        ({"$and": [{"a": 1}]}, "write {'all': [{...}, {...}]}"),
        ({"must_not": {"a": 1}}, "write {'not': {...}}"),
        ({"any": {"a": 1}}, "`any` takes a list of filter dictionaries"),
    ],
)
def test_words_of_other_systems_are_answered_with_ours(foreign, form):
    with pytest.raises(InputError) as caught:
        parse_filter(foreign)
    assert form in str(caught.value)


def test_a_field_may_be_called_like_a_foreign_word():
    assert parse_filter({"or": "x"}).matches({"or": "x"})
    assert parse_filter({'"or"': [1, 2]}).matches({"or": 2})


def rows_of_the_page(heading):
    """Code in the first and the last column of a table of docs/filters.md."""
    page = (Path(__file__).parents[2] / "docs" / "filters.md").read_text(encoding="utf-8")
    table = page.split(f"## {heading}")[1].split("## ")[0]
    for line in table.splitlines():
        if line.startswith("| `"):
            first, *_, last = line.strip("| ").split(" | ")
            yield re.findall("`([^`]*)`", first), re.findall("`([^`]*)`", last)


def test_the_page_tells_the_truth():
    operators = [ast.literal_eval(one[0]) for one, _ in rows_of_the_page("Operators")]
    assert len(operators) == 11
    for condition in operators:
        parse_filter(condition)
    refused = list(rows_of_the_page("What is refused"))
    assert len(refused) == 11
    for given, (right,) in refused:
        parse_filter(ast.literal_eval(right))
        for one in given:
            if one.startswith("{"):
                with pytest.raises(InputError, match="write "):
                    parse_filter(ast.literal_eval(one))
            else:
                with pytest.raises(InputError, match="write "):
                    parse_filter({one: [{"a": 1}]})
