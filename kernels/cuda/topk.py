"""Triton selection: the k largest logits of each row, joined with lexical columns, as CSR.

Passes over `logits` [B, V] float32, none of which sorts:

1. the k-th largest key of each row, by secants on counts and then by halves, with the row in
   registers; rows longer than one block keep the k + 1 largest keys of each part first, and search
   among those;
2. kept columns counted by chunk; a running sum gives every chunk its place;
3. columns and logits written in ascending order, and then activated.

Exact: ties go to the smallest columns (`limits` holds the last column taken among ties). Lexical
columns are one bit per (text, dimension). Bytes: 3·4·B·V read (mostly from L2), 8·nnz written.
Deterministic. For long rows and large k, pass 1 reads the row 7 times or so, at
most 42.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from vdr_db.errors import ShapeError
from vdr_db.kernels.activation import Activation, check_activation
from vdr_db.kernels.arguments import Lexical, check_selection
from vdr_db.kernels.cuda.configs import SELECT_TILES, SelectTiles
from vdr_db.kernels.cuda.primitives import on_device
from vdr_db.kernels.cuda.topk_kernels import (
    keep_kernel,
    mark_lexical_kernel,
    part_candidates_kernel,
    row_threshold_kernel,
)
from vdr_db.kernels.reference import Selection, text_of

__all__ = ["select_topk"]

SCAN = 1024
"""Keys looked at together where order within a row matters."""
MARK_BLOCK = 256
"""Lexical columns marked per program."""
PADDING_KEY = -(2**31)


def select_topk(
    logits: Tensor,
    k: int | None,
    *,
    activation: Activation,
    lexical: Lexical | None = None,
    trim: bool = True,
    tiles: SelectTiles = SELECT_TILES,
) -> Selection:
    """`vdr_db.kernels.select_topk`, which documents arguments, for float32 logits on a device.

    Copies logits unless a row's stride is 1. Without `trim` the result holds B * k + n entries.
    `tiles` replace those of the table.
    """
    check_selection(logits, k, lexical)
    check_activation(activation)
    if logits.dtype != torch.float32:
        raise ShapeError(f"`logits` must be float32, got {logits.dtype}; use the reference.")
    logits = logits.detach()
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    B, V = logits.shape
    device = logits.device
    n_chunks = triton.cdiv(V, tiles.chunk)
    if k is None or k == V:
        k, lexical = None, None
    n_lexical = 0 if lexical is None else lexical[1].shape[0]
    capacity = B * V if k is None else min(B * k + n_lexical, B * V)
    if B == 0:
        empty = torch.zeros(1, dtype=torch.int64, device=device)
        return Selection(empty, empty[:0].to(torch.int32), logits.new_empty(0))

    with on_device(logits):
        limits = None if k is None else _limits(logits, k, tiles)
        bits = None if lexical is None or n_lexical == 0 else _marks(lexical, B, V)
        shared = {
            "logits_ptr": logits,
            "limits_ptr": limits,
            "bits_ptr": bits,
            "V": V,
            "n_chunks": n_chunks,
            "n_words": 0 if bits is None else bits.shape[1],
            "stride_logits": logits.stride(0),
            "CHUNK": tiles.chunk,
            "STEP": 32 * tiles.chunk_warps,
            "ACTIVATION": activation,
            "num_warps": tiles.chunk_warps,
            "enable_fp_fusion": True,
        }
        counts = torch.empty(B * n_chunks, dtype=torch.int32, device=device)
        nothing = dict.fromkeys(("ends_ptr", "columns_ptr", "weights_ptr"))
        keep_kernel[(B * n_chunks,)](counts_ptr=counts, **nothing, **shared)
        ends = counts.cumsum(0)
        indptr = torch.nn.functional.pad(ends[n_chunks - 1 :: n_chunks], (1, 0))
        nnz = int(indptr[-1]) if trim else capacity
        columns = torch.empty(nnz, dtype=torch.int32, device=device)
        weights = torch.empty(nnz, dtype=torch.float32, device=device)
        keep_kernel[(B * n_chunks,)](
            counts_ptr=None, ends_ptr=ends, columns_ptr=columns, weights_ptr=weights, **shared
        )
    return Selection(indptr, columns, weights)


def _limits(logits: Tensor, k: int, tiles: SelectTiles) -> Tensor:
    """Threshold key and last column among ties, `[B, 2]` int32."""
    B, V = logits.shape
    limits = torch.empty((B, 2), dtype=torch.int32, device=logits.device)
    n_parts = triton.cdiv(V, tiles.part_block)
    source, n = logits, V
    if tiles.row_block < V and n_parts * (k + 1) <= tiles.row_block:
        # one more than k, so that ties at the threshold are still seen as ties
        n = n_parts * (k + 1)
        source = torch.full((B, n), PADDING_KEY, dtype=torch.int32, device=logits.device)
        part_candidates_kernel[(B * n_parts,)](
            *(logits, source, V, n_parts, k + 1, logits.stride(0)),
            BLOCK=tiles.part_block,
            SCAN=min(SCAN, tiles.part_block),
            num_warps=tiles.part_warps,
            enable_fp_fusion=True,
        )
    block = max(128, triton.next_power_of_2(n))
    if block > tiles.row_block:
        block = tiles.loop_block
    row_threshold_kernel[(B,)](
        *(source, logits, limits, n, V, k, source.stride(0), logits.stride(0)),
        BLOCK=block,
        ONE_BLOCK=n <= block,
        KEYS=source is not logits,
        SCAN=min(SCAN, block),
        num_warps=tiles.row_warps_of(block) if n <= block else tiles.row_warps,
        enable_fp_fusion=True,
    )
    return limits


def _marks(lexical: Lexical, B: int, V: int) -> Tensor:
    """Bits `[B, ceil(V / 32)]` int32 of the columns to keep in any case."""
    columns = lexical[1].contiguous()
    n = columns.shape[0]
    texts = text_of(lexical[0], n, out_int32=True)
    bits = torch.zeros((B, triton.cdiv(V, 32)), dtype=torch.int32, device=columns.device)
    mark_lexical_kernel[(triton.cdiv(n, MARK_BLOCK),)](
        columns, texts, bits, n, bits.shape[1], BLOCK=MARK_BLOCK, enable_fp_fusion=True
    )
    return bits
