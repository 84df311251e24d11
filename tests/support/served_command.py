"""`vdr-db serve` as a process, and what it takes of the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def commanded(
    tmp_path: Path, *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`vdr-db serve`, with a folder to run in: the process and its address."""
    command = [sys.executable, "-m", "vdr_db.cli", "serve", "--port", "0", "--json", *options]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, **(environment or {})},
    )
    try:
        told = process.stdout.readline()
        assert told, process.stderr.read()
        yield process, json.loads(told)["url"].rstrip("/")
    finally:
        process.kill()
        process.communicate(timeout=60)


def peak_mb(process: subprocess.Popen[str]) -> float:
    """The most memory it ever had."""
    with open(f"/proc/{process.pid}/status", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["VmHWM"].split()[0]) / 1024


def cpu_seconds(process: subprocess.Popen[str]) -> float:
    """Processor time it took so far."""
    with open(f"/proc/{process.pid}/stat", encoding="ascii") as file:
        user, system = file.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
