"""Device code that sums gradients; `pooling_backward` says how the pieces fit together.

Every output row has one owner that adds in one fixed order, so results do not change from run to
run. Two ways: gather the rows that entries name, or multiply one-hot tiles with whole matrices.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# Device functions take what Triton traces; annotations on them would mean constants.

from __future__ import annotations

import triton
import triton.language as tl

from vdr_db.kernels.cuda.primitives import SIZES


@triton.jit
def add_rows(total, weight, rows_ptr, row, inside, offs_h, H, stride_row, stride_h):
    """Adds to `total` [n, BLOCK_H] the given n rows of a matrix, each times its weight."""
    pointers = rows_ptr + row.to(tl.int64)[:, None] * stride_row + offs_h[None, :] * stride_h
    rows = tl.load(pointers, mask=inside[:, None] & (offs_h < H)[None, :], other=0.0)
    return total + weight[:, None] * rows.to(tl.float32)


@triton.jit
def store_rows(output_ptr, total, row, inside, offs_h, H, stride_row, stride_h):
    """Stores float32 rows [n, BLOCK_H] in the output's dtype."""
    pointers = output_ptr + row.to(tl.int64)[:, None] * stride_row + offs_h[None, :] * stride_h
    mask = inside[:, None] & (offs_h < H)[None, :]
    tl.store(pointers, total.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def weight_gather_kernel(
    grad_ptr,
    argmax_ptr,
    hidden_ptr,
    cu_seqlens_ptr,
    output_ptr,
    B,
    V,
    stride_hidden_t,
    stride_hidden_h,
    stride_output_v,
    stride_output_h,
    H: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Weight gradient of all entries: gathers one token per text for each owned row."""
    offs_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_V, BLOCK_H), tl.float32)
    argmax_ptrs = argmax_ptr + offs_v
    grad_ptrs = grad_ptr + offs_v
    for text in tl.range(0, B):
        position = tl.load(argmax_ptrs, mask=offs_v < V, other=-1).to(tl.int32)
        grad = tl.load(grad_ptrs, mask=offs_v < V, other=0.0)
        argmax_ptrs += V
        grad_ptrs += V
        start = tl.load(cu_seqlens_ptr + text).to(tl.int32)
        # a zero gradient reads no row: rectified heads have mostly zeros
        inside = (position >= 0) & (grad != 0.0)
        total = add_rows(
            total, grad, hidden_ptr, start + position, inside, offs_h, H,
            stride_hidden_t, stride_hidden_h,
        )  # fmt: skip
    store_rows(output_ptr, total, offs_v, offs_v < V, offs_h, H, stride_output_v, stride_output_h)


@triton.jit(do_not_specialize=SIZES)
def bias_kernel(grad_ptr, argmax_ptr, output_ptr, B, V, BLOCK_V: tl.constexpr):
    """Bias gradient of all entries: sums over texts that have tokens."""
    offs_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    total = tl.zeros((BLOCK_V,), tl.float32)
    argmax_ptrs = argmax_ptr + offs_v
    grad_ptrs = grad_ptr + offs_v
    for _ in tl.range(0, B):
        position = tl.load(argmax_ptrs, mask=offs_v < V, other=-1)
        grad = tl.load(grad_ptrs, mask=offs_v < V, other=0.0)
        total += tl.where(position >= 0, grad, 0.0)
        argmax_ptrs += V
        grad_ptrs += V
    tl.store(output_ptr + offs_v, total, mask=offs_v < V)


@triton.jit
def onehot_tile(grad_ptr, argmax_ptr, cu_seqlens_ptr, text_ptr, offs_t, offs_v, B, T, V):
    """Tile [V, T]: the gradient of v in the text of t where t reached the maximum, else 0."""
    # tokens behind the last text belong to text B, which does not exist
    text = tl.load(text_ptr + offs_t, mask=offs_t < T, other=B)
    local = offs_t - tl.load(cu_seqlens_ptr + text).to(tl.int32)
    offset = text.to(tl.int64)[None, :] * V + offs_v[:, None]
    inside = (text < B)[None, :] & (offs_v < V)[:, None]
    position = tl.load(argmax_ptr + offset, mask=inside, other=-1).to(tl.int32)
    grad = tl.load(grad_ptr + offset, mask=inside, other=0.0)
    return tl.where(position == local[None, :], grad, 0.0)


@triton.jit(do_not_specialize=SIZES)
def weight_onehot_kernel(
    grad_ptr,
    argmax_ptr,
    hidden_ptr,
    cu_seqlens_ptr,
    text_ptr,
    output_ptr,
    B,
    V,
    stride_hidden_t,
    stride_hidden_h,
    stride_output_v,
    stride_output_h,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weight gradient of all entries by products with one-hot tiles, over all tokens in order."""
    offs_v = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    # rows behind the last text may hold anything, also NaN: they are not read
    T = tl.load(cu_seqlens_ptr + B).to(tl.int32)
    for token in tl.range(0, T, BLOCK_K):
        offs_t = token + tl.arange(0, BLOCK_K)
        onehot = onehot_tile(
            grad_ptr, argmax_ptr, cu_seqlens_ptr, text_ptr, offs_t, offs_v, B, T, V
        )
        rows = tl.load(
            hidden_ptr
            + offs_t.to(tl.int64)[:, None] * stride_hidden_t
            + offs_h[None, :] * stride_hidden_h,
            mask=(offs_t < T)[:, None] & (offs_h < H)[None, :],
            other=0.0,
        )
        onehot = onehot.to(rows.dtype)
        if UPCAST:
            onehot = onehot.to(tl.float32)
            rows = rows.to(tl.float32)
        total = tl.dot(onehot, rows, total, input_precision=PRECISION)
    store_rows(output_ptr, total, offs_v, offs_v < V, offs_h, H, stride_output_v, stride_output_h)


@triton.jit(do_not_specialize=SIZES)
def hidden_onehot_kernel(
    grad_ptr,
    argmax_ptr,
    weight_ptr,
    cu_seqlens_ptr,
    text_ptr,
    output_ptr,
    B,
    T,
    V,
    split_v,
    stride_weight_v,
    stride_weight_h,
    stride_output_split,
    stride_output_t,
    stride_output_h,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Hidden gradient of all entries by products with one-hot tiles, over one part of V."""
    offs_t = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    first = tl.program_id(2) * split_v
    # transposed, so that the one-hot tile is the operand that must lie in shared memory: with the
    # tile in registers the assembler serialises the matrix instructions
    total = tl.zeros((BLOCK_H, BLOCK_M), tl.float32)
    for column in tl.range(first, tl.minimum(first + split_v, V), BLOCK_K):
        offs_v = column + tl.arange(0, BLOCK_K)
        onehot = onehot_tile(
            grad_ptr, argmax_ptr, cu_seqlens_ptr, text_ptr, offs_t, offs_v, B, T, V
        )
        rows = tl.load(
            weight_ptr
            + offs_v.to(tl.int64)[None, :] * stride_weight_v
            + offs_h[:, None] * stride_weight_h,
            mask=(offs_v < V)[None, :] & (offs_h < H)[:, None],
            other=0.0,
        )
        onehot = onehot.to(rows.dtype)
        if UPCAST:
            onehot = onehot.to(tl.float32)
            rows = rows.to(tl.float32)
        total = tl.dot(rows, onehot, total, input_precision=PRECISION)
    output_ptr += tl.program_id(2).to(tl.int64) * stride_output_split
    store_rows(output_ptr, total.T, offs_t, offs_t < T, offs_h, H, stride_output_t, stride_output_h)


@triton.jit(do_not_specialize=SIZES)
def hidden_gather_kernel(
    grad_ptr,
    columns_ptr,
    weight_ptr,
    text_ptr,
    order_ptr,
    ends_ptr,
    totals_ptr,
    slot_token_ptr,
    slot_ends_ptr,
    spill_ends_ptr,
    spill_ptr,
    output_ptr,
    T,
    V,
    stride_weight_v,
    stride_weight_h,
    stride_output_t,
    stride_output_h,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
):
    """Sums one token's list of entries, or one split of a long list into the spill buffer."""
    slot = tl.program_id(0)
    token = tl.load(slot_token_ptr + slot)
    if token < T:
        offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        count = tl.load(totals_ptr + token)
        n_splits = tl.maximum(tl.cdiv(count, SPLIT), 1)
        split = slot - (tl.load(slot_ends_ptr + token).to(tl.int32) - n_splits)
        first = tl.load(ends_ptr + token) - count
        stop = first + tl.minimum(count, split * SPLIT + SPLIT)
        grad_row = tl.load(text_ptr + token).to(tl.int64) * V
        total = tl.zeros((ROWS, BLOCK_H), tl.float32)
        for place in tl.range(first + split * SPLIT, stop, ROWS):
            offs = place + tl.arange(0, ROWS)
            inside = offs < stop
            number = tl.load(order_ptr + offs, mask=inside, other=0)
            if HAS_COLUMNS:
                grad = tl.load(grad_ptr + number, mask=inside, other=0.0)
                column = tl.load(columns_ptr + number, mask=inside, other=0)
            else:
                grad = tl.load(grad_ptr + grad_row + number, mask=inside, other=0.0)
                column = number
            total = add_rows(
                total, grad, weight_ptr, column, inside & (grad != 0.0), offs_h, H,
                stride_weight_v, stride_weight_h,
            )  # fmt: skip
        result = tl.sum(total, 0)
        if n_splits == 1:
            pointers = output_ptr + token.to(tl.int64) * stride_output_t + offs_h * stride_output_h
            tl.store(pointers, result.to(output_ptr.dtype.element_ty), mask=offs_h < H)
        else:
            row = tl.load(spill_ends_ptr + token).to(tl.int64) - n_splits + split
            tl.store(spill_ptr + row * H + offs_h, result, mask=offs_h < H)


@triton.jit(do_not_specialize=SIZES)
def hidden_merge_kernel(
    totals_ptr,
    slot_token_ptr,
    slot_ends_ptr,
    spill_ends_ptr,
    spill_ptr,
    output_ptr,
    T,
    stride_output_t,
    stride_output_h,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Adds the splits of each long list in their order."""
    slot = tl.program_id(0)
    token = tl.load(slot_token_ptr + slot)
    if token < T:
        n_splits = tl.cdiv(tl.load(totals_ptr + token), SPLIT)
        is_first = slot == tl.load(slot_ends_ptr + token).to(tl.int32) - n_splits
        if (n_splits > 1) & is_first:
            offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
            row = tl.load(spill_ends_ptr + token).to(tl.int64) - n_splits
            total = tl.zeros((BLOCK_H,), tl.float32)
            for split in tl.range(0, n_splits):
                total += tl.load(spill_ptr + (row + split) * H + offs_h, mask=offs_h < H, other=0.0)
            pointers = output_ptr + token.to(tl.int64) * stride_output_t + offs_h * stride_output_h
            tl.store(pointers, total.to(output_ptr.dtype.element_ty), mask=offs_h < H)


@triton.jit(do_not_specialize=SIZES)
def weight_kept_kernel(
    grad_ptr,
    argmax_ptr,
    hidden_ptr,
    cu_seqlens_ptr,
    text_ptr,
    order_ptr,
    ends_ptr,
    totals_ptr,
    output_ptr,
    bias_ptr,
    stride_hidden_t,
    stride_hidden_h,
    stride_output_v,
    stride_output_h,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ROWS: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
):
    """Weight and bias gradient of kept entries: one program per weight row (and part of H)."""
    column = tl.program_id(0)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    stop = tl.load(ends_ptr + column)
    first = stop - tl.load(totals_ptr + column)
    total = tl.zeros((ROWS, BLOCK_H), tl.float32)
    bias = tl.zeros((ROWS,), tl.float32)
    for place in tl.range(first, stop, ROWS):
        offs = place + tl.arange(0, ROWS)
        inside = offs < stop
        entry = tl.load(order_ptr + offs, mask=inside, other=0)
        text = tl.load(text_ptr + entry, mask=inside, other=0)
        position = tl.load(argmax_ptr + entry, mask=inside, other=-1).to(tl.int32)
        inside = position >= 0
        grad = tl.load(grad_ptr + entry, mask=inside, other=0.0)
        bias += grad
        if NEED_WEIGHT:
            token = position + tl.load(cu_seqlens_ptr + text, mask=inside, other=0).to(tl.int32)
            total = add_rows(
                total, grad, hidden_ptr, token, inside & (grad != 0.0), offs_h, H,
                stride_hidden_t, stride_hidden_h,
            )  # fmt: skip
    if NEED_WEIGHT:
        result = tl.sum(total, 0)
        pointers = output_ptr + column.to(tl.int64) * stride_output_v + offs_h * stride_output_h
        tl.store(pointers, result.to(output_ptr.dtype.element_ty), mask=offs_h < H)
    if NEED_BIAS:  # noqa: SIM102 - the outer condition is decided by the compiler
        if tl.program_id(1) == 0:
            tl.store(bias_ptr + column, tl.sum(bias, 0))
