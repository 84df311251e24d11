"""TLS in front of a server: certificates of an authority made here, and a proxy that ends TLS."""

from __future__ import annotations

import contextlib
import selectors
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import services


@dataclass(frozen=True)
class Certificates:
    """Files in PEM.

    Attributes:
        authority: The certificate of who signed.
        chain: The certificate of the server.
        key: Its key.
    """

    authority: Path
    chain: Path
    key: Path


def make_certificates(folder: Path, name: str = "IP:127.0.0.1,DNS:localhost") -> Certificates:
    """An authority of its own and a certificate of a server with that name."""
    if shutil.which("openssl") is None:
        services.skip("no certificates without the openssl command")
    folder.mkdir(parents=True, exist_ok=True)
    made = Certificates(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    authority_key, request, extra = folder / "ca.key", folder / "server.csr", folder / "extra"
    extra.write_text(f"subjectAltName={name}\nextendedKeyUsage=serverAuth\n")
    curve = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
    usage = "-days 2 -addext keyUsage=critical,keyCertSign,cRLSign"
    for command in (
        f"req -x509 {curve} {usage} -keyout {authority_key} -out {made.authority} -subj /CN=ca",
        f"req {curve} -keyout {made.key} -out {request} -subj /CN=server",
        f"x509 -req -in {request} -CA {made.authority} -CAkey {authority_key} -CAcreateserial"
        f" -days 2 -extfile {extra} -out {made.chain}",
    ):
        done = subprocess.run(["openssl", *command.split()], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return made


@contextmanager
def running_tls(upstream_port: int, certificates: Certificates) -> Iterator[int]:
    """A port of loopback that speaks TLS and passes what it is told on to another port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.chain, certificates.key)
    context.set_alpn_protocols(["h2", "http/1.1"])  # the first of them that a client speaks
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.1)
        stop = threading.Event()
        thread = threading.Thread(target=_accept, args=(listening, context, upstream_port, stop))
        thread.start()
        try:
            yield int(listening.getsockname()[1])
        finally:
            stop.set()
            thread.join(10)


def _accept(
    listening: socket.socket, context: ssl.SSLContext, port: int, stop: threading.Event
) -> None:
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            connection, _ = listening.accept()
            arguments = (connection, context, port, stop)
            threading.Thread(target=_pass_on, args=arguments, daemon=True).start()


def _pass_on(
    connection: socket.socket, context: ssl.SSLContext, port: int, stop: threading.Event
) -> None:
    """Carries bytes both ways until one side ends."""
    connection.settimeout(30)
    with (
        contextlib.suppress(OSError),
        connection,
        context.wrap_socket(connection, server_side=True) as secure,
        socket.create_connection(("127.0.0.1", port)) as plain,
        selectors.DefaultSelector() as ready,
    ):
        ready.register(secure, selectors.EVENT_READ, plain)
        ready.register(plain, selectors.EVENT_READ, secure)
        while not stop.is_set():
            for key, _ in ready.select(0.2):
                source = key.fileobj
                told = source.recv(1 << 16)
                while source is secure and secure.pending():
                    told += secure.recv(1 << 16)
                if not told:
                    return
                key.data.sendall(told)
