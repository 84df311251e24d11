"""Kill −9 at random moments: nothing acknowledged is lost, nothing is twice, the end is exact.

The ingest runs in a process of its own, which sends each acknowledgement of the store before
anything else happens. It is killed at a random acknowledgement or a random time after its
start; then the store is looked at, and the next process resumes. What this proves is death of the
process, at any instruction; loss of power is another matter (see docs/ingest.md).
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time

import opensearch_node
import pytest
import services
from faults import FaultPlan
from forking import FORKS
from hashing_encoder import HashingEncoder
from ingest_worker import make_store, work
from opensearch_node import OpenSearchNode
from qdrant_contract_server import QdrantContractServer
from search_servers import note_real_server, remove_indices

from vdr_db.ingest.ledger import Ranges

pytestmark = pytest.mark.usefixtures("forks")

COUNT = 20_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    with open(path, "w", encoding="utf-8") as stream:
        for i in range(COUNT):
            stream.write(json.dumps({"_id": f"d{i}", "text": f"text number {i}", "n": i}) + "\n")
    return path


class Worker:
    """One process that ingests, and the acknowledgements it has reported."""

    def __init__(self, job, folder):
        self.acknowledged: list[str] = []
        self.report = None
        self.arrived = threading.Condition()
        self.errors = folder / "worker.err"
        self.told, tell = FORKS.Pipe(duplex=False)
        self.process = FORKS.Process(target=work, args=(job, folder, tell))
        self.process.start()
        tell.close()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        while True:
            try:
                told = self.told.recv()
            except (EOFError, OSError):  # the process has ended, perhaps in the middle of it
                return
            with self.arrived:
                if isinstance(told, dict):
                    self.report = told
                else:
                    self.acknowledged.extend(told)
                self.arrived.notify_all()

    def wait_for(self, count, seconds):
        """Returns at the n-th acknowledged document, at the end of the process or of the time."""
        until = time.monotonic() + seconds
        with self.arrived:
            while len(self.acknowledged) < count and self.process.is_alive():
                if time.monotonic() > until:
                    return
                self.arrived.wait(0.01)

    def end(self, signal_number=None):
        if signal_number is not None and self.process.is_alive():
            os.kill(self.process.pid, signal_number)
        self.process.join(60)
        code = self.process.exitcode
        self.reader.join(10)
        self.told.close()
        return code, self.errors.read_text() if self.errors.exists() else ""


def settled_numbers(ledger):
    """What the ledger holds after a kill, read the way the next run will."""
    if not ledger.exists():
        return Ranges()
    import sqlite3

    connection = sqlite3.connect(ledger)
    try:
        return Ranges(connection.execute("SELECT start, stop FROM settled"))
    except sqlite3.OperationalError:
        return Ranges()  # killed before its tables were made
    finally:
        connection.close()


def check_nothing_is_lost(place, acknowledged, ledger, checked):
    """Everything acknowledged or committed since the last look is in the store."""
    committed = {f"d{n}" for start, stop in settled_numbers(ledger) for n in range(start, stop)}
    new = sorted((acknowledged | committed) - checked)
    with make_store(place) as store:
        assert not new or store.width is not None
        assert [one.id for one in (store.get(new) if new else [])] == new
    checked.update(new)


def check_end(place, encoder, every=1):
    with make_store(place) as store:
        assert store.count() == COUNT
        ids = list(store.ids())
        assert len(ids) == len(set(ids)) == COUNT
        assert set(ids) == {f"d{i}" for i in range(COUNT)}
        for start in range(0, COUNT, 2000 * every):
            numbers = range(start, start + 2000)
            found = store.get([f"d{i}" for i in numbers], with_rows=True)
            rows = encoder.encode_documents([f"text number {i}" for i in numbers])
            for i, one in zip(numbers, found, strict=True):
                assert one.id == f"d{i}"
                assert one.payload["n"] == i
                assert one.row == rows[i - start]


def ingest_with_kills(
    tmp_path,
    corpus,
    place,
    kills,
    seed,
    *,
    batch=128,
    writers=1,
    every=1,
    checkpoint=1500,
    outages=(),
    outage=None,
):
    """Kills an ingest again and again, and the server meanwhile: `outage` in those rounds."""
    chance = random.Random(seed)
    ledger = tmp_path / "run.ledger"
    patience = {"tries": 10_000, "deadline_s": 200} if outages else {"deadline_s": 30}
    job = {
        "files": [str(corpus)],
        "ledger": str(ledger),
        "place": place,
        "encoder": {"nonzeros": 16},
        "retry": {"base_s": 0.02, "cap_s": 0.5, **patience},
        "options": {
            "batch_documents": batch,
            "writers": writers,
            "checkpoint_documents": checkpoint,
            "queue_bytes": 4 << 20,
        },
    }
    acknowledged: set[str] = set()
    checked: set[str] = set()
    done = 0
    for turn in range(kills):
        worker = Worker(job, tmp_path)
        # Nearly all moments lie between two acknowledgements; some before the first one, where
        # files are made and opened.
        is_early = chance.random() < 0.2 and turn not in outages
        worker.wait_for(
            10**9 if is_early else chance.randrange(1, max(2, 2 * COUNT // (kills + 1))),
            chance.uniform(0.0, 0.3) if is_early else 30,
        )
        time.sleep(chance.uniform(0, 0.01))
        if turn in outages:
            outage()
            worker.wait_for(len(worker.acknowledged) + 1, 60)
        code, said = worker.end(signal.SIGKILL)
        assert code == -signal.SIGKILL or (code == 0 and worker.report), said
        acknowledged.update(worker.acknowledged)
        check_nothing_is_lost(place, acknowledged, ledger, checked)
        done += code == -signal.SIGKILL
    worker = Worker(job, tmp_path)
    code, said = worker.end()
    assert code == 0, said
    report = worker.report
    assert report["verification"]["is_passed"]
    assert report["acknowledged_in_total"] == COUNT
    assert acknowledged | checked <= {f"d{n}" for n in range(COUNT)}
    check_end(place, HashingEncoder(), every)  # all 20,000, so none looked at before has gone
    return done, report


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_while_writing_to_the_embedded_store(tmp_path, corpus, kills):
    place = {"path": str(tmp_path / "articles")}
    done, report = ingest_with_kills(tmp_path, corpus, place, kills, seed=kills)
    assert done >= kills // 2
    assert report["totals"]["resumed"] > 0


@pytest.mark.parametrize(
    ("protocol", "kills"), [("rest", 3), pytest.param("grpc", 20, marks=pytest.mark.slow)]
)
def test_killed_while_writing_to_a_server(tmp_path, corpus, protocol, kills):
    with QdrantContractServer(tmp_path / "server", faults=FaultPlan()) as server:
        place = {
            "url": server.url,
            "prefer_grpc": protocol == "grpc",
            "client_options": {"grpc_port": server.grpc_port},
            "timeout": 10,
        }
        done, report = ingest_with_kills(
            tmp_path, corpus, place, kills, seed=100 + kills, batch=256, writers=2, every=2
        )
    assert done >= kills // 2
    assert report["totals"]["resumed"] > 0


ON_A_NODE = {"batch": 256, "writers": 2, "every": 2, "checkpoint": 300}  # its flush takes a while


def test_killed_while_writing_to_opensearch(tmp_path, corpus, opensearch_url, request):
    """The same on a real node."""
    pytest.importorskip("opensearchpy")
    note_real_server(request, services.version_of(opensearch_url))
    place = {"opensearch": opensearch_url, "name": services.unique_name()}
    done, report = ingest_with_kills(tmp_path, corpus, place, 3, seed=203, **ON_A_NODE)
    with make_store(place) as store:
        remove_indices(store)
    assert done >= 1
    assert report["totals"]["resumed"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_both_killed_while_writing_to_opensearch(tmp_path, corpus, request):
    """Ingest and node, which comes back with the same data; the long way takes minutes."""
    kills, outages = (20, (4, 9, 15)) if os.environ.get("VDR_TEST_LONG") == "1" else (4, (1,))
    reason = opensearch_node.why_missing()
    if reason is not None:
        services.skip(reason)
    nodes = [OpenSearchNode(tmp_path / "node", os.getpid())]
    note_real_server(request, services.version_of(nodes[0].url))

    def outage():
        nodes[-1].kill()
        nodes.append(OpenSearchNode(tmp_path / "node", os.getpid(), port=nodes[0].port))

    try:
        place = {"opensearch": nodes[0].url, "name": services.unique_name()}
        more = {**ON_A_NODE, "outages": outages, "outage": outage}
        done, report = ingest_with_kills(tmp_path, corpus, place, kills, seed=220, **more)
    finally:
        nodes[-1].stop()
    assert len(nodes) == 1 + len(outages)
    assert done >= kills // 2
    assert report["totals"]["resumed"] > 0


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_while_writing_pictures(tmp_path, kills):
    """The same for a folder of files, of which some go to the quarantine, once each."""
    images, count = tmp_path / "images", 2000
    images.mkdir()
    names = [f"{i:05d}.png" for i in range(count)]
    for i, name in enumerate(names):
        (images / name).write_bytes(b"broken" if i % 25 == 7 else f"picture {i}".encode())
    broken = {name for i, name in enumerate(names) if i % 25 == 7}
    place = {"path": str(tmp_path / "pictures")}
    ledger = tmp_path / "run.ledger"
    options = {"batch_documents": 16, "checkpoint_documents": 90}
    job = {"images": str(images), "ledger": str(ledger), "place": place, "options": options}
    chance = random.Random(kills)
    acknowledged: set[str] = set()
    done = 0
    for _ in range(kills):
        worker = Worker({**job, "pause_s": 0.002}, tmp_path)
        worker.wait_for(chance.randrange(1, 2 * count // (kills + 1)), 30)
        time.sleep(chance.uniform(0, 0.01))
        code, said = worker.end(signal.SIGKILL)
        assert code == -signal.SIGKILL or (code == 0 and worker.report), said
        done += code == -signal.SIGKILL
        acknowledged.update(worker.acknowledged)
        settled = {names[n] for a, b in settled_numbers(ledger) for n in range(a, b)}
        with make_store(place) as store:
            there = set(store.ids()) if store.width is not None else set()
        assert acknowledged | (settled - broken) <= there <= set(names) - broken
    worker = Worker(job, tmp_path)
    code, said = worker.end()
    assert code == 0, said
    assert done >= kills // 2
    assert worker.report["totals"]["resumed"] > 0
    assert worker.report["verification"]["is_passed"]
    with make_store(place) as store:
        assert store.count() == count - len(broken)
        kept = [name for name in names if name not in broken]
        found = store.get(kept, with_rows=True)
        rows = HashingEncoder().encode_images([images / name for name in kept]).rows
        assert [one.id for one in found] == kept
        assert all(one.row == rows[i] for i, one in enumerate(found))
    lines = (tmp_path / "run.ledger.quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == sorted(broken)


def test_a_ledger_that_cannot_grow_stops_and_resumes(tmp_path):
    corpus, ledger, count = tmp_path / "corpus.jsonl", tmp_path / "run.ledger", 6000
    lines = (json.dumps({"_id": f"d{i}", "text": f"text number {i}"}) for i in range(count))
    corpus.write_text("\n".join(lines))
    with QdrantContractServer(tmp_path / "server") as server:
        place = {"url": server.url, "prefer_grpc": True, "timeout": 10}
        place["client_options"] = {"grpc_port": server.grpc_port}
        job = {"files": [str(corpus)], "ledger": str(ledger), "place": place}
        job["options"] = {"batch_documents": 128, "checkpoint_documents": 256}
        worker = Worker({**job, "file_limit": 150_000}, tmp_path)
        code, said = worker.end()
        assert code == 1
        assert "StoreUnavailable: the ledger" in said
        assert "cannot be written" in said
        assert "resume" in said
        settled = len(settled_numbers(ledger))
        assert 256 <= settled <= len(worker.acknowledged) < count
        worker = Worker(job, tmp_path)
        code, said = worker.end()
        assert code == 0, said
        assert worker.report["totals"]["resumed"] == settled
        assert worker.report["acknowledged_in_total"] == count
        assert worker.report["verification"]["count"] == count


def test_interrupt_drains_commits_and_resumes(tmp_path, corpus):
    place = {"path": str(tmp_path / "articles")}
    job = {
        "files": [str(corpus)],
        "ledger": str(tmp_path / "run.ledger"),
        "place": place,
        "options": {"batch_documents": 128},
    }
    # Slow writers and a short queue: the signal comes before the last text is read, on any machine.
    slow = {"pause_s": 0.1, "options": {**job["options"], "queue_bytes": 100_000}}
    worker = Worker({**job, **slow}, tmp_path)
    worker.wait_for(1000, 30)
    code, said = worker.end(signal.SIGINT)
    assert code == 130, said
    report = worker.report
    assert report["is_interrupted"]
    assert report["totals"]["encoded"] == report["totals"]["acknowledged"] < COUNT
    settled = settled_numbers(tmp_path / "run.ledger")
    assert len(settled) == report["totals"]["acknowledged"] == len(worker.acknowledged)
    worker = Worker(job, tmp_path)
    code, said = worker.end()
    assert code == 0, said
    assert worker.report["totals"]["resumed"] == len(settled)
    check_end(place, HashingEncoder())
