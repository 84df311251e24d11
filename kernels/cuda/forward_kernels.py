"""Triton kernels of the fused vocabulary projection and max pooling.

```
logits[b, v] = max over tokens l of text b of  hidden[cu_seqlens[b] + l] . weight[v]   (+ bias[v])
```
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# Device functions take what Triton traces; annotations on them would mean constants.

from __future__ import annotations

import triton
import triton.language as tl

from vdr_db.kernels.cuda.primitives import SIZES, grouped_tile, nan_max, ordered_key, value_of_key

SEARCH = tl.constexpr(-2)
"""Position of a maximum that is infinite or NaN, until `search_kernel` has looked for it."""


@triton.jit
def product_tile(
    hidden,
    weight,
    token,
    column,
    T,
    V,
    stride_hidden_t,
    stride_hidden_h,
    stride_weight_v,
    stride_weight_h,
    H: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """float32 products of BLOCK_V weight rows from `column` and BLOCK_T tokens from `token`."""
    products = tl.zeros((BLOCK_V, BLOCK_T), dtype=tl.float32)
    offs_v = column + tl.arange(0, BLOCK_V)
    offs_t = token + tl.arange(0, BLOCK_T)
    offs_k = tl.arange(0, BLOCK_K)
    if not DESCRIPTORS:
        # rows past the end repeat the last row: they are masked after the product
        rows_v = tl.minimum(offs_v, V - 1).to(tl.int64)
        rows_t = tl.minimum(offs_t, T - 1).to(tl.int64)
        weight_ptrs = weight + rows_v[:, None] * stride_weight_v + offs_k[None, :] * stride_weight_h
        hidden_ptrs = hidden + rows_t[None, :] * stride_hidden_t + offs_k[:, None] * stride_hidden_h
    for k in range(0, H, BLOCK_K):
        if DESCRIPTORS:
            w = weight.load([column, k])
            h = hidden.load([token, k]).T
        elif H % BLOCK_K == 0:
            w = tl.load(weight_ptrs)
            h = tl.load(hidden_ptrs)
            weight_ptrs += BLOCK_K * stride_weight_h
            hidden_ptrs += BLOCK_K * stride_hidden_h
        else:
            inside = offs_k < H - k
            w = tl.load(weight_ptrs, mask=inside[None, :], other=0.0)
            h = tl.load(hidden_ptrs, mask=inside[:, None], other=0.0)
            weight_ptrs += BLOCK_K * stride_weight_h
            hidden_ptrs += BLOCK_K * stride_hidden_h
        if UPCAST:
            w = w.to(tl.float32)
            h = h.to(tl.float32)
        products = tl.dot(w, h, products, input_precision=PRECISION)
    return products


@triton.jit
def best_of_tile(products, first, NEED_ARGMAX: tl.constexpr):
    """Row maxima [BLOCK_V] of a tile, and where each is reached first; SEARCH if not finite.

    Maxima keep the ALU busy, so columns are found by the FMA units: the distance to the maximum
    times 2**127 is 0 where a column reaches it, else at least 2**-22, far above the columns' own
    numbers, which are added as the bits of tiny floats. Distances between infinities are NaN, which
    a minimum passes over. Column 0 has position `first`.
    """
    best = tl.reduce(products, 1, nan_max)
    where = tl.full((products.shape[0],), SEARCH, tl.int32)
    if NEED_ARGMAX:
        column = tl.arange(0, products.shape[1]).to(tl.float32, bitcast=True)
        distance = products - best[:, None]
        found = tl.min(distance * -1.7014118346046923e38 + column[None, :], 1)
        found = found.to(tl.uint32, bitcast=True)  # also a NaN of either sign is a large number
        where = tl.where(found < products.shape[1], found.to(tl.int32) + first, SEARCH)
    return best, where


@triton.jit
def store_positions(argmax_ptr, offset, where, logits, inside):
    """Stores token positions; returns the logits, NaN where a position does not fit its dtype."""
    if argmax_ptr.dtype.element_ty == tl.int16:
        # The caller promised short texts and gave a long one. A wrapped position would send the
        # gradient to another token without a word; NaN is seen.
        fits = where <= 32767
        where = tl.where(fits, where, -1)
        logits = tl.where(fits, logits, float("nan"))
    tl.store(argmax_ptr + offset, where.to(argmax_ptr.dtype.element_ty), mask=inside)
    return logits


@triton.jit(do_not_specialize=SIZES)
def pool_aligned_kernel(
    hidden,
    weight,
    bias_ptr,
    cu_seqlens_ptr,
    logits_ptr,
    argmax_ptr,
    B,
    T,
    V,
    stride_hidden_t,
    stride_hidden_h,
    stride_weight_v,
    stride_weight_h,
    H: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    NEED_ARGMAX: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (text, vocabulary tile): loops over the text's token blocks, stores once."""
    text, tile = grouped_tile(tl.program_id(0), B, tl.cdiv(V, BLOCK_V), GROUP)
    column = tile * BLOCK_V
    start = tl.load(cu_seqlens_ptr + text).to(tl.int32)
    end = tl.load(cu_seqlens_ptr + text + 1).to(tl.int32)

    best = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    where = tl.full((BLOCK_V,), -1, tl.int32)
    if end - start >= BLOCK_T:
        for block in tl.range(start, end, BLOCK_T, flatten=DESCRIPTORS):
            # the last block begins early enough to be full: it needs no mask, and a maximum does
            # not mind to see a token twice
            token = tl.minimum(block, end - BLOCK_T)
            products = product_tile(
                hidden, weight, token, column, T, V,
                stride_hidden_t, stride_hidden_h, stride_weight_v, stride_weight_h,
                H, BLOCK_V, BLOCK_T, BLOCK_K, DESCRIPTORS, UPCAST, PRECISION,
            )  # fmt: skip
            tile_best, tile_where = best_of_tile(products, token - start, NEED_ARGMAX)
            if NEED_ARGMAX:
                better = (tile_best > best) | (where == -1)
                better |= (tile_best != tile_best) & (best == best)
                where = tl.where(better, tile_where, where)
            best = nan_max(best, tile_best)
    elif end > start:
        products = product_tile(
            hidden, weight, start, column, T, V,
            stride_hidden_t, stride_hidden_h, stride_weight_v, stride_weight_h,
            H, BLOCK_V, BLOCK_T, BLOCK_K, DESCRIPTORS, UPCAST, PRECISION,
        )  # fmt: skip
        inside = tl.arange(0, BLOCK_T) < end - start
        products = tl.where(inside[None, :], products, float("-inf"))
        best, where = best_of_tile(products, 0, NEED_ARGMAX)

    offs_v = column + tl.arange(0, BLOCK_V)
    inside = offs_v < V
    best += 0.0
    if bias_ptr is not None:
        best += tl.load(bias_ptr + offs_v, mask=inside, other=0.0).to(tl.float32)
    offset = text.to(tl.int64) * V + offs_v
    if NEED_ARGMAX:
        best = store_positions(argmax_ptr, offset, where, best, inside)
    tl.store(logits_ptr + offset, best, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def pool_packed_kernel(
    hidden,
    weight,
    cu_seqlens_ptr,
    first_text_ptr,
    keys_ptr,
    B,
    T,
    V,
    stride_hidden_t,
    stride_hidden_h,
    stride_weight_v,
    stride_weight_h,
    H: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    NEED_ARGMAX: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (token tile, vocabulary tile); texts merge by a maximum of keys."""
    tile_t, tile_v = grouped_tile(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(V, BLOCK_V), GROUP)
    token = tile_t * BLOCK_T
    column = tile_v * BLOCK_V
    products = product_tile(
        hidden, weight, token, column, T, V,
        stride_hidden_t, stride_hidden_h, stride_weight_v, stride_weight_h,
        H, BLOCK_V, BLOCK_T, BLOCK_K, DESCRIPTORS, UPCAST, PRECISION,
    )  # fmt: skip
    offs_t = token + tl.arange(0, BLOCK_T)
    offs_v = column + tl.arange(0, BLOCK_V)

    text = tl.load(first_text_ptr + tile_t).to(tl.int32)
    start = tl.load(cu_seqlens_ptr + text).to(tl.int32)
    stop = tl.minimum(token + BLOCK_T, tl.load(cu_seqlens_ptr + B).to(tl.int32))
    while start < stop:
        end = tl.load(cu_seqlens_ptr + text + 1).to(tl.int32)
        if end > start:
            inside = (offs_t >= start) & (offs_t < end)
            masked = tl.where(inside[None, :], products, float("-inf"))
            best, where = best_of_tile(masked, token - start, NEED_ARGMAX)
            key = ordered_key(best)
            if NEED_ARGMAX:
                # 0 for a maximum to search: smaller than any position's
                place = tl.where(where == SEARCH, 0, 0x7FFFFFFF - where)
                key = (key.to(tl.int64) << 32) | place.to(tl.int64)
            offset = text.to(tl.int64) * V + offs_v
            tl.atomic_max(keys_ptr + offset, key, mask=offs_v < V, sem="relaxed")
        start = end
        text += 1


@triton.jit(do_not_specialize=SIZES)
def pool_finish_kernel(
    keys_ptr,
    bias_ptr,
    logits_ptr,
    argmax_ptr,
    V,
    BLOCK: tl.constexpr,
):
    """Keys back to logits and token positions; texts that wrote no key are empty."""
    n_blocks = tl.cdiv(V, BLOCK)
    text = (tl.program_id(0) // n_blocks).to(tl.int64)
    offs_v = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK)
    inside = offs_v < V
    offset = text * V + offs_v
    key = tl.load(keys_ptr + offset, mask=inside, other=0)
    if argmax_ptr is not None:
        empty = key == -0x8000000000000000
        place = (key & 0x7FFFFFFF).to(tl.int32)
        where = tl.where(place == 0, SEARCH, 0x7FFFFFFF - place)
        where = tl.where(empty, -1, where)
        logits = value_of_key((key >> 32).to(tl.int32))
        logits = store_positions(argmax_ptr, offset, where, logits, inside)
    else:
        empty = key == -0x80000000
        logits = value_of_key(key)
    logits = tl.where(empty, float("-inf"), logits)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + offs_v, mask=inside, other=0.0).to(tl.float32)
    tl.store(logits_ptr + offset, logits, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def search_kernel(
    hidden_ptr,
    weight_ptr,
    cu_seqlens_ptr,
    logits_ptr,
    argmax_ptr,
    V,
    stride_hidden_t,
    stride_hidden_h,
    stride_weight_v,
    stride_weight_h,
    H: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Finds the first token of each maximum that is infinite or NaN, token by token.

    Such maxima come from what is infinite or NaN in the inputs, so products of any order show them.
    """
    n_blocks = tl.cdiv(V, BLOCK_V)
    text = (tl.program_id(0) // n_blocks).to(tl.int64)
    offs_v = tl.program_id(0) % n_blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    offset = text * V + offs_v
    where = tl.load(argmax_ptr + offset, mask=offs_v < V, other=0).to(tl.int32)
    wanted = where == SEARCH
    if tl.max(wanted.to(tl.int32), 0) > 0:
        start = tl.load(cu_seqlens_ptr + text).to(tl.int32)
        end = tl.load(cu_seqlens_ptr + text + 1).to(tl.int32)
        offs_k = tl.arange(0, BLOCK_K)
        row_ptrs = weight_ptr + offs_v.to(tl.int64)[:, None] * stride_weight_v
        best = tl.full((BLOCK_V,), float("-inf"), tl.float32)
        where = tl.where(wanted, 0, where)
        token_ptr = hidden_ptr + start.to(tl.int64) * stride_hidden_t
        for token in tl.range(start, end):
            products = tl.zeros((BLOCK_V,), tl.float32)
            for k in tl.range(0, H, BLOCK_K):
                inside = offs_k + k < H
                h_ptrs = token_ptr + (offs_k + k) * stride_hidden_h
                w_ptrs = row_ptrs + ((offs_k + k) * stride_weight_h)[None, :]
                h = tl.load(h_ptrs, mask=inside, other=0.0)
                w = tl.load(w_ptrs, mask=wanted[:, None] & inside[None, :], other=0.0)
                products += tl.sum(w.to(tl.float32) * h.to(tl.float32)[None, :], 1)
            better = (products > best) | ((products != products) & (best == best))
            where = tl.where(wanted & better, token - start, where)
            best = nan_max(best, products)
            token_ptr += stride_hidden_t
        logits = tl.load(logits_ptr + offset, mask=wanted, other=0.0)
        logits = store_positions(argmax_ptr, offset, where, logits, wanted)
        tl.store(logits_ptr + offset, logits, mask=wanted)
