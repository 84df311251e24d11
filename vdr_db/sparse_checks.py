"""What `SparseRows` checks of its arrays, once, when it is made."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from vdr_db.errors import InputError, ShapeError

__all__ = [
    "IdArray",
    "IntArray",
    "WeightArray",
    "checked_arrays",
    "row_pointers",
]

IntArray: TypeAlias = npt.NDArray[np.int64]
IdArray: TypeAlias = npt.NDArray[np.int32]
WeightArray: TypeAlias = npt.NDArray[np.float32]


def checked_arrays(
    indptr: npt.ArrayLike, indices: npt.ArrayLike, values: npt.ArrayLike, width: int
) -> tuple[IntArray, IdArray, WeightArray, int]:
    """The arrays of `SparseRows` in their dtypes, and the width, once all invariants hold.

    Raises:
        ShapeError: Sizes or dtypes disagree.
        InputError: An index is out of range, repeated or out of order, or a value is not a finite
            number greater than 0; the message names the row.
    """
    width = checked_width(width)
    pointers = _integers(indptr, "indptr", np.int64)
    ids = _integers(indices, "indices", np.int32, width)
    weights = _weights(values)
    if pointers.size == 0 or pointers[0] != 0 or np.any(np.diff(pointers) < 0):
        raise ShapeError(
            "`indptr` must start at 0 and never fall, got "
            f"{_short(pointers)}; it holds the running count of entries, one more than rows."
        )
    if not (pointers[-1] == ids.size == weights.size):
        raise ShapeError(
            "`indices` and `values` must both have `indptr[-1]` entries, got "
            f"indptr[-1] = {pointers[-1]}, {ids.size} indices and {weights.size} values."
        )
    _check_entries(pointers, ids, weights, width)
    return pointers, ids, weights, width


def row_pointers(counts: IntArray) -> IntArray:
    """Running sum of counts `[N]`, from 0: `[N + 1]` int64."""
    pointers = np.zeros(counts.size + 1, np.int64)
    np.cumsum(counts, out=pointers[1:])
    return pointers


def _short(array: npt.NDArray[Any]) -> str:
    return np.array2string(array, threshold=6, edgeitems=3)


def checked_width(width: int) -> int:
    if isinstance(width, bool) or not isinstance(width, (int, np.integer)):
        raise ShapeError(f"`width` must be an integer, got {width!r}; it is the vocabulary size.")
    if not 1 <= width <= np.iinfo(np.int32).max:
        raise ShapeError(f"`width` must lie in [1, 2^31), got {width}; it is the vocabulary size.")
    return int(width)


def _flat(array: npt.ArrayLike, name: str) -> npt.NDArray[Any]:
    flat = np.asarray(array)
    if flat.ndim != 1:
        raise ShapeError(f"`{name}` must be a flat array, got shape {list(flat.shape)}.")
    return flat


def _integers(
    array: npt.ArrayLike, name: str, dtype: Any, width: int | None = None
) -> npt.NDArray[Any]:
    flat = _flat(array, name)
    if flat.size and not np.issubdtype(flat.dtype, np.integer):
        raise ShapeError(f"`{name}` must hold integers, got {flat.dtype}.")
    if width is not None and flat.size and (flat.min() < 0 or flat.max() >= width):
        bad = int(flat.min()) if flat.min() < 0 else int(flat.max())
        raise InputError(
            f"token ids must lie in [0, {width}), got {bad}; the rows come from another vocabulary."
        )
    return np.ascontiguousarray(flat, dtype=dtype)


def _weights(array: npt.ArrayLike) -> WeightArray:
    flat = _flat(array, "values")
    if flat.size and not (
        np.issubdtype(flat.dtype, np.floating) or np.issubdtype(flat.dtype, np.integer)
    ):
        raise ShapeError(f"`values` must hold real numbers, got {flat.dtype}.")
    with np.errstate(over="ignore", under="ignore"):
        return np.ascontiguousarray(flat, dtype=np.float32)


def _check_entries(indptr: IntArray, indices: IdArray, values: WeightArray, width: int) -> None:
    good = np.isfinite(values) & (values > 0)
    if not good.all():
        at = int(np.flatnonzero(~good)[0])
        row = int(np.searchsorted(indptr, at, side="right")) - 1
        raise InputError(
            f"weights must be finite and greater than 0 in float32, got {values[at]} for token id "
            f"{indices[at]} in row {row}; leave absent tokens out, and look for NaN in the model."
        )
    if indices.size > 1:
        rises = indices[1:] > indices[:-1]
        rises[indptr[1:-1][(indptr[1:-1] > 0) & (indptr[1:-1] < indices.size)] - 1] = True
        if not rises.all():
            at = int(np.flatnonzero(~rises)[0]) + 1
            row = int(np.searchsorted(indptr, at, side="right")) - 1
            raise InputError(
                "token ids of a row must be unique and ascending, got "
                f"{indices[at - 1]} before {indices[at]} in row {row}; "
                "sort them and join repeated ones first."
            )
