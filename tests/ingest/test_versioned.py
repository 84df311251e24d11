"""A new version beside the old one: searched when it is whole, gone when it is not."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import services
from search_servers import note_real_server, remove_indices
from store_samples import WordEncoder

from vdr_db.connectors import VDRElasticsearch, VDRQdrant
from vdr_db.connectors.memory import MemoryStore
from vdr_db.connectors.retry import RetryPolicy
from vdr_db.errors import ConfigError, StoreError
from vdr_db.ingest import IngestOptions, RecordSource, Stop, ingest_versioned
from vdr_db.readers import Record

WORDS = ["theory", "chess", "kings", "capital", "game"]


def source(count, first=0):
    records = [Record(f"d{i}", f"{WORDS[i % 5]} {WORDS[i // 5 % 5]}") for i in range(count)]
    return RecordSource(lambda: records[first:], identity=f"{first} to {count}")


@pytest.fixture
def server(tmp_path):
    from qdrant_contract_server import QdrantContractServer

    with QdrantContractServer(tmp_path / "server") as server:
        yield server


@pytest.fixture(params=["rest", "grpc"])
def on_qdrant(request, server):
    pytest.importorskip("qdrant_client")
    options = {
        "url": server.url,
        "prefer_grpc": request.param == "grpc",
        "client_options": {"grpc_port": server.grpc_port},
    }
    with VDRQdrant("articles", WordEncoder(), versioned=True, **options) as collection:
        yield collection


@pytest.fixture
def on_elasticsearch(any_server, request):
    if any_server.is_real:
        note_real_server(request, any_server.name)
    retry = RetryPolicy(base_s=0.001)
    name = services.unique_name()
    with VDRElasticsearch(
        name, WordEncoder(), replicas=0, retry=retry, **any_server.options()
    ) as articles:
        yield articles
        remove_indices(articles.store)


def names_on_qdrant(collection):
    client = collection.store._engine._client
    return sorted(one.name for one in client.get_collections().collections)


def names_on_elasticsearch(collection):
    return sorted(collection.store.transport.call("GET", f"/{collection.store.name}-*/_alias").body)


def check_versions(collection, names):
    """The life of a collection of several versions; `names()` tells what there is."""
    report = ingest_versioned(source(20), collection)
    assert report.is_complete
    assert collection.count() == 20
    (first,) = names()
    assert first.endswith("-000001")

    seen = []

    class Watch:
        def update(self, totals, *, is_last=False):
            seen.append(collection.count())

    report = ingest_versioned(source(30, first=10), collection, progress=Watch())
    assert report.verification.is_passed
    assert report.verification.count == 20
    assert set(seen) == {20}, "the old one is searched meanwhile"
    assert sorted(collection.store.ids()) == sorted(f"d{i}" for i in range(10, 30))
    assert [name[-6:] for name in names()] == ["000002"]
    assert len(collection.search("theory", 30)) > 0

    # Whatever goes wrong, the old one stays and nothing else does.
    stop = Stop()
    stop.request()
    report = ingest_versioned(source(5), collection, stop=stop)
    assert report.is_interrupted

    class Lost(WordEncoder):
        def encode_documents(self, texts):
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        ingest_versioned(source(5), collection, encoder=Lost())
    with pytest.raises(ConfigError, match="only checked"):
        ingest_versioned(source(5), collection, options=IngestOptions(is_verified=False))
    assert collection.count() == 20
    assert [name[-6:] for name in names()] == ["000002"]

    ingest_versioned(source(3), collection, keep_old=True)
    assert collection.count() == 3
    assert [name[-6:] for name in names()] == ["000002", "000003"]


class StopAfter:
    """Ends a run in order, or as a kill does, once so many documents are acknowledged."""

    def __init__(self, documents, *, kills=False):
        self.documents, self.kills, self.stop = documents, kills, Stop()

    def update(self, totals, *, is_last=False):
        if totals.acknowledged >= self.documents and not self.stop.is_requested:
            self.stop.request()
            if self.kills:
                raise Killed


class Killed(BaseException):
    """Nothing after it runs that a process would not have done before kill -9."""


def check_resuming(collection, names, folder, monkeypatch):
    """A version that was cut short is taken up where it was."""
    ledger = folder / "run.ledger"
    small = IngestOptions(batch_documents=16, checkpoint_documents=16, queue_bytes=4000)

    def run(count, first=0, watch=None, options=small):
        watch = watch or StopAfter(10**9)
        more = {"progress": watch, "stop": watch.stop, "options": options}
        return ingest_versioned(source(count, first), collection, ledger=ledger, **more)

    assert run(20).is_complete
    for cut in (StopAfter(4), StopAfter(8)):
        report = run(300, 10, cut)
        assert report.is_interrupted
        assert [name[-6:] for name in names()] == ["000001", "000002"]
        assert collection.count() == 20, "the old one is searched meanwhile"
    report = run(300, 10)
    assert report.is_complete
    assert report.totals.resumed > 0
    assert report.totals.resumed + report.totals.acknowledged == 290
    assert (collection.count(), [name[-6:] for name in names()]) == (290, ["000002"])
    # The next one begins anew, and what was begun of another input does not stay.
    assert run(300, 10).totals.resumed == 0
    assert [name[-6:] for name in names()] == ["000003"]
    run(301, 10, StopAfter(4))
    restart = replace(small, restart=True)
    report = run(301, 10, options=restart)
    assert (report.totals.resumed, collection.count()) == (0, 291)
    assert len(names()) == 1

    # After a kill nothing tidies up: not the rebuild, not the last checkpoint.
    monkeypatch.setattr("vdr_db.ingest.pipeline._Run._keep_what_is_acknowledged", lambda *_: None)
    with pytest.raises(Killed):
        run(302, 10, StopAfter(40, kills=True))
    monkeypatch.undo()
    assert collection.count() == 291
    report = run(302, 10)
    assert report.totals.resumed > 0
    assert (collection.count(), len(names())) == (292, 1)


def test_resuming_on_qdrant(on_qdrant, tmp_path, monkeypatch):
    check_resuming(on_qdrant, lambda: names_on_qdrant(on_qdrant), tmp_path, monkeypatch)


def test_resuming_on_elasticsearch(on_elasticsearch, tmp_path, monkeypatch):
    def names():
        return names_on_elasticsearch(on_elasticsearch)

    check_resuming(on_elasticsearch, names, tmp_path, monkeypatch)


def test_versions_on_qdrant(on_qdrant):
    check_versions(on_qdrant, lambda: names_on_qdrant(on_qdrant))


def test_versions_on_elasticsearch(on_elasticsearch):
    check_versions(on_elasticsearch, lambda: names_on_elasticsearch(on_elasticsearch))


def test_a_version_that_does_not_pass_its_checks_is_not_used(on_qdrant, server):
    ingest_versioned(source(20), on_qdrant)
    upsert = server.engine.upsert
    # A server that confirms and forgets.
    server.engine.upsert = lambda name, points: upsert(name, points[:-4])
    with pytest.raises(StoreError, match="did not pass its checks, so nothing is changed: 4 ids"):
        ingest_versioned(source(10), on_qdrant)
    assert on_qdrant.count() == 20
    assert names_on_qdrant(on_qdrant) == ["articles-000001"]


def test_what_has_no_versions(tmp_path, server):
    with pytest.raises(ConfigError, match="got MemoryStore; other stores have no versions"):
        ingest_versioned(source(3), MemoryStore())
    with VDRQdrant("c", WordEncoder(), path=tmp_path / "c") as embedded:
        embedded.add_texts(["theory"])
        with pytest.raises(ConfigError, match="is embedded and has no aliases"):
            ingest_versioned(source(3), embedded)
    with VDRQdrant("plain", WordEncoder(), url=server.url, prefer_grpc=False) as plain:
        plain.add_texts(["theory"])
        with pytest.raises(StoreError, match="is no alias"):
            ingest_versioned(source(3), plain)
        assert plain.count() == 1


def test_the_command(tmp_path, server, capsys, monkeypatch, tiny_splade):
    from vdr_db.cli.main import main

    def run(*words):
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    corpus = tmp_path / "corpus.jsonl"
    command = ("ingest", corpus, "--store", server.url, "--collection", "notes", "--versioned")
    command = (*command, "--model", "tiny-splade", "--json")
    monkeypatch.chdir(tmp_path)
    for count in (4, 3):
        lines = (json.dumps({"id": i, "text": f"note {i}"}) for i in range(count))
        corpus.write_text("\n".join(lines))
        code, out, err = run(*command)
        assert code == 0, err
        assert json.loads(out)["verification"]["count"] == count
    with VDRQdrant("notes", url=server.url) as notes:
        assert notes.count() == 3
        assert names_on_qdrant(notes) == ["notes-000002"]
    code, _, err = run(*command, "--no-verify")
    assert code == 2
    assert "is checked before it is used" in err
    code, _, err = run("ingest", corpus, "--store", tmp_path / "s", "--versioned", *command[-3:])
    assert code == 2
    assert "--versioned needs a server" in err
