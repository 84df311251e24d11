"""Memory does not grow with the corpus; the long measurement is `benchmarks/bench_ingest.py`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

CODE = """
import json, sys
from hashing_encoder import HashingEncoder
from vdr_db.ingest import IngestOptions, RecordSource, ingest
from vdr_db.readers import Record

def resident():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1])

class Sink:
    # Takes everything and keeps nothing: what grows is then the ingest.
    stamp, width, documents, concurrent_writers, name, kept = None, None, "encoded", 2, "sink", 0
    passages = None
    def create(self, width, stamp=None, **more): self.width = width
    def upsert(self, rows, ids, payloads=None, **more): self.kept += len(ids)
    def flush(self): pass

class Watch:
    def __init__(self): self.seen = {}
    def update(self, totals, *, is_last=False):
        step = totals.acknowledged // 2000
        if step not in self.seen: self.seen[step] = resident()

def records():
    for i in range(COUNT):
        yield Record(f"d{i}", f"text {i} " + "word " * 60, {"n": i, "title": f"title {i}"})

COUNT = int(sys.argv[1])
watch = Watch()
ingest(RecordSource(records, identity="x"), Sink(), encoder=HashingEncoder(64), progress=watch,
       options=IngestOptions(is_verified=False, queue_bytes=8 << 20), ledger=sys.argv[2])
print(json.dumps(watch.seen))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_is_flat(tmp_path, request):
    support = request.config.rootpath / "tests" / "support"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(support)!r})\n{CODE}",
            "60000",
            str(tmp_path / "run.ledger"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    seen = {int(step): kilobytes for step, kilobytes in json.loads(done.stdout).items()}
    early = max(kilobytes for step, kilobytes in seen.items() if step <= 8)
    late = max(kilobytes for step, kilobytes in seen.items() if step > 8)
    assert late <= 1.1 * early, seen
