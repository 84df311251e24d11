"""Nothing malformed reaches an engine: every bad input has its error or its defined result.

The embedded engine is the one to protect: it panics on some of these and cannot be opened again.
"""

from __future__ import annotations

import datetime as dt
import uuid

import numpy as np
import pytest
from store_samples import WIDTH, row, rows

from vdr_db.connectors import MemoryStore, QdrantStore
from vdr_db.connectors.ids import content_id, point_id
from vdr_db.connectors.validation import (
    MAX_PAYLOAD_DEPTH,
    clean_payload,
    rows_from_pairs,
    without_tiny,
)
from vdr_db.errors import ConfigError, InputError, RejectedRows, ShapeError
from vdr_db.sparse import SparseRows

GOOD = row({1: 1.0, 5: 2.0})


class Recorder:
    """An engine's `upsert` that notes what it is given and passes it on."""

    def __init__(self, store):
        self.engine = store._engine
        self.points: list[object] = []
        self.write = self.engine.upsert
        self.engine.upsert = self

    def __call__(self, batch):
        self.points += batch.points
        return self.write(batch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One collection on disk that all bad inputs are thrown at."""
    path = tmp_path_factory.mktemp("bad") / "collection"
    with QdrantStore("bad", path=path) as store:
        store.create(WIDTH)
        store.upsert(GOOD, ["good"], [{"n": 1}])
    return path


@pytest.fixture(scope="module")
def embedded(folder):
    with QdrantStore("bad", path=folder) as store:
        yield store


@pytest.fixture(params=["memory", "edge"])
def store(request):
    if request.param == "edge":
        store = request.getfixturevalue("embedded")
    else:
        store = MemoryStore()
        store.create(WIDTH)
        store.upsert(GOOD, ["good"], [{"n": 1}])
    before = store.count()
    recorder = Recorder(store) if request.param == "edge" else None
    yield store
    assert store.count() == before == 1
    assert [hit.id for hit in store.search(GOOD)] == ["good"]
    if recorder is not None:
        assert recorder.points == [], "the engine saw some of it"
        recorder.engine.upsert = recorder.write


NAN, INF = float("nan"), float("inf")
POISON = {
    "duplicate indices": ([3, 3], [1.0, 2.0], InputError),
    "more indices than values": ([1, 2, 3], [1.0], ShapeError),
    "more values than indices": ([1], [1.0, 2.0], ShapeError),
    "NaN": ([1], [NAN], InputError),
    "infinity": ([1], [INF], InputError),
    "minus infinity": ([1], [-INF], InputError),
    "negative weight": ([1], [-0.5], InputError),
    "negative id": ([-1], [1.0], InputError),
    "id of 2^32": ([2**32], [1.0], InputError),
    "id of the width": ([WIDTH], [1.0], InputError),
    "overflow to infinity": ([1], [1e39], InputError),
    "fractional id": ([1.5], [1.0], InputError),
    "nested": ([[1]], [[1.0]], ShapeError),
}


@pytest.mark.parametrize("case", POISON)
def test_poisoned_vectors_stop_before_the_store(store, case):
    ids, weights, error = POISON[case]
    with pytest.raises(error):
        store.upsert(rows_from_pairs([([1], [1.0]), (ids, weights)], WIDTH), ["a", "b"])
    if case not in ("fractional id", "nested"):
        with pytest.raises((InputError, ShapeError)):
            store.upsert(SparseRows([0, len(ids)], ids, weights, WIDTH), ["a"])
        with pytest.raises((InputError, ShapeError)):
            store.search(SparseRows([0, len(ids)], ids, weights, WIDTH))


@pytest.mark.parametrize("case", ["zero", "subnormal", "below 1e-30"])
def test_weights_that_mean_absent_are_dropped(case):
    weight = {"zero": 0.0, "subnormal": 1e-40, "below 1e-30": 0.9e-30}[case]
    made = rows_from_pairs([([2, 1], [weight, 1.0]), ([4], [weight])], WIDTH)
    assert made == SparseRows.from_dicts([{1: 1.0}, {}], WIDTH)
    if weight:
        raw = SparseRows([0, 2, 3], [1, 2, 4], [1.0, weight, weight], WIDTH)
        assert without_tiny(raw) == made
        with MemoryStore() as store:
            store.create(WIDTH)
            assert store.upsert(raw, ["a", "b"]).empty == 1
            assert store.get(["a"], with_rows=True)[0].row == row({1: 1.0})


def test_unsorted_ids_are_sorted():
    assert rows_from_pairs([([5, 1, 3], [5.0, 1.0, 3.0])], WIDTH) == row({1: 1.0, 3: 3.0, 5: 5.0})


def test_repeated_ids_can_be_joined():
    pair = ([3, 1, 3], [1.0, 1.0, 2.5])
    assert rows_from_pairs([pair], WIDTH, duplicates="sum") == row({1: 1.0, 3: 3.5})
    assert rows_from_pairs([pair], WIDTH, duplicates="max") == row({1: 1.0, 3: 2.5})
    with pytest.raises(ConfigError, match="'first'"):
        rows_from_pairs([pair], WIDTH, duplicates="first")
    assert len(rows_from_pairs([], WIDTH)) == 0


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        ([-1], r"\[0, 2\^64\)"),
        ([2**64], r"\[0, 2\^64\)"),
        ([True], "integers or strings, got True"),
        ([1.0], "integers or strings"),
        ([None], "integers or strings"),
        ([uuid.UUID(int=1)], "integers or strings"),
        ([""], "1 to 512 bytes"),
        (["x" * 513], "got 513"),
        (["é" * 257], "got 514"),
        (["\ud800"], "lone surrogate"),
    ],
)
def test_bad_ids(store, ids, told):
    with pytest.raises(InputError, match=told):
        store.upsert(rows(1), ids)
    with pytest.raises(InputError, match=told):
        store.get(ids)


def test_ids_at_the_limits():
    with MemoryStore() as store:
        store.create(WIDTH)
        ids = [0, 2**64 - 1, "x" * 512, "\x00", " ", np.int64(7), np.str_("np")]
        store.upsert(rows(len(ids)), ids)
        assert [type(record.id) for record in store.get(ids)] == [int, int, str, str, str, int, str]


def test_what_is_wrong_with_a_whole_call(store):
    with pytest.raises(InputError, match="got 'a' twice"):
        store.upsert(rows(3), ["a", "b", "a"])
    with pytest.raises(ShapeError, match="2 rows, 1 ids and 2 payloads"):
        store.upsert(rows(2), ["a"])
    with pytest.raises(ShapeError, match="2 rows, 2 ids and 3 payloads"):
        store.upsert(rows(2), ["a", "b"], [{}, {}, {}])
    with pytest.raises(TypeError, match=r"pass \['ab'\]"):
        store.upsert(rows(2), "ab")
    with pytest.raises(TypeError, match=r"pass \[payload\]"):
        store.upsert(rows(1), ["a"], {"x": 1})
    with pytest.raises(TypeError, match="SparseRows"):
        store.upsert([{1: 1.0}], ["a"])
    with pytest.raises(InputError, match="width 40, got width 41"):
        store.upsert(rows(1, width=41), ["a"])
    with pytest.raises(InputError, match="'_vdr_id' for id 'a'"):
        store.upsert(rows(2), ["x", "a"], [{"fine": 1}, {"_vdr_id": 7}])
    with pytest.raises(ConfigError, match="'ignore'"):
        store.upsert(rows(1), ["a"], empty="ignore")


def nested(levels: int, kind: type) -> object:
    value: object = kind()
    for _ in range(levels):
        value = [value] if kind is list else {"a": value}
    return value


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (NAN, "`x` is nan, which JSON cannot hold"),
        ({"y": [1, INF]}, r"`x.y\[\]` is inf"),
        (dt.datetime(2020, 1, 1), r"holds a datetime.*isoformat"),
        (dt.date(2020, 1, 1), r"holds a date.*isoformat"),
        ({1, 2}, r"holds a set.*sorted"),
        (b"x", "holds a bytes"),
        (np.zeros(2), r"holds a ndarray.*tolist"),
        (object(), "holds a object"),
        ({1: 2}, "field names must be strings, got 1"),
        (2**64, "64 bits"),
        (-(2**63) - 1, "64 bits"),
        ("a\ud800", "lone surrogate at character 1"),
        ({"\udfff": 1}, "lone surrogate"),
        (nested(MAX_PAYLOAD_DEPTH, list), "deeper than 64"),
        (nested(500, dict), "deeper than 64"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_payloads_that_json_cannot_hold(store, value, told):
    with pytest.raises(RejectedRows, match=told) as caught:
        store.upsert(rows(1), ["a"], [{"x": value}])
    assert caught.value.ids == ["a"]


def test_a_refused_row_does_not_take_its_neighbours_with_it(tmp_path):
    for store in (MemoryStore(), QdrantStore("c", path=tmp_path / "c")):
        with store:
            store.create(WIDTH)
            some = SparseRows.from_dicts([{1: 1.0}, {2: 1.0}, {}, {3: 1.0}], WIDTH)
            payloads = [{}, {"when": dt.date(2020, 1, 1)}, None, {"big": "x" * (65 << 20)}]
            with pytest.raises(RejectedRows) as caught:
                store.upsert(some, ["a", "b", "c", "d"], payloads, empty="error")
            assert caught.value.ids == ["b", "c", "d"]
            reasons = caught.value.reasons
            assert "isoformat" in reasons[0]
            assert reasons[1] == "the row has no entries"
            assert "bytes" in reasons[2]
            assert [record.id for record in store.get(["a", "b", "c", "d"])] == ["a"]


def test_the_deepest_payload_survives_reopening(tmp_path):
    payload = {"x": nested(MAX_PAYLOAD_DEPTH - 2, list), "y": nested(MAX_PAYLOAD_DEPTH - 2, dict)}
    store = QdrantStore("deep", path=tmp_path / "c")
    store.create(WIDTH)
    store.upsert(GOOD, ["deep"], [payload])
    # Dropped without `close`, so that opening has to replay the log.
    store._engine._shard.close()
    store._engine._folder.release()
    with QdrantStore("deep", path=tmp_path / "c") as store:
        assert store.get(["deep"])[0].payload == payload


def test_payload_types_that_are_converted():
    clean, size = clean_payload(
        {"t": (1, 2), "i": np.int64(3), "f": np.float32(0.5), "b": np.bool_(True), "s": "é"}
    )
    assert clean == {"t": [1, 2], "i": 3, "f": 0.5, "b": True, "s": "é"}
    assert type(clean["b"]) is bool
    assert 20 < size < 100
    assert clean_payload(None) == ({}, 2)


def test_payloads_are_copied():
    with MemoryStore() as store:
        store.create(WIDTH)
        payload = {"list": [1]}
        store.upsert(rows(1), ["a"], [payload])
        payload["list"].append(2)
        store.get(["a"])[0].payload["list"].append(3)
        assert store.get(["a"])[0].payload == {"list": [1]}


def test_after_all_that_the_collection_opens(folder, embedded):
    embedded.close()
    with QdrantStore("bad", path=folder) as store:
        assert [hit.id for hit in store.search(GOOD)] == ["good"]
        assert store.get(["good"])[0].payload == {"n": 1}


def test_point_ids_never_meet():
    text = "0b0e7b2a-6f0f-4a4e-9f3f-0d6c6f1f2a11"
    hashed = point_id("A")
    ids = [
        1,
        "1",
        "A",
        hashed,
        point_id(hashed),
        text,
        text.upper(),
        f"{{{text}}}",
        content_id("A"),
    ]
    assert len({point_id(id) for id in ids}) == len(ids)
    assert point_id(7) == 7
    assert point_id(text) == text
    assert uuid.UUID(str(hashed)).version == 5
    # Part of the format: another mapping would lose every string id that is stored already.
    space = uuid.uuid5(uuid.NAMESPACE_URL, "vdr_db:string-id")
    for name in ("A", *(f"é{i}" for i in range(50))):
        assert point_id(name) == str(uuid.uuid5(space, name))
    assert content_id("größer") == str(
        uuid.uuid5(uuid.uuid5(uuid.NAMESPACE_URL, "vdr_db:text"), "größer")
    )


def test_a_stored_vector_that_is_none_is_an_error_of_the_store():
    from vdr_db.connectors.qdrant.documents import record_of
    from vdr_db.connectors.qdrant.engine import Stored
    from vdr_db.errors import StoreError

    for indices, values in (([1, 2], [1.0, -1.0]), ([1, 1], [1.0, 1.0]), ([1], [float("nan")])):
        damaged = Stored(7, {"_vdr_id": "tea"}, indices, values)
        with pytest.raises(StoreError, match=r"document 'tea' is none: .* `vdr-db check`"):
            record_of(damaged, 100)
