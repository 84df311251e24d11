"""Tile sizes as data: which block shapes, warps and stages each kernel runs with.

Nothing is tuned at run time. `POOL_TILES` is read from top to bottom and the first row that fits,
into the card's shared memory too, decides; every tile is compiled for every card and its registers,
spills and shared memory are checked by the compile gate (`benchmarks/compile_gate.py`).
`benchmarks/autotune.py` measures candidates on a device on request and returns a row that can be
pasted here.

Why the numbers are what they are (H200, bfloat16): the vocabulary lies on the M axis of the matrix
instruction, so the maximum over tokens stays inside a thread; 256 x 128 accumulators use 8 warps
without spilling, and read 1/85 byte of L2 per FLOP. With token positions kept, a packed tile holds
64 tokens: 128 would spill. Steps of 32 bit inputs are half as deep, and of 16 bit ones without TMA
too: deeper ones spill with some version of Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "ANY",
    "BACKWARD_TILES",
    "PERSISTENT",
    "POOL_TILES",
    "SELECT_TILES",
    "BackwardTiles",
    "PoolRow",
    "PoolTile",
    "SelectTiles",
    "backward_tiles",
    "pool_tile",
]

ANY = 2**62
"""Upper bound that every size meets."""
SMALL_BUFFERS = 1024
"""Bytes of shared memory beside the load pipeline: barriers, and room to reduce."""


@dataclass(frozen=True)
class PoolTile:
    """One way to run the forward kernel.

    Attributes:
        layout: `"aligned"` gives each text blocks of its own; in `"packed"` blocks cross texts;
            `"persistent"` is `"aligned"` with one program a multiprocessor.
        block_v: Weight rows per program.
        block_t: Tokens per block.
        block_k: Hidden dimensions per step.
        group: Texts (aligned) or token blocks (packed) that share a weight strip in L2.
        num_warps: Warps per program.
        num_stages: Depth of the load pipeline.
        descriptors: Load tiles by tensor descriptors (TMA); needs 16-byte aligned rows and sm_90.
        registers: Most registers of a thread; None leaves them to the assembler.
    """

    layout: Literal["aligned", "packed", "persistent"]
    block_v: int
    block_t: int
    block_k: int
    group: int
    num_warps: int
    num_stages: int
    descriptors: bool
    registers: int | None = None

    def shared_bytes(self, bits: int) -> int:
        """Most shared memory that a program needs with inputs of `bits` bits."""
        step = (self.block_v + self.block_t) * self.block_k * bits // 8
        return self.num_stages * step + SMALL_BUFFERS


@dataclass(frozen=True)
class PoolRow:
    """A row of the table: the first row with all sizes within its bounds decides.

    Attributes:
        sm: Least compute capability, for example 90.
        bits: 16 (bfloat16, float16) or 32; 8 for the scan.
        hidden_max: Largest hidden size.
        vocabulary_max: Largest number of weight rows.
        length_max: Largest mean number of tokens of a text.
        tile: The tile.
    """

    sm: int
    bits: int
    hidden_max: int
    vocabulary_max: int
    length_max: int
    tile: PoolTile


# sm, bits, hidden, vocabulary and mean length up to;  layout, V, T, K, group, warps, stages, TMA
POOL_TILES: tuple[PoolRow, ...] = (
    PoolRow(100, 8, ANY, ANY, ANY, PoolTile("aligned", 128, 128, 64, 8, 8, 3, False)),
    PoolRow(90, 8, ANY, ANY, ANY, PoolTile("aligned", 256, 128, 128, 8, 8, 3, True)),
    PoolRow(80, 8, ANY, ANY, ANY, PoolTile("aligned", 128, 128, 64, 8, 8, 3, False)),
    PoolRow(120, 32, ANY, ANY, 96, PoolTile("packed", 64, 64, 16, 8, 8, 2, False)),
    PoolRow(120, 32, ANY, ANY, ANY, PoolTile("aligned", 64, 64, 16, 8, 8, 2, False, 168)),
    PoolRow(100, 32, ANY, ANY, 96, PoolTile("packed", 128, 64, 16, 8, 8, 4, True)),
    PoolRow(100, 32, ANY, ANY, ANY, PoolTile("aligned", 128, 64, 16, 8, 8, 4, True)),
    PoolRow(90, 16, ANY, ANY, 96, PoolTile("packed", 256, 64, 64, 8, 8, 4, True, 200)),
    PoolRow(90, 16, ANY, ANY, ANY, PoolTile("aligned", 256, 128, 64, 8, 8, 4, True, 200)),
    PoolRow(90, 16, ANY, ANY, 96, PoolTile("packed", 128, 64, 64, 8, 8, 3, False)),
    PoolRow(120, 16, ANY, ANY, ANY, PoolTile("aligned", 128, 128, 32, 8, 8, 4, False, 200)),
    PoolRow(90, 16, ANY, ANY, ANY, PoolTile("aligned", 128, 128, 64, 8, 8, 3, False, 200)),
    PoolRow(90, 32, ANY, ANY, 96, PoolTile("packed", 128, 64, 16, 8, 8, 4, True)),
    PoolRow(90, 32, ANY, ANY, ANY, PoolTile("aligned", 128, 128, 16, 8, 8, 4, True)),
    PoolRow(80, 16, ANY, ANY, 96, PoolTile("packed", 128, 64, 64, 8, 4, 3, False)),
    PoolRow(80, 16, ANY, ANY, ANY, PoolTile("aligned", 128, 128, 32, 8, 8, 4, False, 200)),
    PoolRow(80, 32, ANY, ANY, 96, PoolTile("packed", 64, 64, 16, 8, 8, 2, False)),
    PoolRow(80, 32, ANY, ANY, ANY, PoolTile("aligned", 64, 64, 16, 8, 8, 2, False, 168)),
)

PERSISTENT = PoolTile("persistent", 256, 128, 64, 8, 8, 4, True)
"""Tile of the warp-specialised forward for 16-bit inputs on sm_90: for `forward(tile=)` alone."""


def pool_tile(
    sm: int,
    bits: int,
    hidden: int,
    vocabulary: int,
    mean_length: float,
    *,
    descriptors: bool,
    shared_memory: int,
) -> PoolTile:
    """Tile of the forward kernel for these sizes.

    Args:
        sm: Compute capability of the device, for example 90; below 80 the rows of 80 are used.
        bits: Width of the input dtype, 16 or 32, or 8 for the integers of the scan.
        hidden: Hidden size H.
        vocabulary: Number of weight rows V.
        mean_length: Mean tokens per text, T / B.
        descriptors: Whether both matrices can be read by tensor descriptors.
        shared_memory: Bytes that a program may have: cards of one generation differ in it.
    """
    for row in POOL_TILES:
        if (
            row.sm <= max(sm, 80)
            and row.bits == bits
            and hidden <= row.hidden_max
            and vocabulary <= row.vocabulary_max
            and mean_length <= row.length_max
            and (descriptors or not row.tile.descriptors)
            and row.tile.shared_bytes(bits) <= shared_memory
        ):
            return row.tile
    raise LookupError(
        f"no tile for sm {sm}, {bits} bits, H={hidden}, V={vocabulary}, {shared_memory} bytes of "
        "shared memory"
    )


@dataclass(frozen=True)
class BackwardTiles:
    """How the gradients of one kind of device and dtype are computed.

    Attributes:
        onehot_length: Mean tokens per text up to which the dense gradient goes through the matrix
            unit; longer texts gather rows.
        weight_v: Weight rows per program of the gathering weight gradient.
        gather_h: Hidden dimensions per gathering program.
        rows: Rows gathered per step of the hidden gradient.
        split: Entries of one token summed by one program; longer lists are split and summed again.
        chunk: Entries that one program orders.
        place_warps: Warps of that program: one entry a thread keeps the way through the sort short.
        onehot_m: Owned rows (weight rows or tokens) per matrix-unit program.
        onehot_h: Hidden dimensions per matrix-unit program.
        onehot_k: Summed entries per matrix-unit step, and most tokens of a block.
        gather_warps: Warps of the gathering kernels.
        onehot_warps: Warps of the matrix-unit kernels.
        onehot_stages: Load pipeline of the matrix-unit kernels.
        list_registers: Most registers of a thread that sums lists: left to itself the assembler
            aims at more programs on sm_100, and spills.
    """

    onehot_length: int
    weight_v: int = 16
    gather_h: int = 256
    rows: int = 16
    split: int = 1024
    chunk: int = 512
    place_warps: int = 16
    onehot_m: int = 128
    onehot_h: int = 128
    onehot_k: int = 32
    gather_warps: int = 4
    onehot_warps: int = 8
    onehot_stages: int = 2
    list_registers: int = 80


# One-hot tiles win while most texts fit a block of 32 tokens: to gather takes 1.3 to 1.9 times as
# many instructions as one block, and reads more (`benchmarks/count_backward.py`).
BACKWARD_TILES: dict[tuple[int, int], BackwardTiles] = {
    (100, 16): BackwardTiles(onehot_length=32, rows=8),
    (90, 16): BackwardTiles(onehot_length=32),
    (90, 32): BackwardTiles(onehot_length=16, onehot_m=64, onehot_h=64, onehot_k=16),
    (80, 16): BackwardTiles(onehot_length=32),
    (80, 32): BackwardTiles(onehot_length=16, weight_v=8, onehot_m=64, onehot_h=64, onehot_k=16),
}


def backward_tiles(sm: int, bits: int) -> BackwardTiles:
    """Tiles of the gradients for a compute capability and an input width in bits."""
    # From 120 on cards multiply by warps again, as those of 80 do.
    generation = sm if sm < 120 else 80
    return next(
        tiles
        for (least, width), tiles in BACKWARD_TILES.items()
        if width == bits and least <= max(generation, 80)
    )


@dataclass(frozen=True)
class SelectTiles:
    """How rows are selected.

    Attributes:
        row_block: Most logits that one program holds in registers while it looks for a threshold.
        row_warps: Warps of that program for a full block; smaller blocks use fewer.
        part_block: Logits per part of a row that is longer than `row_block`.
        part_warps: Warps of a part.
        loop_block: Logits read at once when a row fits no block and must be read again and again.
        chunk: Logits per program when kept entries are counted and written.
        chunk_warps: Warps of those programs; four spill on sm_120 with Triton 3.9.
    """

    row_block: int = 32768
    row_warps: int = 32
    part_block: int = 16384
    part_warps: int = 16
    loop_block: int = 8192
    chunk: int = 2048
    chunk_warps: int = 8

    def row_warps_of(self, block: int) -> int:
        """Warps for a row held in one block."""
        return max(4, self.row_warps * block // self.row_block)


SELECT_TILES = SelectTiles()
"""Tiles of the selection; the same on every device so far."""
