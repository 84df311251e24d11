"""Batches that are refused as a whole are taken apart around the culprit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

__all__ = ["RefusedBatch", "deliver"]


class RefusedBatch(Exception):
    """Something in a batch is refused, or all of it is too much at once; nothing is written."""


class _Batch(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Any: ...


Batch = TypeVar("Batch", bound=_Batch)


def deliver(
    batch: Batch,
    attempt: Callable[[Batch], object],
    refuse: Callable[[Batch, Exception], object],
    *,
    refusing: type[Exception] = RefusedBatch,
    fitting: Callable[[Batch], int] = len,
) -> None:
    """Hands a batch over in order, in as few parts as it takes to leave out what is refused.

    A part that is refused is halved, so that the neighbours of a culprit get through.

    Args:
        batch: Anything with a length and slices; nothing is done for an empty one.
        attempt: Takes a part, or raises `refusing`.
        refuse: Gets each single item that is refused, and why.
        refusing: The exception that means a refusal.
        fitting: How many leading items may go at once, at least 1; asked anew before each attempt.
    """
    waiting = [batch]
    while waiting:
        part = waiting.pop()
        size = fitting(part)
        if 0 < size < len(part):
            waiting += [part[size:], part[:size]]
            continue
        try:
            if size:
                attempt(part)
        except refusing as error:
            if len(part) == 1:
                refuse(part, error)
            else:
                middle = len(part) // 2
                waiting += [part[middle:], part[:middle]]
