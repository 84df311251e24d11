"""Modes and the sweep over k: what they measure is what separate runs measure."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest

from vdr_db import SparseEncoder
from vdr_db.cli.demo import unpack_sample
from vdr_db.connectors.probes import PROBES
from vdr_db.errors import ConfigError
from vdr_db.evaluation.quality import MODES, TestCollection, evaluate_model, evaluate_modes
from vdr_db.evaluation.sweep import SweepPoint, sweep_k

MEASURES = ("ndcg_10", "recall_100", "mrr_10", "query_nonzeros", "document_nonzeros", "flops")


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """40 documents of the demo's, and 30 queries about them."""
    whole = TestCollection.load(unpack_sample(tmp_path_factory.mktemp("sample") / "debian"))
    documents = whole.documents[:40]
    ids = {document.id for document in documents}
    judgements = {
        query: found
        for query, grades in whole.judgements.items()
        if (found := {id: grade for id, grade in grades.items() if id in ids})
    }
    queries = [query for query in whole.queries if query.id in judgements][:30]
    return replace(whole, documents=documents, queries=queries, judgements=judgements)


def measures(point):
    return {name: getattr(point, name) for name in MEASURES}


@pytest.mark.parametrize("head", [None, "vdr"])
def test_a_sweep_gives_what_separate_runs_give(sample, tiny_splade_folder, head):
    ks = (4, 32, 100)
    encoder = SparseEncoder.from_pretrained(tiny_splade_folder, device="cpu", head=head, k=7)
    points = sweep_k(sample, encoder, query_ks=ks, document_ks=ks)
    assert [(point.document_k, point.query_k) for point in points] == [
        (document_k, query_k) for document_k in ks for query_k in ks
    ]
    assert (encoder.query_entry.k, encoder.document_entry.k, encoder.lexical) == (7, 7, False)
    for point in (points[1], points[5], points[6]):
        separate = SparseEncoder.from_pretrained(
            tiny_splade_folder,
            device="cpu",
            head=head,
            k=point.document_k,
            query_k=point.query_k,
        )
        assert measures(point) == measures(evaluate_model(sample, separate))
    assert len({point.ndcg_10 for point in points}) > 4, "k makes a difference here"


def test_a_sweep_encodes_once(sample, tiny_splade, monkeypatch):
    encoded = []
    for name in ("encode_documents", "encode_queries"):
        method = getattr(SparseEncoder, name)

        def counted(self, texts, *, _name=name, _method=method, **options):
            if list(texts) != list(PROBES):  # which go into each new collection's stamp
                encoded.append(_name)
            return _method(self, texts, **options)

        monkeypatch.setattr(SparseEncoder, name, counted)
    sweep_k(sample, tiny_splade, query_ks=(1, 2, 9), document_ks=(3, 5), modes=MODES)
    assert sorted(encoded) == ["encode_documents", "encode_queries"]


def test_k_0_keeps_own_tokens_with_their_weights(sample, tiny_splade_folder):
    whole = SparseEncoder.from_pretrained(tiny_splade_folder, device="cpu", head="vdr", k=None)
    own = whole.bag_of_tokens(sample.query_texts)
    rows = whole.encode_queries(sample.query_texts)
    kept = [
        {id: weight for id, weight in row.items() if id in bag}
        for row, bag in zip(rows.to_dicts(), own.to_dicts(), strict=True)
    ]
    point, other = sweep_k(sample, whole, query_ks=(0, 8), document_ks=(16,))
    assert (point.query_k, other.query_k) == (0, 8)
    assert point.query_nonzeros == np.mean([len(row) for row in kept])
    # elu1p is above 0, so every own token has a weight.
    assert point.query_nonzeros == own.nnz / len(own)
    assert (point.ndcg_10, point.flops) != (other.ndcg_10, other.flops)
    alone = sweep_k(sample, whole, query_ks=(8,), document_ks=(16,))[0]
    assert measures(alone) == measures(other)


def test_modes_are_what_searching_in_them_finds(sample, tiny_splade):
    """Against scores of bags and vectors, computed without a store."""
    full, alpha, beta = evaluate_modes(sample, tiny_splade)
    assert (full.mode, alpha.mode, beta.mode) == MODES
    assert measures(full) == measures(evaluate_model(sample, tiny_splade))
    vectors = {
        "query": tiny_splade.encode_queries(sample.query_texts),
        "document": tiny_splade.encode_documents(sample.document_texts),
    }
    bags = {
        "query": tiny_splade.bag_of_tokens(sample.query_texts),
        "document": tiny_splade.bag_of_tokens(sample.document_texts),
    }
    ids = [str(document.id) for document in sample.documents]
    for quality, queries, documents in (
        (full, vectors["query"], vectors["document"]),
        (alpha, bags["query"], vectors["document"]),
        (beta, vectors["query"], bags["document"]),
    ):
        assert quality.query_nonzeros == queries.nnz / len(queries)
        assert quality.document_nonzeros == documents.nnz / len(documents)
        reciprocal = []
        for query, scores in zip(sample.queries, queries.dot(documents), strict=True):
            order = sorted(zip(scores, ids, strict=True), reverse=True)[:10]
            grades = sample.judgements[str(query.id)]
            places = [i for i, (s, id) in enumerate(order, 1) if s > 0 and grades.get(id, 0) > 0]
            reciprocal.append(1 / places[0] if places else 0.0)
        assert quality.mrr_10 == pytest.approx(np.mean(reciprocal), abs=0.02)
    assert alpha.encode_documents_s == full.encode_documents_s, "documents are encoded once"
    assert beta.ndcg_10 != full.ndcg_10 != alpha.ndcg_10


def test_modes_in_a_sweep(sample, tiny_splade):
    points = sweep_k(sample, tiny_splade, query_ks=(8,), document_ks=(16,), modes=MODES)
    assert [(point.mode, point.query_k, point.document_k) for point in points] == [
        ("full", 8, 16),
        ("alpha", None, 16),
        ("beta", 8, None),
    ]
    only = sweep_k(sample, tiny_splade, query_ks=(8,), document_ks=(16,), modes=["alpha"])
    timeless = [{**asdict(point), "search_ms": 0} for point in (*only, points[1])]
    assert timeless[0] == timeless[1]


def test_wrong_use(sample, tiny_splade):
    with pytest.raises(ConfigError, match="`query_ks` must be some numbers from 0 on"):
        sweep_k(sample, tiny_splade, query_ks=(-1,))
    with pytest.raises(ConfigError, match="`document_ks` must be some"):
        sweep_k(sample, tiny_splade, document_ks=())
    with pytest.raises(ConfigError, match="`modes` must be some of"):
        sweep_k(sample, tiny_splade, modes=["gamma"])
    with pytest.raises(ConfigError, match="`modes` must be some of"):
        evaluate_modes(sample, tiny_splade, [])


def test_nothing_in_a_plot_lies_on_anything_else():
    """Labels, ticks, titles and legend, of panels beside each other with many curves."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from vdr_db.cli.sweep import sweep_figure

    points = [
        SweepPoint("full", query_k, k, 0.3, 0.5, 0.4, 8.0, 8.0, flops + i, 1.0)
        for k in (32, 64, 128, 256, 512, None)
        for i, (query_k, flops) in enumerate([(8, 0.1), (64, 3.0), (None, 900.0)])
    ]
    sweeps = [("cranfield", points, None), ("a-long-name-of-a-collection", points, None)]
    figure = sweep_figure(sweeps)
    figure.draw_without_rendering()
    inside = [figure.legends[0], *figure.texts, figure._supxlabel]
    for axis in figure.axes:
        low, high = axis.get_xlim()
        ticks = zip(axis.get_xticks(), axis.get_xticklabels(), strict=True)
        inside += [axis.title, *(label for at, label in ticks if low <= at <= high)]
    boxes = [one.get_window_extent() for one in dict.fromkeys(inside) if one is not None]
    assert len(boxes) >= 10
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
