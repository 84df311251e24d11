"""Where a collection is: one grammar of addresses for every store, and how to be let in.

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

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias
from urllib.parse import SplitResult, urlsplit

from vdr_db.connectors.failures import one_line
from vdr_db.errors import ConfigError

__all__ = [
    "GRPC_PORT",
    "MEMORY",
    "NAMES",
    "PORTS",
    "Access",
    "Address",
    "Product",
    "Server",
    "parse_address",
    "server_url",
    "split_url",
]

Product: TypeAlias = Literal["qdrant", "elasticsearch", "opensearch"]

MEMORY = ":memory:"
NAMES: dict[Product, str] = {
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
PORTS: dict[Product, int] = {"qdrant": 6333, "elasticsearch": 9200, "opensearch": 9200}
GRPC_PORT = 6334
_GRAMMAR = (
    "a folder, :memory:, http(s)://HOST:PORT or qdrant://HOST:PORT for Qdrant, "
    "elasticsearch+http(s)://HOST:PORT, or opensearch+http(s)://HOST:PORT"
)
_HOST_AND_PORT = re.compile(r"(localhost|[\w-]+(\.[\w-]+)+|\[[0-9a-fA-F:]+\]):\d{1,5}/?")


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
        name = f"{NAMES[self.product]} {self.version}".strip()
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
    parts = split_url(url if "://" in url else f"http://{url}")
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
    return f"{parts.scheme}://{host}:{parts.port or PORTS[product]}{parts.path.rstrip('/')}"


def split_url(url: str) -> SplitResult:
    """The parts of an address with a host and a possible port; anything else is a `ConfigError`."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018, it is read to be checked
    except ValueError as error:
        raise ConfigError(f"{one_line(url, 80)!r} is no address ({error}).") from error
    if not parts.hostname:
        raise ConfigError(f"the address of a server needs a host, got {one_line(url, 80)!r}.")
    return parts
