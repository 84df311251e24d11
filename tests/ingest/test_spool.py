"""Encode by slices into Parquet parts, load them elsewhere: the same collection comes out."""

from __future__ import annotations

import json

import pytest
from hashing_encoder import HashingEncoder

from vdr_db.connectors.memory import MemoryStore
from vdr_db.errors import ConfigError, InputError, StoreUnavailable
from vdr_db.ingest import (
    FileSource,
    IngestOptions,
    RecordSource,
    Slice,
    SpoolSource,
    Stop,
    encode_to_spool,
    ingest,
)
from vdr_db.readers import Record

pq = pytest.importorskip("pyarrow.parquet")

COUNT = 5000


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    with open(path, "w", encoding="utf-8") as stream:
        for i in range(COUNT):
            id = i if i % 2 else f"d{i} ü"
            stream.write(json.dumps({"_id": id, "text": f"text {i}", "n": i, "l": [1, "a"]}) + "\n")
    return path


def dump(store):
    return {one.id: (one.payload, one.row) for one in store.get(list(store.ids()), with_rows=True)}


@pytest.mark.parametrize(("encoders", "loaders"), [(1, 1), (3, 2), (2, 5)])
def test_spooled_and_direct_ingest_agree(tmp_path, corpus, encoders, loaders):
    direct, loaded = MemoryStore(), MemoryStore()
    ingest([corpus], direct, encoder=HashingEncoder())
    for k in range(encoders):
        report = encode_to_spool(
            FileSource([corpus], slice=Slice(k, encoders)),
            tmp_path / "spool",
            encoder=HashingEncoder(),
            part_rows=700,
        )
        assert report.is_complete
    for k in range(loaders):
        source = SpoolSource(tmp_path / "spool", slice=Slice(k, loaders))
        report = ingest(source, loaded, ledger=tmp_path / f"{k}.ledger")
        assert report.verification.is_passed
    assert loaded.stamp == direct.stamp
    assert dump(loaded) == dump(direct)
    again = ingest(
        [corpus], loaded, encoder=HashingEncoder(), options=IngestOptions(skip="unchanged")
    )
    assert again.totals.unchanged == COUNT


def test_a_part_is_an_acknowledgement(tmp_path, corpus):
    """A run that dies between parts repeats the open part only, and leaves no half file."""

    class Dying(HashingEncoder):
        def encode_documents(self, texts):
            if self.calls == 4:
                raise MemoryError("killed here")
            return super().encode_documents(texts)

    folder = tmp_path / "spool"
    with pytest.raises(MemoryError):
        encode_to_spool([corpus], folder, encoder=Dying(), part_rows=500)
    parts = sorted(path.name for path in folder.glob("part-*.parquet"))
    assert parts
    assert not list(folder.glob("manifest-*"))
    assert not list(folder.glob(".part-*"))
    with pytest.raises(InputError, match="no finished slice"):
        SpoolSource(folder)
    report = encode_to_spool([corpus], folder, encoder=HashingEncoder(), part_rows=500)
    assert report.totals.resumed > 0
    assert report.totals.resumed + report.totals.encoded == COUNT
    assert report.acknowledged_in_total == COUNT
    assert parts == sorted(path.name for path in folder.glob("part-*.parquet"))[: len(parts)]
    store = MemoryStore()
    ingest(SpoolSource(folder), store)
    assert store.count() == COUNT


def test_a_request_to_stop_finishes_the_open_part(tmp_path, corpus):
    stop = Stop()

    class Stopping(HashingEncoder):
        def encode_documents(self, texts):
            if self.calls == 3:
                stop.request()
            return super().encode_documents(texts)

    report = encode_to_spool([corpus], tmp_path / "s", encoder=Stopping(), stop=stop)
    assert report.is_interrupted
    assert 0 < report.totals.acknowledged == report.totals.encoded < COUNT
    again = encode_to_spool([corpus], tmp_path / "s", encoder=HashingEncoder())
    assert again.totals.resumed == report.totals.acknowledged
    assert again.acknowledged_in_total == COUNT


def test_another_run_and_a_stream_are_refused(tmp_path, corpus):
    encode_to_spool([corpus], tmp_path / "s", encoder=HashingEncoder())
    with pytest.raises(ConfigError, match="made of something else: another encoder"):
        encode_to_spool([corpus], tmp_path / "s", encoder=HashingEncoder(8))
    report = encode_to_spool(
        [corpus], tmp_path / "s", encoder=HashingEncoder(8), options=IngestOptions(restart=True)
    )
    assert report.totals.encoded == COUNT
    with pytest.raises(ConfigError, match="recognised"):
        encode_to_spool(RecordSource(iter([])), tmp_path / "t", encoder=HashingEncoder())


def test_two_encoders_of_one_slice_exclude_each_other(tmp_path, corpus):
    class Nested(HashingEncoder):
        def encode_documents(self, texts):
            encode_to_spool([corpus], tmp_path / "s", encoder=HashingEncoder())
            return super().encode_documents(texts)

    with pytest.raises(StoreUnavailable, match=r"slice 0/1 .* is already open"):
        encode_to_spool([corpus], tmp_path / "s", encoder=Nested())


def test_refused_documents_are_in_the_slices_quarantine(tmp_path):
    items = [Record("a", "one"), Record("b", "two", {"_vdr_id": 1}, "c.jsonl:2"), Record("c", "x")]
    source = RecordSource(lambda: items, identity="three")
    for _ in range(2):
        report = encode_to_spool(source, tmp_path / "s", encoder=HashingEncoder())
        assert report.refused_in_total == 1
    lines = (tmp_path / "s" / "quarantine-00000-of-00001.jsonl").read_text().splitlines()
    assert [json.loads(line)["source"] for line in lines] == ["c.jsonl:2"]
    with pytest.raises(InputError, match="more than the 0 allowed"):
        encode_to_spool(
            source,
            tmp_path / "t",
            encoder=HashingEncoder(),
            options=IngestOptions(max_errors=0),
        )


def test_an_unfinished_spool_is_loaded_on_request_only(tmp_path, corpus):
    encode_to_spool(
        FileSource([corpus], slice=Slice(1, 2)), tmp_path / "s", encoder=HashingEncoder()
    )
    with pytest.raises(InputError, match=r"not whole.*1/2.*is_partial"):
        SpoolSource(tmp_path / "s")
    store = MemoryStore()
    ingest(SpoolSource(tmp_path / "s", is_partial=True), store)
    assert 0 < store.count() < COUNT


@pytest.mark.parametrize(
    "name",
    ["../outside.parquet", "/etc/passwd", "part-x.parquet", "a/part-00000-of-00001-0.parquet"],
)
def test_a_manifest_cannot_name_other_files(tmp_path, corpus, name):
    encode_to_spool([corpus], tmp_path / "s", encoder=HashingEncoder())
    path = tmp_path / "s" / "manifest-00000-of-00001.json"
    manifest = json.loads(path.read_text())
    manifest["parts"][0]["name"] = name
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="manifest"):
        SpoolSource(tmp_path / "s")


def test_a_changed_part_is_noticed(tmp_path, corpus):
    encode_to_spool([corpus], tmp_path / "s", encoder=HashingEncoder())
    part = next((tmp_path / "s").glob("part-*.parquet"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises(InputError, match="not what its manifest says"):
        ingest(SpoolSource(tmp_path / "s"), MemoryStore())
    part.unlink()
    with pytest.raises(InputError, match="is missing"):
        ingest(SpoolSource(tmp_path / "s"), MemoryStore())


def test_any_parquet_reader_can_use_a_part(tmp_path, corpus):
    encode_to_spool([corpus], tmp_path / "s", encoder=HashingEncoder())
    table = pq.read_table(next((tmp_path / "s").glob("part-*.parquet")))
    assert table.column_names == ["id", "id_is_integer", "indices", "values", "payload", "source"]
    assert table.num_rows == COUNT
    row = table.slice(1, 1).to_pylist()[0]
    expected = HashingEncoder().encode_documents(["text 1"])
    assert (row["id"], row["id_is_integer"]) == ("1", True)
    assert row["indices"] == expected.indices.tolist()
    assert row["values"] == expected.values.tolist()
    assert json.loads(row["payload"])["text"] == "text 1"
    assert row["source"] == f"{corpus}:2"
