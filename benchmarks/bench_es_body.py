"""Client cost of writing to Elasticsearch: microseconds per document of 256 non-zeros.

    python benchmarks/bench_es_body.py [--csv benchmarks/results/es_body.csv]

`body` makes the lines of a bulk request from checked rows; `checked_body` adds the gate in front of
every engine (ids, payloads, sizes), which is what `upsert` spends before the network. The baseline
is what a program does without us: a dictionary of Python floats through the standard library.
Single-threaded; no server is needed. Measured is processor time, which other programs of the
machine disturb less than time on the wall.
"""

from __future__ import annotations

import argparse
import csv
import datetime as dt
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vdr_db import SparseRows
from vdr_db.connectors.base import BatchLimits
from vdr_db.connectors.elasticsearch.bodies import bulk_lines
from vdr_db.connectors.validation import prepare

DOCUMENTS = 500
NNZ = 256
WIDTH = 30522
REPEATS = 30
COLUMNS = "op backend shape dtype metric unit median p20 p80 device torch commit date"


def sample() -> tuple[SparseRows, list[str], list[dict[str, object]]]:
    """Rows of Zipfian ids and softplus weights, with ids and small payloads."""
    random = np.random.default_rng(0)
    chances = 1.0 / np.arange(1, WIDTH + 1)
    chances /= chances.sum()
    ids = [np.sort(random.choice(WIDTH, NNZ, False, chances)) for _ in range(DOCUMENTS)]
    weights = np.log1p(np.exp(random.normal(size=DOCUMENTS * NNZ))).astype(np.float32)
    indptr = np.arange(DOCUMENTS + 1) * NNZ
    rows = SparseRows(indptr, np.concatenate(ids), weights, WIDTH)
    names = [f"document-{number}" for number in range(DOCUMENTS)]
    payloads = [{"title": f"Title {number}", "year": number} for number in range(DOCUMENTS)]
    return rows, names, payloads


def measure(work: Callable[[], object]) -> list[float]:
    """Microseconds of processor time per document, of each repetition."""
    work()
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        times.append((time.process_time() - start) / DOCUMENTS * 1e6)
    return times


def main() -> None:
    """Measures, prints, and appends to a file on request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="append one row per measurement to this file")
    arguments = parser.parse_args()
    rows, names, payloads = sample()
    limits = BatchLimits(rows=500, bytes=8 << 20, row_bytes=8 << 20)

    def body() -> list[bytes]:
        return bulk_lines(rows, names, payloads, action="index", field="vdr")

    def checked_body() -> list[bytes]:
        ready = prepare(
            rows, names, payloads, width=WIDTH, empty="store", limits=limits, where="index"
        )
        return bulk_lines(ready.rows, ready.ids, ready.payloads, action="index", field="vdr")

    def plain() -> list[bytes]:
        lines = []
        for row, name, payload in zip(rows.to_dicts(), names, payloads, strict=True):
            head = json.dumps({"index": {"_id": name}})
            lines.append(f"{head}\n{json.dumps({'payload': payload, 'vdr': row})}\n".encode())
        return lines

    size = statistics.mean(len(line) for line in body())
    plain_size = statistics.mean(len(line) for line in plain())
    print(f"{size:.0f} bytes a document, {plain_size:.0f} without care for float32")
    results = []
    for op, backend, work in (
        ("es_body", "vdr_db", body),
        ("es_checked_body", "vdr_db", checked_body),
        ("es_body", "json", plain),
    ):
        times = sorted(measure(work))
        middle, low, high = np.percentile(times, [50, 20, 80])
        print(f"{op} {backend}: {middle:.1f} us a document (p20 {low:.1f}, p80 {high:.1f})")
        results.append((op, backend, middle, low, high))
    if arguments.csv:
        append(arguments.csv, results)


def append(path: Path, results: list[tuple[str, str, float, float, float]]) -> None:
    """Adds the results to a file, with a header when it is new."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    ).stdout.strip()
    shape = f"N={DOCUMENTS} nnz={NNZ} V={WIDTH}"
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(COLUMNS.split())
        for op, backend, *numbers in results:
            writer.writerow(
                [op, backend, shape, "float32", "processor time per document", "us"]
                + [f"{number:.2f}" for number in numbers]
                + [platform.machine(), "", commit or "none", dt.date.today().isoformat()]
            )


if __name__ == "__main__":
    main()
