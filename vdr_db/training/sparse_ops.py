"""Differentiable pieces for sparse sides: gate, k-sparse gradient, products with dense rows.

A gated side keeps k of V columns of each text. Its gradient touches those k only, so the backward
pass of the head gathers `B k` rows of the vocabulary matrix instead of `B V`. A dense side goes
through `vdr_db.kernels.project_pool`, whose gradient covers all columns. Neither holds `[B, L, V]`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vdr_db.errors import ShapeError
from vdr_db.kernels import Activation, Selection, activate, select_topk

__all__ = ["GatedRows", "gate", "pick_logits", "score", "weigh", "winning_tokens"]

# Pairs (row, column) whose two vectors are gathered at once: 32 MB at H = 128 in float32.
_PAIRS = 1 << 16


@dataclass(frozen=True)
class GatedRows:
    """Sparse rows with weights that carry a gradient, as CSR over the columns of a vocabulary.

    Attributes:
        indptr: `[B + 1]` int64.
        columns: `[nnz]` int64, ascending in each row.
        weights: `[nnz]` float.
        width: V.
    """

    indptr: Tensor
    columns: Tensor
    weights: Tensor
    width: int

    def __len__(self) -> int:
        """B."""
        return self.indptr.shape[0] - 1

    @property
    def rows(self) -> Tensor:
        """`[nnz]` int64, the row of each entry."""
        counts = self.indptr.diff()
        return torch.repeat_interleave(torch.arange(len(self), device=counts.device), counts)

    @staticmethod
    def concat(parts: Sequence[GatedRows]) -> GatedRows:
        """Rows of all parts in order; `parts` is not empty."""
        lengths = torch.cat([part.indptr.diff() for part in parts])
        return GatedRows(
            torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
            torch.cat([part.columns for part in parts]),
            torch.cat([part.weights for part in parts]),
            parts[0].width,
        )

    @staticmethod
    def union(parts: Sequence[GatedRows]) -> GatedRows:
        """Columns of all parts row by row, perhaps twice, without weights; same number of rows."""
        owner = torch.cat([part.rows for part in parts])
        columns = torch.cat([part.columns for part in parts])
        owner, order = owner.sort(stable=True)
        indptr = torch.stack([part.indptr for part in parts]).sum(dim=0)
        return GatedRows(indptr, columns[order], columns.new_ones(len(columns)), parts[0].width)

    def reordered(self, places: Tensor) -> GatedRows:
        """Rows `places[0]`, `places[1]`, ... with their gradient."""
        places = places.to(self.indptr.device)
        lengths = self.indptr.diff()[places]
        indptr = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        source = torch.repeat_interleave(self.indptr[places] - indptr[:-1], lengths)
        source = source + torch.arange(source.shape[0], device=source.device)
        return GatedRows(indptr, self.columns[source], self.weights[source], self.width)

    def to_dense(self) -> Tensor:
        """`[B, V]` with the weights' gradient."""
        dense = self.weights.new_zeros(len(self), self.width)
        return dense.index_put((self.rows, self.columns), self.weights)


class _Weigh(torch.autograd.Function):
    """An activation that keeps its result for the gradient, and nothing else."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, activation: Activation) -> Tensor:
        weights = activate(logits, activation)
        ctx.save_for_backward(weights)
        ctx.activation = activation
        return weights

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weights,) = ctx.saved_tensors
        if ctx.activation == "elu1p":
            slope = weights.clamp(max=1)
        elif ctx.activation == "log1p_relu":
            slope = (-weights).exp() * (weights > 0)
        else:
            slope = (-weights.expm1() - weights).exp() * (weights > 0)
        return gradients[0] * slope, None


def weigh(logits: Tensor, activation: Activation) -> Tensor:
    """Weights of logits, as `vdr_db.kernels.activate`, at one saved tensor for the gradient.

    With y the weight, the slope is min(y, 1) for elu1p, exp(-y) for log1p_relu where y > 0, and
    exp(-expm1(y)) exp(-y) for double_log1p_relu where y > 0.
    """
    if activation == "none":
        return logits
    weights: Tensor = _Weigh.apply(logits, activation)
    return weights


def gate(
    logits: Tensor, k: int | None, *, lexical: tuple[Tensor, Tensor] | None = None
) -> Selection:
    """Which columns a gated side keeps of `[B, V]`: the k largest of a row, and the given ones.

    `lexical` is (indptr `[B + 1]`, columns `[n]`) of the texts' own tokens. The weights of the
    selection are the logits kept, activation aside.
    """
    # elu1p is positive everywhere, so nothing but the selection drops a column.
    return select_topk(logits, k, activation="elu1p", lexical=lexical)


@torch.no_grad()
def winning_tokens(
    hidden: Tensor, spans: Tensor, weight: Tensor, indptr: Tensor, columns: Tensor
) -> Tensor:
    """Which token of its text gives each chosen column its largest logit.

        tokens[n] = argmax over tokens t of the text of entry n of hidden[t] . weight[columns[n]]

    For columns that were chosen by their maxima: their products are computed once more, which costs
    k / V of what the maxima cost; on a CPU, an argmax of all V columns costs as much as the
    products.

    Args:
        hidden: `[T, H]`, float.
        spans: `[B, 2]`, first token of each text, and the one after its last.
        weight: `[V, H]`, float.
        indptr: `[B + 1]`, first entry of each text, and nnz.
        columns: `[nnz]` int64, rows of `weight`.

    Returns:
        `[nnz]` int64, rows of `hidden`; the first of several that are equal.
    """
    tokens = torch.empty_like(columns)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    bounds = zip(spans.tolist(), itertools.pairwise(indptr.tolist()), strict=True)
    # Autocast would round what decides between tokens.
    with torch.autocast(hidden.device.type, enabled=False):
        for (start, stop), (first, last) in bounds:
            if last > first:
                products = weight[columns[first:last]].to(dtype) @ hidden[start:stop].to(dtype).T
                tokens[first:last] = start + products.argmax(dim=1)
    return tokens


class _PickLogits(torch.autograd.Function):
    """hidden[tokens] . weight[columns], without keeping the gathered rows."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor, columns: Tensor
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, tokens, columns)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        picked = torch.empty(tokens.shape, dtype=dtype, device=hidden.device)
        for start in range(0, tokens.shape[0], _PAIRS):
            part = slice(start, start + _PAIRS)
            left, right = hidden[tokens[part]].to(dtype), weight[columns[part]].to(dtype)
            picked[part] = torch.linalg.vecdot(left, right)
        return picked

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, tokens, columns = ctx.saved_tensors
        grad = gradients[0]
        grad_hidden = torch.zeros_like(hidden, dtype=grad.dtype)
        grad_weight = torch.zeros_like(weight, dtype=grad.dtype)
        for start in range(0, tokens.shape[0], _PAIRS):
            part = slice(start, start + _PAIRS)
            share = grad[part, None]
            grad_hidden.index_add_(0, tokens[part], share * weight[columns[part]].to(grad.dtype))
            grad_weight.index_add_(0, columns[part], share * hidden[tokens[part]].to(grad.dtype))
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), None, None


def pick_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, columns: Tensor
) -> Tensor:
    """Logits of chosen pairs of token and column, with a gradient for those pairs only.

        logits[n] = hidden[tokens[n]] . weight[columns[n]] + bias[columns[n]]

    Args:
        hidden: `[T, H]`, float.
        weight: `[V, H]`, float.
        bias: `[V]`, float, or None.
        tokens: `[nnz]` int64, rows of `hidden`.
        columns: `[nnz]` int64, rows of `weight`.

    Returns:
        `[nnz]`, float32 (float64 for float64 inputs).

    Raises:
        ShapeError: `tokens` and `columns` disagree.
    """
    if tokens.shape != columns.shape or tokens.dim() != 1:
        raise ShapeError(
            f"`tokens` and `columns` must both be [nnz], got {tuple(tokens.shape)} and "
            f"{tuple(columns.shape)}; pass the pairs of one selection."
        )
    picked: Tensor = _PickLogits.apply(hidden, weight, tokens, columns)
    return picked if bias is None else picked + bias[columns].to(picked.dtype)


def score(rows: GatedRows, dense: Tensor) -> Tensor:
    """Inner products of sparse rows with dense rows.

        scores[b, m] = sum over kept c of rows.weights[b, c] * dense[m, c]

    The gradient of `rows` covers its entries, that of `dense` the columns that some row keeps.

    Args:
        rows: B rows.
        dense: `[M, V]`, the dtype of the weights.

    Returns:
        `[B, M]`.

    Raises:
        ShapeError: Widths disagree.
    """
    if dense.dim() != 2 or dense.shape[1] != rows.width:
        raise ShapeError(
            f"`dense` must be [M, V] with V = {rows.width}, got {tuple(dense.shape)}; "
            "both sides must come from one vocabulary."
        )
    return F.embedding_bag(
        rows.columns,
        dense.T.contiguous(),
        rows.indptr[:-1],
        mode="sum",
        per_sample_weights=rows.weights,
    )
