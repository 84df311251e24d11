"""`AsyncVDRQdrant`: a collection on a Qdrant server for programs that run in an event loop."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from vdr_db.connectors.base import (
    Documents,
    EmptyRows,
    Hit,
    Id,
    Record,
    checked_page,
)
from vdr_db.connectors.collections.collection import Encoder, Mode, needed_encoder, query_rows
from vdr_db.connectors.collections.qdrant_async_points import AsyncPoints
from vdr_db.connectors.collections.qdrant_blocking import BlockingClient
from vdr_db.connectors.collections.qdrant_twin import Twin
from vdr_db.connectors.collections.vdr_qdrant import VDRQdrant
from vdr_db.connectors.ids import checked_ids
from vdr_db.connectors.images import encode_query_image
from vdr_db.connectors.qdrant.documents import (
    checked_fusion,
    checked_nearest,
    record_of,
)
from vdr_db.connectors.qdrant.engine import (
    Datatype,
    IndexKind,
    Manifest,
)
from vdr_db.connectors.qdrant.errors import shown_url
from vdr_db.connectors.qdrant.existing import Existing, point_of
from vdr_db.connectors.qdrant.requests import Requests
from vdr_db.connectors.texts import refuse_string, text_batches
from vdr_db.connectors.validation import checked_query
from vdr_db.errors import ConfigError, RejectedRows, StoreError, require
from vdr_db.sparse import SparseRows

__all__ = ["AsyncVDRQdrant"]

_Answer = TypeVar("_Answer")
_OPTIONS = frozenset(
    (
        *("collection_options", "dense", "existing", "full_scan_threshold", "index_memory"),
        *("vector_name", "versioned"),
    )
)


class AsyncVDRQdrant:
    """A collection on a server, for `AsyncQdrantClient`.

    Methods are those of `VDRQdrant`, awaited; requests and answers are made by the same code. The
    encoder runs in a thread, one call at a time, so that the event loop goes on.

    ```python
    async with AsyncVDRQdrant("articles", encoder, client=AsyncQdrantClient(url)) as articles:
        hits = await articles.search("who came up with relativity", limit=10)
    ```

    The first awaited call looks the collection up and compares it with the encoder; the first
    `add_texts`, `add_rows` or `add_images` makes one that is not there.

    Args:
        collection: Name of the collection, or an alias of one.
        encoder: Makes vectors of texts; without one, only rows can be added and searched.
        client: A ready `qdrant_client.AsyncQdrantClient`, instead of `url`; it is not closed here.
        url: Address of a server.
        api_key: For `url`.
        prefer_grpc: For `url`: speak gRPC.
        timeout: For `url`: seconds for one request.
        client_options: For `url`, more arguments of `AsyncQdrantClient`.
        documents: `"tokens"` keeps bags of tokens instead of encoded documents (mode beta).
        store_text: Keep each text in its payload.
        text_key: Payload field of the text.
        datatype: How the index keeps weights; see `QdrantStore`, as for the rest.
        payload_indexes: Payload key → kind of index.
        options: More options of `QdrantStore` for a collection on a server, such as `dense`,
            `versioned`, `vector_name`, `index_memory` and `collection_options`.

    Raises:
        TypeError: An option is unknown.
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
        documents: Documents | None = None,
        store_text: bool = True,
        text_key: str = "text",
        datatype: Datatype | None = None,
        payload_indexes: Mapping[str, IndexKind] | None = None,
        **options: Any,
    ) -> None:
        module = require("qdrant_client", "qdrant")
        if (client is None) == (url is None):
            raise ConfigError("exactly one of `client` and `url` is needed; pass one of them.")
        unknown = sorted(set(options) - _OPTIONS)
        if unknown:
            raise TypeError(
                f"unknown options {unknown}; besides its own arguments, AsyncVDRQdrant takes "
                f"{sorted(_OPTIONS)}"
            )
        self.name = collection
        self.encoder = encoder
        self.store_text = store_text
        self.text_key = text_key
        self._closed = False
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
        self._requests = Requests(module.models, client=client)
        self._points = AsyncPoints(client, self._requests, collection, self._where, api_key)
        bridge = BlockingClient(client, self._where, api_key)
        self._twin = Twin(
            bridge,
            partial(
                VDRQdrant,
                collection,
                encoder,
                client=bridge,
                documents=documents,
                store_text=store_text,
                text_key=text_key,
                datatype=datatype,
                payload_indexes=payload_indexes,
                **options,
            ),
        )

    @classmethod
    def from_existing(
        cls,
        collection: str,
        encoder: Encoder | None = None,
        *,
        vector_name: str | None = None,
        adopt: bool = False,
        width: int | None = None,
        documents: Documents | None = None,
        **options: Any,
    ) -> AsyncVDRQdrant:
        """One that is on a server already; it is neither made nor changed.

        What is missing or does not fit is told by the first awaited call. Arguments and errors are
        those of `VDRQdrant.from_existing`.
        """
        if width is None and encoder is not None:
            width = encoder.vocabulary.size
        existing = Existing(adopt=adopt, width=width, documents=documents or "encoded")
        return cls(
            collection,
            encoder,
            documents=documents,
            vector_name=vector_name,
            existing=existing,
            **options,
        )

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
        return (await self._points.search(rows, limit, offset, filter))[0]

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
        return await self._points.search(await self._query(queries, mode), limit, 0, filter)

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
        return (await self._points.query([request]))[0]

    async def search_by_image(
        self, image: Any, limit: int = 10, filter: Any = None, *, offset: int = 0
    ) -> list[Hit]:
        """The best documents for an image; see `Collection.search_by_image`."""
        checked_page(limit, offset)
        made = await self._made()
        row = await self._twin.encoded(encode_query_image, await self._opened(), image)
        rows = checked_query(row, made.width, self._where, single=True)
        return (await self._points.search(rows, limit, offset, filter))[0]

    async def get(self, ids: Sequence[Id], with_rows: bool = False) -> list[Record]:
        """The documents of these ids in this order; unknown ids are left out."""
        made = await self._made()
        width = made.width
        wanted = [point_of(made, id) for id in checked_ids(ids)]
        found = {stored.point: stored for stored in await self._points.retrieve(wanted, with_rows)}
        return [record_of(found[p], width if with_rows else None) for p in wanted if p in found]

    async def count(self, filter: Any = None) -> int:
        """Number of documents, of those the filter keeps when one is given."""
        if (await self._opened()).store.width is None:
            return 0
        return await self._points.count(filter)

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
        encoder = needed_encoder(self.encoder, "add_texts")
        key = self.text_key if self.store_text else None
        batches = text_batches(texts, ids, payloads, size=batch_size, text_key=key)
        made = await self._to_write(encoder.vocabulary.size)
        tokens = made.documents == "tokens"
        encode = encoder.bag_of_tokens if tokens else encoder.encode_documents
        written: list[Id] = []
        refused: dict[Id, str] = {}
        for batch in batches:
            refused.update(batch.refused)
            skipped: set[Id] = set()
            if batch.texts:
                rows = await self._twin.encoded(encode, batch.texts)
                upload = await self._points.write(
                    made, rows, batch.fresh_ids, batch.payloads, empty=empty
                )
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
        if not isinstance(rows, SparseRows):
            raise TypeError(f"`rows` must be SparseRows, got {type(rows).__name__}")
        width = rows.width if self.encoder is None else self.encoder.vocabulary.size
        made = await self._to_write(width)
        upload = await self._points.write(made, rows, ids, payloads, empty=empty, dense=dense)
        if upload.refused:
            raise RejectedRows(list(upload.refused), list(upload.refused.values()))
        left_out = set(upload.written.skipped)
        return [id for id in checked_ids(ids) if id not in left_out]

    async def add_images(
        self,
        images: str | os.PathLike[str] | Iterable[Any],
        ids: Iterable[Id] | None = None,
        payloads: Iterable[Mapping[str, Any] | None] | None = None,
        *,
        batch_size: int = 256,
        empty: EmptyRows = "store",
        thumbnail_px: int | None = None,
    ) -> list[Id]:
        """Encodes and writes images; see `Collection.add_images`.

        The work is done in a thread, which does not end when the call is cancelled. Between
        batches, other calls have their turn with the encoder.
        """
        await self._opened()
        return await self._twin.beside(
            VDRQdrant.add_images,
            images,
            ids,
            payloads,
            batch_size=batch_size,
            empty=empty,
            thumbnail_px=thumbnail_px,
        )

    async def delete(self, ids: Sequence[Id]) -> int:
        """Removes documents; returns how many were there."""
        made = await self._made()
        wanted = list(dict.fromkeys(point_of(made, id) for id in checked_ids(ids)))
        return await self._points.delete(wanted)

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
            await self._opened()
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

    async def _opened(self) -> VDRQdrant:
        if self._closed:
            raise StoreError(f"{self._where} is closed; open it again to use it.")
        return await self._twin.opened()

    async def _made(self) -> Manifest:
        """What the collection is, which must be there."""
        manifest = (await self._opened())._qdrant._made()
        self._requests.vector = manifest.vector
        return manifest

    async def _to_write(self, width: int) -> Manifest:
        """What the collection is, made when it is not there yet."""
        twin = await self._opened()
        if twin.store.width is None:
            await self._twin.encoded(twin._create, width)
        return await self._made()

    async def _query(
        self, queries: Sequence[str] | SparseRows, mode: Mode | None, *, single: bool = False
    ) -> SparseRows:
        made = await self._made()
        rows = await self._twin.encoded(query_rows, queries, mode, made.documents, self.encoder)
        return checked_query(rows, made.width, self._where, single=single)
