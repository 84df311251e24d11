"""Texts of many requests, encoded in few calls.

While one call runs, requests queue up; the next call takes all of them. So nobody waits for a
timer: a single client gets its answer as fast as without, and many share the cost of a call. A
text's vector depends on that text alone, so its bits are the same in any company.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, Protocol

from vdr_db.errors import StoreUnavailable
from vdr_db.forks import renew_after_fork
from vdr_db.sparse import SparseRows

__all__ = ["Batcher", "Side"]

Side = Literal["query", "document"]


class _Encoder(Protocol):
    def encode_documents(self, texts: Sequence[str], /) -> SparseRows: ...

    def encode_queries(self, texts: Sequence[str], /) -> SparseRows: ...


@dataclass(frozen=True)
class _Job:
    side: Side
    texts: Sequence[str]
    done: Future[SparseRows] = field(default_factory=Future)


class Batcher:
    """An encoder asked by many threads through one.

    Args:
        encoder: Makes the vectors.
        most: Texts of several jobs that are encoded together.
        watch: Called after each call with its texts and seconds.
    """

    def __init__(
        self, encoder: _Encoder, *, most: int, watch: Callable[[int, float], None] | None = None
    ) -> None:
        # Queries by their tokens alone come from something that encodes no documents.
        document = getattr(encoder, "encode_documents", encoder.encode_queries)
        self._encode = {"query": encoder.encode_queries, "document": document}
        self._most = most
        self.watch = watch
        self._is_closed = False
        self._begin()
        renew_after_fork(self)

    def _begin(self) -> None:
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def after_fork(self) -> None:
        """A thread of its own, as the parent's is not here, nor are those who wait for its jobs."""
        self._begin()

    def submit(self, side: Side, texts: Sequence[str]) -> Future[SparseRows]:
        """The rows of texts, as soon as they are there.

        Raises:
            StoreUnavailable: It is closed.
        """
        job = _Job(side, texts)
        with self._changed:
            if self._is_closed:
                raise StoreUnavailable("the service has stopped; start it again.")
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="vdr-db-encoder", daemon=True
                )
                self._thread.start()
            self._waiting.append(job)
            self._changed.notify()
        return job.done

    def close(self) -> None:
        """Ends the thread once every job is done."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while jobs := self._next():
            for side in dict.fromkeys(job.side for job in jobs):
                together = [job for job in jobs if job.side == side]
                self._answer(side, [j for j in together if j.done.set_running_or_notify_cancel()])

    def _next(self) -> list[_Job]:
        """Jobs that go together; none once it is closed and all are done."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            jobs: list[_Job] = []
            room = self._most
            while self._waiting and (not jobs or len(self._waiting[0].texts) <= room):
                jobs.append(self._waiting.popleft())
                room -= len(jobs[-1].texts)
            return jobs

    def _answer(self, side: Side, jobs: list[_Job]) -> None:
        texts = [text for job in jobs for text in job.texts]
        if not texts:
            return
        start = time.perf_counter()
        try:
            rows = self._encode[side](texts)
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].done.set_exception(error)
                return
            for job in jobs:  # the others get their rows
                self._answer(side, [job])
            return
        if self.watch is not None:
            self.watch(len(texts), time.perf_counter() - start)
        at = 0
        for job in jobs:
            job.done.set_result(rows[at : at + len(job.texts)])
            at += len(job.texts)
