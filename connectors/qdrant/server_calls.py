"""What a Qdrant server is asked about one collection: points written, found, read, counted."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from vdr_db.connectors.base import Payload
from vdr_db.connectors.qdrant.engine import Batch, Found, HybridQuery, PointId, Stored
from vdr_db.connectors.qdrant.errors import LimitExceeded, translated
from vdr_db.connectors.qdrant.requests import QUERIES_AT_ONCE, Requests
from vdr_db.connectors.retry import Retrier
from vdr_db.sparse import SparseRows

__all__ = ["ServerCalls"]

Answer = TypeVar("Answer")


class ServerCalls:
    """The part of `ServerEngine` for points."""

    _client: Any
    _models: Any
    _collection: str
    _where: str
    _secret: str | None
    _retrier: Retrier
    _requests: Requests
    _read_options: dict[str, Any]
    _write_options: dict[str, Any]
    # The most results at once; a strict mode may allow fewer.
    _most_hits = 2**32

    def upsert(self, batch: Batch) -> None:
        """Writes one batch and waits until it is visible; see `Engine.upsert`."""

        def send() -> None:
            with self._translated("be written", refusable=True):
                self._requests.upsert(self._collection, batch, self._write_options)

        self._retrier.call(send, is_splittable=len(batch) > 1)

    def search(self, rows: SparseRows, limit: int, offset: int, filter: Any) -> list[list[Found]]:
        """The best points of each row, several queries in one request."""
        return self._query(
            lambda count, start: self._requests.searches(rows, count, start, filter), limit, offset
        )

    def rankings(self, asked: HybridQuery, limit: int) -> list[list[Found]]:
        """The best points by each side, in one request; see `Engine.rankings`."""
        return self._query(
            lambda count, start: self._requests.rankings(asked, count, start), limit, 0
        )

    def groups(
        self, row: SparseRows, group_by: str, limit: int, size: int, filter: Any
    ) -> list[tuple[Any, list[Found]]]:
        """Value of a payload field → its best points, the best value first."""
        (asked,) = self._requests.searches(row, limit, 0, filter)
        answer = self._asked(
            "be searched",
            self._client.query_points_groups,
            query=asked.query,
            using=asked.using,
            query_filter=asked.filter,
            with_payload=asked.with_payload,
            group_by=group_by,
            limit=limit,
            group_size=size,
        )
        return [
            (group.id, [Found(hit.id, hit.score, hit.payload or {}) for hit in group.hits])
            for group in answer.groups
        ]

    def retrieve(
        self, points: Sequence[PointId], with_rows: bool, *, with_payload: bool = True
    ) -> list[Stored]:
        """The points that are there; see `Engine.retrieve`."""
        vector = self._requests.vector if with_rows else None
        records = self._asked(
            "be read",
            self._client.retrieve,
            ids=list(points),
            with_payload=with_payload,
            with_vectors=False if vector is None else [vector],
        )
        return [Stored.of(record, record.id, vector) for record in records]

    def scroll(
        self, after: PointId | None, limit: int, fields: Sequence[str] | None, filter: Any = None
    ) -> tuple[list[Stored], PointId | None]:
        """A page of points; see `Engine.scroll`."""
        asked: dict[str, Any] = {
            "scroll_filter": self._requests.dialect.native(filter),
            "offset": after,
            "with_payload": True if fields is None else list(fields),
        }
        try:
            records, following = self._asked(
                "be read", self._client.scroll, limit=min(limit, self._most_hits), **asked
            )
        except LimitExceeded as error:
            self._learn(error, min(limit, self._most_hits))
            return self.scroll(after, limit, fields, filter)
        return [Stored.of(record, record.id, None) for record in records], following

    def count(self, filter: Any) -> int:
        """Number of points the filter keeps."""
        native = self._requests.dialect.native(filter)
        answer = self._asked("be counted", self._client.count, count_filter=native, exact=True)
        return int(answer.count)

    def set_payload(self, payload: Payload, points: Sequence[PointId]) -> None:
        """Sets these fields of the payloads of points that are there, and waits until they are."""
        self._asked(
            "be written",
            self._client.set_payload,
            self._write_options,
            payload=payload,
            points=list(points),
            wait=True,
        )

    def delete(self, points: Sequence[PointId]) -> None:
        """Removes points and waits until they are gone."""
        selector = self._models.PointIdsList(points=list(points))
        self._asked(
            "be written",
            self._client.delete,
            self._write_options,
            points_selector=selector,
            wait=True,
        )

    def _query(
        self, make: Callable[[int, int], Sequence[Any]], limit: int, offset: int
    ) -> list[list[Found]]:
        """The answers to requests for `limit` points each, in pages that the server takes."""
        answers: list[list[Found]] = []
        done = 0
        while done < limit:
            count = min(limit - done, self._most_hits)
            try:
                page = self._answers(make(count, offset + done))
            except LimitExceeded as error:
                self._learn(error, count)
                continue
            answers = [a + b for a, b in zip(answers, page, strict=True)] if done else page
            done += count
            if all(len(one) < count for one in page):
                break
        return answers

    def _answers(self, requests: Sequence[Any]) -> list[list[Found]]:
        answers: list[list[Found]] = []
        for start in range(0, len(requests), QUERIES_AT_ONCE):
            part = requests[start : start + QUERIES_AT_ONCE]
            found = self._asked("be searched", self._client.query_batch_points, requests=part)
            answers += map(self._requests.found, found)
        return answers

    def _learn(self, error: LimitExceeded, asked: int) -> None:
        """Takes the server's limit of results for the pages to come, if it is smaller than ours."""
        if not 0 < error.limit < asked:
            raise error
        self._most_hits = error.limit

    def _asked(
        self,
        action: str,
        method: Callable[..., Answer],
        options: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> Answer:
        """The answer of a client's method about this collection; asked again where that helps."""
        given = self._read_options if options is None else options
        known = inspect.signature(method).parameters
        arguments.update({n: v for n, v in given.items() if n in known and n not in arguments})

        def ask() -> Answer:
            with self._translated(action):
                return method(self._collection, **arguments)

        return self._retrier.call(ask)

    def _translated(self, action: str, *, refusable: bool = False) -> AbstractContextManager[None]:
        return translated(self._where, action, self._secret, refusable=refusable)
