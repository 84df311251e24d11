"""The server behind an application: connections that say nothing go, and stopping loses nothing."""

from __future__ import annotations

import asyncio
import socket
from functools import partial
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from vdr_db.budget import Budget
from vdr_db.serve.guard import State

__all__ = ["make_server"]

GRACE_S = 10
"""Until requests that are going on are given up, once a service stops."""
DRAIN_S = 0.5
"""While a service stops: requests still come, and each connection closes after its next answer."""
_READ_S = 0.1


class _Connection(H11Protocol):
    """A connection that must say what it wants.

    A request's headers must be there in time; when there are too many connections, the oldest that
    waits for a request is closed.
    """

    def __init__(self, *arguments: Any, budget: Budget, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.budget = budget
        self.born = self.loop.time()
        self._given_up: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        if len(self.connections) > self.budget.connections:
            others = [one for one in self.connections if isinstance(one, _Connection)]
            others = [one for one in others if not one.transport.is_closing() and one is not self]
            waiting = [one for one in others if not one._is_busy()]
            if waiting and len(others) >= self.budget.connections:
                min(waiting, key=lambda one: one.born).transport.close()
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._given_up is not None:
            self._given_up.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._is_busy():
            self._expect_request()

    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_request(self) -> None:
        if self._given_up is None:
            self._given_up = self.loop.call_later(self.budget.first_byte_s, self._give_up)

    def _give_up(self) -> None:
        self._given_up = None
        is_kept = self.cycle is not None and not self.conn.trailing_data[0]
        if self._is_busy() or is_kept or self.transport.is_closing():
            return  # a connection between two requests has a time of its own
        said = f"No request came within {self.budget.first_byte_s:g} s.".encode()
        headers = [("content-type", "text/plain; charset=utf-8"), ("connection", "close")]
        headers.append(("content-length", str(len(said))))
        events = (
            h11.Response(status_code=408, headers=headers, reason=b"Request Timeout"),
            h11.Data(data=said),
            h11.EndOfMessage(),
        )
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class _Server(uvicorn.Server):
    """A server that answers every request it was sent before it stops."""

    def __init__(self, config: uvicorn.Config, state: State, budget: Budget) -> None:
        super().__init__(config)
        self.state, self.budget = state, budget

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Closes connections after their next answer, then the port, then what is left."""
        self.state.is_stopping = True
        await asyncio.sleep(DRAIN_S)
        # Who has connected by now is still answered: a second descriptor keeps the port open while
        # the loop lets go of it, and gives what lies in its queue.
        spares = [one.dup() for one in sockets or []]
        for server in self.servers:
            server.close()
        for spare in spares:
            spare.setblocking(False)
            late = []
            while True:
                try:
                    late.append(spare.accept()[0])
                except OSError:
                    break
            spare.close()
            for one in late:
                await asyncio.get_running_loop().connect_accepted_socket(self._connection, one)
        await asyncio.sleep(_READ_S)
        await super().shutdown(sockets)

    def _connection(self) -> _Connection:
        return _Connection(self.config, self.server_state, self.lifespan.state, budget=self.budget)


def make_server(app: FastAPI) -> uvicorn.Server:
    """The server of an application of `make_app`: quiet, with the bounds of its budget."""
    budget: Budget = app.state.budget
    config = uvicorn.Config(
        app,
        http=partial(_Connection, budget=budget),  # type: ignore[arg-type]
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        # uvicorn reads it as whole seconds, and takes any number
        timeout_keep_alive=budget.idle_s,  # type: ignore[arg-type]
        timeout_graceful_shutdown=GRACE_S,
        ws="none",
        backlog=128,
    )
    return _Server(config, app.state.service, budget)
