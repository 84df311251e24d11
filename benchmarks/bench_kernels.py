"""Kernels against their rivals on a CUDA device: correctness first, then time and memory.

    python benchmarks/bench_kernels.py              # into benchmarks/results/kernels_<device>.*
    python benchmarks/bench_kernels.py --autotune   # also measure tiles, and print table rows
    python benchmarks/bench_kernels.py --dry-run    # every arm once, tiny, under the interpreter

No speed is printed if a check fails. A full run stays within --minutes (default 9): shapes that no
longer fit are listed as skipped. TFLOP/s count real tokens; "of mm" compares with the product of
the same shape by cuBLAS in the same process.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
KERNEL_CHECKS = tuple(
    f"kernels/test_{name}_triton.py" for name in ("pooling", "backward", "topk", "ops")
)
CHECKS = (*((name, ()) for name in KERNEL_CHECKS), ("test_encoder_cuda.py", ("-m", "gpu")))
"""Test files that must pass first, and how pytest is to choose among their tests."""
CHECK_SECONDS = 240
"""What the tests may take, most of it to compile kernels; if they take longer, nothing is timed.
The slowest file compiles for about 90 s on one slow core; each has a process of its own."""
FIRST_CASES = 3
"""Shapes that are measured before encoding end to end; the others come after it."""
COMPILE_SECONDS = 150
"""What one shape costs `torch.compile(max-autotune)`, forward and backward, at worst."""


@dataclass(frozen=True)
class Row:
    """One measurement; rates are over real tokens, `of_mm` is relative to cuBLAS."""

    op: str
    backend: str
    shape: str
    dtype: str
    metric: str
    unit: str
    median: float
    p20: float
    p80: float
    tflops: float
    of_mm: float
    launched: str
    device: str
    torch: str
    triton: str
    commit: str
    date: str


BARS = (
    ("forward", "B=64 L=256 H=768 V=30522 full", "time", 1.30, 1.08),
    ("forward", "B=320 L=512 H=768 V=30522 full", "time", 12.8, 10.8),
    ("forward+backward", "B=320 L=512 H=768 V=30522 full", "time", 24.0, 18.0),
    ("backward, kept entries", "B=64 L=256 H=768 V=30522 full", "time", 0.15, 0.08),
    ("top-k", "B=64 L=256 H=768 V=30522 full", "time", 0.040, 0.020),
    ("forward with argmax", "B=64 L=256 H=768 V=30522 full", "memory", 16.0, 12.0),
)
"""Operation, shape, metric, bar and stretch goal (ms, MB) on an H200."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks, measures, writes; 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, no results")
    parser.add_argument("--autotune", action="store_true", help="measure tiles of the first shapes")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for the whole run")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of results")
    options = parser.parse_args(arguments)
    if options.dry_run:
        # read when Triton is imported, hence before it
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA device; --dry-run runs everything, tiny, on the CPU", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * options.minutes
    if not options.dry_run and not tests_pass():
        print("a test failed or did not finish: no speed is printed")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) if options.dry_run else options.output
        return Run(options, deadline).all(output)


def tests_pass() -> bool:
    """Runs the tests on the device; they need pytest and nothing else of the test tools."""
    settings = ["-c", str(HERE.parent / "pyproject.toml"), "--noconftest", "-x"]
    settings += ["-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib -q"]
    settings += ["-o", "filterwarnings=default"]
    deadline = time.monotonic() + CHECK_SECONDS
    with tempfile.TemporaryDirectory() as elsewhere:
        running = []
        for number, (name, chosen) in enumerate(CHECKS):
            log = Path(elsewhere, f"{number}.log")
            command = [sys.executable, "-m", "pytest", *settings, *chosen]
            command.append(str(HERE.parent / "tests" / name))
            with log.open("w") as file:
                started = subprocess.Popen(command, cwd=elsewhere, stdout=file, stderr=file)
            running.append((name, log, started))
        try:
            return all(has_passed(*test, deadline) for test in running)
        finally:
            for _, _, process in running:
                process.kill()
                process.wait()


def has_passed(name: str, log: Path, process: subprocess.Popen[bytes], deadline: float) -> bool:
    """Waits for the tests of a file and prints what they say; some must have run."""
    try:
        code: int | None = process.wait(max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        code = None
    text = log.read_text()
    is_green = code == 0 and re.search(r"[1-9]\d* passed", text) is not None
    lines = text.splitlines()[-1:] if is_green else text.splitlines()
    print(f"{name}: {'did not finish' if code is None else ''}", *lines, sep="\n", flush=True)
    return is_green


class Run:
    """One run: inputs, rows found so far, and what was skipped."""

    def __init__(self, options: argparse.Namespace, deadline: float) -> None:
        import torch
        import triton
        from measure import commit

        self.options, self.deadline, self.torch = options, deadline, torch
        self.device = torch.device("cpu" if options.dry_run else "cuda")
        self.dtype = torch.float16 if options.dry_run else torch.bfloat16
        is_cuda = self.device.type == "cuda"
        self.rows: list[Row] = []
        self.skipped: list[str] = []
        self.failed: list[str] = []
        self.notes: list[str] = []
        self.facts = {
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name() if is_cuda else "cpu (interpreter)",
            "torch": torch.__version__,
            "triton": triton.__version__,
            "commit": commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        }

    def seconds_left(self) -> float:
        """Time left of the run."""
        return self.deadline - time.monotonic()

    def all(self, output: Path) -> int:
        """Checks every shape, then measures every shape."""
        from kernel_cases import DRY_CASES, FULL_CASES, Inputs, check, layouts_agree

        if self.options.dry_run:
            from quick_interpreter import quicken_interpreter

            quicken_interpreter()
        cases = DRY_CASES if self.options.dry_run else FULL_CASES
        wrong = []
        for case in cases:
            given = Inputs(case, self.device, self.dtype)
            wrong += check(given)
            if not layouts_agree(given):
                self.notes.append(f"{case}: both tilings agree, but not bit for bit")
        for fault in wrong:
            print(f"WRONG {fault}")
        if wrong:
            print("a check failed: no speed is printed")
            return 1
        print(f"{len(cases)} shapes agree with float64", flush=True)
        for case in cases[:FIRST_CASES]:
            self.measure(case, is_compiled=False)
        if not self.measure_encoding():
            return 1
        for case in cases[FIRST_CASES:]:
            self.measure(case, is_compiled=False)
        if not self.options.no_compile:
            for case in cases[:FIRST_CASES]:
                self.measure(case, is_compiled=True)
        if self.options.autotune:
            self.autotune(cases)
        self.write(output)
        return 1 if self.failed else 0

    def measure(self, case: Any, *, is_compiled: bool) -> None:
        """Times the arms of a shape: all but the compiled ones, or those alone."""
        import rivals
        from kernel_cases import Inputs, arms

        needed = COMPILE_SECONDS if is_compiled else 12
        if not self.options.dry_run and self.seconds_left() < needed:
            self.skipped.append(f"{case}{', torch.compile' if is_compiled else ''}: time")
            return
        compiled = None
        if is_compiled:
            compiled = self.torch.compile(rivals.eager, mode="max-autotune-no-cudagraphs")
        for arm in arms(Inputs(case, self.device, self.dtype), compiled):
            if is_compiled != arm.backend.startswith("torch.compile"):
                continue
            if self.device.type == "cuda":
                self.torch.cuda.empty_cache()
                free, _ = self.torch.cuda.mem_get_info()
                if arm.needs_bytes > 0.9 * free:
                    self.skipped.append(f"{arm.op}, {arm.backend}, {case}: memory")
                    continue
            try:
                self.time_arm(arm, case)
            except self.torch.OutOfMemoryError:
                self.skipped.append(f"{arm.op}, {arm.backend}, {case}: out of memory")
            except (
                Exception
            ) as error:  # of a compiler or driver: what was measured is worth keeping
                reason = " ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
                self.failed.append(f"{arm.op}, {arm.backend}, {case}: {reason}")

    def time_arm(self, arm: Any, case: Any) -> None:
        """Adds the rows of an arm: time, and memory above its inputs."""
        from device_timing import peak_bytes_above, time_calls

        timing = time_calls(arm.call, self.device, use_graph=arm.use_graph)
        rate = arm.flop / statistics.median(timing.milliseconds) / 1e9
        product = [row for row in self.rows if row.shape == str(case) and row.backend == "torch.mm"]
        of_mm = rate / product[0].tflops if product and product[0].tflops else 0.0
        self.add(arm.op, arm.backend, str(case), "time", "ms", timing.milliseconds, rate, of_mm,
                 timing.launched)  # fmt: skip
        peak = peak_bytes_above(arm.call, self.device)
        self.add(arm.op, arm.backend, str(case), "memory", "MB", [peak / 1e6])

    def add(
        self,
        op: str,
        backend: str,
        shape: str,
        metric: str,
        unit: str,
        samples: list[float],
        rate: float = 0.0,
        of_mm: float = 0.0,
        launched: str = "",
    ) -> None:
        """Adds one row."""
        from measure import spread

        low, high = spread(samples)
        self.rows.append(
            Row(op=op, backend=backend, shape=shape, metric=metric, unit=unit,
                median=float(f"{statistics.median(samples):.4g}"), p20=float(f"{low:.4g}"),
                p80=float(f"{high:.4g}"), tflops=float(f"{rate:.4g}"),
                of_mm=float(f"{of_mm:.3g}"), launched=launched, **self.facts)
        )  # fmt: skip

    def measure_encoding(self) -> bool:
        """Texts to vectors by sentence-transformers and by this library; False if they disagree."""
        if not self.options.dry_run and self.seconds_left() < 60:
            self.skipped.append("encoding end to end: time")
            return True
        if find_spec("sentence_transformers") is None:
            self.skipped.append("encoding end to end: sentence-transformers is not installed")
            return True
        from sentence_transformers_arm import encode_arms

        arms, wrong = encode_arms(self.device, is_tiny=self.options.dry_run)
        for fault in wrong:
            print(f"WRONG {fault}")
        if wrong:
            print("a check failed: no speed is printed")
            return False
        for arm, shape in arms:
            self.time_arm(arm, shape)
        return True

    def autotune(self, cases: Sequence[Any]) -> None:
        """Prints the best tile of each shape as a table row."""
        import autotune
        from kernel_cases import Inputs, other_layouts

        for case in cases[:4]:
            given = Inputs(case, self.device, self.dtype)
            extra: dict[str, Any] = {}
            if self.options.dry_run:
                extra = {"candidates": other_layouts(given), "measure_ms": wall_ms}
            for need_argmax in (False, True):
                row = autotune.tune(
                    given.hidden, given.cu_seqlens, given.weight, need_argmax=need_argmax, **extra
                )
                print(f"{case}, argmax {need_argmax}: {autotune.as_source(row)}")

    def write(self, output: Path) -> None:
        """Writes the CSV and the markdown, and prints the latter."""
        output.mkdir(exist_ok=True, parents=True)
        name = "kernels_" + "".join(c if c.isalnum() else "_" for c in self.facts["device"]).lower()
        with (output / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)
        if self.options.dry_run:
            self.notes.append("dry run: the numbers say nothing about speed")
        text = markdown(self.rows, self.notes, self.skipped, self.facts, self.failed)
        (output / f"{name}.md").write_text(text)
        print(text)


def wall_ms(call: Any) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1000


def markdown(
    rows: Sequence[Row],
    notes: Sequence[str],
    skipped: Sequence[str],
    facts: dict[str, str],
    failed: Sequence[str] = (),
) -> str:
    """One table per shape, the bars, and what is to be known."""
    lines = ["# Kernels", "", ", ".join(f"{key} {value}" for key, value in facts.items())]
    for shape in dict.fromkeys(row.shape for row in rows):
        lines += ["", f"## {shape}", "",
                  "| operation | by | ms (p20 to p80) | TFLOP/s | of mm | MB above inputs |",
                  "|---|---|---|---|---|---|"]  # fmt: skip
        here = [row for row in rows if row.shape == shape]
        product = next((row.tflops for row in here if row.backend == "torch.mm"), 0.0)
        memory = {(row.op, row.backend): row.median for row in here if row.metric == "memory"}
        for row in here:
            if row.metric != "time":
                continue
            is_product = row.op in ("forward", "forward with argmax", "same-shape product")
            rate = f"{row.tflops:.0f}" if row.tflops and is_product else ""
            share = f"{row.tflops / product:.0%}" if rate and product else ""
            lines.append(
                f"| {row.op} | {row.backend} | {row.median:.4g} ({row.p20:.4g} to {row.p80:.4g}) | "
                f"{rate} | {share} | {memory.get((row.op, row.backend), 0):.1f} |"
            )
    lines += ["", "## Bars", "", "| operation | shape | bar | goal | found | |"]
    lines.append("|---|---|---|---|---|---|")
    for op, shape, metric, bar, goal in BARS:
        found = [
            row.median
            for row in rows
            if (row.op, row.shape, row.metric, row.backend) == (op, shape, metric, "vdr_db")
        ]
        verdict = "not measured"
        if found:
            verdict = "goal met" if found[0] <= goal else "met" if found[0] <= bar else "missed"
        value = found[0] if found else ""
        lines.append(f"| {op}, {metric} | {shape} | {bar} | {goal} | {value} | {verdict} |")
    for title, sentences in (("Notes", notes), ("Skipped", skipped), ("Failed", failed)):
        if sentences:
            lines += ["", f"## {title}", "", *(f"- {sentence}" for sentence in sentences)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
