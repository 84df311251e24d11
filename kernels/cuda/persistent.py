"""A persistent, warp-specialised forward for sm_90, in Gluon: chosen by its tile alone.

One program a multiprocessor walks over (text, vocabulary tile) pairs. A warp of its own loads steps
of both matrices (TMA) into a ring of buffers, so that loads go on through every epilogue and every
change of tile; eight warps multiply, pool and store. Results are those of `pool_aligned_kernel`:
products sum in the same order.

Opt-in: `pooling.forward(..., tile=configs.PERSISTENT)`. No GPU has run it yet, and Triton's
interpreter does not know Gluon: it is compiled, and its barriers were read in the machine code.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# Device functions take what Triton traces; annotations on them would mean constants.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from vdr_db.kernels.cuda.configs import PoolTile
from vdr_db.kernels.cuda.primitives import SIZES

__all__ = ["launch"]

load_tile = getattr(tma, "async_load", tma.async_copy_global_to_shared)  # renamed after Triton 3.7
SEARCH = gl.constexpr(-2)  # as in `forward_kernels`
PROPAGATE = gl.constexpr(tl.PropagateNan.ALL)
LOADER_WARPS = gl.constexpr(1)
LOADER_REGISTERS = gl.constexpr(24)


@gluon.jit
def nan_max(left, right):
    """Larger of two; NaN if either is."""
    return gl.maximum(left, right, propagate_nan=PROPAGATE)


@gluon.jit
def tile_of(number, B, n_columns, GROUP: gl.constexpr):
    """(text, tile of the vocabulary) of a number, as `primitives.grouped_tile`."""
    width = GROUP * n_columns
    group = number // width
    first = group * GROUP
    size = gl.minimum(B - first, GROUP)
    inside = number - group * width
    return first + inside % size, inside // size


@gluon.jit
def load_steps(
    hidden,
    weight,
    cu_seqlens_ptr,
    states,
    rows,
    is_free,
    is_full,
    B,
    V,
    H: gl.constexpr,
    BLOCK_V: gl.constexpr,
    BLOCK_T: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Fills the ring with the steps of all tiles of a program."""
    n_columns = gl.cdiv(V, BLOCK_V)
    step = 0
    for number in range(gl.program_id(0), B * n_columns, gl.num_programs(0)):
        text, tile = tile_of(number, B, n_columns, GROUP)
        start = gl.load(cu_seqlens_ptr + text).to(gl.int32)
        end = gl.load(cu_seqlens_ptr + text + 1).to(gl.int32)
        for block in range(start, end, BLOCK_T):
            token = gl.maximum(gl.minimum(block, end - BLOCK_T), start)
            for k in range(0, H, BLOCK_K):
                stage = step % STAGES
                mbarrier.wait(is_free.index(stage), (step // STAGES & 1) ^ 1)
                full = is_full.index(stage)
                mbarrier.expect(full, weight.block_type.nbytes + hidden.block_type.nbytes)
                load_tile(weight, [tile * BLOCK_V, k], full, rows.index(stage))
                load_tile(hidden, [token, k], full, states.index(stage))
                step += 1


@gluon.jit
def pool_steps(
    cu_seqlens_ptr,
    bias_ptr,
    logits_ptr,
    argmax_ptr,
    states,
    rows,
    is_free,
    is_full,
    B,
    V,
    H: gl.constexpr,
    BLOCK_V: gl.constexpr,
    BLOCK_T: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    NEED_ARGMAX: gl.constexpr,
):
    """Multiplies what the ring holds, pools blocks, and stores each tile once."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_T, 16])
    of_v: gl.constexpr = gl.SliceLayout(1, layout)
    of_t: gl.constexpr = gl.SliceLayout(0, layout)
    n_columns = gl.cdiv(V, BLOCK_V)
    step = 0
    for number in range(gl.program_id(0), B * n_columns, gl.num_programs(0)):
        text, tile = tile_of(number, B, n_columns, GROUP)
        start = gl.load(cu_seqlens_ptr + text).to(gl.int32)
        end = gl.load(cu_seqlens_ptr + text + 1).to(gl.int32)
        best = gl.full([BLOCK_V], float("-inf"), gl.float32, of_v)
        where = gl.full([BLOCK_V], -1, gl.int32, of_v)
        for block in range(start, end, BLOCK_T):
            token = gl.maximum(gl.minimum(block, end - BLOCK_T), start)
            products = gl.zeros([BLOCK_V, BLOCK_T], gl.float32, layout)
            for k in range(0, H, BLOCK_K):
                stage = step % STAGES
                mbarrier.wait(is_full.index(stage), step // STAGES & 1)
                products = warpgroup_mma(
                    rows.index(stage), states.index(stage).permute((1, 0)), products, is_async=True
                )
                # the step before is done: its buffers are free
                products = warpgroup_mma_wait(1, deps=[products])
                mbarrier.arrive(is_free.index((step + STAGES - 1) % STAGES), pred=k > 0)
                step += 1
            products = warpgroup_mma_wait(0, deps=[products])
            mbarrier.arrive(is_free.index((step + STAGES - 1) % STAGES))
            if token + BLOCK_T > end:
                inside = token + gl.arange(0, BLOCK_T, of_t) < end
                products = gl.where(inside[None, :], products, float("-inf"))
            tile_best = gl.reduce(products, 1, nan_max)
            if NEED_ARGMAX:
                # as `forward_kernels.best_of_tile`, which says why
                column = gl.arange(0, BLOCK_T, of_t).to(gl.float32, bitcast=True)
                distance = products - tile_best[:, None]
                found = gl.min(distance * -1.7014118346046923e38 + column[None, :], 1)
                found = found.to(gl.uint32, bitcast=True)
                tile_where = gl.where(found < BLOCK_T, found.to(gl.int32) + token - start, SEARCH)
                better = (tile_best > best) | (where == -1)
                better |= (tile_best != tile_best) & (best == best)
                where = gl.where(better, tile_where, where)
            best = nan_max(best, tile_best)

        offs_v = tile * BLOCK_V + gl.arange(0, BLOCK_V, of_v)
        inside = offs_v < V
        best += 0.0
        if bias_ptr is not None:
            best += gl.load(bias_ptr + offs_v, mask=inside, other=0.0).to(gl.float32)
        offset = text.to(gl.int64) * V + offs_v
        if NEED_ARGMAX:
            if argmax_ptr.dtype.element_ty == gl.int16:
                fits = where <= 32767
                where = gl.where(fits, where, -1)
                best = gl.where(fits, best, float("nan"))
            gl.store(argmax_ptr + offset, where.to(argmax_ptr.dtype.element_ty), mask=inside)
        gl.store(logits_ptr + offset, best, mask=inside)


@gluon.jit(do_not_specialize=SIZES)
def pool_persistent_kernel(
    hidden,
    weight,
    bias_ptr,
    cu_seqlens_ptr,
    logits_ptr,
    argmax_ptr,
    B,
    V,
    H: gl.constexpr,
    BLOCK_V: gl.constexpr,
    BLOCK_T: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    NEED_ARGMAX: gl.constexpr,
):
    """The ring and its barriers, and the two kinds of warps."""
    states = gl.allocate_shared_memory(hidden.dtype, [STAGES, BLOCK_T, BLOCK_K], hidden.layout)
    rows = gl.allocate_shared_memory(weight.dtype, [STAGES, BLOCK_V, BLOCK_K], weight.layout)
    is_free = mbarrier.allocate_mbarrier(batch=STAGES)
    is_full = mbarrier.allocate_mbarrier(batch=STAGES)
    for stage in gl.static_range(STAGES):
        mbarrier.init(is_free.index(stage), count=1)
        mbarrier.init(is_full.index(stage), count=1)
    gl.warp_specialize(
        [
            (
                pool_steps,
                (cu_seqlens_ptr, bias_ptr, logits_ptr, argmax_ptr, states, rows, is_free, is_full,
                 B, V, H, BLOCK_V, BLOCK_T, BLOCK_K, GROUP, STAGES, NEED_ARGMAX),
            ),
            (
                load_steps,
                (hidden, weight, cu_seqlens_ptr, states, rows, is_free, is_full,
                 B, V, H, BLOCK_V, BLOCK_T, BLOCK_K, GROUP, STAGES),
            ),
        ],
        [LOADER_WARPS],
        [LOADER_REGISTERS],
    )  # fmt: skip


def launch(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    logits: Tensor,
    argmax: Tensor | None,
    tile: PoolTile,
) -> None:
    """Runs the kernel; arguments as of `pooling.forward`, outputs given."""
    B, V = logits.shape
    n_programs = torch.cuda.get_device_properties(hidden.device).multi_processor_count
    pool_persistent_kernel[(min(n_programs, B * triton.cdiv(V, tile.block_v)),)](
        descriptor(hidden, tile.block_t, tile.block_k),
        descriptor(weight, tile.block_v, tile.block_k),
        *(bias, cu_seqlens, logits, argmax, B, V),
        H=hidden.shape[1],
        BLOCK_V=tile.block_v,
        BLOCK_T=tile.block_t,
        BLOCK_K=tile.block_k,
        GROUP=tile.group,
        STAGES=tile.num_stages,
        NEED_ARGMAX=argmax is not None,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
    )


def descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    """Descriptor of a 16-bit matrix for tiles of `rows` x `columns`."""
    return TensorDescriptor.from_tensor(matrix, [rows, columns], layout_of(rows, columns))


def layout_of(rows: int, columns: int) -> Any:
    """How tiles of 16-bit numbers lie in shared memory for the matrix unit."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)
