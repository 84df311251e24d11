"""Bombs against `vdr-db serve` with its usual budget: refused by name, and others are served."""

from __future__ import annotations

import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
from served_command import commanded, cpu_seconds, peak_mb
from tiny_png import deep_png, png

from vdr_db.budget import BUDGET

httpx = pytest.importorskip("httpx")
for module in ("fastapi", "uvicorn", "prometheus_client", "orjson", "torch", "PIL.Image"):
    pytest.importorskip(module)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peak memory out of /proc")

IMAGE = png(40, 30, lambda x, y: (6 * x, 8 * y, 90))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A collection of an image, by a model of texts and images."""
    from image_folders import write_cross_modal

    from vdr_db.cli.main import main

    folder = tmp_path_factory.mktemp("served")
    model = write_cross_modal(folder / "model", topk=60)
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(IMAGE)
    options = ["--store", str(folder / "store"), "--device", "cpu"]
    images = ["--images", str(folder / "images")]
    assert main(["index", *images, "--model", str(model), *options]) == 0
    return folder, options


@pytest.fixture
def served(place):
    """The process, warm: it has decoded an image and answered a query."""
    folder, options = place
    with (
        commanded(folder, *options) as (process, url),
        httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
    ):
        assert client.post("/api/search/image", files={"image": IMAGE}).status_code == 200
        assert client.get("/api/search", params={"q": "tea"}).status_code == 200
        yield process, client


def test_four_deep_images_at_once(served):
    process, client = served
    bomb = deep_png(7000)
    memory, began = peak_mb(process), cpu_seconds(process)
    with ThreadPoolExecutor(4) as pool:
        waiting = [
            pool.submit(client.post, "/api/search/image", files={"image": bomb}) for _ in range(4)
        ]
        assert client.get("/api/search", params={"q": "tea"}).status_code == 200
        answers = [one.result() for one in waiting]
    # Processor time of all four together: what the clock says is other programs' affair.
    assert cpu_seconds(process) - began < 2
    assert peak_mb(process) - memory < 200
    for answer in answers:
        assert answer.status_code == 400
        assert "7,000 by 7,000 pixels of 16 bits" in answer.json()["detail"]


def test_sixty_four_idle_connections(served):
    process, client = served
    memory, began = peak_mb(process), cpu_seconds(process)
    address = urlsplit(str(client.base_url))
    idle = [
        socket.create_connection((address.hostname, address.port), timeout=60) for _ in range(64)
    ]
    assert client.get("/api/search", params={"q": "tea"}).status_code == 200
    for one in idle:
        with one:
            told = b"".join(iter(lambda one=one: one.recv(4096), b""))
        assert told.startswith(b"HTTP/1.1 408 ")
        assert told.endswith(b"No request came within 1.5 s.")
    assert BUDGET.first_byte_s < 2
    assert cpu_seconds(process) - began < 2
    assert peak_mb(process) - memory < 200
    assert client.get("/api/search", params={"q": "tea"}).status_code == 200
