"""Sparse rows with the shape of learned ones, for stores."""

from __future__ import annotations

import numpy as np

from vdr_db import SparseRows


def zipf_rows(count: int, nnz: int, width: int, *, seed: int, exponent: float = 0.7) -> SparseRows:
    """Rows of `nnz` ids drawn with falling frequency, with softplus-like weights above 0."""
    random = np.random.default_rng(seed)
    chances = 1.0 / np.arange(1, width + 1) ** exponent
    chances /= chances.sum()
    ids = np.empty((count, nnz), np.int32)
    for row in range(count):
        ids[row] = np.sort(random.choice(width, nnz, replace=False, p=chances))
    weights = np.log1p(np.exp(random.normal(size=(count, nnz)))).astype(np.float32)
    indptr = np.arange(count + 1, dtype=np.int64) * nnz
    return SparseRows(indptr, ids.reshape(-1), weights.reshape(-1), width)


def truncated(rows: SparseRows) -> SparseRows:
    """The rows with weights cut to 9 significant bits, by arithmetic rather than by bits."""
    mantissas, exponents = np.frexp(rows.values.astype(np.float64))
    cut = np.ldexp(np.floor(mantissas * 512.0) / 512.0, exponents)
    return SparseRows(rows.indptr, rows.indices, cut.astype(np.float32), rows.width)


def ranking(scores: np.ndarray, limit: int) -> list[int]:
    """Numbers of the best scores above 0, best first, equal scores by ascending number."""
    order = np.lexsort((np.arange(scores.size), -scores))
    return [int(number) for number in order if scores[number] > 0][:limit]
