"""Gradient entries listed by token and by column, for owners to walk through; kernels, launches.

An *entry* is one (text, dimension) pair with its gradient and the token that reached the maximum.
All entries: entry e = b * V + v. Kept entries: e runs through the rows of a selection. Both orders
are counting sorts that keep entries of one list ascending; the only atomics count integers or set
bits, so lists do not depend on the order in which programs run.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# Device functions take what Triton traces; annotations on them would mean constants.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdr_db.kernels.cuda.primitives import SIZES, popcount

__all__ = ["BLOCK", "PLACE_BLOCK", "entries_by_column", "entries_by_token", "text_of_each"]

BLOCK = 256
"""Elements per program of the small integer passes."""
PLACE_BLOCK = 64
"""Entries ranked against each other at once: a [64, 64] comparison fits the registers."""
MARKED_TEXTS = 2048
"""Largest batch whose kept entries are ordered by bit marks (B/8 bytes per column)."""


@triton.jit
def entry_token(argmax_ptr, cu_seqlens_ptr, text, entry, inside):
    """Packed token of each entry, and whether it has one."""
    position = tl.load(argmax_ptr + entry, mask=inside, other=-1).to(tl.int32)
    start = tl.load(cu_seqlens_ptr + text).to(tl.int32)
    return start + position, inside & (position >= 0)


@triton.jit
def text_entries(indptr_ptr, text, V, HAS_INDPTR: tl.constexpr):
    """First entry of a text and one past its last."""
    if HAS_INDPTR:
        return tl.load(indptr_ptr + text).to(tl.int64), tl.load(indptr_ptr + text + 1).to(tl.int64)
    else:
        return text.to(tl.int64) * V, text.to(tl.int64) * V + V


@triton.jit(do_not_specialize=SIZES)
def count_entries_kernel(
    argmax_ptr,
    indptr_ptr,
    cu_seqlens_ptr,
    counts_ptr,
    T,
    V,
    n_chunks,
    HAS_INDPTR: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """counts[chunk of the text's entries, token] = entries whose maximum is at the token."""
    text = tl.program_id(0) // n_chunks
    chunk = tl.program_id(0) % n_chunks
    first, stop = text_entries(indptr_ptr, text, V, HAS_INDPTR)
    entry = first + chunk * CHUNK + tl.arange(0, CHUNK)
    if first + chunk * CHUNK < stop:
        token, inside = entry_token(argmax_ptr, cu_seqlens_ptr, text, entry, entry < stop)
        offset = chunk.to(tl.int64) * T + token
        tl.atomic_add(counts_ptr + offset, 1, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=SIZES)
def chunk_offsets_kernel(counts_ptr, totals_ptr, T, n_chunks, BLOCK: tl.constexpr):
    """Counts become running sums over the chunks before; totals[token] = all its entries."""
    offs_t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    pointers = counts_ptr + offs_t
    for _ in tl.range(0, n_chunks):
        count = tl.load(pointers, mask=offs_t < T, other=0)
        tl.store(pointers, total, mask=offs_t < T)
        total += count
        pointers += T
    tl.store(totals_ptr + offs_t, total, mask=offs_t < T)


@triton.jit(do_not_specialize=SIZES)
def place_entries_kernel(
    argmax_ptr,
    indptr_ptr,
    cu_seqlens_ptr,
    offsets_ptr,
    ends_ptr,
    totals_ptr,
    order_ptr,
    T,
    V,
    n_chunks,
    HAS_INDPTR: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes each entry's number into its token's list, in ascending order of entries."""
    blocks: tl.constexpr = CHUNK // BLOCK
    text = tl.program_id(0) // (n_chunks * blocks)
    chunk = tl.program_id(0) // blocks % n_chunks
    block = tl.program_id(0) % blocks
    first, stop = text_entries(indptr_ptr, text, V, HAS_INDPTR)
    chunk_first = first + chunk * CHUNK
    entry = chunk_first + block * BLOCK + tl.arange(0, BLOCK)
    if chunk_first + block * BLOCK < stop:
        token, inside = entry_token(argmax_ptr, cu_seqlens_ptr, text, entry, entry < stop)
        local = tl.arange(0, BLOCK)
        rank = tl.zeros((BLOCK,), tl.int32)
        for distance in tl.range(0, block + 1):
            # entries of the block `distance` blocks before: all precede ours, but for distance 0
            other = chunk_first + (block - distance) * BLOCK + local
            before, has_token = entry_token(argmax_ptr, cu_seqlens_ptr, text, other, other < stop)
            before = tl.where(has_token, before, -1)
            precedes = local[None, :] < local[:, None] + distance * BLOCK
            same = (before[None, :] == token[:, None]) & precedes
            rank += tl.sum(same.to(tl.int32), 1)
        start = tl.load(ends_ptr + token, mask=inside, other=0) - tl.load(
            totals_ptr + token, mask=inside, other=0
        )
        offset = chunk.to(tl.int64) * T + token
        place = start + tl.load(offsets_ptr + offset, mask=inside, other=0) + rank
        number = entry if HAS_INDPTR else entry - first
        tl.store(order_ptr + place, number.to(tl.int32), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def mark_columns_kernel(columns_ptr, text_ptr, bits_ptr, nnz, n_words, BLOCK: tl.constexpr):
    """Sets bit b of bits[v] for every kept entry (b, v)."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < nnz
    column = tl.load(columns_ptr + entry, mask=inside, other=0).to(tl.int64)
    text = tl.load(text_ptr + entry, mask=inside, other=0)
    bit = (tl.full((BLOCK,), 1, tl.int32) << (text % 32)).to(tl.int32)
    tl.atomic_or(bits_ptr + column * n_words + text // 32, bit, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=SIZES)
def count_columns_kernel(bits_ptr, before_ptr, totals_ptr, V, n_words, BLOCK: tl.constexpr):
    """before[v, w] = set bits of v in words before w; totals[v] = all set bits of v."""
    offs_v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    first = offs_v.to(tl.int64) * n_words
    for word in tl.range(0, n_words):
        offset = first + word
        tl.store(before_ptr + offset, total, mask=offs_v < V)
        total += popcount(tl.load(bits_ptr + offset, mask=offs_v < V, other=0))
    tl.store(totals_ptr + offs_v, total, mask=offs_v < V)


@triton.jit(do_not_specialize=SIZES)
def place_columns_kernel(
    columns_ptr,
    text_ptr,
    bits_ptr,
    before_ptr,
    ends_ptr,
    totals_ptr,
    order_ptr,
    nnz,
    n_words,
    BLOCK: tl.constexpr,
):
    """Writes each kept entry's number into its column's list, in ascending order of texts."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < nnz
    column = tl.load(columns_ptr + entry, mask=inside, other=0).to(tl.int64)
    text = tl.load(text_ptr + entry, mask=inside, other=0)
    offset = column * n_words + text // 32
    bits = tl.load(bits_ptr + offset, mask=inside, other=0)
    lower = (tl.full((BLOCK,), 1, tl.int32) << (text % 32)) - 1
    rank = tl.load(before_ptr + offset, mask=inside, other=0) + popcount(bits & lower)
    start = tl.load(ends_ptr + column, mask=inside, other=0) - tl.load(
        totals_ptr + column, mask=inside, other=0
    )
    tl.store(order_ptr + start + rank, entry.to(tl.int32), mask=inside)


def text_of_each(bounds: Tensor, n: int) -> Tensor:
    """Text [n] int32 that each token or entry belongs to, from its bounds [B + 1]."""
    items = torch.arange(n, device=bounds.device, dtype=bounds.dtype)
    return torch.searchsorted(bounds[1:], items, right=True, out_int32=True)


def entries_by_token(
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


def entries_by_column(
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
