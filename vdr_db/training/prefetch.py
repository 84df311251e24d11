"""Batches made ahead of time: read and tokenised by a thread while the model learns."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["ahead"]

T = TypeVar("T")


def ahead(stream: Iterator[T], size: int) -> Iterator[T]:
    """The same items, made by a thread up to `size` ahead; its errors are raised here."""
    with ThreadPoolExecutor(1, "training-data") as pool:
        waiting = deque(pool.submit(next, stream, None) for _ in range(size))
        try:
            while (item := waiting.popleft().result()) is not None:
                waiting.append(pool.submit(next, stream, None))
                yield item
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
