"""Batches made ahead of time: read and tokenised by a thread while the model learns."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

__all__ = ["ahead"]

T = TypeVar("T")


def ahead(stream: Iterator[T], size: int) -> Iterator[T]:
    """The same items, made by a thread up to `size` ahead; its errors are raised here."""
    ready: queue.Queue[T | BaseException] = queue.Queue(size)
    stopped = threading.Event()

    def offer(item: T | BaseException) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for item in stream:
                offer(item)
                if stopped.is_set():
                    return
        except BaseException as error:  # the consumer raises it
            offer(error)

    thread = threading.Thread(target=produce, name="training-data", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
