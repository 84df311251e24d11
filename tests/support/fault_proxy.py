"""An HTTP proxy on loopback that does what networks and busy servers do to requests.

Every request passes through to the server behind, unless a fault is planned for it. Nothing here is
random: a test hands over the faults in order, or a function that decides.
"""

from __future__ import annotations

import http.client
import json
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    """Answers in place of the server, which sees nothing."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b'{"error":{"type":"planned_fault","reason":"as the test wants it"}}'


@dataclass(frozen=True)
class Reset:
    """Cuts the connection before the server sees the request."""


@dataclass(frozen=True)
class LostAnswer:
    """Lets the server carry the request out, then cuts the connection without an answer."""


@dataclass(frozen=True)
class HalfAnswer:
    """Lets the server carry the request out, and cuts the connection within its answer."""


@dataclass(frozen=True)
class Slow:
    """Waits before it passes the request on."""

    seconds: float


@dataclass(frozen=True)
class RefusedItems:
    """Takes the items of a bulk request whose number is in `numbers` out and refuses them."""

    numbers: tuple[int, ...]
    status: int = 429
    type: str = "es_rejected_execution_exception"


Fault = Answer | Reset | LostAnswer | HalfAnswer | Slow | RefusedItems


@dataclass
class Request:
    """A request as it came in; names of headers in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = field(repr=False)

    @property
    def documents(self) -> int:
        """Items of a bulk request that carry a document."""
        return len(self.body.splitlines()) // 2


class FaultProxy:
    """The proxy of `running_proxy`: `url`, the `requests` seen, and the faults still planned."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.port = 0
        self.requests: list[Request] = []
        self.planned: deque[Fault | None] = deque()
        self.decide: Callable[[Request], Fault | None] | None = None
        self.match = "_bulk"
        self.largest_body = 1 << 30
        self.is_down = False
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def plan(self, *faults: Fault | None, match: str = "_bulk") -> None:
        """The fault of each coming request whose path holds `match`; `None` lets one through."""
        self.match = match
        self.planned.extend(faults)

    def clear(self) -> None:
        self.planned.clear()
        self.requests.clear()
        self.decide = None
        self.largest_body = 1 << 30

    def seen(self, part: str) -> list[Request]:
        return [request for request in self.requests if part in request.path]

    def next_fault(self, request: Request) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            if len(request.body) > self.largest_body:
                return Answer(413)
            if self.decide is not None:
                return self.decide(request)
            if self.planned and self.match in request.path:
                return self.planned.popleft()
            return None

    def forward(self, request: Request) -> tuple[int, list[tuple[str, str]], bytes]:
        """Asks the server behind."""
        connection = http.client.HTTPConnection(urlsplit(self.upstream).netloc, timeout=60)
        try:
            kept = {k: v for k, v in request.headers.items() if k in _PASSED_ON}
            connection.request(request.method, request.path, request.body or None, kept)
            response = connection.getresponse()
            body = response.read()
            headers = [(k, v) for k, v in response.getheaders() if k.lower() not in _HOP_BY_HOP]
            return response.status, headers, body
        finally:
            connection.close()

    def is_alias(self, name: str) -> bool:
        return self.forward(Request("GET", f"/_alias/{name}", {}, b""))[0] == 200


_PASSED_ON = {"accept", "content-type", "authorization", "x-elastic-client-meta"}
_HOP_BY_HOP = {"content-length", "connection", "transfer-encoding", "date", "server"}


def _mended(request: Request, proxy: FaultProxy) -> Request:
    """Spares the stand-in a parameter it gets wrong.

    noida-db 0.2.3 resolves an alias before it checks `require_alias` and so refuses aliases too. A
    server takes them and refuses the rest; here the proxy looks, and drops the parameter for one.
    """
    path = request.path
    name = path.split("/")[1]
    if "require_alias=true" not in path or not proxy.is_alias(name):
        return request
    path = path.replace("require_alias=true", "").rstrip("?&")
    return Request(request.method, path, request.headers, request.body)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: FaultProxy

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        lines = [f"HTTP/1.1 {status} -", *(f"{k}: {v}" for k, v in headers)]
        lines += [f"Content-Length: {len(body)}", "", ""]
        is_head = self.command == "HEAD"
        self.wfile.write("\r\n".join(lines).encode() + (b"" if is_head else body))

    def cut(self) -> None:
        # With a linger of zero the peer sees a reset, not an orderly end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def handle_any(self) -> None:
        size = int(self.headers.get("content-length") or 0)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, self.rfile.read(size))
        fault = Reset() if self.proxy.is_down else self.proxy.next_fault(request)
        if isinstance(fault, Answer):
            product = [("X-Elastic-Product", "Elasticsearch"), ("Content-Type", "application/json")]
            self.answer(fault.status, [*product, *fault.headers], fault.body)
            return
        if isinstance(fault, Reset):
            self.cut()
            return
        if isinstance(fault, Slow):
            time.sleep(fault.seconds)
        request = _mended(request, self.proxy)
        if isinstance(fault, RefusedItems):
            status, headers, body = _refuse_items(request, fault, self.proxy)
        else:
            status, headers, body = self.proxy.forward(request)
        if isinstance(fault, LostAnswer):
            self.cut()
        elif isinstance(fault, HalfAnswer):
            head = f"HTTP/1.1 {status} -\r\nContent-Type: application/json\r\n"
            head += f"X-Elastic-Product: Elasticsearch\r\nContent-Length: {len(body)}\r\n\r\n"
            self.wfile.write(head.encode() + body[: len(body) // 2])
            self.cut()
        else:
            self.answer(status, headers, body)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_any


def _refuse_items(
    request: Request, fault: RefusedItems, proxy: FaultProxy
) -> tuple[int, list[tuple[str, str]], bytes]:
    lines = request.body.splitlines(keepends=True)
    pairs = [lines[at : at + 2] for at in range(0, len(lines), 2)]
    taken = [pair for number, pair in enumerate(pairs) if number not in fault.numbers]
    status, headers, answered = 200, [("Content-Type", "application/json")], b""
    items: list[Any] = []
    if taken:
        body = b"".join(line for pair in taken for line in pair)
        status, headers, answered = proxy.forward(
            Request(request.method, request.path, request.headers, body)
        )
        items = json.loads(answered)["items"]
    else:
        headers.append(("X-Elastic-Product", "Elasticsearch"))
    merged = []
    rest = iter(items)
    for number, pair in enumerate(pairs):
        if number in fault.numbers:
            action, target = next(iter(json.loads(pair[0]).items()))
            error = {"type": fault.type, "reason": "queue is full"}
            merged.append({action: {"_id": target["_id"], "status": fault.status, "error": error}})
        else:
            merged.append(next(rest))
    return status, headers, json.dumps({"errors": True, "items": merged}).encode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *args: Any) -> None:
        """Says nothing: cut connections are the point."""


@contextmanager
def running_proxy(upstream: str) -> Iterator[FaultProxy]:
    """Runs a proxy on a free port of the loopback interface, in front of the server at a URL."""
    proxy = FaultProxy(upstream)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": proxy}))
    proxy.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        # Connections that are kept alive would go on without the listening socket.
        proxy.is_down = True
        server.shutdown()
        server.server_close()
        thread.join(10)
