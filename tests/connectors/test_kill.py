"""Killed at any moment, an embedded collection keeps every acknowledged row, once.

A child process writes and tells after each call what is acknowledged; it is killed with SIGKILL and
the folder is opened again. Loss of power is another matter and not tested here.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time

import numpy as np
import pytest

from vdr_db.connectors import QdrantStore
from vdr_db.sparse import SparseRows

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")

WIDTH, NNZ, BATCH = 2000, 32, 64

CHILD = f"""
import sys
import numpy as np
from vdr_db.connectors import QdrantStore
from vdr_db.sparse import SparseRows

WIDTH, NNZ, BATCH = {WIDTH}, {NNZ}, {BATCH}

def rows_of(start, count):
    parts = []
    for number in range(start, start + count):
        random = np.random.default_rng(number)
        ids = np.sort(random.choice(WIDTH, NNZ, replace=False))
        parts.append(SparseRows([0, NNZ], ids, random.random(NNZ, np.float32) + 0.01, WIDTH))
    return SparseRows.concat(parts)
"""

WRITER = """
print("ready", flush=True)
store = QdrantStore("kill", path=sys.argv[1])
store.create(WIDTH)
start = int(sys.argv[2])
print("acknowledged", start, flush=True)
while True:
    names = [f"row {i}" for i in range(start, start + BATCH)]
    store.upsert(rows_of(start, BATCH), names, [{"n": i} for i in range(start, start + BATCH)])
    start += BATCH
    print("acknowledged", start, flush=True)
"""

OPTIMIZER = """
store = QdrantStore("kill", path=sys.argv[1])
print("ready", flush=True)
while True:
    store.delete([f"row {i}" for i in range(500, 900)])
    store.upsert(rows_of(500, 400), [f"row {i}" for i in range(500, 900)])
    print("acknowledged", 900, flush=True)
    store.optimize()
"""


def rows_of(start: int, count: int) -> SparseRows:
    names: dict[str, object] = {}
    exec(CHILD, names)
    return names["rows_of"](start, count)  # type: ignore[operator]


def killed(code: str, path, *arguments: object, after_s: float, wait_for: str = "ready") -> int:
    """Runs the child, kills it `after_s` seconds after its first sign, returns its last count."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD + code, str(path), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=path.parent,
    ) as child:
        line = child.stdout.readline()
        while line and not line.startswith(wait_for):
            line = child.stdout.readline()
        time.sleep(after_s)
        child.kill()
        said, complaints = child.communicate()
    assert line, complaints
    told = said.splitlines(keepends=True)
    counts = [int(one.split()[1]) for one in told if one.startswith("ack") and one.endswith("\n")]
    first = [int(line.split()[1])] if line.startswith("ack") else []
    return max(first + counts, default=-1)


def check(path, acknowledged: int) -> int:
    """Opens the folder; returns how many rows are there."""
    with QdrantStore("kill", path=path) as store:
        names = list(store.ids())
        assert len(names) == len(set(names)) == store.count()
        numbers = sorted(int(name.split()[1]) for name in names)
        assert numbers == list(range(len(numbers)))
        assert acknowledged <= len(numbers) <= acknowledged + BATCH
        records = store.get([f"row {i}" for i in numbers], with_rows=True)
        assert [record.payload for record in records] == [{"n": i} for i in numbers]
        kept = SparseRows.concat([record.row for record in records])
        assert kept == rows_of(0, len(numbers))
        # Found through the index too, not only in storage.
        last = kept[len(numbers) - 1]
        assert store.search(last, 1)[0].id == f"row {len(numbers) - 1}"
        return len(numbers)


def test_killed_while_writing(tmp_path):
    path, done = tmp_path / "c", 0
    moments = random.Random(7)
    for _ in range(5):
        acknowledged = killed(
            WRITER, path, done, after_s=moments.uniform(0.02, 0.5), wait_for="acknowledged"
        )
        assert acknowledged >= done
        done = check(path, acknowledged)
    assert done > 0


def test_killed_while_being_made(tmp_path):
    moments = random.Random(3)
    for trial in range(4):
        path = tmp_path / str(trial)
        acknowledged = killed(WRITER, path, 0, after_s=moments.uniform(0.0, 0.4))
        with QdrantStore("kill", path=path) as store:
            if acknowledged >= 0:
                assert store.width == WIDTH
            store.create(WIDTH)
            store.upsert(rows_of(0, 1), ["row 0"], [{"n": 0}])
            assert store.count() >= max(1, acknowledged)


def test_killed_while_optimising(tmp_path):
    path, count = tmp_path / "c", 3000
    with QdrantStore("kill", path=path) as store:
        store.create(WIDTH)
        store.upsert(rows_of(0, count), [f"row {i}" for i in range(count)])
    moments = random.Random(5)
    for _ in range(2):
        killed(OPTIMIZER, path, after_s=moments.uniform(0.05, 0.6), wait_for="acknowledged")
        with QdrantStore("kill", path=path) as store:
            names = set(store.ids())
            outside = {f"row {i}" for i in range(count) if not 500 <= i < 900}
            assert outside <= names
            assert len(names) == store.count() in (count, count - 400)
            (record,) = store.get(["row 7"], with_rows=True)
            assert np.array_equal(record.row.values, rows_of(7, 1).values)
