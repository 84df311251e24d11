"""`vdr-db check`: flipped bits, lost ends of logs and leftovers are told, and nothing else is."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import textwrap

import numpy as np
import pytest
import services
from search_servers import note_real_server, remove_indices

from vdr_db.cli.main import main
from vdr_db.connectors import QdrantStore, work
from vdr_db.connectors.elasticsearch.store import ElasticsearchStore
from vdr_db.errors import StoreError
from vdr_db.ingest.checking import CheckReport, check_files
from vdr_db.sparse import SparseRows

WIDTH, FLIPS, SEED = 400, 200, 20


def rows_of(count, first=0):
    return SparseRows.from_dicts(
        [{(7 * (first + i) + j) % WIDTH: 1.0 + j for j in range(12)} for i in range(count)], WIDTH
    )


def payloads_of(count):
    kinds = [1, -2, 0.5, 1.0, True, None, "é\u2028😀", [1, {"a": [0.1]}], 2**62, 1e300, -0.0]
    return [{"text": f"text {i}", "odd": kinds[i % len(kinds)]} for i in range(count)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("check") / "c"
    with QdrantStore("documents", path=path) as store:
        store.create(WIDTH)
        store.upsert(rows_of(60), [*range(30), *map(str, range(30))], payloads_of(60))
        store.delete([3, "7"])
    return path


def check(path, capsys):
    code = main(["check", str(path), "--json"])
    return code, json.loads(capsys.readouterr().out)


def bytes_of(path):
    """Places of bytes that hold something, of every file of the engine."""
    found = []
    for top, _, names in os.walk(path / "shard"):
        for name in names:
            if not name.startswith("vdr_"):
                file = os.path.join(top, name)
                with open(file, "rb") as stream:
                    used = [i for i, byte in enumerate(stream.read()) if byte]
                found += [(file, i) for i in used]
    return found


def flip(file, place, bit):
    with open(file, "r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ (1 << bit)]))


def test_a_whole_collection_is_whole(made, tmp_path, capsys):
    path = tmp_path / "c"
    shutil.copytree(made, path)
    for _ in range(2):  # the check leaves it as it was
        code, told = check(path, capsys)
        assert (code, told["problems"], told["remarks"]) == (0, [], [])
        assert (told["rows"], told["checked"]) == (58, 58)
    with QdrantStore("documents", path=path) as store:
        assert store.search(rows_of(1))[0].id == 0
        store.upsert(rows_of(1, 60), ["new"])
    assert check(path, capsys)[0] == 0
    with QdrantStore("documents", path=path) as store:
        assert "_vdr_sum" not in json.dumps(store.get(["new"])[0].payload)


def test_every_flipped_bit_of_a_data_file_is_reported(made, tmp_path):
    path = tmp_path / "c"
    shutil.copytree(made, path)
    choice, places, reported = random.Random(SEED), bytes_of(path), 0
    for _ in range(FLIPS):
        file, place = choice.choice(places)
        bit = choice.randrange(8)
        flip(file, place, bit)
        report = CheckReport()
        check_files(path, report)
        reported += len(report.problems) == 1
        flip(file, place, bit)
    print(f"{reported} of {FLIPS} flips reported")  # noqa: T201, counts for the log of CI
    assert reported == FLIPS
    report = CheckReport()
    assert (check_files(path, report), report.problems) == (58, [])


def test_damage_stays_to_be_seen_after_another_use(made, tmp_path, capsys):
    path = tmp_path / "c"
    shutil.copytree(made, path)
    # a weight no other row has: the engine's order of rows is its own, and the first
    # found of a common weight may be a deleted row's, which nobody reads
    with QdrantStore("documents", path=path) as store:
        store.upsert(SparseRows.from_dicts([{1: 77.0, 5: 2.0}], WIDTH), ["damaged"])
    pages = path.glob("shard/segments/*/vector_storage-vdr/store/page_0.dat")
    weight = np.float32(77.0).tobytes()
    ((page, place),) = [(p, p.read_bytes().find(weight)) for p in pages if weight in p.read_bytes()]
    flip(page, place + 2, 0)
    with QdrantStore("documents", path=path) as store:
        store.search(rows_of(1))
    code, told = check(path, capsys)
    assert (code, len(told["problems"])) == (3, 1)
    assert "store/page_0.dat is not what it was" in told["problems"][0]
    # rows tell it on their own, where files cannot be compared
    (path / "shard/vdr_sums.json").unlink()
    code, told = check(path, capsys)
    assert code == 3
    assert told["problems"][0].startswith("1 rows are not what was written (points ")
    assert "was not closed" in told["remarks"][0]


def test_a_file_that_is_gone_and_one_that_is_cut(made, tmp_path, capsys):
    for damage, told in (
        (lambda file: file.unlink(), "is gone"),
        (lambda file: os.truncate(file, 100), "is not what it was"),
    ):
        path = tmp_path / told.split()[-1]
        shutil.copytree(made, path)
        (page,) = path.glob("shard/segments/*/payload_storage/page_0.dat")
        damage(page)
        assert main(["check", str(path)]) == 3
        out = capsys.readouterr().out
        assert f"page_0.dat {told}" in out
        assert "restore it from a backup" in out


KILLED = """
import os, sys
from vdr_db.connectors import QdrantStore
from vdr_db.sparse import SparseRows
store = QdrantStore("documents", path=sys.argv[1])
store.create(400)
for batch in range(20):
    rows = [{(batch * 7 + j) % 400: 1.0 + j for j in range(10)} for _ in range(5)]
    ids = [f"{batch}-{i}" for i in range(5)]
    store.upsert(SparseRows.from_dicts(rows, 400), ids, [{"n": batch}] * 5)
if "delete" in sys.argv:
    store.delete(["19-4"])
os._exit(9)
"""


@pytest.fixture(scope="module", params=["write", "delete"])
def killed(request, tmp_path_factory):
    """A collection whose process died, so that everything is in the log."""
    path = tmp_path_factory.mktemp("killed") / "c"
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(path), request.param]
    elsewhere = tempfile.gettempdir()  # the current folder would be searched for modules first
    assert subprocess.run(command, check=False, cwd=elsewhere).returncode == 9
    return path, 100 - (request.param == "delete")


def test_a_log_that_ended_early_is_said_until_someone_mends_it(killed, tmp_path, capsys):
    source, count = killed
    whole = tmp_path / "whole"
    shutil.copytree(source, whole)
    code, told = check(whole, capsys)
    assert (code, told["problems"], told["rows"]) == (0, [], count)
    assert "was not closed" in told["remarks"][0]
    choice = random.Random(SEED)
    log = next(source.glob("shard/wal/open-*1"))
    used = len(log.read_bytes().rstrip(b"\0"))
    said = 0
    for number in range(6):
        path = tmp_path / f"c{number}"
        shutil.copytree(source, path)
        flip(path / "shard/wal" / log.name, choice.randrange(64, used), choice.randrange(8))
        try:
            with pytest.warns(UserWarning, match="ended early when it was replayed"):
                store = QdrantStore("documents", path=path)
        except StoreError:
            said += 1
            continue
        assert store.count() < count
        store.close()
        for _ in range(2):
            code, told = check(path, capsys)
            assert code == 3
            assert any("ended early" in problem for problem in told["problems"])
        (path / "shard/vdr_lost.txt").unlink()
        assert check(path, capsys)[0] == 0
        said += 1
    assert said == 6


def test_an_open_collection_and_nothing_at_all(made, tmp_path, capsys):
    path = tmp_path / "c"
    shutil.copytree(made, path)
    with QdrantStore("documents", path=path):
        assert main(["check", str(path)]) == 3
        assert "already open in process" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "nowhere")]) == 3
    assert "There is no store at" in capsys.readouterr().err


def test_a_spool_is_checked_part_by_part(tmp_path, capsys):
    pytest.importorskip("pyarrow")
    from hashing_encoder import HashingEncoder

    from vdr_db.ingest import encode_to_spool

    source = tmp_path / "texts.txt"
    source.write_text("".join(f"text {i}\n" for i in range(40)))
    spool = tmp_path / "spool"
    encode_to_spool([str(source)], spool, encoder=HashingEncoder())
    code, told = check(spool, capsys)
    assert (code, told["rows"], told["checked"]) == (0, 40, 40)
    (part,) = spool.glob("part-*.parquet")
    flip(part, part.stat().st_size // 2, 3)
    code, told = check(spool, capsys)
    assert code == 3
    assert part.name in told["problems"][0]


@pytest.mark.parametrize("kind", ["Qdrant", "OpenSearch"])
def test_leftovers_of_killed_rebuilds_are_told_and_removed(
    kind, request, tmp_path, monkeypatch, capsys
):
    name = services.unique_name()
    with contextlib.ExitStack() as kept:
        if kind == "OpenSearch":
            pytest.importorskip("opensearchpy")
            server = request.getfixturevalue("opensearch_server")
            note_real_server(request, server.name)
            address = f"opensearch+http://127.0.0.1:{server.proxy.port}"
            store = kept.enter_context(ElasticsearchStore(name, replicas=0, **server.options()))
            kept.callback(remove_indices, store)
        else:
            pytest.importorskip("qdrant_client")
            from qdrant_contract_server import QdrantContractServer

            server = kept.enter_context(QdrantContractServer(tmp_path / "server"))
            address = server.url
            place = {"url": address, "prefer_grpc": False, "versioned": True}
            store = kept.enter_context(QdrantStore(name, **place))
        store.create(WIDTH)
        store.upsert(rows_of(20), list(range(20)))
        killed = store.rebuild()
        killed.__enter__()
        arguments = ["check", address, "--collection", name]
        assert main([*arguments, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["rows"], told["checked"], told["leftovers"]) == (20, 20, {})
        monkeypatch.setattr(work.os, "kill", no_process)
        assert main(arguments) == 0
        told = capsys.readouterr().out
        assert f"left over: {name}-000002, the rebuild that made" in told
        assert "--remove-leftovers deletes" in told
        assert main([*arguments, "--remove-leftovers"]) == 0
        assert f"removed: {name}-000002" in capsys.readouterr().out
        assert main([*arguments, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["leftovers"] == {}
        assert store.count() == 20
        killed.gen.close()


@pytest.mark.parametrize("kind", ["Qdrant", "OpenSearch"])
def test_a_row_changed_behind_our_back_is_told_by_the_ledger(kind, request, tmp_path, capsys):
    from hashing_encoder import HashingEncoder

    from vdr_db.connectors import VDRElasticsearch, VDRQdrant
    from vdr_db.ingest import ingest

    texts, ledger = tmp_path / "texts.jsonl", tmp_path / "texts.ledger"
    lines = [{"_id": f"d{i}", "text": f"tea leaves number {i}"} for i in range(20)]
    texts.write_text("\n".join(map(json.dumps, lines)))
    name = services.unique_name()
    with contextlib.ExitStack() as kept:
        if kind == "OpenSearch":
            pytest.importorskip("opensearchpy")
            server = request.getfixturevalue("opensearch_server")
            note_real_server(request, server.name)
            address = f"opensearch+http://127.0.0.1:{server.proxy.port}"
            options = {"replicas": 0, **server.options()}
            opened = VDRElasticsearch(name, HashingEncoder(), **options)
            collection = kept.enter_context(opened)
            kept.callback(remove_indices, collection.store)
        else:
            client = pytest.importorskip("qdrant_client")
            from qdrant_contract_server import QdrantContractServer

            address = kept.enter_context(QdrantContractServer(tmp_path / "server")).url
            options = {"url": address, "prefer_grpc": False}
            collection = kept.enter_context(VDRQdrant(name, HashingEncoder(), **options))
        assert ingest([str(texts)], collection, ledger=ledger).is_complete
        arguments = ["check", address, "--collection", name, "--ledger", str(ledger), "--json"]

        def checked():
            code = main(arguments)
            return code, json.loads(capsys.readouterr().out)

        code, told = checked()
        assert (code, told["problems"], told["rows"], told["checked"]) == (0, [], 20, 20)
        if kind == "OpenSearch":
            call = collection.store.transport.call
            (hit,) = call("GET", f"/{name}/_search", {"size": 1}).body["hits"]["hits"]
            vector = {token: 1.01 * weight for token, weight in hit["_source"]["vdr"].items()}
            changed = {**hit["_source"], "vdr": vector}
            call("PUT", f"/{name}/_doc/{hit['_id']}", changed, params={"refresh": "true"})
        else:
            direct = kept.enter_context(contextlib.closing(client.QdrantClient(url=address)))
            (point,), _ = direct.scroll(name, limit=1, with_vectors=True)
            row = point.vector["vdr"]
            heavier = client.models.SparseVector(
                indices=row.indices, values=[1.01 * weight for weight in row.values]
            )
            moved = client.models.PointStruct(
                id=point.id, vector={"vdr": heavier}, payload=point.payload
            )
            direct.upsert(name, [moved], wait=True)
        code, told = checked()
        assert code == 3
        assert told["problems"][0].endswith("came back with another vector than was written")
        gone = told["problems"][0].split("'")[1]
        assert collection.delete([gone]) == 1
        code, told = checked()
        assert code == 3
        assert "19 documents, 20 were acknowledged" in told["problems"][0]
        assert told["problems"][1] == f"document {gone!r} was acknowledged but is not in the store"
        assert main([*arguments[:-3], "--ledger", str(tmp_path / "none")]) == 2
        assert "there is no ledger" in capsys.readouterr().err


def no_process(*_):
    raise ProcessLookupError
