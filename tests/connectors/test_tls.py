"""Encrypted connections with a certificate of an authority of one's own, for every server."""

from __future__ import annotations

import pytest
import services
from search_servers import note_real_server
from store_samples import WordEncoder
from tls_servers import make_certificates, running_tls

from vdr_db.connectors import VDRElasticsearch, VDRQdrant, open_collection
from vdr_db.connectors.address import Access
from vdr_db.connectors.asking import ask
from vdr_db.errors import ConfigError, StoreError, StoreMismatch

KINDS = {"rest": "https", "grpc": "https", "elasticsearch": "elasticsearch+https"}
KINDS["opensearch"] = "opensearch+https"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(params=KINDS)
def secure(request, certificates, tmp_path):
    """The address of a server behind TLS, without its scheme's store, and what it is."""
    kind = request.param
    if kind in ("rest", "grpc"):
        pytest.importorskip("qdrant_client")
        from qdrant_contract_server import QdrantContractServer

        server = QdrantContractServer(tmp_path / "server")
        with server, running_tls(getattr(server, f"{kind}_port"), certificates) as port:
            yield kind, f"{KINDS[kind]}://localhost:{port}"
        return
    pytest.importorskip("opensearchpy")
    name = "noida_server" if kind == "elasticsearch" else "opensearch_server"
    server = request.getfixturevalue(name)
    if server.is_real:
        note_real_server(request, server.name)
    with running_tls(server.proxy.port, certificates) as port:
        yield kind, f"{KINDS[kind]}://localhost:{port}"


def round_trip(opened):
    with opened as articles:
        articles.add_texts(["chess", "kings and chess"], ["x", "y"])
        assert articles.search("kings")[0].id == "y"
        assert articles.count() == 2
        articles.delete(["x", "y"])


def test_an_authority_that_is_named_is_trusted(secure, certificates, monkeypatch):
    kind, address = secure
    name, more = services.unique_name(), {} if kind in ("rest", "grpc") else {"replicas": 0}
    monkeypatch.setenv("VDR_DB_CA_CERTS", str(certificates.authority))
    round_trip(open_collection(address, name, WordEncoder(), **more))
    monkeypatch.delenv("VDR_DB_CA_CERTS")
    access = Access(ca_certs=str(certificates.authority))
    url = url_of(address)
    one = VDRQdrant if kind in ("rest", "grpc") else VDRElasticsearch
    round_trip(one(name, WordEncoder(), url=url, access=access, **more))
    with one(name, url=url, access=access) as articles:
        assert articles.server.grpc_port == (int(url.split(":")[-1]) if kind == "grpc" else None)


def test_nobody_else_is_trusted(secure, certificates, tmp_path, monkeypatch):
    _, address = secure
    other = make_certificates(tmp_path / "other")
    for trusted in ("", str(other.authority)):
        monkeypatch.setenv("VDR_DB_CA_CERTS", trusted)
        with pytest.raises(StoreError, match="certificate authority by VDR_DB_CA_CERTS") as told:
            open_collection(address, "articles", WordEncoder())
        assert "no secure connection to https://localhost" in str(told.value)
        assert str(told.value).count(". ") == 0
    monkeypatch.setenv("VDR_DB_CA_CERTS", str(tmp_path / "nowhere.pem"))
    with pytest.raises(ConfigError, match=r"VDR_DB_CA_CERTS\) must be of PEM"):
        open_collection(address, "articles", WordEncoder())


def test_a_certificate_of_another_name_is_refused(secure, certificates, tmp_path):
    kind, address = secure
    elsewhere = make_certificates(tmp_path / "elsewhere", "DNS:elsewhere.example")
    access = Access(ca_certs=str(elsewhere.authority))
    with (
        running_tls(int(address.rsplit(":", 1)[1]), elsewhere) as port,
        pytest.raises(StoreError, match=r"no secure connection to .*Hostname mismatch"),
    ):
        ask(f"https://localhost:{port}", product_of(kind), access)


def url_of(address):
    return address.split("+")[-1]


def product_of(kind):
    return "qdrant" if kind in ("rest", "grpc") else "opensearch"


def test_anyone_is_trusted_when_asked_for(secure):
    kind, address = secure
    product, url = product_of(kind), url_of(address)
    if kind == "grpc":
        with pytest.raises(StoreMismatch, match="gRPC checks every certificate"):
            ask(url, product, Access(verify_certs=False))
    else:
        assert ask(url, product, Access(verify_certs=False)).url == url


def test_plain_http_to_a_port_of_tls_and_the_reverse(secure):
    kind, address = secure
    product, url = product_of(kind), url_of(address)
    with pytest.raises(StoreMismatch, match="or write https://"):
        ask(url.replace("https", "http"), product, Access())
