"""A writer is killed, then bits flip: what changes an answer is said by opening or by `check`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

import pytest

FLIPS, SEED = 50, 20

WRITER = """
import os, signal, sys
from vdr_db.connectors import QdrantStore
from vdr_db.sparse import SparseRows

store = QdrantStore("documents", path=sys.argv[1])
store.create(400)
for batch in range(30):
    rows = [{(batch * 7 + 3 * i + j) % 400: 1.0 + j + i for j in range(10)} for i in range(5)]
    ids = [f"{batch}-{i}" if i else 1000 + batch for i in range(5)]
    store.upsert(SparseRows.from_dicts(rows, 400), ids, [{"n": batch, "text": "x" * batch}] * 5)
    if batch in (10, 20):
        store.flush()  # what comes later is in the log alone
    if batch == 15:
        store.delete(["3-1", 1004])
print("written", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""

# Each flip has a process of its own, since engines may take theirs down; forked from one that has
# imported everything and opened nothing.
FLIPPED = """
import io, json, os, random, shutil, sys, traceback, warnings
from contextlib import redirect_stdout
from pathlib import Path
import qdrant_edge
from vdr_db.cli.main import main
from vdr_db.connectors import QdrantStore
from vdr_db.connectors.collections import vdr_qdrant
from vdr_db.connectors.qdrant import edge
from vdr_db.errors import StoreError
from vdr_db.ingest import checking
from vdr_db.sparse import SparseRows

killed, work, flips, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]


def answers(path):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with QdrantStore("documents", path=path) as store:
            told = [str(one.message) for one in said]
            records = store.get(list(store.ids()), with_rows=True)
            rows = sorted(
                [repr(one.id), one.payload, *(part.tolist() for part in one.row.row(0))]
                for one in records
            )
            queries = [{(17 * q + j) % 400: 1.0 for j in range(40)} for q in range(24)]
            hits = store.search_batch(SparseRows.from_dicts(queries, 400), limit=200)
            return told, [rows, store.count(), [[(repr(h.id), h.score) for h in q] for q in hits]]


def checked(path):
    with redirect_stdout(io.StringIO()) as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = main(["check", str(path), "--json"])
    return code, json.loads(out.getvalue() or "{}").get("problems")


def in_child(work):
    into, out = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            found = work()
        except StoreError as error:
            found = {"refused": str(error)}
        except BaseException:
            found = {"foreign": traceback.format_exc()}
        with os.fdopen(out, "w") as stream:
            json.dump(found, stream)
        os._exit(0)
    os.close(out)
    with os.fdopen(into) as stream:
        told = stream.read()
    os.waitpid(child, 0)
    return json.loads(told) if told else {"killed": True}


def copied(name):
    shutil.rmtree(work / name, ignore_errors=True)
    shutil.copytree(killed, work / name)
    return work / name


said, whole = in_child(lambda: answers(copied("whole")))
places = []
for file in sorted((killed / "shard").rglob("*")):
    if file.is_file() and not file.name.startswith("vdr_"):
        places += [(file.relative_to(killed), i) for i, b in enumerate(file.read_bytes()) if b]
draw, found = random.Random(seed), []
for number in range(flips):
    name, place = draw.choice(places)
    bit = draw.randrange(8)
    told = []
    for twin in ("asked", "checked"):
        file = copied(twin) / name
        content = bytearray(file.read_bytes())
        content[place] ^= 1 << bit
        file.write_bytes(content)
    asked = in_child(lambda: answers(work / "asked"))
    check = in_child(lambda: checked(work / "checked"))
    is_told = isinstance(asked, dict) or bool(asked[0])
    is_changed = isinstance(asked, list) and asked[1] != whole
    found.append(
        {
            "at": f"{name}:{place} bit {bit}",
            "opening": "said" if is_told else "silent",
            "asked": asked if isinstance(asked, dict) else None,
            "changed": is_changed,
            "checked": check if isinstance(check, dict) else check[0] == 3,
        }
    )
print(json.dumps({"said": said, "rows": whole[1], "found": found}))
"""


def run(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    elsewhere = tempfile.gettempdir()  # the current folder would be searched for modules first
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=elsewhere, timeout=600
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process for each flip")
def test_flips_after_a_kill_are_said_where_they_change_an_answer(tmp_path):
    killed = tmp_path / "killed"
    done = run(WRITER, killed)
    assert (done.returncode, done.stdout) == (-9, "written\n"), done.stderr
    done = run(FLIPPED, killed, tmp_path, FLIPS, SEED)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["said"], told["rows"]) == ([], 148)
    found = told["found"]
    changed = [one for one in found if one["changed"] or one["asked"]]
    said = [one for one in changed if one["opening"] == "said" or one["checked"] is True]
    print(f"{len(changed)} of {FLIPS} flips change an answer, {len(said)} of them are said")  # noqa: T201, for the log of CI
    assert len(found) == FLIPS
    assert not [one for one in found if "foreign" in str(one)]
    assert changed
    assert [one for one in changed if one not in said] == []
