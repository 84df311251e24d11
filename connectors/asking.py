"""What answers at the address of a server: one request, one sentence where it is something else."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import ssl
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult

from vdr_db.connectors.address import (
    GRPC_PORT,
    NAMES,
    PORTS,
    Access,
    Product,
    Server,
    split_url,
)
from vdr_db.connectors.failures import BUSY, one_line
from vdr_db.errors import ConfigError, StoreError, StoreMismatch, StoreUnavailable, require

__all__ = ["ask", "trust"]

_ANSWER_S = 10.0
_MOST_BYTES = 1 << 16


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
        ConfigError: The file of certificates cannot be read, or the client does not fit.
    """
    parts = split_url(url)
    try:
        status, headers, body = _get(parts, product, access)
    except ssl.SSLError as error:
        raise _untrusted(url, error) from error
    except (http.client.HTTPException, ConnectionResetError, BrokenPipeError) as error:
        # What speaks HTTP/2 alone, as gRPC does, answers HTTP/1.1 with bytes or a closed door.
        number = _grpc_version(url, parts.port or GRPC_PORT, access)
        if number is None:
            advice = "check the port, or write https://"
            if parts.scheme == "https":
                advice = "check the port"
                if not access.verify_certs:
                    advice += "; gRPC checks every certificate, so it needs VDR_DB_CA_CERTS"
            raise StoreMismatch(
                f"what listens at {url} speaks no HTTP (told {one_line(repr(error), 80)}); "
                f"{advice}."
            ) from error
        server = Server("qdrant", number, url, parts.port)
    except OSError as error:
        raise StoreUnavailable(
            f"nothing answers at {url} ({one_line(error.strerror or error, 80)}); check the "
            "address, or try again later."
        ) from error
    else:
        server = _told(url, product, access, status, headers, body)
        # Only the usual pair of ports is known to be of one server.
        has_pair = server.product == "qdrant" and parts.port == PORTS["qdrant"]
        may_pair = has_pair and grpc is not False and not access.is_custom_tls
        if may_pair and _listens(parts.hostname or "", GRPC_PORT):
            number = _grpc_version(url, GRPC_PORT, access)
            server = server if number is None else Server("qdrant", number, url, GRPC_PORT)
    if (server.product == "qdrant") != (product == "qdrant"):
        raise StoreMismatch(
            f"the server at {url} is {NAMES[server.product]}, not {NAMES[product]}; open it by "
            f"{_scheme_of(server.product, parts.scheme)}://{parts.netloc}."
        )
    if grpc is not None and server.product == "qdrant" and (server.grpc_port is not None) != grpc:
        has, wants = ("REST", "gRPC") if grpc else ("gRPC", "REST")
        raise StoreMismatch(
            f"the server at {url} speaks {has} there and {wants} was asked for; leave "
            "`prefer_grpc` out to take what it speaks, or give the port of the other."
        )
    if server.product == "qdrant":
        _check_client(server)
    return server


def _check_client(server: Server) -> None:
    """Refuses a client of another major version than the server's; a search server says so itself.

    Raises:
        ConfigError: They do not speak the same language.
    """
    try:
        client = version("qdrant-client")
    except PackageNotFoundError:
        return  # whoever needs it says so
    theirs = server.version.partition(".")[0]
    if theirs.isdecimal() and theirs != client.partition(".")[0]:
        raise ConfigError(
            f"the server at {server.url} is {server} and the client qdrant-client {client}, of "
            f"another major version; run: pip install 'qdrant-client=={theirs}.*'"
        )


def _scheme_of(product: Product, transport: str) -> str:
    return transport if product == "qdrant" else f"{product}+{transport}"


def _get(
    parts: SplitResult, product: Product, access: Access
) -> tuple[int, Mapping[str, str], bytes]:
    """Status, headers (names in lower case) and body of the root page."""
    host, port = parts.hostname or "", parts.port
    connection = http.client.HTTPConnection(host, port, timeout=_ANSWER_S)
    if parts.scheme == "https":
        context = trust(access)
        connection = http.client.HTTPSConnection(host, port, timeout=_ANSWER_S, context=context)
    headers = {"accept": "application/json"}
    if access.api_key is not None and product == "qdrant":
        headers["api-key"] = access.api_key
    elif access.api_key is not None:
        headers["authorization"] = f"ApiKey {access.api_key}"
    elif access.basic_auth is not None:
        pair = base64.b64encode(":".join(access.basic_auth).encode()).decode()
        headers["authorization"] = f"Basic {pair}"
    try:
        connection.request("GET", f"{parts.path}/", headers=headers)
        reply = connection.getresponse()
        told = {name.lower(): value for name, value in reply.getheaders()}
        return reply.status, told, reply.read(_MOST_BYTES)
    finally:
        connection.close()


def trust(access: Access) -> ssl.SSLContext:
    """Whose certificates count.

    Raises:
        ConfigError: The file of certificates cannot be read.
    """
    try:
        context = ssl.create_default_context(cafile=access.ca_certs)
    except OSError as error:  # also of TLS itself, for a file that holds no certificates
        raise ConfigError(
            f"the file of certificates (`ca_certs`, VDR_DB_CA_CERTS) must be of PEM, got "
            f"{access.ca_certs!r} ({one_line(error.strerror or error, 80)}); name the one of the "
            "certificate authority."
        ) from error
    if not access.verify_certs:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


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
    about = page.get("version")
    product: Product | None = None
    number = ""
    if "qdrant" in str(page.get("title", "")).lower():
        product, number = "qdrant", str(about or "")
    elif isinstance(about, dict) and "number" in about:
        names = f"{about.get('distribution', '')} {page.get('tagline', '')}".lower()
        product = "opensearch" if "opensearch" in names else "elasticsearch"
        number = str(about["number"])
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
    parts = split_url(url)
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
