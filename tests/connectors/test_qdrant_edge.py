"""The embedded engine: its folder, its moods, and what is refused around it."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
from store_samples import WIDTH, assert_same_hits, filters, row, rows

from vdr_db.connectors import MemoryStore, QdrantStore
from vdr_db.connectors.qdrant import edge as edge_module
from vdr_db.connectors.qdrant.engine import Batch
from vdr_db.errors import (
    ConfigError,
    InputError,
    MissingExtraError,
    StoreError,
    StoreMismatch,
    StoreUnavailable,
)
from vdr_db.filters import parse_filter
from vdr_db.sparse import SparseRows
from vdr_db.stamp import EncoderStamp

STAMP = EncoderStamp("model", "tokens", "all", "mlm", "log1p_relu", k=64)


@pytest.fixture
def path(tmp_path):
    """A collection with three documents, closed."""
    path = tmp_path / "deep" / "documents.qdrant"
    with QdrantStore("documents", path=path, payload_indexes={"n": "integer"}) as store:
        store.create(WIDTH, STAMP)
        store.upsert(rows(3), ["a", "b", 3], [{"n": i} for i in range(3)])
    return path


def opened(path, **options):
    return QdrantStore("documents", path=path, **options)


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    # From elsewhere, because the current folder would be searched for modules first.
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tempfile.gettempdir(),
    )


def test_everything_is_there_after_opening_again(path):
    with opened(str(path)) as store:
        assert (store.width, store.stamp, store.documents) == (WIDTH, STAMP, "encoded")
        assert store.datatype == "float32"
        assert store.count() == 3
        assert store.get(["b"], with_rows=True)[0].row == rows(3)[1]
        assert store.count({"n": {"gte": 1}}) == 2
        store.create(WIDTH, STAMP)
        store.upsert(rows(1), ["d"])
    with opened(path) as store:
        assert store.count() == 4


def test_writes_survive_without_close(path):
    store = opened(path)
    store.upsert(rows(5, seed=1), list(range(10, 15)))
    store._engine._shard.close()
    store._engine._folder.release()
    with opened(path) as store:
        assert store.count() == 8


def test_flushing_syncs_files_only_after_a_write(path):
    class Watched:
        def __init__(self, shard):
            self.shard, self.flushes = shard, 0

        def __getattr__(self, name):
            return getattr(self.shard, name)

        def flush(self):
            self.flushes += 1
            self.shard.flush()

    store = opened(path)
    watched = store._engine._shard = Watched(store._engine._shard)
    writes = (
        lambda: store.upsert(rows(1), ["d"]),
        lambda: store.update_payloads(["d"], [{"n": 7}]),
        lambda: store.delete(["d"]),
        store.optimize,
    )
    for i, write in enumerate(writes, 1):
        write()
        store.flush()
        store.flush()
        assert watched.flushes == i
    store.upsert(rows(1), ["e"])
    store.close()
    assert watched.flushes == len(writes) + 1
    for i in range(2):  # a collection that was closed is on the disk already
        store = opened(path)
        watched = store._engine._shard = Watched(store._engine._shard)
        count = store.count()
        store.upsert(rows(i), list("f" * i))
        store.close()
        assert watched.flushes == i
        with opened(path) as store:
            assert store.count() == count + i


def test_only_one_opener(path):
    with opened(path) as store:
        with pytest.raises(StoreUnavailable, match=f"already open in process {os.getpid()};"):
            opened(path)
        told = run_python(
            """
            import sys
            from vdr_db.connectors import QdrantStore
            from vdr_db.errors import StoreUnavailable
            try:
                QdrantStore("documents", path=sys.argv[1])
            except StoreUnavailable as error:
                print(error)
            """,
            path,
        )
        assert f"already open in process {os.getpid()};" in told.stdout, told.stderr
        assert store.count() == 3
    opened(path).close()


FORK = """
import os, sys
from vdr_db.connectors import QdrantStore
from vdr_db.errors import StoreUnavailable
from vdr_db.sparse import SparseRows
row = SparseRows.from_dicts([{1: 1.0}], 40)
kept = QdrantStore("documents", path=sys.argv[1])
temporary = QdrantStore("temporary", path=":memory:")
temporary.create(40)
temporary.upsert(row, ["a"])
child = os.fork()
if child == 0:
    sys.exit(0)
os.waitpid(child, 0)
print(os.path.isdir(temporary._engine._folder.path), temporary.count())
try:
    QdrantStore("documents", path=sys.argv[1])
except StoreUnavailable:
    print("still locked")
kept.close()
QdrantStore("documents", path=sys.argv[1]).close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_end_of_a_forked_child_takes_nothing_from_its_parent(path):
    told = run_python(FORK, path)
    assert told.stdout.splitlines() == ["True 1", "still locked"], told.stderr


def test_another_name_or_precision_is_a_mismatch(path):
    with pytest.raises(StoreMismatch, match="holds the collection 'documents', not 'articles'"):
        QdrantStore("articles", path=path)
    with pytest.raises(StoreMismatch, match="keeps weights as float32, not as uint8"):
        opened(path, datatype="uint8")
    with pytest.raises(StoreMismatch, match=r"has the payload indexes .*not \{'topic'"):
        opened(path, payload_indexes={"topic": "keyword"})
    opened(path, datatype="float32", payload_indexes={"n": "integer"}).close()


def test_a_path_that_holds_something_else(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(StoreMismatch, match="is a file, and a collection is a folder"):
        opened(file)
    with pytest.raises(StoreMismatch, match=r"holds 'notes\.txt'"):
        opened(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]
    assert file.read_text() == "mine"


def test_a_collection_below_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreMismatch):
        opened(tmp_path / "file" / "collection")


def test_an_empty_folder_is_a_fine_place(tmp_path):
    with opened(tmp_path) as store:
        assert store.width is None
        assert list(tmp_path.iterdir()) == []
        store.create(WIDTH)
        store.upsert(rows(1), ["a"])
    with opened(tmp_path) as store:
        assert store.count() == 1


def test_an_interrupted_creation_is_done_again(tmp_path):
    (tmp_path / "shard.new" / "segments").mkdir(parents=True)
    (tmp_path / "shard.new" / "edge_config.json").write_text("{")
    (tmp_path / "lock").write_text("123\n")
    with opened(tmp_path) as store:
        store.create(WIDTH)
        store.upsert(rows(1), ["a"])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["lock", "shard"]


def test_a_damaged_description(path):
    manifest = path / "shard" / "vdr_collection.json"
    good = manifest.read_text()
    manifest.write_text(good[: len(good) // 2])
    with pytest.raises(StoreMismatch, match="not a collection of this library"):
        opened(path)
    manifest.write_text(json.dumps({**json.loads(good), "width": "many"}))
    with pytest.raises(StoreMismatch, match="is damaged"):
        opened(path)
    manifest.write_text(json.dumps({**json.loads(good), "format": 99}))
    with pytest.raises(StoreMismatch, match="newer vdr-db"):
        opened(path)
    manifest.unlink()
    with pytest.raises(StoreMismatch, match=r"lacks its description shard/vdr_collection\.json"):
        opened(path)
    manifest.write_text(good)
    opened(path).close()


def test_damaged_engine_files_are_a_store_error(path):
    (path / "shard" / "edge_config.json").write_text("{")
    with pytest.raises(StoreError, match="cannot be opened"):
        opened(path)


READ_ONLY = """
import os, sys
import qdrant_edge
from vdr_db.connectors import QdrantStore
from vdr_db.connectors.qdrant import edge as qdrant_edge
from vdr_db.connectors.qdrant import edge_folder as collection_folder
from vdr_db.errors import StoreUnavailable
if os.getuid() == 0:
    # Root may write anywhere.
    os.setgid(65534)
    os.setuid(65534)
for use in (
    lambda: QdrantStore("documents", path=sys.argv[1]),
    lambda: QdrantStore("new", path=sys.argv[2]).create(40),
    lambda: QdrantStore("new", path=sys.argv[2] + "/inner").create(40),
):
    try:
        use()
    except StoreUnavailable as error:
        print("refused:", error)
"""


def test_a_read_only_folder(path):
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    try:
        shutil.copytree(path, place / "c")
        (place / "empty").mkdir()
        for folder in (place / "c", place / "empty"):
            folder.chmod(0o555)
        told = run_python(READ_ONLY, place / "c", place / "empty")
        assert told.stdout.count("refused: ") == 3, told.stderr + told.stdout
        assert "cannot be opened for writing" in told.stdout
        for folder in (place / "c", place / "empty"):
            folder.chmod(0o755)
        with opened(place / "c") as store:
            assert store.count() == 3
    finally:
        shutil.rmtree(place)


def test_a_temporary_collection_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with opened(":memory:") as store:
        store.create(WIDTH)
        store.upsert(rows(2), ["a", "b"])
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
    forgotten = opened(":memory:")
    forgotten.create(WIDTH)
    del forgotten
    gc.collect()
    assert list(tmp_path.iterdir()) == []


class Poison:
    """Rows as no `SparseRows` can be: one more index than values."""

    indptr = np.array([0, 2])
    indices = np.array([1, 2], np.int32)
    values = np.array([1.0], np.float32)


def test_a_panic_of_the_engine_is_a_store_error(path, capfd):
    store = opened(path)
    with pytest.raises(StoreError, match=r"\(1 points, 99 to 99\), the engine panicked"):
        store._engine.upsert(Batch([99], [99], Poison(), [{}], {}, 100))
    for use in (
        lambda: store.upsert(rows(1), ["x"]),
        lambda: store.search(row({1: 1.0})),
        lambda: store.count(),
    ):
        with pytest.raises(StoreError, match="Close it and open it again"):
            use()
    store.close()
    # The engine keeps the poison in its log; the message says where it came from.
    with pytest.raises(StoreError, match=r"1 points, 99 to 99.*Restore the folder from a backup"):
        opened(path)
    assert "PanicException" not in capfd.readouterr().out


def test_a_full_disk_is_noticed_before_the_engine_does(path, monkeypatch):
    with opened(path) as store:
        folder = store._engine._folder
        monkeypatch.setattr(folder, "free_bytes", lambda: 1 << 20)
        for use in (lambda: store.upsert(rows(1), ["x"]), lambda: store.delete(["a"])):
            with pytest.raises(StoreUnavailable, match="nearly full: 1 MiB are free"):
                use()
        with pytest.raises(StoreUnavailable, match="nearly full"):
            store.optimize()
        assert store.count() == 3
        assert store.search(rows(1))[0].id == "a"
    with opened(path) as store:
        assert store.count() == 3


FILL = """
import sys
import numpy as np
from vdr_db.connectors import QdrantStore
from vdr_db.errors import StoreUnavailable
from vdr_db.sparse import SparseRows
store = QdrantStore("documents", path=sys.argv[1])
store.create(30522)
random = np.random.default_rng(0)
done = 0
try:
    while done < 100_000:
        ids = np.sort(random.random((256, 30522), np.float32).argpartition(256)[:, :256])
        weights = np.ones(256 * 256, np.float32)
        rows = SparseRows(np.arange(257) * 256, ids.ravel(), weights, 30522)
        store.upsert(rows, range(done, done + 256), [{"text": "x" * 3000}] * 256)
        done += 256
except StoreUnavailable as error:
    print(done, error)
store.close()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a Linux tmpfs")
def test_a_really_full_disk_loses_nothing_acknowledged(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=90m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no `mount` command")
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        told = run_python(FILL, disk / "c")
        assert told.returncode == 0, told.stderr
        done, _, message = told.stdout.partition(" ")
        assert "is nearly full" in message
        assert int(done) > 0
        # What was acknowledged is there, and opening needs no more room.
        with opened(disk / "c") as store:
            assert store.count() == int(done)
            assert sorted(store.ids()) == list(range(int(done)))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_closing_after_a_bulk_load_optimises(path, monkeypatch):
    monkeypatch.setattr(edge_module, "_OPTIMIZE_AFTER_ROWS", 100)
    calls = []
    for count in (99, 100):
        store = opened(path)
        monkeypatch.setattr(store._engine, "optimize", lambda count=count: calls.append(count))
        store.upsert(rows(count), list(range(count)))
        store.close()
    assert calls == [100]


@pytest.mark.parametrize(("datatype", "rel"), [("float16", 1e-3), ("uint8", 0.02)])
def test_a_smaller_index_scores_nearly_the_same(datatype, rel):
    many = rows(300, nnz=8)
    with QdrantStore("c", path=":memory:", datatype=datatype) as store, MemoryStore() as oracle:
        for one in (store, oracle):
            one.create(WIDTH)
            one.upsert(many, list(range(300)))
        assert store.datatype == datatype
        assert store.get([7], with_rows=True)[0].row == many[7]
        for query in rows(20, nnz=8, seed=9):
            exact = {hit.id: hit.score for hit in oracle.search(query, 300)}
            found = store.search(query, 10)
            assert len(found) == 10
            for hit in found:
                assert hit.score == pytest.approx(exact[hit.id], rel=rel)


INDEXED = {"n": "float", "topic": "keyword", "ok": "bool", "when": "datetime", "owner": "tenant"}


@pytest.mark.parametrize("reopened", [False, True])
def test_payload_indexes_change_no_answer(tmp_path, reopened):
    documents = [
        {"n": i % 7, "topic": ["a", "b", "c"][i % 3], "ok": i % 2 == 0, "owner": f"o{i % 5}"}
        | {"when": f"2020-01-{i % 28 + 1:02}T00:00:00Z", "nested": {"n": i % 4}}
        for i in range(200)
    ]
    many = rows(200)
    indexes = {**INDEXED, "nested.n": "integer"}
    with QdrantStore("c", path=tmp_path / "c", payload_indexes=indexes) as store:
        store.create(WIDTH)
        store.upsert(many, list(range(200)), documents)
        info = store._engine._shard.info().payload_schema
        assert set(info) == set(indexes)
    store = QdrantStore("c", path=tmp_path / "c") if reopened else None
    if store is None:
        store = QdrantStore("c", path=":memory:", payload_indexes=indexes)
        store.create(WIDTH)
        store.upsert(many, list(range(200)), documents)
    oracle = MemoryStore()
    oracle.create(WIDTH)
    oracle.upsert(many, list(range(200)), documents)
    with store:
        for condition in (
            {"n": 3},
            {"n": [1, 2]},
            {"n": {"gte": 5}},
            {"topic": "a"},
            {"topic": ["a", "c"]},
            {"ok": True},
            {"ok": False, "topic": "b"},
            {"owner": "o3"},
            {"nested.n": 2},
            {"when": {"lt": "2020-01-10"}},
            {"not": {"topic": "a"}},
            {"topic": None},
            {"any": [{"n": 0}, {"ok": True}]},
        ):
            assert store.count(condition) == oracle.count(condition)
            for query in rows(3, seed=5):
                exact = oracle.search(query, 200, condition)
                assert_same_hits(store.search(query, 10, condition), exact, 10)


def test_filters_of_the_engine_and_of_ours(path):
    edge = pytest.importorskip("qdrant_edge")
    native = edge.Filter(must=[edge.FieldCondition("n", range=edge.RangeFloat(gte=1))])
    with opened(path) as store:
        assert store.count(native) == 2
        assert store.count(parse_filter({"n": {"gte": 1}})) == 2
        with pytest.raises(InputError, match="must be a dictionary"):
            store.search(rows(1), filter=filters)


def test_impossible_options(tmp_path):
    for options, told in (
        ({}, "exactly one of `path`"),
        ({"path": ":memory:", "url": "http://localhost"}, "exactly one of `path`"),
        ({"path": ":memory:", "datatype": "float8"}, "'float8'"),
        ({"path": ":memory:", "index_memory": "cold"}, "`index_memory` goes with `url` or"),
        ({"path": ":memory:", "api_key": "k"}, "`api_key` goes with `url`;"),
        ({"path": ":memory:", "full_scan_threshold": -1}, "full_scan_threshold"),
        ({"path": ":memory:", "payload_indexes": {"a": "text"}}, "got 'text' for 'a'"),
    ):
        with pytest.raises(ConfigError, match=told):
            opened(options.pop("path", None), **options)
    with pytest.raises(TypeError, match="persist"):
        opened(":memory:", persist=True)
    with pytest.raises(ConfigError, match="must be a name"):
        QdrantStore("", path=tmp_path)
    with pytest.raises(InputError, match="not a payload key"):
        opened(":memory:", payload_indexes={"a..b": "keyword"})


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "qdrant_edge", None)
    with pytest.raises(MissingExtraError, match=r"vdr-db\[qdrant\]"):
        opened(":memory:")


def test_the_representation_tells_place_and_state(path):
    store = opened(path)
    assert repr(store) == f"QdrantStore(collection 'documents' in {path})"
    store.close()
    assert repr(store).endswith(", closed)")


def test_a_folder_that_vanished_is_an_error(path):
    store = opened(path)
    store.close()
    for file in sorted((path / "shard" / "segments").rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    try:
        again = opened(path)
    except StoreError:
        return
    with again:
        assert isinstance(again.count(), int)


def test_importing_the_stores_imports_no_client():
    told = run_python(
        """
        import sys
        import vdr_db.connectors as connectors
        connectors.VDRQdrant, connectors.MemoryStore, connectors.Collection
        heavy = {"torch", "qdrant_edge", "qdrant_client", "grpc", "elasticsearch"}
        print(sorted(heavy & set(sys.modules)))
        """
    )
    assert told.stdout.strip() == "[]", told.stderr


def test_large_numbers_of_hits(path):
    with opened(path) as store:
        everything = SparseRows.from_dicts([dict.fromkeys(range(WIDTH), 1.0)], WIDTH)
        assert len(store.search(everything, 10**12)) == 3
        assert store.search(everything, 10**12, offset=10**12) == []
