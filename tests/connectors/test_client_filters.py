"""Filters of `qdrant_client` keep the same in the embedded engine as dictionaries do."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from store_samples import WIDTH, filters, payloads, rows

from vdr_db.connectors import QdrantStore
from vdr_db.connectors.qdrant.filters import Dialect
from vdr_db.errors import ConfigError

models = pytest.importorskip("qdrant_client").models

PAYLOADS = [
    {"tag": "chess", "n": 1, "on": True, "at": "2020-01-01T00:00:00Z", "many": [1, 2]},
    {"tag": "go", "n": 2, "on": False, "at": "2021-01-01T00:00:00Z", "many": [3]},
    {"tag": None, "n": 3.5, "parts": [{"a": 1, "b": 2}], "where": {"lon": 2.3, "lat": 48.9}},
    {"text": "kings and stones", "parts": [{"a": 1, "b": 3}, {"a": 2, "b": 2}]},
]


@pytest.fixture(scope="module")
def store():
    with QdrantStore("filters", path=":memory:") as store:
        store.create(WIDTH)
        store.upsert(rows(len(PAYLOADS)), list(range(len(PAYLOADS))), PAYLOADS)
        yield store


def field(key, **condition):
    return models.Filter(must=[models.FieldCondition(key=key, **condition)])


def nested():
    parts = [field("a", match=models.MatchValue(value=1)).must[0]]
    parts.append(field("b", match=models.MatchValue(value=2)).must[0])
    inner = models.Nested(key="parts", filter=models.Filter(must=parts))
    return models.Filter(must=[models.NestedCondition(nested=inner)])


PARIS = models.GeoPoint(lon=2.35, lat=48.86)
CONDITIONS = [
    (field("tag", match=models.MatchValue(value="chess")), {0}),
    (field("on", match=models.MatchValue(value=True)), {0}),
    (field("n", match=models.MatchAny(any=[1, 2])), {0, 1}),
    (field("tag", match=models.MatchExcept(**{"except": ["chess"]})), {1}),
    (field("text", match=models.MatchText(text="stones")), {3}),
    (field("n", range=models.Range(gte=2)), {1, 2}),
    (field("at", range=models.DatetimeRange(lt="2020-06-01T00:00:00Z")), {0}),
    (field("many", values_count=models.ValuesCount(gte=2)), {0}),
    (field("where", geo_radius=models.GeoRadius(center=PARIS, radius=20_000)), {2}),
    (models.Filter(must_not=[field("n", range=models.Range(gte=2))]), {0, 3}),
    (models.Filter(should=field("n", match=models.MatchValue(value=2)).must[0]), {1}),
    (models.Filter(must=[models.HasIdCondition(has_id=[1, 3])]), {1, 3}),
    (models.Filter(must=[models.IsNullCondition(is_null=models.PayloadField(key="tag"))]), {2}),
    (models.Filter(must=[models.IsEmptyCondition(is_empty=models.PayloadField(key="n"))]), {3}),
    (nested(), {2}),
    (
        models.Filter(
            min_should=models.MinShould(
                conditions=[
                    field("n", range=models.Range(lt=3)),
                    field("tag", match=models.MatchValue(value="go")),
                ],
                min_count=2,
            )
        ),
        {1},
    ),
    (models.Filter(), {0, 1, 2, 3}),
]


@pytest.mark.parametrize(("condition", "kept"), CONDITIONS)
def test_conditions_of_the_client(store, condition, kept):
    assert set(store.ids(condition)) == kept
    assert store.count(condition) == len(kept)
    hits = [hit.id for hit in store.search(rows(4)[0], 10)]
    assert [hit.id for hit in store.search(rows(4)[0], 10, condition)] == [
        id for id in hits if id in kept
    ]


@settings(max_examples=60)
@given(condition=filters, payload=payloads)
def test_what_a_dictionary_means_the_clients_filter_means(store, condition, payload):
    store.upsert(rows(1), [99], [payload])
    native = Dialect(models).native(condition)
    assert set(store.ids(native)) == set(store.ids(condition))


def test_what_the_engine_lacks_is_told(store):
    unknown = models.Filter(must=[models.SliceCondition(slice=models.Slice(index=0, total=2))])
    with pytest.raises(ConfigError, match="knows no condition 'slice' of qdrant_client"):
        store.count(unknown)
