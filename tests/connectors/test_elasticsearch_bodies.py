"""The requests we send, word for word. That a server takes them is tested elsewhere."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sparse_samples import truncated, zipf_rows

from vdr_db import SparseRows
from vdr_db.connectors.elasticsearch.bodies import (
    bulk_lines,
    delete_lines,
    document_id,
    feature_objects,
    id_of,
    index_mapping,
    index_settings,
    query_scale,
    read_features,
    row_query,
    search_body,
    sort_key,
    text_query,
    truncate_weights,
)
from vdr_db.connectors.ids import id_order
from vdr_db.errors import ConfigError, InputError

IDS = st.one_of(
    st.integers(0, 2**64 - 1),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40),
    st.from_regex(r"(text:|sha256:|0|1|-)*[0-9]*", fullmatch=True).filter(bool),
)


def rows(*dicts, width=1000):
    return SparseRows.from_dicts(list(dicts), width)


def lines(batch, ids, payloads=None, action="index", field="vdr"):
    payloads = payloads or [{} for _ in ids]
    return bulk_lines(batch, ids, payloads, action=action, field=field)


def test_a_document_word_for_word():
    batch = rows({7: 0.1, 999: 2.5})
    assert lines(batch, ["a"], [{"topic": "games", "year": 2001}]) == [
        b'{"index":{"_id":"a"}}\n'
        b'{"order":"1a","facts":["\\"topic\\"=sgames","\\"topic\\"?",'
        b'"\\"year\\"=nc09f440000000000","\\"year\\"?"],'
        b'"payload":{"topic":"games","year":2001},"vdr":{"7":0.1,"999":2.5}}\n'
    ]


def test_a_row_without_entries_has_no_vector_field():
    batch = rows({}, {3: 1.0}, {})
    assert lines(batch, [0, 1, 2], action="create", field="other") == [
        b'{"create":{"_id":"0"}}\n{"order":"000000000000000000000"}\n',
        b'{"create":{"_id":"1"}}\n{"order":"000000000000000000001","other":{"3":1.0}}\n',
        b'{"create":{"_id":"2"}}\n{"order":"000000000000000000002"}\n',
    ]
    assert lines(SparseRows.empty(0, 10), []) == []
    assert feature_objects(SparseRows.empty(2, 10)) == [b"{}", b"{}"]


def test_deletions_word_for_word():
    assert delete_lines([5, "5"]) == [
        b'{"delete":{"_id":"5"}}\n',
        b'{"delete":{"_id":"text:5"}}\n',
    ]


@given(st.lists(st.floats(2.0**-99, 2.0**127, width=32), min_size=1, max_size=50))
def test_weights_come_back_bit_for_bit_from_the_shortest_digits(weights):
    batch = SparseRows([0, len(weights)], np.arange(len(weights)), np.array(weights), 1000)
    text = feature_objects(batch)[0]
    assert SparseRows.from_dicts([read_features({"f": json.loads(text)}, "f", 1)], 1000) == batch
    digits = [number.split(b":")[1] for number in text.strip(b"{}").split(b",")]
    assert all(len(number.replace(b".", b"")) <= 9 + 39 for number in digits)


def test_weights_are_short():
    text = feature_objects(zipf_rows(1, 256, 30522, seed=1))[0]
    assert len(text) < 256 * 20


# Ids


@given(IDS)
def test_ids_come_back_with_their_type(id):
    assert id_of(sort_key(id)) == id
    assert type(id_of(sort_key(id))) is type(id)


@given(st.lists(IDS, unique_by=lambda id: (type(id), id), min_size=2, max_size=20))
def test_different_ids_get_different_document_ids_in_order(ids):
    names = [document_id(id) for id in ids]
    assert len(set(names)) == len(ids)
    assert all(0 < len(name.encode()) <= 512 for name in names)
    by_key = sorted(ids, key=lambda id: sort_key(id).encode())
    assert by_key == sorted(ids, key=id_order)


@pytest.mark.parametrize(
    ("id", "name"),
    [
        (1, "1"),
        ("1", "text:1"),
        ("01", "01"),
        ("-1", "-1"),
        ("1\n", "1\n"),
        ("text:1", "text:text:1"),
        ("sha256:x", "text:sha256:x"),
        ("a.b/c d", "a.b/c d"),
        ("é" * 256, "é" * 256),
    ],
)
def test_document_ids_stay_readable(id, name):
    assert document_id(id) == name


def test_an_ambiguous_id_of_full_length_becomes_a_digest():
    longest = "9" * 512
    name = document_id(longest)
    assert name.startswith("sha256:")
    assert name != document_id("9" * 511)
    assert document_id(name) == f"text:{name}"
    assert id_of(sort_key(longest)) == longest


# Arithmetic


@given(st.floats(1.1754943508222875e-38, 3.4028234663852886e38, width=32))
def test_truncation_keeps_nine_bits_and_never_rounds_up(weight):
    cut = float(truncate_weights(np.float32([weight]))[0])
    mantissa, exponent = np.frexp(np.float64(weight))
    assert cut == np.ldexp(np.floor(mantissa * 512) / 512, exponent)
    assert 0 <= (weight - cut) / weight < 2**-8


def test_truncation_agrees_with_the_slow_oracle():
    batch = zipf_rows(20, 50, 500, seed=3)
    assert np.array_equal(truncate_weights(batch.values), truncated(batch).values)


def test_a_query_word_for_word():
    ids, weights = rows({3: 0.1, 40: 2.0}).row(0)
    assert row_query(ids, weights, field="vdr", kind="rank_features") == {
        "bool": {
            "should": [
                {"rank_feature": {"field": "vdr.3", "boost": 0.1, "linear": {}}},
                {"rank_feature": {"field": "vdr.40", "boost": 2.0, "linear": {}}},
            ],
            "minimum_should_match": 1,
        }
    }
    assert row_query(ids, weights, field="vdr", kind="sparse_vector") == {
        "sparse_vector": {"field": "vdr", "query_vector": {"3": 0.1, "40": 2.0}, "prune": False}
    }


def test_a_search_word_for_word():
    assert search_body({"q": 1}, limit=3, offset=2, filter={"f": 1}) == {
        "query": {"bool": {"must": [{"q": 1}], "filter": [{"f": 1}]}},
        "from": 2,
        "size": 3,
        "sort": [{"_score": "desc"}, {"order": "asc"}],
        "_source": ["payload"],
        "track_total_hits": False,
    }
    assert search_body({"q": 1}, limit=3)["query"] == {"q": 1}
    match = {"match": {"payload.body": {"query": "two words", "boost": 0.5}}}
    assert text_query("two words", "body", boost=0.5) == match


@given(st.lists(st.floats(2.0**-99, 2.0**127, width=32), max_size=8))
def test_query_weights_above_64_are_scaled_without_loss(weights):
    weights = np.array(weights, np.float32)
    scale = query_scale(weights)
    assert np.log2(scale) == round(np.log2(scale))
    assert (weights * np.float32(scale)).max(initial=0) <= 64
    if weights.max(initial=0) <= 64:
        assert scale == 1
    else:
        assert weights.max() * scale > 32


# Mapping


def test_the_mapping_word_for_word():
    assert index_mapping({"m": 1}, field="vdr", kind="rank_features", version=(8, 11)) == {
        "_meta": {"m": 1},
        "dynamic": "strict",
        "properties": {
            "order": {"type": "keyword", "index": False},
            "facts": {"type": "keyword", "doc_values": False},
            "payload": {"type": "object", "enabled": False},
            "vdr": {"type": "rank_features"},
        },
    }


def test_named_payload_fields_are_indexed_by_themselves():
    mapping = index_mapping(
        {},
        field="vdr",
        kind="rank_features",
        version=(8, 11),
        store_vectors=False,
        text_fields={"body": None, "author.bio": None},
        payload_types={"year": "long", "author.name": {"type": "keyword", "ignore_above": 9}},
    )
    text = {"type": "text", "fields": {"keyword": {"type": "keyword", "ignore_above": 8191}}}
    assert mapping["properties"]["payload"] == {
        "type": "object",
        "dynamic": False,
        "properties": {
            "body": text,
            "year": {"type": "long"},
            "author": {"properties": {"bio": text, "name": {"type": "keyword", "ignore_above": 9}}},
        },
    }
    assert mapping["_source"] == {"excludes": ["vdr"]}


@pytest.mark.parametrize(
    ("version", "options"),
    [
        ((8, 15), {}),
        ((8, 18), {}),
        ((9, 0), {}),
        ((8, 19), {"index_options": {"prune": False}}),
        ((9, 1), {"index_options": {"prune": False}}),
    ],
)
def test_pruning_is_switched_off_in_the_mapping_where_that_is_known(version, options):
    mapping = index_mapping({}, field="v", kind="sparse_vector", version=version)
    assert mapping["properties"]["v"] == {"type": "sparse_vector", **options}


def test_impossible_mappings_are_refused():
    with pytest.raises(ConfigError, match=r"needs Elasticsearch 8\.15 .* the server is 8\.14"):
        index_mapping({}, field="v", kind="sparse_vector", version=(8, 14))
    for name in ("order", "facts", "payload", "a.b", ""):
        with pytest.raises(ConfigError, match="vector_field"):
            index_mapping({}, field=name, kind="rank_features", version=(8, 15))
    for fields in (["a"], ["a..b"], [""]):
        with pytest.raises(ConfigError, match="payload field"):
            index_mapping(
                {},
                field="v",
                kind="rank_features",
                version=(8, 15),
                text_fields=dict.fromkeys(fields),
                payload_types={"a": "long"},
            )


def test_settings():
    assert index_settings(
        shards=3, replicas=0, kind="rank_features", version=(9, 5), extra={"index.codec": "x"}
    ) == {"index.number_of_shards": 3, "index.number_of_replicas": 0, "index.codec": "x"}
    assert index_settings(shards=None, replicas=None, kind="rank_features", version=(9, 4)) == {}
    vectors = index_settings(shards=1, replicas=1, kind="sparse_vector", version=(9, 2), extra={})
    assert vectors["index.mapping.exclude_source_vectors"] is False
    older = index_settings(shards=1, replicas=1, kind="sparse_vector", version=(9, 1))
    assert "index.mapping.exclude_source_vectors" not in older
    assert index_settings(
        shards=1, replicas=1, kind="rank_features", version=(8, 11), extra={"number_of_shards": 5}
    ) == {"index.number_of_shards": 5, "index.number_of_replicas": 1}


def test_a_foreign_vector_is_not_read_as_ours():
    with pytest.raises(InputError, match="no vector of ours"):
        read_features({"vdr": {"apple": 1.0}}, "vdr", "a")
    with pytest.raises(InputError, match="no vector of ours"):
        read_features({"vdr": [1.0]}, "vdr", "a")
    assert read_features({}, "vdr", "a") == {}
