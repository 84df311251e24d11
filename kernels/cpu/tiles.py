"""Tile sizes of the CPU path, and the trial that packing documents changes no bit."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

import torch

__all__ = [
    "COLUMNS_TRIED",
    "Tile",
    "columns_are_independent",
    "padded_rows",
    "rows_are_independent",
    "tile_for",
]

# Measured on one and two AVX2 cores with 32 MB of shared L3, H of 128, 384 and 768: from 768 to
# 4,096 columns and from 256 to 768 tokens rates differ by less than runs do; with 128 tokens they
# fall by 10 %, with 1,200 by 30 %, when the products no longer stay in L3. A chunk of weights is
# read once for each block of tokens, so it is to stay there too: 8 MB is 2,048 columns up to
# H = 1,024.
TILE_TOKENS = 512
TILE_COLUMNS = 2048
SMALLEST_COLUMNS = 256
CHUNK_SHARE_OF_CACHE = 0.25
COLUMNS_TRIED = 256
"""Columns multiplied at once where only some are wanted."""
USUAL_CACHE_BYTES = 32 << 20


@dataclass(frozen=True)
class Tile:
    """Largest part of the product that is held at once.

    Attributes:
        columns: Vocabulary rows of a chunk; depends on the model and the machine, not on the batch.
        tokens: Tokens of a block, one of `block_sizes()`; the last block of a batch may be smaller.
    """

    columns: int
    tokens: int


@lru_cache(maxsize=64)
def tile_for(H: int, V: int, dtype: torch.dtype) -> Tile:
    """Tile for a model, the same for every batch.

    Args:
        H: Hidden size.
        V: Vocabulary columns.
        dtype: In which products are formed.
    """
    chunk_bytes = CHUNK_SHARE_OF_CACHE * cache_bytes()
    columns = TILE_COLUMNS
    while columns > SMALLEST_COLUMNS and columns * H * dtype.itemsize > chunk_bytes:
        columns //= 2
    return Tile(columns=min(columns, V), tokens=TILE_TOKENS)


def cache_bytes() -> int:
    """Size of the last cache level, or a usual one where the system does not say."""
    try:
        return os.sysconf("SC_LEVEL3_CACHE_SIZE") or USUAL_CACHE_BYTES
    except (ValueError, OSError, AttributeError):
        return USUAL_CACHE_BYTES


def padded_rows(tokens: int) -> int:
    """Smallest size of a block that holds so many tokens.

    BLAS libraries have kernels of their own for narrow products (MKL: for fewer than 12 columns,
    and for a single one), which sum in another order; 16 is above them. Steps grow, because each
    size is tried in `rows_are_independent`.
    """
    step = 16 if tokens <= 128 else 32 if tokens <= 256 else 64
    return -(-tokens // step) * step


def block_sizes(largest: int) -> list[int]:
    """Every size of a block up to the largest."""
    return sorted({padded_rows(tokens) for tokens in range(1, largest + 1)})


def rows_are_independent(tile: Tile, H: int, V: int, dtype: torch.dtype) -> bool:
    """True if a token's products have the same bits in every block, and at every place in it.

    Tried once for each model size and thread count, with the very shapes that will be used. Takes
    as long as the projection of about 500 tokens: some 0.3 s for BERT-base on one core.
    """
    threads = torch.get_num_threads()
    shapes = {tile.columns, V % tile.columns or tile.columns}
    return all(_try_rows(columns, tile.tokens, H, dtype, threads) for columns in shapes)


@lru_cache(maxsize=64)
def _try_rows(columns: int, tokens: int, H: int, dtype: torch.dtype, threads: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    chunk = torch.randn((columns, H), generator=generator, dtype=dtype)
    rows = torch.randn((tokens, H), generator=generator, dtype=dtype)
    products = torch.mm(chunk, rows.T)
    if not torch.equal(torch.mm(chunk, rows.flip(0).T).flip(1), products):
        return False
    # The last rows of the block become the first of a smaller one: another size, another place.
    return all(
        torch.equal(torch.mm(chunk, rows[-size:].T), products[:, -size:])
        for size in block_sizes(tokens)
    )


def columns_are_independent(H: int, V: int, dtype: torch.dtype) -> bool:
    """True if a column's products have the same bits among few chosen columns as in a whole chunk.

    Tried once for each model size and thread count, like `rows_are_independent`, which it asks too.
    """
    tile = tile_for(H, V, dtype)
    threads = torch.get_num_threads()
    shapes = {tile.columns, V % tile.columns or tile.columns}
    return rows_are_independent(tile, H, V, dtype) and all(
        _try_columns(columns, tile.tokens, H, dtype, threads) for columns in shapes
    )


@lru_cache(maxsize=64)
def _try_columns(columns: int, tokens: int, H: int, dtype: torch.dtype, threads: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    chunk = torch.randn((columns, H), generator=generator, dtype=dtype)
    rows = torch.randn((tokens, H), generator=generator, dtype=dtype)
    chosen = torch.randint(columns, (COLUMNS_TRIED,), generator=generator)
    products = torch.mm(chunk, rows.T)[chosen]
    return all(
        torch.equal(torch.mm(chunk[chosen], rows[:size].T), products[:, :size])
        for size in block_sizes(tokens)
    )
