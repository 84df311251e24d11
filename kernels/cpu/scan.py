"""Exact scores of the columns that can be kept, found by a scan of the whole matrix in integers.

Of V columns a selection keeps few. All are scored in 8 bit integers, whose sums are exact; what was
rounded away bounds how far each score can be from the one in fp32. Columns that cannot be kept
whatever the difference is are dropped, the others are computed as ever: the same bits, for less.

With h a state, w a row, h' and w' what their integers stand for, u = 2^-24:

    |fp32(h . w) - h' . w'| <= |h| |w - w'| + |h - h'| |w'| + 2 H u |h| |w|

The proof, and where the rounding of the bound itself is added, is in `docs/math.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vdr_db.kernels.cpu.products import PACKED_ROWS, PackedRows, exact_levels
from vdr_db.kernels.names import Activation

__all__ = ["Codes", "encoded", "scan"]

FloatArray = npt.NDArray[np.float32]
Columns = npt.NDArray[np.int64]
Exact = Callable[[Columns], FloatArray]

LEVELS = 127
"""Largest integer of a row of the matrix."""

MOST_SHARE = 0.25
"""Where more of the columns are left, computing all is as fast: the text goes the plain way."""

UNIT = 2.0**-24  # half the distance from 1 to the next number in fp32
SLACK = np.float32(1 + 2.0**-16)  # for the rounding of sums that are themselves a bound
TINY = np.float32(1e-30)  # covers what underflows, also where denormal numbers count as 0
TINY_NORM = 1e-16  # the same for norms, whose squares underflow earlier
LARGEST_PRODUCT = 1e37  # no sum up to here overflows


@dataclass(frozen=True)
class Codes:
    """A matrix in 8 bit integers, with what bounds the error of each row.

    Attributes:
        packed: The integers, `[V, H]`.
        scales: `[V]`, what one step of a row's integers stands for.
        per_norm: `[V]`, error of a score for each unit of a state's norm.
        per_rest: `[V]`, error of a score for each unit of the norm of what a state's integers miss.
        per_score: `[V]`, error that every score has.
        bias: `[V]`, added to scores, or None.
        largest_norm: Of a row.
    """

    packed: PackedRows
    scales: FloatArray
    per_norm: FloatArray
    per_rest: FloatArray
    per_score: FloatArray
    bias: FloatArray | None
    largest_norm: float

    @property
    def nbytes(self) -> int:
        """Bytes of memory: a quarter of the matrix in fp32, and 16 to 20 bytes a row."""
        parts = (self.packed, self.scales, self.per_norm, self.per_rest, self.per_score)
        return sum(part.nbytes for part in parts)


def encoded(
    read: Callable[[slice], FloatArray], V: int, bias: FloatArray | None, threads: int | None
) -> Codes:
    """Codes of a matrix.

    Args:
        read: Some rows of the matrix, `[n, H]` float32.
        V: Number of rows.
        bias: `[V]` float32, or None.
        threads: Of ONNX Runtime; None for one a core.
    """
    H = read(slice(0, 1)).shape[1]
    packed = PackedRows(exact_levels(threads), threads)
    scales, norms, rests, kept = (np.zeros(V, np.float32) for _ in range(4))
    for first in range(0, V, PACKED_ROWS):
        part = slice(first, min(first + PACKED_ROWS, V))
        rows = read(part)
        is_finite = np.isfinite(np.abs(rows).max(1))
        if not is_finite.all():
            rows = np.where(is_finite[:, None], rows, np.float32(0))
        scale = np.maximum(np.abs(rows).max(1) / np.float32(LEVELS), TINY)
        integers = np.clip(np.rint(rows / scale[:, None]), -LEVELS, LEVELS)
        packed.add(integers.astype(np.int8))
        integers *= scale[:, None]
        kept[part] = _norms(integers)
        norms[part] = _norms(rows)
        rests[part] = np.where(is_finite, _norms(rows - integers), np.float32(np.inf))
        scales[part] = scale
    rounded = np.float32((2 * H + 64) * UNIT)
    per_score = np.full(V, TINY, np.float32)
    if bias is not None:
        per_score += 16 * UNIT * np.abs(bias)
    return Codes(
        packed,
        scales,
        per_norm=SLACK * (rests + rounded * norms) + TINY,
        per_rest=SLACK * kept + TINY,
        per_score=per_score,
        bias=bias,
        largest_norm=float(norms.max(initial=0)),
    )


def scan(
    codes: Codes,
    states: FloatArray,
    exact: Exact,
    *,
    k: int | None,
    activation: Activation,
    always: npt.NDArray[np.int32] | None = None,
) -> FloatArray | None:
    """Scores of all columns that a selection may keep, -inf for the others.

    Whatever selection of at most k columns by score, joined with `always`, is made of the result:
    it is that of the full scores, with the same bits.

    Args:
        codes: Of the matrix.
        states: `[P, H]` float32 of one item, P of at least 1.
        exact: The scores of given columns, ascending, in fp32 and with the bias.
        k: How many columns are kept, or None for all with a weight.
        activation: Turns scores into weights; with all but `elu1p` only scores above 0 have one.
        always: Columns whose score is wanted in any case, in any order.

    Returns:
        `[V]` float32; or None where a scan decides nothing: too many columns are left, a number is
        not finite, or all columns have a weight. Then the scores are to be computed as ever.
    """
    V = len(codes.scales)
    most = int(MOST_SHARE * V)
    floor = -np.inf if activation == "elu1p" else 0.0
    if (k is None or k > most) and floor < 0:
        return None
    bounds = _bounds(codes, states)
    if bounds is None:
        return None
    near, above = bounds
    scores = np.full(V, -np.inf, np.float32)
    done = np.zeros(V, bool)

    def compute(columns: Columns) -> FloatArray:
        done[columns] = True
        scores[columns] = found = exact(columns)
        return found

    wanted = ~(above < floor)  # `not below`, here and later, so that NaN is never dropped
    if k is not None and np.count_nonzero(wanted) > k:
        if k > most:
            return None
        best = np.flatnonzero(~(near < np.partition(near, V - k)[V - k]))[:k]
        least = compute(best).min()
        if np.isnan(least):
            return None
        wanted &= ~(above < least)
    if np.count_nonzero(wanted) > most:
        return None
    if always is not None:
        wanted[always] = True
    left = np.flatnonzero(wanted & ~done)
    if left.size:
        compute(left)
    return scores


def _bounds(codes: Codes, states: FloatArray) -> tuple[FloatArray, FloatArray] | None:
    """Score of each column by its integers, and a bound that its score in fp32 keeps below."""
    packed, levels = codes.packed, codes.packed.levels
    largest = np.abs(states).max(initial=0)
    if not levels or not np.isfinite(largest):
        return None
    scale = np.maximum(largest / np.float32(levels), TINY)
    integers = np.clip(np.rint(states / scale), -levels, levels)
    tokens = (integers + packed.zero).astype(np.uint8)
    integers *= scale
    norm = _norms(states).max()
    rest = _norms(states - integers).max() + 8 * UNIT * norm
    if not float(norm) * codes.largest_norm < LARGEST_PRODUCT:
        return None
    near = packed.largest(tokens).astype(np.float32)
    near *= codes.scales * scale
    if codes.bias is not None:
        near += codes.bias
    above = codes.per_norm * norm
    above += codes.per_rest * rest
    above += codes.per_score
    above += near
    return near, above


def _norms(rows: FloatArray) -> FloatArray:
    """Norms of rows, rounded up: none is below the true one."""
    with np.errstate(over="ignore"):
        squares = np.einsum("ij,ij->i", rows, rows)
    norms: FloatArray = np.sqrt(squares) * np.float32(1 + (rows.shape[1] + 64) * UNIT)
    norms += TINY_NORM
    return norms
