"""`AsyncCollection` over the embedded engine, the exact store and the Elasticsearch stand-in."""

from __future__ import annotations

import asyncio
import contextvars
import threading

import pytest
import services
from search_servers import note_real_server, remove_indices
from store_samples import WordEncoder, rows

from vdr_db.connectors import (
    AsyncCollection,
    AsyncVDRElasticsearch,
    AsyncVDRQdrant,
    Collection,
    MemoryStore,
    VDRElasticsearch,
    VDRQdrant,
)
from vdr_db.errors import ConfigError, RejectedRows, StoreError, StoreMismatch

TEXTS = ["Einstein published the theory", "Chess is a game of kings", "Paris capital of France"]
IDS = ["e", 1, "1"]


@pytest.fixture(params=["memory", "embedded", "noida_server", "opensearch_server"])
def opened(request):
    """A collection and the same one made asynchronous."""
    if request.param == "memory":
        made = Collection(MemoryStore(), WordEncoder())
        yield made, AsyncCollection(made, threads=1)
        return
    if request.param == "embedded":
        made = VDRQdrant("texts", WordEncoder(), path=":memory:")
        yield made, AsyncCollection(made)
        return
    server = request.getfixturevalue(request.param)
    if server.is_real:
        note_real_server(request, server.name)
    options = {"encoder": WordEncoder(), "replicas": 0, "text_fields": ["text"]}
    options.update(server.options())
    name = services.unique_name()
    with VDRElasticsearch(name, **options) as made:
        yield made, AsyncVDRElasticsearch(name, **options)
        remove_indices(made.store)


def test_every_method_answers_as_the_collection_does(opened):
    made, collection = opened

    async def main():
        async with collection as articles:
            assert await articles.count() == 0
            payloads = [{"n": n} for n in range(3)]
            assert await articles.add_texts(TEXTS, IDS, payloads) == IDS
            assert await articles.search("theory") == made.search("theory") != []
            assert await articles.search("of", 1, {"n": [1, 2]}, offset=1) == made.search(
                "of", 1, {"n": [1, 2]}, offset=1
            )
            assert await articles.search("of", 1, rerank=3) == made.search("of", 1, rerank=3)
            assert await articles.search_batch(TEXTS, 2) == made.search_batch(TEXTS, 2)
            assert await articles.explain("theory", "e") == made.explain("theory", "e") != []
            assert await articles.get(IDS, with_rows=True) == made.get(IDS, with_rows=True)
            assert [id async for id in articles.ids()] == list(made.ids())
            await articles.flush()
            await articles.optimize()
            with pytest.raises(RejectedRows, match=r"`n` holds a set"):
                await articles.add_texts(["go", "light"], [7, 8], [{"n": {1, 2}}, None])
            assert await articles.delete([8, "nobody"]) == 1
            assert [id async for id in articles.ids({"n": 1})] == [1]
            assert await articles.count() == made.count() == 3
            with pytest.raises(TypeError, match=r"pass \['theory'\]"):
                await articles.search_batch("theory")
        with pytest.raises(StoreError, match="is closed"):
            await articles.count()
        await articles.close()

    asyncio.run(main())


def test_text_and_vector_together_in_elasticsearch(server):
    options = {"replicas": 0, "text_fields": ["text"], **server.options()}

    async def main():
        name = services.unique_name()
        async with AsyncVDRElasticsearch(name, WordEncoder(), **options) as articles:
            await articles.create()
            await articles.add_texts(TEXTS, IDS)
            assert (await articles.search_with_text("Einstein published", 3))[0].id == "e"
            with pytest.warns(DeprecationWarning, match="called `search_with_text` now"):
                await articles.search_hybrid("Einstein", 3)
            remove_indices(articles._collection.store)

    asyncio.run(main())


def test_an_embedded_collection_of_many_tasks(tmp_path):
    place = {"path": tmp_path / "c"}

    async def main():
        async with AsyncVDRQdrant("rows", **place) as collection:
            adding = (
                collection.add_rows(rows(20, seed=i), range(20 * i, 20 * i + 20)) for i in range(10)
            )
            searching = (collection.count() for _ in range(20))
            await asyncio.gather(*adding, *searching)
            assert await collection.count() == 200
        other = AsyncVDRQdrant("other", **place)
        with pytest.raises(StoreMismatch):
            await other.count()
        await other.close()
        async with AsyncVDRQdrant("rows", **place) as again:
            return sorted([id async for id in again.ids()])

    assert asyncio.run(main()) == list(range(200))


class Gate(WordEncoder):
    """Encodes a batch when it is let through."""

    def __init__(self):
        super().__init__()
        self.entered, self.release = threading.Semaphore(0), threading.Semaphore(0)

    def encode_documents(self, texts):
        self.entered.release()
        assert self.release.acquire(timeout=20)
        return super().encode_documents(texts)


def test_a_cancelled_call_ends_after_its_batch():
    encoder = Gate()

    async def main():
        async with AsyncVDRQdrant("texts", encoder, path=":memory:") as collection:
            adding = asyncio.create_task(
                collection.add_texts((f"chess {i}" for i in range(100)), range(100), batch_size=4)
            )
            assert await asyncio.to_thread(encoder.entered.acquire, timeout=20)
            encoder.release.release()  # the first batch
            assert await asyncio.to_thread(encoder.entered.acquire, timeout=20)
            adding.cancel()
            with pytest.raises(asyncio.CancelledError):
                await adding
            for _ in range(100):
                encoder.release.release()
            inside = collection._collection
            await asyncio.to_thread(collection._pool.shutdown)  # as `close` waits for it
            assert sorted(inside.ids()) == list(range(8)), "whole batches, and no more of them"
        return len(encoder.calls)

    assert asyncio.run(main()) == 2


def test_a_call_that_waits_is_never_made_when_cancelled():
    encoder = Gate()

    async def main():
        async with AsyncCollection(Collection(MemoryStore(), encoder), threads=1) as collection:
            first = asyncio.create_task(collection.add_texts(["chess"], ["first"]))
            assert await asyncio.to_thread(encoder.entered.acquire, timeout=20)
            second = asyncio.create_task(collection.add_texts(["go"], ["second"]))
            await asyncio.sleep(0)
            second.cancel()
            encoder.release.release()
            assert await first == ["first"]
            with pytest.raises(asyncio.CancelledError):
                await second
            return [id async for id in collection.ids()]

    assert asyncio.run(main()) == ["first"]


def test_calls_at_once_are_bounded_and_carry_context_variables():
    user = contextvars.ContextVar("user")
    seen, running, most = [], 0, 0
    lock, full = threading.Lock(), threading.Barrier(3)

    class Watched(MemoryStore):
        def count(self, filter=None):
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
                seen.append((user.get(), threading.current_thread().name))
            full.wait(20)
            with lock:
                running -= 1
            return super().count(filter)

    async def one(collection, name):
        user.set(name)
        return await collection.count()

    async def main():
        async with AsyncCollection(Collection(Watched()), threads=3) as collection:
            return await asyncio.gather(*(one(collection, f"user {i}") for i in range(12)))

    assert asyncio.run(main()) == [0] * 12
    assert most == 3
    assert sorted(name for name, _ in seen) == sorted(f"user {i}" for i in range(12))
    assert len({thread for _, thread in seen}) == 3
    with pytest.raises(ConfigError, match="`threads` must be an integer of at least 1"):
        AsyncCollection(Collection(MemoryStore()), threads=0)


def test_close_waits_for_what_runs():
    encoder = Gate()

    async def main():
        collection = AsyncVDRQdrant("texts", encoder, path=":memory:")
        assert "not opened yet" in repr(collection)
        adding = asyncio.create_task(collection.add_texts(["chess"]))
        assert await asyncio.to_thread(encoder.entered.acquire, timeout=20)
        closing = asyncio.create_task(collection.close())
        await asyncio.sleep(0.05)
        assert not closing.done()
        encoder.release.release()
        assert len(await adding) == 1
        await closing
        with pytest.raises(StoreError, match="is closed"):
            await collection.search("chess")
        assert "closed" in repr(collection)

    asyncio.run(main())
