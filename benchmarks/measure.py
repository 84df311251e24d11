"""Timing in turn, resident memory, and result rows; used by every benchmark of the CPU kernels."""

from __future__ import annotations

import csv
import ctypes
import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch


@dataclass(frozen=True)
class Row:
    """One measurement; p20 and p80 enclose the middle 60 % of its rounds."""

    op: str
    backend: str
    shape: str
    dtype: str
    metric: str
    unit: str
    median: float
    p20: float
    p80: float
    device: str
    torch: str
    commit: str
    date: str


def rows_of(
    op: str, backend: str, shape: str, dtype: str, samples: Mapping[str, Sequence[float]]
) -> list[Row]:
    """One row for each metric.

    Args:
        op: Operation.
        backend: Which implementation.
        shape: Sizes.
        dtype: Of the inputs.
        samples: "metric (unit)" -> one number for each round.
    """
    rows = []
    for label, numbers in samples.items():
        metric, _, unit = label.removesuffix(")").partition(" (")
        low, high = spread(numbers)
        rows.append(
            Row(
                op,
                backend,
                shape,
                dtype,
                metric,
                unit,
                float(f"{statistics.median(numbers):.4g}"),
                float(f"{low:.4g}"),
                float(f"{high:.4g}"),
                device_name(),
                torch.__version__,
                commit(),
                datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            )
        )
    return rows


def spread(numbers: Sequence[float]) -> tuple[float, float]:
    """20th and 80th percentile."""
    if len(numbers) < 2:
        return numbers[0], numbers[0]
    cuts = statistics.quantiles(numbers, n=5, method="inclusive")
    return cuts[0], cuts[-1]


@dataclass(frozen=True)
class Times:
    """Duration of one call in milliseconds, for each round.

    Attributes:
        wall: By the clock on the wall.
        processor: Of all threads of this process; with one thread, what else the machine does at
            the same time does not count.
    """

    wall: list[float]
    processor: list[float]


def in_turn(
    arms: Mapping[str, Callable[[], object]], rounds: int, least_ms: float = 20.0
) -> dict[str, list[float]]:
    """Wall time of one call of each arm in milliseconds, for each round; see `clock_in_turn`."""
    return {name: times.wall for name, times in clock_in_turn(arms, rounds, least_ms).items()}


def clock_in_turn(
    arms: Mapping[str, Callable[[], object]], rounds: int, least_ms: float = 20.0
) -> dict[str, Times]:
    """Times one call of each arm by both clocks.

    Arms run one after the other within a round, so that what else the machine does meets all of
    them. Each is called before, and as often within a round as `least_ms` takes.

    Args:
        arms: Name -> what to call.
        rounds: How many times each arm is measured.
        least_ms: Shortest time worth measuring.
    """
    repeats = {}
    for name, call in arms.items():
        once_ms = 0.0
        for _ in range(2):
            if once_ms < 10 * least_ms:  # a second call only where the first may be all warm-up
                start = time.perf_counter()
                call()
                once_ms = (time.perf_counter() - start) * 1000
        repeats[name] = max(1, round(least_ms / max(once_ms, 1e-3)))
    times = {name: Times([], []) for name in arms}
    for _ in range(rounds):
        for name, call in arms.items():
            start, start_processor = time.perf_counter(), time.process_time()
            for _ in range(repeats[name]):
                call()
            end, end_processor = time.perf_counter(), time.process_time()
            times[name].wall.append((end - start) * 1000 / repeats[name])
            times[name].processor.append((end_processor - start_processor) * 1000 / repeats[name])
    return times


def peak_bytes(call: Callable[[], object]) -> int:
    """Resident memory that a call needs at its highest, above what was resident before, in bytes.

    The kernel's own high-water mark (`VmHWM`), reset just before the call; free memory goes back to
    the system first, so that reuse does not hide it. The result counts; subtract its size. Linux
    only. Use a fresh process for each measurement.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def device_name() -> str:
    """Processor and threads."""
    name = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name} {capability} {torch.get_num_threads()} threads"


def commit() -> str:
    """Short commit of the working tree, or "none"."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "none"


def write_csv(path: Path, rows: Iterable[Row], *, append: bool = False) -> None:
    """Writes rows with their header, or adds them to a file that has it."""
    with path.open("a" if append else "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        if not append:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
