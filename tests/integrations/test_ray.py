"""Ray Data on a real local Ray: encode on actors, write from tasks into real stores.

The embedded store is the real engine. The Qdrant server is the contract server of `tests/support`
behind the official client, Elasticsearch a protocol server; their docstrings say what that proves.
One machine is one node: that tasks on other nodes reach the actor is Ray's promise, not shown here.
"""

from __future__ import annotations

import functools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from faults import FaultPlan
from hashing_encoder import HashingEncoder

from vdr_db.errors import ConfigError, RejectedRows, StoreError, StoreMismatch, StoreUnavailable

pa = pytest.importorskip("pyarrow")
ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
pytest.importorskip("ray.data", reason="the extra `ray` is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # those of Ray itself

from vdr_db.connectors.elasticsearch.store import ElasticsearchStore  # noqa: E402
from vdr_db.connectors.qdrant.store import QdrantStore  # noqa: E402
from vdr_db.ingest import IngestOptions, RetryPolicy, ingest  # noqa: E402
from vdr_db.integrations.ray import (  # noqa: E402
    Columns,
    EncodeTexts,
    SparseDatasink,
    UnwrittenRows,
)
from vdr_db.readers import Record  # noqa: E402

SECRET = "s3cr3t-value-42"
QUICK = RetryPolicy(base_s=0.01, cap_s=0.2, deadline_s=30)
ENCODER = HashingEncoder(8)
TEXTS = [
    "Giraffes are the tallest animals on land.",
    "Green tea is brewed from leaves that are not fermented.",
    "The theory of relativity was published by Einstein.",
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Ray with two CPUs, in processes of its own."""
    with pytest.MonkeyPatch.context() as patch:
        # Workers import from the working directory first, and in the root of the repository the
        # library's folder would be taken for the package.
        patch.chdir(tmp_path_factory.mktemp("ray"))
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "support"), os.pathsep)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100 << 20,
            log_to_driver=False,
            logging_level="error",
        )
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield
        ray.shutdown()


def items(count):
    return [
        {"id": f"d{i}", "text": f"text {i}", "n": i, "tag": None if i % 2 else "even"}
        for i in range(count)
    ]


def dataset(rows, blocks=1):
    return ray.data.from_arrow(pa.Table.from_pylist(rows)).repartition(blocks)


def encoded(rows, blocks=1):
    """The same by an encoder that hashes."""
    return dataset(rows, blocks).map_batches(
        EncodeTexts,
        fn_constructor_args=[functools.partial(HashingEncoder, 8)],
        batch_format="pyarrow",
        batch_size=64,
        concurrency=1,
        num_cpus=0.5,
    )


def table_of(rows):
    """Encoded here, without Ray."""
    return EncodeTexts(lambda: ENCODER)(pa.Table.from_pylist(rows))


def assert_holds(store, rows):
    assert store.count() == len(rows)
    found = store.get([row["id"] for row in rows], with_rows=True)
    expected = ENCODER.encode_documents([row["text"] for row in rows])
    for i, (one, row) in enumerate(zip(found, rows, strict=True)):
        payload = {name: row[name] for name in ("text", "n", "tag") if row[name] is not None}
        assert one.id == row["id"]
        assert {name: one.payload[name] for name in one.payload if name[0] != "_"} == payload
        assert one.row == expected[i]


# Encoding


def test_encoding_adds_typed_columns_and_loads_the_encoder_once():
    made = []

    def make():
        made.append(HashingEncoder(8))
        return made[-1]

    encode = EncodeTexts(make)
    rows = [{"id": i, "text": text} for i, text in enumerate(["one", "", "three"])]
    for _ in range(2):
        table = encode(pa.Table.from_pylist(rows))
    assert len(made) == 1
    assert made[0].calls == 2
    assert table.schema.field("indices").type == pa.list_(pa.int32())
    assert table.schema.field("values").type == pa.list_(pa.float32())
    assert table.column("encode_error").to_pylist() == [None] * 3
    expected = ENCODER.encode_documents(["one", "", "three"])
    for i in range(3):
        indices, values = expected.row(i)
        assert table.column("indices")[i].as_py() == indices.tolist()
        assert table.column("values")[i].as_py() == values.tolist()


def test_every_batch_format_gives_the_same():
    rows = [{"id": i, "text": f"text {i}"} for i in range(5)]
    expected = table_of(rows)
    encode = EncodeTexts(lambda: ENCODER)
    import numpy as np
    import pandas as pd

    frame = pd.DataFrame(rows)
    columns = {"id": np.arange(5), "text": np.array([row["text"] for row in rows], object)}
    for batch in (frame, columns):
        assert encode(batch).to_pylist() == expected.to_pylist()


def test_bad_texts_keep_their_rows_and_say_why(tiny_splade):
    texts = ["good", None, "half \ud800 a character", "also good"]
    encode = EncodeTexts(lambda: tiny_splade)
    rows, errors = encode._rows([*texts, 7])
    assert [error is None for error in errors] == [True, False, False, True, False]
    assert rows == tiny_splade.encode_documents(["good", "also good"])
    assert "lone surrogate" in errors[2]
    table = encode(pa.table({"id": [1, 2], "text": [None, "good"]}))
    assert table.column("indices")[0].as_py() is None
    assert table.column("encode_error").to_pylist() == [
        "the text must be a str, got NoneType",
        None,
    ]


def test_kinds_and_names():
    encode = EncodeTexts(lambda: ENCODER, kind="query", columns=Columns(text="q", values="w"))
    table = encode(pa.table({"q": ["a"]}))
    assert table.column_names == ["q", "indices", "w", "encode_error"]
    with pytest.raises(ConfigError, match="'text' and room"):
        EncodeTexts(lambda: ENCODER)(pa.table({"q": ["a"]}))
    with pytest.raises(ConfigError, match="`kind` must be"):
        EncodeTexts(lambda: ENCODER, kind="passage")


# The embedded store


def test_blocks_of_many_tasks_reach_one_folder(cluster, tmp_path):
    """An actor encodes, eight blocks are written by one; again, and nothing changes."""
    rows = items(500)
    made = encoded(rows, blocks=8).materialize()
    for _ in range(2):
        sink = SparseDatasink.qdrant("articles", ENCODER, path=tmp_path / "articles")
        made.write_datasink(sink)
        assert sink.written == len(rows)
        with QdrantStore("articles", path=tmp_path / "articles") as store:
            assert store.stamp == ENCODER.stamp()
            assert_holds(store, rows)
    # An ingest of the same records finds them all unchanged: ids, payloads and fingerprints agree.
    records = [
        Record(row["id"], row["text"], {k: row[k] for k in ("n", "tag") if row[k] is not None})
        for row in rows
    ]
    with QdrantStore("articles", path=tmp_path / "articles") as store:
        report = ingest(records, store, encoder=ENCODER, options=IngestOptions(skip="unchanged"))
        assert report.totals.unchanged == len(rows)


@pytest.mark.slow
def test_a_real_model_on_two_actors_of_a_small_cluster(
    cluster, tmp_path, tiny_splade, tiny_splade_folder
):
    """Two actors of half a CPU leave room for the tasks that read; whole ones would not."""
    rows = [{"id": i, "text": f"{TEXTS[i % 3]} Note {i}."} for i in range(60)]
    made = dataset(rows, 4).map_batches(
        EncodeTexts,
        fn_constructor_args=[str(tiny_splade_folder)],
        fn_constructor_kwargs={"encoder_options": {"device": "cpu"}},
        batch_format="pyarrow",
        batch_size=16,
        concurrency=2,
        num_cpus=0.5,
    )
    made.write_datasink(SparseDatasink.qdrant("notes", tiny_splade, path=tmp_path / "notes"))
    with QdrantStore("notes", path=tmp_path / "notes") as store:
        found = store.get([row["id"] for row in rows], with_rows=True)
        expected = tiny_splade.encode_documents([row["text"] for row in rows])
        for i, one in enumerate(found):
            assert one.row.allclose(expected[i], rtol=1e-5)
        best = store.search(tiny_splade.encode_queries(["the tallest animal"]), limit=1)[0]
        assert best.id % 3 == 0


def test_refused_rows_are_named_and_their_neighbours_stored(cluster, tmp_path):
    """Bad texts, bad vectors, bad ids and bad payloads, in one write."""
    rows = items(60)
    table = table_of(rows)
    vectors = {name: table.column(name).to_pylist() for name in ("indices", "values")}
    ids = table.column("id").to_pylist()
    errors = table.column("encode_error").to_pylist()
    errors[3] = "the text must be a str, got NoneType"
    vectors["indices"][3] = vectors["values"][3] = None
    vectors["values"][10][0] = float("nan")
    vectors["values"][11][0] = -1.0
    vectors["indices"][12][0] = 30522
    vectors["indices"][13][1] = vectors["indices"][13][0]
    vectors["values"][14] = vectors["values"][14][:3]
    vectors["values"][15] = None
    ids[20] = None
    ids[21] = ""
    table = pa.table(
        {
            "id": ids,
            "text": table.column("text"),
            "n": table.column("n"),
            "tag": table.column("tag"),
            "indices": pa.array(vectors["indices"], pa.list_(pa.int64())),
            "values": pa.array(vectors["values"], pa.list_(pa.float64())),
            "encode_error": pa.array(errors, pa.string()),
        }
    )
    bad = {3, 10, 11, 12, 13, 14, 15, 20, 21}
    sink = SparseDatasink.qdrant("articles", ENCODER, path=tmp_path / "articles")
    with pytest.raises(RejectedRows) as caught:
        ray.data.from_arrow(table).repartition(4).write_datasink(sink)
    assert sorted(map(str, caught.value.ids)) == sorted(str(ids[i]) for i in bad)
    reasons = dict(zip(caught.value.ids, caught.value.reasons, strict=True))
    assert reasons["d3"] == "not encoded: the text must be a str, got NoneType"
    assert "finite" in reasons["d10"]
    assert "30522" in reasons["d12"]
    assert reasons["d15"] == "the vector is null"
    assert sink.written == len(rows) - len(bad)
    with QdrantStore("articles", path=tmp_path / "articles") as store:
        assert_holds(store, [row for i, row in enumerate(rows) if i not in bad])


def test_a_block_without_one_good_row(tmp_path):
    """One task as Ray calls it, here: nothing to write is no fault."""
    sink = SparseDatasink(
        functools.partial(QdrantStore, "a", path=tmp_path / "a"), ENCODER, is_local=False
    )
    sink.on_write_start()
    table = table_of([{"id": "a", "text": None}, {"id": "b", "text": None}])
    for block in (table, table.slice(0, 0), table.to_pandas()):
        outcome = sink.write([block], None)
        assert outcome.written == 0
        assert [one.id for one in outcome.refused] == ["a", "b"][: len(block)]


def test_the_end_of_the_process_with_the_folder_is_told(cluster):
    def open_dying():
        from vdr_db.connectors.memory import MemoryStore

        class Dying(MemoryStore):
            def upsert(self, *arguments, **more):
                os._exit(1)

        return Dying()

    sink = SparseDatasink(open_dying, ENCODER, is_local=True)
    with pytest.raises(UnwrittenRows, match="process that holds the folder") as caught:
        ray.data.from_arrow(table_of(items(7))).write_datasink(sink)
    assert caught.value.ids == [f"d{i}" for i in range(7)]


def test_too_many_refused_rows_end_the_write(cluster, tmp_path):
    rows = items(40)
    for row in rows[:6]:
        row["text"] = None
    options = IngestOptions(max_errors=5)
    sink = SparseDatasink.qdrant("a", ENCODER, path=tmp_path / "a", options=options)
    with pytest.raises(UnwrittenRows, match="6 rows were refused, more than the 5") as caught:
        ray.data.from_arrow(table_of(rows)).write_datasink(sink)
    assert {f"d{i}" for i in range(6)} <= set(caught.value.ids)


def test_columns_that_went_through_numpy_are_read_too(cluster, tmp_path):
    rows = items(30)
    made = ray.data.from_arrow(table_of(rows)).map_batches(
        lambda batch: dict(batch), batch_format="numpy"
    )
    made.write_datasink(SparseDatasink.qdrant("a", ENCODER, path=tmp_path / "a"))
    with QdrantStore("a", path=tmp_path / "a") as store:
        assert_holds(store, rows)


def test_a_folder_in_use_and_another_encoder_are_told(cluster, tmp_path):
    made = ray.data.from_arrow(table_of(items(10)))
    sink = SparseDatasink.qdrant("a", ENCODER, path=tmp_path / "a")
    with QdrantStore("a", path=tmp_path / "a") as store:
        store.create(ENCODER.vocabulary.size, ENCODER.stamp())
        with pytest.raises(StoreUnavailable, match="already open in process"):
            made.write_datasink(sink)
    made.write_datasink(sink)  # the same sink, now that the folder is free
    assert sink.written == 10
    other = SparseDatasink.qdrant("a", HashingEncoder(8, 1000), path=tmp_path / "a")
    with pytest.raises(StoreMismatch, match="30522"):
        made.write_datasink(other)
    bare = SparseDatasink.qdrant("a", path=tmp_path / "a")  # no encoder: what is there decides
    made.write_datasink(bare)
    assert bare.written == 10
    with pytest.raises(ConfigError, match="not made yet"):
        made.write_datasink(SparseDatasink.qdrant("a", path=tmp_path / "b"))
    with pytest.raises(ConfigError, match="rows need the columns 'indices', 'values'"):
        dataset(items(3)).write_datasink(sink)
    with QdrantStore("a", path=tmp_path / "a") as store:  # every actor has let the folder go
        assert store.count() == 10


# Servers


def qdrant_sink(server, protocol="grpc", **more):
    return SparseDatasink.qdrant(
        "articles",
        ENCODER,
        url=server.url,
        store_options={
            "prefer_grpc": protocol == "grpc",
            "timeout": 2,
            "client_options": {"grpc_port": server.grpc_port},
        },
        **more,
    )


def contract_store(server):
    return QdrantStore("articles", url=server.url, client_options={"grpc_port": server.grpc_port})


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_a_faulty_server_ends_exact(cluster, tmp_path, protocol):
    from qdrant_contract_server import QdrantContractServer

    rows = items(400)
    rates = dict.fromkeys(("reset", "503", "lost_ack"), 0.06)
    faults = FaultPlan(rates=rates, seed=3)
    with QdrantContractServer(tmp_path, faults=faults) as server:
        options = IngestOptions(retry=QUICK, batch_documents=10)
        sink = qdrant_sink(server, protocol, options=options)
        ray.data.from_arrow(table_of(rows)).repartition(4).write_datasink(sink)
        assert sink.written == len(rows)
        assert sum(faults.injected.values()) >= 3
        faults.operations = ()
        with contract_store(server) as store:
            assert store.stamp == ENCODER.stamp()
            assert_holds(store, rows)


def test_a_server_that_goes_away_names_the_rows(cluster, tmp_path):
    """The write ends with the ids that are missing; the same write later stores them."""
    from qdrant_contract_server import QdrantContractServer

    rows = items(50)
    table = table_of(rows)
    with QdrantContractServer(tmp_path) as server:
        options = IngestOptions(retry=RetryPolicy(tries=2, base_s=0.01), batch_documents=10)
        sink = qdrant_sink(server, options=options)
        good = table.slice(0, 20)
        ray.data.from_arrow(good).write_datasink(sink)
        server.faults.rates = {"503": 1.0}
        server.faults.operations = ("upsert",)
        with pytest.raises(UnwrittenRows, match="failed 2 times") as caught:
            ray.data.from_arrow(table.slice(20)).write_datasink(sink)
        assert caught.value.ids == [row["id"] for row in rows[20:]]
        assert isinstance(caught.value, StoreError)
        server.faults.operations = ()
        ray.data.from_arrow(table).write_datasink(sink)
        with contract_store(server) as store:
            assert_holds(store, rows)


def test_elasticsearch(cluster, stand_in):
    """Encoded rows in the protocol server; scores are those of 9-bit weights."""
    import services

    rows = items(40)
    name = services.unique_name()
    sink = SparseDatasink.elasticsearch(
        name, ENCODER, url=stand_in.url, store_options={"replicas": 0}
    )
    for _ in range(2):
        ray.data.from_arrow(table_of(rows)).repartition(2).write_datasink(sink)
        assert sink.written == len(rows)
    with ElasticsearchStore(name, url=stand_in.url, replicas=0) as store:
        try:
            assert store.count() == len(rows)
            query = ENCODER.encode_queries([rows[7]["text"]])
            hit = store.search(query, limit=1)[0]
            assert hit.id == "d7"
            assert hit.score == pytest.approx(query.dot(query).item(), rel=0.005)
            assert store.get(["d6"])[0].payload["tag"] == "even"
        finally:
            from search_servers import remove_indices

            remove_indices(store)


# Use


def test_bad_use_is_explained(tmp_path):
    for place in ({}, {"path": tmp_path, "url": "http://x"}, {"path": ":memory:"}):
        with pytest.raises(ConfigError, match="exactly one of `path`"):
            SparseDatasink.qdrant("a", ENCODER, **place)
    with pytest.raises(ConfigError, match="cannot travel"):
        SparseDatasink.qdrant("a", ENCODER, url="http://x", store_options={"client": object()})
    with pytest.raises(ConfigError, match="`skip` saves encoding"):
        SparseDatasink.qdrant("a", url="http://x", options=IngestOptions(skip="existing"))


def test_no_secret_is_shown_and_errors_travel():
    sink = SparseDatasink.qdrant("a", ENCODER, url="http://x", api_key=SECRET)
    assert SECRET not in f"{sink!r} {sink} {sink._plan} {vars(sink)}"
    error = pickle.loads(pickle.dumps(UnwrittenRows(["a", 2], "why")))
    assert (error.ids, error.reason) == (["a", 2], "why")
    assert "2 rows of one task were not written ('a', 2): why" in str(error)


@pytest.mark.parametrize("module", ["ray", "ray.data"])
def test_the_missing_package_is_named(module):
    code = f"import sys; sys.modules['{module}'] = None; import vdr_db.integrations.ray"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MissingExtraError" in done.stderr
    assert "pip install 'vdr-db[ray]'" in done.stderr
