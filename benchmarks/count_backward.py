"""Counts instructions of the gradients' kernels, without a GPU: whether to gather or multiply.

    python benchmarks/count_backward.py                   # print the counts
    python benchmarks/count_backward.py --before 558bc49  # also placement as it was at that commit
    python benchmarks/count_backward.py --write           # also store results/backward_sm90.csv

Counted in the SASS for sm_90a, bfloat16, H = 768: the instructions of a warp in one turn of the
loop, and of placement all (at that commit, with the mean of the 1 to 8 turns of its loop).
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import triton
from compile_gate import RESULTS, compiled, listing, resource_usage
from count_alu import kernel_at, parse
from kernel_specs import Spec, all_specs, digest, kernel_named
from triton.runtime.jit import JITFunction

PATH = RESULTS / "backward_sm90.csv"
SCHEDULERS = 4
"""Of a multiprocessor; each takes one instruction of a warp in a cycle."""
OLD_TURNS = 4.5
"""Mean turns of the only placement with a loop: one for each block of 64 up to its own, of 8."""


@dataclass(frozen=True)
class Turn:
    """Instructions of a kernel.

    Attributes:
        source: `here`, or the commit that the kernel is of.
        kernel: Name.
        label: Configuration.
        triton: Version of Triton.
        registers: Registers of a thread.
        warps: Warps of a program.
        instructions: Of a warp: one turn of the loop, or all.
        entries: Gradient entries that a program handles meanwhile; of loops, with 128 hidden
            dimensions each.
        cycles_per_entry: Cycles in which a multiprocessor can issue them.
        digest: Of the configuration and of the source of its kernel.
    """

    source: str
    kernel: str
    label: str
    triton: str
    registers: int
    warps: int
    instructions: int
    entries: int
    cycles_per_entry: float
    digest: str


def instructions_of(text: str) -> tuple[int, int]:
    """Instructions of a listing up to its last exit, and those of its longest loop, 0 if none."""
    found, labels = parse(text)
    last = max(i for i, instruction in enumerate(found) if "EXIT" in instruction)
    # waits that lie behind the kernel jump back too
    jumps = [(i, re.search(r"BRA.*\((\.L\w+)\)", x)) for i, x in enumerate(found[:last])]
    loops = [1 + i - labels[jump[1]] for i, jump in jumps if jump and labels[jump[1]] < i]
    return 1 + last, max(loops, default=0)


def count(spec: Spec, source: str, kernel: JITFunction[Any], entries: int) -> Turn:
    """Counts of a configuration of a kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled(spec, kernel).asm["cubin"])
        registers, _ = resource_usage(cubin)
        everything, loop = instructions_of(listing(cubin))
    n = loop
    if spec.kernel == "place_entries_kernel":
        n = round(everything + (OLD_TURNS - 1) * loop)
    cycles = round(n * spec.num_warps / SCHEDULERS / entries, 2)
    return Turn(
        source, spec.kernel, spec.label, triton.__version__, registers, spec.num_warps, n, entries,
        cycles, digest(spec) if source == "here" else "",
    )  # fmt: skip


def entries_of(spec: Spec) -> int:
    """Entries of a turn: (text, column) pairs, times the hidden dimensions of a program / 128."""
    size = spec.constants
    if spec.kernel == "place_entries_kernel":
        return int(size["CHUNK"])
    if spec.kernel == "weight_gather_kernel":
        return int(size["BLOCK_V"] * size["BLOCK_H"] // 128)
    if spec.kernel == "sum_lists_kernel":
        return int(size["ROWS"] * size["BLOCK_H"] // 128)
    # columns of a text, or a step's columns of as many texts as a program has blocks
    return int(size["BLOCK_M"] * size["BLOCK_H"] // 128)


def specs() -> list[Spec]:
    """What is counted: placement, and both ways to each gradient."""
    wanted = ("place_entries_kernel", "weight_gather_kernel", "sum_lists_kernel", "onehot_kernel")
    return [
        spec
        for spec in all_specs(90)
        if spec.kernel in wanted and "fp32" not in spec.label and "bf16 columns" not in spec.label
    ]


def count_all(before: str | None = None) -> list[Turn]:
    """Counts of all, and of placement at a commit."""
    made = []
    if before:
        kernel = kernel_at(before, "entry_lists.py", "place_entries_kernel")
        for kept in (False, True):
            constants = {"HAS_INDPTR": kept, "CHUNK": 512, "BLOCK": 64}
            if not kept:
                constants["indptr_ptr"] = None
            spec = Spec("place_entries_kernel", 90, f"kept={kept:d}", {}, constants, 4)
            made.append(count(spec, before, kernel, 64))
    return made + [
        count(spec, "here", kernel_named(spec.kernel), entries_of(spec)) for spec in specs()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Counts and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", metavar="COMMIT", help="count placement at it too")
    parser.add_argument("--write", action="store_true", help="store the table")
    options = parser.parse_args(arguments)
    made = count_all(options.before)
    for row in made:
        print(row)
    if options.write:
        with PATH.open("w", newline="") as file:
            file.write(
                "# a model, never measured: instructions counted by benchmarks/count_backward.py\n"
            )
            writer = csv.DictWriter(file, [x.name for x in fields(Turn)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
