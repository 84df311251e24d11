"""Where documents come from: files in order, slices that partition, Parquet, windows."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdr_db.errors import ConfigError, InputError
from vdr_db.ingest.ledger import Ranges
from vdr_db.ingest.source import STRIPE, FileSource, RecordSource, Slice, Window, cut_windows
from vdr_db.readers import Fields, Record


def write_jsonl(path, ids):
    path.write_text("".join(json.dumps({"_id": i, "text": f"text {i}"}) + "\n" for i in ids))
    return path


def ids_of(source):
    return [record.id for record in source.records()]


@pytest.mark.parametrize("files", [1, 3, 8])
@pytest.mark.parametrize("n", [1, 2, 4, 7])
def test_slices_partition_the_input(tmp_path, files, n):
    total, paths = 3 * STRIPE + 17, []
    for f in range(files):
        paths.append(write_jsonl(tmp_path / f"part-{f}.jsonl", range(f, total, files)))
    everything = ids_of(FileSource(paths))
    assert sorted(everything) == list(range(total))
    parts = [ids_of(FileSource(paths, slice=Slice(k, n))) for k in range(n)]
    assert sorted(id for part in parts for id in part) == list(range(total))
    descriptions = {json.dumps(FileSource(paths, slice=Slice(k, n)).description) for k in range(n)}
    assert len(descriptions) == n


@pytest.mark.parametrize("text", ["3/3", "-1/2", "1", "a/b", "1/0", "0/2/3", ""])
def test_impossible_slices_are_refused(text):
    with pytest.raises(ConfigError):
        Slice.parse(text)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "0/1"),
        ({"RANK": "2", "WORLD_SIZE": "8", "SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, "2/8"),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, "3/4"),
        (
            {
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "1",
                "SLURM_ARRAY_TASK_ID": "5",
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_COUNT": "16",
            },
            "4/16",
        ),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "16"}, "5/16"),
    ],
)
def test_launchers_say_which_slice(environment, expected):
    assert str(Slice.parse("auto", environment)) == expected


def test_a_launcher_that_says_nonsense_is_refused():
    with pytest.raises(ConfigError, match="RANK must be a whole number"):
        Slice.parse("auto", {"RANK": "first", "WORLD_SIZE": "2"})


def test_folders_stand_for_their_files(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [3])
    write_jsonl(tmp_path / "a.jsonl", [1, 2])
    (tmp_path / "notes.md").write_text("not data")
    assert ids_of(FileSource([tmp_path])) == [1, 2, 3]
    beir = tmp_path / "beir"
    beir.mkdir()
    write_jsonl(beir / "corpus.jsonl", [7])
    write_jsonl(beir / "queries.jsonl", [8])
    assert ids_of(FileSource([beir])) == ["7"]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="neither a BEIR corpus nor"):
        FileSource([empty])
    with pytest.raises(InputError, match="no such file"):
        FileSource([tmp_path / "missing.jsonl"])
    with pytest.raises(ConfigError, match="at least one"):
        FileSource([])
    with pytest.raises(TypeError, match="sequence of paths"):
        FileSource(tmp_path)


def test_a_stream_has_no_description():
    assert FileSource(["-"]).description is None
    assert not FileSource(["-"]).is_rereadable
    assert RecordSource(iter([])).description is None
    with pytest.raises(TypeError, match="FileSource"):
        RecordSource("corpus.jsonl")


@given(st.sets(st.integers(0, 60)), st.integers(0, 60), st.integers(1, 9))
def test_windows_hold_exactly_what_is_not_settled(settled, count, size):
    ranges = Ranges()
    ranges.update(sorted(settled))
    items = [Record(i, f"text {i}") for i in range(count)]
    blocks = list(cut_windows(iter(items), ranges, Window(documents=size)))
    numbers = [n for block in blocks for n in block.numbers]
    assert numbers == [n for n in range(count) if n not in settled]
    assert [r.id for block in blocks for r in block.records] == numbers
    assert sum(block.resumed for block in blocks) == count - len(numbers)
    assert all(len(block.records) <= size for block in blocks)


def test_windows_follow_the_speed_of_the_encoder():
    window = Window()
    for _ in range(10):
        window.took(window.documents, 0.01)
    assert window.documents == window.most
    for _ in range(20):
        window.took(window.documents, 10.0)
    assert window.documents == 16
    window.took(3, 0.001)  # the last, short window says nothing
    assert window.documents == 16


def test_parquet_records(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "c.parquet"
    day = datetime.date(2024, 5, 6)
    table = pa.table(
        {
            "_id": ["a", "b"],
            "title": ["T", None],
            "text": ["one", "two"],
            "year": [2000, None],
            "tags": [["x"], []],
            "day": [day, day],
        }
    )
    pq.write_table(table, path, row_group_size=1)
    first, second = FileSource([path]).records()
    assert first == Record(
        "a",
        "T one",
        {"title": "T", "year": 2000, "tags": ["x"], "day": "2024-05-06"},
        f"{path}:1",
    )
    assert (second.id, second.text, second.source) == ("b", "two", f"{path}:2")
    fields = Fields(id="year", text=("text",), payload=("tags",))
    assert next(FileSource([path], fields=fields).records()) == Record(
        2000, "one", {"tags": ["x"]}, f"{path}:1"
    )
    faults = [record.fault for record in FileSource([path], fields=fields).records()]
    assert faults[0] == ""
    assert "'year' is missing or null" in faults[1]
    (fault, _) = (one.fault for one in FileSource([path], fields=Fields(text=("year",))).records())
    assert "must be a text" in fault
    long = "x" * (20 << 20)
    for bad in (b"x", Decimal("1.5"), float("nan"), float("inf")):
        pq.write_table(pa.table({"text": ["a", long], "odd": pa.array([bad, None])}), path)
        first, second = FileSource([path]).records()
        assert f"'odd' holds {type(bad).__name__}" in first.fault
        assert (second.fault, len(second.text)) == ("", len(long))
    path.write_bytes(b"no parquet")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        list(FileSource([path]).records())
