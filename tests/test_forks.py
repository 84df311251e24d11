"""A forked child: what its parent opened or computed with works there, or raises at once."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

START = """
import asyncio, multiprocessing, os, sys, warnings
warnings.simplefilter("ignore")  # Python 3.12 warns of every fork with threads
from vdr_db.connectors import AsyncCollection, QdrantStore, VDRQdrant
from vdr_db.errors import StoreError, VdrError
from vdr_db.sparse import SparseRows

place = sys.argv[-1]
fork = multiprocessing.get_context("fork")
one = SparseRows.from_dicts([{1: 1.0}], 40)


def in_child(work, *, ends="sys.exit"):
    child = os.fork()
    if child == 0:
        work()
        sys.stdout.flush()
        os._exit(0) if ends == "os._exit" else sys.exit(0)
    return os.waitpid(child, 0)[1]
"""


def run(script, *arguments, threads=2):
    """A script in a process of its own; one that hangs fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(START) + textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        cwd=tempfile.gettempdir(),  # the current folder would be searched for modules first
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_method_of_an_embedded_store_knows_its_process(tmp_path):
    told = run(
        """
        for path in (place, ":memory:"):
            store = QdrantStore("documents", path=path)
            store.create(40)
            store.upsert(one, ["a"])
            calls = {
                "upsert": lambda: store.upsert(one, ["b"]),
                "delete": lambda: store.delete(["a"]),
                "search": lambda: store.search(one),
                "search_batch": lambda: store.search_batch(one),
                "get": lambda: store.get(["a"]),
                "ids": lambda: list(store.ids()),
                "count": store.count,
                "flush": store.flush,
                "optimize": store.optimize,
                "index_payloads": lambda: store.index_payloads({"n": "integer"}),
                "open": store._engine.open,
                "create": lambda: store._engine.create(store._manifest),
            }

            def work():
                for name, call in calls.items():
                    try:
                        call()
                        print(name, "worked in a child")
                    except StoreError as error:
                        if "open it again in this process, or use a server" not in str(error):
                            print(name, error)
                store.close()

            print(in_child(work), in_child(lambda: None), in_child(lambda: None, ends="os._exit"))
            store.upsert(one, ["c"])
            print(sorted(store.ids()))
            store.close()
        """,
        str(tmp_path / "c"),
    )
    assert told == ["0 0 0", "['a', 'c']"] * 2


def test_rows_of_a_parent_outlive_children_that_write(tmp_path):
    told = run(
        """
        store = QdrantStore("documents", path=place)
        store.create(40)
        store.upsert(one, ["a"])

        def write(number):
            try:
                store.upsert(one, [f"child {number}"])
            except StoreError:
                return "refused"

        children = [fork.Process(target=write, args=(i,)) for i in range(2)]
        for child in children:
            child.start()
        for number in range(50):
            store.upsert(one, [number])
        for child in children:
            child.join()
        with fork.Pool(1) as pool:
            print(pool.map(write, [7]), [child.exitcode for child in children])
            # a child that still runs holds none of the parent's locks
            store.close()
            store = QdrantStore("documents", path=place)
            print(store.count())
        store.close()

        def own():
            with QdrantStore("documents", path=place) as mine:
                mine.upsert(one, ["mine"])

        print(in_child(own), QdrantStore("documents", path=place).count())
        """,
        str(tmp_path / "c"),
    )
    assert told == ["['refused'] [0, 0]", "51", "0 52"]


def test_an_application_made_before_its_workers_fork(tmp_path):
    """As gunicorn's `--preload` does it: made once, then forked, each worker ends by `sys.exit`."""
    pytest.importorskip("fastapi")
    pytest.importorskip("httpx")
    pytest.importorskip("prometheus_client")
    pytest.importorskip("orjson")
    pytest.importorskip("onnxruntime")
    told = run(
        """
        import httpx
        from vdr_db import SparseEncoder
        from vdr_db.connectors import Collection, MemoryStore
        from vdr_db.serve import SearchService, make_app

        encoder = SparseEncoder.from_pretrained("vdr-mini", runtime="onnx")
        kept = VDRQdrant("texts", encoder, path=place)
        memory = Collection(MemoryStore(), encoder)
        apps = []
        for collection in (kept, memory):
            collection.add_texts(["tea leaves", "a giraffe"], ids=["tea", "giraffe"])
            apps.append(make_app(SearchService(collection, encoder)))

        async def ask(app):
            made = {"transport": httpx.ASGITransport(app), "base_url": "http://localhost"}
            async with httpx.AsyncClient(**made) as client:
                return await client.get("/api/search", params={"q": "tea"})

        def answers():
            for app in apps:
                answer = asyncio.run(ask(app))
                print(answer.status_code, "tea leaves" in answer.text)

        answers()
        print(in_child(answers), in_child(answers))

        awaited = AsyncCollection(memory)
        print(len(asyncio.run(awaited.search("tea"))))
        print(in_child(lambda: print(len(asyncio.run(awaited.search("tea"))))))
        """,
        str(tmp_path / "c"),
    )
    parent, child = ["200 True", "200 True"], ["503 False", "200 True"]
    assert told == [*parent, *child, *child, "0 0", "2", "2", "0"]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("runtime", "backend"), [("onnx", "cpu"), ("onnx", "cpu-int8"), ("openvino", "cpu")]
)
def test_a_child_encodes_by_graphs(threads, runtime, backend):
    pytest.importorskip("onnxruntime" if runtime == "onnx" else runtime)
    told = run(
        """
        from vdr_db import SparseEncoder
        runtime, place = sys.argv[1:]
        texts = ["hot water on green leaves", "a giraffe"] * 20
        encoder = SparseEncoder.from_pretrained("vdr-mini", runtime=runtime, backend=place)
        expected = encoder.encode_documents(texts)

        def again():
            assert encoder.encode_documents(texts).values.tobytes() == expected.values.tobytes()
            other = SparseEncoder.from_pretrained("vdr-mini", runtime=runtime)
            print(other.encode_queries(texts).nnz > 0)

        print(in_child(again), in_child(lambda: None), in_child(again, ends="os._exit"))
        with fork.Pool(1) as pool:
            print(pool.apply(encoder.encode_documents, (texts,)).nnz == expected.nnz)
        """,
        runtime,
        backend,
        threads=threads,
    )
    assert told == ["True", "True", "0 0 0", "True"]


def test_a_child_of_a_process_where_torch_computed():
    pytest.importorskip("torch")
    told = run(
        """
        import torch
        from vdr_db import SparseEncoder
        texts = ["hot water on green leaves " * 20, "a giraffe"] * 8

        def load():
            return SparseEncoder.from_pretrained("vdr-mini", runtime="torch", device="cpu")

        def load_there():
            print(load().encode_documents(texts).nnz > 0)

        print(in_child(load_there))
        encoder = load()

        def again():
            for call in (lambda: encoder.encode_documents(texts), load):
                try:
                    call()
                    print("no error")
                except VdrError as error:
                    print("torch has computed in process" in str(error))

        print(in_child(again))
        encoder.encode_documents(texts)
        print(in_child(again))

        def alone():
            torch.set_num_threads(1)
            print(encoder.encode_documents(texts).nnz > 0, load() is not None)

        print(in_child(alone))
        """
    )
    assert told == ["True", "0", *["True"] * 2, "0", *["True"] * 2, "0", "True True", "0"]
