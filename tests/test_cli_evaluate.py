"""`vdr-db evaluate`: modes, the sweep over k, the untrained baseline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from model_folders import write_bert

from vdr_db import SparseEncoder
from vdr_db.cli.main import main

NOTES = Path(__file__).parent / "data" / "notes.jsonl"

pytestmark = pytest.mark.usefixtures("tiny_splade_folder", "loaded_once")


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs `evaluate` in this process; returns exit code, stdout lines and stderr."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments):
        code = main(["evaluate", *(str(argument) for argument in arguments)])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return call


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "tiny"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(NOTES.read_text().replace('"id"', '"_id"'))
    (folder / "queries.jsonl").write_text(
        '{"_id": "q1", "text": "a tall beast"}\n{"_id": "q2", "text": "hot tea"}\n'
    )
    (folder / "qrels" / "test.tsv").write_text("q1\tzoo\t1\nq2\ttea\t2\n")
    return folder


def test_modes_stand_beside_each_other(run, folder):
    code, out, _ = run(folder, "--mode", "all", "--json")
    rows = [json.loads(line) for line in out]
    assert code == 0
    assert [row["mode"] for row in rows] == ["full", "alpha", "beta", None]
    full, alpha, beta, _bm25 = rows
    assert full["ndcg_10"] == 1.0
    assert alpha["query_nonzeros"] == 2.5  # a tall beast, hot tea
    assert alpha["document_nonzeros"] == full["document_nonzeros"] > beta["document_nonzeros"]
    assert beta["query_nonzeros"] == full["query_nonzeros"] > alpha["query_nonzeros"]
    code, out, _ = run(folder, "--mode", "all")
    assert out[0].rstrip() == "tiny: 3 documents, 2 judged queries, vdr-mini"
    assert [line.split()[0] for line in out[1:]] == ["mode", "full", "alpha", "beta", "BM25"]
    assert [json.loads(line)["mode"] for line in run(folder, "--mode", "beta", "--json")[1]] == [
        "beta",
        None,
    ]


def test_a_sweep_as_tables_json_and_picture(run, folder, tmp_path):
    picture = tmp_path / "sweep.png"
    ks = ("--query-ks", "2,8", "--document-ks", "16,4,4", "--sweep", "k")
    code, out, _ = run(folder, *ks, "--mode", "all", "--plot", picture)
    assert code == 0
    assert out[0] == "tiny: 3 documents, 2 judged queries, vdr-mini"
    assert out[1].startswith("BM25: nDCG@10 0.")
    start = next(i for i, line in enumerate(out) if line.strip() == "nDCG@10")
    assert " ".join(out[start + 1].split()) == "query k weights doc 4 doc 16 doc tokens"
    table = [line.split() for line in out[start + 2 : start + 6]]
    assert [row[0] for row in table] == ["2", "8", "tokens", "weights"]
    assert table[2][-1] == "–", "a bag against a bag takes no model"
    assert table[3][1:3] == ["4.0", "16.0"]
    assert any(line.startswith("FLOPS") for line in out)
    assert picture.read_bytes()[:4] == b"\x89PNG"

    _, out, _ = run(folder, *ks, "--json", "--no-bm25")
    rows = [json.loads(line) for line in out]
    assert [(row["document_k"], row["query_k"]) for row in rows] == [
        (4, 2),
        (4, 8),
        (16, 2),
        (16, 8),
    ]
    assert {row["ranker"] for row in rows} == {"vdr-mini"}
    assert all(row["document_nonzeros"] == row["document_k"] for row in rows)


def test_the_untrained_baseline(run, folder, tmp_path):
    """A new head on a masked language model: what the library makes of it, under its own name."""
    code, out, _ = run(folder, "--model", "tiny-splade", "--head", "vdr", "--json", "--no-bm25")
    raw = json.loads(out[0])
    assert (code, raw["ranker"]) == (0, "tiny-splade raw")
    assert raw["document_nonzeros"] == 768
    masked = write_bert(tmp_path / "bert")
    code, out, _ = run(folder, "--model", masked, "--head", "vdr", "--k", "20", "--json")
    raw = json.loads(out[0])
    assert (code, raw["ranker"], raw["query_nonzeros"]) == (0, f"{masked} raw", 20)

    trained = SparseEncoder.from_pretrained(masked, head="vdr", k=20)
    trained.document_tower.head.norm.bias.data += 0.5
    trained.save_pretrained(tmp_path / "trained")
    code, _, err = run(folder, "--model", tmp_path / "trained", "--head", "vdr")
    assert (code, "has a trained VDR head" in err) == (2, True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--plot", "x.png"], "--plot belongs to --sweep k"),
        (["--query-ks", "8"], "--query-ks belongs to --sweep k"),
        (["--sweep", "k", "--k", "8"], "--k is one k"),
        (["--sweep", "k", "--plot", "nowhere/x.png"], "--plot must lie in a folder that exists"),
    ],
)
def test_options_that_do_not_go_together(run, folder, options, said):
    code, out, err = run(folder, *options)
    assert (code, out, said in err) == (2, [], True)


@pytest.mark.parametrize("ks", ["", "8,,9", "eight", "8,-1"])
def test_ks_must_be_numbers(ks, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "folder", "--sweep", "k", f"--query-ks={ks}"])
    assert stopped.value.code == 2
    assert "expected numbers" in capsys.readouterr().err


@pytest.fixture
def odd_folder(tmp_path):
    """Queries that are documents too, judgements of what is not there, ids as in ArguAna."""
    topics = ["green tea", "tall giraffes", "burning a disc", "the blue sky", "playing chess"]
    texts = [f"{topic} and {other}" for topic in topics for other in topics[:4]]
    documents = {f"d{i}": text for i, text in enumerate(texts)}
    queries = {f"d{i}": texts[i] for i in (0, 6, 12)} | {"q1": "hot drinks", "q2": "a board game"}
    grades = [
        *(("d0", document, grade) for document, grade in (("d1", 2), ("d4", 1), ("gone", 1))),
        *(("d6", document, 1) for document in ("d6", "d5", "d9")),
        *(("d12", "d13", 1), ("q1", "d2", 3), ("q1", "lost", 2), ("q2", "d17", 1)),
        *(("nobody", "d1", 1), ("q2", "d1", 0)),
    ]
    folder = tmp_path / "odd"
    (folder / "qrels").mkdir(parents=True)
    for name, entries in (("corpus", documents), ("queries", queries)):
        lines = [json.dumps({"_id": id, "text": text}) + "\n" for id, text in entries.items()]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    lines = ["\t".join(map(str, grade)) + "\n" for grade in grades]
    (folder / "qrels" / "test.tsv").write_text("".join(lines))
    return folder


@pytest.mark.parametrize("more", [(), ("--keep-identical",)])
def test_odd_collections_are_measured_as_beir_and_trec_eval_do(run, odd_folder, vdr_mini, more):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    from vdr_db.connectors import VDRQdrant
    from vdr_db.evaluation import TestCollection

    code, out, err = run(odd_folder, "--json", *more)
    assert code == 0
    ours = json.loads(out[0])
    assert ("3 queries have the id of a document" in err) == (not more)
    assert "2 judgements are of documents that are not in the corpus" in err
    assert "1 judged queries are not in queries.jsonl" in err
    collection = TestCollection.load(odd_folder)
    found = {}
    with VDRQdrant("odd", vdr_mini, path=":memory:") as store:
        ids = [document.id for document in collection.documents]
        store.add_texts(collection.document_texts, ids=ids)
        for query in collection.queries:
            hits = store.search(query.text, limit=len(ids))
            found[query.id] = {hit.id: hit.score for hit in hits if more or hit.id != query.id}
    judged = {query.id: collection.judgements[query.id] for query in collection.queries}
    measures = {"ndcg_cut.10", "recall.100", "recip_rank"}
    theirs = pytrec_eval.RelevanceEvaluator(judged, measures).evaluate(found)

    def mean(measure):
        return sum(values[measure] for values in theirs.values()) / len(theirs)

    assert len(theirs) == 5
    assert ours["ndcg_10"] == pytest.approx(mean("ndcg_cut_10"), rel=1e-9)
    assert ours["recall_100"] == pytest.approx(mean("recall_100"), rel=1e-9)
    for values in theirs.values():
        values["recip_rank"] *= values["recip_rank"] >= 0.1  # trec_eval knows no cutoff here
    assert ours["mrr_10"] == pytest.approx(mean("recip_rank"), rel=1e-9)
