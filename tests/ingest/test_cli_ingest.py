"""`vdr-db ingest`, `load` and `encode --spool` with a real model, as a person uses them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from broken_images import encoded
from image_folders import pixels, write_cross_modal
from PIL import Image

from vdr_db.cli.main import main
from vdr_db.cli.outcome import _resume_command
from vdr_db.connectors.collections.vdr_qdrant import VDRQdrant

SECRET = "s3cr3t-value-42"
TEXTS = [
    "Giraffes are the tallest animals on land.",
    "Green tea is brewed from leaves that are not fermented.",
    "The theory of relativity was published by Einstein.",
    "A lighthouse warns ships of rocks near the coast.",
]


@pytest.fixture
def corpus(tmp_path, tiny_splade_folder):
    path = tmp_path / "corpus.jsonl"
    with open(path, "w", encoding="utf-8") as stream:
        for i in range(40):
            text = f"{TEXTS[i % 4]} Note {i}."
            stream.write(json.dumps({"_id": f"n{i}", "text": text, "group": i % 4}) + "\n")
    return path


@pytest.fixture
def run(capsys):
    def call(*words):
        # Whatever model is the default, these tests know the vectors of this one.
        if words[0] in ("encode", "index", "ingest") and "--model" not in words:
            words = (*words, "--model", "tiny-splade")
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_ingest_then_search_then_ingest_again(run, tmp_path, corpus, tiny_splade):
    store = tmp_path / "notes"
    code, out, err = run("ingest", corpus, "--store", store, "--json", "--progress", "none")
    assert code == 0, err
    report = json.loads(out)
    assert report["totals"]["acknowledged"] == 40
    assert report["verification"]["is_passed"]
    assert "40 texts written" in err
    assert (tmp_path / "notes.ledger").exists()
    with VDRQdrant("texts", tiny_splade, path=store) as notes:
        hit = notes.search("the tallest animal", limit=1)[0]
        assert hit.payload["group"] == 0
        # The vectors are the encoder's own, whatever batches the ingest made.
        texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
        rows = tiny_splade.encode_documents(texts)
        for i, record in enumerate(notes.store.get([f"n{i}" for i in range(40)], with_rows=True)):
            assert record.row == rows[i]
            assert record.payload["text"] == texts[i]
    code, out, err = run("ingest", corpus, "--store", store, "--json", "--progress", "none")
    assert code == 0
    assert json.loads(out)["totals"]["resumed"] == 40
    code, out, err = run(
        "ingest", corpus, "--store", store, "--no-ledger", "--skip-unchanged", "--json"
    )
    assert code == 0
    assert json.loads(out)["totals"]["unchanged"] == 40


def test_encode_by_slices_then_load(run, tmp_path, corpus):
    pytest.importorskip("pyarrow")
    spool, store = tmp_path / "spool", tmp_path / "notes"
    for k in range(2):
        code, _, err = run(
            "encode", corpus, "--spool", spool, "--slice", f"{k}/2", "--progress", "none"
        )
        assert code == 0, err
    code, out, err = run("load", spool, "--store", store, "--json", "--progress", "none")
    assert code == 0, err
    assert json.loads(out)["totals"]["acknowledged"] == 40
    code, out, _ = run("search", "a hot drink", "--store", store, "--json")
    assert code == 0
    assert "tea" in out


def test_refused_documents_are_told_and_change_the_exit_code(run, tmp_path, corpus):
    with open(corpus, "a", encoding="utf-8") as stream:
        stream.write(json.dumps({"_id": "bad", "text": "x", "_vdr_id": 1}) + "\n")
    store = tmp_path / "notes"
    code, _, err = run("ingest", corpus, "--store", store, "--progress", "none")
    assert code == 3
    assert "1 refused" in err
    assert "must not start with" in err
    quarantine = tmp_path / "notes.ledger.quarantine.jsonl"
    assert str(quarantine) in err
    assert json.loads(quarantine.read_text())["source"] == f"{corpus}:41"


def test_bad_use_is_explained(run, tmp_path, corpus):
    store = tmp_path / "notes"
    code, _, err = run("ingest", corpus, "--store", store, "--slice", "2/2")
    assert code == 2
    assert "0 ≤ k < n" in err
    code, _, err = run("ingest", tmp_path / "missing.jsonl", "--store", store)
    assert code == 2
    assert "no such file" in err
    code, _, err = run("load", tmp_path, "--store", store)
    assert code == 2
    assert "no finished slice" in err


def test_interrupt_says_how_to_go_on(tmp_path, corpus):
    with open(corpus, "a", encoding="utf-8") as stream:
        for i in range(40, 1000):
            stream.write(json.dumps({"_id": f"n{i}", "text": f"{TEXTS[i % 4]} {i}"}) + "\n")
    command = [sys.executable, "-m", "vdr_db.cli", "ingest", str(corpus), "--store", "notes"]
    command += ["--model", "tiny-splade"]
    command += ["--progress", "json", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if line.startswith("{") and json.loads(line)["acknowledged"] > 0:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    report = json.loads(out)
    assert report["is_interrupted"]
    assert 0 < report["totals"]["acknowledged"] < 1000
    assert "go on with: vdr-db ingest" in err
    began = time.monotonic()
    again = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    assert time.monotonic() - began < 120
    report_again = json.loads(again.stdout)
    assert report_again["totals"]["resumed"] == report["totals"]["acknowledged"]
    assert report_again["acknowledged_in_total"] == 1000


def test_the_command_to_go_on_shows_no_secret(monkeypatch):
    monkeypatch.setattr(
        sys,
        "argv",
        ["vdr-db", "ingest", "a b.jsonl", "--restart", "--store", f"https://me:{SECRET}@host:6333"],
    )
    shown = _resume_command()
    assert SECRET not in shown
    assert "--restart" not in shown
    assert "'a b.jsonl'" in shown


@pytest.fixture(scope="module")
def two_sided(tmp_path_factory):
    return write_cross_modal(tmp_path_factory.mktemp("models") / "m")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images" / "sub"
    folder.mkdir(parents=True)
    for i in range(20):
        (folder / f"{i:02d}.png").write_bytes(encoded(Image.fromarray(pixels(20, 20, i)), "PNG"))
    return tmp_path / "images"


def test_a_folder_of_images(run, tmp_path, images, two_sided, corpus):
    store = tmp_path / "things"
    words = ("ingest", "--images", images, "--store", store, "--model", two_sided)
    code, out, err = run(*words, "--json", "--progress", "json")
    assert code == 0, err
    report = json.loads(out)
    assert report["totals"]["acknowledged"] == 20
    assert report["verification"]["is_passed"]
    assert report["verification"]["searched"] == 8
    assert "20 images written" in err
    last = [json.loads(line) for line in err.splitlines() if line.startswith("{")][-1]
    assert last["read"] == last["encoded"] == last["acknowledged"] == 20
    assert (tmp_path / "things.images.ledger").exists()
    code, out, _ = run(*words, "--json")
    assert (code, json.loads(out)["totals"]["resumed"]) == (0, 20)
    # `index --images` gives the same documents, so either can go on where the other stopped.
    (images / "sub" / "bad.png").write_bytes(b"no picture")
    index = ("index", "--images", images, "--store", tmp_path / "other", "--model", two_sided)
    code, _, err = run(*index)
    assert code == 3
    code, out, err = run(*words, "--no-ledger", "--skip-existing", "--json")
    assert code == 3, "as for index: something was refused"
    assert json.loads(out)["totals"]["existing"] == 20
    assert "no image of a known format" in err
    with VDRQdrant("texts", path=store) as one, VDRQdrant("texts", path=tmp_path / "other") as two:
        ids = sorted(two.store.ids())
        assert sorted(one.store.ids()) == ids
        assert [a.row for a in one.store.get(ids, True)] == [
            b.row for b in two.store.get(ids, True)
        ]
        assert one.store.get(ids)[0].payload["image"] == two.store.get(ids)[0].payload["image"]
    code, out, err = run("ingest", corpus, "--store", store, "--model", two_sided, "--json")
    assert code == 0, err
    assert json.loads(out)["totals"]["acknowledged"] == 40
    code, _, err = run("index", corpus, "--store", tmp_path / "other", "--model", two_sided)
    assert code == 0, err


def test_images_by_slices_through_a_spool(run, tmp_path, images, two_sided):
    pytest.importorskip("pyarrow")
    spool, store = tmp_path / "spool", tmp_path / "things"
    for k in range(2):
        words = ("--spool", spool, "--slice", f"{k}/2", "--thumbnails", "--model", two_sided)
        code, _, err = run("encode", "--images", images, *words)
        assert code == 0, err
        assert "10 images written" in err
    code, out, err = run("load", spool, "--store", store, "--json")
    assert code == 0, err
    assert json.loads(out)["totals"]["acknowledged"] == 20
    with VDRQdrant("texts", path=store) as collection:
        payload = collection.store.get(["sub/00.png"])[0].payload
        assert payload["modality"] == "image"
        assert payload["thumbnail"].startswith("data:image/jpeg")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("ingest", "--store", "s"), "files of texts or --images FOLDER, one of the two"),
        (("ingest", "a", "--images", "b", "--store", "s"), "one of the two"),
        (("ingest", "--images", "none", "--store", "s"), "must come from a folder"),
        (("ingest", "--images", ".", "--store", "s", "--tokens"), "--tokens is for texts"),
        (("ingest", "a", "--thumbnails", "--store", "s"), "a text has no image"),
        (("encode", "--images", "."), "go with --spool"),
    ],
)
def test_impossible_words(run, words, told):
    code, _, err = run(*words)
    assert code == 2
    assert told in err


def test_cut_texts_are_counted_at_the_end(run, tmp_path, corpus):
    pytest.importorskip("pyarrow")
    short = ("--max-length", "5")
    store, spool = ("--store", tmp_path / "s"), ("--spool", tmp_path / "p")
    told = "40 texts were longer than the model reads and were cut"
    commands = [
        ("ingest", corpus, *store, "--json"),
        ("encode", corpus, *spool, "--json"),
        ("encode", "--input", corpus, "--out", tmp_path / "x.npz"),
        ("index", corpus, *store),
    ]
    for words in commands:
        code, out, err = run(*words, *short)
        assert code == 0, err
        assert err.count(told) == 1, words
        if "--json" in words:
            assert json.loads(out)["totals"]["truncated"] == 40
    code, _, err = run("ingest", corpus, *store, *short)
    assert code == 0
    assert "were cut" not in err, "nothing was encoded"
