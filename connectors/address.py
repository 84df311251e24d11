"""Where a collection is: one grammar of addresses for every store, and what answers there.

| address                                            | what it is                                  |
|----------------------------------------------------|---------------------------------------------|
| `articles.qdrant`, any path                        | embedded Qdrant in this folder              |
| `:memory:`                                         | embedded, in a folder gone at the end       |
| `http(s)://HOST[:PORT]`, `qdrant://HOST[:PORT]`    | a Qdrant server, by REST or gRPC (6333)     |
| `elasticsearch+http(s)://HOST[:PORT]`              | an Elasticsearch server (9200)              |
| `opensearch+http(s)://HOST[:PORT]`                 | an OpenSearch server (9200)                 |

An address holds no secret. Keys, users, passwords and TLS come from the environment:
`VDR_DB_API_KEY`, `VDR_DB_USER` with `VDR_DB_PASSWORD`, `VDR_DB_CA_CERTS` (a file) and
`VDR_DB_VERIFY_CERTS` (`0` trusts anyone). A store's own variable goes before:
`VDR_DB_QDRANT_API_KEY`, `VDR_DB_OPENSEARCH_USER`, ...
"""

from __future__ import annotations

import http.client
import json
import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import SplitResult, urlsplit

from vdr_db.connectors.failures import BUSY, one_line
from vdr_db.errors import ConfigError, StoreError, StoreMismatch, StoreUnavailable, require

__all__ = ["MEMORY", "Access", "Address", "Product", "Server", "ask", "parse_address", "server_url"]

Product: TypeAlias = Literal["qdrant", "elasticsearch", "opensearch"]

MEMORY = ":memory:"
_NAMES: dict[Product, str] = {
    "qdrant": "Qdrant",
    "elasticsearch": "Elasticsearch",
    "opensearch": "OpenSearch",
}
_SCHEMES: dict[str, tuple[Product, str]] = {
    "http": ("qdrant", "http"),
    "https": ("qdrant", "https"),
    "qdrant": ("qdrant", "http"),
    "elasticsearch+http": ("elasticsearch", "http"),
    "elasticsearch+https": ("elasticsearch", "https"),
    "opensearch+http": ("opensearch", "http"),
    "opensearch+https": ("opensearch", "https"),
}
_PORTS: dict[Product, int] = {"qdrant": 6333, "elasticsearch": 9200, "opensearch": 9200}
_GRPC_PORT = 6334
_GRAMMAR = (
    "a folder, :memory:, http(s)://HOST:PORT or qdrant://HOST:PORT for Qdrant, "
    "elasticsearch+http(s)://HOST:PORT, or opensearch+http(s)://HOST:PORT"
)
_HOST_AND_PORT = re.compile(r"(localhost|[\w-]+(\.[\w-]+)+|\[[0-9a-fA-F:]+\]):\d{1,5}/?")
_ANSWER_S = 10.0
_MOST_BYTES = 1 << 16


@dataclass(frozen=True)
class Address:
    """A place for collections.

    Attributes:
        product: What is expected there; `None` stands for the embedded engine.
        place: The folder, `":memory:"`, or `http(s)://HOST:PORT` with the path of a proxy.
    """

    product: Product | None
    place: str

    @property
    def is_embedded(self) -> bool:
        """Whether the engine runs in this process."""
        return self.product is None


@dataclass(frozen=True)
class Access:
    """How to be let in: a key, or user and password, and whom to trust.

    Attributes:
        api_key: The key.
        basic_auth: (user, password).
        ca_certs: File with the certificates to trust.
        verify_certs: `False` trusts anyone.
    """

    api_key: str | None = field(default=None, repr=False)
    basic_auth: tuple[str, str] | None = field(default=None, repr=False)
    ca_certs: str | None = None
    verify_certs: bool = True

    @classmethod
    def from_environment(cls, product: Product, *, key: str | None = None) -> Access:
        """What the environment says for a product; `key` names the variable of the key instead."""

        def told(name: str) -> str | None:
            own = os.environ.get(f"VDR_DB_{product.upper()}_{name}")
            return own or os.environ.get(f"VDR_DB_{name}") or None

        user, password = told("USER"), told("PASSWORD")
        if (user is None) != (password is None):
            raise ConfigError("VDR_DB_USER and VDR_DB_PASSWORD go together; set both or neither.")
        return cls(
            told("API_KEY") if key is None else os.environ.get(key) or None,
            None if user is None or password is None else (user, password),
            told("CA_CERTS"),
            (told("VERIFY_CERTS") or "1").lower() not in ("0", "false", "no"),
        )

    @property
    def is_custom_tls(self) -> bool:
        """Whether other certificates than the system's count."""
        return self.ca_certs is not None or not self.verify_certs


@dataclass(frozen=True)
class Server:
    """What answers at an address.

    Attributes:
        product: What it is.
        version: Its version, `""` when it does not tell.
        url: Where.
        grpc_port: Port on which it speaks gRPC, for Qdrant; `None` for REST.
    """

    product: Product
    version: str
    url: str
    grpc_port: int | None = None

    def __str__(self) -> str:
        """Product, version and interface, for people."""
        name = f"{_NAMES[self.product]} {self.version}".strip()
        if self.product != "qdrant":
            return name
        return f"{name} over " + ("REST" if self.grpc_port is None else f"gRPC ({self.grpc_port})")


def parse_address(text: str | os.PathLike[str]) -> Address:
    """What an address says; see the table above.

    Raises:
        ConfigError: It is of an unknown kind, holds a password or a query, or lacks its host.
    """
    address = os.fspath(text)
    scheme, is_url, _ = address.partition("://")
    if not is_url:
        if not address:
            raise ConfigError(f"an address must be {_GRAMMAR}, got an empty one.")
        if _HOST_AND_PORT.fullmatch(address) and not Path(address).exists():
            raise ConfigError(
                f"an address of a server begins with what it is, got {address!r}; write "
                f"http://{address} for Qdrant, elasticsearch+http://{address} or "
                f"opensearch+http://{address}."
            )
        return Address(None, address)
    if scheme not in _SCHEMES:
        hint = ""
        if scheme in ("elasticsearch", "opensearch"):
            hint = f"; write {scheme}+http:// or {scheme}+https://"
        raise ConfigError(f"an address must be {_GRAMMAR}, got {scheme}://...{hint}.")
    product, transport = _SCHEMES[scheme]
    return Address(product, server_url(f"{transport}{address[len(scheme) :]}", product))


def server_url(url: str, product: Product) -> str:
    """`http(s)://HOST:PORT` of a server, plain HTTP and the product's usual port where not told.

    Raises:
        ConfigError: It holds a user, a password or a query, or lacks its host.
    """
    parts = _split(url if "://" in url else f"http://{url}")
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            "an address must not hold a user and password, which end up in logs; set VDR_DB_USER "
            "and VDR_DB_PASSWORD, or VDR_DB_API_KEY, in the environment."
        )
    if parts.scheme not in ("http", "https") or parts.query or parts.fragment:
        raise ConfigError(
            f"the address of a server is http(s)://HOST:PORT, got {parts.scheme}://"
            f"{parts.hostname}{' with a query' if parts.query or parts.fragment else ''}."
        )
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{parts.scheme}://{host}:{parts.port or _PORTS[product]}{parts.path.rstrip('/')}"


def ask(url: str, product: Product, access: Access, *, grpc: bool | None = None) -> Server:
    """Asks a server what it is.

    Args:
        url: `http(s)://HOST:PORT`, see `server_url`.
        product: What is expected; OpenSearch and Elasticsearch stand for each other.
        access: How to be let in.
        grpc: Whether Qdrant must speak gRPC, or must not; `None` takes what it speaks, gRPC where
            it speaks both.

    Raises:
        StoreUnavailable: Nothing answers.
        StoreMismatch: It is another product, or speaks another protocol than asked for.
        StoreError: It does not let us in, or there is no secure connection.
    """
    parts = _split(url)
    try:
        status, headers, body = _get(parts, product, access)
    except ssl.SSLError as error:
        raise _untrusted(url, error) from error
    except (http.client.HTTPException, ConnectionResetError, BrokenPipeError) as error:
        # What speaks HTTP/2 alone, as gRPC does, answers HTTP/1.1 with bytes or a closed door.
        version = _grpc_version(url, parts.port or _GRPC_PORT, access)
        if version is None:
            raise StoreMismatch(
                f"what listens at {url} speaks no HTTP (told {one_line(repr(error), 80)}); "
                f"check the port{'' if parts.scheme == 'https' else ', or write https://'}."
            ) from error
        server = Server("qdrant", version, url, parts.port)
    except OSError as error:
        raise StoreUnavailable(
            f"nothing answers at {url} ({one_line(error.strerror or error, 80)}); check the "
            "address, or try again later."
        ) from error
    else:
        server = _told(url, product, access, status, headers, body)
        # Only the usual pair of ports is known to be of one server.
        has_pair = server.product == "qdrant" and parts.port == _PORTS["qdrant"]
        may_pair = has_pair and grpc is not False and not access.is_custom_tls
        if may_pair and _listens(parts.hostname or "", _GRPC_PORT):
            version = _grpc_version(url, _GRPC_PORT, access)
            server = server if version is None else Server("qdrant", version, url, _GRPC_PORT)
    if (server.product == "qdrant") != (product == "qdrant"):
        raise StoreMismatch(
            f"the server at {url} is {_NAMES[server.product]}, not {_NAMES[product]}; open it by "
            f"{_scheme_of(server.product, parts.scheme)}://{parts.netloc}."
        )
    if grpc is not None and server.product == "qdrant" and (server.grpc_port is not None) != grpc:
        has, wants = ("REST", "gRPC") if grpc else ("gRPC", "REST")
        raise StoreMismatch(
            f"the server at {url} speaks {has} there and {wants} was asked for; leave "
            "`prefer_grpc` out to take what it speaks, or give the port of the other."
        )
    return server


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018, it is read to be checked
    except ValueError as error:
        raise ConfigError(f"{one_line(url, 80)!r} is no address ({error}).") from error
    if not parts.hostname:
        raise ConfigError(f"the address of a server needs a host, got {one_line(url, 80)!r}.")
    return parts


def _scheme_of(product: Product, transport: str) -> str:
    return transport if product == "qdrant" else f"{product}+{transport}"


def _get(
    parts: SplitResult, product: Product, access: Access
) -> tuple[int, Mapping[str, str], bytes]:
    """Status, headers (names in lower case) and body of the root page."""
    host, port = parts.hostname or "", parts.port
    connection = http.client.HTTPConnection(host, port, timeout=_ANSWER_S)
    if parts.scheme == "https":
        context = ssl.create_default_context(cafile=access.ca_certs)
        if not access.verify_certs:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, port, timeout=_ANSWER_S, context=context)
    headers = {"accept": "application/json"}
    if access.api_key is not None and product == "qdrant":
        headers["api-key"] = access.api_key
    elif access.api_key is not None:
        headers["authorization"] = f"ApiKey {access.api_key}"
    elif access.basic_auth is not None:
        import base64

        pair = base64.b64encode(":".join(access.basic_auth).encode()).decode()
        headers["authorization"] = f"Basic {pair}"
    try:
        connection.request("GET", f"{parts.path}/", headers=headers)
        reply = connection.getresponse()
        told = {name.lower(): value for name, value in reply.getheaders()}
        return reply.status, told, reply.read(_MOST_BYTES)
    finally:
        connection.close()


def _told(
    url: str,
    expected: Product,
    access: Access,
    status: int,
    headers: Mapping[str, str],
    body: bytes,
) -> Server:
    """The server that gave this root page."""
    text = body.decode("utf-8", "replace")
    try:
        page: Any = json.loads(text)
    except ValueError:
        page = {}
    page = page if isinstance(page, dict) else {}
    version = page.get("version")
    product: Product | None = None
    number = ""
    if "qdrant" in str(page.get("title", "")).lower():
        product, number = "qdrant", str(version or "")
    elif isinstance(version, dict) and "number" in version:
        about = f"{version.get('distribution', '')} {page.get('tagline', '')}".lower()
        product = "opensearch" if "opensearch" in about else "elasticsearch"
        number = str(version["number"])
    elif "opensearch" in headers.get("www-authenticate", "").lower():
        product = "opensearch"
    elif "x-elastic-product" in headers:
        product = "elasticsearch"
    elif status == 401 and ("provide an API key" in text or "Invalid API key" in text):
        product = "qdrant"
    # Of another product than expected there is more to say than that the key is not for it.
    is_other = product is not None and (product == "qdrant") != (expected == "qdrant")
    if (status == 401 and not is_other) or (status == 403 and product is None):
        raise _refused(url, product or expected, access)
    if product is None and status in BUSY:
        product = expected  # the store asks again and waits
    if product is None:
        raise StoreMismatch(
            f"what answers at {url} is neither Qdrant nor Elasticsearch nor OpenSearch "
            f"({status}, {one_line(text, 60)!r}); check host and port"
            f"{', or write https://' if 'HTTPS' in text else ''}."
        )
    return Server(product, number, url)


def _refused(url: str, product: Product, access: Access) -> StoreError:
    variables = "VDR_DB_API_KEY"
    if product != "qdrant":
        variables += ", or VDR_DB_USER and VDR_DB_PASSWORD,"
    if access.api_key is None and access.basic_auth is None:
        return StoreError(
            f"the server at {url} lets nobody in without credentials; set {variables} in the "
            "environment."
        )
    return StoreError(
        f"the server at {url} refuses the credentials; check {variables} and their rights."
    )


def _untrusted(url: str, error: ssl.SSLError) -> StoreError:
    if error.reason == "WRONG_VERSION_NUMBER" or "record layer" in str(error):
        return StoreMismatch(f"what listens at {url} speaks no TLS; write http:// for it.")
    return StoreError(
        f"no secure connection to {url} ({one_line(error, 120)}); name the file of its "
        "certificate authority by VDR_DB_CA_CERTS."
    )


def _listens(host: str, port: int) -> bool:
    import socket

    try:
        with socket.create_connection((host, port), timeout=2.0):
            return True
    except OSError:
        return False


def _grpc_version(url: str, port: int, access: Access) -> str | None:
    """Version of the Qdrant that speaks gRPC on a port; `None` when none does.

    Raises:
        StoreError: It does not let us in.
    """
    grpc: Any = require("grpc", "qdrant")
    messages: Any = require("qdrant_client.grpc", "qdrant")
    stubs: Any = require("qdrant_client.grpc.qdrant_pb2_grpc", "qdrant")
    parts = _split(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    target = f"{host}:{port}"
    if parts.scheme == "https":
        roots = Path(access.ca_certs).read_bytes() if access.ca_certs else None
        channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(roots))
    else:
        channel = grpc.insecure_channel(target)
    metadata = [] if access.api_key is None else [("api-key", access.api_key)]
    try:
        reply = stubs.QdrantStub(channel).HealthCheck(
            messages.HealthCheckRequest(), timeout=_ANSWER_S, metadata=metadata
        )
    except grpc.RpcError as error:
        if error.code().name in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            raise _refused(url, "qdrant", access) from error
        return None
    finally:
        channel.close()
    return str(reply.version)
