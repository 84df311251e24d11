"""What stands before every request: who may ask, how much, and what browsers must keep to."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from vdr_db.errors import ConfigError

__all__ = ["Guard", "Limits"]

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
# A form's own lines come on top of the file.
_FORM_BYTES = 64 * 1024
_HOST = re.compile(r"(\[[^\[\]]+\]|[^:\[\]]+)(:[0-9]*)?")


@dataclass(frozen=True)
class Limits:
    """How much one request may ask for.

    Attributes:
        query_characters: Of a query.
        page_size: Hits on a page at most.
        depth: How far results can be paged through.
        upload_bytes: Of an image.

    Raises:
        ConfigError: A limit is not positive.
    """

    query_characters: int = 1000
    page_size: int = 50
    depth: int = 1000
    upload_bytes: int = 10 * 1024 * 1024

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ConfigError(f"the limit `{name}` must be at least 1, got {value}.")


class _TooLargeError(Exception):
    """The body went over the limit while it was read."""


class Guard:
    """Refuses foreign hosts, foreign pages and large bodies, and sets the headers of every answer.

    A page elsewhere can point a name of its own at 127.0.0.1 and then read answers as its own. Such
    a request carries that name in `Host`, so only addresses, `localhost` and named hosts pass. It
    can also send a form here, and browsers say so in `Origin` and `Sec-Fetch-Site`.

    Args:
        app: What is guarded.
        limits: How large a body may be.
        hosts: Names that pass besides `localhost` and addresses.
    """

    def __init__(self, app: Application, limits: Limits, hosts: Sequence[str] = ()) -> None:
        self.app = app
        self.most = limits.upload_bytes + _FORM_BYTES
        self.hosts = {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        given = {name.lower(): value for name, value in scope["headers"]}
        taken = 0
        is_refused = False

        async def counted_receive() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.most:
                raise _TooLargeError
            return message

        async def checked_send(message: Message) -> None:
            nonlocal is_refused
            # The application may take the error above for a bad form and answer that.
            if taken > self.most and not is_refused and message["type"] == "http.response.start":
                is_refused = True
                await _refuse(send, 413, "The upload is too large.")
            if not is_refused:
                await _send(send, message)

        host = given.get(b"host", b"").decode("latin-1")
        if not self._knows(host):
            await _refuse(send, 421, "This host name is not served here.")
        elif scope["method"] not in ("GET", "HEAD") and self._is_foreign(given, host):
            # A connection that closes on unread bytes is reset, and takes the answer with it.
            if _fits(given.get(b"content-length", b"none"), _FORM_BYTES):
                while (await receive()).get("more_body"):
                    pass
            await _refuse(send, 403, "A page of another site cannot send this here.")
        elif not _fits(given.get(b"content-length"), self.most):
            await _refuse(send, 413, "The upload is too large.")
        else:
            await self.app(scope, counted_receive, checked_send)

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


def _fits(length: bytes | None, most: int) -> bool:
    if length is None:
        return True
    return length.isdigit() and len(length) < 19 and int(length) <= most


async def _send(send: Send, message: Message) -> None:
    """Passes a message on, with the headers every answer has."""
    if message["type"] == "http.response.start":
        given = {name.lower() for name, _ in message["headers"]}
        added = ((name.encode(), value.encode()) for name, value in HEADERS.items())
        message["headers"] = [*message["headers"], *(one for one in added if one[0] not in given)]
    await send(message)


async def _refuse(send: Send, status: int, reason: str) -> None:
    body = reason.encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await _send(send, {"type": "http.response.start", "status": status, "headers": headers})
    await _send(send, {"type": "http.response.body", "body": body})
