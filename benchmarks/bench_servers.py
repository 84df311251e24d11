"""Ingest and query beside the bare clients, on whatever server is at hand.

    python benchmarks/bench_servers.py --rows 10000 --csv benchmarks/results/servers.csv [--append]

OpenSearch is the one of `VDR_TEST_OPENSEARCH_URL`, else a node of one's own (Maven and a JDK);
Qdrant the one of `VDR_TEST_QDRANT_URL`. Ours and the bare client take turns in one process, and
what is told are medians of the ratios: below 1 we are faster. The bare clients do what their
documentation shows: `helpers.bulk` with dictionaries, `upsert` of `PointStruct`. An earlier
checkout is measured by putting it first on `PYTHONPATH`, with `--append` and the same server.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench_cold_start import commit_of

import vdr_db
from vdr_db import SparseRows
from vdr_db.connectors import ElasticsearchStore, QdrantStore

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
import opensearch_node
from sparse_samples import zipf_rows

WIDTH, NNZ, ROUNDS, QUERIES = 30522, 128, 3, 100
Task = Callable[[str], object]


def timed(task: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the wall and of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    task()
    return time.perf_counter() - wall, time.process_time() - cpu


def ratios(ours: Task, theirs: Task, remove: Task) -> tuple[float, float]:
    """Medians of ours / theirs, on the wall and of processor time, in alternating order."""
    found = []
    for turn in range(ROUNDS):
        names = [f"bench-{uuid.uuid4().hex[:8]}" for _ in range(2)]
        tasks = [(ours, names[0]), (theirs, names[1])]
        order = (0, 1) if turn % 2 == 0 else (1, 0)
        times = {which: timed(lambda t=tasks[which]: t[0](t[1])) for which in order}
        found.append([times[0][i] / times[1][i] for i in range(2)])
        for name in names:
            remove(name)
    walls, cpus = zip(*found, strict=True)
    return statistics.median(walls), statistics.median(cpus)


def in_batches(rows: SparseRows, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` rows."""
    for start in range(0, len(rows), size):
        yield slice(start, min(len(rows), start + size))


def on_opensearch(url: str, rows: SparseRows) -> Iterator[tuple[str, float, float]]:
    """Operation, ratio on the wall, ratio of processor time, beside `opensearch-py`."""
    import opensearchpy
    from opensearchpy import helpers

    client = opensearchpy.OpenSearch([url], timeout=120)
    payload = {"title": "a title", "year": 2001}
    mapping = {"properties": {"vdr": {"type": "rank_features"}, "payload": {"enabled": False}}}

    def ours(name: str) -> None:
        with ElasticsearchStore(name, client=client, replicas=0) as store:
            store.create(WIDTH)
            with store.loading():
                store.upsert(rows, list(range(len(rows))), [payload] * len(rows))

    def theirs(name: str) -> None:
        body = {"settings": {"refresh_interval": -1, "number_of_replicas": 0}, "mappings": mapping}
        client.indices.create(index=name, body=body)
        documents = (
            {
                "_index": name,
                "_id": str(i),
                "payload": payload,
                "vdr": dict(zip(map(str, ids.tolist()), values.tolist(), strict=True)),
            }
            for i in range(len(rows))
            for ids, values in [rows.row(i)]
        )
        helpers.bulk(client, documents)
        client.indices.refresh(index=name)

    def remove(name: str) -> None:
        client.indices.delete(index=f"{name},{name}-*", ignore_unavailable=True)

    yield ("ingest", *ratios(ours, theirs, remove))
    ours("bench-q")

    def query(name: str) -> None:
        with ElasticsearchStore("bench-q", client=client) as store:
            for i in range(QUERIES):
                store.search(rows[i].topk(32), 10)

    def bare_query(name: str) -> None:
        for i in range(QUERIES):
            ids, values = rows[i].topk(32).row(0)
            should = [
                {"rank_feature": {"field": f"vdr.{id}", "boost": weight, "linear": {}}}
                for id, weight in zip(ids.tolist(), values.tolist(), strict=True)
            ]
            body = {"query": {"bool": {"should": should}}, "size": 10, "_source": ["payload"]}
            client.search(index="bench-q", body=body)

    yield ("query", *ratios(query, bare_query, lambda name: None))
    remove("bench-q")


def on_qdrant(url: str, rows: SparseRows) -> Iterator[tuple[str, float, float]]:
    """The same beside `qdrant-client` over gRPC."""
    from qdrant_client import QdrantClient, models

    port = int(os.environ.get("VDR_TEST_QDRANT_GRPC_PORT", "6334"))
    key = os.environ.get("VDR_TEST_QDRANT_API_KEY")
    client = QdrantClient(url=url, grpc_port=port, prefer_grpc=True, api_key=key, timeout=120)
    payload = {"title": "a title", "year": 2001}

    def ours(name: str) -> None:
        store = QdrantStore(name, client=client)
        store.create(WIDTH)
        store.upsert(rows, list(range(len(rows))), [payload] * len(rows))

    def theirs(name: str) -> None:
        client.create_collection(
            name, vectors_config={}, sparse_vectors_config={"vdr": models.SparseVectorParams()}
        )
        for part in in_batches(rows, 256):
            points = []
            for i in range(part.start, part.stop):
                ids, values = rows.row(i)
                vector = models.SparseVector(indices=ids.tolist(), values=values.tolist())
                points.append(models.PointStruct(id=i, vector={"vdr": vector}, payload=payload))
            client.upsert(name, points=points, wait=True)

    yield ("ingest", *ratios(ours, theirs, client.delete_collection))
    ours("bench-q")
    store = QdrantStore("bench-q", client=client)

    def query(name: str) -> None:
        for i in range(QUERIES):
            store.search(rows[i].topk(32), 10)

    def bare_query(name: str) -> None:
        for i in range(QUERIES):
            ids, values = rows[i].topk(32).row(0)
            vector = models.SparseVector(indices=ids.tolist(), values=values.tolist())
            client.query_points("bench-q", query=vector, using="vdr", limit=10, with_payload=True)

    yield ("query", *ratios(query, bare_query, lambda name: None))
    client.delete_collection("bench-q")


def main() -> None:
    """Measures what is at hand."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--append", action="store_true", help="keep the rows that are there")
    arguments = parser.parse_args()
    rows = zipf_rows(arguments.rows, NNZ, WIDTH, seed=1)
    commit = commit_of(Path(vdr_db.__file__).resolve().parents[1])
    found: list[dict[str, Any]] = []
    with ExitStack() as running:
        servers = {}
        url = os.environ.get("VDR_TEST_OPENSEARCH_URL")
        if url is None and opensearch_node.why_missing() is None:
            home = Path(running.enter_context(tempfile.TemporaryDirectory()))
            node = opensearch_node.OpenSearchNode(home, os.getpid())
            running.callback(node.stop)
            url = node.url
        if url is not None:
            servers["OpenSearch"] = on_opensearch(url, rows)
        if qdrant := os.environ.get("VDR_TEST_QDRANT_URL"):
            servers["Qdrant"] = on_qdrant(qdrant, rows)
        for server, results in servers.items():
            for op, wall, cpu in results:
                found.append(
                    {"server": server, "op": op, "rows": len(rows), "nnz": NNZ}
                    | {"wall_ratio": round(wall, 3), "cpu_ratio": round(cpu, 3), "commit": commit}
                )
                print(f"{server:10} {op:6} wall {wall:5.2f}x  processor {cpu:5.2f}x of the client")
    if not found:
        print("no server is at hand: set VDR_TEST_OPENSEARCH_URL or VDR_TEST_QDRANT_URL")
    elif arguments.csv is not None:
        mode = "a" if arguments.append else "w"
        with arguments.csv.open(mode, newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, found[0])
            if not file.tell():
                writer.writeheader()
            writer.writerows(found)


if __name__ == "__main__":
    main()
