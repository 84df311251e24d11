"""Collections for programs that run in an event loop: every call in a thread, a few at a time."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from vdr_db.connectors.base import Id
from vdr_db.connectors.collections.collection import Collection
from vdr_db.connectors.collections.elasticsearch import VDRElasticsearch
from vdr_db.connectors.collections.encoding import AnyEncoder
from vdr_db.connectors.collections.stored import StoredDocuments
from vdr_db.connectors.collections.vdr_qdrant import QdrantTextOptions, VDRQdrant, choose_place
from vdr_db.connectors.collections.writing import STOP
from vdr_db.connectors.renamed import renamed
from vdr_db.counts import counted
from vdr_db.errors import ConfigError, StoreError, require
from vdr_db.forks import renew_after_fork

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from vdr_db.connectors.collections.elasticsearch import ElasticsearchTextOptions

__all__ = ["AsyncCollection", "AsyncVDRElasticsearch", "AsyncVDRQdrant"]

_Arguments = ParamSpec("_Arguments")
_Answer = TypeVar("_Answer")
_Kind = TypeVar("_Kind", bound=StoredDocuments)

_THREADS = 8
_PAGE = 1000
# What an asynchronous client is told about its event loop, which no other client can use.
_OF_THE_LOOP = ("transport", "mounts", "event_hooks")


def _awaited(
    method: Callable[Concatenate[_Kind, _Arguments], _Answer],
) -> Callable[Concatenate[AsyncCollection, _Arguments], Coroutine[Any, Any, _Answer]]:
    """The method of a collection, awaited; arguments, result and errors are the same."""

    @functools.wraps(method)
    async def call(
        self: AsyncCollection, /, *arguments: _Arguments.args, **options: _Arguments.kwargs
    ) -> _Answer:
        def work(collection: Collection) -> _Answer:
            found: _Answer = getattr(collection, method.__name__)(*arguments, **options)
            return found

        return await self._run(work)

    return call


class AsyncCollection:
    """A collection of any kind, whose methods are awaited.

    Each call runs in a thread, with the context variables of its task; at most `threads` calls run
    at once and others wait their turn, while the event loop goes on. The encoder takes one call at
    a time. Iterables of texts, images and ids are read in that thread too.

    ```python
    async with AsyncCollection(VDRQdrant("articles", encoder, path="articles.qdrant")) as articles:
        await articles.add_texts(texts, ids=ids)
        hits = await articles.search("who came up with relativity", limit=10)
        async for id in articles.ids(): ...
    ```

    A task that is cancelled goes on at once. What its call does already goes on in its thread to
    the end of the batch at hand, so that a document is there as a whole or not at all; `close`
    waits for that.

    Args:
        collection: The collection, which is closed with this object; or a function that opens it,
            called in a thread by the first awaited call.
        threads: Calls at once. The stores of Qdrant and of Elasticsearch take calls of several
            threads; with a store that does not, use 1.
    """

    def __init__(
        self, collection: Collection | Callable[[], Collection], *, threads: int = _THREADS
    ) -> None:
        threads = counted("threads", threads)
        self._open = (lambda: collection) if isinstance(collection, Collection) else collection
        self._collection = collection if isinstance(collection, Collection) else None
        self._threads = threads
        self._start()
        self._resources = ExitStack()
        self._closed = False
        renew_after_fork(self)

    def _start(self) -> None:
        self._opening = threading.Lock()
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="vdr_db-collection")

    def after_fork(self) -> None:
        """Threads of its own, as the parent's are not here."""
        self._start()

    def __repr__(self) -> str:
        """The collection and its place, without secrets."""
        inside = "not opened yet" if self._collection is None else repr(self._collection)
        return f"{type(self).__name__}({inside})"

    add_texts = _awaited(Collection.add_texts)
    add_rows = _awaited(Collection.add_rows)
    add_images = _awaited(Collection.add_images)
    update_payloads = _awaited(Collection.update_payloads)
    delete = _awaited(Collection.delete)
    search = _awaited(Collection.search)
    search_by_image = _awaited(Collection.search_by_image)
    search_batch = _awaited(Collection.search_batch)
    get = _awaited(Collection.get)
    records_of = _awaited(Collection.records_of)
    scroll = _awaited(Collection.scroll)
    count = _awaited(Collection.count)
    explain = _awaited(Collection.explain)
    flush = _awaited(Collection.flush)
    optimize = _awaited(Collection.optimize)

    async def ids(self, filter: Any = None) -> AsyncIterator[Id]:
        """All ids, of documents the filter keeps when one is given, in the order of the store."""
        walk = await self._run(lambda collection: collection.ids(filter))
        while page := await self._run(lambda _: list(islice(walk, _PAGE))):
            for id in page:
                yield id

    async def close(self) -> None:
        """Waits for calls that run, then closes the collection; again does nothing."""
        self._closed = True
        await asyncio.to_thread(self._finish)

    async def __aenter__(self) -> Self:
        """The collection, opened."""
        try:
            await self._run(lambda _: None)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes the collection."""
        await self.close()

    async def _run(self, work: Callable[[Collection], _Answer]) -> _Answer:
        """What `work` makes of the collection, in a thread."""
        if self._closed:
            raise StoreError(f"{self!r} is closed; open it again to use it.")
        stop, context = threading.Event(), contextvars.copy_context()
        context.run(STOP.set, stop)
        call = functools.partial(context.run, lambda: work(self._opened()))
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, call)
        except asyncio.CancelledError:
            stop.set()
            raise

    def _opened(self) -> Collection:
        with self._opening:
            if self._collection is None:
                self._collection = self._open()
            return self._collection

    def _finish(self) -> None:
        self._pool.shutdown()
        with self._resources:
            if self._collection is not None:
                self._collection.close()


class AsyncVDRQdrant(AsyncCollection):
    """A `VDRQdrant` whose methods are awaited, see `AsyncCollection`; its arguments and options.

    ```python
    async with AsyncVDRQdrant("articles", encoder, url=url) as articles:
        hits = await articles.search("who came up with relativity", limit=10)
    ```

    The first awaited call looks the collection up and compares it with the encoder; the first
    `add_texts`, `add_rows` or `add_images` makes one that is not there. A `client` must be a
    `qdrant_client.AsyncQdrantClient`: a client of our own is made with its options (address, key,
    TLS, prefix, timeout), and yours is neither used nor closed.

    Raises:
        TypeError: An option is unknown.
        ConfigError: Several of `path`, `url` and `client` are given, or the client is another
            kind, or cannot be made again.
        MissingExtraError: `qdrant-client` is not installed.
    """

    def __init__(
        self,
        collection: str,
        encoder: AnyEncoder | None = None,
        *,
        threads: int = _THREADS,
        **options: Unpack[QdrantTextOptions],
    ) -> None:
        unknown = sorted(set(options) - QdrantTextOptions.__optional_keys__)
        if unknown:
            raise TypeError(f"unknown options {unknown}; AsyncVDRQdrant takes those of VDRQdrant")
        choose_place(collection, options)
        self._options = options
        super().__init__(lambda: VDRQdrant(collection, encoder, **options), threads=threads)
        if (client := options.get("client")) is not None:
            options["client"] = _blocking_client(client)
            self._resources.callback(options["client"].close)

    @classmethod
    def from_existing(
        cls,
        collection: str,
        encoder: AnyEncoder | None = None,
        *,
        adopt: bool = False,
        width: int | None = None,
        threads: int = _THREADS,
        **options: Unpack[QdrantTextOptions],
    ) -> Self:
        """One that is on a server already; it is neither made nor changed.

        What is missing or does not fit is told by the first awaited call. Arguments and errors are
        those of `VDRQdrant.from_existing`.
        """
        made = cls(collection, encoder, threads=threads, **options)
        options = made._options
        made._open = lambda: VDRQdrant.from_existing(
            collection, encoder, adopt=adopt, width=width, **options
        )
        return made

    add_texts = _awaited(VDRQdrant.add_texts)
    add_rows = _awaited(VDRQdrant.add_rows)
    search_with_dense = _awaited(VDRQdrant.search_with_dense)
    search_hybrid = renamed("search_hybrid", search_with_dense)


class AsyncVDRElasticsearch(AsyncCollection):
    """A `VDRElasticsearch` whose methods are awaited: its arguments, with a synchronous `client`.

    See `AsyncCollection`; `threads` is how many calls run at once.
    """

    def __init__(
        self,
        index: str,
        encoder: AnyEncoder | None = None,
        *,
        threads: int = _THREADS,
        **options: Unpack[ElasticsearchTextOptions],
    ) -> None:
        super().__init__(lambda: VDRElasticsearch(index, encoder, **options), threads=threads)

    create = _awaited(VDRElasticsearch.create)
    search_with_text = _awaited(VDRElasticsearch.search_with_text)
    search_hybrid = renamed("search_hybrid", search_with_text)


def _blocking_client(client: Any) -> Any:
    """A `QdrantClient` with the options of an `AsyncQdrantClient`.

    Raises:
        ConfigError: It is something else, works in local mode, or has options of its event loop.
    """
    module = require("qdrant_client", "qdrant")
    if not isinstance(client, module.AsyncQdrantClient):
        raise ConfigError(
            f"`client` must be a qdrant_client.AsyncQdrantClient, got {type(client).__name__}; "
            "for QdrantClient there is VDRQdrant."
        )
    options = client.init_options
    if options.get("location") == ":memory:" or options.get("path") is not None:
        raise ConfigError(
            "`client` must speak to a server, got an AsyncQdrantClient in local mode, whose points "
            "no other client sees; pass path=':memory:' or path=FOLDER for an embedded engine."
        )
    bound = [name for name in _OF_THE_LOOP if options.get(name)]
    if inspect.iscoroutinefunction(options.get("auth_token_provider")):
        bound.append("auth_token_provider")
    if bound:
        raise ConfigError(
            f"`client` has options of its event loop, {bound}, which a client in a thread cannot "
            "use; pass `url` with client_options=... instead."
        )
    return module.QdrantClient(**{**options, "check_compatibility": False})
