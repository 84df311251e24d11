"""Passages through an ingest: no orphans after a kill at any request, counted as documents."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import services
from ingest_worker import make_store
from passages_worker import CUT, CuttingEncoder, run
from search_servers import note_real_server, remove_indices

from vdr_db.cli.main import main
from vdr_db.connectors import MemoryStore, QdrantStore, VDRQdrant
from vdr_db.connectors.documents import DocumentView
from vdr_db.connectors.validation import DOCUMENT_FIELD, NUMBER_FIELD
from vdr_db.errors import ConfigError, StoreMismatch
from vdr_db.ingest import IngestOptions, encode_to_spool, ingest
from vdr_db.readers import Record

WORKER = Path(__file__).parents[1] / "support" / "passages_worker.py"


def sentences(name, count):
    return " ".join(f"Sentence {i} of {name} is about {name} alone." for i in range(count))


OLD = {"long": sentences("old", 7), "same": sentences("same", 3), "short": sentences("short", 1)}
NEW = {"long": sentences("new", 2), "same": OLD["same"], "short": sentences("longer", 6)}


def write(path, texts):
    lines = (json.dumps({"_id": id, "text": text}) for id, text in texts.items())
    path.write_text("\n".join(lines) + "\n", "utf-8")


def killed(job):
    """Runs a job in a process of its own, which is killed in the middle."""
    done = subprocess.run(
        [sys.executable, str(WORKER), json.dumps(job)],
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def passages_of(place):
    """(document, number) → text of every point."""
    with make_store(place) as store:
        return {
            (record.payload[DOCUMENT_FIELD][1:], record.payload[NUMBER_FIELD]): record.payload[
                "text"
            ]
            for record in store.get(list(store.ids()))
        }


def cut(texts):
    spans = CuttingEncoder().cut_passages(list(texts.values()), tokens=8, overlap=2)
    return {
        (id, number): text[start:stop]
        for (id, text), own in zip(texts.items(), spans, strict=True)
        for number, (start, stop) in enumerate(own)
    }


def check_after_kill(place, folder, kill):
    """No passage beyond the texts in the middle, and the same command ends where it should."""
    write(folder / "new.jsonl", NEW)
    name = "-".join(map(str, kill))
    job = {"place": place, "file": str(folder / "new.jsonl"), "ledger": str(folder / name)}
    killed({**job, "kill": kill})
    found = passages_of(place)
    is_begun = any(text == cut(NEW).get(key) for key, text in found.items() if key[0] == "long")
    for key, text in found.items():
        assert text in (cut(OLD).get(key), cut(NEW).get(key))
        assert key in cut(NEW) or not is_begun  # the old tail goes before anything new comes
    report = run(job)
    assert report.verification.is_passed
    assert passages_of(place) == cut(NEW)
    assert report.totals.unchanged >= 1


def begin(place, folder):
    write(folder / "old.jsonl", OLD)
    run({"place": place, "file": str(folder / "old.jsonl"), "ledger": str(folder / "old")})
    assert passages_of(place) == cut(OLD)


@pytest.mark.parametrize(
    "kill", [(1, "before"), (1, "after"), (2, "before"), (2, "after"), (3, "after"), (5, "before")]
)
def test_a_kill_at_any_request_leaves_no_orphan(tmp_path, kill):
    place = {"path": str(tmp_path / "store")}
    begin(place, tmp_path)
    check_after_kill(place, tmp_path, kill)


def test_the_same_on_a_real_server(tmp_path, request, opensearch_url):
    note_real_server(request, services.version_of(opensearch_url))
    place = {"opensearch": opensearch_url, "name": services.unique_name()}
    try:
        for kill in [(1, "after"), (3, "before")]:
            (tmp_path / "old").unlink(missing_ok=True)
            begin(place, tmp_path)
            check_after_kill(place, tmp_path, kill)
    finally:
        with make_store(place) as store:
            remove_indices(store)


def records(texts):
    return [Record(id, text, {"n": len(text)}) for id, text in texts.items()]


def test_documents_are_counted_not_passages():
    store = MemoryStore()
    options = IngestOptions(passages=CUT)
    report = ingest(records(OLD), store, encoder=CuttingEncoder(4), options=options)
    assert report.totals.acknowledged == 3
    assert report.verification.is_passed
    assert report.verification.count == 3
    assert store.count() == len(cut(OLD))
    again = ingest(
        records(NEW), store, encoder=CuttingEncoder(4), options=IngestOptions(skip="unchanged")
    )
    assert (again.totals.unchanged, again.totals.acknowledged) == (1, 2)
    assert store.count() == len(cut(NEW))
    assert DocumentView(store).get(["long"])[0].payload["text"] == NEW["long"]
    assert store.passages == CUT


def test_another_way_of_cutting_is_another_run(tmp_path):
    with QdrantStore("a", path=":memory:") as store:
        ingest(records(OLD), store, encoder=CuttingEncoder(4), options=IngestOptions())
        with pytest.raises(StoreMismatch, match="holds whole documents"):
            ingest(
                records(OLD), store, encoder=CuttingEncoder(4), options=IngestOptions(passages=CUT)
            )


def test_a_spool_holds_whole_documents(tmp_path):
    write(tmp_path / "a.jsonl", OLD)
    with pytest.raises(ConfigError, match="a spool holds one row for each document"):
        encode_to_spool(
            [tmp_path / "a.jsonl"],
            tmp_path / "spool",
            encoder=CuttingEncoder(4),
            options=IngestOptions(passages=True),
        )


def test_the_command_cuts_finds_shows_and_explains(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filler = " ".join(f"Paragraph {i} tells of kitchens and recipes for soup." for i in range(30))
    text = filler + " The orchestra of Vienna plays a waltz by Strauss."
    write(tmp_path / "a.jsonl", {"music": text, "soup": filler})
    options = [
        "--passages",
        "--passage-tokens",
        "48",
        "--passage-overlap",
        "8",
        "--progress",
        "none",
    ]
    assert main(["ingest", "a.jsonl", "--store", "s", *options]) == 0
    capsys.readouterr()
    assert main(["search", "--store", "s", "--json", "waltz by an orchestra"]) == 0
    best = json.loads(capsys.readouterr().out)["hits"][0]
    assert best["id"] == "music"
    assert "orchestra of Vienna" in best["payload"]["text"]
    assert len(best["payload"]["text"]) < len(text) / 4
    assert best["passage"]["number"] + 1 == best["passage"]["count"]
    assert main(["search", "--store", "s", "waltz by an orchestra"]) == 0
    shown = capsys.readouterr()
    assert f"{best['passage']['count']} of {best['passage']['count']}" in shown.out
    assert "best of 2" in shown.out
    assert main(["explain", "--store", "s", "--json", "waltz by an orchestra", "music"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["score"] == pytest.approx(best["score"], rel=1e-4)
    assert main(["info", "--store", "s", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)["collection"]
    assert (about["texts"], about["passages"]) == (2, {"tokens": 48, "overlap": 8})
    assert main(["ingest", "a.jsonl", "--store", "s", "--passage-tokens", "9"]) == 2
    assert "go with --passages" in capsys.readouterr().err


def test_a_text_that_got_shorter_through_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", {"a": sentences("cooking", 60)})
    assert main(["index", "a.jsonl", "--store", "s", "--passages"]) == 0
    with VDRQdrant("texts", path="s") as collection:
        before = collection.store.count()
    write(tmp_path / "a.jsonl", {"a": "Short."})
    assert main(["index", "a.jsonl", "--store", "s"]) == 0
    with VDRQdrant("texts", path="s") as collection:
        assert (before > 1, collection.store.count(), collection.count()) == (True, 1, 1)
