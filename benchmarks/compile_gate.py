"""Compiles every shipped kernel configuration without a GPU and reads what the compiler made of it.

    python benchmarks/compile_gate.py            # print the table and judge it
    python benchmarks/compile_gate.py --write    # also store it as results/compile_sm<SM>.csv
    python benchmarks/compile_gate.py --check    # also fail where it is worse than the stored table

Judged for each configuration: no spilled registers, at most 255 registers, shared memory within
the device's limit, warpgroup matrix instructions on sm_90 where the kernel multiplies, and no
message of the assembler that it had to serialise them. All is read with Triton's own tools.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from vdr_db.kernels.cuda import backward_kernels as pooling_backward_kernels
from vdr_db.kernels.cuda import entry_lists, topk_kernels
from vdr_db.kernels.cuda import forward_kernels as pooling_forward
from vdr_db.kernels.cuda.configs import BACKWARD_TILES, POOL_TILES, SELECT_TILES, PoolTile
from vdr_db.kernels.cuda.entry_lists import PLACE_BLOCK

RESULTS = Path(__file__).parent / "results"
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = {90: 227 * 1024, 80: 163 * 1024}
REGISTER_LIMIT = 255
REGISTER_SLACK = 8
"""Registers a configuration may gain before it counts as a regression."""

POINTERS = {
    "grad_ptr": "*fp32",
    "bias_ptr": "*fp32",
    "logits_ptr": "*fp32",
    "weights_ptr": "*fp32",
    "spill_ptr": "*fp32",
    "argmax_ptr": "*i16",
    "cu_seqlens_ptr": "*i32",
    "indptr_ptr": "*i64",
    "ends_ptr": "*i64",
    "slot_ends_ptr": "*i64",
    "spill_ends_ptr": "*i64",
}
"""Types of pointer arguments; those of inputs are given per kernel, all others are int32."""

DIVISIBLE = ("stride_hidden_t", "stride_weight_v", "stride_output_t", "stride_output_v")
"""Integers that are multiples of 16 wherever rows can be read in full width."""


@dataclass(frozen=True)
class Spec:
    """A kernel with everything the compiler must know.

    Attributes:
        module: Module that holds the kernel.
        kernel: Its name.
        sm: Target.
        label: Which configuration this is, for the table.
        types: Types of arguments that differ from `POINTERS`.
        constants: Values of constant arguments.
        num_warps: Warps.
        num_stages: Pipeline depth.
        needs_wgmma: Whether it must multiply by warpgroup instructions on sm_90.
    """

    module: str
    kernel: str
    sm: int
    label: str
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 3
    needs_wgmma: bool = False


@dataclass(frozen=True)
class Resources:
    """What the compiler made of a `Spec`: the row of the table.

    Attributes:
        kernel: Kernel.
        label: Configuration.
        num_warps: Warps.
        num_stages: Pipeline depth.
        registers: Registers of a thread.
        spills: Instructions that move registers to or from local memory.
        stack_bytes: Local memory of a thread.
        shared_bytes: Shared memory of a program.
        wgmma: Warpgroup matrix instructions in the PTX.
        mma: Warp matrix instructions in the PTX.
        tma: Bulk tensor copies in the PTX.
        serialised: Whether the assembler serialised warpgroup instructions.
    """

    kernel: str
    label: str
    num_warps: int
    num_stages: int
    registers: int
    spills: int
    stack_bytes: int
    shared_bytes: int
    wgmma: int
    mma: int
    tma: int
    serialised: int


def pool_specs(sm: int) -> Iterator[Spec]:
    """Forward kernels: every row of the tile table that can be used on the target."""
    for row in POOL_TILES:
        if row.sm > sm:
            continue
        tile = row.tile
        if row.bits == 16:
            sizes = (384, 768, 1024) if tile.descriptors else (768,)
            runs = [("bf16", H, "tf32x3") for H in sizes] + [("fp16", 768, "tf32x3")]
        else:
            precisions = ("ieee", "tf32x3") if row.sm == 80 else ("tf32x3", "tf32")
            if row.sm < sm:
                precisions = ("ieee",)
            runs = [("fp32", 768, precision) for precision in precisions]
        if row.sm < sm and row.bits == 16:
            continue
        for dtype, H, precision in runs:
            # other dtypes and sizes change little: the heavier variant stands for both
            variants = (False, True) if (dtype, H) in (("bf16", 768), ("fp32", 768)) else (True,)
            for need_argmax in variants:
                yield pool_spec(sm, tile, dtype, H, precision, need_argmax)
    for need_argmax in (False, True):
        constants = {"HAS_BIAS": True, "NEED_ARGMAX": need_argmax, "BLOCK": 1024}
        if not need_argmax:
            constants["argmax_ptr"] = None
        types = {"keys_ptr": "*i64" if need_argmax else "*i32"}
        label = f"argmax={need_argmax:d}"
        yield Spec("pooling_forward", "pool_finish_kernel", sm, label, types, constants, 4)


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
    if tile.layout == "aligned":
        constants["HAS_BIAS"] = True
        if not need_argmax:
            constants["argmax_ptr"] = None
    types = {"hidden": f"*{dtype}", "weight": f"*{dtype}"}
    if tile.descriptors:
        types["hidden"] = f"tensordesc<{dtype}[{tile.block_t},{tile.block_k}]>"
        types["weight"] = f"tensordesc<{dtype}[{tile.block_v},{tile.block_k}]>"
    types["keys_ptr"] = "*i64" if need_argmax else "*i32"
    return Spec(
        "pooling_forward",
        f"pool_{tile.layout}_kernel",
        sm,
        f"{dtype} H={H} {tile.block_v}x{tile.block_t}x{tile.block_k} "
        f"{'tma' if tile.descriptors else 'pointers'} argmax={need_argmax:d}"
        + (f" {precision}" if dtype == "fp32" else ""),
        types,
        constants,
        tile.num_warps,
        tile.num_stages,
        needs_wgmma=precision != "ieee",
    )


def backward_specs(sm: int) -> Iterator[Spec]:
    """Gradient kernels for both input widths, H = 768."""
    for (row_sm, bits), tiles in BACKWARD_TILES.items():
        if row_sm != sm:
            continue
        dtype = "bf16" if bits == 16 else "fp32"
        rows = {"hidden_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "output_ptr": f"*{dtype}"}
        ones = {"stride_hidden_h": 1, "stride_weight_h": 1, "stride_output_h": 1, "H": 768}
        gather = partial(Spec, "pooling_backward_kernels", sm=sm, label=dtype, types=rows)
        block = {"BLOCK_H": tiles.gather_h}
        yield gather(
            kernel="weight_gather_kernel",
            constants={**ones, **block, "BLOCK_V": tiles.weight_v},
            num_warps=tiles.gather_warps,
        )
        yield gather(
            kernel="weight_kept_kernel",
            constants={
                **ones,
                **{"BLOCK_H": 1024, "ROWS": 4},
                **{"NEED_WEIGHT": True, "NEED_BIAS": True},
            },
            num_warps=tiles.gather_warps,
        )
        for has_columns in (False, True):
            constants = {"ROWS": tiles.rows, "SPLIT": tiles.split, "HAS_COLUMNS": has_columns}
            if not has_columns:
                constants["columns_ptr"] = None
            yield Spec(
                "pooling_backward_kernels",
                "hidden_gather_kernel",
                sm,
                f"{dtype} kept={has_columns:d}",
                rows,
                {**ones, **block, **constants},
                tiles.gather_warps,
            )
        yield gather(
            kernel="hidden_merge_kernel",
            constants={**ones, **block, "SPLIT": tiles.split},
            num_warps=tiles.gather_warps,
        )
        onehot = {
            **ones,
            "BLOCK_M": tiles.onehot_m,
            "BLOCK_H": tiles.onehot_h,
            "BLOCK_K": tiles.onehot_k,
            "UPCAST": False,
            "PRECISION": "tf32x3",
        }
        for kernel in ("weight_onehot_kernel", "hidden_onehot_kernel"):
            yield Spec(
                "pooling_backward_kernels",
                kernel,
                sm,
                f"{dtype} {tiles.onehot_m}x{tiles.onehot_h}x{tiles.onehot_k}",
                {**rows, "output_ptr": "*fp32"} if kernel.startswith("hidden") else rows,
                onehot,
                tiles.onehot_warps,
                tiles.onehot_stages,
                needs_wgmma=True,
            )
    chunk = BACKWARD_TILES[sm, 16].chunk
    constants: dict[str, Any]
    for has_indptr in (False, True):
        constants = {"HAS_INDPTR": has_indptr, "CHUNK": chunk}
        if not has_indptr:
            constants["indptr_ptr"] = None
        label = f"kept={has_indptr:d}"
        yield Spec("entry_lists", "count_entries_kernel", sm, label, {}, constants, 4)
        constants = {**constants, "BLOCK": PLACE_BLOCK}
        yield Spec("entry_lists", "place_entries_kernel", sm, label, {}, constants, 4)
    for kernel in (
        "chunk_offsets_kernel",
        "mark_columns_kernel",
        "count_columns_kernel",
        "place_columns_kernel",
    ):
        types = {} if kernel == "chunk_offsets_kernel" else {"before_ptr": "*i32"}
        yield Spec("entry_lists", kernel, sm, "", types, {"BLOCK": 256}, 4)
    yield Spec("pooling_backward_kernels", "bias_kernel", sm, "", {"output_ptr": "*fp32"},
               {"BLOCK_V": 256}, 4)  # fmt: skip


def select_specs(sm: int) -> Iterator[Spec]:
    """Selection kernels: each block size a row can take, each activation."""
    tiles, module = SELECT_TILES, "topk_kernels"
    blocks = [tiles.row_block // 4**step for step in range(3)]
    rows = [(block, True, False, tiles.row_warps_of(block)) for block in blocks]
    rows.append((tiles.row_block, True, True, tiles.row_warps))
    rows.append((tiles.loop_block, False, False, tiles.row_warps))
    constants: dict[str, Any]
    for block, one_block, keys, warps in rows:
        constants = {"BLOCK": block, "ONE_BLOCK": one_block, "KEYS": keys, "SCAN": 1024}
        types = {"source_ptr": "*i32" if keys else "*fp32"}
        label = f"block={block} one={one_block:d} keys={keys:d}"
        yield Spec(module, "row_threshold_kernel", sm, label, types, constants, warps)
    constants = {"BLOCK": tiles.part_block, "SCAN": 1024}
    label = f"block={tiles.part_block}"
    yield Spec(module, "part_candidates_kernel", sm, label, {}, constants, tiles.part_warps)
    yield Spec(module, "mark_lexical_kernel", sm, "", {}, {"BLOCK": 256}, 4)
    for activation in ("elu1p", "log1p_relu", "none", "double_log1p_relu"):
        constants = {
            "CHUNK": tiles.chunk,
            "KEEP_ALL": False,
            "HAS_LEXICAL": True,
            "ACTIVATION": activation,
        }
        yield Spec(module, "write_kept_kernel", sm, activation, {}, constants, tiles.chunk_warps)
    yield Spec(module, "count_kept_kernel", sm, activation, {}, constants, tiles.chunk_warps)


def all_specs(sm: int) -> list[Spec]:
    """Every shipped configuration on a target."""
    return [*pool_specs(sm), *backward_specs(sm), *select_specs(sm)]


def measure(spec: Spec) -> Resources:
    """Compiles a configuration and reads its resources."""
    modules = (entry_lists, pooling_backward_kernels, pooling_forward, topk_kernels)
    module = next(m for m in modules if m.__name__.endswith(f".{spec.module}"))
    kernel = getattr(module, spec.kernel)
    constants = {name: value for name, value in spec.constants.items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        default = POINTERS.get(name, "*i32" if name.endswith("_ptr") else "i32")
        signature[name] = spec.types.get(name, default)
        if signature[name].startswith("*") or name in DIVISIBLE:
            attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", spec.sm, 32),
        options={
            "num_warps": spec.num_warps,
            "num_stages": spec.num_stages,
            "enable_fp_fusion": True,
        },
    )
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin, source = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = run(BIN / "cuobjdump", "-res-usage", cubin)
        listing = run(BIN / "nvdisasm", "-c", cubin)
        messages = ""
        if "wgmma" in ptx:
            source.write_text(ptx)
            target = f"--gpu-name=sm_{spec.sm}a"
            assembler = get_ptxas(spec.sm).path
            messages = run(assembler, target, "-o", Path(folder, "again.cubin"), source)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"no register count in the output of cuobjdump: {usage[:200]!r}")
    operations = Counter(re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", listing))
    return Resources(
        kernel=spec.kernel,
        label=spec.label,
        num_warps=spec.num_warps,
        num_stages=spec.num_stages,
        registers=int(found[1]),
        spills=operations["STL"] + operations["LDL"],
        stack_bytes=int(found[2]),
        shared_bytes=compiled.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        mma=ptx.count("mma.sync"),
        tma=ptx.count("cp.async.bulk.tensor"),
        serialised=messages.count("serialized"),
    )


def run(*command: str | Path) -> str:
    """Output of a command, errors included."""
    finished = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=True
    )
    return finished.stdout + finished.stderr


def faults(sm: int, spec: Spec, made: Resources) -> list[str]:
    """What is wrong with a compiled configuration; empty if nothing is."""
    found = []
    if made.spills or made.stack_bytes:
        found.append(f"{made.spills} spill instructions, {made.stack_bytes} bytes of stack")
    if made.registers > REGISTER_LIMIT:
        found.append(f"{made.registers} registers > {REGISTER_LIMIT}")
    if made.shared_bytes > SHARED_LIMIT[sm]:
        found.append(f"{made.shared_bytes} bytes of shared memory > {SHARED_LIMIT[sm]}")
    if spec.needs_wgmma and sm == 90 and not made.wgmma:
        found.append("no warpgroup matrix instruction")
    if spec.needs_wgmma and sm == 80 and not made.mma:
        found.append("no matrix instruction")
    if spec.constants.get("DESCRIPTORS") and not made.tma:
        found.append("no bulk tensor copy")
    if made.serialised:
        found.append("the assembler serialised warpgroup matrix instructions")
    return found


def regressions(stored: Sequence[dict[str, str]], made: Sequence[Resources]) -> list[str]:
    """Where a table is worse than the stored one, or holds other configurations."""
    before = {(row["kernel"], row["label"]): row for row in stored}
    now = {(row.kernel, row.label): row for row in made}
    found = [f"{key}: in the stored table only" for key in before.keys() - now.keys()]
    found += [f"{key}: not in the stored table" for key in now.keys() - before.keys()]
    for key in sorted(before.keys() & now.keys()):
        row, old = now[key], before[key]
        if row.registers > int(old["registers"]) + REGISTER_SLACK:
            found.append(f"{key}: {row.registers} registers, were {old['registers']}")
        if row.shared_bytes > int(old["shared_bytes"]):
            found.append(
                f"{key}: {row.shared_bytes} bytes of shared memory, were {old['shared_bytes']}"
            )
    return found


def table_path(sm: int) -> Path:
    """Where the table of a target is stored."""
    return RESULTS / f"compile_sm{sm}.csv"


def read_table(sm: int) -> tuple[str, list[dict[str, str]]]:
    """Triton version that a stored table was made with, and its rows."""
    with table_path(sm).open(newline="") as file:
        version = file.readline().removeprefix("# triton ").strip()
        return version, list(csv.DictReader(file))


def write_table(sm: int, made: Sequence[Resources]) -> None:
    """Stores a table."""
    RESULTS.mkdir(exist_ok=True)
    with table_path(sm).open("w", newline="") as file:
        file.write(f"# triton {triton.__version__}\n")
        names = [field.name for field in fields(Resources)]
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in made)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles, prints and judges; 1 if anything is at fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sm", type=int, nargs="+", default=[90, 80], choices=sorted(SHARED_LIMIT))
    parser.add_argument("--write", action="store_true", help="store the table")
    parser.add_argument("--check", action="store_true", help="compare with the stored table")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    at_fault = []
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        for sm in options.sm:
            specs = all_specs(sm)
            made = list(pool.map(measure, specs))
            for spec, row in zip(specs, made, strict=True):
                wrong = faults(sm, spec, row)
                at_fault += [f"sm_{sm} {row.kernel} {row.label}: {fault}" for fault in wrong]
                print(
                    f"sm_{sm} {row.kernel:24} {row.label:44} w{row.num_warps:<2} s{row.num_stages} "
                    f"reg {row.registers:3} spill {row.spills:3} shared {row.shared_bytes:6} "
                    f"wgmma {row.wgmma:3} mma {row.mma:3} tma {row.tma:2}"
                )
            if options.check:
                version, stored = read_table(sm)
                if version == triton.__version__:
                    at_fault += [f"sm_{sm} {fault}" for fault in regressions(stored, made)]
                else:
                    print(f"stored table is of Triton {version}: compared with limits only")
            if options.write:
                write_table(sm, made)
    for fault in at_fault:
        print(f"FAULT {fault}")
    print(f"{len(at_fault)} faults, Triton {triton.__version__}")
    return 1 if at_fault else 0


if __name__ == "__main__":
    sys.exit(main())
