"""Host side of `entry_lists`: gradient entries in the order of their tokens, or of their columns.

Both are counting sorts that keep the entries of one list ascending, so that whoever walks through a
list adds in one fixed order.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from vdr_db.kernels.cuda.entry_lists import (
    chunk_offsets_kernel,
    count_columns_kernel,
    count_entries_kernel,
    mark_columns_kernel,
    place_columns_kernel,
    place_entries_kernel,
)

__all__ = ["BLOCK", "PLACE_BLOCK", "entries_by_column", "entries_by_token", "text_of_each"]

BLOCK = 256
"""Elements per program of the small integer passes."""
PLACE_BLOCK = 64
"""Entries ranked against each other at once: a [64, 64] comparison fits the registers."""
MARKED_TEXTS = 2048
"""Largest batch whose kept entries are ordered by bit marks (B/8 bytes per column)."""


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
