"""The definition of both operations, in eager torch; every other implementation is measured by it.

    logits[b, v] = max over tokens l of document b of hidden[l] . weight[v]  + bias[v]

Holds the products of one document at a time, `[L, V]`. Float64 inputs are computed in float64, all
others in float32. Differentiable by torch itself.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from vdr_db.errors import ShapeError
from vdr_db.kernels.activation import Activation, activate, check_activation
from vdr_db.kernels.arguments import (
    Lexical,
    argmax_dtype,
    check_kept,
    check_pool,
    check_selection,
    document_bounds,
)

__all__ = ["Pooled", "Selection", "activate", "gather_kept", "project_pool", "select_topk"]


class Pooled(NamedTuple):
    """Largest product of each document with each row of the vocabulary matrix.

    Attributes:
        logits: `[B, V]`, float32 (float64 for float64 inputs); -inf in a document without tokens.
        argmax: `[B, V]`, int32, or None if not asked for: position within the document of the first
            token that reaches the maximum; -1 in a document without tokens. int16 where the caller
            gave a `max_length` of at most 32,767.
    """

    logits: Tensor
    argmax: Tensor | None


class Selection(NamedTuple):
    """Kept columns of each row, compressed (CSR).

    Attributes:
        indptr: `[B + 1]`, int64; row b is `columns[indptr[b]:indptr[b + 1]]`.
        columns: `[nnz]`, int32, ascending and unique within a row.
        weights: `[nnz]`, float32, greater than 0, or NaN where the logit is.
    """

    indptr: Tensor
    columns: Tensor
    weights: Tensor


def project_pool(
    hidden: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    return_argmax: bool = False,
    max_length: int | None = None,
) -> Pooled:
    """`vdr_db.kernels.project_pool`, which documents arguments and errors, by definition.

    Waits for the device, to check that `cu_seqlens` is a running sum up to T.
    """
    check_pool(hidden, cu_seqlens, weight, bias)
    T, V = hidden.shape[0], weight.shape[0]
    dtype = compute_dtype(hidden, weight)
    bounds = document_bounds(cu_seqlens, T, max_length)
    matrix = weight.to(dtype).T  # [H, V]
    rows, positions = [], []
    for start, end in itertools.pairwise(bounds):
        if start == end:
            rows.append(matrix.new_full((V,), -torch.inf))
            positions.append(torch.full((V,), -1, device=hidden.device))
            continue
        products = hidden[start:end].to(dtype) @ matrix  # [L, V]
        best = products.detach().amax(0)
        is_best = (products.detach() == best) | products.detach().isnan()
        position = first_true(is_best)
        rows.append(products.gather(0, position[None])[0])
        positions.append(position)
    logits = torch.stack(rows) if rows else matrix.new_empty((0, V))
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logits + 0.0  # -0.0 becomes +0.0: equal numbers then have equal bits
    if not return_argmax:
        return Pooled(logits, None)
    argmax = torch.stack(positions) if rows else torch.empty((0, V), device=hidden.device)
    return Pooled(logits, argmax.to(argmax_dtype(max_length)))


def gather_kept(
    pooled: Pooled,
    indptr: Tensor,
    columns: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """`vdr_db.kernels.gather_kept`, which documents arguments and errors, by definition.

    kept[n] = hidden[token that reached the maximum of entry n] . weight[columns[n]]  + bias
    """
    check_pool(hidden, cu_seqlens, weight, bias)
    argmax = kept_argmax(pooled, indptr, columns, cu_seqlens, weight)
    texts, columns = text_of(indptr, columns.shape[0]), columns.long()
    position = argmax[texts, columns].long()
    token = cu_seqlens.long()[texts] + position.clamp(min=0)
    dtype = compute_dtype(hidden, weight)
    # A document without tokens at the end of the batch begins at T, where no token is.
    left = hidden.to(dtype)[token.clamp(max=max(hidden.shape[0] - 1, 0))]
    kept = torch.linalg.vecdot(left, weight.to(dtype)[columns])
    if bias is not None:
        kept = kept + bias.to(dtype)[columns]
    return torch.where(position < 0, -torch.inf, kept)


def kept_argmax(
    pooled: Pooled, indptr: Tensor, columns: Tensor, cu_seqlens: Tensor, weight: Tensor
) -> Tensor:
    """The argmax of `pooled`, checked together with a selection.

    Raises:
        ShapeError: There is none, or sizes, dtypes or devices disagree.
    """
    if pooled.argmax is None:
        raise ShapeError("`pooled` must hold an argmax, got None; pool with `return_argmax=True`.")
    check_kept(pooled.logits, pooled.argmax, indptr, columns, cu_seqlens, weight)
    return pooled.argmax


def text_of(bounds: Tensor, n: int, *, step: int = 1, out_int32: bool = False) -> Tensor:
    """`[n]`: the document of items 0, step, 2 step ... (B behind all), from bounds `[B + 1]`."""
    items = torch.arange(0, n * step, step, device=bounds.device, dtype=bounds.dtype)
    return torch.searchsorted(bounds[1:].contiguous(), items, right=True, out_int32=out_int32)


def select_topk(
    logits: Tensor,
    k: int | None,
    *,
    activation: Activation,
    lexical: Lexical | None = None,
) -> Selection:
    """`vdr_db.kernels.select_topk`, which documents arguments and errors, by definition."""
    check_selection(logits, k, lexical)
    check_activation(activation)
    logits = logits.detach()
    B, V = logits.shape
    kept = keep_first_largest(logits, V if k is None else k)
    if lexical is not None:
        indptr, columns = lexical
        rows = torch.repeat_interleave(torch.arange(B, device=logits.device), indptr.diff())
        kept[rows, columns.long()] = True
    weights = activate(logits, activation).to(torch.float32)
    kept &= logits != -torch.inf
    kept &= (weights > 0) | weights.isnan()
    indptr = torch.zeros(B + 1, dtype=torch.int64, device=logits.device)
    indptr[1:] = kept.sum(1).cumsum(0)
    return Selection(indptr, kept.nonzero()[:, 1].to(torch.int32), weights[kept])


def keep_first_largest(logits: Tensor, k: int) -> Tensor:
    """Mask of the k largest logits of each row, by definition: NaN first, then by value and column.

    Args:
        logits: `[B, V]`.
        k: 1 to V.

    Returns:
        `[B, V]`, bool; never True where a logit is -inf.
    """
    # A stable sort leaves equal logits, so also zeros of either sign, in the order of their
    # columns; torch sorts NaN as largest.
    order = logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, order, True)
    return kept & (logits != -torch.inf)


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Dtype in which products are formed: float64 if an input is, else float32."""
    return torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32


def first_true(mask: Tensor) -> Tensor:
    """Index of the first True along the first axis.

    Args:
        mask: `[L, V]`, bool, with a True in each column.

    Returns:
        `[V]`, int64.
    """
    # argmax leaves open which of several maxima it returns, so the maximum is made unique.
    L = mask.shape[0]
    return (mask * torch.arange(L, 0, -1, device=mask.device)[:, None]).argmax(0)
