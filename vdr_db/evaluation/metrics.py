"""How good a ranking is: nDCG, recall, reciprocal rank, precision; how sparse the vectors are.

A run maps a query id to its hits, `(document id, score)`; judgements map a query id to the grades
of documents. The rules are trec_eval's:

- hits are ranked by score, highest first, equal scores by document id, highest first; the order in
  which they are handed in does not count;
- a document is relevant if its grade is above 0, and grades count in nDCG as they are;
- a document without a judgement is not relevant.

Values come for every query that has a relevant document. One that the run leaves out, or for which
nothing was found, counts 0 (trec_eval's option `-c`). Queries without a relevant document have no
value.

Source: trec_eval, https://github.com/usnistgov/trec_eval (`m_ndcg_cut.c`, `m_recall.c`,
`m_recip_rank.c`, `m_P.c`); FLOPS: Paria et al. 2020, https://arxiv.org/abs/2004.05665.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from vdr_db.errors import ConfigError, InputError, ShapeError
from vdr_db.sparse import SparseRows

__all__ = [
    "flops",
    "mean",
    "mean_nonzeros",
    "ndcg",
    "paired_interval",
    "precision",
    "recall",
    "reciprocal_rank",
]

RESAMPLES = 10_000

DocumentId = TypeVar("DocumentId", int, str)
Run: TypeAlias = Mapping[str, Sequence[tuple[DocumentId, float]]]
Judgements: TypeAlias = Mapping[str, Mapping[DocumentId, int]]


def ndcg(
    run: Run[DocumentId], judgements: Judgements[DocumentId], *, cutoff: int = 10
) -> dict[str, float]:
    """Normalised discounted cumulative gain of each query, in 0..1.

    Gain is the grade, discount is `log2(rank + 1)`, the ideal ranking holds all judged documents.

    Args:
        run: Hits of each query.
        judgements: Grades of each query's documents.
        cutoff: How many hits count.

    Raises:
        ConfigError: `cutoff` is below 1.
        InputError: A document comes twice among the hits of a query, or a score is NaN.
    """
    return {
        query: _discounted(grades[:cutoff]) / _discounted(np.sort(ideal)[::-1][:cutoff])
        for query, grades, ideal in _judged(run, judgements, cutoff)
    }


def recall(
    run: Run[DocumentId], judgements: Judgements[DocumentId], *, cutoff: int = 100
) -> dict[str, float]:
    """Share of each query's relevant documents that are among its first `cutoff` hits, in 0..1.

    Arguments and errors as in `ndcg`.
    """
    return {
        query: float((grades[:cutoff] > 0).sum() / (ideal > 0).sum())
        for query, grades, ideal in _judged(run, judgements, cutoff)
    }


def precision(
    run: Run[DocumentId], judgements: Judgements[DocumentId], *, cutoff: int = 10
) -> dict[str, float]:
    """Relevant documents among each query's first `cutoff` hits, over `cutoff`, in 0..1.

    Arguments and errors as in `ndcg`.
    """
    return {
        query: float((grades[:cutoff] > 0).sum() / cutoff)
        for query, grades, _ in _judged(run, judgements, cutoff)
    }


def reciprocal_rank(
    run: Run[DocumentId], judgements: Judgements[DocumentId], *, cutoff: int = 10
) -> dict[str, float]:
    """1 over the rank of each query's first relevant hit, 0 if it is not among the first `cutoff`.

    The mean of it is MRR. Arguments and errors as in `ndcg`.
    """
    values = {}
    for query, grades, _ in _judged(run, judgements, cutoff):
        ranks = np.flatnonzero(grades[:cutoff] > 0)
        values[query] = 1.0 / (int(ranks[0]) + 1) if ranks.size else 0.0
    return values


def paired_interval(
    ours: Mapping[str, float], theirs: Mapping[str, float], *, share: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Mean difference of two rankers over the same queries, and its bootstrap interval.

    Queries are drawn with replacement, `RESAMPLES` times; each time both rankers' values of the
    same queries are compared. Where 0 is outside, the difference is no accident of the queries.

    Args:
        ours: Value of each query.
        theirs: Values of the same queries.
        share: Of the means that the interval holds, in (0, 1).
        seed: Of the draws.

    Returns:
        `mean(ours - theirs)`, and the two bounds.

    Raises:
        InputError: The queries are not the same, or there are none.

    Source: percentile bootstrap, Efron 1979; in retrieval: Sakai 2006,
    https://doi.org/10.1145/1148170.1148261.
    """
    if not ours or ours.keys() != theirs.keys():
        raise InputError(
            f"both rankers must have values of the same queries, got {len(ours)} and "
            f"{len(theirs)}, {len(ours.keys() & theirs.keys())} of them in both; evaluate both on "
            "one collection."
        )
    differences = np.array([value - theirs[query] for query, value in ours.items()])
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(differences, len(differences)).mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, [(1 - share) / 2, (1 + share) / 2])
    return float(differences.mean()), float(low), float(high)


def mean(values: Mapping[str, float]) -> float:
    """Mean over queries, NaN when there are none."""
    return math.fsum(values.values()) / len(values) if values else math.nan


def mean_nonzeros(rows: SparseRows) -> float:
    """Mean number of stored weights in a row, 0 when there are no rows."""
    return rows.nnz / len(rows) if len(rows) else 0.0


def flops(queries: SparseRows, documents: SparseRows) -> float:
    """Multiplications one query costs against one document, in expectation.

    The sum over dimensions of (share of queries that carry it) x (share of documents that do); 0
    when either side has no rows.

    Raises:
        ShapeError: The two have different widths.
    """
    if queries.width != documents.width:
        raise ShapeError(
            f"queries and documents must have one width, got {queries.width} and "
            f"{documents.width}; encode both with one model."
        )
    if not len(queries) or not len(documents):
        return 0.0
    shares = [
        np.bincount(rows.indices, minlength=rows.width) / len(rows) for rows in (queries, documents)
    ]
    return float(shares[0] @ shares[1])


def _judged(
    run: Run[DocumentId], judgements: Judgements[DocumentId], cutoff: int
) -> list[tuple[str, npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    """Per query with a relevant document: grades of its hits by rank, and all its grades (>= 0)."""
    if cutoff < 1:
        raise ConfigError(f"`cutoff` must be 1 or more, got {cutoff}.")
    judged = []
    for query, grades in judgements.items():
        ideal = np.array([max(grade, 0) for grade in grades.values()], dtype=np.float64)
        if not ideal.any():
            continue
        hits = run.get(query, ())
        if len({document for document, _ in hits}) != len(hits):
            raise InputError(f"The hits of query {query!r} name a document more than once.")
        if any(math.isnan(score) for _, score in hits):
            raise InputError(f"A score of query {query!r} is NaN; scores must be numbers.")
        ranked = sorted(hits, key=lambda hit: (hit[1], hit[0]), reverse=True)
        found = [max(grades.get(document, 0), 0) for document, _ in ranked]
        judged.append((query, np.array(found, dtype=np.float64), ideal))
    return judged


def _discounted(grades: npt.NDArray[np.float64]) -> float:
    return float((grades / np.log2(np.arange(2, grades.size + 2))).sum())
