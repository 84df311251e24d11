"""The service under load: one client that waits for each answer against many, batched and not.

    python benchmarks/bench_serve.py --clients 32 --seconds 5 --rounds 5

Two servers run over the same collection, one that encodes waiting requests together and one that
encodes each alone. Rounds are interleaved in one run, and what is shown are medians: single queries
a second, their ratio to one client's, and latencies. Every answer of `/embed_sparse` is compared
with the encoder's own bits. A last line counts the requests that a stop (SIGTERM) under full load
left without an answer.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from vdr_db.checkpoints.assets import DEFAULT_MODEL

QUERIES = [
    f"{verb} {thing} {place}"
    for verb in ("edit", "play", "convert", "search for", "draw", "compress", "listen to", "print")
    for thing in ("an image", "music", "a chess game", "large files", "a table of numbers")
    for place in ("on the command line", "in a window", "over the network")
]
FIELDS = ("path", "server", "clients", "requests_per_s", "ratio", "p50_ms", "p99_ms", "errors")


@dataclass
class Load:
    """What one round of clients saw."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def request(host: str, path: str, query: str) -> bytes:
    """The bytes of one request for a query."""
    if path == "/embed_sparse":
        body = json.dumps({"inputs": query, "prompt_name": "query"}).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    asked = query.replace(" ", "+")
    return f"GET {path}?q={asked}&limit=10 HTTP/1.1\r\nhost: {host}\r\n\r\n".encode()


async def client(
    url: str, path: str, first: int, until: float, expected: dict[str, bytes] | None, load: Load
) -> None:
    """Asks one query after the other, each when the last was answered."""
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    number = first
    while time.perf_counter() < until:
        query = QUERIES[number % len(QUERIES)]
        number += 7
        start = time.perf_counter()
        try:
            writer.write(request(place.netloc, path, query))
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ", 1)[1].split(b"\r\n", 1)[0])
            body = await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError) as error:
            load.errors.append(repr(error))
            return
        load.latencies.append(time.perf_counter() - start)
        if not head.startswith(b"HTTP/1.1 200 "):
            load.errors.append(head.split(b"\r\n", 1)[0].decode())
        elif expected is not None and expected.setdefault(query, body) != body:
            load.errors.append(f"other bits for {query!r}")
        if b"connection: close" in head.lower():
            writer.close()
            try:
                reader, writer = await asyncio.open_connection(place.hostname, place.port)
            except OSError:
                return  # the port is closed: nobody took a request
    writer.close()


async def measure(
    url: str, path: str, clients: int, seconds: float, expected: dict[str, bytes] | None
) -> Load:
    """One round."""
    load = Load()
    start = time.perf_counter()
    until = start + seconds
    tasks = [client(url, path, 3 * n, until, expected, load) for n in range(clients)]
    await asyncio.gather(*tasks)
    load.seconds = time.perf_counter() - start
    return load


def expected_bodies(model: str) -> dict[str, bytes]:
    """What `/embed_sparse` must answer, out of the encoder itself, one query at a time."""
    from vdr_db import SparseEncoder
    from vdr_db.serve.encode import pairs_of

    encoder = SparseEncoder.from_pretrained(model)
    return {query: b"[" + pairs_of(encoder.encode_queries([query])[0]) + b"]" for query in QUERIES}


def run_server(model: str, batch_texts: int) -> None:
    """A server over a collection of the queries' words; says its address and serves."""
    from vdr_db import SparseEncoder
    from vdr_db.budget import Budget
    from vdr_db.connectors import VDRQdrant
    from vdr_db.serve import SearchService, listen, make_app, serve

    encoder = SparseEncoder.from_pretrained(model)
    collection = VDRQdrant("texts", encoder, path=":memory:")
    collection.add_texts(QUERIES, ids=list(range(len(QUERIES))))
    budget = Budget(batch_texts=batch_texts, requests=256)
    service = SearchService(collection, encoder, budget=budget)
    address = listen("127.0.0.1", 0)
    serve(make_app(service), address, started=lambda: print(address.url, flush=True))


def start_server(model: str, batch_texts: int) -> tuple[subprocess.Popen[str], str]:
    """A process that serves, and its address."""
    command = [sys.executable, __file__, "--model", model, "--serve", str(batch_texts)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip().rstrip("/")


def percentile(values: list[float], share: float) -> float:
    """In milliseconds."""
    return 1000 * float(np.percentile(values, 100 * share))


def main() -> int:
    """Measures, prints a table and writes it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--serve", type=int, metavar="BATCH_TEXTS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        run_server(arguments.model, arguments.serve)
        return 0
    servers = {
        "together": start_server(arguments.model, 256),
        "alone": start_server(arguments.model, 1),
    }
    bodies = expected_bodies(arguments.model)
    lines = []
    try:
        for path in ("/embed_sparse", "/api/search"):
            expected = bodies if path == "/embed_sparse" else None
            arms = [(name, count) for name in servers for count in (1, arguments.clients)]
            loads: dict[tuple[str, int], list[Load]] = {arm: [] for arm in arms}
            for number in range(arguments.rounds + 1):
                for name, count in arms:
                    url = servers[name][1]
                    took = 0.5 if number == 0 else arguments.seconds  # the first warms up
                    load = asyncio.run(measure(url, path, count, took, expected))
                    if number:
                        loads[name, count].append(load)
            rates = {
                arm: [len(load.latencies) / load.seconds for load in found]
                for arm, found in loads.items()
            }
            for (name, count), found in loads.items():
                pairs = zip(rates[name, count], rates["alone", 1], strict=True)
                line = {
                    "path": path,
                    "server": name,
                    "clients": count,
                    "requests_per_s": round(statistics.median(rates[name, count]), 1),
                    "ratio": round(statistics.median(one / base for one, base in pairs), 2),
                    "errors": sum(len(load.errors) for load in found),
                }
                for share in (0.5, 0.99):
                    each = [percentile(load.latencies, share) for load in found]
                    line[f"p{100 * share:.0f}_ms"] = round(statistics.median(each), 2)
                lines.append(line)
                print("  ".join(f"{name} {line[name]}" for name in FIELDS), flush=True)
        process, url = servers["together"]
        lost = asyncio.run(stopped_under_load(process, url, arguments.clients, bodies))
        print(f"lost at SIGTERM: {len(lost)} {lost[:3]}")
    finally:
        for process, _ in servers.values():
            process.terminate()
            process.wait()
    if arguments.csv:
        with arguments.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(lines)
    return 0


async def stopped_under_load(
    process: subprocess.Popen[str], url: str, clients: int, expected: dict[str, bytes]
) -> list[str]:
    """Errors that clients saw while the server was told to stop."""
    running = asyncio.create_task(measure(url, "/embed_sparse", clients, 5.0, expected))
    await asyncio.sleep(1.0)
    os.kill(process.pid, signal.SIGTERM)
    return (await running).errors


if __name__ == "__main__":
    raise SystemExit(main())
