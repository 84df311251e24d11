"""Compiles every shipped kernel configuration without a GPU and reads what the compiler made of it.

    python benchmarks/compile_gate.py            # print the table and judge it
    python benchmarks/compile_gate.py --write    # also store it in results/compile_sm<SM>.csv,
                                                 # a part for each version of Triton
    python benchmarks/compile_gate.py --check    # also fail where it is worse than the stored part,
                                                 # or than the table of `count_alu.py`
    python benchmarks/compile_gate.py --touched  # compile what the stored table does not show, and
                                                 # one row of each kernel, which must be as stored

Judged for each configuration: no spilled registers, at most 255 registers (200 in the forward of
16-bit inputs), shared memory within the card's limit, matrix instructions of its generation where
the kernel multiplies, and no message of the assembler that it had to serialise them. All is read
with Triton's own tools. `make gate` runs this for every card and version.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from kernel_specs import CARDS, DIVISIBLE, POINTERS, Spec, all_specs, digest, kernel_named
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

RESULTS = Path(__file__).parent / "results"
VERSIONS = ("3.4.0", "3.7.1", "3.9.0")
"""Of Triton, whose tables are stored: the oldest, that of the torch in the Makefile, the newest."""
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
FORWARD = ("pool_aligned_kernel", "pool_packed_kernel", "pool_persistent_kernel")
FORWARD_REGISTER_LIMIT = 200
"""Of a forward of 16-bit inputs."""
REGISTER_LIMIT = 255
REGISTER_SLACK = 8
"""Registers a configuration may gain before it counts as a regression."""


@dataclass(frozen=True)
class Resources:
    """What the compiler made of a `Spec`: the row of the table.

    Attributes:
        triton: Version of Triton.
        kernel: Kernel.
        label: Configuration.
        num_warps: Warps.
        num_stages: Pipeline depth.
        registers: Registers of a thread.
        spills: Instructions that move registers to or from local memory.
        stack_bytes: Local memory of a thread.
        shared_bytes: Shared memory of a program.
        wgmma: Warpgroup matrix instructions in the PTX.
        mma: Other matrix instructions in the PTX: of warps, or of tensor memory on sm_100.
        tma: Bulk tensor copies in the PTX.
        serialised: Whether the assembler serialised warpgroup instructions.
        source: Digest of the configuration and of the source of its kernel.
    """

    triton: str
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
    source: str


def compiled(spec: Spec, kernel: JITFunction[Any]) -> CompiledKernel:
    """Compiles a configuration of a kernel."""
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
    source = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as source
    return triton.compile(
        source(kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", spec.sm, 32),
        options={
            "num_warps": spec.num_warps,
            "num_stages": spec.num_stages,
            "maxnreg": spec.registers,
            "enable_fp_fusion": True,
        },
    )


def resource_usage(cubin: Path) -> tuple[int, int]:
    """Registers, and bytes of stack and other local memory, of a thread."""
    usage = run(BIN / "cuobjdump", "-res-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"no register count in the output of cuobjdump: {usage[:200]!r}")
    return int(found[1]), int(found[2]) + int(found[3])


def listing(cubin: Path) -> str:
    """Machine instructions (SASS)."""
    return run(BIN / "nvdisasm", "-c", cubin)


def measure(spec: Spec) -> Resources:
    """Compiles a configuration and reads its resources."""
    made = compiled(spec, kernel_named(spec.kernel))
    ptx = made.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin, source = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(made.asm["cubin"])
        registers, stack_bytes = resource_usage(cubin)
        # without local memory nothing can spill; to list instructions takes as long as to compile
        instructions = listing(cubin) if stack_bytes else ""
        messages = ""
        if "wgmma" in ptx:
            source.write_text(ptx)
            target = f"--gpu-name=sm_{spec.sm}a"
            assembler = ptxas(spec.sm)
            messages = run(assembler, target, "-o", Path(folder, "again.cubin"), source)
    operations = Counter(re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", instructions))
    return Resources(
        triton=triton.__version__,
        kernel=spec.kernel,
        label=spec.label,
        num_warps=spec.num_warps,
        num_stages=spec.num_stages,
        registers=registers,
        spills=operations["STL"] + operations["LDL"],
        stack_bytes=stack_bytes,
        shared_bytes=made.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        mma=ptx.count("mma.sync") + ptx.count("tcgen05.mma"),
        tma=ptx.count("cp.async.bulk.tensor"),
        serialised=messages.count("serialized"),
        source=digest(spec),
    )


def ptxas(sm: int) -> str:
    """Assembler for a target; Triton 3.4 has one for all."""
    try:
        return str(nvidia.get_ptxas(sm).path)
    except TypeError:
        return str(nvidia.get_ptxas().path)


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
    limit = REGISTER_LIMIT
    if spec.kernel in FORWARD and not spec.label.startswith("fp32"):
        limit = FORWARD_REGISTER_LIMIT
    if made.registers > limit:
        found.append(f"{made.registers} registers > {limit}")
    if made.shared_bytes > CARDS[sm]:
        found.append(f"{made.shared_bytes} bytes of shared memory > {CARDS[sm]}")
    if spec.multiplies and sm == 90 and not made.wgmma:
        found.append("no warpgroup matrix instruction")
    if spec.multiplies and sm != 90 and not made.mma:
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


def read_table(sm: int) -> list[dict[str, str]]:
    """Rows of a stored table, of all versions of Triton."""
    if not table_path(sm).exists():
        return []
    with table_path(sm).open(newline="") as file:
        return list(csv.DictReader(file))


def resources(row: dict[str, str]) -> Resources:
    """A row of a stored table."""
    texts = ("triton", "kernel", "label", "source")
    return Resources(**{  # type: ignore[arg-type]
        name: value if name in texts else int(value) for name, value in row.items()
    })  # fmt: skip


def write_table(sm: int, made: Sequence[Resources]) -> None:
    """Stores rows in place of those of their version; drops those of versions of no interest."""
    others = set(VERSIONS) - {row.triton for row in made}
    rows = [row for row in map(resources, read_table(sm)) if row.triton in others]
    RESULTS.mkdir(exist_ok=True)
    with table_path(sm).open("w", newline="") as file:
        names = [field.name for field in fields(Resources)]
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in sorted([*rows, *made], key=lambda x: x.triton))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles, prints and judges; 1 if anything is at fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sm", type=int, nargs="+", default=[90, 80], choices=sorted(CARDS))
    parser.add_argument("--write", action="store_true", help="store the table")
    parser.add_argument("--check", action="store_true", help="compare with the stored table")
    parser.add_argument(
        "--touched", action="store_true", help="compile what has changed, and probes"
    )
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    at_fault = []
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        for sm in options.sm:
            specs = all_specs(sm)
            stored = [row for row in read_table(sm) if row["triton"] == triton.__version__]
            shown = {row["source"]: row for row in stored if options.touched}
            # The table is taken at its word for the rest only where it is right about these.
            one_of_each = {spec.kernel: digest(spec) for spec in specs}.values()
            probes = {source: shown.pop(source) for source in one_of_each if source in shown}
            fresh = [spec for spec in specs if digest(spec) not in shown]
            made = list(pool.map(measure, fresh))
            for spec, row in zip(fresh, made, strict=True):
                wrong = faults(sm, spec, row)
                if row.source in probes and row != resources(probes[row.source]):
                    wrong.append("not what the stored table says of the same source and Triton")
                at_fault += [f"sm_{sm} {row.kernel} {row.label}: {fault}" for fault in wrong]
                print(
                    f"sm_{sm} {row.kernel:24} {row.label:44} w{row.num_warps:<2} s{row.num_stages} "
                    f"reg {row.registers:3} spill {row.spills:3} shared {row.shared_bytes:6} "
                    f"wgmma {row.wgmma:3} mma {row.mma:3} tma {row.tma:2}",
                    flush=True,
                )
            made += [resources(shown[digest(spec)]) for spec in specs if digest(spec) in shown]
            if options.check and stored:
                at_fault += [f"sm_{sm} {fault}" for fault in regressions(stored, made)]
            elif options.check:
                print(f"no stored table of Triton {triton.__version__}: compared with limits only")
            if options.check and sm == 90:
                from count_alu import count_all, grown

                at_fault += grown(count_all())
            if options.write:
                write_table(sm, made)
    for fault in at_fault:
        print(f"FAULT {fault}")
    print(f"{len(at_fault)} faults, Triton {triton.__version__}")
    return 1 if at_fault else 0


if __name__ == "__main__":
    sys.exit(main())
