"""The synchronous twin of an asynchronous collection, and the threads in which it works."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, cast

from vdr_db.connectors.collections.collection import Encoder
from vdr_db.connectors.collections.qdrant_blocking import BlockingClient
from vdr_db.connectors.collections.vdr_qdrant import VDRQdrant

__all__ = ["Twin"]

_Answer = TypeVar("_Answer")


class Twin:
    """A `VDRQdrant` that opens, makes and describes the collection an event loop works with.

    The encoder runs in a thread too, one call at a time, as encoders expect.

    Args:
        bridge: The client of the twin.
        open: Makes the twin, for a thread: it looks the collection up and compares the encoder.
    """

    def __init__(self, bridge: BlockingClient, open: Callable[[], VDRQdrant]) -> None:
        self._bridge = bridge
        self._open = open
        self._collection: VDRQdrant | None = None
        self._opening, self._encoding = asyncio.Lock(), asyncio.Lock()

    async def opened(self) -> VDRQdrant:
        """The twin, opened once."""
        async with self._opening:
            self._bridge.loop = asyncio.get_running_loop()
            if self._collection is None:
                self._collection = await self.encoded(self._open)
        return self._collection

    async def encoded(self, function: Callable[..., _Answer], *arguments: Any) -> _Answer:
        """Work with the encoder, in a thread, when it is free."""
        async with self._encoding:
            return await asyncio.to_thread(function, *arguments)

    async def beside(
        self, method: Callable[..., _Answer], *arguments: Any, **options: Any
    ) -> _Answer:
        """A long method of the opened twin, in a thread; it shares the encoder with other calls."""
        work = copy.copy(await self.opened())
        if hasattr(work.encoder, "encode_images"):
            work.encoder = cast(Encoder, _InTurn(work.encoder, self._turn))
        return await asyncio.to_thread(method, work, *arguments, **options)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        loop = self._bridge.loop
        assert loop is not None
        asyncio.run_coroutine_threadsafe(self._encoding.acquire(), loop).result()
        try:
            yield
        finally:
            loop.call_soon_threadsafe(self._encoding.release)


class _InTurn:
    """An encoder whose `encode_images` waits until nobody else uses it."""

    def __init__(self, encoder: Any, turn: Callable[[], AbstractContextManager[None]]) -> None:
        self._encoder = encoder
        self._turn = turn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def encode_images(self, *arguments: Any, **options: Any) -> Any:
        with self._turn():
            return self._encoder.encode_images(*arguments, **options)
