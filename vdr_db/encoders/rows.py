"""From selected columns to `SparseRows`, whichever runtime selected them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from vdr_db.errors import ConfigError
from vdr_db.kernels import Activation
from vdr_db.kernels.plain import norm_of, select_topk
from vdr_db.sparse import SparseRows
from vdr_db.text.vocabulary import Vocabulary

__all__ = ["assemble_rows", "lexical_columns", "row_of", "scaled"]


def row_of(
    logits: npt.NDArray[np.float32],
    vocabulary: Vocabulary,
    *,
    k: int | None,
    activation: Activation,
    norm: bool = False,
    lexical: npt.NDArray[np.int32] | None = None,
    name: str = "row 0",
) -> SparseRows:
    """The largest scores of one item as weights of token ids, without torch.

    Args:
        logits: `[V]` pooled scores of the columns of `vocabulary`.
        vocabulary: Which token id each column is.
        k: Columns kept, or None for all with a weight.
        activation: Turns scores into weights.
        norm: Divide by the L2 norm of the whole row, before selection.
        lexical: `[n]` columns that are kept in any case.
        name: Of the item, in an error.

    Returns:
        One row over the token ids of `vocabulary`.

    Raises:
        ConfigError: A weight is not finite; the message names the item.
    """
    columns, weights = select_topk(logits, k, activation=activation, lexical=lexical)
    norms = norm_of(logits[None], activation) if norm else None
    indptr = np.array([0, columns.size], np.int64)
    return assemble_rows(indptr, columns, weights, norms, vocabulary, name=lambda _: name)


def assemble_rows(
    indptr: npt.NDArray[np.int64],
    columns: npt.NDArray[np.int32],
    weights: npt.NDArray[np.float32],
    norms: npt.NDArray[np.float32] | None,
    vocabulary: Vocabulary,
    *,
    name: Callable[[int], str],
) -> SparseRows:
    """Rows over token ids from a selection in main memory.

    Args:
        indptr: `[B + 1]`.
        columns: `[nnz]`, of the vocabulary.
        weights: `[nnz]`.
        norms: `[B]` to divide each row by, or None.
        vocabulary: Which token id each column is.
        name: Names a row in an error.

    Raises:
        ConfigError: A weight is not finite; the message names the row.
    """
    if norms is not None:
        scales = np.repeat(norms, np.diff(indptr))
        weights = np.asarray(weights / scales, np.float32)
    if not np.isfinite(weights).all():
        first = int(np.flatnonzero(~np.isfinite(weights))[0])
        row = int(np.searchsorted(indptr, first, side="right")) - 1
        raise ConfigError(
            f"the vector of {name(row)} must be finite, got a weight of {weights[first]}: the "
            "model's weights hold NaN or infinity, or overflow in their dtype; load the model "
            "with precision='float32', or fetch it again."
        )
    kept = weights > 0  # a division can round a weight to zero
    if not kept.all():
        running = np.concatenate([[0], np.cumsum(kept)])
        indptr, columns, weights = running[indptr], columns[kept], weights[kept]
    return SparseRows(indptr, vocabulary.column_to_id[columns], weights, vocabulary.size)


def lexical_columns(
    lexical: SparseRows, vocabulary: Vocabulary
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Bounds `[B + 1]` and columns `[n]` of token ids that are kept in any case."""
    return lexical.indptr, vocabulary.id_to_column[lexical.indices]


def scaled(rows: SparseRows, factor: float | None) -> SparseRows:
    """Rows with all weights multiplied by a factor above 0; None leaves them as they are."""
    if factor is None:
        return rows
    values = rows.values * np.float32(factor)
    return SparseRows(rows.indptr, rows.indices, values, rows.shape[1])
