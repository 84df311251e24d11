"""From pooled scores in torch to `SparseRows`; shared by encoders of texts and of images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vdr_db.encoders.rows import assemble_rows, lexical_columns
from vdr_db.kernels import Activation, Backend, activate, select_topk
from vdr_db.sparse import SparseRows
from vdr_db.text.vocabulary import Vocabulary

__all__ = ["norms_of", "to_sparse_rows"]

SMALLEST_NORM = 1e-12  # an all-zero vector stays one instead of becoming NaN


def to_sparse_rows(
    logits: Tensor,
    vocabulary: Vocabulary,
    *,
    k: int | None,
    activation: Activation,
    norm: bool = False,
    lexical: SparseRows | None = None,
    backend: Backend = "auto",
    name: Callable[[int], str] = "row {}".format,
) -> SparseRows:
    """The largest scores of each row as weights of token ids.

    Args:
        logits: `[B, V]` float32, pooled scores of the columns of `vocabulary`.
        vocabulary: Which token id each column is.
        k: Columns kept of each row, or None for all with a weight.
        activation: Turns scores into weights.
        norm: Divide by the L2 norm of the whole row, before selection: what is left of a row has a
            norm below 1.
        lexical: B rows of token ids that are kept in any case; their weights do not matter.
        backend: Of the kernel.
        name: Names a row in an error.

    Returns:
        B rows over the token ids of `vocabulary`.

    Raises:
        ConfigError: A weight is not finite; the message names the row.
    """
    selection = select_topk(
        logits,
        k,
        activation=activation,
        lexical=None if lexical is None else _columns(lexical, vocabulary, logits.device),
        backend=backend,
    )
    return assemble_rows(
        selection.indptr.cpu().numpy(),
        selection.columns.cpu().numpy(),
        selection.weights.cpu().numpy(),
        norms_of(logits, activation) if norm else None,
        vocabulary,
        name=name,
    )


def _columns(
    lexical: SparseRows, vocabulary: Vocabulary, device: torch.device
) -> tuple[Tensor, Tensor]:
    indptr, columns = lexical_columns(lexical, vocabulary)
    return torch.tensor(indptr, device=device), torch.tensor(columns, device=device)


def norms_of(logits: Tensor, activation: Activation) -> npt.NDArray[np.float32]:
    """L2 norm of the weights of each row `[B, V]`, `[B]` float32; never 0."""
    # One row at a time: a sum over a whole batch may be cut into other parts in another batch.
    norms = [torch.linalg.vector_norm(activate(row, activation)) for row in logits]
    return torch.stack(norms).clamp_min(SMALLEST_NORM).cpu().numpy().astype(np.float32)
