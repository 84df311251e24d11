"""What an ingest costs beyond encoding, and whether its memory grows with the corpus.

    python benchmarks/bench_ingest.py BEIR_FOLDER --out benchmarks/results/ingest.csv

Overhead: the tiny SPLADE on the documents of a BEIR folder; one call of `encode_documents` on all
of them against an ingest of the same records into an embedded store with ledger, fingerprints and
checks at the end, round by round in turn. Wall time is what counts; processor time is shown beside
it, because with spare cores the writer hides behind the encoder.

Memory: rows of a hashing encoder into a server in another process (the contract server of
`tests/support`, gRPC), so that what grows is the ingest, not a store; resident memory after 20,000
documents against the most after 200,000.

Images: a folder of 1,000 pictures of many sizes into an embedded store, with a tiny model of texts
and images; pictures per second, and resident memory after 200 of them against the most until the
end.

Client: processor time of the writing process per document of 256 weights, while it writes rows
that are ready to the same server. The server's share is in its own process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SUPPORT = HERE.parent / "tests" / "support"
sys.path[:0] = [str(HERE), str(SUPPORT)]

from measure import Row, in_turn, resident, rows_of, write_csv  # noqa: E402

from vdr_db.ingest import ImageFolderSource, IngestOptions, RecordSource, ingest  # noqa: E402
from vdr_db.readers import BeirFolder, Record  # noqa: E402

SERVER = """
import sys, tempfile, time
from pathlib import Path
from qdrant_contract_server import QdrantContractServer
with tempfile.TemporaryDirectory() as folder, QdrantContractServer(Path(folder)) as server:
    print(server.rest_port, server.grpc_port, flush=True)
    sys.stdin.read()
"""
EARLY, LATE = 20_000, 200_000
EARLY_IMAGES, IMAGES = 200, 1000


def main() -> int:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="BEIR folder whose documents are encoded")
    parser.add_argument("--documents", type=int, default=200, help="for overhead (default: 200)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--parts",
        nargs="+",
        default=["overhead", "client", "memory", "images"],
        help="what to measure (default: everything)",
    )
    parser.add_argument("--out", type=Path, help="CSV file to write; rows are printed in any case")
    parser.add_argument("--memory-worker", help=argparse.SUPPRESS)
    parser.add_argument("--images-worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.images_worker:
        print(json.dumps(measure_images(Path(arguments.images_worker))))
        return 0
    if arguments.memory_worker:
        print(json.dumps(measure_memory(json.loads(arguments.memory_worker))))
        return 0
    rows: list[Row] = []
    if "overhead" in arguments.parts:
        rows += measure_overhead(arguments.folder, arguments.documents, arguments.rounds)
    if "client" in arguments.parts:
        for protocol in ("grpc", "rest"):
            rows += measure_client(protocol, arguments.rounds)
    if "memory" in arguments.parts:
        with contract_server() as ports:
            command = [sys.executable, __file__, "-", "--memory-worker", json.dumps(ports)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        early, late = json.loads(done.stdout)
        samples = {
            f"resident at {EARLY} (MB)": [early / 1e6],
            f"most up to {LATE} (MB)": [late / 1e6],
            "growth (%)": [100 * (late / early - 1)],
        }
        rows += rows_of("ingest", "server, gRPC", f"{LATE} docs x 16 nnz", "float32", samples)
    if "images" in arguments.parts:
        with tempfile.TemporaryDirectory() as scratch:
            # A process of its own: the memory of the parts before is not given back.
            command = [sys.executable, __file__, "-", "--images-worker", scratch]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        took_s, early, late = json.loads(done.stdout)
        samples = {
            "rate (images/s)": [IMAGES / took_s],
            f"resident at {EARLY_IMAGES} (MB)": [early / 1e6],
            f"most up to {IMAGES} (MB)": [late / 1e6],
            "growth (%)": [100 * (late / early - 1)],
        }
        rows += rows_of("ingest", "embedded", f"{IMAGES} images, tiny model", "float32", samples)
    for row in rows:
        print(
            f"{row.op:16} {row.backend:14} {row.shape:24} {row.metric:26} {row.median} {row.unit}"
        )
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_csv(arguments.out, rows)
    return 0


def measure_overhead(folder: Path, count: int, rounds: int) -> list[Row]:
    """Ingest into an embedded store against encoding alone."""
    from vdr_db.checkpoints.assets import fetch
    from vdr_db.connectors import QdrantStore
    from vdr_db.encoders.text import SparseEncoder

    encoder = SparseEncoder.from_pretrained(fetch("tiny-splade"), device="cpu")
    records = list(islice(BeirFolder(folder).documents(), count))
    texts = [record.text for record in records]
    source = RecordSource(lambda: records, identity="benchmark")
    processor: dict[str, list[float]] = {"encode": [], "ingest": []}

    def encode() -> None:
        began = time.process_time()
        encoder.encode_documents(texts)
        processor["encode"].append(time.process_time() - began)

    def run() -> None:
        began = time.process_time()
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch)
            with QdrantStore("bench", path=place / "store") as store:
                report = ingest(source, store, encoder=encoder, ledger=place / "run.ledger")
                assert report.verification is not None
                assert report.verification.is_passed
        processor["ingest"].append(time.process_time() - began)

    times_ms = in_turn({"encode": encode, "ingest": run}, rounds)
    shape = f"{len(records)} docs, tiny-splade"
    over = [100 * (b / a - 1) for a, b in zip(times_ms["encode"], times_ms["ingest"], strict=True)]
    rows = []
    for name in ("encode", "ingest"):
        samples = {
            "wall (s)": [ms / 1000 for ms in times_ms[name]],
            "processor (s)": processor[name][-rounds:],
        }
        rows += rows_of(name, "embedded", shape, "float32", samples)
    return rows + rows_of("ingest", "embedded", shape, "float32", {"overhead (%)": over})


def measure_client(protocol: str, rounds: int) -> list[Row]:
    """Processor time per document of the process that writes."""
    from hashing_encoder import HashingEncoder

    count = 2000
    encoder = HashingEncoder(256)
    rows = encoder.encode_documents([f"text {i}" for i in range(count)])
    payloads = [{"text": f"text {i} " + "word " * 20, "n": i} for i in range(count)]
    ids = [f"d{i}" for i in range(count)]
    spent_us = []
    with contract_server() as ports, server_store(ports, protocol) as store:
        store.create(rows.width, encoder.stamp())
        for _ in range(rounds + 1):
            began = time.process_time()
            for start in range(0, count, 256):
                part = slice(start, start + 256)
                store.upsert(rows[part], ids[part], payloads[part])
            spent_us.append((time.process_time() - began) * 1e6 / count)
    samples = {"client processor time (us/document)": spent_us[1:]}
    return rows_of("upsert", protocol, f"{count} docs x 256 nnz", "float32", samples)


def measure_memory(ports: dict[str, int]) -> tuple[int, int]:
    """Resident bytes at 20,000 documents, and the most until 200,000."""
    from hashing_encoder import HashingEncoder

    early = late = 0

    class Watch:
        def update(self, totals: Any, *, is_last: bool = False) -> None:
            nonlocal early, late
            now = resident("VmRSS")
            if totals.acknowledged <= EARLY:
                early = max(early, now)
            late = max(late, now)

    def records() -> Iterator[Record]:
        for i in range(LATE):
            yield Record(f"d{i}", f"text {i} " + "word " * 40, {"n": i, "title": f"title {i}"})

    with tempfile.TemporaryDirectory() as scratch, server_store(ports, "grpc") as store:
        report = ingest(
            RecordSource(records, identity="benchmark"),
            store,
            encoder=HashingEncoder(16),
            options=IngestOptions(queue_bytes=8 << 20),
            ledger=Path(scratch, "run.ledger"),
            progress=Watch(),
        )
    assert report.verification is not None
    assert report.verification.is_passed
    return early, late


def measure_images(scratch: Path) -> tuple[float, int, int]:
    """Seconds for a folder of pictures, resident bytes at 200 of them, and the most until 1,000."""
    from image_folders import pixels, write_cross_modal
    from PIL import Image

    from vdr_db import CrossModalEncoder
    from vdr_db.connectors import QdrantStore

    encoder = CrossModalEncoder.from_pretrained(write_cross_modal(scratch / "model"), device="cpu")
    some = [pixels(160 + 40 * i, 120 + 30 * i, seed=i) for i in range(16)]
    for i in range(IMAGES):
        path = scratch / "images" / f"{i % 10}" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(some[i % 16] ^ (i // 16)).save(path, quality=90)
    early = late = 0

    class Watch:
        def update(self, totals: Any, *, is_last: bool = False) -> None:
            nonlocal early, late
            now = resident("VmRSS")
            if totals.acknowledged <= EARLY_IMAGES:
                early = max(early, now)
            late = max(late, now)

    began = time.monotonic()
    with QdrantStore("bench", path=scratch / "store") as store:
        report = ingest(
            ImageFolderSource(scratch / "images"),
            store,
            encoder=encoder,
            ledger=scratch / "run.ledger",
            progress=Watch(),
        )
        assert store.count() == IMAGES
    assert report.verification is not None
    assert report.verification.is_passed
    return time.monotonic() - began, early, late


@contextmanager
def contract_server() -> Iterator[dict[str, int]]:
    """Ports of a contract server in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=SUPPORT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        rest, grpc = map(int, process.stdout.readline().split())
        yield {"rest": rest, "grpc": grpc}
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def server_store(ports: dict[str, int], protocol: str) -> Any:
    """A store on the contract server."""
    from vdr_db.connectors import QdrantStore

    return QdrantStore(
        "bench",
        url=f"http://127.0.0.1:{ports['rest']}",
        prefer_grpc=protocol == "grpc",
        client_options={"grpc_port": ports["grpc"]},
    )


if __name__ == "__main__":
    sys.exit(main())
