"""Every command on every store: the same words, the same answers, the key from the environment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import services
from store_servers import KEY, KINDS, running_place

from vdr_db.cli.main import main

pytestmark = [
    pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection"),
    pytest.mark.usefixtures("loaded_once"),
]
TEXTS = [
    ("tea", "Green tea is brewed from leaves that are not fermented.", 1),
    ("zoo", "Giraffes are the tallest animals on land.", 2),
    ("sky", "The stars are far away suns in the night sky.", 3),
    ("sea", "A lighthouse warns ships of rocks near the coast.", 4),
]
# The Elasticsearch stand-in takes at most 32 clauses.
SMALL = ("--model", "vdr-mini", "--k", "16")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A BEIR folder."""
    folder = tmp_path_factory.mktemp("beir") / "notes"
    (folder / "qrels").mkdir(parents=True)
    lines = (json.dumps({"_id": id, "text": text, "n": n}) for id, text, n in TEXTS)
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "a tall animal"}')
    (folder / "qrels" / "test.tsv").write_text("q\tzoo\t1\n")
    return folder


@pytest.fixture(scope="module")
def spool(corpus, tmp_path_factory):
    pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("spool") / "spool"
    assert main(["encode", str(corpus), "--spool", str(folder), *SMALL, "--progress", "none"]) == 0
    return folder


@pytest.fixture(params=KINDS)
def place(request, tmp_path, monkeypatch):
    if request.param in ("rest", "grpc"):
        pytest.importorskip("qdrant_client")
    upstream = None
    if request.param.endswith("opensearch"):
        pytest.importorskip("opensearchpy")
    if request.param.startswith("real"):
        upstream = request.getfixturevalue("opensearch_url")
    elif request.param.endswith("search"):
        upstream = request.getfixturevalue("noida_server").proxy.url
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VDR_DB_API_KEY", KEY)
    with running_place(request.param, tmp_path, upstream) as place:
        yield place


@pytest.fixture
def run(capsys):
    def call(*words):
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert KEY not in out + err
        return code, [json.loads(line) for line in out.splitlines()], err

    return call


def test_every_command(run, place, corpus, spool, tmp_path, monkeypatch):
    name = services.unique_name()
    store = ("--store", place.address, "--collection", name, "--json")
    code, out, err = run("index", corpus, *store, *SMALL)
    assert (code, out) == (0, [{"written": 4, "refused": 0, "texts": 4}]), err

    code, (found,), err = run("search", "a tall animal", *store, "--k", 16, "--limit", 2)
    assert (code, found["hits"][0]["id"]) == (0, "zoo"), err
    condition = ("--filter", '{"n": {"gte": 3}}')
    code, (found,), _ = run("search", "night", *store, "--k", 16, *condition)
    assert {hit["payload"]["n"] for hit in found["hits"]} <= {3, 4}
    code, (found,), _ = run("search", "lighthouse", *store, "--mode", "alpha")
    assert [hit["id"] for hit in found["hits"]] == ["sea"]

    code, (explained,), err = run("explain", "a tall animal", "zoo", *store, "--k", 16)
    assert code == 0, err
    assert explained["score"] > 0
    code, (facts,), err = run("info", *store)
    assert code == 0, err
    assert str(facts["collection"]["server"] or "").startswith(place.told)
    assert (facts["collection"]["name"], facts["collection"]["texts"]) == (name, 4)
    assert facts["collection"]["made with"]["model"] == "vdr-mini"

    # `evaluate` searches what is there, and fills what is not.
    code, (quality,), err = run("evaluate", corpus, *store, *SMALL, "--no-bm25")
    assert (code, quality["ndcg_10"], quality["document_nonzeros"]) == (0, 1.0, None), err
    other = services.unique_name()
    fresh = ("--store", f"{place.address}-2" if place.kind == "embedded" else place.address)
    fresh = (*fresh, "--collection", other, "--json")
    code, (quality,), err = run("evaluate", corpus, *fresh, *SMALL, "--no-bm25")
    assert (code, quality["ndcg_10"], quality["document_nonzeros"]) == (0, 1.0, 16.0), err
    assert run("info", *fresh)[1][0]["collection"]["texts"] == 4

    # `ingest` takes what changed, and resumes; `load` writes what was encoded elsewhere.
    more = tmp_path / "more.jsonl"
    lines = [*(corpus / "corpus.jsonl").read_text().splitlines(), '{"_id": "x", "text": "chess"}']
    more.write_text("\n".join(lines))
    words = ("ingest", more, *store, *SMALL, "--progress", "none")
    code, (report,), err = run(*words, "--skip-existing")
    assert code == 0, err
    assert (report["totals"]["existing"], report["totals"]["acknowledged"]) == (4, 1)
    assert report["verification"]["is_passed"]
    assert report["verification"]["count"] == 5
    code, (report,), err = run(*words)
    assert (code, report["totals"]["resumed"]) == (0, 5), err
    code, (report,), err = run(*words, "--no-ledger", "--skip-unchanged")
    assert (code, report["totals"]["unchanged"]) == (0, 5), err
    code, (report,), err = run("load", spool, *fresh, "--progress", "none")
    assert (code, report["totals"]["acknowledged"]) == (0, 4), err
    assert report["verification"]["is_passed"]

    # Without the key, or with a wrong one, each command says so in one sentence.
    if place.kind != "embedded":
        for value, told in ((None, "lets nobody in without"), ("wrong-key", "refuses the cred")):
            monkeypatch.delenv("VDR_DB_API_KEY")
            if value is not None:
                monkeypatch.setenv("VDR_DB_API_KEY", value)
            for command in (("search", "x"), ("info",), ("ingest", more), ("index", more)):
                code, _, err = run(*command, *store)
                assert (code, err.count("\n")) == (3, 1), err
                assert told in err
                assert "VDR_DB_API_KEY" in err
            monkeypatch.setenv("VDR_DB_API_KEY", KEY)
        monkeypatch.delenv("VDR_DB_API_KEY")
        monkeypatch.setenv("MY_KEY", KEY)
        assert run("info", *store, "--api-key-env", "MY_KEY")[0] == 0


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_serve(run, place, corpus):
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    name = services.unique_name()
    store = ("--store", place.address, "--collection", name)
    assert run("index", corpus, *store, *SMALL, "--json")[0] == 0
    mode = ("--mode", "alpha") if place.kind == "rest" else ()
    command = [sys.executable, "-m", "vdr_db.cli", "serve", *store, "--k", "16", "--port", "0"]
    command += mode
    process = subprocess.Popen(
        [*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        started = json.loads(process.stdout.readline() or "{}")
        assert started, process.stderr.read()
        assert started["documents"] == 4
        with urllib.request.urlopen(
            f"{started['url'].rstrip('/')}/api/search?q=tall+animal"
        ) as reply:
            assert json.load(reply)["hits"][0]["id"] == "zoo"
    finally:
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert KEY not in err


def test_a_folder_knows_its_collection(run, corpus, tmp_path):
    store = ("--store", tmp_path / "notes", "--json")
    assert run("index", corpus, *store, *SMALL, "--collection", "my notes")[0] == 0
    assert run("search", "tea", *store)[1][0]["hits"][0]["id"] == "tea"
    assert run("info", *store)[1][0]["collection"]["name"] == "my notes"
    assert run("index", corpus, *store, *SMALL)[1] == [{"written": 4, "refused": 0, "texts": 4}]
    code, _, err = run("search", "tea", *store, "--collection", "other")
    assert code == 3
    assert "my notes" in err


def test_one_store_is_measured_at_a_time(run, corpus, tmp_path):
    for more in (("--sweep", "k"), ("--mode", "all"), (corpus,)):
        code, _, err = run("evaluate", corpus, *more, "--store", tmp_path / "s")
        assert code == 2
        assert "--store holds the documents of one FOLDER" in err
    assert not Path(tmp_path / "s").exists()
