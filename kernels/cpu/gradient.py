"""Gradient of projection and max pooling on the CPU: sums of gathered rows, found by the argmax.

A maximum passes its gradient to one token, so with token(b, v) = first token of b + argmax[b, v]

    grad_weight[v] = sum over b of grad[b, v] * hidden[token(b, v)]
    grad_hidden[t] = sum over (b, v) with token(b, v) = t of grad[b, v] * weight[v]

Both are sums over bags of rows (`torch.embedding_bag`), 2 B V H operations each instead of 2 T V H,
and fewer where the gradient is 0. Pairs are sorted by token, stably, and each bag is summed by one
thread in one order: two runs give the same bits. Memory above the results: about 40 bytes for each
of at most `_PAIRS` pairs, and the partial sums of long bags. `backward_sparse` takes the gradient
of kept entries only: the same sums over nnz pairs.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from vdr_db.errors import ShapeError
from vdr_db.kernels.arguments import document_bounds
from vdr_db.kernels.reference import compute_dtype, text_of

__all__ = ["backward", "backward_sparse"]

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]

# Pairs (b, v) taken at once: more documents, or more columns, go in several rounds.
_PAIRS = 1 << 20
# Bags longer than this are summed in parts, then the parts: a [CLS] token may win thousands of
# columns, which would keep one thread busy alone and add up rounding errors.
_BAG = 256
# Below this share of non-zero gradients, listing the pairs costs less than the zeros would.
_SPARSE = 0.3


@torch.no_grad()
def backward(
    grad_logits: Tensor,
    argmax: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> Gradients:
    """Gradients of the inputs of `reference.project_pool`.

    Args:
        grad_logits: `[B, V]`, float.
        argmax: `[B, V]`, int16 or int32, from the forward pass.
        hidden: `[T, H]`, as in the forward pass.
        cu_seqlens: `[B + 1]`, as in the forward pass.
        weight: `[V, H]`, as in the forward pass.
        need_hidden: Compute the first result.
        need_weight: Compute the second.
        need_bias: Compute the third.

    Returns:
        Gradients of hidden `[T, H]` and weight `[V, H]` in their dtypes, and of bias `[V]` in that
        of `grad_logits`; None where not needed.
    """
    bounds = document_bounds(cu_seqlens, hidden.shape[0])
    dtype = compute_dtype(hidden, weight)
    grad = grad_logits.to(dtype)
    if any(start == end for start, end in itertools.pairwise(bounds)):
        # A document without tokens is -inf whatever the inputs are.
        grad = grad.masked_fill(argmax < 0, 0)
        argmax = argmax.clamp(min=0)
    is_sparse = int(torch.count_nonzero(grad)) < _SPARSE * grad.numel()
    grad_hidden = grad_weight = None
    if need_hidden:
        grad_hidden = gradient_of_hidden(grad, argmax, bounds, weight, is_sparse)
        grad_hidden = grad_hidden.to(hidden.dtype)
    if need_weight:
        grad_weight = gradient_of_weight(grad, argmax, bounds, hidden, weight.dtype, is_sparse)
    grad_bias = grad.sum(0).to(grad_logits.dtype) if need_bias else None
    return grad_hidden, grad_weight, grad_bias


@torch.no_grad()
def backward_sparse(
    grad_values: Tensor,
    indptr: Tensor,
    columns: Tensor,
    argmax_at_kept: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> Gradients:
    """Gradients of the inputs of `reference.gather_kept`.

    Args:
        grad_values: `[nnz]`, float.
        indptr: `[B + 1]`, as in the forward pass.
        columns: `[nnz]`, as in the forward pass.
        argmax_at_kept: `[nnz]`, int16 or int32, position in the document of each entry's maximum.
        hidden: `[T, H]`, as in the forward pass.
        cu_seqlens: `[B + 1]`, as in the forward pass.
        weight: `[V, H]`, as in the forward pass.
        need_hidden: Compute the first result.
        need_weight: Compute the second.
        need_bias: Compute the third.

    Returns:
        As `backward`.

    Raises:
        ShapeError: Sizes disagree.
    """
    T, V, nnz = hidden.shape[0], weight.shape[0], columns.shape[0]
    if grad_values.shape != (nnz,) or argmax_at_kept.shape != (nnz,):
        raise ShapeError(
            f"`grad_values` and `argmax_at_kept` must be [nnz] = [{nnz}] like `columns`, got "
            f"{list(grad_values.shape)} and {list(argmax_at_kept.shape)}; "
            "take them at one selection."
        )
    dtype = compute_dtype(hidden, weight)
    grad_hidden = grad_weight = grad_bias = None
    if need_weight:
        grad_weight = torch.zeros(weight.shape, dtype=weight.dtype)
    if T == 0 or nnz == 0:
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_bias = grad_values.new_zeros(V) if need_bias else None
        return grad_hidden, grad_weight, grad_bias
    # A document without tokens is -inf whatever the inputs are.
    grad = grad_values.to(dtype).masked_fill(argmax_at_kept < 0, 0)
    token = cu_seqlens.long()[text_of(indptr, nnz)] + argmax_at_kept.clamp(min=0)
    token = token.clamp_(max=T - 1).to(torch.int32)
    columns = columns.to(torch.int32)
    if need_hidden:
        by_token, order = token.sort(stable=True)
        starts = starts_of(by_token, T)
        grad_hidden = sum_long_bags(weight, columns[order], starts, grad[order]).to(hidden.dtype)
    if grad_weight is not None:
        by_column, order = columns.sort(stable=True)
        rows, counts = torch.unique_consecutive(by_column, return_counts=True)
        starts = (counts.cumsum(0) - counts).to(torch.int32)
        sums = sum_bags(hidden, token[order], starts, grad[order])
        grad_weight[rows.long()] = sums.to(weight.dtype)
    if need_bias:
        # In float64 and in the order of the entries, so that the sums repeat bit for bit.
        sums = torch.bincount(columns, weights=grad.double(), minlength=V)
        grad_bias = sums.to(grad_values.dtype)
    return grad_hidden, grad_weight, grad_bias


def gradient_of_weight(
    grad: Tensor,
    argmax: Tensor,
    bounds: list[int],
    hidden: Tensor,
    dtype: torch.dtype,
    is_sparse: bool,
) -> Tensor:
    """`[V, H]`, rounded to its dtype once."""
    B, V = grad.shape
    T, H = hidden.shape
    result = torch.empty((V, H), dtype=dtype)
    if T == 0:
        return result.zero_()
    hidden = hidden.to(grad.dtype)
    first_token = torch.tensor(bounds[:-1], dtype=torch.int32)
    step = max(1, _PAIRS // max(B, 1))
    for first in range(0, V, step):
        share = grad[:, first : first + step].T.contiguous()  # [columns, B]
        token = (argmax[:, first : first + step].T + first_token).contiguous()
        # A document without tokens at the end of the batch begins at T; its gradient is 0.
        token.clamp_(max=T - 1)
        if is_sparse:
            place = share.view(-1).nonzero()[:, 0]
            column = place.div(B, rounding_mode="floor")
            starts = starts_of(column, share.shape[0])
            part = sum_bags(hidden, token.view(-1)[place], starts, share.view(-1)[place])
        else:
            starts = torch.arange(share.shape[0], dtype=torch.int32) * B
            part = sum_bags(hidden, token.view(-1), starts, share.view(-1))
        result[first : first + step] = part
    return result


def gradient_of_hidden(
    grad: Tensor, argmax: Tensor, bounds: list[int], weight: Tensor, is_sparse: bool
) -> Tensor:
    """`[T, H]` in the dtype of `grad`."""
    B, V = grad.shape
    result = grad.new_empty((bounds[-1], weight.shape[1]))
    step = max(1, _PAIRS // V)
    for first in range(0, B, step):
        last = min(first + step, B)
        begin, end = bounds[first], bounds[last]
        if begin == end:
            continue
        share = grad[first:last].reshape(-1)
        first_token = torch.tensor(bounds[first:last], dtype=torch.int32)[:, None] - begin
        token = (argmax[first:last] + first_token).view(-1).clamp_(max=end - begin - 1)
        place = share.nonzero()[:, 0] if is_sparse else None
        if place is not None:
            share, token = share[place], token[place]
        # Stable: the columns of a token stay in ascending order.
        token, order = token.sort(stable=True)
        column = (order if place is None else place[order]) % V
        result[begin:end] = sum_long_bags(
            weight, column.to(torch.int32), starts_of(token, end - begin), share[order]
        )
    return result


def starts_of(bag: Tensor, bags: int) -> Tensor:
    """`[bags]` int32: first place of each bag in an ascending list of bag numbers."""
    numbers = torch.arange(bags, dtype=bag.dtype)
    return torch.searchsorted(bag, numbers, out_int32=True)


def sum_long_bags(rows: Tensor, indices: Tensor, starts: Tensor, factors: Tensor) -> Tensor:
    """`sum_bags` in two levels, each bag in parts of at most `_BAG`."""
    ends = torch.cat([starts[1:], starts.new_tensor([indices.shape[0]])])
    parts = (ends - starts + _BAG - 1).div(_BAG, rounding_mode="floor")
    part_starts = parts.cumsum(0, dtype=torch.int32) - parts
    bag = torch.repeat_interleave(torch.arange(len(starts)), parts)
    within = torch.arange(len(bag), dtype=torch.int32) - part_starts[bag]
    sums = sum_bags(rows, indices, starts[bag] + within * _BAG, factors)
    return sum_bags(sums, torch.arange(len(bag), dtype=torch.int32), part_starts, None)


def sum_bags(rows: Tensor, indices: Tensor, starts: Tensor, factors: Tensor | None) -> Tensor:
    """Sum of factors times rows, for each bag.

    Args:
        rows: `[n, H]`, float.
        indices: `[m]`, int32, rows of all bags one after the other.
        starts: `[bags]`, int32, first place of each bag in `indices`.
        factors: `[m]`, float32 or float64, or None for 1.

    Returns:
        `[bags, H]` in the dtype of `factors`, or of `rows`; zeros for an empty bag.
    """
    dtype = rows.dtype if factors is None else factors.dtype
    if starts.shape[0] == 0 or indices.shape[0] == 0:
        return torch.zeros((starts.shape[0], rows.shape[1]), dtype=dtype)
    rows = rows.to(dtype)
    return torch.nn.functional.embedding_bag(
        indices, rows, starts, mode="sum", per_sample_weights=factors
    )
