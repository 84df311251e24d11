"""Lengths of gated rows over all columns, with a gradient at the price of a sample of columns.

A gated row keeps k of V columns but is scaled by the length of the whole row. The value of that
length is known from the selection; its exact gradient would need the pass over all columns that
gating avoids. So columns that a row keeps count exactly, and n columns drawn anew for each batch
stand for those it does not keep:

    d |v|^2  =  sum over kept of d w^2  +  (V - kept) / n'  *  sum over drawn, not kept, of d w^2

with n' how many of the drawn ones the row does not keep. The right side has the left side as its
mean. Leaving the second sum out does harm: all columns then grow together.

Source: importance sampling of a normaliser, as in `vdr_db.training.images.columns`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vdr_db.encoders.selection import SMALLEST_NORM
from vdr_db.training.sparse_ops import GatedRows

__all__ = ["draw_columns", "scaled_to_unit"]


def draw_columns(width: int, size: int, device: torch.device) -> Tensor:
    """`min(size, width)` different columns, int64; the CPU draws, the same for every device."""
    return torch.randperm(width)[:size].to(device)


def scaled_to_unit(kept: GatedRows, weights: Tensor, drawn: Tensor, columns: Tensor) -> GatedRows:
    """Gated rows divided by their lengths over all columns.

    Args:
        kept: B rows, weights with a gradient.
        weights: `[B, V]`, of all columns, without a gradient.
        drawn: `[B, n]`, weights of the drawn columns with a gradient.
        columns: `[n]` int64, which columns these are.

    Returns:
        The same rows; `kept.weights / |weights|`, with the gradient of the module's formula.
    """
    rows, width = kept.rows, kept.width
    is_kept = torch.zeros_like(weights, dtype=torch.bool)
    is_kept[rows, kept.columns] = True
    is_other = ~is_kept[:, columns]
    own = kept.weights.new_zeros(len(kept)).index_add(0, rows, kept.weights.square())
    each = (width - is_kept.sum(dim=1)) / is_other.sum(dim=1).clamp_min(1)
    moving = own + each * (drawn.square() * is_other).sum(dim=1)
    squares = weights.square().sum(dim=1) + moving - moving.detach()
    lengths = squares.clamp_min(SMALLEST_NORM**2).sqrt()
    return replace(kept, weights=kept.weights / lengths[rows])
