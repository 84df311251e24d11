"""Asking an ingest to stop: once to finish what is on its way, twice to drop it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Stop", "stop_on_signals"]


class Stop:
    """A request to stop, from any thread or signal handler.

    The first `request` ends reading: what was read is encoded no further, what is encoded is
    written, everything acknowledged is committed. The second drops what is not yet acknowledged.
    """

    def __init__(self) -> None:
        self._first = threading.Event()
        self._second = threading.Event()

    def request(self) -> None:
        """Asks to stop; asks to stop at once when asked before."""
        if self._first.is_set():
            self._second.set()
        self._first.set()

    @property
    def is_requested(self) -> bool:
        """Whether reading should end."""
        return self._first.is_set()

    @property
    def is_urgent(self) -> bool:
        """Whether even what is on its way should be dropped."""
        return self._second.is_set()


@contextmanager
def stop_on_signals(stop: Stop) -> Iterator[Stop]:
    """Lets SIGINT and SIGTERM request the stop inside of the block; main thread only.

    Schedulers send SIGTERM before they kill, so it drains just as Ctrl-C does.
    """

    def handle(_number: int, _frame: FrameType | None) -> None:
        stop.request()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
