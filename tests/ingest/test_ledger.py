"""The ledger: ranges, all-or-nothing commits, one opener, and refusals that say why."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdr_db.errors import ConfigError, StoreUnavailable
from vdr_db.ingest.ledger import LastRun, Ledger, Ranges, Sampled

RUN = {"input": {"files": [{"name": "a.jsonl", "size": 1, "mtime_ns": 2}]}, "store": {"name": "a"}}


@given(st.lists(st.integers(0, 40)), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 6))))
def test_ranges_are_a_set_of_numbers(numbers, spans):
    ranges = Ranges()
    truth = set()
    for start, length in spans:
        ranges.add(start, start + length)
        truth.update(range(start, start + length))
    ranges.update(numbers)
    truth.update(numbers)
    assert {n for n in range(60) if n in ranges} == truth
    assert len(ranges) == len(truth)
    listed = list(ranges)
    assert all(a < b for a, b in listed)
    assert all(b < c for (_, b), (c, _) in pairwise(listed))  # gaps between
    assert ranges.watermark == next(n for n in range(60) if n not in truth)
    copy = ranges.copy()
    copy.add(50, 51)
    assert 50 not in ranges


def test_what_is_committed_is_found_again(tmp_path):
    path = tmp_path / "run.ledger"
    sample = [Sampled("a", np.array([1, 5], np.int32), np.array([0.5, 2.0], np.float32))]
    with Ledger(path, RUN) as ledger:
        assert not ledger.is_resumed
        ledger.commit(Ranges([(0, 10), (20, 30)]), {"acknowledged": 19, "refused": 1}, sample)
    with Ledger(path, RUN) as ledger:
        assert ledger.is_resumed
        assert not ledger.is_complete
        assert list(ledger.settled) == [(0, 10), (20, 30)]
        assert ledger.counters == {"acknowledged": 19, "refused": 1}
        assert ledger.sample[0].id == "a"
        np.testing.assert_array_equal(ledger.sample[0].indices, [1, 5])
        np.testing.assert_array_equal(ledger.sample[0].weights, np.float32([0.5, 2.0]))
        ledger.commit(Ranges([(0, 40)]), {"acknowledged": 39}, is_complete=True)
    with Ledger(path, RUN) as ledger:
        assert ledger.is_complete
        assert list(ledger.settled) == [(0, 40)]


def test_another_run_is_refused_by_name_and_restart_forgets(tmp_path):
    path = tmp_path / "run.ledger"
    with Ledger(path, RUN) as ledger:
        ledger.commit(Ranges([(0, 10)]), {"acknowledged": 10})
    changed = {**RUN, "input": {"files": [{"name": "a.jsonl", "size": 9, "mtime_ns": 2}]}}
    with pytest.raises(ConfigError, match=r"a\.jsonl has changed .*: 1 then, 9 now.*restart"):
        Ledger(path, changed)
    with Ledger(path, RUN) as ledger:
        assert len(ledger.settled) == 10  # the refusal changed nothing
    with Ledger(path, changed, restart=True) as ledger:
        assert len(ledger.settled) == 0
    with Ledger(path, RUN) as ledger:
        assert len(ledger.settled) == 0, "nothing is stored yet, so nothing blocks"


def test_one_process_at_a_time(tmp_path):
    path = tmp_path / "run.ledger"
    with Ledger(path, RUN) as ledger:
        ledger.commit(Ranges([(0, 5)]), {})
        code = (
            "import sys, json; from vdr_db.ingest.ledger import Ledger\n"
            f"Ledger({str(path)!r}, {RUN!r})"
        )
        other = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert other.returncode == 1
        assert "in use by another process" in other.stderr
        with pytest.raises(ConfigError, match="in use by another process"):
            Ledger(path, RUN)
        ledger.commit(Ranges([(0, 6)]), {})
    with Ledger(path, RUN) as ledger:
        assert len(ledger.settled) == 6


def test_a_foreign_file_and_a_missing_folder_are_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("no database, but long enough to be looked at\n" * 100)
    with pytest.raises(ConfigError, match="is not a ledger"):
        Ledger(path, RUN)
    assert path.read_text().startswith("no database")
    with pytest.raises(ConfigError, match="folder that exists"):
        Ledger(tmp_path / "nowhere" / "run.ledger", RUN)


def test_a_full_disk_loses_nothing_that_was_committed(tmp_path):
    path = tmp_path / "run.ledger"
    with Ledger(path, RUN) as ledger:
        ledger.commit(Ranges([(0, 10)]), {"acknowledged": 10})
        # SQLite itself reports a full disk beyond this many pages.
        pages = ledger._connection.execute("PRAGMA page_count").fetchone()[0]
        ledger._connection.execute(f"PRAGMA max_page_count = {pages}")
        many = Ranges((2 * i, 2 * i + 1) for i in range(20_000))
        with pytest.raises(StoreUnavailable, match=r"cannot be written .*full"):
            ledger.commit(many, {"acknowledged": 20_000})
        assert list(ledger.settled) == [(0, 10)]
        ledger._connection.execute(f"PRAGMA max_page_count = {pages + 10_000}")
        ledger.commit(Ranges([(0, 12)]), {"acknowledged": 12})
    with Ledger(path, RUN) as ledger:
        assert list(ledger.settled) == [(0, 12)]
        assert ledger.counters == {"acknowledged": 12}


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_said(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StoreUnavailable, match="cannot be written"):
            Ledger(tmp_path / "run.ledger", RUN)
    finally:
        tmp_path.chmod(0o700)


def test_the_file_is_plain_sqlite_that_people_can_read(tmp_path):
    path = tmp_path / "run.ledger"
    with Ledger(path, RUN) as ledger:
        ledger.commit(Ranges([(0, 10), (12, 13)]), {"acknowledged": 11})
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT start, stop FROM settled").fetchall() == [(0, 10), (12, 13)]
    assert connection.execute("SELECT name, value FROM counters").fetchall() == [
        ("acknowledged", 11)
    ]
    connection.close()


OLD_SCHEMA = """
CREATE TABLE run (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE settled (start INTEGER PRIMARY KEY, stop INTEGER NOT NULL);
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE sample
    (slot INTEGER PRIMARY KEY, id TEXT NOT NULL, indices BLOB NOT NULL, weights BLOB NOT NULL);
INSERT INTO settled VALUES (0, 10), (12, 13);
INSERT INTO counters VALUES ('acknowledged', 11);
INSERT INTO sample VALUES (0, '"a"', x'01000000', x'0000803F');
INSERT INTO run VALUES ('format', '1'), ('is_complete', 'false');
"""


def test_a_ledger_of_the_format_before_is_taken_up(tmp_path):
    path = tmp_path / "run.ledger"
    connection = sqlite3.connect(path)
    connection.executescript(OLD_SCHEMA)
    connection.execute("INSERT INTO run VALUES ('description', ?)", (json.dumps(RUN),))
    connection.commit()
    connection.close()
    for _ in range(2):
        with Ledger(path, RUN) as ledger:
            assert list(ledger.settled) == [(0, 10), (12, 13)]
            assert ledger.counters == {"acknowledged": 11}
            assert (ledger.sample[0].id, ledger.sample[0].weights.tolist()) == ("a", [1.0])
            assert not ledger.is_complete


def test_runs_of_several_inputs_keep_apart(tmp_path):
    path = tmp_path / "run.ledger"
    other = {**RUN, "input": {"files": [{"name": "b.jsonl", "size": 1, "mtime_ns": 2}]}}
    with Ledger(path, RUN) as ledger:
        ledger.commit(Ranges([(0, 5)]), {"acknowledged": 5}, is_complete=True)
    with Ledger(path, other) as ledger:
        assert (len(ledger.settled), ledger.counters, ledger.run) == (0, {}, 2)
        ledger.commit(Ranges([(0, 7)]), {"acknowledged": 7})
    with Ledger(path, RUN) as ledger:
        assert (len(ledger.settled), ledger.is_complete) == (5, True)
    assert Ledger.last_of(path, other["input"]) == LastRun("a", False, True)
    assert Ledger.last_of(path, RUN["input"]) == LastRun("a", True, True)
    assert Ledger.last_of(tmp_path / "none", other["input"]) is None
    with Ledger(path, other, restart=True) as ledger:
        assert len(ledger.settled) == 0
    with Ledger(path, RUN) as ledger:
        assert len(ledger.settled) == 5
