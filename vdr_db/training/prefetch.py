"""Batches made ahead of time: tokenised by a thread while the model learns."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from vdr_db.text.tokenization import TokenizedTexts
from vdr_db.training.data import Batch

__all__ = ["TokenBatch", "ahead"]


ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class TokenBatch:
    """A batch, tokenised, and its place in the data."""

    batch: Batch
    queries: TokenizedTexts
    documents: TokenizedTexts
    epoch: int
    number: int


def ahead(stream: Iterator[ItemT], size: int) -> Iterator[ItemT]:
    """The same items, made by a thread up to `size` ahead; its errors are raised here."""
    if not size:
        yield from stream
        return
    ready: queue.Queue[ItemT | BaseException] = queue.Queue(size)
    stopped = threading.Event()

    def offer(item: ItemT | BaseException) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for tokens in stream:
                offer(tokens)
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
