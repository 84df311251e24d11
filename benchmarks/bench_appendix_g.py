"""Search by an embedded collection and by what people would use instead, 100,000 rows.

    pip install numba bm25s scipy
    python benchmarks/bench_appendix_g.py --out benchmarks/results/appendix_g.csv

The protocol of the VDR paper's appendix on efficiency: 1,000 queries one by one, in one thread;
time to build, size of the index and milliseconds a query, for each k. Rows are made up, k Zipfian
token ids with softplus weights (`bench_search.zipf_rows`); queries are as wide as documents
("full", what a model makes of a question) or bags of 8 token ids of weight 1 ("bag", no model at
query time).
Arms:

- `vdr_db edge`: `QdrantStore` on a folder; `qdrant_edge alone`: the engine without this library;
- `scipy CSR`: the whole matrix times the query, how VDR's own code searches;
- `numba lists`: an inverted list of float32 in memory that adds up one token after the other;
- `bm25s`: BM25 with numba over made-up texts of 100 Zipfian words, for the bags; another ranking,
  so only its speed compares.

Before anything is timed, the ten best of 100 queries by each arm must have the scores of exact
float64 products, in order; those of bm25s are compared with sums over its own matrix. Then all
queries go through all arms in turn, with both clocks.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from bench_search import LIMIT, WIDTH, Ids, best, zipf_rows
from measure import Row, rows_of, write_csv

from vdr_db.connectors import QdrantStore
from vdr_db.sparse import SparseRows

CHECKED = 100
CLOSE = 1e-5
BAG = 8
WORDS = 100
Search = Callable[[SparseRows], Ids]
"""Row numbers of the ten best documents of one query, best first."""


@dataclass(frozen=True)
class Index:
    """One way to search, built.

    Attributes:
        name: As in the results.
        search: See there.
        size: Of what it keeps, on disk or in memory, in bytes.
        wall: Seconds to build it.
        processor: The same by the processor's clock, all threads.
        close: Lets go of it.
    """

    name: str
    search: Search
    size: int
    wall: float
    processor: float
    close: Callable[[], object] = bool


def disk(path: Path) -> int:
    """Bytes that files below a folder take."""
    return sum(file.stat().st_blocks for file in path.rglob("*")) * 512


def ours(documents: SparseRows, path: Path) -> tuple[Search, int, Callable[[], object]]:
    """`QdrantStore` on a folder, optimised."""
    store = QdrantStore("bench", path=path)
    store.create(WIDTH)
    store.upsert(documents, range(len(documents)))
    store.optimize()
    store.flush()
    return (
        lambda query: np.array([hit.id for hit in store.search(query, LIMIT)], np.int64),
        disk(path),
        store.close,
    )


def bare(documents: SparseRows, path: Path) -> tuple[Search, int, Callable[[], object]]:
    """The engine alone, optimised."""
    import qdrant_edge as edge

    path.mkdir()
    parameters = edge.EdgeSparseVectorParams(full_scan_threshold=500)
    shard = edge.EdgeShard.create(str(path), edge.EdgeConfig(sparse_vectors={"vdr": parameters}))
    for start in range(0, len(documents), 1024):
        points = []
        for i in range(start, min(start + 1024, len(documents))):
            points.append(edge.Point(i, {"vdr": edge.SparseVector(*documents.row(i))}, {}))
        shard.update(edge.UpdateOperation.upsert_points(points))
    shard.optimize()
    shard.flush()

    def search(query: SparseRows) -> Ids:
        vector = edge.SparseVector(*query.row(0))
        nearest = edge.Query.Nearest(vector, using="vdr")
        hits = shard.query(edge.QueryRequest(limit=LIMIT, query=nearest, with_payload=True))
        return np.array([hit.id for hit in hits], np.int64)

    return search, disk(path), shard.close


def by_scipy(documents: SparseRows) -> tuple[Search, int, Callable[[], object]]:
    """All rows times the query."""
    matrix = documents.to_scipy()

    def search(query: SparseRows) -> Ids:
        wanted = np.zeros(WIDTH, np.float32)
        ids, weights = query.row(0)
        wanted[ids] = weights
        return best(matrix @ wanted)

    size = matrix.data.nbytes + matrix.indices.nbytes + matrix.indptr.nbytes
    return search, size, bool


def by_numba(documents: SparseRows) -> tuple[Search, int, Callable[[], object]]:
    """Inverted lists."""
    import numba

    @numba.njit  # type: ignore[misc]  # no types are shipped
    def add_up(
        starts: Ids,
        rows: npt.NDArray[np.int32],
        values: npt.NDArray[np.float32],
        ids: npt.NDArray[np.int32],
        weights: npt.NDArray[np.float32],
        scores: npt.NDArray[np.float32],
    ) -> None:
        scores[:] = 0
        for i in range(len(ids)):
            for at in range(starts[ids[i]], starts[ids[i] + 1]):
                scores[rows[at]] += weights[i] * values[at]

    @numba.njit  # type: ignore[misc]
    def select(scores: npt.NDArray[np.float32], few: Ids) -> int:
        count = 0
        for row in range(len(scores)):
            if scores[row] > 0 and (count < LIMIT or scores[row] > scores[few[count - 1]]):
                at = min(count, LIMIT - 1)
                while at > 0 and scores[few[at - 1]] < scores[row]:
                    few[at] = few[at - 1]
                    at -= 1
                few[at] = row
                count = min(count + 1, LIMIT)
        return count

    columns = documents.to_scipy().tocsc()
    lists = (
        columns.indptr.astype(np.int64),
        columns.indices.astype(np.int32),
        columns.data.astype(np.float32),
    )
    scores, few = np.empty(len(documents), np.float32), np.empty(LIMIT, np.int64)

    def search(query: SparseRows) -> Ids:
        add_up(*lists, *query.row(0), scores)
        return few[: select(scores, few)].copy()

    return search, sum(array.nbytes for array in lists), bool


def by_bm25s(texts: npt.NDArray[np.int64]) -> tuple[Any, int]:
    """Its index over words `[texts, WORDS]`, and its size in bytes."""
    import bm25s
    from bm25s.tokenization import Tokenized

    vocabulary = {str(number): number for number in range(WIDTH)}
    index = bm25s.BM25(backend="numba")
    index.index(Tokenized(texts.tolist(), vocabulary), show_progress=False)
    size = sum(index.scores[name].nbytes for name in ("data", "indices", "indptr"))
    return index, size


def built(name: str, build: Callable[[], tuple[Search, int, Callable[[], object]]]) -> Index:
    """Builds, by both clocks."""
    start, busy = time.perf_counter(), time.process_time()
    search, size, close = build()
    took = time.perf_counter() - start, time.process_time() - busy
    print(f"{name}: built in {took[0]:.1f} s, {took[1]:.1f} s of a processor", flush=True)
    return Index(name, search, size, *took, close)


def vector_arms(documents: SparseRows, scratch: Path) -> Iterator[Index]:
    """The arms that search rows; those whose package is missing are named."""
    for name, build in (
        ("vdr_db edge", partial(ours, documents, scratch / "ours")),
        ("qdrant_edge alone", partial(bare, documents, scratch / "bare")),
        ("scipy CSR", partial(by_scipy, documents)),
        ("numba lists", partial(by_numba, documents)),
    ):
        try:
            yield built(name, build)
        except ImportError as error:
            print(f"{name} is left out: {error}", flush=True)


def bm25_arm(random: np.random.Generator, count: int, queries: SparseRows) -> Iterator[Index]:
    """bm25s over texts of its own, once it returns what its own matrix says."""
    bounds = np.cumsum(1.0 / np.arange(1, WIDTH + 1))
    texts = np.searchsorted(bounds, random.random((count, WORDS)) * bounds[-1])

    def build() -> tuple[Search, int, Callable[[], object]]:
        made, size = by_bm25s(texts)

        def search(query: SparseRows) -> Ids:
            asked = [query.row(0)[0].tolist()]
            found, _ = made.retrieve(asked, k=LIMIT, show_progress=False, n_threads=0)
            return np.asarray(found[0], np.int64)

        parts.append(made)
        return search, size, bool

    parts: list[Any] = []
    try:
        by_bm25s(texts[:10])  # compiles
        index = built("bm25s", build)
    except ImportError as error:
        print(f"bm25s is left out: {error}", flush=True)
        return
    for query in queries[:CHECKED]:
        scores = parts[0].get_scores_from_ids(query.row(0)[0].tolist())
        check("bm25s", index.search(query), scores)
    yield index


def check(name: str, found: Ids, exact: npt.NDArray[Any]) -> None:
    """Compares the scores of what was found with the best there are.

    Raises:
        SystemExit: They differ, so there is nothing to time.
    """
    wanted = exact[best(exact)]
    if len(found) < len(wanted) or not np.allclose(exact[found][: len(wanted)], wanted, CLOSE, 0):
        raise SystemExit(f"{name} found {exact[found]} instead of {wanted}: nothing is timed")


def timed(indexes: list[Index], queries: SparseRows, kind: str, shape: str) -> list[Row]:
    """Both clocks of every query, all arms in turn, and ratios to the first arm."""
    wall: dict[str, list[float]] = {index.name: [] for index in indexes}
    processor: dict[str, list[float]] = {index.name: [] for index in indexes}
    for j, query in enumerate(queries):
        for index in indexes[j % len(indexes) :] + indexes[: j % len(indexes)]:
            start, busy = time.perf_counter(), time.process_time()
            index.search(query)
            processor[index.name].append(1000 * (time.process_time() - busy))
            wall[index.name].append(1000 * (time.perf_counter() - start))
    rows: list[Row] = []
    own = processor[indexes[0].name]
    for index in indexes:
        ratios = [one / mine for one, mine in zip(processor[index.name], own, strict=True)]
        samples = {
            "wall time (ms)": wall[index.name],
            "processor time (ms)": processor[index.name],
            "processor time to vdr_db edge (x)": ratios,
        }
        rows += rows_of(f"search {kind}", index.name, shape, "float32", samples)
        print(
            shape, kind, index.name, rows[-3].median, rows[-2].median, rows[-1].median, flush=True
        )
    return rows


def building(index: Index, shape: str) -> list[Row]:
    """What it took to build, and what it takes to keep."""
    samples = {
        "build (s)": [index.wall],
        "build, processor time (s)": [index.processor],
        "size (MiB)": [index.size / 2**20],
    }
    return rows_of("build", index.name, shape, "float32", samples)


def measured(
    documents: SparseRows, bags: SparseRows, words: list[Index], scratch: Path
) -> list[Row]:
    """Everything of one k; `words` are the arms that search texts of their own."""
    count, k = len(documents), documents.nnz // len(documents)
    sides = {"full": zipf_rows(np.random.default_rng(k), len(bags), k), "bag": bags}
    shape = f"N={count} k={k}"
    indexes = list(vector_arms(documents, scratch))
    for queries in sides.values():
        exact = documents.dot(queries[:CHECKED])
        for index in indexes:
            for j, query in enumerate(queries[:CHECKED]):
                check(index.name, index.search(query), exact[:, j])
    rows = [row for index in indexes for row in building(index, shape)]
    for kind, queries in sides.items():
        rows += timed(indexes + (words if kind == "bag" else []), queries, kind, shape)
    for index in indexes:
        index.close()
    return rows


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--k", type=int, nargs="+", default=[32, 128, 256, 768])
    parser.add_argument("--out", type=Path, help="CSV file to write; rows are printed in any case")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    ids = zipf_rows(random, arguments.queries, BAG)
    bags = SparseRows(ids.indptr, ids.indices, np.ones(ids.nnz, np.float32), WIDTH)
    words = list(bm25_arm(random, arguments.rows, bags))
    rows = [row for one in words for row in building(one, f"N={arguments.rows} words={WORDS}")]
    for k in arguments.k:
        documents = zipf_rows(random, arguments.rows, k)
        with tempfile.TemporaryDirectory() as scratch:
            rows += measured(documents, bags, words, Path(scratch))
        if arguments.out:
            write_csv(arguments.out, rows)


if __name__ == "__main__":
    sys.exit(main())
