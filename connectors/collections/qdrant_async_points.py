"""The requests of `AsyncVDRQdrant`: what `ServerEngine` does with points, awaited."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from vdr_db.connectors.base import EmptyRows, Hit, Id
from vdr_db.connectors.qdrant.documents import Batch, Upload, hits_of
from vdr_db.connectors.qdrant.engine import Manifest, PointId, RefusedBatch, Stored
from vdr_db.connectors.qdrant.errors import translated
from vdr_db.connectors.qdrant.requests import QUERIES_AT_ONCE, Requests
from vdr_db.connectors.qdrant.server import SERVER_LIMITS
from vdr_db.sparse import SparseRows

__all__ = ["AsyncPoints"]

_Answer = TypeVar("_Answer")
_PAGE = 1000


class AsyncPoints:
    """Points of one collection through an `AsyncQdrantClient`.

    Args:
        client: The client.
        requests: Builds what it sends.
        name: Of the collection, or an alias of one.
        where: The collection and its place, for messages.
        secret: A key to leave out of messages.
    """

    def __init__(
        self, client: Any, requests: Requests, name: str, where: str, secret: str | None
    ) -> None:
        self._client = client
        self._requests = requests
        self._name = name
        self._where = where
        self._secret = secret

    async def search(
        self, rows: SparseRows, limit: int, offset: int, filter: Any
    ) -> list[list[Hit]]:
        """The best points of each row; rows without entries find nothing and are not sent."""
        results: list[list[Hit]] = [[] for _ in range(len(rows))]
        asked = np.flatnonzero(rows.counts)
        requests = self._requests.searches(rows[asked], limit, offset, filter) if asked.size else []
        answers: list[list[Hit]] = []
        for start in range(0, len(requests), QUERIES_AT_ONCE):
            answers += await self.query(requests[start : start + QUERIES_AT_ONCE])
        for i, answer in zip(asked, answers, strict=True):
            results[i] = answer
        return results

    async def query(self, requests: Sequence[Any]) -> list[list[Hit]]:
        """The hits of ready queries, all in one request."""
        call = self._client.query_batch_points(self._name, requests=requests)
        answers = await self._asked("be searched", call)
        return [hits_of(self._requests.found(answer)) for answer in answers]

    async def retrieve(self, points: Sequence[PointId], with_rows: bool) -> list[Stored]:
        """The points that are there."""
        found: list[Stored] = []
        vectors = [self._requests.vector] if with_rows else False
        for start in range(0, len(points), _PAGE):
            call = self._client.retrieve(
                self._name,
                ids=list(points[start : start + _PAGE]),
                with_payload=True,
                with_vectors=vectors,
            )
            records = await self._asked("be read", call)
            found += [self._requests.stored(record, with_rows) for record in records]
        return found

    async def count(self, filter: Any) -> int:
        """Number of points the filter keeps."""
        native = self._requests.filter(filter)
        call = self._client.count(self._name, count_filter=native, exact=True)
        return int((await self._asked("be counted", call)).count)

    async def delete(self, points: Sequence[PointId]) -> int:
        """Removes points; returns how many were there."""
        there = [stored.point for stored in await self.retrieve(points, False)]
        for start in range(0, len(there), _PAGE):
            chosen = self._requests.models.PointIdsList(points=there[start : start + _PAGE])
            call = self._client.delete(self._name, points_selector=chosen, wait=True)
            await self._asked("be written", call)
        return len(there)

    async def write(
        self,
        made: Manifest,
        rows: SparseRows,
        ids: Sequence[Id],
        payloads: Sequence[Mapping[str, Any] | None] | None,
        *,
        empty: EmptyRows,
        dense: Mapping[str, Any] | None = None,
    ) -> Upload:
        """Writes rows; what is refused is named in the upload, all others are there."""
        upload = Upload(
            rows,
            ids,
            payloads,
            dense,
            made=made,
            limits=SERVER_LIMITS,
            empty=empty,
            where=self._where,
        )
        await self._send(upload)
        return upload

    async def _send(self, upload: Upload) -> None:
        """Writes all batches, halving one around what the server refuses."""
        for whole in upload.batches():
            waiting: list[Batch] = [whole]
            while waiting:
                batch = waiting.pop()
                try:
                    call = self._requests.upsert(
                        self._name, batch.points, batch.rows, batch.payloads, batch.dense
                    )
                    await self._asked("be written", call, refusable=True)
                except RefusedBatch as refusal:
                    if len(batch.points) == 1:
                        upload.refused[batch.ids[0]] = str(refusal)
                    else:
                        middle = len(batch) // 2
                        waiting += [batch[middle:], batch[:middle]]

    async def _asked(self, action: str, call: Awaitable[_Answer], **options: bool) -> _Answer:
        with translated(self._where, action, self._secret, **options):
            return await call
