"""Gradient entries listed by their owners, for these to walk through: a counting sort.

An *entry* is one (text, dimension) pair with its gradient and the token that reached the maximum.
All entries: entry e = b * V + v. Kept entries: e runs through the rows of a selection. Its *owner*
is the output row that it adds to: the token of a hidden gradient, the column of a weight gradient.
Entries of one list stay in ascending order; the only atomics count integers, so lists do not depend
on the order in which programs run.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# Device functions take what Triton traces; annotations on them would mean constants.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdr_db.kernels.cuda.configs import BackwardTiles
from vdr_db.kernels.cuda.primitives import SIZES

__all__ = ["Lists", "lists_of"]

OFFSET_ROWS, OFFSET_BLOCK = 16, 64
"""Chunks and owners whose counts one program adds up at once."""
SHORT_KEYS = 2**32
"""Pairs (owner, place in a chunk) up to which 32 bits number them."""
LARGEST_COUNTS = 2**24
"""Counts (owners times chunks) up to which counting costs less than a sort of all entries."""


class Lists(NamedTuple):
    """Entries of each of n owners.

    Attributes:
        order: `[entries]` int32, all lists one after the other.
        ends: `[n]` int64, where each list ends.
        totals: `[n]`, integer, length of each list.
    """

    order: Tensor
    ends: Tensor
    totals: Tensor


@triton.jit
def chunk_of(bounds_ptr, text_ptr, owner, inside, last, CHUNK: tl.constexpr):
    """First entry that a list may hold, and the chunks before it, or before its last one's end.

    Chunks end at multiples of CHUNK, whatever texts are in them; owners count those that hold
    entries of their own text from 0, so that the longest row alone says how many there are.
    """
    text = tl.zeros_like(owner)
    if text_ptr is not None:
        text = tl.load(text_ptr + owner, mask=inside, other=0)
    entry = tl.load(bounds_ptr + text + last, mask=inside, other=0).to(tl.int64)
    return entry, (entry + last * (CHUNK - 1)) // CHUNK


@triton.jit(do_not_specialize=SIZES)
def count_entries_kernel(
    owner_ptr, bounds_ptr, text_ptr, counts_ptr, nnz, n_owners, CHUNK: tl.constexpr
):
    """counts[chunk of the text, owner] = entries of the owner."""
    chunk = tl.program_id(0)
    entry = chunk.to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    owner = tl.load(owner_ptr + entry, mask=entry < nnz, other=-1)
    _, before = chunk_of(bounds_ptr, text_ptr, owner, owner >= 0, 0, CHUNK)
    pointers = counts_ptr + (chunk - before) * n_owners + owner
    tl.atomic_add(pointers, 1, mask=owner >= 0, sem="relaxed")


@triton.jit(do_not_specialize=SIZES)
def chunk_offsets_kernel(
    counts_ptr,
    bounds_ptr,
    text_ptr,
    totals_ptr,
    B,
    n_owners,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts become running sums over the chunks before; totals[owner] = all its entries."""
    owner = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = owner < n_owners
    if text_ptr is not None:  # tokens behind the last text belong to text B, which does not exist
        inside &= tl.load(text_ptr + owner, mask=inside, other=B) < B
    _, first = chunk_of(bounds_ptr, text_ptr, owner, inside, 0, CHUNK)
    _, stop = chunk_of(bounds_ptr, text_ptr, owner, inside, 1, CHUNK)
    n_chunks = tl.where(inside, stop - first, 0)
    total = tl.zeros((BLOCK,), tl.int32)
    for chunk in tl.range(0, tl.max(n_chunks, 0).to(tl.int32), ROWS):
        # several rows at once: one by one, each would wait for memory
        rows = chunk + tl.arange(0, ROWS)
        pointers = counts_ptr + rows.to(tl.int64)[:, None] * n_owners + owner[None, :]
        mask = rows[:, None] < n_chunks[None, :]
        count = tl.load(pointers, mask=mask, other=0)
        tl.store(pointers, total[None, :] + tl.cumsum(count, 0) - count, mask=mask)
        total += tl.sum(count, 0)
    tl.store(totals_ptr + owner, total, mask=owner < n_owners)


@triton.jit
def join_runs(left_owner, left_length, owner, length):
    """(Last owner, length of its run) of two neighbouring stretches of sorted owners."""
    return owner, tl.where(left_owner == owner, left_length + length, length)


@triton.jit(do_not_specialize=SIZES)
def place_entries_kernel(
    owner_ptr,
    bounds_ptr,
    text_ptr,
    offsets_ptr,
    ends_ptr,
    totals_ptr,
    order_ptr,
    nnz,
    n_owners,
    WITHIN_TEXT: tl.constexpr,
    CHUNK: tl.constexpr,
    KEY: tl.constexpr,
):
    """Writes each entry's number into its owner's list, in ascending order of entries."""
    chunk = tl.program_id(0)
    local = tl.arange(0, CHUNK)
    chunk_first = chunk.to(tl.int64) * CHUNK
    owner = tl.load(owner_ptr + chunk_first + local, mask=chunk_first + local < nnz, other=-1)
    # by owner, and of one owner by entry; entries without an owner come last
    key = tl.sort(tl.where(owner >= 0, owner, n_owners).to(KEY) * CHUNK + local)
    owner = (key // CHUNK).to(tl.int32)
    inside = owner < n_owners
    _, length = tl.associative_scan((owner, tl.full((CHUNK,), 1, tl.int32)), 0, join_runs)
    first, before = chunk_of(bounds_ptr, text_ptr, owner, inside, 0, CHUNK)
    offset = tl.load(offsets_ptr + (chunk - before) * n_owners + owner, mask=inside, other=0)
    end = tl.load(ends_ptr + owner, mask=inside, other=0)
    start = end - tl.load(totals_ptr + owner, mask=inside, other=0)
    number = chunk_first + key % CHUNK
    if WITHIN_TEXT:
        number -= first
    tl.store(order_ptr + start + offset + length - 1, number.to(tl.int32), mask=inside)


def lists_of(
    owners: Tensor,
    n: int,
    bounds: Tensor,
    texts: Tensor | None,
    longest: int,
    tiles: BackwardTiles,
    *,
    within_text: bool = False,
) -> Lists:
    """Entry numbers of each of n owners, ascending.

    Args:
        owners: `[entries]` int32, the owner of each entry, -1 for none.
        n: Number of owners.
        bounds: `[B + 1]`: owners in text b have entries from bounds[b] to bounds[b + 1].
        texts: `[n]` int32, text of each owner, B for none; None if all have text 0.
        longest: Most entries that a text may have.
        tiles: Size of a chunk, and warps that sort it.
        within_text: Number entries from the first of their text on.
    """
    device, entries, chunk = owners.device, owners.numel(), tiles.chunk
    # a text's entries may begin and end within a chunk
    n_chunks = triton.cdiv(longest, chunk) + 1
    if texts is None and n_chunks * n > LARGEST_COUNTS:
        ordered, order = owners.sort(stable=True)
        ends = torch.searchsorted(ordered, torch.arange(n, device=device), right=True)
        return Lists(order, ends, torch.diff(ends, prepend=ends.new_zeros(1)))
    counts = torch.zeros((n_chunks, n), dtype=torch.int32, device=device)
    totals = torch.empty(n, dtype=torch.int32, device=device)
    order = torch.empty(entries, dtype=torch.int32, device=device)
    shared = {"CHUNK": chunk, "enable_fp_fusion": True}
    grid = (triton.cdiv(entries, chunk),)
    count_entries_kernel[grid](owners, bounds, texts, counts, entries, n, **shared)
    chunk_offsets_kernel[(triton.cdiv(n, OFFSET_BLOCK),)](
        *(counts, bounds, texts, totals, bounds.shape[0] - 1, n),
        ROWS=OFFSET_ROWS,
        BLOCK=OFFSET_BLOCK,
        **shared,
    )
    ends = totals.cumsum(0)
    place_entries_kernel[grid](
        *(owners, bounds, texts, counts, ends, totals, order, entries, n),
        WITHIN_TEXT=within_text,
        KEY=tl.uint32 if (n + 1) * chunk <= SHORT_KEYS else tl.uint64,
        num_warps=tiles.place_warps,
        **shared,
    )
    return Lists(order, ends, totals)
