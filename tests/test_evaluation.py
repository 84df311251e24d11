"""Metrics: values worked out by hand, and a second implementation written as plain loops."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdr_db.errors import ConfigError, InputError, ShapeError
from vdr_db.evaluation.metrics import (
    flops,
    mean,
    mean_nonzeros,
    ndcg,
    paired_interval,
    precision,
    recall,
    reciprocal_rank,
)
from vdr_db.sparse import SparseRows


def test_the_package_offers_every_public_name_and_imports_none_of_them_before():
    import vdr_db.evaluation as package
    from vdr_db.evaluation import metrics, quality, sweep

    for name in package.__all__:
        home = metrics if name in metrics.__all__ else sweep if hasattr(sweep, name) else quality
        assert getattr(package, name) is getattr(home, name), name
    assert set(metrics.__all__) | set(sweep.__all__) <= set(package.__all__) == set(dir(package))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018
    code = "import sys, vdr_db.evaluation; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


JUDGEMENTS = {"q": {"a": 3, "b": 2, "c": 0, "d": 1}}
RUN = {"q": [("c", 9.0), ("a", 8.0), ("x", 7.0), ("d", 6.0)]}


def test_values_worked_out_by_hand():
    # Ranks: c (0), a (3), x (unjudged), d (1). Ideal: 3, 2, 1.
    gained = 3 / math.log2(3) + 1 / math.log2(5)
    ideal = 3 / math.log2(2) + 2 / math.log2(3) + 1 / math.log2(4)
    assert ndcg(RUN, JUDGEMENTS) == {"q": pytest.approx(gained / ideal, rel=1e-12)}
    assert ndcg(RUN, JUDGEMENTS, cutoff=2) == {
        "q": pytest.approx((3 / math.log2(3)) / (3 + 2 / math.log2(3)), rel=1e-12)
    }
    assert recall(RUN, JUDGEMENTS) == {"q": pytest.approx(2 / 3)}
    assert recall(RUN, JUDGEMENTS, cutoff=2) == {"q": pytest.approx(1 / 3)}
    assert precision(RUN, JUDGEMENTS, cutoff=2) == {"q": 0.5}
    assert precision(RUN, JUDGEMENTS) == {"q": 0.2}
    assert reciprocal_rank(RUN, JUDGEMENTS) == {"q": 0.5}
    assert reciprocal_rank(RUN, JUDGEMENTS, cutoff=1) == {"q": 0.0}


@pytest.mark.parametrize("metric", [ndcg, recall, precision, reciprocal_rank])
def test_rules(metric):
    assert metric({}, JUDGEMENTS) == {"q": 0.0}
    assert metric({"q": []}, JUDGEMENTS) == {"q": 0.0}
    assert metric(RUN, {}) == {}
    assert metric(RUN, {"q": {"a": 0}}) == {}
    assert metric(RUN, {"q": {"a": -1, "d": 1}}) == metric(RUN, {"q": {"a": 0, "d": 1}})
    shuffled = {"q": RUN["q"][::-1]}
    assert metric(shuffled, JUDGEMENTS) == metric(RUN, JUDGEMENTS)
    with pytest.raises(ConfigError, match="`cutoff` must be 1 or more, got 0"):
        metric(RUN, JUDGEMENTS, cutoff=0)
    with pytest.raises(InputError, match="more than once"):
        metric({"q": [("a", 1.0), ("a", 2.0)]}, JUDGEMENTS)
    with pytest.raises(InputError, match="NaN"):
        metric({"q": [("a", math.nan)]}, JUDGEMENTS)


def test_equal_scores_rank_the_higher_id_first():
    tied = {"q": [("a", 1.0), ("c", 1.0), ("b", 1.0)]}
    assert reciprocal_rank(tied, {"q": {"c": 1}}) == {"q": 1.0}
    assert reciprocal_rank(tied, {"q": {"a": 1}}) == {"q": pytest.approx(1 / 3)}


def test_whole_number_ids():
    assert reciprocal_rank({"q": [(9, 1.0), (10, 1.0)]}, {"q": {9: 1}}) == {"q": 0.5}


def loops(hits, grades, cutoff):
    """NDCG, recall, precision and reciprocal rank without NumPy, rank by rank."""
    left, ranked = list(hits), []
    while left:
        best = left[0]
        for hit in left:
            if hit[1] > best[1] or (hit[1] == best[1] and hit[0] > best[0]):
                best = hit
        left.remove(best)
        ranked.append(best[0])
    gain = found = first = 0.0
    for rank, document in enumerate(ranked[:cutoff], start=1):
        grade = grades.get(document, 0)
        if grade > 0:
            gain += grade / math.log(rank + 1, 2)
            found += 1
            first = first or 1 / rank
    ideal = 0.0
    for rank, grade in enumerate(sorted(grades.values(), reverse=True), start=1):
        if grade > 0 and rank <= cutoff:
            ideal += grade / math.log(rank + 1, 2)
    relevant = sum(grade > 0 for grade in grades.values())
    return gain / ideal, found / relevant, found / cutoff, first


DOCUMENTS = st.sampled_from([f"d{i}" for i in range(12)])


@given(
    st.dictionaries(DOCUMENTS, st.sampled_from([0.5, 1.0, 1.5, 2.0])),
    st.dictionaries(DOCUMENTS, st.integers(-1, 3)),
    st.integers(1, 15),
)
def test_the_same_as_plain_loops(scores, grades, cutoff):
    run = {"q": list(scores.items())}
    values = [
        metric(run, {"q": grades}, cutoff=cutoff)
        for metric in (ndcg, recall, precision, reciprocal_rank)
    ]
    if not any(grade > 0 for grade in grades.values()):
        assert values == [{}, {}, {}, {}]
        return
    expected = loops(scores.items(), grades, cutoff)
    assert [value["q"] for value in values] == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert all(0 <= value["q"] <= 1 + 1e-12 for value in values)


def test_mean():
    assert mean({"a": 1.0, "b": 0.0}) == 0.5
    assert math.isnan(mean({}))


def test_sparsity():
    queries = SparseRows.from_dicts([{0: 1.0}, {0: 2.0, 3: 1.0}], width=5)
    documents = SparseRows.from_dicts([{0: 1.0, 1: 1.0}, {3: 1.0}, {}, {3: 2.0}], width=5)
    assert mean_nonzeros(queries) == 1.5
    assert mean_nonzeros(documents) == 1.0
    assert mean_nonzeros(SparseRows.empty(0, 5)) == 0.0
    # Mean over all pairs of the dimensions both carry.
    shared = [len(set(q) & set(d)) for q in queries.to_dicts() for d in documents.to_dicts()]
    assert flops(queries, documents) == pytest.approx(np.mean(shared), rel=1e-12)
    assert flops(queries, SparseRows.empty(0, 5)) == 0.0
    with pytest.raises(ShapeError, match="got 5 and 6"):
        flops(queries, SparseRows.empty(1, 6))


def test_paired_intervals_follow_the_queries():
    """Both rankers share the hard and easy queries; what counts is the difference on each."""
    rng = np.random.default_rng(0)
    easy = rng.random(400)
    theirs = {str(i): float(value) for i, value in enumerate(easy)}
    noise = rng.normal(0.05, 0.2, 400)
    ours = {query: value + noise[int(query)] for query, value in reversed(theirs.items())}
    difference, low, high = paired_interval(ours, theirs)
    assert difference == pytest.approx(noise.mean())
    # The mean of 400 differences is normal, of deviation 0.2 / 20.
    half = 1.96 * noise.std() / 20
    assert (low, high) == pytest.approx((difference - half, difference + half), abs=2e-3)
    assert paired_interval(ours, theirs) == (difference, low, high)
    narrow = paired_interval(ours, theirs, share=0.5)
    assert low < narrow[1] < narrow[2] < high
    with pytest.raises(InputError, match="of the same queries, got 400 and 399, 399 of them"):
        paired_interval(ours, dict(list(theirs.items())[1:]))
    with pytest.raises(InputError, match="of the same queries, got 0 and 0"):
        paired_interval({}, {})
