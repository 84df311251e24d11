"""Real servers for tests: from an address in the environment, or a container, or an honest skip.

```
VDR_TEST_ES_URL, VDR_TEST_OPENSEARCH_URL,
VDR_TEST_QDRANT_URL                             use that server; fail if it does not answer
otherwise, OpenSearch: Maven and a JDK          start a node, see `opensearch_node`
otherwise, a Docker engine that answers in 2 s  start a container of a pinned image
otherwise                                       skip, with the reason
VDR_TEST_REQUIRE_SERVICES=1                     fail where a skip would be
VDR_TEST_ES_API_KEY, VDR_TEST_QDRANT_API_KEY    credentials for the servers of the first line
```

Tests against an address given from outside touch only names that they made up themselves.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import socket
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import opensearch_node
import pytest

ELASTICSEARCH_IMAGE = "docker.elastic.co/elasticsearch/elasticsearch:9.5.2"
QDRANT_IMAGE = "qdrant/qdrant:v1.19.1"


@dataclass(frozen=True)
class Service:
    """Where a server answers.

    Attributes:
        url: Address of its HTTP interface.
        grpc_port: Port of its gRPC interface on the same host, for Qdrant.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    grpc_port: int | None = None


def unique_name(prefix: str = "vdr-test") -> str:
    """A name for a collection or index that nothing else uses."""
    return f"{prefix}-{uuid.uuid4().hex[:12]}"


def skip(reason: str) -> NoReturn:
    """Skips the test, or fails it where servers are required."""
    if os.environ.get("VDR_TEST_REQUIRE_SERVICES") == "1":
        pytest.fail(f"{reason}, and VDR_TEST_REQUIRE_SERVICES=1 asks for a server", pytrace=False)
    pytest.skip(reason)


def docker_answers(timeout_s: float = 2.0) -> bool:
    """Whether an engine answers a ping. The `docker` command may be there without one."""
    address = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    parts = urlsplit(address)
    if parts.scheme == "unix":
        connection, target = socket.socket(socket.AF_UNIX), parts.path
    elif parts.scheme == "tcp" and parts.hostname:
        connection, target = socket.socket(), (parts.hostname, parts.port or 2375)
    else:
        return False
    try:
        with connection:
            connection.settimeout(timeout_s)
            connection.connect(target)
            connection.sendall(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")
            return connection.recv(64).startswith(b"HTTP/1.")
    except OSError:
        return False


def answers(url: str, timeout_s: float = 5.0) -> bool:
    """Whether anything speaks HTTP there; 401 counts, silence does not."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s):
            return True
    except urllib.error.HTTPError as error:
        error.close()
        return True
    except (OSError, http.client.HTTPException):
        return False


def _from_environment(kind: str) -> Service | None:
    url = os.environ.get(f"VDR_TEST_{kind}_URL")
    if not url:
        return None
    if not answers(url):
        pytest.fail(f"VDR_TEST_{kind}_URL is set and nothing answers there", pytrace=False)
    port = os.environ.get(f"VDR_TEST_{kind}_GRPC_PORT")
    api_key = os.environ.get(f"VDR_TEST_{kind}_API_KEY")
    return Service(url.rstrip("/"), api_key, int(port) if port else None)


def _check_containers() -> None:
    if not docker_answers():
        skip("no URL and no Docker engine")
    if importlib.util.find_spec("testcontainers") is None:
        skip("a Docker engine answers, and the testcontainers package is not installed")


@contextmanager
def running_elasticsearch() -> Iterator[Service]:
    """A real Elasticsearch for a session of tests."""
    given = _from_environment("ES")
    if given is not None:
        yield given
        return
    _check_containers()
    from testcontainers.community.elasticsearch import ElasticSearchContainer

    container = ElasticSearchContainer(ELASTICSEARCH_IMAGE, mem_limit="2g")
    container.with_env("discovery.type", "single-node")
    container.with_env("ES_JAVA_OPTS", "-Xms512m -Xmx512m")
    with container as running:
        host, port = running.get_container_host_ip(), running.get_exposed_port(9200)
        yield Service(f"http://{host}:{port}")


def version_of(url: str) -> str:
    """Name and version of a search server."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        version = json.load(answer)["version"]
    return f"{'OpenSearch' if 'distribution' in version else 'Elasticsearch'} {version['number']}"


@contextmanager
def running_opensearch(folder: Path, owner: int) -> Iterator[Service]:
    """A real OpenSearch for all processes of a run, which share `folder` and end with `owner`."""
    given = _from_environment("OPENSEARCH")
    if given is not None:
        yield given
        return
    reason = opensearch_node.why_missing()
    if reason is not None:
        skip(reason)
    with opensearch_node.shared_node(folder, owner) as url:
        yield Service(url)


@contextmanager
def running_qdrant() -> Iterator[Service]:
    """A real Qdrant for a session of tests."""
    given = _from_environment("QDRANT")
    if given is not None:
        yield given
        return
    _check_containers()
    from testcontainers.community.qdrant import QdrantContainer

    with QdrantContainer(image=QDRANT_IMAGE) as running:
        host = running.get_container_host_ip()
        ports = (running.get_exposed_port(6333), running.get_exposed_port(6334))
        yield Service(f"http://{host}:{ports[0]}", None, int(ports[1]))
