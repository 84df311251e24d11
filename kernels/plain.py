"""Selection and activation of one row of pooled scores in NumPy, for runtimes without torch.

Same meaning as `vdr_db.kernels.reference`, which the tests compare it with.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vdr_db.kernels.names import Activation

__all__ = ["activate", "norm_of", "select_topk"]

FloatArray = npt.NDArray[np.float32]

SMALLEST_NORM = 1e-12  # an all-zero vector stays one instead of becoming NaN


def activate(logits: FloatArray, activation: Activation) -> FloatArray:
    """Weights of logits, element by element; see `vdr_db.kernels.activate`.

    Args:
        logits: Any shape.
        activation: One of `ACTIVATIONS`.
    """
    if activation == "none":
        return logits
    weights: FloatArray
    if activation == "elu1p":
        weights = np.where(logits < 0, np.exp(np.minimum(logits, 0)), logits + 1)
    else:
        weights = np.log1p(np.maximum(logits, 0))
    if activation == "double_log1p_relu":
        weights = np.log1p(weights)
    return weights


def norm_of(logits: FloatArray, activation: Activation) -> FloatArray:
    """L2 norm of the weights of each row of `[..., V]`; never 0."""
    norms: FloatArray = np.maximum(
        np.linalg.norm(activate(logits, activation), axis=-1), np.float32(SMALLEST_NORM)
    )
    return norms


def select_topk(
    logits: FloatArray,
    k: int | None,
    *,
    activation: Activation,
    lexical: npt.NDArray[np.int32] | None = None,
) -> tuple[npt.NDArray[np.int32], FloatArray]:
    """The k largest columns of a row, joined with given columns, and their weights.

    Of equal logits the smallest columns are taken. NaN counts as largest, so that it surfaces. -inf
    is never kept, nor a column whose weight is not greater than 0.

    Args:
        logits: `[V]` float32, pooled scores.
        k: How many columns to take, 1 to V; None takes all.
        activation: Turns kept logits into weights.
        lexical: `[n]` columns to keep in any case, in any order.

    Returns:
        Columns `[nnz]` int32, ascending, and weights `[nnz]` float32.
    """
    # Scans leave most columns at -inf, and a partition of equal numbers is slow.
    left = np.flatnonzero(logits != -np.inf)
    is_whole = left.size == logits.size
    columns = _largest(logits, k) if is_whole else left[_largest(logits[left], k)]
    if lexical is not None:
        is_wanted = np.zeros(logits.size, bool)
        is_wanted[columns] = is_wanted[lexical] = True
        columns = np.flatnonzero(is_wanted)
    scores = logits[columns]
    with np.errstate(invalid="ignore"):
        weights = activate(scores, activation)
        kept = ((weights > 0) | np.isnan(weights)) & (scores != -np.inf)
    return columns[kept].astype(np.int32), weights[kept]


def _largest(logits: FloatArray, k: int | None) -> npt.NDArray[np.int64]:
    """Places of the k largest, ascending; NaN first, of equal ones the first."""
    V = logits.size
    if k is None or k >= V:
        return np.arange(V)
    threshold = np.partition(logits, V - k)[V - k]  # NaN goes last, so it counts as largest
    if np.isnan(threshold):
        return np.flatnonzero(np.isnan(logits))[:k]
    above = np.flatnonzero((logits > threshold) | np.isnan(logits))
    equal = np.flatnonzero(logits == threshold)[: k - above.size]
    return np.sort(np.concatenate([above, equal]))
