"""Launches of the gradient kernels: grids, strides and work memory; no policy.

`pooling_backward` decides which of them run. Arguments that recur: `grad` and `argmax` are float32
and int16 or int32, contiguous, `[B, V]` or `[nnz]`; `texts` holds the text of each token or entry;
`output` is written.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from vdr_db.kernels.cuda.backward_kernels import (
    bias_kernel,
    hidden_gather_kernel,
    hidden_merge_kernel,
    hidden_onehot_kernel,
    weight_gather_kernel,
    weight_kept_kernel,
    weight_onehot_kernel,
)
from vdr_db.kernels.cuda.configs import BackwardTiles
from vdr_db.kernels.cuda.entry_lists import BLOCK, entries_by_token, text_of_each
from vdr_db.kernels.cuda.primitives import is_interpreted

__all__ = [
    "launch_bias",
    "launch_hidden_gather",
    "launch_hidden_onehot",
    "launch_weight_gather",
    "launch_weight_kept",
    "launch_weight_onehot",
]

FILL_PROGRAMS = 256
"""Programs that keep a large device busy; the one-hot hidden gradient splits V to reach them."""


def launch_bias(grad: Tensor, argmax: Tensor, output: Tensor) -> None:
    """Bias gradient of all entries."""
    B, V = grad.shape
    bias_kernel[(triton.cdiv(V, BLOCK),)](
        grad, argmax, output, B, V, BLOCK_V=BLOCK, enable_fp_fusion=True
    )


def launch_weight_kept(
    grad: Tensor,
    argmax: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    texts: Tensor,
    order: Tensor,
    ends: Tensor,
    totals: Tensor,
    output: Tensor | None,
    bias: Tensor | None,
    tiles: BackwardTiles,
) -> None:
    """Weight and bias gradient of kept entries, whichever is wanted, by walking columns' lists."""
    H, V = hidden.shape[1], totals.shape[0]
    block_h = _block_h(H, 1024)
    weight_kept_kernel[(V, triton.cdiv(H, block_h) if output is not None else 1)](
        grad,
        argmax,
        hidden,
        cu_seqlens,
        texts,
        order,
        ends,
        totals,
        output,
        bias,
        *hidden.stride(),
        *(hidden.stride() if output is None else output.stride()),
        H=H,
        BLOCK_H=block_h,
        ROWS=4,
        NEED_WEIGHT=output is not None,
        NEED_BIAS=bias is not None,
        num_warps=tiles.gather_warps,
        enable_fp_fusion=True,
    )


def launch_weight_gather(
    grad: Tensor,
    argmax: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    output: Tensor,
    tiles: BackwardTiles,
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
        num_warps=tiles.gather_warps,
        enable_fp_fusion=True,
    )


def launch_weight_onehot(
    grad: Tensor,
    argmax: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    texts: Tensor,
    output: Tensor,
    tiles: BackwardTiles,
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
        UPCAST=hidden.dtype == torch.bfloat16 and is_interpreted(weight_onehot_kernel),
        PRECISION="tf32x3",
        num_warps=tiles.onehot_warps,
        num_stages=tiles.onehot_stages,
        enable_fp_fusion=True,
    )


def launch_hidden_onehot(
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


def launch_hidden_gather(
    grad: Tensor,
    indptr: Tensor | None,
    columns: Tensor | None,
    entry_texts: Tensor | None,
    argmax: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    output: Tensor,
    tiles: BackwardTiles,
) -> None:
    """Hidden gradient by walking each token's list; of all entries, or of kept ones."""
    T, H, V = output.shape[0], output.shape[1], weight.shape[0]
    token_texts = text_of_each(cu_seqlens, T)
    order, ends, totals = entries_by_token(
        argmax, indptr, entry_texts, cu_seqlens, token_texts, V, tiles.chunk, tiles.place_warps
    )
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
        token_texts,
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


def _block_h(H: int, most: int) -> int:
    """Hidden dimensions per gathering program: a power of 2 that fits H, at most `most`."""
    return min(most, max(16, int(triton.next_power_of_2(H))))
