"""A part of the vocabulary for one batch: what its texts keep, and a sample of the rest.

A score needs an image's weights in the columns U that texts of the batch keep, and its length,
which all columns have a part in. Columns outside of U matter only through their sum, so n of them,
drawn anew for each batch, stand for all:

    |V(p)|^2  =  sum over U of w^2  +  (V - |U|) / n  *  sum over n drawn columns of w^2

The right side has the left side as its mean. With U and n a fifth of the vocabulary, a step takes a
third of the time.

Source: importance sampling of a normaliser, as Bengio and Senecal 2003 (adaptive importance
sampling) and Jean et al. 2015, https://arxiv.org/abs/1412.2007, do it for the softmax.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vdr_db.training.distributed import any_over_ranks, of_first_rank
from vdr_db.training.sparse_ops import GatedRows
from vdr_db.training.vectors import Vectors

__all__ = ["ColumnSample", "sample_columns"]


@dataclass(frozen=True)
class ColumnSample:
    """Columns of one batch.

    Attributes:
        columns: `[S]` int64, ascending.
        counts: `[S]` float32, for how many columns each stands in the length of an image.
    """

    columns: Tensor
    counts: Tensor


def sample_columns(texts: Vectors, size: int) -> tuple[Vectors, ColumnSample]:
    """Gated rows and bags of a batch over its S columns, and which these are; n is `size`."""
    rows = [one for one in (texts.gated, texts.bags) if one is not None]
    width, device = rows[0].width, rows[0].columns.device
    is_kept = torch.zeros(width, dtype=torch.bool, device=device)
    for one in rows:
        is_kept[one.columns] = True
    # Images are scored against the texts of all ranks, so all ranks have the same columns.
    is_kept = any_over_ranks(is_kept)
    others = torch.nonzero(~is_kept)[:, 0]
    # On the CPU: a step draws the same on every device.
    drawn = others[of_first_rank(torch.randperm(len(others))[:size].to(device))]
    columns = torch.cat([torch.nonzero(is_kept)[:, 0], drawn]).sort().values
    each = len(others) / max(1, len(drawn))
    counts = torch.where(is_kept[columns], 1.0, each)

    def renumbered(one: GatedRows | None) -> GatedRows | None:
        if one is None:
            return None
        return replace(one, columns=torch.searchsorted(columns, one.columns), width=len(columns))

    gated, bags = renumbered(texts.gated), renumbered(texts.bags)
    return replace(texts, gated=gated, bags=bags), ColumnSample(columns, counts)
