"""Device code that sums gradients; `backward` says how the pieces fit together.

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
    token_ptr,
    hidden_ptr,
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
    token_ptrs = token_ptr + offs_v
    grad_ptrs = grad_ptr + offs_v
    for _ in tl.range(0, B):
        token = tl.load(token_ptrs, mask=offs_v < V, other=-1)
        grad = tl.load(grad_ptrs, mask=offs_v < V, other=0.0)
        token_ptrs += V
        grad_ptrs += V
        # a zero gradient reads no row: rectified heads have mostly zeros
        inside = (token >= 0) & (grad != 0.0)
        total = add_rows(
            total, grad, hidden_ptr, token, inside, offs_h, H, stride_hidden_t, stride_hidden_h
        )
    store_rows(output_ptr, total, offs_v, offs_v < V, offs_h, H, stride_output_v, stride_output_h)


@triton.jit(do_not_specialize=SIZES)
def bias_kernel(grad_ptr, token_ptr, output_ptr, B, V, BLOCK_V: tl.constexpr):
    """Bias gradient of all entries: sums over texts that have tokens."""
    offs_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    total = tl.zeros((BLOCK_V,), tl.float32)
    token_ptrs = token_ptr + offs_v
    grad_ptrs = grad_ptr + offs_v
    for _ in tl.range(0, B):
        token = tl.load(token_ptrs, mask=offs_v < V, other=-1)
        grad = tl.load(grad_ptrs, mask=offs_v < V, other=0.0)
        total += tl.where(token >= 0, grad, 0.0)
        token_ptrs += V
        grad_ptrs += V
    tl.store(output_ptr + offs_v, total, mask=offs_v < V)


@triton.jit(do_not_specialize=SIZES)
def onehot_kernel(
    grad_ptr,
    token_ptr,
    blocks_ptr,
    matrix_ptr,
    output_ptr,
    B,
    V,
    n_blocks,
    split,
    stride_matrix_row,
    stride_matrix_h,
    stride_output_split,
    stride_output_row,
    stride_output_h,
    H: tl.constexpr,
    OF_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of all entries by products with one-hot tiles, in order.

    Blocks hold up to BLOCK_K tokens of one text, so that its gradients and maxima are read once for
    all of them. Weight rows sum over all blocks; tokens, BLOCK_M of several blocks, over (one split
    of) the vocabulary.
    """
    slot = tl.arange(0, BLOCK_K)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    own = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_owned = own < V
    n_summed, step = n_blocks, 1
    if OF_TOKENS:
        block = tl.program_id(0) * (BLOCK_M // BLOCK_K) + tl.arange(0, BLOCK_M // BLOCK_K)
        text = tl.load(blocks_ptr + 3 * block, mask=block < n_blocks, other=B)
        first = tl.load(blocks_ptr + 3 * block + 1, mask=block < n_blocks, other=0)
        stop = tl.load(blocks_ptr + 3 * block + 2, mask=block < n_blocks, other=0)
        tokens = first[:, None] + slot[None, :]
        own = tl.reshape(tokens, (BLOCK_M,))
        is_owned = tl.reshape(tokens < stop[:, None], (BLOCK_M,))
        n_summed, step = V, BLOCK_K
    begin = tl.program_id(2) * split
    # transposed, so that the one-hot tile is the operand that must lie in shared memory: with the
    # tile in registers the assembler serialises the matrix instructions
    total = tl.zeros((BLOCK_H, BLOCK_M), tl.float32)
    for item in tl.range(begin, tl.minimum(begin + split, n_summed), step):
        if OF_TOKENS:
            summed = item + slot
            is_summed = summed < V
            offset = text.to(tl.int64)[None, :] * V + summed[:, None]
            inside = (text < B)[None, :] & is_summed[:, None]
            place = tl.load(token_ptr + offset, mask=inside, other=-1) - first[None, :]
            grad = tl.load(grad_ptr + offset, mask=inside, other=0.0)
            onehot = tl.where(place[:, :, None] == slot[None, None, :], grad[:, :, None], 0.0)
            onehot = tl.reshape(onehot, (BLOCK_K, BLOCK_M))
        else:
            text = tl.load(blocks_ptr + 3 * item)
            first = tl.load(blocks_ptr + 3 * item + 1)
            summed = first + slot
            # tokens behind the last text may hold anything, also NaN: they are not read
            is_summed = (summed < tl.load(blocks_ptr + 3 * item + 2)) & (text < B)
            offset = text.to(tl.int64) * V + own
            inside = (text < B) & is_owned
            place = tl.load(token_ptr + offset, mask=inside, other=-1) - first
            grad = tl.load(grad_ptr + offset, mask=inside, other=0.0)
            onehot = tl.where(place[None, :] == slot[:, None], grad[None, :], 0.0)
        rows = tl.load(
            matrix_ptr
            + summed.to(tl.int64)[None, :] * stride_matrix_row
            + offs_h[:, None] * stride_matrix_h,
            mask=is_summed[None, :] & (offs_h < H)[:, None],
            other=0.0,
        )
        onehot = onehot.to(rows.dtype)
        if UPCAST:
            onehot = onehot.to(tl.float32)
            rows = rows.to(tl.float32)
        total = tl.dot(rows, onehot, total, input_precision=PRECISION)
    output_ptr += tl.program_id(2).to(tl.int64) * stride_output_split
    store_rows(output_ptr, total.T, own, is_owned, offs_h, H, stride_output_row, stride_output_h)


@triton.jit(do_not_specialize=SIZES)
def sum_lists_kernel(
    grad_ptr,
    rows_ptr,
    matrix_ptr,
    text_ptr,
    order_ptr,
    ends_ptr,
    totals_ptr,
    slot_owner_ptr,
    slot_ends_ptr,
    spill_ends_ptr,
    spill_ptr,
    output_ptr,
    bias_ptr,
    n_owners,
    V,
    stride_matrix_row,
    stride_matrix_h,
    stride_output_row,
    stride_output_h,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Sums an owner's list of entries, or (if SPLIT) one split of a long one into the spill buffer.

    An entry's row of the matrix stands in `rows`, negative for none; without `rows`, entries are
    numbered within a text, and are their rows.
    """
    owner = tl.program_id(0)
    if SPLIT:
        owner = tl.load(slot_owner_ptr + tl.program_id(0))
    if owner < n_owners:
        offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        count = tl.load(totals_ptr + owner).to(tl.int32)
        first = tl.load(ends_ptr + owner) - count
        stop = first + count
        n_splits = 1
        split = 0
        if SPLIT:
            n_splits = tl.maximum(tl.cdiv(count, SPLIT), 1)
            split = tl.program_id(0) - (tl.load(slot_ends_ptr + owner).to(tl.int32) - n_splits)
            first += split * SPLIT
            stop = tl.minimum(stop, first + SPLIT)
        if rows_ptr is None:
            grad_ptr += tl.load(text_ptr + owner).to(tl.int64) * V
        total = tl.zeros((ROWS, BLOCK_H), tl.float32)
        bias = tl.zeros((ROWS,), tl.float32)
        for place in tl.range(first, stop, ROWS):
            offs = place + tl.arange(0, ROWS)
            row = tl.load(order_ptr + offs, mask=offs < stop, other=0)
            grad = tl.load(grad_ptr + row, mask=offs < stop, other=0.0)
            if rows_ptr is not None:
                row = tl.load(rows_ptr + row, mask=offs < stop, other=-1)
                grad = tl.where(row >= 0, grad, 0.0)
            bias += grad
            if output_ptr is not None:
                total = add_rows(
                    total, grad, matrix_ptr, row, grad != 0.0, offs_h, H,
                    stride_matrix_row, stride_matrix_h,
                )  # fmt: skip
        result = tl.sum(total, 0)
        if SPLIT:
            place = tl.load(spill_ends_ptr + owner).to(tl.int64) - n_splits + split
            is_part = (offs_h < H) & (n_splits > 1)
            tl.store(spill_ptr + place * H + offs_h, result, mask=is_part)
        if output_ptr is not None:
            pointers = (
                output_ptr + owner.to(tl.int64) * stride_output_row + offs_h * stride_output_h
            )
            result = result.to(output_ptr.dtype.element_ty)
            tl.store(pointers, result, mask=(offs_h < H) & (n_splits == 1))
        if bias_ptr is not None:  # noqa: SIM102 - the outer condition is decided by the compiler
            if tl.program_id(1) == 0:
                tl.store(bias_ptr + owner, tl.sum(bias, 0))


@triton.jit(do_not_specialize=SIZES)
def merge_splits_kernel(
    totals_ptr,
    slot_owner_ptr,
    slot_ends_ptr,
    spill_ends_ptr,
    spill_ptr,
    output_ptr,
    n_owners,
    stride_output_row,
    stride_output_h,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Adds the splits of each long list in their order."""
    slot = tl.program_id(0)
    owner = tl.load(slot_owner_ptr + slot)
    if owner < n_owners:
        n_splits = tl.cdiv(tl.load(totals_ptr + owner), SPLIT)
        is_first = slot == tl.load(slot_ends_ptr + owner).to(tl.int32) - n_splits
        if (n_splits > 1) & is_first:
            offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
            row = tl.load(spill_ends_ptr + owner).to(tl.int64) - n_splits
            total = tl.zeros((BLOCK_H,), tl.float32)
            for split in tl.range(0, n_splits):
                total += tl.load(spill_ptr + (row + split) * H + offs_h, mask=offs_h < H, other=0.0)
            pointers = (
                output_ptr + owner.to(tl.int64) * stride_output_row + offs_h * stride_output_h
            )
            tl.store(pointers, total.to(output_ptr.dtype.element_ty), mask=offs_h < H)
