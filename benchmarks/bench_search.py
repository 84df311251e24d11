"""The embedded Qdrant: loading, searching, filtering, and whether it ranks as exact search does.

    python benchmarks/bench_search.py --out benchmarks/results/search_edge.csv

Rows of 256 non-zeros with Zipfian token ids (the shape of VDR's documents and queries), searched
one query at a time through `QdrantStore`. Beside it the bare engine (`qdrant_edge`) on a copy of
the same files in the same process, query by query in turn: as this library has it search, in the
caller's thread, and with the pool of 8 threads that it makes by itself on two cores. Queries go
through twice: files are not in memory at first. Both clocks count, pages read from the disk, and
how often a thread slept, since each time it may have to wait for a core on a busy machine.
Every ranking is compared with exact float64 inner products.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vdr_db.connectors import Hit, QdrantStore
from vdr_db.sparse import SparseRows

COLUMNS = (
    *("op", "backend", "shape", "dtype", "metric", "unit", "median", "p20", "p80"),
    *("device", "torch", "commit", "date"),
)
WIDTH = 30_522
TOPICS = 10
LIMIT = 10
OURS, BARE = "vdr_db edge", "qdrant_edge alone"
POOLS = (1, 8)
Ids = npt.NDArray[np.int64]
Search = Callable[[SparseRows, "dict[str, Any] | None"], list[Any]]
ROWS_AT_ONCE = 4096
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
    parser.add_argument("--append", action="store_true", help="add to the file")
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    documents = zipf_rows(random, arguments.rows, arguments.nnz)
    queries = {f"q{nnz}": zipf_rows(random, arguments.queries, nnz) for nnz in (32, arguments.nnz)}
    shape = f"N={arguments.rows} nnz={arguments.nnz} V={WIDTH}"
    found: list[Row] = []
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        found += loading(documents, Path(scratch), arguments.rounds, shape)
        loaded(documents, Path(scratch) / OURS).close()
        for name, some in queries.items():
            rows, errors = searching(Path(scratch), documents, some, f"{shape} {name}")
            found += rows
            wrong += errors
    table = [finished(row) for row in found]
    writer = csv.writer(sys.stdout)
    writer.writerow(COLUMNS)
    writer.writerows(table)
    if arguments.out is not None:
        mode = "a" if arguments.append else "w"
        with arguments.out.open(mode, newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if not arguments.append:
                writer.writerow(COLUMNS)
            writer.writerows(table)
    return int(wrong > 0)


def zipf_rows(random: np.random.Generator, count: int, nnz: int) -> SparseRows:
    """Rows of exactly `nnz` Zipfian ids, the first different ones drawn, with softplus weights."""
    bounds = np.cumsum(1.0 / np.arange(1, WIDTH + 1) ** 0.9)
    order = random.permutation(WIDTH).astype(np.int32)
    ids = np.empty((count, nnz), np.int32)
    for start in range(0, count, ROWS_AT_ONCE):
        n = min(ROWS_AT_ONCE, count - start)
        drawn = np.searchsorted(bounds, random.random((n, 2 * nnz + 64)) * bounds[-1])
        by_id = np.argsort(drawn, axis=1, kind="stable")
        ordered = np.take_along_axis(drawn, by_id, axis=1)
        first = np.ones_like(drawn, bool)
        np.put_along_axis(first, by_id[:, 1:], ordered[:, 1:] != ordered[:, :-1], axis=1)
        kept = first & (np.cumsum(first, axis=1) <= nnz)
        ids[start : start + n] = np.sort(order[drawn[kept]].reshape(n, nnz), axis=1)
    weights = np.log1p(np.exp(random.standard_normal(count * nnz, np.float32)))
    return SparseRows(np.arange(count + 1) * nnz, ids.ravel(), weights, WIDTH)


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


def opened(scratch: Path) -> tuple[QdrantStore, dict[str, Search]]:
    """Our store on its folder and the bare engine on copies of it, none of it in memory."""
    import qdrant_edge as edge

    arms: dict[str, Search] = {}
    for threads in POOLS:
        name = f"{BARE}, threads={threads}"
        shutil.rmtree(scratch / name, ignore_errors=True)
        shutil.copytree(scratch / OURS / "shard", scratch / name)
    forget(scratch)
    for threads in POOLS:
        name = f"{BARE}, threads={threads}"
        arms[name] = partial(ask, edge.EdgeShard.load(str(scratch / name), pool(threads)))
    store = QdrantStore("bench", path=scratch / OURS)

    def search(query: SparseRows, filter: dict[str, Any] | None) -> list[Hit]:
        return store.search(query, LIMIT, filter)

    return store, {OURS: search, **arms}


def pool(threads: int) -> Any:
    """The engine's settings with as many threads."""
    import qdrant_edge as edge

    parameters = edge.EdgeSparseVectorParams(full_scan_threshold=500)
    return edge.EdgeConfig(sparse_vectors={"vdr": parameters}, max_search_threads=threads)


def ask(shard: Any, query: SparseRows, filter: dict[str, Any] | None) -> list[Any]:
    """One query by the bare engine."""
    import qdrant_edge as edge

    match = [
        edge.FieldCondition(key, match=edge.MatchValue(v)) for key, v in (filter or {}).items()
    ]
    request = edge.QueryRequest(
        limit=LIMIT,
        query=edge.Query.Nearest(edge.SparseVector(*query.row(0)), using="vdr"),
        filter=edge.Filter(must=match) if match else None,
        with_payload=True,
    )
    return list(shard.query(request))


def forget(folder: Path) -> None:
    """Files below a folder leave the memory of the system; nobody may have them open."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def searching(
    scratch: Path, documents: SparseRows, queries: SparseRows, shape: str
) -> tuple[list[Row], int]:
    """What a query costs, all arms in turn, and rankings of ours that differ."""
    exact = documents.dot(queries)
    store, arms = opened(scratch)
    rows: list[Row] = []
    wrong = 0
    for name, filter, first in (
        ("search, first time", None, 0),
        ("search", None, 0),
        ("filtered search", {"topic": 3}, 3),
    ):
        allowed = np.arange(first, len(documents), TOPICS if filter else 1)
        answers, costs = in_turn(arms, queries, filter)
        same, error = 0, 0.0
        for j, hits in enumerate(answers):
            wanted = allowed[best(exact[allowed, j])]  # what shares no token is no hit
            same += [hit.id for hit in hits] == wanted.tolist()
            scores = np.array([hit.score for hit in hits])
            if len(hits) == len(wanted) > 0:
                error = max(error, float(np.max(np.abs(scores / exact[wanted, j] - 1.0))))
        wrong += len(queries) - same
        for arm, samples in costs.items():
            rows += [(name, arm, shape, label, numbers) for label, numbers in samples.items()]
            tail = [float(np.quantile(samples["latency (ms)"], 0.99))]
            rows.append((name, arm, shape, "99th percentile (ms)", tail))
        rows += [
            (name, OURS, shape, f"order as exact (of {len(queries)})", [float(same)]),
            (name, OURS, shape, "relative score error (1)", [error]),
        ]
    batch = timed(lambda: store.search_batch(queries, LIMIT))
    rows.append(("batch search", OURS, shape, "per query (ms)", [batch / len(queries) * 1e3]))
    store.close()
    return rows, wrong


def best(scores: npt.NDArray[Any]) -> Ids:
    """The `LIMIT` largest scores above 0, best first, of equal ones the first."""
    some = np.flatnonzero(scores > 0)  # a partition of many zeros is slow
    if len(some) > LIMIT:
        some = some[np.argpartition(scores[some], -LIMIT)[-LIMIT:]]
    return some[np.lexsort((some, -scores[some]))]


def in_turn(
    arms: dict[str, Search], queries: SparseRows, filter: dict[str, Any] | None
) -> tuple[list[list[Any]], dict[str, dict[str, list[float]]]]:
    """Hits of the first arm, and what every query cost by each.

    Nothing else runs between the calls, and who comes first changes from query to query: the second
    call of a pair finds its caches warm.
    """
    answers: list[list[Any]] = []
    costs: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in arms}
    names = list(arms)
    for j, query in enumerate(queries):
        for name in names[j % len(names) :] + names[: j % len(names)]:
            before = resource.getrusage(resource.RUSAGE_SELF)
            start, busy = time.perf_counter(), time.process_time()
            hits = arms[name](query, filter)
            took = time.perf_counter() - start, time.process_time() - busy
            after = resource.getrusage(resource.RUSAGE_SELF)
            for label, number in (
                ("latency (ms)", took[0] * 1e3),
                ("processor time (ms)", took[1] * 1e3),
                ("read from disk (pages)", after.ru_majflt - before.ru_majflt),
                ("sleeps (times)", after.ru_nvcsw - before.ru_nvcsw),
            ):
                costs[name][label].append(number)
            if name == names[0]:
                answers.append(hits)
    return answers, costs


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
