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

__all__ = ["BLOCK", "entries_by_column", "entries_by_token", "text_of_each"]

BLOCK = 256
"""Elements per program of the small integer passes."""
SHORT_KEYS = 2**32
"""Pairs (token, place in a chunk) up to which 32 bits number them."""
MARKED_TEXTS = 2048
"""Largest batch whose kept entries are ordered by bit marks (B/8 bytes per column)."""


@triton.jit
def first_entry(indptr_ptr, text, inside, V, HAS_INDPTR: tl.constexpr):
    """Number of the first entry of each text."""
    if HAS_INDPTR:
        return tl.load(indptr_ptr + text, mask=inside, other=0).to(tl.int64)
    else:
        return text.to(tl.int64) * V


@triton.jit
def chunk_entries(
    argmax_ptr,
    cu_seqlens_ptr,
    entry_text_ptr,
    chunk_first,
    n,
    V,
    HAS_INDPTR: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Text and token of each entry of a chunk, and whether it has a token."""
    local = tl.arange(0, CHUNK)
    entry = chunk_first + local
    inside = entry < n
    if HAS_INDPTR:
        text = tl.load(entry_text_ptr + entry, mask=inside, other=0)
    else:
        # one division of 64 bits for the chunk, one of 32 bits for each entry
        first_text = chunk_first // V
        begun = (chunk_first - first_text * V).to(tl.int32)
        text = first_text.to(tl.int32) + (begun + local) // V
    position = tl.load(argmax_ptr + entry, mask=inside, other=-1).to(tl.int32)
    token = tl.load(cu_seqlens_ptr + text, mask=inside, other=0).to(tl.int32) + position
    return text, token, inside & (position >= 0)


@triton.jit(do_not_specialize=SIZES)
def count_entries_kernel(
    argmax_ptr,
    indptr_ptr,
    cu_seqlens_ptr,
    entry_text_ptr,
    counts_ptr,
    n,
    T,
    V,
    HAS_INDPTR: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """counts[chunk of the text, token] = entries whose maximum is at the token.

    Chunks end at multiples of CHUNK, whatever texts are in them; each text counts those that hold
    entries of its own from 0, so that the longest row alone says how many there are.
    """
    chunk = tl.program_id(0)
    chunk_first = chunk.to(tl.int64) * CHUNK
    text, token, inside = chunk_entries(
        argmax_ptr, cu_seqlens_ptr, entry_text_ptr, chunk_first, n, V, HAS_INDPTR, CHUNK
    )
    chunk -= first_entry(indptr_ptr, text, inside, V, HAS_INDPTR) // CHUNK
    tl.atomic_add(counts_ptr + chunk * T + token, 1, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=SIZES)
def chunk_offsets_kernel(
    counts_ptr,
    totals_ptr,
    indptr_ptr,
    token_text_ptr,
    B,
    T,
    V,
    HAS_INDPTR: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts become running sums over the chunks before; totals[token] = all its entries."""
    offs_t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    text = tl.load(token_text_ptr + offs_t, mask=offs_t < T, other=B)
    inside = text < B
    first = first_entry(indptr_ptr, text, inside, V, HAS_INDPTR)
    stop = first_entry(indptr_ptr, text + 1, inside, V, HAS_INDPTR)
    n_chunks = tl.where(inside, (stop + CHUNK - 1) // CHUNK - first // CHUNK, 0)
    total = tl.zeros((BLOCK,), tl.int32)
    pointers = counts_ptr + offs_t
    for _ in tl.range(0, tl.max(n_chunks, 0).to(tl.int32)):
        count = tl.load(pointers, mask=inside, other=0)
        tl.store(pointers, total, mask=inside)
        total += count
        pointers += T
    tl.store(totals_ptr + offs_t, total, mask=offs_t < T)


@triton.jit
def join_runs(left_token, left_length, token, length):
    """(Last token, length of its run) of two neighbouring stretches of sorted tokens."""
    return token, tl.where(left_token == token, left_length + length, length)


@triton.jit(do_not_specialize=SIZES)
def place_entries_kernel(
    argmax_ptr,
    indptr_ptr,
    cu_seqlens_ptr,
    entry_text_ptr,
    token_text_ptr,
    offsets_ptr,
    ends_ptr,
    totals_ptr,
    order_ptr,
    n,
    T,
    V,
    HAS_INDPTR: tl.constexpr,
    CHUNK: tl.constexpr,
    KEY: tl.constexpr,
):
    """Writes each entry's number into its token's list, in ascending order of entries."""
    chunk = tl.program_id(0)
    local = tl.arange(0, CHUNK)
    chunk_first = chunk.to(tl.int64) * CHUNK
    _, token, inside = chunk_entries(
        argmax_ptr, cu_seqlens_ptr, entry_text_ptr, chunk_first, n, V, HAS_INDPTR, CHUNK
    )
    # by token, and within a token by entry; entries without a token come last
    key = tl.sort(tl.where(inside, token, T).to(KEY) * CHUNK + local)
    token = (key // CHUNK).to(tl.int32)
    inside = token < T
    _, length = tl.associative_scan((token, tl.full((CHUNK,), 1, tl.int32)), 0, join_runs)
    text = tl.load(token_text_ptr + token, mask=inside, other=0)
    first = first_entry(indptr_ptr, text, inside, V, HAS_INDPTR)
    offset = tl.load(offsets_ptr + (chunk - first // CHUNK) * T + token, mask=inside, other=0)
    start = tl.load(ends_ptr + token, mask=inside, other=0) - tl.load(
        totals_ptr + token, mask=inside, other=0
    )
    number = chunk_first + key % CHUNK
    if not HAS_INDPTR:
        number -= first
    tl.store(order_ptr + start + offset + length - 1, number.to(tl.int32), mask=inside)


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
    argmax: Tensor,
    indptr: Tensor | None,
    entry_texts: Tensor | None,
    cu_seqlens: Tensor,
    token_texts: Tensor,
    V: int,
    chunk: int,
    warps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Entry numbers listed by token, ascending: order, end of each list, and its length.

    Args:
        argmax: `[B, V]`, or `[nnz]` of kept entries.
        indptr: `[B + 1]` bounds of kept entries, or None.
        entry_texts: `[nnz]` text of each kept entry, or None.
        cu_seqlens: `[B + 1]` bounds of tokens.
        token_texts: `[T]` text of each token, B behind the last.
        V: Dimensions.
        chunk: Entries that one program orders, a power of 2.
        warps: Warps that sort them.
    """
    device, B, T, n = argmax.device, cu_seqlens.shape[0] - 1, token_texts.shape[0], argmax.numel()
    # a row may begin and end within a chunk
    counts = torch.zeros((triton.cdiv(min(V, n), chunk) + 1, T), dtype=torch.int32, device=device)
    totals = torch.empty(T, dtype=torch.int32, device=device)
    order = torch.empty(n, dtype=torch.int32, device=device)
    shared = {"HAS_INDPTR": indptr is not None, "CHUNK": chunk, "enable_fp_fusion": True}
    entries = (argmax, indptr, cu_seqlens, entry_texts)
    grid = (triton.cdiv(n, chunk),)
    count_entries_kernel[grid](*entries, counts, n, T, V, **shared)
    chunk_offsets_kernel[(triton.cdiv(T, BLOCK),)](
        counts, totals, indptr, token_texts, B, T, V, BLOCK=BLOCK, **shared
    )
    ends = totals.cumsum(0)
    place_entries_kernel[grid](
        *(*entries, token_texts, counts, ends, totals, order, n, T, V),
        KEY=tl.uint32 if (T + 1) * chunk <= SHORT_KEYS else tl.uint64,
        num_warps=warps,
        **shared,
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
