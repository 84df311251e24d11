"""Top-k selection on the CPU: a threshold for each row by quickselect, then one pass that keeps.

Rows are not sorted. Only rows with ties at their threshold, or with NaN, take a second pass. Memory
above input and result: about 10 bytes for each logit of a block of `_BLOCK_LOGITS`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vdr_db.kernels.activation import Activation, activate, check_activation
from vdr_db.kernels.arguments import Lexical, check_selection
from vdr_db.kernels.reference import Selection, keep_first_largest

__all__ = ["select_topk"]

# Rows are taken in blocks of about this many logits: 16 rows of BERT's vocabulary, 2 MB, which
# stay in cache from the quickselect to the pass that keeps.
_BLOCK_LOGITS = 1 << 19


@torch.no_grad()
def select_topk(
    logits: Tensor,
    k: int | None,
    *,
    activation: Activation,
    lexical: Lexical | None = None,
) -> Selection:
    """`reference.select_topk` for tensors in main memory."""
    check_selection(logits, k, lexical)
    check_activation(activation)
    B, V = logits.shape
    step = max(1, _BLOCK_LOGITS // max(V, 1))
    counts = [torch.zeros(1, dtype=torch.int64)]
    columns = [torch.empty(0, dtype=torch.int32)]
    weights = [torch.empty(0)]
    for first in range(0, B, step):
        block = logits[first : first + step].contiguous()
        kept = keep_largest(block, V if k is None else k)
        if lexical is not None:
            keep_lexical(kept, block, lexical, first)
        place = kept.view(-1).nonzero()[:, 0]
        weight = activate(block.view(-1)[place], activation).to(torch.float32)
        is_weight = (weight > 0) | weight.isnan()
        if not is_weight.all():
            place, weight = place[is_weight], weight[is_weight]
        row = place.div(V, rounding_mode="floor")
        counts.append(torch.bincount(row, minlength=block.shape[0]))
        columns.append((place - row * V).to(torch.int32))
        weights.append(weight)
    return Selection(torch.cat(counts).cumsum(0), torch.cat(columns), torch.cat(weights))


def keep_largest(logits: Tensor, k: int) -> Tensor:
    """Mask of the k largest logits of each row, the first columns among equal ones; no -inf.

    Args:
        logits: `[rows, V]`.
        k: 1 to V.

    Returns:
        `[rows, V]`, bool.
    """
    V = logits.shape[1]
    if k == V:
        return (logits > -torch.inf) | logits.isnan()
    largest = torch.topk(logits, k, dim=1, sorted=False).values
    # No finite number is below this one, so a threshold of -inf keeps all that is not -inf.
    threshold = largest.amin(1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    kept = logits >= threshold
    special = largest.isnan().any(1)  # topk counts NaN as largest, so a row with NaN shows it here
    # Counting all kept is one fast pass, counting them row by row is not: only if there are ties.
    if torch.count_nonzero(kept) != torch.count_nonzero(largest >= threshold):
        special |= torch.count_nonzero(kept, dim=1) > k
    if special.any():
        rows = special.nonzero()[:, 0]
        kept[rows] = keep_first_largest(logits[rows], k)
    return kept


def keep_lexical(kept: Tensor, logits: Tensor, lexical: Lexical, first: int) -> None:
    """Sets the lexical columns of a block of rows that starts at row `first`, but for -inf."""
    indptr, columns = lexical
    bounds = indptr[first : first + kept.shape[0] + 1]
    rows = torch.repeat_interleave(torch.arange(kept.shape[0]), bounds.diff())
    wanted = columns[int(bounds[0]) : int(bounds[-1])].long()
    kept[rows, wanted] = logits[rows, wanted] != -torch.inf
