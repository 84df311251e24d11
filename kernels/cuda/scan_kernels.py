"""Device code of the scan; `scan` says how the passes fit together."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# Device functions take what Triton traces; annotations on them would mean constants.

from __future__ import annotations

import triton
import triton.language as tl

from vdr_db.kernels.cuda.primitives import SIZES, grouped_tile, nan_max

LEVELS = tl.constexpr(127.0)
UNIT = tl.constexpr(2.0**-24)
TINY = tl.constexpr(1e-30)
TINY_NORM = tl.constexpr(1e-16)


@triton.jit
def load_states(hidden_ptr, tokens, end, offs_h, stride_hidden_t, stride_hidden_h, H):
    """States [n, BLOCK_H] of tokens in float32, 0 past the end."""
    pointers = (
        hidden_ptr
        + tokens.to(tl.int64)[:, None] * stride_hidden_t
        + offs_h[None, :] * stride_hidden_h
    )
    mask = (tokens < end)[:, None] & (offs_h < H)[None, :]
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def encode_states_kernel(
    hidden_ptr,
    cu_seqlens_ptr,
    codes_ptr,
    state_scales_ptr,
    norms_ptr,
    rests_ptr,
    stride_hidden_t,
    stride_hidden_h,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Integers of a text's states, their step, and the largest norms of states and of the rest."""
    text = tl.program_id(0)
    start = tl.load(cu_seqlens_ptr + text).to(tl.int32)
    end = tl.load(cu_seqlens_ptr + text + 1).to(tl.int32)
    offs_h = tl.arange(0, BLOCK_H)
    largest = tl.zeros((BLOCK_T,), tl.float32)
    for token in tl.range(start, end, BLOCK_T):
        states = load_states(
            hidden_ptr, token + tl.arange(0, BLOCK_T), end, offs_h, stride_hidden_t,
            stride_hidden_h, H,
        )  # fmt: skip
        largest = nan_max(largest, tl.reduce(tl.abs(states), 1, nan_max))
    top = tl.reduce(largest, 0, nan_max)
    scale = nan_max(top / LEVELS, TINY)
    # a number that is not finite makes its text's bounds infinite or NaN, whatever its integer is
    is_finite = top < float("inf")
    step = tl.where(is_finite, scale, 1.0)
    norms = tl.zeros((BLOCK_T,), tl.float32)
    rests = tl.zeros((BLOCK_T,), tl.float32)
    for token in tl.range(start, end, BLOCK_T):
        tokens = token + tl.arange(0, BLOCK_T)
        states = load_states(hidden_ptr, tokens, end, offs_h, stride_hidden_t, stride_hidden_h, H)
        states = tl.where(is_finite, states, 0.0)
        integers = tl.floor(states / step + 0.5)
        integers = tl.minimum(tl.maximum(integers, -LEVELS), LEVELS)
        pointers = codes_ptr + tokens.to(tl.int64)[:, None] * WIDTH + offs_h[None, :]
        tl.store(pointers, integers.to(tl.int8), mask=(tokens < end)[:, None] & (offs_h < WIDTH))
        rest = states - integers * step
        norms = tl.maximum(norms, tl.sum(states * states, 1))
        rests = tl.maximum(rests, tl.sum(rest * rest, 1))
    grown = 1.0 + (H + 64) * UNIT
    norm = tl.sqrt(tl.max(norms, 0)) * grown + TINY_NORM
    rest_norm = tl.sqrt(tl.max(rests, 0)) * grown + TINY_NORM + 8 * UNIT * norm
    tl.store(state_scales_ptr + text, step)
    tl.store(norms_ptr + text, tl.where(is_finite, norm, float("inf")))
    tl.store(rests_ptr + text, rest_norm)


@triton.jit
def integer_tile(
    states,
    codes,
    token,
    column,
    end,
    V,
    WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """int32 products of BLOCK_V rows from `column` and BLOCK_T tokens from `token`."""
    products = tl.zeros((BLOCK_V, BLOCK_T), tl.int32)
    if not DESCRIPTORS:
        # what lies past the end repeats what lies before it: a maximum does not mind
        offs_k = tl.arange(0, BLOCK_K)
        rows_v = tl.minimum(column + tl.arange(0, BLOCK_V), V - 1).to(tl.int64)
        rows_t = tl.minimum(token + tl.arange(0, BLOCK_T), end - 1).to(tl.int64)
        row_ptrs = codes + rows_v[:, None] * WIDTH + offs_k[None, :]
        state_ptrs = states + rows_t[None, :] * WIDTH + offs_k[:, None]
    for k in range(0, WIDTH, BLOCK_K):
        if DESCRIPTORS:
            w = codes.load([column, k])
            h = states.load([token, k]).T
        else:
            w = tl.load(row_ptrs + k)
            h = tl.load(state_ptrs + k)
        products = tl.dot(w, h, products, out_dtype=tl.int32)
    return products


@triton.jit(do_not_specialize=SIZES)
def scan_kernel(
    states,
    codes,
    cu_seqlens_ptr,
    scales_ptr,
    per_norm_ptr,
    per_rest_ptr,
    per_score_ptr,
    bias_ptr,
    state_scales_ptr,
    norms_ptr,
    rests_ptr,
    near_ptr,
    above_ptr,
    B,
    V,
    WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """One program per (text, vocabulary tile): scores by integers, and bounds of the true ones."""
    text, tile = grouped_tile(tl.program_id(0), B, tl.cdiv(V, BLOCK_V), GROUP)
    column = tile * BLOCK_V
    offs_v = column + tl.arange(0, BLOCK_V)
    start = tl.load(cu_seqlens_ptr + text).to(tl.int32)
    end = tl.load(cu_seqlens_ptr + text + 1).to(tl.int32)
    best = tl.full((BLOCK_V,), -0x80000000, tl.int32)
    if end - start >= BLOCK_T:
        for block in tl.range(start, end, BLOCK_T, flatten=DESCRIPTORS):
            # the last block begins early enough to be full, as in `pool_aligned_kernel`
            token = tl.minimum(block, end - BLOCK_T)
            products = integer_tile(
                states, codes, token, column, end, V, WIDTH, BLOCK_V, BLOCK_T, BLOCK_K, DESCRIPTORS
            )
            best = tl.maximum(best, tl.max(products, 1))
    elif end > start:
        products = integer_tile(
            states, codes, start, column, end, V, WIDTH, BLOCK_V, BLOCK_T, BLOCK_K, DESCRIPTORS
        )
        inside = tl.arange(0, BLOCK_T) < end - start
        best = tl.max(tl.where(inside[None, :], products, -0x80000000), 1)

    inside = offs_v < V
    step = tl.load(scales_ptr + offs_v, mask=inside, other=0.0) * tl.load(state_scales_ptr + text)
    near = best.to(tl.float32) * step
    if bias_ptr is not None:
        near += tl.load(bias_ptr + offs_v, mask=inside, other=0.0)
    above = tl.load(per_norm_ptr + offs_v, mask=inside, other=0.0) * tl.load(norms_ptr + text)
    above += tl.load(per_rest_ptr + offs_v, mask=inside, other=0.0) * tl.load(rests_ptr + text)
    above += tl.load(per_score_ptr + offs_v, mask=inside, other=0.0)
    above += near
    if end == start:
        near = tl.full((BLOCK_V,), float("-inf"), tl.float32)
        above = near
    offset = text.to(tl.int64) * V + offs_v
    tl.store(near_ptr + offset, near, mask=inside)
    tl.store(above_ptr + offset, above, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def rescore_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    cu_seqlens_ptr,
    indptr_ptr,
    columns_ptr,
    logits_ptr,
    V,
    stride_hidden_t,
    stride_hidden_h,
    stride_weight_v,
    stride_weight_h,
    H: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of listed columns of each text, as a projection computes them."""
    n_blocks = tl.cdiv(V, BLOCK_V)
    text = tl.program_id(0) // n_blocks
    first = tl.load(indptr_ptr + text) + tl.program_id(0) % n_blocks * BLOCK_V
    stop = tl.load(indptr_ptr + text + 1)
    if first < stop:
        start = tl.load(cu_seqlens_ptr + text).to(tl.int32)
        end = tl.load(cu_seqlens_ptr + text + 1).to(tl.int32)
        listed = first + tl.arange(0, BLOCK_V)
        column = tl.load(columns_ptr + listed, mask=listed < stop, other=0).to(tl.int64)
        offs_k = tl.arange(0, BLOCK_K)
        row_ptrs = weight_ptr + column[:, None] * stride_weight_v
        best = tl.full((BLOCK_V,), float("-inf"), tl.float32)
        for token in tl.range(start, end, BLOCK_T):
            # past the end the last token repeats: a maximum does not mind
            rows = tl.minimum(token + tl.arange(0, BLOCK_T), end - 1).to(tl.int64)
            state_ptrs = hidden_ptr + rows[None, :] * stride_hidden_t
            products = tl.zeros((BLOCK_V, BLOCK_T), tl.float32)
            for k in range(0, H, BLOCK_K):
                inside = offs_k + k < H
                w_ptrs = row_ptrs + ((offs_k + k) * stride_weight_h)[None, :]
                h_ptrs = state_ptrs + ((offs_k + k) * stride_hidden_h)[:, None]
                if H % BLOCK_K == 0:
                    w = tl.load(w_ptrs)
                    h = tl.load(h_ptrs)
                else:
                    w = tl.load(w_ptrs, mask=inside[None, :], other=0.0)
                    h = tl.load(h_ptrs, mask=inside[:, None], other=0.0)
                if UPCAST:
                    w = w.to(tl.float32)
                    h = h.to(tl.float32)
                products = tl.dot(w, h, products, input_precision=PRECISION)
            best = nan_max(best, tl.reduce(products, 1, nan_max))
        best += 0.0
        if bias_ptr is not None:
            best += tl.load(bias_ptr + column).to(tl.float32)
        tl.store(logits_ptr + text.to(tl.int64) * V + column, best, mask=listed < stop)
