"""What stands before every request: who may ask, how much, and what browsers must keep to."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import json
import re
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping, Sequence
from contextlib import suppress
from typing import Any

from vdr_db.budget import Budget
from vdr_db.serve.watch import Watch

__all__ = ["Guard", "State", "refusal", "wants_page"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; img-src 'self' data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # With "no-referrer" a form of our own pages would be sent with the origin "null".
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
OPEN = ("/healthz", "/readyz")
"""Asked by whatever runs the service, without a key and however much is going on."""
# A form's own lines come on top of the file.
_FORM_BYTES = 64 * 1024
_HOST = re.compile(r"(\[[^\[\]]+\]|[^:\[\]]+)(:[0-9]*)?")
_PROGRAMS = ("/api/", "/documents", "/metrics", "/openapi.json", *OPEN)
_EMBED = "/embed_sparse"


class State:
    """What the parts of a running service tell each other.

    Attributes:
        is_stopping: Whether connections are closed after their next answer.
        active: Requests that are going on.
    """

    def __init__(self) -> None:
        self.is_stopping = False
        self.active = 0


class _RefusedError(Exception):
    """The body went over a limit while it was read."""


class Guard:
    """Refuses foreign hosts, foreign pages, strangers and large bodies, and sets every header.

    A page elsewhere can point a name of its own at 127.0.0.1 and then read answers as its own. Such
    a request carries that name in `Host`, so only addresses, `localhost` and named hosts pass. It
    can also send a form here, and browsers say so in `Origin` and `Sec-Fetch-Site`.

    Args:
        app: What is guarded.
        budget: How much may be asked for.
        hosts: Names that pass besides `localhost` and addresses.
        key: What a request must bring as `Authorization: Bearer`, as the password of a browser, or
            as `api-key`; None lets everybody in.
        watch: Is told of every answer.
        state: Of the service.
        paths: That the application serves.
    """

    def __init__(
        self,
        app: Application,
        budget: Budget,
        *,
        hosts: Sequence[str] = (),
        key: str | None = None,
        watch: Watch,
        state: State,
        paths: Collection[str] = (),
    ) -> None:
        self.app = app
        self.budget = budget
        self.most = budget.upload_bytes + _FORM_BYTES
        self.hosts = {host.lower() for host in hosts}
        self.key = None if key is None else key.encode()
        self.watch = watch
        self.state = state
        self.paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        start, status, size = time.perf_counter(), 500, 0

        async def watched_send(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                self._complete(message)
            else:
                size += len(message.get("body", b""))
                if scope["method"] == "HEAD":
                    message = {**message, "body": b""}
            await send(message)

        self.state.active += 1
        self.watch.active.inc()
        try:
            await self._handle(scope, receive, watched_send)
        finally:
            self.state.active -= 1
            self.watch.active.dec()
            path = scope["path"]
            label = path if path in self.paths else "other"
            client = scope["client"][0] if scope.get("client") else ""
            seconds = time.perf_counter() - start
            self.watch.answered(client, scope["method"], path, label, status, size, seconds)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = {name.lower(): value for name, value in scope["headers"]}
        is_read = scope["method"] in ("GET", "HEAD")
        refused = self._refused(scope, given, is_read)
        if refused is not None:
            # A connection that closes on unread bytes is reset, and takes the answer with it.
            if not is_read and _fits(given.get(b"content-length", b"none"), _FORM_BYTES):
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(_read_on(receive), self.budget.body_s)
            await _refuse(send, scope, *refused)
        elif is_read:
            await self.app(_as_get(scope), receive, self._bounded(send, scope))
        else:
            await self._receive_body(scope, receive, self._bounded(send, scope))

    def _refused(
        self, scope: Scope, given: Mapping[bytes, bytes], is_read: bool
    ) -> tuple[int, str, dict[str, str]] | None:
        """Status, reason and headers where a request is refused before its body is read."""
        host, path = given.get(b"host", b"").decode("latin-1"), scope["path"]
        if not self._knows(host):
            return 421, "This host name is not served here.", {}
        if not is_read and self._is_foreign(given, host):
            return 403, "A page of another site cannot send this here.", {}
        if path in OPEN:
            return None
        if self.key is not None and not self._has_key(given):
            scheme = "Basic" if wants_page(scope) else "Bearer"
            asked = {"www-authenticate": f'{scheme} realm="vdr-db"'}
            return 401, "An API key is needed here.", asked
        if self.state.active > self.budget.requests:
            said = f"{self.budget.requests} requests are going on; come again in a second."
            return _overloaded(path), said, {"retry-after": "1"}
        if not is_read and not _fits(given.get(b"content-length"), self.most):
            return 413, f"A body may have {self.budget.upload_bytes:,} bytes.", {}
        return None

    async def _receive_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the application with a body that may be neither too large nor too slow."""
        taken = 0
        has_all = False
        refused: tuple[int, str] | None = None

        async def counted_receive() -> Message:
            nonlocal taken, refused, has_all
            if has_all:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self.budget.body_s)
            except asyncio.TimeoutError:
                refused = 408, f"No part of the body came within {self.budget.body_s:g} s."
                raise _RefusedError from None
            taken += len(message.get("body", b""))
            has_all = not message.get("more_body")
            if taken > self.most:
                refused = 413, f"A body may have {self.budget.upload_bytes:,} bytes."
                raise _RefusedError
            return message

        is_refused = False

        async def checked_send(message: Message) -> None:
            nonlocal is_refused
            # The application may take the error above for a bad form and answer that.
            if refused and not is_refused and message["type"] == "http.response.start":
                is_refused = True
                await _refuse(send, scope, *refused)
            if not is_refused:
                await send(message)

        await self.app(scope, counted_receive, checked_send)

    def _bounded(self, send: Send, scope: Scope) -> Send:
        """Sends answers that are not too large."""
        is_refused = False

        async def bounded_send(message: Message) -> None:
            nonlocal is_refused
            if message["type"] == "http.response.start":
                length = dict(message["headers"]).get(b"content-length", b"0")
                if int(length) > self.budget.answer_bytes:
                    is_refused = True
                    most = f"more than the {self.budget.answer_bytes:,} that are sent"
                    said = f"The answer has {int(length):,} bytes, {most}; ask for less."
                    await _refuse(send, scope, 413, said)
            if not is_refused:
                await send(message)

        return bounded_send

    def _complete(self, message: Message) -> None:
        """Gives an answer the headers that every answer has."""
        given = {name.lower() for name, _ in message["headers"]}
        added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
        if self.state.is_stopping:
            added.append((b"connection", b"close"))
        message["headers"] = [*message["headers"], *(one for one in added if one[0] not in given)]

    def _has_key(self, given: Mapping[bytes, bytes]) -> bool:
        kind, _, value = given.get(b"authorization", b"").partition(b" ")
        brought = given.get(b"api-key", b"")
        if kind.lower() == b"bearer":
            brought = value.strip()
        elif kind.lower() == b"basic":
            try:
                brought = base64.b64decode(value.strip()).partition(b":")[2]
            except (binascii.Error, ValueError):
                return False
        return self.key is not None and hmac.compare_digest(brought, self.key)

    def _knows(self, host: str) -> bool:
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = found[1].strip("[]")
        if name.lower().rstrip(".") in {"localhost", *self.hosts}:
            return True
        try:
            # Only an address of version 6 stands in brackets.
            return (ipaddress.ip_address(name).version == 6) == found[1].startswith("[")
        except ValueError:
            return False

    def _is_foreign(self, given: Mapping[bytes, bytes], host: str) -> bool:
        """Whether a browser says that the page of a request is none of ours."""
        site, origin = given.get(b"sec-fetch-site"), given.get(b"origin")
        if site is not None and site not in (b"same-origin", b"none"):
            return True
        if origin is None or (origin == b"null" and site == b"same-origin"):
            return False
        place = origin.decode("latin-1").partition("://")[2].lower()
        # A proxy may ask under another name than the one people see.
        return place != host.lower() and place.partition(":")[0] not in self.hosts


def wants_page(scope: Scope) -> bool:
    """Whether an error is told as a page: paths of programs, and who asks for JSON, get JSON."""
    if scope["path"] == _EMBED or scope["path"].startswith(_PROGRAMS):
        return False
    accept = dict(scope["headers"]).get(b"accept", b"").lower()
    return b"text/html" in accept or b"json" not in accept


def refusal(path: str, status: int, reason: str) -> dict[str, str]:
    """An error as JSON; `/embed_sparse` also has the fields of text-embeddings-inference."""
    if path != _EMBED:
        return {"detail": reason}
    kind = "validation" if status < 429 else "overloaded" if status in (429, 503) else "backend"
    return {"error": reason, "error_type": kind, "detail": reason}


def _overloaded(path: str) -> int:
    return 429 if path == _EMBED else 503


def _as_get(scope: Scope) -> Scope:
    """A request for headers alone is answered as one for all, whose body is not sent."""
    return {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope


async def _read_on(receive: Receive) -> None:
    while (await receive()).get("more_body"):
        pass


def _fits(length: bytes | None, most: int) -> bool:
    if length is None:
        return True
    return length.isdigit() and len(length) < 19 and int(length) <= most


async def _refuse(
    send: Send, scope: Scope, status: int, reason: str, more: Mapping[str, str] | None = None
) -> None:
    is_text = wants_page(scope)
    body = reason if is_text else json.dumps(refusal(scope["path"], status, reason))
    headers = {
        "content-type": "text/plain; charset=utf-8" if is_text else "application/json",
        "content-length": str(len(body.encode())),
        "connection": "close",
        **(more or {}),
    }
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body.encode()})
