"""Counts instructions of the forward kernel's inner loop, and models its time, without a GPU.

    python benchmarks/count_alu.py                   # print the counts
    python benchmarks/count_alu.py --before 558bc49  # also those of the kernel at that commit
    python benchmarks/count_alu.py --write           # also store them in results/predicted_sm90.csv
    python benchmarks/count_alu.py --check           # fail where they have grown

Counted in the SASS of `pool_aligned_kernel` (bfloat16, H = 768, 256 x 128 x 64) for sm_90a: one
turn of the loop multiplies one step of 64 hidden dimensions, and every twelfth also pools the
finished block, which is the epilogue. ALU operations matter because that pipe takes a warp's
instruction every second cycle, while the matrix unit waits for the epilogue.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import triton
from compile_gate import RESULTS, compiled, listing, resource_usage
from kernel_specs import Spec, all_specs, kernel_named
from triton.runtime.jit import JITFunction

PATH = RESULTS / "predicted_sm90.csv"
ROOT = RESULTS.parents[1]
ALU = {
    *("BMSK", "FLO", "FMNMX", "FSEL", "FSET", "FSETP", "IABS", "IADD3", "IMNMX", "ISETP", "LEA"),
    *("LOP3", "MOV", "PLOP3", "PRMT", "SEL", "SGXT", "SHF", "VABSDIFF", "VIADD", "VIMNMX"),
}
"""Instructions of the ALU pipe (integers, comparisons, selections); IMAD and FFMA have others."""
STEPS = 768 // 64
WARPS_OF_A_SCHEDULER = 2
MATRIX_CYCLES = 2 * 256 * 128 * 768 // 4096  # 4,096 FLOP of bfloat16 per cycle and multiprocessor
MULTIPROCESSORS, CYCLES_PER_MS = 132, 1.65e6
SHAPES = {"B64_L256_ms": (64, 256), "B320_L512_ms": (320, 512)}


@dataclass(frozen=True)
class Counts:
    """Instructions of a warp, and what they would take on an H200 at 1.65 GHz.

    Attributes:
        source: `here`, or the commit that the kernel is of.
        argmax: Whether positions are kept.
        triton: Version of Triton.
        registers: Registers of a thread.
        step_alu: ALU operations of a step.
        step_all: All instructions of a step.
        epilogue_alu: ALU operations of an epilogue.
        epilogue_all: All instructions of an epilogue.
        B64_L256_ms: Milliseconds of 64 texts of 256 tokens, V = 30,522: matrix unit and epilogue.
        B320_L512_ms: The same for 320 texts of 512 tokens.
    """

    source: str
    argmax: int
    triton: str
    registers: int
    step_alu: int
    step_all: int
    epilogue_alu: int
    epilogue_all: int
    B64_L256_ms: float
    B320_L512_ms: float


def parse(text: str) -> tuple[list[str], dict[str, int]]:
    """Instructions of a listing in their order, and the place of each label."""
    found: list[str] = []
    labels = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L\w+):", line.strip()):
            labels[label[1]] = len(found)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+([^;]+);", line):
            found.append(instruction[1].strip())
    return found, labels


def turns(text: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """(ALU, all) instructions of the cheapest and of the dearest turn of the loop that pools.

    Raises:
        RuntimeError: There is no loop with matrix instructions and maxima.
    """
    instructions, labels = parse(text)
    names = [re.sub(r"^@!?U?P\w+\s+", "", x).split()[0].split(".")[0] for x in instructions]

    def target(place: int) -> int | None:
        found = re.search(r"BRA.*\((\.L\w+)\)", instructions[place])
        return labels[found[1]] if found else None

    # the innermost one; waits that lie behind the kernel jump back too
    loops = []
    for place in range(len(names)):
        first = target(place)
        if first is not None and {"HGMMA", "FMNMX"} <= set(names[first : place + 1]):
            loops.append((place - first, first, place))
    if not loops:
        raise RuntimeError("no loop with matrix instructions and maxima in the listing")
    _, first, last = min(loops)
    # Turns that reach a place, by what they have cost; branches out of the loop wait and come back.
    costs: dict[int, set[tuple[int, int]]] = {first: {(0, 0)}}
    for place in range(first, last + 1):
        reached = {(alu + (names[place] in ALU), n + 1) for alu, n in costs.pop(place, set())}
        jump = target(place)
        if place == last:
            break
        if jump is not None and place < jump <= last:
            costs.setdefault(jump, set()).update(reached)
        if jump is None or instructions[place].startswith("@") or not first <= jump <= last:
            costs.setdefault(place + 1, set()).update(reached)
    return min(reached), max(reached)


def count(spec: Spec, source: str, kernel: JITFunction[Any]) -> Counts:
    """Counts of a configuration of a kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled(spec, kernel).asm["cubin"])
        registers, _ = resource_usage(cubin)
        (step_alu, step_all), (alu, everything) = turns(listing(cubin))
    alu, everything = alu - step_alu, everything - step_all
    block = MATRIX_CYCLES + WARPS_OF_A_SCHEDULER * max(2 * alu, everything)
    times = {
        name: round(
            texts * (length // 128) * -(-30522 // 256) / MULTIPROCESSORS * block / CYCLES_PER_MS, 3
        )
        for name, (texts, length) in SHAPES.items()
    }
    argmax = int(spec.constants["NEED_ARGMAX"])
    version = triton.__version__
    counted = (step_alu, step_all, alu, everything)
    return Counts(source, argmax, version, registers, *counted, **times)


def specs() -> list[Spec]:
    """The configuration that is counted, without and with positions."""
    label = "bf16 H=768 256x128x64 tma"
    found = [x for x in all_specs(90) if x.label.startswith(label) and "aligned" in x.kernel]
    # kernels of old have a constant for the bias
    return [replace(x, constants={**x.constants, "HAS_BIAS": True}) for x in found]


def kernel_at(commit: str, *files: str) -> JITFunction[Any]:
    """A kernel as it was at a commit: the last of `files` is its name, the others may hold it."""
    *paths, name = files
    for path in [f"kernels/{folder}{file}" for file in paths for folder in ("cuda/", "")]:
        shown = subprocess.run(
            ["git", "show", f"{commit}:{path}"], cwd=ROOT, capture_output=True, text=True
        )
        if not shown.returncode:
            break
    shown.check_returncode()
    with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
        text = shown.stdout.replace("vdr_db.kernels.primitives", "vdr_db.kernels.cuda.primitives")
        file.write(text.replace(", popcount", ""))  # which another kernel of that file calls
    specification = importlib.util.spec_from_file_location("kernel_before", file.name)
    if specification is None or specification.loader is None:
        raise RuntimeError(f"{file.name} cannot be imported")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    kernel: JITFunction[Any] = getattr(module, name)
    return kernel


def count_all(before: str | None = None) -> list[Counts]:
    """Counts without and with positions, of a commit too."""
    counted = specs()
    made = []
    if before:  # kernels of old were not held to a number of registers
        plain = [replace(spec, registers=None) for spec in counted]
        kernel = kernel_at(
            before, "forward_kernels.py", "pooling_forward.py", "pool_aligned_kernel"
        )
        made = [count(spec, before, kernel) for spec in plain]
    return made + [count(spec, "here", kernel_named(spec.kernel)) for spec in counted]


def stored_counts(row: dict[str, str]) -> Counts:
    """A row of the stored table."""
    values = [row[field.name] for field in fields(Counts)]
    source, argmax, version, *numbers = values
    return Counts(source, int(argmax), version, *map(int, numbers[:5]), *map(float, numbers[5:]))


def grown(made: Sequence[Counts]) -> list[str]:
    """Where counts are larger than the stored ones of the same Triton."""
    with PATH.open(newline="") as file:
        rows = [stored_counts(x) for x in csv.DictReader(x for x in file if x[0] != "#")]
    found = []
    for row in made:
        for old in rows:
            if (old.source, old.argmax, old.triton) != (row.source, row.argmax, row.triton):
                continue
            for name in ("step_alu", "epilogue_alu"):
                before, now = getattr(old, name), getattr(row, name)
                if now > before:
                    found.append(
                        f"pool_aligned_kernel argmax={row.argmax}: {now} {name}, were {before}"
                    )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Counts, prints and compares; 1 if anything has grown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", metavar="COMMIT", help="count its kernel too")
    parser.add_argument("--write", action="store_true", help="store the table")
    parser.add_argument("--check", action="store_true", help="compare with the stored table")
    options = parser.parse_args(arguments)
    made = count_all(options.before)
    for row in made:
        print(row)
    found = grown(made) if options.check else []
    if options.write:
        with PATH.open("w", newline="") as file:
            file.write(
                "# a model, never measured: instructions counted by benchmarks/count_alu.py\n"
            )
            writer = csv.DictWriter(file, [x.name for x in fields(Counts)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in made)
    for fault in found:
        print(f"FAULT {fault}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
