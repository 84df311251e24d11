"""An `AsyncQdrantClient` for code that blocks and runs in a thread.

What is rare and long (looking a collection up, making it with its indexes, adopting one) is written
once, for `QdrantClient`. With this it also works through a client that belongs to an event loop:
the thread waits, the loop goes on and does the talking.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["BlockingClient"]


class BlockingClient:
    """The methods of an asynchronous client, each waiting for its answer.

    Never call one in the thread of the loop: it would wait for itself.

    Args:
        client: A `qdrant_client.AsyncQdrantClient`.
        where: The collection and its place, for messages.
        secret: A key to leave out of messages.

    Attributes:
        loop: The loop the client works in; set before any call.
    """

    def __init__(self, client: Any, where: str, secret: str | None) -> None:
        self._asynchronous = client
        self.where = where
        self.secret = secret
        self.loop: asyncio.AbstractEventLoop | None = None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """The method of that name, for a thread.

        Raises:
            AttributeError: There is none.
        """
        if name.startswith("_"):
            raise AttributeError(name)
        method = getattr(self._asynchronous, name)
        if not inspect.iscoroutinefunction(method):
            raise AttributeError(name)

        @functools.wraps(method)
        def wait(*arguments: Any, **options: Any) -> Any:
            assert self.loop is not None
            call = method(*arguments, **options)
            return asyncio.run_coroutine_threadsafe(call, self.loop).result()

        return wait
