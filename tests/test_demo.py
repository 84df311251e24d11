"""The demo and the documents it comes with."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

import vdr_db
from vdr_db.cli.demo import QUERIES, SAMPLE, unpack_sample
from vdr_db.cli.main import main
from vdr_db.evaluation.quality import TestCollection, evaluate_bm25

DATA = Path(vdr_db.__file__).parent / "data"

pytestmark = pytest.mark.usefixtures("loaded_once")


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return TestCollection.load(unpack_sample(tmp_path_factory.mktemp("sample") / "debian"))


def test_the_sample_is_what_its_licence_note_says(sample):
    assert (len(sample.documents), len(sample.queries)) == (1500, 210)
    note = (DATA / "debian_sample.LICENSE.md").read_text(encoding="utf-8")
    assert "1,500 packages" in note
    assert (DATA / SAMPLE).stat().st_size < 400_000
    assert b"GNU GENERAL PUBLIC LICENSE" in gzip.decompress((DATA / SAMPLE).read_bytes())


def test_documents_are_distinct_descriptions_of_programs(sample):
    texts = [document.text for document in sample.documents]
    assert len(set(texts)) == len(texts)
    assert all(len(text.split()) >= 20 and len(text) <= 1100 for text in texts)
    assert not any(str(document.id).startswith("lib") for document in sample.documents)
    assert all(document.payload["metadata"]["section"] for document in sample.documents)


def test_every_judgement_names_a_document_and_a_query(sample):
    ids = {document.id for document in sample.documents}
    assert set(sample.judgements) == {query.id for query in sample.queries}
    assert len({query.text for query in sample.queries}) == len(sample.queries)
    for grades in sample.judgements.values():
        assert 5 <= len(grades) <= 300
        assert grades.keys() <= ids
        assert set(grades.values()) == {1}


def test_bm25_finds_the_topics(sample):
    quality = evaluate_bm25(sample)
    assert quality.ndcg_10 == pytest.approx(0.511, abs=0.003)
    assert quality.recall_100 == pytest.approx(0.593, abs=0.003)
    assert quality.mrr_10 == pytest.approx(0.768, abs=0.003)


@pytest.fixture
def short_sample(sample, monkeypatch):
    """The first 30 documents, and the queries that are about them."""
    documents = sample.documents[:30]
    ids = {document.id for document in documents}
    judgements = {
        query: found
        for query, grades in sample.judgements.items()
        if (found := {id: grade for id, grade in grades.items() if id in ids})
    }
    short = replace(
        sample,
        documents=documents,
        queries=[query for query in sample.queries if query.id in judgements],
        judgements=judgements,
    )
    monkeypatch.setattr(TestCollection, "load", classmethod(lambda *_, **__: short))
    return short


@pytest.mark.usefixtures("short_sample")
def test_the_demo_shows_hits_quality_and_what_to_type_next(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    store = tmp_path / "demo.qdrant"
    assert main(["demo", "--store", str(store)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line for line in lines if line in QUERIES] == list(QUERIES)
    table = next(i for i, line in enumerate(lines) if line.startswith("debian: 30 documents"))
    assert all(len(line.rstrip()) <= 80 for line in lines[: table + 4])
    assert [line.split()[0] for line in lines[table + 1 : table + 4]] == [
        "ranked",
        "vdr-mini",
        "BM25",
    ]
    assert f'vdr-db search "make music" --store {store}' in out
    assert "encoding and indexing 30" in err
    assert main(["search", "bittorrent", "--store", str(store), "--json"]) in (0, 1)


@pytest.mark.usefixtures("short_sample")
def test_the_demo_takes_other_queries_and_cleans_up(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["demo", "card game", "--json"]) == 0
    asked, model, bm25 = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert asked["query"] == "card game"
    assert len(asked["hits"]) == 3
    assert (model["ranker"], bm25["ranker"]) == ("vdr-mini", "BM25")
    assert model["recall_100"] > 0.5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_whole_demo_reaches_its_quality(capsys):
    assert main(["demo", "burn a movie to a disc", "--json"]) == 0
    asked, model, _ = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert asked["hits"][0]["id"] == "dvd+rw-tools"
    assert model["ndcg_10"] == pytest.approx(0.607, abs=0.005)
    assert model["recall_100"] == pytest.approx(0.948, abs=0.005)
    assert model["mrr_10"] == pytest.approx(0.718, abs=0.005)
