"""Concurrent writers behind a queue bounded in bytes.

A piece is some rows with their ids. `WriterPool.submit` blocks while more than the allowed bytes
wait or are being written, so memory does not grow with the corpus. Writers cut pieces to the
current batch limit, try again what may pass, halve what is too big, isolate what is refused, and
report each record exactly once: acknowledged or refused. Two pieces with one id are never in
flight together, so the later record of an input wins, whatever is retried.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from vdr_db.errors import StoreUnavailable, VdrError
from vdr_db.ingest.batches import BatchLimit, Piece
from vdr_db.ingest.quarantine import Refusal
from vdr_db.ingest.retry import Failure, RetryPolicy, classify
from vdr_db.sparse import SparseRows

__all__ = ["Aborted", "Effort", "Retrier", "WriterPool"]

Result = TypeVar("Result")


class Aborted(Exception):
    """The ingest is stopping at once; what is not acknowledged stays unsettled."""


@dataclass
class Effort:
    """What one writer spent; summed by the pool, so that no thread adds to another's number.

    Attributes:
        retries: Calls repeated after a failure.
        splits: Batches cut in two.
        write_s: Seconds inside of the store's write.
    """

    retries: int = 0
    splits: int = 0
    write_s: float = 0.0


class Retrier:
    """Repeats calls that may pass later, and waits in between so that a stop ends the wait.

    Args:
        policy: How often and how long.
        effort: Where retries are counted.
        aborting: Set when the ingest stops at once.
        seed: Seed of the jitter.
    """

    def __init__(
        self, policy: RetryPolicy, effort: Effort, aborting: threading.Event, seed: int
    ) -> None:
        self.effort = effort
        self._policy = policy
        self._aborting = aborting
        self._chance = random.Random(seed)

    def call(self, what: str, function: Callable[[], Result]) -> Result:
        """The function's result, after as many tries as the policy allows.

        Raises:
            StoreUnavailable: It failed transiently until tries or time ran out.
            Aborted: The ingest is stopping.
        """
        failures, began = 0, time.monotonic()
        while True:
            if self._aborting.is_set():
                raise Aborted
            try:
                return function()
            except Exception as error:
                failure = classify(error)
                if failure.kind not in ("transient", "timeout"):
                    raise
                failures += 1
                self.wait(what, failures, began, failure, error)

    def wait(
        self, what: str, failures: int, began: float, failure: Failure, error: BaseException
    ) -> None:
        """Waits before the next try, or raises when there must not be one."""
        delay_s = self._policy.delay_s(failures, failure.retry_after_s, self._chance)
        spent_s = time.monotonic() - began
        if failures >= self._policy.tries or spent_s + delay_s > self._policy.deadline_s:
            raise StoreUnavailable(
                f"{what} failed {failures} times in {spent_s:.0f} s, last with: {failure.reason}"
            ) from error
        self.effort.retries += 1
        if self._aborting.wait(delay_s):
            raise Aborted


@dataclass
class _Job:
    """A part of a piece that is being written, with its history of failures."""

    piece: Piece
    failures: int = 0
    began: float = field(default_factory=time.monotonic)


class WriterPool:
    """Writer threads and the queue in front of them.

    Args:
        write: `write(rows, ids, payloads)`: returns once the store has acknowledged all of them.
        writers: Number of threads.
        limit: Batch limit, shared by the writers.
        queue_bytes: Most bytes waiting or being written; one piece may exceed it alone.
        policy: Retries.
        on_acknowledged: Called with each acknowledged piece, from a writer thread.
        on_refused: Called with each refusal, from a writer thread; raises to stop the ingest.
        after_write: Called after each settled request from the writer thread, for checkpoints.
    """

    def __init__(
        self,
        write: Callable[[SparseRows, list[int | str], list[dict[str, Any]]], Any],
        *,
        writers: int,
        limit: BatchLimit,
        queue_bytes: int,
        policy: RetryPolicy,
        on_acknowledged: Callable[[Piece], None],
        on_refused: Callable[[Sequence[Refusal]], None],
        after_write: Callable[[], None],
    ) -> None:
        self.aborting = threading.Event()
        self._efforts = [Effort() for _ in range(writers)]
        self._write = write
        self._limit = limit
        self._queue_bytes = queue_bytes
        self._policy = policy
        self._on_acknowledged = on_acknowledged
        self._on_refused = on_refused
        self._after_write = after_write
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Piece, int]] = deque()
        self._bytes = 0
        self._unfinished = 0
        self._ids_in_flight: Counter[int | str] = Counter()
        self._failure: BaseException | None = None
        self._closing = False
        self._threads = [
            threading.Thread(target=self._run, args=(i,), name=f"vdr-writer-{i}", daemon=True)
            for i in range(writers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def queued_bytes(self) -> int:
        """Bytes waiting or being written."""
        return self._bytes

    def ids_in_flight(self, ids: Iterable[int | str]) -> set[int | str]:
        """Those of the ids that wait or are being written."""
        with self._changed:
            return {id for id in ids if id in self._ids_in_flight}

    @property
    def effort(self) -> Effort:
        """What all writers spent together."""
        return Effort(
            sum(one.retries for one in self._efforts),
            sum(one.splits for one in self._efforts),
            sum(one.write_s for one in self._efforts),
        )

    def submit(self, piece: Piece, nbytes: int, tick: Callable[[], None] = lambda: None) -> None:
        """Hands a piece over; blocks while the queue is full or holds one of its ids.

        Args:
            piece: The rows; not empty, ids distinct.
            nbytes: Memory the piece takes.
            tick: Called at least every 0.2 s while blocked; raises to give up.

        Raises:
            BaseException: What stopped the writers.
        """
        with self._changed:
            while True:
                self._raise_failure()
                is_room = self._bytes == 0 or self._bytes + nbytes <= self._queue_bytes
                if is_room and self._ids_in_flight.keys().isdisjoint(piece.ids):
                    break
                self._changed.wait(0.2)
                tick()
            self._waiting.append((piece, nbytes))
            self._bytes += nbytes
            self._unfinished += 1
            self._ids_in_flight.update(piece.ids)
            self._changed.notify_all()

    def drain(self, tick: Callable[[], None] = lambda: None) -> None:
        """Returns when everything submitted is settled.

        Raises:
            BaseException: What stopped the writers.
        """
        with self._changed:
            while self._unfinished:
                self._raise_failure()
                self._changed.wait(0.2)
                tick()
            self._raise_failure()

    def close(self, *, abort: bool, patience_s: float = 10.0) -> None:
        """Ends the threads; with `abort` they stop before their next request.

        A thread that hangs in a request longer than `patience_s` is left behind; its answer is
        ignored.
        """
        with self._changed:
            self._closing = True
            if abort:
                self.aborting.set()
                self._waiting.clear()
            self._changed.notify_all()
        until = time.monotonic() + patience_s
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self, number: int) -> None:
        retrier = Retrier(self._policy, self._efforts[number], self.aborting, seed=number)
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if not self._waiting or self._failure is not None:
                    return
                piece, nbytes = self._waiting.popleft()
            try:
                self._settle(piece, retrier)
            except Aborted:
                return
            except BaseException as error:  # a panic of an engine is no Exception
                with self._changed:
                    self._failure = self._failure or error
                    self.aborting.set()
                    self._changed.notify_all()
                return
            with self._changed:
                self._bytes -= nbytes
                self._unfinished -= 1
                self._ids_in_flight.subtract(piece.ids)
                for id in piece.ids:
                    if self._ids_in_flight[id] <= 0:
                        del self._ids_in_flight[id]
                self._changed.notify_all()

    def _settle(self, piece: Piece, retrier: Retrier) -> None:
        """Writes a piece in as many requests as it takes."""
        jobs = [_Job(piece)]
        while jobs:
            job = jobs.pop()
            size = self._limit.cut(job.piece)
            if size < len(job.piece):
                rest = _Job(job.piece.part(size, len(job.piece)), job.failures, job.began)
                jobs.append(rest)
                job = _Job(job.piece.part(0, size), job.failures, job.began)
            jobs.extend(reversed(self._attempt(job, retrier)))
            self._after_write()

    def _attempt(self, job: _Job, retrier: Retrier) -> list[_Job]:
        """One request; returns what is left to do, in order."""
        if self.aborting.is_set():
            raise Aborted
        piece = job.piece
        try:
            began = time.monotonic()
            try:
                self._write(piece.rows, list(piece.ids), list(piece.payloads))
            finally:
                retrier.effort.write_s += time.monotonic() - began
        except BaseException as error:
            failure = classify(error)
            if self.aborting.is_set():
                raise Aborted from error
            if failure.kind == "data":
                return self._isolated(job, failure, error, retrier.effort)
            if failure.kind == "too_big":
                if len(piece) == 1:
                    self._on_refused([piece.refusal(0, f"too large: {failure.reason}")])
                    return []
                self._limit.too_big(len(piece))
                return _halves(job, retrier.effort)
            if failure.kind in ("transient", "timeout"):
                job.failures += 1
                if failure.kind == "timeout" and job.failures > 1:
                    # Once may be chance; the same batch late twice is a batch too large.
                    self._limit.too_slow(len(piece))
                what = f"writing {len(piece)} documents ({_span(piece)})"
                retrier.wait(what, job.failures, job.began, failure, error)
                return [job]
            if failure.kind == "fatal" and not isinstance(error, VdrError):
                raise VdrError(
                    f"the store failed while writing {len(piece)} documents ({_span(piece)}): "
                    f"{failure.reason}; this is not retried: look at the store before you resume."
                ) from error
            raise
        self._limit.succeeded()
        self._on_acknowledged(piece)
        return []

    def _isolated(
        self, job: _Job, failure: Failure, error: BaseException, effort: Effort
    ) -> list[_Job]:
        piece = job.piece
        if failure.rejected is not None:
            refused = [i for i, id in enumerate(piece.ids) if id in failure.rejected]
            if not refused:
                raise VdrError(
                    f"the store refused ids that were not sent ({failure.reason}); "
                    "this is a fault of its connector."
                ) from error
            self._on_refused([piece.refusal(i, failure.rejected[piece.ids[i]]) for i in refused])
            left = np.setdiff1d(np.arange(len(piece)), refused)
            if left.size:
                self._on_acknowledged(piece.chosen(left))
            return []
        if len(piece) == 1:
            self._on_refused([piece.refusal(0, failure.reason)])
            return []
        return _halves(job, effort)


def _halves(job: _Job, effort: Effort) -> list[_Job]:
    middle = len(job.piece) // 2
    effort.splits += 1
    parts = (job.piece.part(0, middle), job.piece.part(middle, len(job.piece)))
    return [_Job(part, job.failures, job.began) for part in parts]


def _span(piece: Piece) -> str:
    return f"records {piece.numbers[0]} to {piece.numbers[-1]}"
