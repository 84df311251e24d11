"""The quarantine file: each refused record once, whatever is killed when."""

from __future__ import annotations

import errno
import json
import os

import pytest

from vdr_db.errors import ConfigError, StoreUnavailable
from vdr_db.ingest.quarantine import Quarantine, Refusal

FIRST = [Refusal(3, "a", "bad weight", "f.jsonl:4"), Refusal(8, 7, "zu lang – ü", "f.jsonl:9")]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_lines_say_what_why_and_where(tmp_path):
    path = tmp_path / "q.jsonl"
    quarantine = Quarantine(path)
    assert not path.exists()
    quarantine.append([])
    assert not path.exists()
    quarantine.append(FIRST)
    assert lines(path) == [
        {"number": 3, "id": "a", "reason": "bad weight", "source": "f.jsonl:4"},
        {"number": 8, "id": 7, "reason": "zu lang – ü", "source": "f.jsonl:9"},
    ]


def test_a_repeated_refusal_is_not_written_twice(tmp_path):
    path = tmp_path / "q.jsonl"
    Quarantine(path).append(FIRST)
    again = Quarantine(path)
    assert len(again) == 2
    again.append([*FIRST, Refusal(9, "b", "new")])
    assert [line["number"] for line in lines(path)] == [3, 8, 9]


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_line_cut_by_a_kill_is_written_anew(tmp_path, cut):
    path = tmp_path / "q.jsonl"
    Quarantine(path).append(FIRST)
    path.write_bytes(path.read_bytes()[:-cut])
    Quarantine(path).append(FIRST)
    assert [line["number"] for line in lines(path)] == [3, 8]


def test_restart_begins_anew(tmp_path):
    path = tmp_path / "q.jsonl"
    Quarantine(path).append(FIRST)
    assert len(Quarantine(path, restart=True)) == 0
    assert not path.exists()


def test_a_foreign_file_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"_id": "1", "text": "corpus"}\n')
    for restart in (False, True):
        with pytest.raises(ConfigError, match="not a quarantine file"):
            Quarantine(path, restart=restart)
    assert path.read_text() == '{"_id": "1", "text": "corpus"}\n'


def test_a_disk_that_takes_nothing_is_an_error_not_a_silence(tmp_path, monkeypatch):
    path = tmp_path / "q.jsonl"
    quarantine = Quarantine(path)
    quarantine.append(FIRST[:1])
    write = os.write

    def full(handle, data):
        write(handle, data[:5])  # a part gets through before the disk is full
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StoreUnavailable, match="No space left"):
        quarantine.append(FIRST[1:])
    monkeypatch.undo()
    quarantine.append(FIRST[1:])
    assert [line["number"] for line in lines(path)] == [3, 8]
