"""Concurrent writers behind a queue bounded in bytes.

A piece is some rows with their ids. `WriterPool.submit` blocks while more than the allowed bytes
wait or are being written, so memory does not grow with the corpus. Writers cut pieces to the
current batch limit, try again what may pass, halve what is too big, isolate what is refused, and
report each record exactly once: acknowledged or refused. Two pieces with one id are never in
flight together, so the later record of an input wins, whatever is retried.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from vdr_db.connectors.failures import classify
from vdr_db.connectors.halving import RefusedBatch, deliver
from vdr_db.connectors.retry import Allowance, Retrier, RetryPolicy, Stopped
from vdr_db.errors import VdrError
from vdr_db.failure import Failure
from vdr_db.ingest.batches import BatchLimit, Piece
from vdr_db.ingest.quarantine import Refusal

__all__ = ["WriterPool"]


class _Writer:
    """One thread's tries, and what it spent; no thread adds to another's number."""

    def __init__(self, retrier: Retrier) -> None:
        self.retrier = retrier
        self.splits = 0
        self.write_s = 0.0


class WriterPool:
    """Writer threads and the queue in front of them.

    Args:
        write: `write(rows, ids, payloads)`, with the rows of a piece: returns once the store has
            acknowledged all of them.
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
        write: Callable[[Any, list[int | str], list[dict[str, Any]]], object],
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
        self._writers = [
            _Writer(Retrier(policy, stop=self.aborting, seed=i)) for i in range(writers)
        ]
        self._write = write
        self._limit = limit
        self._queue_bytes = queue_bytes
        self._on_acknowledged = on_acknowledged
        self._on_refused = on_refused
        self._after_write = after_write
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Piece, int]] = deque()
        self._bytes = 0
        self._unfinished = 0
        self._ids_in_flight: Counter[int | str] = Counter()
        self.failure: BaseException | None = None
        self._closing = False
        self._threads = [
            threading.Thread(target=self._run, args=(one,), name=f"vdr-writer-{i}", daemon=True)
            for i, one in enumerate(self._writers)
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
    def retries(self) -> int:
        """Calls repeated after a failure."""
        return sum(one.retrier.retries for one in self._writers)

    @property
    def splits(self) -> int:
        """Batches cut in two."""
        return sum(one.splits for one in self._writers)

    @property
    def write_s(self) -> float:
        """Seconds inside of the store's write, over all writers."""
        return sum(one.write_s for one in self._writers)

    def submit_in_parts(
        self,
        piece: Piece,
        nbytes: int,
        documents: int,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """`submit` of a piece of any length in parts of so many documents at most."""
        for start in range(0, len(piece), documents):
            part = piece[start : start + documents]
            self.submit(part, nbytes * len(part) // len(piece), tick)

    def submit(self, piece: Piece, nbytes: int, tick: Callable[[], None] = lambda: None) -> None:
        """Hands a piece over; waits while the queue is full or holds one of its ids.

        `tick` is called at least every 0.2 s meanwhile and raises to give up; what stopped the
        writers is raised too. `nbytes` is the memory the piece takes.
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
        """Returns when everything submitted is settled; raises what stopped the writers."""
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
        if self.failure is not None:
            raise self.failure

    def _run(self, writer: _Writer) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if not self._waiting or self.failure is not None:
                    return
                piece, nbytes = self._waiting.popleft()
            try:
                allowance = Allowance(writer.retrier)
                deliver(
                    piece,
                    partial(self._write_part, writer, allowance),
                    lambda one, error: self._on_refused([one.refusal(0, str(error))]),
                    fitting=self._limit.cut,
                )
            except BaseException as error:  # a panic of an engine is no Exception
                if isinstance(error, Stopped) and self.aborting.is_set():
                    return
                with self._changed:
                    self.failure = self.failure or error
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

    def _write_part(self, writer: _Writer, allowance: Allowance, piece: Piece) -> None:
        """Writes one request; a `RefusedBatch` must go in parts, or is one refused row."""
        while True:
            try:
                allowance.attempt(partial(self._write_now, writer, piece))
            except BaseException as error:
                failure = classify(error)
                if self.aborting.is_set():
                    raise Stopped("the ingest is stopping at once.") from error
                if failure.rejected is not None:
                    self._isolated(piece, failure, error)
                    break
                self._failed(writer, allowance, piece, failure, error)
            else:
                self._limit.succeeded()
                self._on_acknowledged(piece)
                break
        allowance.progress()
        self._after_write()

    def _write_now(self, writer: _Writer, piece: Piece) -> None:
        began = time.monotonic()
        try:
            self._write(piece.rows, list(piece.ids), list(piece.payloads))
        finally:
            writer.write_s += time.monotonic() - began

    def _failed(
        self,
        writer: _Writer,
        allowance: Allowance,
        piece: Piece,
        failure: Failure,
        error: BaseException,
    ) -> None:
        """Returns when the piece may be written again as it is; raises in all other cases."""
        what = f"writing {len(piece)} documents (records {piece.numbers[0]} to {piece.numbers[-1]})"
        is_passing = failure.kind in ("transient", "timeout")
        if is_passing:
            if failure.kind == "timeout" and allowance.failures:
                # Once may be chance; the same batch late twice is a batch too large.
                self._limit.too_slow(len(piece))
            allowance.wait(failure, error, what)
        elif failure.kind == "fatal" and not isinstance(error, VdrError):
            raise VdrError(
                f"the store failed while {what}: {failure.reason}; this is not retried: look at "
                "the store before you resume."
            ) from error
        elif failure.kind in ("setup", "fatal"):
            raise error
        if failure.wants_split and len(piece) > 1:
            self._limit.too_big(len(piece))
        if not is_passing or self._limit.cut(piece) < len(piece):
            writer.splits += len(piece) > 1
            too_large = "too large: " if failure.kind == "too_big" else ""
            raise RefusedBatch(too_large + failure.reason) from error

    def _isolated(self, piece: Piece, failure: Failure, error: BaseException) -> None:
        """Parts the rows that the store refused by name from those it has written."""
        named = failure.rejected or {}
        refused = [i for i, id in enumerate(piece.ids) if id in named]
        if not refused:
            raise VdrError(
                f"the store refused ids that were not sent ({failure.reason}); "
                "this is a fault of its connector."
            ) from error
        self._on_refused([piece.refusal(i, named[piece.ids[i]]) for i in refused])
        left = np.setdiff1d(np.arange(len(piece)), refused)
        if left.size:
            self._on_acknowledged(piece.chosen(left))
