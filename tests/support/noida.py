"""A stand-in that speaks the Elasticsearch protocol: the `noida-db` package, pinned by digest.

It is not Elasticsearch. It passes the official client's product check, answers with errors of the
same shape, and keeps weights to 9 bits as Lucene does; what it proves is our side of the protocol
and the arithmetic of small collections (at most 100 documents and 32 clauses: its search is slow).
Speed, memory, merges, replicas, security and the behaviour of other versions than the 8.15 it
claims to be are proved by a real server only.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VERSION = "0.2.3"
SHA256 = {"x86_64": "d723e9d728b1d2005f0ee74f0c3696ba11aa021c280f869b6d095e6a87e357b7"}


def why_missing() -> str | None:
    """Why the stand-in cannot run here, or `None` when it can."""
    if sys.platform != "linux" or platform.machine() not in SHA256:
        return f"noida-db {VERSION} is pinned for Linux on x86_64 only"
    if importlib.util.find_spec("noida_db") is None:
        return f"noida-db is not installed; run: pip install noida-db=={VERSION}"
    return None


def checked_binary() -> Path:
    spec = importlib.util.find_spec("noida_db")
    assert spec is not None
    assert spec.origin is not None
    binary = Path(spec.origin).with_name("noida-db")
    digest = hashlib.sha256(binary.read_bytes()).hexdigest()
    assert digest == SHA256[platform.machine()], (
        f"noida-db at {binary} is not the pinned {VERSION}: its SHA-256 is {digest}"
    )
    return binary


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_noida(folder: Path) -> Iterator[int]:
    """Runs the stand-in on a free port of the loopback interface; yields the port.

    Data and binary live in `folder`; the process ends with the block.
    """
    binary = folder / "noida-db"
    shutil.copyfile(checked_binary(), binary)
    binary.chmod(0o700)
    port = free_port()
    log = folder / "noida.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                str(binary),
                "start",
                "--only",
                "elasticsearch",
                "--elasticsearch-port",
                str(port),
                "--data-dir",
                str(folder / "data"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
        )
    try:
        _wait_until_up(process, port, log)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def _wait_until_up(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        assert process.poll() is None, f"noida-db stopped: {log.read_text(errors='replace')}"
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        try:
            connection.request("GET", "/")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.05)
        finally:
            connection.close()
    raise AssertionError(f"noida-db did not answer: {log.read_text(errors='replace')}")
