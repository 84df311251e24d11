"""`AsyncVDRQdrant` through the real `AsyncQdrantClient`, over REST and gRPC."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from store_samples import WIDTH, WordEncoder, row, rows

from vdr_db.connectors import AsyncVDRQdrant, QdrantStore, VDRQdrant
from vdr_db.connectors.collections.asynchronous import _blocking_client
from vdr_db.errors import ConfigError, RejectedRows, StoreError, StoreMismatch, StoreUnavailable
from vdr_db.sparse import SparseRows

qdrant_client = pytest.importorskip("qdrant_client")
models = qdrant_client.models

TEXTS = ["Einstein published the theory", "Chess is a game of kings", "Paris capital of France"]


@pytest.fixture
def server(tmp_path):
    from qdrant_contract_server import QdrantContractServer

    with QdrantContractServer(tmp_path / "server") as server:
        yield server


@pytest.fixture(params=["rest", "grpc"])
def client_options(request, server):
    return {
        "url": server.url,
        "grpc_port": server.grpc_port,
        "prefer_grpc": request.param == "grpc",
        "timeout": 20,
        "check_compatibility": False,
    }


@pytest.fixture
def client(client_options):
    client = qdrant_client.QdrantClient(**client_options)
    yield client
    client.close()


def distinct(count, seed):
    """Rows without equal scores, of which an engine may choose any."""
    random = np.random.default_rng(seed)
    return SparseRows.from_dicts(
        [
            {int(i): float(random.random() + 0.1) for i in random.choice(WIDTH, 6, False)}
            for _ in range(count)
        ],
        WIDTH,
    )


def run(client_options, work, name="texts", encoder=None, *, make=AsyncVDRQdrant, **options):
    """Runs `work(collection)` in an event loop with a client of its own."""

    async def main():
        client = qdrant_client.AsyncQdrantClient(**client_options)
        try:
            async with make(name, encoder, client=client, **options) as collection:
                return await work(collection)
        finally:
            await client.close()

    return asyncio.run(main())


def test_the_same_answers_as_the_other_one(client, client_options, server):
    store = QdrantStore("rows", client=client, dense={"text": 4})
    store.create(WIDTH)
    dense = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    payloads = [{"n": i % 5} for i in range(300)]
    queries = SparseRows.concat([distinct(3, seed=4), SparseRows.empty(1, WIDTH)])

    async def work(collection):
        ids = [*range(150), *(f"id {i}" for i in range(150))]
        assert (
            await collection.add_rows(distinct(300, 0), ids, payloads, dense={"text": dense}) == ids
        )
        before = server.requests["query_batch"]
        batch = await collection.search_batch(queries, 7, {"n": [1, 2]})
        assert server.requests["query_batch"] == before + 1
        assert batch == store.search_batch(queries, 7, {"n": [1, 2]})
        for query, hits in zip(queries, batch, strict=True):
            assert await collection.search(query, 7, {"n": [1, 2]}) == hits
        native = models.Filter(
            must=[models.FieldCondition(key="n", match=models.MatchValue(value=3))]
        )
        assert await collection.count(native) == await collection.count({"n": 3}) == 60
        assert await collection.search(queries[0], 5, offset=5) == store.search(
            queries[0], 5, offset=5
        )
        fused = store.search_with_dense(queries[0], dense[3], 5)
        assert await collection.search_with_dense(queries[0], dense[3], 5) == fused
        with pytest.warns(DeprecationWarning, match="called `search_with_dense` now"):
            assert await collection.search_hybrid(queries[0], dense[3], 5) == fused
        assert await collection.get(["id 3", 5, "none"], True) == store.get(["id 3", 5], True)
        assert [id async for id in collection.ids()] == list(store.ids())
        assert {id async for id in collection.ids({"n": 3})} == set(store.ids({"n": 3}))
        assert {id async for id in collection.ids(native)} == set(store.ids({"n": 3}))
        assert await collection.delete(["id 3", 5, "none"]) == 2
        assert await collection.count() == store.count() == 298

    run(client_options, work, "rows")


def test_texts_are_encoded_in_a_thread(client, client_options):
    threads = set()

    class Watched(WordEncoder):
        def encode_documents(self, texts):
            threads.add(threading.get_ident())
            return super().encode_documents(texts)

    encoder = Watched()
    made = VDRQdrant("texts", encoder, client=client)
    made.add_texts(["go stones"], ["g"])
    threads.clear()

    async def work(collection):
        ids = await collection.add_texts(TEXTS, ["e", "c", "p"], [{"n": i} for i in range(3)])
        hits = await asyncio.gather(*(collection.search(text) for text in TEXTS * 5))
        assert [one[0].id for one in hits] == ids * 5
        assert hits[0][0].payload == {"n": 0, "text": TEXTS[0]}
        again = await collection.search(TEXTS[0], 1, rerank=3)
        terms = await collection.explain("theory", "e")
        await collection.flush()
        await collection.optimize()
        with pytest.raises(TypeError, match="got one string"):
            await collection.search_batch("theory")
        return hits, again, terms

    hits, again, terms = run(client_options, work, encoder=encoder)
    assert threads
    assert threading.get_ident() not in threads
    assert hits[0] == made.search(TEXTS[0])
    assert again == made.search(TEXTS[0], 1, rerank=3)
    assert terms == made.explain("theory", "e") != []


def test_the_event_loop_goes_on_while_the_encoder_works(client, client_options):
    release = threading.Event()

    class Slow(WordEncoder):
        def encode_queries(self, texts):
            assert release.wait(20)
            return super().encode_queries(texts)

    VDRQdrant("texts", WordEncoder(), client=client).add_texts(TEXTS)

    async def work(collection):
        search = asyncio.create_task(collection.search("theory"))
        assert await collection.count() == 3  # answered while the encoder waits
        release.set()
        assert len(await search) == 1

    run(client_options, work, encoder=Slow())


def test_what_does_not_fit_is_told_at_the_first_call(client, client_options):
    VDRQdrant("texts", WordEncoder(), client=client).add_texts(TEXTS)

    async def nothing(collection):
        raise AssertionError

    other = WordEncoder("other", tokens=("[PAD]", "x"))
    with pytest.raises(StoreMismatch, match="cannot be opened"):
        run(client_options, nothing, encoder=other)
    existing = AsyncVDRQdrant.from_existing
    with pytest.raises(StoreError, match="is not there"):
        run(client_options, nothing, "nobody", make=existing)
    client.create_collection("foreign", {}, {"sparse": models.SparseVectorParams()})
    with pytest.raises(StoreMismatch, match="adopt=True"):
        run(client_options, nothing, "foreign", WordEncoder(), make=existing)
    with pytest.raises(StoreMismatch):
        run(client_options, nothing, "foreign", WordEncoder())

    async def adopted(collection):
        await collection.add_texts(["kings"], ["k"])
        return await collection.search("kings")

    hits = run(client_options, adopted, "foreign", WordEncoder(), make=existing, adopt=True)
    assert hits[0].id == "k"


def test_refused_rows_are_named_and_the_others_are_written(client, client_options, server):
    QdrantStore("rows", client=client).create(WIDTH)
    upsert = server.engine.upsert

    def picky(name, points):
        from qdrant_contract_engine import Refused

        if any(point["payload"].get("n") in (3, 40) for point in points):
            raise Refused(400, "Format error in JSON body")
        upsert(name, points)

    server.engine.upsert = picky

    async def work(collection):
        with pytest.raises(RejectedRows, match="Format error") as caught:
            await collection.add_rows(rows(50), list(range(50)), [{"n": i} for i in range(50)])
        assert caught.value.ids == [3, 40]
        assert await collection.count() == 48

    run(client_options, work, "rows")


def test_trouble_and_secrets(client_options, server):
    server.api_key = "a-secret-key-4711"

    async def main():
        options = {k: v for k, v in client_options.items() if k in ("url", "prefer_grpc")}
        wrong = AsyncVDRQdrant(
            "texts",
            api_key="wrong-key-0815",
            client_options={"grpc_port": server.grpc_port},
            **options,
        )
        with pytest.raises(StoreError, match="refuses the credentials") as caught:
            await wrong.count()
        assert "0815" not in str(caught.value) + repr(wrong)
        await wrong.close()
        await wrong.close()
        with pytest.raises(StoreError, match="is closed"):
            await wrong.count()
        server.is_down = True
        away = AsyncVDRQdrant("x", client_options={"grpc_port": server.grpc_port}, **options)
        with pytest.raises(StoreUnavailable, match="cannot be opened"):
            await away.search(row({1: 1.0}))
        await away.close()

    with pytest.warns(UserWarning, match="Api key is used with an insecure"):
        asyncio.run(main())


def test_the_client_must_be_an_asynchronous_one(client):
    with pytest.raises(ConfigError, match="for QdrantClient there is VDRQdrant"):
        AsyncVDRQdrant("c", client=client)
    for options in ({"client": client, "url": "http://x"}, {"url": "http://x", "path": "y"}):
        with pytest.raises(ConfigError, match="is enough"):
            AsyncVDRQdrant("c", **options)


def test_a_client_of_the_same_options_takes_its_place(tmp_path, server):
    server.api_key = "a-secret-key-4711"
    address = {"grpc_port": server.grpc_port, "timeout": 7, "prefer_grpc": True}

    async def main(**options):
        theirs = qdrant_client.AsyncQdrantClient(check_compatibility=False, **address, **options)
        collection = AsyncVDRQdrant("rows", client=theirs)
        assert await collection.add_rows(rows(3), [1, 2, 3]) == [1, 2, 3]
        remote = collection._collection.store._engine._client._client
        await collection.close()
        assert await theirs.collection_exists("rows"), "it is still open"
        await theirs.close()
        return remote

    key = {"api_key": server.api_key}
    host, port = server.url.removeprefix("http://").split(":")
    for place in ({"url": server.url}, {"host": host, "port": int(port), "https": False}):
        with pytest.warns(UserWarning, match="Api key is used with an insecure"):
            remote = asyncio.run(main(**place, **key))
        assert (remote._prefer_grpc, remote._timeout) == (True, 7)
    for options in ({"prefix": "service/v1"}, {"verify": False, "headers": {"x": "y"}}):
        theirs = qdrant_client.AsyncQdrantClient(
            url="https://example.invalid", check_compatibility=False, **options
        )
        made = _blocking_client(theirs)
        ours, wanted = (dict(one.init_options) for one in (made, theirs))
        assert ours == wanted
        assert made._client.rest_uri == theirs._client.rest_uri
        made.close()
        asyncio.run(theirs.close())


def test_what_only_the_given_client_can_reach_is_refused(tmp_path):
    async def token():
        return "x"

    local = ({"location": ":memory:"}, {"path": str(tmp_path)})
    bound = ({"transport": httpx.AsyncHTTPTransport()}, {"auth_token_provider": token})
    for options, told in (
        *((one, r"in local mode.*pass path=':memory:'") for one in local),
        *(
            ({"url": "https://127.0.0.1:1", **one}, rf"\['{next(iter(one))}'\].*pass `url` with")
            for one in bound
        ),
    ):
        theirs = qdrant_client.AsyncQdrantClient(check_compatibility=False, **options)
        with pytest.raises(ConfigError, match=told):
            AsyncVDRQdrant("c", client=theirs)
        asyncio.run(theirs.close())


# Making collections


def described(client, name):
    """What a collection is, as the server tells it."""
    about = client.get_collection(name)
    return about.config.model_dump(), sorted(about.payload_schema)


OPTIONS = [
    {},
    {"datatype": "float16", "payload_indexes": {"n": "integer", "who": "tenant"}},
    {"documents": "tokens", "full_scan_threshold": 7, "index_memory": "cold"},
    {"dense": {"text": 4}, "vector_name": "words", "collection_options": {"shard_number": 2}},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_collection_is_made_as_the_other_one_makes_it(client, client_options, options):
    payloads = [{"n": i} for i in range(3)]
    made = VDRQdrant("theirs", WordEncoder(), client=client, **options)
    made.add_texts(TEXTS, ["e", "c", "p"], payloads)

    async def work(collection):
        assert await collection.count() == 0, "nothing is made by looking"
        with pytest.raises(StoreError, match="holds nothing yet"):
            await collection.search("theory")
        assert not client.collection_exists("ours")
        assert await collection.add_texts(TEXTS, ["e", "c", "p"], payloads) == ["e", "c", "p"]
        return await collection.search("theory"), await collection.get(["e"], True)

    hits, found = run(client_options, work, "ours", WordEncoder(), **options)
    assert hits == made.search("theory")
    assert found == made.get(["e"], True)
    ours, theirs = described(client, "ours"), described(client, "theirs")
    for config, _ in (ours, theirs):
        config["metadata"]["vdr_db"].pop("collection")
    assert ours == theirs
    # Either opens what the other made, and both refuse other options.
    with VDRQdrant("ours", WordEncoder(), client=client) as again:
        assert again.search("theory") == hits
    with pytest.raises(StoreMismatch):
        run(client_options, work, "ours", WordEncoder(), datatype="uint8")


def test_several_tasks_make_one_collection(client, client_options):
    async def work(collection):
        adding = (collection.add_rows(rows(5, seed=i), range(5 * i, 5 * i + 5)) for i in (0, 1))
        await asyncio.gather(*adding)
        return await collection.count()

    assert run(client_options, work, "both") == 10

    async def two():
        async_client = qdrant_client.AsyncQdrantClient(**client_options)
        one, other = (AsyncVDRQdrant("race", client=async_client) for _ in range(2))
        await asyncio.gather(one.count(), other.count())  # both see that nothing is there
        await asyncio.gather(one.add_rows(rows(3), [1, 2, 3]), other.add_rows(rows(3), [4, 5, 6]))
        assert await one.count() == await other.count() == 6
        await async_client.close()

    asyncio.run(two())


def test_versioned_collections_can_be_rebuilt(client, client_options):
    async def work(collection):
        await collection.add_texts(TEXTS)
        return await collection.count()

    assert run(client_options, work, "alias", WordEncoder(), versioned=True) == 3
    collections = [one.name for one in client.get_collections().collections]
    assert collections == ["alias-000001"]
    with VDRQdrant("alias", WordEncoder(), client=client) as made:
        assert made.rollover() == "alias-000002"
        assert made.count() == 3


def test_unknown_options_are_refused_at_once(client):
    for options in ({"vector": "x"}, {"width": 3}):
        with pytest.raises(TypeError, match="unknown options"):
            AsyncVDRQdrant("c", url="http://127.0.0.1:1", **options)


# Images


class ImageWordEncoder(WordEncoder):
    """Reads files of words as if they were images."""

    def encode_images(self, images, thumbnail_px=None):
        contents = [path.read_text() for path in map(Path, images)]
        return SimpleNamespace(
            rows=self.encode_documents(contents),
            names=tuple(map(str, images)),
            digests=tuple(contents),
            refused={i: "broken" for i, one in enumerate(contents) if one == "broken"},
            thumbnails=() if thumbnail_px is None else (f"data:{thumbnail_px}",) * len(contents),
        )


@pytest.fixture
def folder(tmp_path):
    for i, text in enumerate([*TEXTS, "broken"]):
        (tmp_path / f"{i}.png").write_text(text)
    return tmp_path


def test_images(client, client_options, folder):
    encoder = ImageWordEncoder()
    made = VDRQdrant("theirs", encoder, client=client)
    with pytest.raises(RejectedRows) as theirs:
        made.add_images(folder, thumbnail_px=32)

    async def work(collection):
        with pytest.raises(RejectedRows, match="broken") as ours:
            await collection.add_images(folder, thumbnail_px=32)
        assert (ours.value.ids, ours.value.reasons) == (theirs.value.ids, theirs.value.reasons)
        names = [f"{i}.png" for i in range(3)]
        assert await collection.get(names, True) == made.get(names, True)
        assert await collection.search_by_image(folder / "1.png") == made.search_by_image(
            folder / "1.png"
        )
        files = [folder / name for name in names]
        assert await collection.add_images(files, [7, 8, 9], [{"n": i} for i in range(3)]) == [
            *(7, 8, 9)
        ]
        return await collection.count({"n": {"gte": 1}})

    assert run(client_options, work, "ours", encoder) == 2

    async def refused(collection):
        with pytest.raises(ConfigError, match="an encoder that reads images, got WordEncoder"):
            await collection.add_images(folder)

    run(client_options, refused, "texts", WordEncoder())


def test_searches_go_on_between_batches_of_images(client, client_options, folder):
    VDRQdrant("texts", WordEncoder(), client=client).add_texts(TEXTS)
    (folder / "3.png").write_text("Paris")
    batches = []

    class Watched(ImageWordEncoder):
        busy = 0

        def encode_images(self, images, thumbnail_px=None):
            Watched.busy += 1
            assert Watched.busy == 1, "one at a time"
            batches.append(len(images))
            time.sleep(0.05)
            found = super().encode_images(images, thumbnail_px)
            Watched.busy -= 1
            return found

        def encode_queries(self, texts):
            Watched.busy += 1
            assert Watched.busy == 1, "one at a time"
            found = super().encode_queries(texts)
            Watched.busy -= 1
            return found

    async def work(collection):
        adding = asyncio.create_task(collection.add_images(folder, batch_size=1))
        while not batches:
            await asyncio.sleep(0.001)
        assert (await collection.search("theory"))[0].score > 0
        seen = len(batches)
        assert len(await adding) == 4
        return seen

    assert run(client_options, work, "texts", Watched()) < 4
