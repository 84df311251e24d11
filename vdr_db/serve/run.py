"""Serving an application until it is told to stop."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from tempfile import TemporaryDirectory

from fastapi import FastAPI

from vdr_db.errors import ConfigError
from vdr_db.serve.server import make_server
from vdr_db.serve.watch import METRICS_FOLDER

__all__ = ["Address", "listen", "serve", "serve_many"]

BACKLOG = 128
LOOK_S, EARLY_S = 0.2, 30.0


@dataclass(frozen=True)
class Address:
    """Where an application listens.

    Attributes:
        socket: Open and bound.
        url: For a browser on this machine.
        is_loopback: Whether only this machine can reach it.
    """

    socket: socket.socket
    url: str
    is_loopback: bool


def listen(host: str, port: int) -> Address:
    """Takes a port of an address or name of this machine; 0 for any that is free.

    Raises:
        ConfigError: The port is impossible, taken or forbidden, or the host is not this machine.
    """
    if not 0 <= port < 65536:
        raise ConfigError(f"`port` must lie in [0, 65535], got {port}.")
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.create_server(place[:2], family=family, backlog=BACKLOG)
        # Connections take it over. asyncio sets it only where a socket names its protocol, and else
        # the body of an answer waits 40 ms until its header is acknowledged.
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        raise ConfigError(
            f"{host} port {port} cannot be listened on ({error}); choose another with --port, or "
            "0 for any free one."
        ) from error
    address, taken = bound.getsockname()[:2]
    is_loopback = address.startswith("127.") or address == "::1"
    shown = "localhost" if address in ("0.0.0.0", "::") else address
    shown = f"[{shown}]" if ":" in shown else shown
    return Address(bound, f"http://{shown}:{taken}/", is_loopback)


def serve(app: FastAPI, address: Address, *, started: Callable[[], None] = lambda: None) -> bool:
    """Serves until SIGINT or SIGTERM; requests that are going on are answered first.

    The address is closed in the end; `started` is called just before.

    Returns:
        Whether it was Ctrl-C (SIGINT) that ended it.
    """
    server = make_server(app)
    with address.socket, _signals_kept() as seen:
        started()
        server.run(sockets=[address.socket])
    return signal.SIGINT in seen


def serve_many(
    work: Callable[[Address], object],
    address: Address,
    workers: int,
    *,
    started: Callable[[], None],
) -> tuple[int, bool]:
    """Serves with several processes that share a port, until SIGINT or SIGTERM.

    Each runs `work`, which can be pickled and opens what it serves. One that ends by itself is
    started again; one that fails early ends all, since the next would fail as well. Numbers for
    Prometheus are of all of them together.

    Returns:
        The exit code of a worker that failed early, else 0; and whether it was Ctrl-C (SIGINT) that
        ended it.
    """
    spawn = multiprocessing.get_context("spawn")

    def start() -> tuple[SpawnProcess, float]:
        process = spawn.Process(target=work, args=(address,))
        process.start()
        return process, time.monotonic()

    code = 0
    with address.socket, _signals_kept() as seen, _shared_metrics():
        running = [start() for _ in range(workers)]
        started()
        while not seen and not code:
            wait([process.sentinel for process, _ in running], timeout=LOOK_S)
            for place, (process, since) in enumerate(running):
                if process.exitcode is None or seen:
                    continue
                if process.exitcode > 0 and time.monotonic() - since < EARLY_S:
                    code = process.exitcode
                    break
                running[place] = start()
        for process, _ in running:
            process.terminate()
        address.socket.close()
        for process, _ in running:
            process.join()
    return code, signal.SIGINT in seen


@contextmanager
def _shared_metrics() -> Iterator[None]:
    """A folder in which processes started meanwhile keep their numbers together."""
    before = os.environ.get(METRICS_FOLDER)
    with TemporaryDirectory(prefix="vdr-db-metrics-") as folder:
        os.environ[METRICS_FOLDER] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[METRICS_FOLDER]
            else:
                os.environ[METRICS_FOLDER] = before


@contextmanager
def _signals_kept() -> Iterator[list[int]]:
    """Keeps signals from ending the process: the server raises them again once it has stopped."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    before = {
        number: signal.signal(number, lambda number, _: seen.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
