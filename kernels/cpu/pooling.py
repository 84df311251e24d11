"""Projection and max pooling on the CPU: vocabulary chunks times token blocks, in one small buffer.

    logits[b, v] = max over tokens l of document b of hidden[l] . weight[v]  + bias[v]

A chunk of the vocabulary stays in cache while all blocks of tokens pass by it; the products of one
block, `[chunk, tokens]`, are reduced to one column per document and overwritten by the next block.
Nothing of size `[T, V]` ever exists. Work: 2 T H V floating point operations, all in sgemm; memory
above inputs and result: one buffer, one block, and one chunk in float32 if the weights are not.

A document's logits depend on its own tokens alone, bit for bit: every product sums over H in one
order, whatever its row, its block and its neighbours. That holds for a BLAS whose result for a row
does not change with the number and the place of the rows; it is put to the test on first use, and
where it fails each document goes through alone (`tiles.rows_are_independent`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vdr_db.kernels.arguments import argmax_dtype, document_bounds
from vdr_db.kernels.cpu.gradient import backward, backward_sparse
from vdr_db.kernels.cpu.selection import select_topk
from vdr_db.kernels.cpu.tiles import (
    COLUMNS_TRIED,
    Tile,
    padded_rows,
    rows_are_independent,
    tile_for,
)
from vdr_db.kernels.reference import compute_dtype

__all__ = ["backward", "backward_sparse", "forward", "pool_columns", "select_topk"]


@dataclass(frozen=True)
class Span:
    """Tokens of neighbouring documents of one length, or a part of one document, in one block.

    Attributes:
        document: The first document.
        documents: How many; 1 where only a part of a document lies in the block.
        start: First token, counted in the block.
        length: Tokens of each document.
        skipped: Tokens of the document that earlier blocks held.
    """

    document: int
    documents: int
    start: int
    length: int
    skipped: int


@dataclass(frozen=True)
class Block:
    """Tokens that are multiplied together.

    Attributes:
        start: First token, counted in the batch.
        tokens: How many.
        rows: `tokens` rounded up by `padded_rows`; the rest are zeros, and nobody reads what
            comes of them.
        spans: Which documents they belong to.
    """

    start: int
    tokens: int
    rows: int
    spans: tuple[Span, ...]


@torch.no_grad()
def forward(
    hidden: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    need_argmax: bool,
    *,
    max_length: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Pooled logits, and argmax if needed; arguments and results as in `reference.project_pool`."""
    T, H = hidden.shape
    V = weight.shape[0]
    bounds = document_bounds(cu_seqlens, T, max_length)
    B = len(bounds) - 1
    dtype = compute_dtype(hidden, weight)
    tile = tile_for(H, V, dtype)
    blocks = list(plan_blocks(bounds, tile, packed=rows_are_independent(tile, H, V, dtype)))
    logits = torch.full((B, V), -torch.inf, dtype=dtype)
    argmax = torch.full((B, V), -1, dtype=argmax_dtype(max_length)) if need_argmax else None
    widest = max((block.rows for block in blocks), default=0)
    buffer = torch.empty(tile.columns * widest, dtype=dtype)
    block_copy = torch.empty((widest, H), dtype=dtype)
    chunk_copy = torch.empty((min(tile.columns, V), H), dtype=dtype) if blocks else None
    for first in range(0, V, tile.columns):
        chunk = weight[first : first + tile.columns]
        columns = chunk.shape[0]
        if chunk_copy is not None and (chunk.dtype != dtype or not is_dense(chunk)):
            chunk = chunk_copy[:columns].copy_(chunk)
        for block in blocks:
            products = buffer[: columns * block.rows].view(columns, block.rows)
            torch.mm(chunk, block_rows(hidden, block, block_copy).T, out=products)
            for span in block.spans:
                documents = slice(span.document, span.document + span.documents)
                pool_span(
                    products,
                    span,
                    logits[documents, first : first + columns],
                    None if argmax is None else argmax[documents, first : first + columns],
                )
    if bias is not None:
        logits += bias
    logits += 0.0  # -0.0 becomes +0.0: which of two equal zeros a max returns is left open
    return logits, argmax


@torch.no_grad()
def pool_columns(hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor) -> Tensor:
    """Pooled logits of one document in some columns, with the bits that `forward` gives them.

    Rows of the matrix are multiplied `COLUMNS_TRIED` at a time, the last ones filled up, because
    `columns_are_independent` has tried that one number.

    Args:
        hidden: `[T, H]`, the tokens of the document, T of at least 1.
        weight: `[V, H]`.
        bias: `[V]` or None.
        columns: `[S]` int64, places in `weight`.

    Returns:
        `[S]` float32.
    """
    T, H = hidden.shape
    dtype = compute_dtype(hidden, weight)
    blocks = list(plan_blocks([0, T], tile_for(H, weight.shape[0], dtype), packed=True))
    copy = torch.empty((max(block.rows for block in blocks), H), dtype=dtype)
    logits = torch.full((columns.shape[0],), -torch.inf, dtype=dtype)
    rows = torch.zeros((COLUMNS_TRIED, H), dtype=dtype)
    for block in blocks:
        tokens = block_rows(hidden, block, copy).T
        for first in range(0, columns.shape[0], COLUMNS_TRIED):
            chosen = columns[first : first + COLUMNS_TRIED]
            count = chosen.shape[0]
            rows[:count] = weight.index_select(0, chosen)
            best = torch.mm(rows, tokens)[:count, : block.tokens].amax(1)
            part = logits[first : first + count]
            torch.maximum(part, best, out=part)
    if bias is not None:
        logits += bias[columns]
    logits += 0.0
    return logits


def pool_span(products: Tensor, span: Span, logits: Tensor, argmax: Tensor | None) -> None:
    """Writes the largest product of each document of a span.

    Args:
        products: `[columns, rows]`; overwritten if there is an argmax.
        span: Where in the rows.
        logits: `[span.documents, columns]`, written, or raised if the document began earlier.
        argmax: Same shape, int16 or int32, or None; written alike.
    """
    end = span.start + span.documents * span.length
    values = products[:, span.start : end].unflatten(1, (span.documents, span.length))
    best = values.amax(2)  # [columns, documents]
    if argmax is None:
        if span.skipped:
            torch.maximum(logits, best.T, out=logits)
        else:
            logits.copy_(best.T)
        return
    position = first_position(values, best).T.to(argmax.dtype)
    if span.skipped:
        # Earlier tokens win ties; NaN wins over all but an earlier NaN.
        is_larger = (logits < best.T) | (best.T.isnan() & ~logits.isnan())
        torch.where(is_larger, position + span.skipped, argmax, out=argmax)
        torch.maximum(logits, best.T, out=logits)
    else:
        logits.copy_(best.T)
        argmax.copy_(position)


def first_position(values: Tensor, best: Tensor) -> Tensor:
    """Place of the first maximum (or NaN) along the last axis, as int32.

    Three passes that vectorise are several times faster than one `torch.max` with indices.

    Args:
        values: `[columns, documents, length]`, overwritten.
        best: `[columns, documents]`, its maxima.

    Returns:
        `[columns, documents]`.
    """
    length = values.shape[2]
    if length == 1:
        return torch.zeros(best.shape, dtype=torch.int32)
    if best.isnan().any():
        is_best = (values == best[:, :, None]) | values.isnan()
        values.copy_(is_best)
    else:
        torch.eq(values, best[:, :, None], out=values)
    # Ones times length, length - 1, ... 1: the largest marks the first. Exact, as spans are short.
    values *= torch.arange(length, 0, -1, dtype=values.dtype)
    return (length - values.amax(2)).to(torch.int32)


def block_rows(hidden: Tensor, block: Block, copy: Tensor) -> Tensor:
    """`[block.rows, H]` of a block: a view where the tokens lie ready, else a copy with zeros."""
    rows = hidden[block.start : block.start + block.tokens]
    is_ready = rows.dtype == copy.dtype and is_dense(rows) and block.tokens == block.rows
    if is_ready and rows.data_ptr() % 64 == 0:  # torch's own alignment, so that of the copy
        return rows
    copy[: block.tokens] = rows
    copy[block.tokens : block.rows] = 0
    return copy[: block.rows]


def is_dense(matrix: Tensor) -> bool:
    """Rows lie one after the other, each without gaps."""
    return matrix.is_contiguous()


def plan_blocks(bounds: list[int], tile: Tile, *, packed: bool) -> Iterator[Block]:
    """Cuts a batch into blocks of at most `tile.tokens` tokens.

    Args:
        bounds: First token of each document, and T.
        tile: Largest block.
        packed: Let a block hold several documents. If not, each document starts a block of its own.

    Yields:
        Blocks in the order of their tokens, without empty documents.
    """
    cuts = [bounds[0], bounds[-1]] if packed else bounds
    document = 0
    for begin, end in itertools.pairwise(cuts):
        for start in range(begin, end, tile.tokens):
            stop = min(start + tile.tokens, end)
            while bounds[document + 1] <= start:
                document += 1
            spans = tuple(spans_between(bounds, document, start, stop))
            yield Block(start, stop - start, padded_rows(stop - start), spans)


def spans_between(bounds: list[int], document: int, start: int, stop: int) -> Iterator[Span]:
    """Spans of the tokens from `start` to `stop`; `document` holds the first of them."""
    place = start
    while place < stop:
        first, last = bounds[document], bounds[document + 1]
        length = min(last, stop) - place
        documents = 1
        if place == first and length == last - first:
            while (
                place + (documents + 1) * length <= stop
                and bounds[document + documents + 1] - bounds[document + documents] == length
            ):
                documents += 1
        if length:
            yield Span(document, documents, place - start, length, place - first)
        document += documents
        place += documents * length
