"""Gradients of the projection and max pooling, deterministic, for all entries and for kept ones.

With a[b, v] the packed token that reached the maximum and g the gradient of the logits:

```
grad_weight[v] = sum over b of g[b, v] * hidden[a[b, v]]
grad_hidden[t] = sum over (b, v) with a[b, v] = t of g[b, v] * weight[v]
grad_bias[v]   = sum over b of g[b, v]
```

`backward` takes g for all entries [B, V]. Long texts gather rows: 2·B·V·H FLOP, about B·V·H
elements read per gradient, lists of B·V int32 and (V / chunk)·T int32 besides. Short texts multiply
one-hot tiles on the matrix unit: 2·T·V·H FLOP, no lists; g is rounded to the input dtype there, as
eager autograd does. `backward_sparse` takes g for nnz kept entries only: B·k instead of B·V rows.

Each row of an output has one owner and one order of addition: results repeat bit for bit. Texts
without tokens get and give nothing. Outputs have the dtype of what they are gradients of (bias:
float32); with `accumulate_into` the weight gradient is added to that tensor, for example to rows
`[offset:]` of a tied embedding's `.grad`, and that tensor is returned.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from vdr_db.errors import ConfigError, ShapeError
from vdr_db.kernels.configs import BackwardTiles, backward_tiles
from vdr_db.kernels.entry_lists import (
    chunk_offsets_kernel,
    count_columns_kernel,
    count_entries_kernel,
    mark_columns_kernel,
    place_columns_kernel,
    place_entries_kernel,
)
from vdr_db.kernels.pooling_backward_kernels import (
    bias_kernel,
    hidden_gather_kernel,
    hidden_merge_kernel,
    hidden_onehot_kernel,
    weight_gather_kernel,
    weight_kept_kernel,
    weight_onehot_kernel,
)
from vdr_db.kernels.primitives import compute_capability, is_interpreted, on_device

__all__ = ["backward", "backward_sparse"]

BLOCK = 256
"""Elements per program of the small integer passes."""
PLACE_BLOCK = 64
"""Entries ranked against each other at once: a [64, 64] comparison fits the registers."""
FILL_PROGRAMS = 256
"""Programs that keep a large device busy; the one-hot hidden gradient splits V to reach them."""
MARKED_TEXTS = 2048
"""Largest batch whose kept entries are ordered by bit marks (B/8 bytes per column)."""

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def backward(
    grad_logits: Tensor,
    argmax: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    need_hidden: bool = True,
    need_weight: bool = True,
    need_bias: bool = False,
    *,
    accumulate_into: Tensor | None = None,
    method: str | None = None,
    tiles: BackwardTiles | None = None,
) -> Gradients:
    """Gradients from the gradient of all logits.

    Args:
        grad_logits: `[B, V]`, any float dtype.
        argmax: `[B, V]` int16 or int32, as `forward` returns it.
        hidden: `[T, H]`, as given to `forward`.
        cu_seqlens: `[B + 1]`, as given to `forward`.
        weight: `[V, H]`, as given to `forward`.
        need_hidden: Compute the gradient of `hidden`.
        need_weight: Compute the gradient of `weight`.
        need_bias: Compute the gradient of the bias.
        accumulate_into: `[V, H]` tensor that the weight gradient is added to, any float dtype.
        method: `"gather"` or `"onehot"`; by default the mean length decides.
        tiles: Run with these tiles instead of the table's.

    Returns:
        Gradients of hidden `[T, H]`, weight `[V, H]` and bias `[V]` float32; None where not needed.

    Raises:
        ConfigError: `method` is unknown.
        ShapeError: Sizes disagree.
    """
    if method not in (None, "gather", "onehot"):
        raise ConfigError(
            f"`method` must be 'gather' or 'onehot', got {method!r}; pass one of these."
        )
    T, V, B = hidden.shape[0], weight.shape[0], cu_seqlens.shape[0] - 1
    if grad_logits.shape != (B, V) or argmax.shape != (B, V):
        raise ShapeError(
            f"`grad_logits` and `argmax` must be [B, V] = ({B}, {V}), got "
            f"{tuple(grad_logits.shape)} and {tuple(argmax.shape)}; "
            "pass the gradient and the argmax of one forward call."
        )
    tiles = tiles or _tiles(hidden)
    grad_hidden, grad_weight, grad_bias = _outputs(
        hidden, weight, need_hidden, need_weight, need_bias, accumulate_into
    )
    if T == 0 or B == 0 or V == 0:
        return _nothing(grad_hidden, grad_weight, grad_bias, accumulate_into)
    grad, argmax = grad_logits.to(torch.float32).contiguous(), argmax.contiguous()
    use_onehot = method == "onehot" or (method is None and tiles.onehot_length >= T / B)
    with on_device(hidden):
        if use_onehot and (need_hidden or need_weight):
            texts = _text_of(cu_seqlens, T)
            if grad_weight is not None:
                is_added = accumulate_into is not None
                _weight_onehot(
                    grad, argmax, hidden, cu_seqlens, texts, grad_weight, tiles, is_added
                )
            if grad_hidden is not None:
                _hidden_onehot(grad, argmax, cu_seqlens, texts, weight, grad_hidden, tiles)
        else:
            if grad_weight is not None:
                is_added = accumulate_into is not None
                _weight_gather(grad, argmax, hidden, cu_seqlens, grad_weight, tiles, is_added)
            if grad_hidden is not None:
                _hidden_gather(grad, None, None, argmax, cu_seqlens, weight, grad_hidden, tiles)
        if grad_bias is not None:
            bias_kernel[(triton.cdiv(V, BLOCK),)](
                grad, argmax, grad_bias, B, V, BLOCK_V=BLOCK, enable_fp_fusion=True
            )
    return grad_hidden, grad_weight, grad_bias


def backward_sparse(
    grad_values: Tensor,
    indptr: Tensor,
    columns: Tensor,
    argmax_at_kept: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    need_hidden: bool = True,
    need_weight: bool = True,
    need_bias: bool = False,
    *,
    accumulate_into: Tensor | None = None,
    tiles: BackwardTiles | None = None,
) -> Gradients:
    """Gradients from the gradient of kept logits only.

    Args:
        grad_values: `[nnz]`, any float dtype: gradient of the logit of each kept entry.
        indptr: `[B + 1]` int32 or int64: text b keeps entries indptr[b] to indptr[b + 1].
        columns: `[nnz]` integer, unique within a text.
        argmax_at_kept: `[nnz]` int16 or int32: position within the text of each entry's maximum.
        hidden: `[T, H]`, as given to `forward`.
        cu_seqlens: `[B + 1]`, as given to `forward`.
        weight: `[V, H]`, as given to `forward`.
        need_hidden: Compute the gradient of `hidden`.
        need_weight: Compute the gradient of `weight`.
        need_bias: Compute the gradient of the bias.
        accumulate_into: `[V, H]` tensor that the weight gradient is added to; only rows with kept
            entries are touched.
        tiles: Run with these tiles instead of the table's.

    Returns:
        Gradients of hidden `[T, H]`, weight `[V, H]` and bias `[V]` float32; None where not needed.

    Raises:
        ShapeError: Sizes disagree.
    """
    T, V, B = hidden.shape[0], weight.shape[0], cu_seqlens.shape[0] - 1
    nnz = columns.shape[0]
    if grad_values.shape != (nnz,) or argmax_at_kept.shape != (nnz,) or indptr.shape != (B + 1,):
        raise ShapeError(
            f"`grad_values` and `argmax_at_kept` must be [nnz] = ({nnz},) like `columns`, `indptr` "
            f"[B + 1] = ({B + 1},), got {tuple(grad_values.shape)}, {tuple(argmax_at_kept.shape)} "
            f"and {tuple(indptr.shape)}; take them at one selection."
        )
    tiles = tiles or _tiles(hidden)
    grad_hidden, grad_weight, grad_bias = _outputs(
        hidden, weight, need_hidden, need_weight, need_bias, accumulate_into
    )
    if T == 0 or nnz == 0:
        return _nothing(grad_hidden, grad_weight, grad_bias, accumulate_into)
    grad, argmax = grad_values.to(torch.float32).contiguous(), argmax_at_kept.contiguous()
    columns = columns.to(torch.int32).contiguous()
    with on_device(hidden):
        if grad_weight is not None or grad_bias is not None:
            texts = _text_of(indptr, nnz)
            order, ends, totals = _entries_by_column(columns, texts, B, V)
            block_h = _block_h(hidden.shape[1], 1024)
            parts = triton.cdiv(hidden.shape[1], block_h) if grad_weight is not None else 1
            weight_kept_kernel[(V, parts)](
                grad,
                argmax,
                hidden,
                cu_seqlens,
                texts,
                order,
                ends,
                totals,
                grad_weight,
                grad_bias,
                *hidden.stride(),
                *(hidden.stride() if grad_weight is None else grad_weight.stride()),
                H=hidden.shape[1],
                BLOCK_H=block_h,
                ROWS=4,
                NEED_WEIGHT=grad_weight is not None,
                NEED_BIAS=grad_bias is not None,
                ADD=accumulate_into is not None,
                num_warps=tiles.gather_warps,
                enable_fp_fusion=True,
            )
        if grad_hidden is not None:
            _hidden_gather(grad, indptr, columns, argmax, cu_seqlens, weight, grad_hidden, tiles)
    return grad_hidden, grad_weight, grad_bias


def _tiles(hidden: Tensor) -> BackwardTiles:
    """The table's tiles for a device and dtype."""
    return backward_tiles(compute_capability(hidden), hidden.element_size() * 8)


def _outputs(
    hidden: Tensor,
    weight: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    accumulate_into: Tensor | None,
) -> Gradients:
    """Unwritten outputs; every kernel path writes every element."""
    if accumulate_into is not None and accumulate_into.shape != weight.shape:
        raise ShapeError(
            f"`accumulate_into` must be [V, H] = {tuple(weight.shape)}, "
            f"got {tuple(accumulate_into.shape)}; slice it as `weight` is sliced."
        )
    device = hidden.device
    grad_weight = None
    if need_weight:
        grad_weight = accumulate_into
        if grad_weight is None:
            grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=device)
    return (
        torch.empty(hidden.shape, dtype=hidden.dtype, device=device) if need_hidden else None,
        grad_weight,
        torch.empty(weight.shape[0], dtype=torch.float32, device=device) if need_bias else None,
    )


def _nothing(
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    accumulate_into: Tensor | None,
) -> Gradients:
    """Zero gradients, for batches without entries."""
    if grad_hidden is not None:
        grad_hidden.zero_()
    if grad_weight is not None and accumulate_into is None:
        grad_weight.zero_()
    if grad_bias is not None:
        grad_bias.zero_()
    return grad_hidden, grad_weight, grad_bias


def _text_of(bounds: Tensor, n: int) -> Tensor:
    """Text [n] int32 that each token or entry belongs to, from its bounds [B + 1]."""
    items = torch.arange(n, device=bounds.device, dtype=bounds.dtype)
    return torch.searchsorted(bounds[1:], items, right=True, out_int32=True)


def _block_h(H: int, most: int) -> int:
    """Hidden dimensions per gathering program: a power of 2 that fits H, at most `most`."""
    return min(most, max(16, int(triton.next_power_of_2(H))))


def _weight_gather(
    grad: Tensor,
    argmax: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    output: Tensor,
    tiles: BackwardTiles,
    is_added: bool,
) -> None:
    """Weight gradient of all entries by gathering tokens."""
    B, V = grad.shape
    H = hidden.shape[1]
    block_h = _block_h(H, tiles.gather_h)
    weight_gather_kernel[(triton.cdiv(V, tiles.weight_v), triton.cdiv(H, block_h))](
        grad,
        argmax,
        hidden,
        cu_seqlens,
        output,
        B,
        V,
        *hidden.stride(),
        *output.stride(),
        H=H,
        BLOCK_V=tiles.weight_v,
        BLOCK_H=block_h,
        ADD=is_added,
        num_warps=tiles.gather_warps,
        enable_fp_fusion=True,
    )


def _weight_onehot(
    grad: Tensor,
    argmax: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    texts: Tensor,
    output: Tensor,
    tiles: BackwardTiles,
    is_added: bool,
) -> None:
    """Weight gradient of all entries on the matrix unit."""
    H, V = hidden.shape[1], grad.shape[1]
    weight_onehot_kernel[(triton.cdiv(V, tiles.onehot_m), triton.cdiv(H, tiles.onehot_h))](
        grad,
        argmax,
        hidden,
        cu_seqlens,
        texts,
        output,
        grad.shape[0],
        V,
        *hidden.stride(),
        *output.stride(),
        H=H,
        BLOCK_M=tiles.onehot_m,
        BLOCK_H=tiles.onehot_h,
        BLOCK_K=tiles.onehot_k,
        ADD=is_added,
        UPCAST=hidden.dtype == torch.bfloat16 and is_interpreted(weight_onehot_kernel),
        PRECISION="tf32x3",
        num_warps=tiles.onehot_warps,
        num_stages=tiles.onehot_stages,
        enable_fp_fusion=True,
    )


def _hidden_onehot(
    grad: Tensor,
    argmax: Tensor,
    cu_seqlens: Tensor,
    texts: Tensor,
    weight: Tensor,
    output: Tensor,
    tiles: BackwardTiles,
) -> None:
    """Hidden gradient of all entries on the matrix unit, V split when there are few tokens."""
    T, H, V = output.shape[0], output.shape[1], weight.shape[0]
    programs = triton.cdiv(T, tiles.onehot_m) * triton.cdiv(H, tiles.onehot_h)
    n_splits = min(triton.cdiv(FILL_PROGRAMS, programs), triton.cdiv(V, tiles.onehot_k), 32)
    split_v = triton.cdiv(triton.cdiv(V, n_splits), tiles.onehot_k) * tiles.onehot_k
    n_splits = triton.cdiv(V, split_v)
    parts = output[None]
    if n_splits > 1:
        parts = torch.empty((n_splits, T, H), dtype=torch.float32, device=output.device)
    hidden_onehot_kernel[
        (triton.cdiv(T, tiles.onehot_m), triton.cdiv(H, tiles.onehot_h), n_splits)
    ](
        grad,
        argmax,
        weight,
        cu_seqlens,
        texts,
        parts,
        grad.shape[0],
        T,
        V,
        split_v,
        *weight.stride(),
        *parts.stride(),
        H=H,
        BLOCK_M=tiles.onehot_m,
        BLOCK_H=tiles.onehot_h,
        BLOCK_K=tiles.onehot_k,
        UPCAST=weight.dtype == torch.bfloat16 and is_interpreted(hidden_onehot_kernel),
        PRECISION="tf32x3",
        num_warps=tiles.onehot_warps,
        num_stages=tiles.onehot_stages,
        enable_fp_fusion=True,
    )
    if n_splits > 1:
        output.copy_(parts.sum(0))


def _hidden_gather(
    grad: Tensor,
    indptr: Tensor | None,
    columns: Tensor | None,
    argmax: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    output: Tensor,
    tiles: BackwardTiles,
) -> None:
    """Hidden gradient by walking each token's list; of all entries, or of kept ones."""
    T, H, V = output.shape[0], output.shape[1], weight.shape[0]
    order, ends, totals = _entries_by_token(argmax, indptr, cu_seqlens, T, V, tiles.chunk)
    n_splits = torch.clamp((totals + (tiles.split - 1)) // tiles.split, min=1)
    slot_ends = n_splits.cumsum(0)
    spill_ends = torch.where(n_splits > 1, n_splits, 0).cumsum(0)
    # Bounds known without a look at device memory: only lists longer than `split` are split.
    n_slots = T + argmax.numel() // tiles.split
    spill = torch.empty(
        (2 * (argmax.numel() // tiles.split), H), dtype=torch.float32, device=output.device
    )
    slots = torch.arange(n_slots, device=output.device)
    slot_tokens = torch.searchsorted(slot_ends, slots, right=True, out_int32=True)
    block_h = _block_h(H, tiles.gather_h)
    grid = (n_slots, triton.cdiv(H, block_h))
    hidden_gather_kernel[grid](
        grad,
        columns,
        weight,
        _text_of(cu_seqlens, T),
        order,
        ends,
        totals,
        slot_tokens,
        slot_ends,
        spill_ends,
        spill,
        output,
        T,
        V,
        *weight.stride(),
        *output.stride(),
        H=H,
        BLOCK_H=block_h,
        ROWS=tiles.rows,
        SPLIT=tiles.split,
        HAS_COLUMNS=columns is not None,
        num_warps=tiles.gather_warps,
        enable_fp_fusion=True,
    )
    if spill.shape[0]:
        hidden_merge_kernel[grid](
            totals,
            slot_tokens,
            slot_ends,
            spill_ends,
            spill,
            output,
            T,
            *output.stride(),
            H=H,
            BLOCK_H=block_h,
            SPLIT=tiles.split,
            num_warps=tiles.gather_warps,
            enable_fp_fusion=True,
        )


def _entries_by_token(
    argmax: Tensor, indptr: Tensor | None, cu_seqlens: Tensor, T: int, V: int, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Entry numbers listed by token, ascending: order, end of each list, and its length."""
    device, B = argmax.device, cu_seqlens.shape[0] - 1
    n_chunks = triton.cdiv(V, chunk)
    counts = torch.zeros((n_chunks, T), dtype=torch.int32, device=device)
    totals = torch.empty(T, dtype=torch.int32, device=device)
    order = torch.empty(argmax.numel(), dtype=torch.int32, device=device)
    has_indptr = indptr is not None
    count_entries_kernel[(B * n_chunks,)](
        argmax,
        indptr,
        cu_seqlens,
        counts,
        T,
        V,
        n_chunks,
        HAS_INDPTR=has_indptr,
        CHUNK=chunk,
        enable_fp_fusion=True,
    )
    chunk_offsets_kernel[(triton.cdiv(T, BLOCK),)](
        counts, totals, T, n_chunks, BLOCK=BLOCK, enable_fp_fusion=True
    )
    ends = totals.cumsum(0)
    block = min(PLACE_BLOCK, chunk)
    place_entries_kernel[(B * n_chunks * (chunk // block),)](
        argmax,
        indptr,
        cu_seqlens,
        counts,
        ends,
        totals,
        order,
        T,
        V,
        n_chunks,
        HAS_INDPTR=has_indptr,
        CHUNK=chunk,
        BLOCK=block,
        enable_fp_fusion=True,
    )
    return order, ends, totals


def _entries_by_column(
    columns: Tensor, texts: Tensor, B: int, V: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Kept entry numbers listed by column, ascending: order, end of each list, and its length."""
    device, nnz = columns.device, columns.shape[0]
    if B > MARKED_TEXTS:
        ordered, order = columns.sort(stable=True)
        ends = torch.searchsorted(ordered, torch.arange(V, device=device), right=True)
        totals = torch.diff(ends, prepend=ends.new_zeros(1))
        return order, ends, totals
    n_words = triton.cdiv(B, 32)
    bits = torch.zeros((V, n_words), dtype=torch.int32, device=device)
    before = torch.empty_like(bits)
    totals = torch.empty(V, dtype=torch.int32, device=device)
    order = torch.empty(nnz, dtype=torch.int32, device=device)
    grid = (triton.cdiv(nnz, BLOCK),)
    mark_columns_kernel[grid](
        columns, texts, bits, nnz, n_words, BLOCK=BLOCK, enable_fp_fusion=True
    )
    count_columns_kernel[(triton.cdiv(V, BLOCK),)](
        bits, before, totals, V, n_words, BLOCK=BLOCK, enable_fp_fusion=True
    )
    ends = totals.cumsum(0)
    place_columns_kernel[grid](
        columns,
        texts,
        bits,
        before,
        ends,
        totals,
        order,
        nnz,
        n_words,
        BLOCK=BLOCK,
        enable_fp_fusion=True,
    )
    return order, ends, totals
