"""Every shipped kernel configuration, as the compiler must know it: what the gate compiles."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from vdr_db.kernels.cuda import (
    backward_kernels,
    entry_lists,
    forward_kernels,
    scan_kernels,
    topk_kernels,
)
from vdr_db.kernels.cuda.backward import BIAS_BLOCK
from vdr_db.kernels.cuda.configs import (
    ANY,
    PERSISTENT,
    SELECT_TILES,
    PoolTile,
    backward_tiles,
    pool_tile,
)
from vdr_db.kernels.cuda.entry_lists import OFFSET_BLOCK, OFFSET_ROWS
from vdr_db.kernels.cuda.pooling import SEARCH_BLOCK, SEARCH_REGISTERS, SEARCH_STEP
from vdr_db.kernels.cuda.scan import STATES_AT_ONCE

MODULES = [backward_kernels, entry_lists, forward_kernels, scan_kernels, topk_kernels]
HAS_GLUON = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7)
if HAS_GLUON:
    from vdr_db.kernels.cuda import persistent

    MODULES.append(persistent)
CARDS = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
"""Compute capability -> bytes of shared memory that one program may have."""

POINTERS = {
    "grad_ptr": "*fp32",
    "bias_ptr": "*fp32",
    "logits_ptr": "*fp32",
    "weights_ptr": "*fp32",
    "spill_ptr": "*fp32",
    "argmax_ptr": "*i16",
    "scales_ptr": "*fp32",
    "per_norm_ptr": "*fp32",
    "per_rest_ptr": "*fp32",
    "per_score_ptr": "*fp32",
    "state_scales_ptr": "*fp32",
    "norms_ptr": "*fp32",
    "rests_ptr": "*fp32",
    "near_ptr": "*fp32",
    "above_ptr": "*fp32",
    "codes_ptr": "*i8",
    "cu_seqlens_ptr": "*i32",
    "indptr_ptr": "*i64",
    "bounds_ptr": "*i64",
    "ends_ptr": "*i64",
    "slot_ends_ptr": "*i64",
    "spill_ends_ptr": "*i64",
}
"""Types of pointer arguments; those of inputs are given per kernel, all others are int32."""

DIVISIBLE = ("stride_hidden_t", "stride_weight_v", "stride_matrix_row", "stride_output_v",
             "stride_output_row")  # fmt: skip
"""Integers that are multiples of 16 wherever rows can be read in full width."""


@dataclass(frozen=True)
class Spec:
    """A kernel with everything the compiler must know.

    Attributes:
        kernel: Its name.
        sm: Target.
        label: Which configuration this is, for the table.
        types: Types of arguments that differ from `POINTERS`.
        constants: Values of constant arguments.
        num_warps: Warps.
        num_stages: Pipeline depth.
        multiplies: Whether it must use the matrix unit.
        registers: Most registers of a thread, None for the assembler's choice.
    """

    kernel: str
    sm: int
    label: str
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 3
    multiplies: bool = False
    registers: int | None = None


def shipped_tiles(sm: int, bits: int) -> Iterator[PoolTile]:
    """Every tile that some sizes get on a card, short texts first."""
    found = set()
    for mean_length in (32.0, 512.0):
        for descriptors in (True, False):
            tile = pool_tile(
                sm,
                bits,
                768,
                30522,
                mean_length,
                descriptors=descriptors and sm >= 90,
                shared_memory=CARDS[max(sm, 80)],
            )
            if tile not in found:
                found.add(tile)
                yield tile


def pool_specs(sm: int) -> Iterator[Spec]:
    """Forward kernels with every tile that is chosen on the target."""
    for tile in shipped_tiles(sm, 16):
        # other dtypes and sizes change little: the heavier variant stands for both
        for H in (384, 768, 1024) if tile.descriptors else (768,):
            for need_argmax in (False, True) if H == 768 else (True,):
                yield pool_spec(sm, tile, "bf16", H, "tf32x3", need_argmax)
        yield pool_spec(sm, tile, "fp16", 768, "tf32x3", True)
    for tile in shipped_tiles(sm, 32):
        for precision in ("tf32x3", "tf32"):
            for need_argmax in (False, True):
                yield pool_spec(sm, tile, "fp32", 768, precision, need_argmax)
    for tile in shipped_tiles(80, 32):  # exact products take the tiles of 80 everywhere
        for need_argmax in (False, True):
            yield pool_spec(sm, tile, "fp32", 768, "ieee", need_argmax)
    for need_argmax in (False, True):
        constants = {"BLOCK": 1024} if need_argmax else {"BLOCK": 1024, "argmax_ptr": None}
        types = {"keys_ptr": "*i64" if need_argmax else "*i32"}
        label = f"argmax={need_argmax:d}"
        yield Spec("pool_finish_kernel", sm, label, types, constants, 4)
    constants = {"stride_hidden_h": 1, "stride_weight_h": 1, "H": 768,
                 "BLOCK_V": SEARCH_BLOCK, "BLOCK_K": SEARCH_STEP}  # fmt: skip
    for dtype in ("bf16", "fp32"):
        types = {"hidden_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}"}
        yield Spec("search_kernel", sm, dtype, types, constants, 4, registers=SEARCH_REGISTERS)


def pool_spec(
    sm: int, tile: PoolTile, dtype: str, H: int, precision: str, need_argmax: bool
) -> Spec:
    """A forward kernel with one tile."""
    constants: dict[str, Any] = {
        "stride_hidden_h": 1,
        "stride_weight_h": 1,
        "H": H,
        "BLOCK_V": tile.block_v,
        "BLOCK_T": tile.block_t,
        "BLOCK_K": tile.block_k,
        "GROUP": tile.group,
        "DESCRIPTORS": tile.descriptors,
        "NEED_ARGMAX": need_argmax,
        "UPCAST": False,
        "PRECISION": precision,
    }
    if tile.layout == "aligned" and not need_argmax:
        constants["argmax_ptr"] = None
    types = {"hidden": f"*{dtype}", "weight": f"*{dtype}"}
    if tile.descriptors:
        types["hidden"] = f"tensordesc<{dtype}[{tile.block_t},{tile.block_k}]>"
        types["weight"] = f"tensordesc<{dtype}[{tile.block_v},{tile.block_k}]>"
    types["keys_ptr"] = "*i64" if need_argmax else "*i32"
    return Spec(
        f"pool_{tile.layout}_kernel",
        sm,
        f"{dtype} H={H} {tile.block_v}x{tile.block_t}x{tile.block_k} "
        f"{'tma' if tile.descriptors else 'pointers'} argmax={need_argmax:d}"
        + (f" {precision}" if dtype == "fp32" else ""),
        types,
        constants,
        tile.num_warps,
        tile.num_stages,
        multiplies=precision != "ieee",
        registers=tile.registers,
    )


def backward_specs(sm: int) -> Iterator[Spec]:
    """Gradient kernels for both input widths, H = 768."""
    for bits in (16, 32):
        tiles = backward_tiles(sm, bits)
        dtype = "bf16" if bits == 16 else "fp32"
        rows = {"hidden_ptr": f"*{dtype}", "matrix_ptr": f"*{dtype}", "output_ptr": f"*{dtype}"}
        ones = {"stride_hidden_h": 1, "stride_matrix_h": 1, "stride_output_h": 1, "H": 768}
        block = {**ones, "BLOCK_H": tiles.gather_h}
        gather = partial(Spec, sm=sm, types=rows, num_warps=tiles.gather_warps)
        yield gather(
            "weight_gather_kernel", label=dtype, constants={**block, "BLOCK_V": tiles.weight_v}
        )
        slots = ("slot_owner_ptr", "slot_ends_ptr", "spill_ends_ptr", "spill_ptr", "text_ptr")
        unsplit = {**dict.fromkeys(slots), "BLOCK_H": 1024, "ROWS": 4, "SPLIT": 0}
        split = {"ROWS": tiles.rows, "SPLIT": tiles.split, "bias_ptr": None}
        for owners, constants in {
            "columns": unsplit,
            "tokens kept=0": {**split, "rows_ptr": None},
            "tokens kept=1": {**split, "text_ptr": None},
        }.items():
            label = f"{dtype} {owners}"
            yield gather(
                "sum_lists_kernel",
                label=label,
                constants={**block, **constants},
                registers=tiles.list_registers,
            )
        yield gather("merge_splits_kernel", label=dtype, constants={**block, "SPLIT": tiles.split})
        for of_tokens in (False, True):
            yield Spec(
                "onehot_kernel",
                sm,
                f"{dtype} {tiles.onehot_m}x{tiles.onehot_h}x{tiles.onehot_k} tokens={of_tokens:d}",
                {**rows, "output_ptr": "*fp32"} if of_tokens else rows,
                {
                    **ones,
                    "OF_TOKENS": of_tokens,
                    "BLOCK_M": tiles.onehot_m,
                    "BLOCK_H": tiles.onehot_h,
                    "BLOCK_K": tiles.onehot_k,
                    "UPCAST": False,
                    "PRECISION": "tf32x3",
                },
                tiles.onehot_warps,
                tiles.onehot_stages,
                multiplies=True,
            )
    tiles = backward_tiles(sm, 16)
    for owners in ("tokens", "columns"):
        constants = {"CHUNK": tiles.chunk}
        if owners == "columns":
            constants["text_ptr"] = None
        yield Spec("count_entries_kernel", sm, owners, {}, constants, 4)
        offsets = {**constants, "ROWS": OFFSET_ROWS, "BLOCK": OFFSET_BLOCK}
        yield Spec("chunk_offsets_kernel", sm, owners, {}, offsets, 4)
        place = {**constants, "WITHIN_TEXT": owners == "tokens", "KEY": tl.uint32}
        yield Spec("place_entries_kernel", sm, owners, {}, place, tiles.place_warps)
    yield Spec("bias_kernel", sm, "", {"output_ptr": "*fp32"}, {"BLOCK_V": BIAS_BLOCK}, 4)


def select_specs(sm: int) -> Iterator[Spec]:
    """Selection kernels: each block size a row can take, each activation."""
    tiles = SELECT_TILES
    blocks = [tiles.row_block // 4**step for step in range(3)]
    rows = [(block, True, False, tiles.row_warps_of(block)) for block in blocks]
    rows.append((tiles.row_block, True, True, tiles.row_warps))
    rows.append((tiles.loop_block, False, False, tiles.row_warps))
    constants: dict[str, Any]
    for block, one_block, keys, warps in rows:
        constants = {"BLOCK": block, "ONE_BLOCK": one_block, "KEYS": keys, "SCAN": 1024}
        types = {"source_ptr": "*i32" if keys else "*fp32"}
        label = f"block={block} one={one_block:d} keys={keys:d}"
        yield Spec("row_threshold_kernel", sm, label, types, constants, warps)
    constants = {"BLOCK": tiles.part_block, "SCAN": 1024}
    label = f"block={tiles.part_block}"
    yield Spec("part_candidates_kernel", sm, label, {}, constants, tiles.part_warps)
    yield Spec("mark_lexical_kernel", sm, "", {}, {"BLOCK": 256}, 4)
    outputs = dict.fromkeys(("ends_ptr", "columns_ptr", "weights_ptr"))
    for activation in ("elu1p", "log1p_relu", "none", "double_log1p_relu"):
        constants = {"CHUNK": tiles.chunk, "ACTIVATION": activation}
        constants["STEP"] = 32 * tiles.chunk_warps
        write = {**constants, "counts_ptr": None}
        yield Spec("keep_kernel", sm, f"write {activation}", {}, write, tiles.chunk_warps)
    yield Spec("keep_kernel", sm, "count", {}, {**constants, **outputs}, tiles.chunk_warps)


def persistent_specs(sm: int) -> Iterator[Spec]:
    """The persistent forward, where there is one."""
    if sm != 90 or not HAS_GLUON:
        return
    tile = PERSISTENT
    shape = f"{tile.block_v}x{tile.block_t}x{tile.block_k}"
    rows = {"hidden": tile.block_t, "weight": tile.block_v}
    types = {
        name: f"tensordesc<bf16[{n}, {tile.block_k}],{persistent.layout_of(n, tile.block_k)!r}>"
        for name, n in rows.items()
    }
    for need_argmax in (False, True):
        constants = {"H": 768, "BLOCK_V": tile.block_v, "BLOCK_T": tile.block_t,
                     "BLOCK_K": tile.block_k, "GROUP": tile.group, "STAGES": tile.num_stages,
                     "NEED_ARGMAX": need_argmax, "DESCRIPTORS": True}  # fmt: skip
        if not need_argmax:
            constants["argmax_ptr"] = None
        label = f"bf16 H=768 {shape} argmax={need_argmax:d}"
        yield Spec(
            "pool_persistent_kernel", sm, label, types, constants, tile.num_warps, tile.num_stages,
            multiplies=True,
        )  # fmt: skip


def scan_specs(sm: int) -> Iterator[Spec]:
    """The scan in integers, H = 768, and what goes before and after it."""
    ones = {"stride_hidden_h": 1, "stride_weight_h": 1, "H": 768}
    for bits in (16, 32):
        dtype = "bf16" if bits == 16 else "fp32"
        rows = {"hidden_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}"}
        constants = {**ones, "WIDTH": 768, "BLOCK_T": STATES_AT_ONCE, "BLOCK_H": 1024}
        yield Spec("encode_states_kernel", sm, dtype, rows, constants, 4)
        tile = pool_tile(
            sm, bits, 768, 30522, ANY, descriptors=False, shared_memory=CARDS[max(sm, 80)]
        )
        yield Spec(
            "rescore_kernel",
            sm,
            f"{dtype} {tile.block_v}x{tile.block_t}x{tile.block_k}",
            rows,
            {**ones, "BLOCK_V": tile.block_v, "BLOCK_T": tile.block_t, "BLOCK_K": tile.block_k,
             "UPCAST": False, "PRECISION": "tf32x3"},
            tile.num_warps,
            tile.num_stages,
            multiplies=True,
            registers=tile.registers,
        )  # fmt: skip
    tile = pool_tile(sm, 8, 768, 30522, ANY, descriptors=sm >= 90, shared_memory=CARDS[sm])
    shape = f"{tile.block_v}x{tile.block_t}x{tile.block_k}"
    types = {"states": "*i8", "codes": "*i8"}
    if tile.descriptors:
        types = {
            "states": f"tensordesc<i8[{tile.block_t},{tile.block_k}]>",
            "codes": f"tensordesc<i8[{tile.block_v},{tile.block_k}]>",
        }
    yield Spec(
        "scan_kernel",
        sm,
        f"{shape} {'tma' if tile.descriptors else 'pointers'}",
        types,
        {"WIDTH": 768, "BLOCK_V": tile.block_v, "BLOCK_T": tile.block_t, "BLOCK_K": tile.block_k,
         "GROUP": tile.group, "DESCRIPTORS": tile.descriptors},
        tile.num_warps,
        tile.num_stages,
        multiplies=True,
        registers=tile.registers,
    )  # fmt: skip


def all_specs(sm: int) -> list[Spec]:
    """Every shipped configuration on a target."""
    return [
        *pool_specs(sm),
        *persistent_specs(sm),
        *backward_specs(sm),
        *select_specs(sm),
        *scan_specs(sm),
    ]


def kernel_named(name: str) -> JITFunction[Any]:
    """A kernel of the library."""
    return next(getattr(module, name) for module in MODULES if hasattr(module, name))


def sources(kernel: JITFunction[Any]) -> dict[str, str]:
    """Name -> source of a kernel and of every device function that it calls."""
    found = {kernel.__name__: kernel.src}
    for node in ast.walk(ast.parse(kernel.src)):
        called = kernel.fn.__globals__.get(node.id) if isinstance(node, ast.Name) else None
        if isinstance(called, JITFunction) and called.__name__ not in found:
            found.update(sources(called))
    return found


def digest(spec: Spec) -> str:
    """Stands for all that a compiled configuration depends on, but for the compiler."""
    text = repr((spec, sorted(sources(kernel_named(spec.kernel)).items())))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
