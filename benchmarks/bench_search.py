"""The embedded Qdrant: loading, searching, filtering, and whether it ranks as exact search does.

    python benchmarks/bench_search.py --out benchmarks/results/search_edge.csv

Rows of 256 non-zeros with Zipfian token ids (the shape of VDR's documents and queries), searched
one query at a time through `QdrantStore`. Beside it the bare engine (`qdrant_edge`) on the same
rows in the same process, query by query in turn, so that the difference is what this library adds.
Every ranking is compared with exact float64 inner products.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vdr_db.connectors import Hit, QdrantStore
from vdr_db.sparse import SparseRows

COLUMNS = (
    *("op", "backend", "shape", "dtype", "metric", "unit", "median", "p20", "p80"),
    *("device", "torch", "commit", "date"),
)
WIDTH = 30_522
TOPICS = 10
LIMIT = 10
Row = tuple[str, str, str, str, Sequence[float]]


def main() -> int:
    """Measures, prints, and writes the file asked for; 1 when a ranking is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--nnz", type=int, default=256, help="non-zeros of a document")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3, help="of loading")
    parser.add_argument("--out", type=Path, help="CSV file to write; rows are printed in any case")
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    documents = zipf_rows(random, arguments.rows, arguments.nnz)
    queries = {f"q{nnz}": zipf_rows(random, arguments.queries, nnz) for nnz in (32, arguments.nnz)}
    shape = f"N={arguments.rows} nnz={arguments.nnz} V={WIDTH}"
    found: list[Row] = []
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        found += loading(documents, Path(scratch), arguments.rounds, shape)
        store = loaded(documents, Path(scratch) / "measured")
        bare = bare_engine(documents, Path(scratch) / "bare")
        for name, some in queries.items():
            rows, errors = searching(store, bare, documents, some, f"{shape} {name}")
            found += rows
            wrong += errors
        bare.close()
        store.close()
    table = [finished(row) for row in found]
    writer = csv.writer(sys.stdout)
    writer.writerow(COLUMNS)
    writer.writerows(table)
    if arguments.out is not None:
        with arguments.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(table)
    return int(wrong > 0)


def zipf_rows(random: np.random.Generator, count: int, nnz: int) -> SparseRows:
    """Rows of exactly `nnz` Zipfian ids, with softplus weights."""
    bounds = np.cumsum(1.0 / np.arange(1, WIDTH + 1) ** 0.9)
    order = random.permutation(WIDTH)
    ids = np.empty((count, nnz), np.int32)
    for i in range(count):
        drawn = np.empty(0, np.int64)
        while drawn.size < nnz:
            more = np.searchsorted(bounds, random.random(2 * nnz) * bounds[-1])
            drawn = np.unique(np.concatenate((drawn, more)))
        ids[i] = np.sort(order[random.permutation(drawn)[:nnz]])
    weights = np.log1p(np.exp(random.standard_normal((count, nnz)))).astype(np.float32)
    return SparseRows(np.arange(count + 1) * nnz, ids.ravel(), weights.ravel(), WIDTH)


def loaded(documents: SparseRows, path: Path) -> QdrantStore:
    """A store with all documents, each with one of ten topics, searchable by a payload index."""
    store = QdrantStore("bench", path=path, payload_indexes={"topic": "integer"})
    store.create(WIDTH)
    payloads = [{"topic": i % TOPICS} for i in range(len(documents))]
    store.upsert(documents, range(len(documents)), payloads)
    store.optimize()
    return store


def loading(documents: SparseRows, scratch: Path, rounds: int, shape: str) -> list[Row]:
    """Seconds to write everything, to make it durable, to optimise, to open again; disk used."""
    rounds_of: list[dict[str, float]] = []
    for number in range(rounds):
        gc.collect()
        rounds_of.append(load_once(documents, scratch / str(number)))
    return [
        ("load", "vdr_db edge", shape, label, [one[label] for one in rounds_of])
        for label in rounds_of[0]
    ]


def load_once(documents: SparseRows, path: Path) -> dict[str, float]:
    """One round of `loading`."""
    ids = range(len(documents))
    with QdrantStore("bench", path=path) as store:
        store.create(WIDTH)
        busy = time.process_time()
        took = {
            "write (s)": timed(lambda: store.upsert(documents, ids)),
            "flush (s)": timed(store.flush),
            "optimise (s)": timed(store.optimize),
        }
        took["write, flush and optimise (s)"] = sum(took.values())
        took["the same, processor time (s)"] = time.process_time() - busy
        took["close (s)"] = timed(store.close)
    took["open (s)"] = timed(lambda: QdrantStore("bench", path=path).close())
    took["disk (MiB)"] = sum(file.stat().st_blocks for file in path.rglob("*")) * 512 / 2**20
    return took


def bare_engine(documents: SparseRows, path: Path) -> Any:
    """The same documents in an `EdgeShard` without this library."""
    import qdrant_edge as edge

    parameters = edge.EdgeSparseVectorParams(full_scan_threshold=500)
    shard = edge.EdgeShard.create(str(path), edge.EdgeConfig(sparse_vectors={"vdr": parameters}))
    shard.update(edge.UpdateOperation.create_field_index("topic", edge.PayloadSchemaType.Integer))
    for start in range(0, len(documents), 1024):
        points = []
        for i in range(start, min(start + 1024, len(documents))):
            vector = edge.SparseVector(*documents.row(i))
            points.append(edge.Point(i, {"vdr": vector}, {"topic": i % TOPICS}))
        shard.update(edge.UpdateOperation.upsert_points(points))
    shard.optimize()
    return shard


def searching(
    store: QdrantStore, bare: Any, documents: SparseRows, queries: SparseRows, shape: str
) -> tuple[list[Row], int]:
    """Milliseconds per query, ours and the bare engine in turn, and rankings that differ."""
    import qdrant_edge as edge

    topic = edge.FieldCondition("topic", match=edge.MatchValue(3))
    native = edge.Filter(must=[topic])
    exact = documents.dot(queries)
    rows: list[Row] = []
    wrong = 0
    for name, filter, native_filter in (
        ("search", None, None),
        ("filtered search", {"topic": 3}, native),
    ):
        answers, ours, theirs = in_turn(store, bare, queries, filter, native_filter)
        allowed = np.arange(3, len(documents), TOPICS) if filter else np.arange(len(documents))
        same, error = 0, 0.0
        for j, hits in enumerate(answers):
            best = allowed[np.lexsort((allowed, -exact[allowed, j]))[:LIMIT]]
            best = best[exact[best, j] > 0]  # what shares no token is no hit
            same += [hit.id for hit in hits] == best.tolist()
            scores = np.array([hit.score for hit in hits])
            if len(hits) == len(best) > 0:
                error = max(error, float(np.max(np.abs(scores / exact[best, j] - 1.0))))
        wrong += len(queries) - same
        rows += [
            (name, "vdr_db edge", shape, "latency (ms)", ours),
            (name, "qdrant_edge alone", shape, "latency (ms)", theirs),
            (name, "vdr_db edge", shape, "99th percentile (ms)", [float(np.quantile(ours, 0.99))]),
            (name, "vdr_db edge", shape, f"order as exact (of {len(queries)})", [float(same)]),
            (name, "vdr_db edge", shape, "relative score error (1)", [error]),
        ]
    batch = timed(lambda: store.search_batch(queries, LIMIT))
    rows.append(
        ("batch search", "vdr_db edge", shape, "per query (ms)", [batch / len(queries) * 1e3])
    )
    return rows, wrong


def in_turn(
    store: QdrantStore,
    bare: Any,
    queries: SparseRows,
    filter: dict[str, Any] | None,
    native_filter: Any,
) -> tuple[list[list[Hit]], list[float], list[float]]:
    """Our hits, and milliseconds of every query, ours and the bare engine's.

    Nothing else runs between the calls, and who comes first changes from query to query: the second
    call of a pair finds its caches warm.
    """
    import qdrant_edge as edge

    answers: list[list[Hit]] = []
    ours: list[float] = []
    theirs: list[float] = []

    def ask_ours(query: SparseRows) -> None:
        start = time.perf_counter()
        answers.append(store.search(query, LIMIT, filter))
        ours.append((time.perf_counter() - start) * 1e3)

    def ask_bare(query: SparseRows) -> None:
        start = time.perf_counter()
        bare.query(
            edge.QueryRequest(
                limit=LIMIT,
                query=edge.Query.Nearest(edge.SparseVector(*query.row(0)), using="vdr"),
                filter=native_filter,
                with_payload=True,
            )
        )
        theirs.append((time.perf_counter() - start) * 1e3)

    for j in range(len(queries)):
        query = queries[j]
        for ask in (ask_ours, ask_bare) if j % 2 else (ask_bare, ask_ours):
            ask(query)
    return answers, ours, theirs


def timed(call: Callable[[], object]) -> float:
    """Seconds of wall time."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def finished(row: Row) -> list[str]:
    """A line of the table."""
    op, backend, shape, label, numbers = row
    metric, _, unit = label.removesuffix(")").rpartition(" (")
    cuts = [numbers[0]] * 4
    if len(numbers) > 1:
        cuts = statistics.quantiles(numbers, n=5, method="inclusive")
    spread = [f"{number:.4g}" for number in (statistics.median(numbers), cuts[0], cuts[-1])]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    device = f"{platform.machine()} {len_cpus()} cores"
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return [
        *(op, backend, shape, "float32", metric, unit, *spread, device, ""),
        *(commit.stdout.strip(), date),
    ]


def len_cpus() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
