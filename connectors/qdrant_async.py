"""`AsyncVDRQdrant`: a collection on a Qdrant server for programs that run in an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from vdr_db.connectors.base import (
    Documents,
    EmptyRows,
    Hit,
    Id,
    Record,
    check_stamp,
    checked_page,
)
from vdr_db.connectors.collection import Encoder, Mode, needed_encoder, query_rows
from vdr_db.connectors.ids import checked_ids
from vdr_db.connectors.qdrant_documents import (
    Batch,
    Upload,
    checked_fusion,
    checked_nearest,
    hits_of,
    record_of,
)
from vdr_db.connectors.qdrant_engine import Manifest, PointId, RefusedBatch, Stored
from vdr_db.connectors.qdrant_errors import shown_url, translated
from vdr_db.connectors.qdrant_existing import (
    Existing,
    check_width_of,
    point_of,
    read_manifest,
)
from vdr_db.connectors.qdrant_requests import METADATA_KEY, QUERIES_AT_ONCE, Requests
from vdr_db.connectors.qdrant_server import SERVER_LIMITS
from vdr_db.connectors.texts import refuse_string, text_batches
from vdr_db.connectors.validation import checked_query
from vdr_db.errors import ConfigError, RejectedRows, StoreError, require
from vdr_db.sparse import SparseRows

__all__ = ["AsyncVDRQdrant"]

_Answer = TypeVar("_Answer")
_PAGE = 1000
_LOOKED_AT = 64


class AsyncVDRQdrant:
    """A collection that is on a server already, for `AsyncQdrantClient`.

    Methods are those of `VDRQdrant`, awaited; requests and answers are made by the same code. The
    encoder runs in a thread, one call at a time, so that the event loop goes on. Collections are
    made, rebuilt and adopted for good by `VDRQdrant`.

    ```python
    async with AsyncVDRQdrant("articles", encoder, client=AsyncQdrantClient(url)) as articles:
        hits = await articles.search("who came up with relativity", limit=10)
    ```

    The first awaited call looks the collection up and compares it with the encoder.

    Args:
        collection: Name of the collection, or an alias of one.
        encoder: Makes vectors of texts; without one, only rows can be added and searched.
        client: A ready `qdrant_client.AsyncQdrantClient`, instead of `url`; it is not closed here.
        url: Address of a server.
        api_key: For `url`.
        prefer_grpc: For `url`: speak gRPC.
        timeout: For `url`: seconds for one request.
        client_options: For `url`, more arguments of `AsyncQdrantClient`.
        store_text: Keep each text in its payload.
        text_key: Payload field of the text.
        vector_name: Its sparse vector; needed when it has several.
        adopt: Take a collection that this library did not make; see `VDRQdrant.from_existing`.
        width: Vocabulary size, for one that is adopted without an encoder.
        documents: What the document side of one that is adopted is.

    Raises:
        ConfigError: Not exactly one of `client` and `url` is given, or the client is another kind.
        MissingExtraError: `qdrant-client` is not installed.
    """

    def __init__(
        self,
        collection: str,
        encoder: Encoder | None = None,
        *,
        client: Any = None,
        url: str | None = None,
        api_key: str | None = None,
        prefer_grpc: bool = True,
        timeout: int = 60,
        client_options: Mapping[str, Any] | None = None,
        store_text: bool = True,
        text_key: str = "text",
        vector_name: str | None = None,
        adopt: bool = False,
        width: int | None = None,
        documents: Documents = "encoded",
    ) -> None:
        module = require("qdrant_client", "qdrant")
        if (client is None) == (url is None):
            raise ConfigError("exactly one of `client` and `url` is needed; pass one of them.")
        self.name = collection
        self.encoder = encoder
        self.store_text = store_text
        self.text_key = text_key
        if width is None and encoder is not None:
            width = encoder.vocabulary.size
        self._existing = Existing(adopt=adopt, width=width, documents=documents)
        self._vector_name = vector_name
        self._secret = api_key
        self._requests = Requests(module.models)
        self._manifest: Manifest | None = None
        self._closed = False
        self._opening, self._encoding = asyncio.Lock(), asyncio.Lock()
        self._owns_client = client is None
        if client is None:
            self._where = f"collection {collection!r} at {shown_url(url or '')}"
            client = module.AsyncQdrantClient(
                url=url,
                api_key=api_key,
                prefer_grpc=prefer_grpc,
                timeout=timeout,
                check_compatibility=False,
                **(client_options or {}),
            )
        elif not isinstance(client, module.AsyncQdrantClient):
            raise ConfigError(
                f"`client` must be a qdrant_client.AsyncQdrantClient, got {type(client).__name__}; "
                "for QdrantClient there is VDRQdrant."
            )
        else:
            self._where = f"collection {collection!r} of the given client"
        self._client: Any = client

    def __repr__(self) -> str:
        """The collection and its place, without secrets."""
        return f"AsyncVDRQdrant({self._where})"

    # Reading

    async def search(
        self,
        query: str | SparseRows,
        limit: int = 10,
        filter: Any = None,
        *,
        offset: int = 0,
        mode: Mode | None = None,
    ) -> list[Hit]:
        """The best documents for a query, best first; see `Collection.search`."""
        checked_page(limit, offset)
        rows = await self._query([query] if isinstance(query, str) else query, mode, single=True)
        return (await self._search(rows, limit, offset, filter))[0]

    async def search_batch(
        self,
        queries: Sequence[str] | SparseRows,
        limit: int = 10,
        filter: Any = None,
        *,
        mode: Mode | None = None,
    ) -> list[list[Hit]]:
        """`search` for several queries in as few requests as possible, in their order."""
        checked_page(limit, 0)
        if not isinstance(queries, SparseRows):
            refuse_string(queries, "queries")
        return await self._search(await self._query(queries, mode), limit, 0, filter)

    async def search_hybrid(
        self,
        query: str | SparseRows,
        vector: Any,
        limit: int = 10,
        filter: Any = None,
        *,
        offset: int = 0,
        mode: Mode | None = None,
        using: str | None = None,
        depth: int = 100,
        rank_constant: int | None = None,
    ) -> list[Hit]:
        """The best by sparse and dense vector together (RRF); see `VDRQdrant.search_hybrid`."""
        checked_page(limit, offset)
        checked_fusion(depth, rank_constant)
        made = await self._made()
        row = await self._query([query] if isinstance(query, str) else query, mode, single=True)
        using, numbers = checked_nearest(vector, using, made.dense, self._where)
        request = self._requests.hybrid(
            row,
            using,
            numbers,
            limit=limit,
            offset=offset,
            filter=filter,
            depth=max(depth, limit + offset),
            rank_constant=rank_constant,
        )
        call = self._client.query_batch_points
        answers = await self._asked("be searched", call(self.name, requests=[request]))
        return hits_of(self._requests.found(answers[0]))

    async def get(self, ids: Sequence[Id], with_rows: bool = False) -> list[Record]:
        """The documents of these ids in this order; unknown ids are left out."""
        made = await self._made()
        width = made.width
        wanted = [point_of(made, id) for id in checked_ids(ids)]
        found = {stored.point: stored for stored in await self._retrieve(wanted, with_rows)}
        return [record_of(found[p], width if with_rows else None) for p in wanted if p in found]

    async def count(self, filter: Any = None) -> int:
        """Number of documents, of those the filter keeps when one is given."""
        await self._made()
        native = self._requests.filter(filter)
        call = self._client.count(self.name, count_filter=native, exact=True)
        return int((await self._asked("be counted", call)).count)

    # Writing

    async def add_texts(
        self,
        texts: Sequence[str],
        ids: Sequence[Id] | None = None,
        payloads: Sequence[Mapping[str, Any] | None] | None = None,
        *,
        batch_size: int = 512,
        empty: EmptyRows = "store",
    ) -> list[Id]:
        """Encodes and writes texts; see `Collection.add_texts`."""
        made = await self._made()
        encoder = needed_encoder(self.encoder, "add_texts")
        tokens = made.documents == "tokens"
        encode = encoder.bag_of_tokens if tokens else encoder.encode_documents
        key = self.text_key if self.store_text else None
        written: list[Id] = []
        refused: dict[Id, str] = {}
        for batch in text_batches(texts, ids, payloads, size=batch_size, text_key=key):
            refused.update(batch.refused)
            skipped: set[Id] = set()
            if batch.texts:
                rows = await self._encoded(encode, batch.texts)
                upload = self._upload(made, rows, batch.fresh_ids, batch.payloads, empty, None)
                await self._send(upload)
                refused.update(upload.refused)
                skipped.update(upload.written.skipped)
            written += [id for id in batch.ids if id not in skipped]
        if refused:
            raise RejectedRows(list(refused), list(refused.values()))
        return written

    async def add_rows(
        self,
        rows: SparseRows,
        ids: Sequence[Id],
        payloads: Sequence[Mapping[str, Any] | None] | None = None,
        *,
        empty: EmptyRows = "store",
        dense: Mapping[str, Any] | None = None,
    ) -> list[Id]:
        """Writes vectors made elsewhere; see `VDRQdrant.add_rows`."""
        upload = self._upload(await self._made(), rows, ids, payloads, empty, dense)
        await self._send(upload)
        if upload.refused:
            raise RejectedRows(list(upload.refused), list(upload.refused.values()))
        left_out = set(upload.written.skipped)
        return [id for id in checked_ids(ids) if id not in left_out]

    async def delete(self, ids: Sequence[Id]) -> int:
        """Removes documents; returns how many were there."""
        made = await self._made()
        wanted = list(dict.fromkeys(point_of(made, id) for id in checked_ids(ids)))
        there = [stored.point for stored in await self._retrieve(wanted, False)]
        for start in range(0, len(there), _PAGE):
            points = self._requests.models.PointIdsList(points=there[start : start + _PAGE])
            call = self._client.delete(self.name, points_selector=points, wait=True)
            await self._asked("be written", call)
        return len(there)

    # Life

    async def close(self) -> None:
        """Closes the connection, unless the client was given ready; again does nothing."""
        if not self._closed:
            self._closed = True
            if self._owns_client:
                await self._client.close()

    async def __aenter__(self) -> AsyncVDRQdrant:
        """The collection, looked up."""
        try:
            await self._made()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the collection."""
        await self.close()

    async def _asked(self, action: str, call: Awaitable[_Answer], **options: bool) -> _Answer:
        with translated(self._where, action, self._secret, **options):
            return await call

    async def _encoded(self, function: Callable[..., _Answer], *arguments: Any) -> _Answer:
        """Work of the encoder, in a thread; one at a time, as encoders expect."""
        async with self._encoding:
            return await asyncio.to_thread(function, *arguments)

    async def _made(self) -> Manifest:
        if self._closed:
            raise StoreError(f"{self._where} is closed; open it again to use it.")
        async with self._opening:
            if self._manifest is None:
                self._manifest = await self._opened()
        return self._manifest

    async def _opened(self) -> Manifest:
        if not await self._asked("be opened", self._client.collection_exists(self.name)):
            raise StoreError(
                f"{self._where} is not there; check its name and place, or make it with VDRQdrant."
            )
        about = await self._asked("be opened", self._client.get_collection(self.name))
        manifest = read_manifest(
            about,
            (getattr(about.config, "metadata", None) or {}).get(METADATA_KEY),
            self.name,
            self._where,
            vector=self._vector_name,
            existing=self._existing,
        )
        self._requests.vector = manifest.vector
        if self._existing.adopt:
            vectors = [manifest.vector]
            call = self._client.scroll(
                self.name, limit=_LOOKED_AT, with_payload=False, with_vectors=vectors
            )
            records, _ = await self._asked("be read", call)
            stored = (self._requests.stored(record, True).indices for record in records)
            largest = max((max(indices) for indices in stored if indices), default=None)
            check_width_of(largest, manifest.width, self._where)
        if self.encoder is not None:
            stamp = await self._encoded(self.encoder.stamp)
            kept = (manifest.width, manifest.stamp, manifest.documents)
            wanted = (self.encoder.vocabulary.size, stamp, manifest.documents)
            check_stamp(self._where, kept, wanted)
        return manifest

    async def _query(
        self, queries: Sequence[str] | SparseRows, mode: Mode | None, *, single: bool = False
    ) -> SparseRows:
        made = await self._made()
        rows = await self._encoded(query_rows, queries, mode, made.documents, self.encoder)
        return checked_query(rows, made.width, self._where, single=single)

    async def _search(
        self, rows: SparseRows, limit: int, offset: int, filter: Any
    ) -> list[list[Hit]]:
        results: list[list[Hit]] = [[] for _ in range(len(rows))]
        asked = np.flatnonzero(rows.counts)
        requests = self._requests.searches(rows[asked], limit, offset, filter) if asked.size else []
        answers: list[Any] = []
        for start in range(0, len(requests), QUERIES_AT_ONCE):
            part = requests[start : start + QUERIES_AT_ONCE]
            call = self._client.query_batch_points(self.name, requests=part)
            answers += await self._asked("be searched", call)
        for i, answer in zip(asked, answers, strict=True):
            results[i] = hits_of(self._requests.found(answer))
        return results

    async def _retrieve(self, points: Sequence[PointId], with_rows: bool) -> list[Stored]:
        found: list[Stored] = []
        vectors = [self._requests.vector] if with_rows else False
        for start in range(0, len(points), _PAGE):
            call = self._client.retrieve(
                self.name,
                ids=list(points[start : start + _PAGE]),
                with_payload=True,
                with_vectors=vectors,
            )
            records = await self._asked("be read", call)
            found += [self._requests.stored(record, with_rows) for record in records]
        return found

    def _upload(
        self,
        made: Manifest,
        rows: SparseRows,
        ids: Sequence[Id],
        payloads: Sequence[Mapping[str, Any] | None] | None,
        empty: EmptyRows,
        dense: Mapping[str, Any] | None,
    ) -> Upload:
        return Upload(
            rows,
            ids,
            payloads,
            dense,
            made=made,
            limits=SERVER_LIMITS,
            empty=empty,
            where=self._where,
        )

    async def _send(self, upload: Upload) -> None:
        """Writes all batches, halving one around what the server refuses."""
        for whole in upload.batches():
            waiting: list[Batch] = [whole]
            while waiting:
                batch = waiting.pop()
                points = self._requests.points(
                    batch.points, batch.rows, batch.payloads, batch.dense
                )
                call = self._client.upsert(self.name, points=points, wait=True)
                try:
                    await self._asked("be written", call, refusable=True)
                except RefusedBatch as refusal:
                    if len(batch.points) == 1:
                        upload.refused[batch.ids[0]] = str(refusal)
                    else:
                        waiting += reversed(batch.halves())
