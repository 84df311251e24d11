"""An OpenSearch that testcontainers starts, and our own image, where Docker or podman runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from containers import container_engine
from search_servers import note_real_server

IMAGE = "localhost/vdr-db-tested:latest"
SCRIPT = """
import time

import opensearchpy
import services
from sparse_samples import zipf_rows
from testcontainers.core.container import DockerContainer

from vdr_db.connectors import ElasticsearchStore

with DockerContainer({image!r}).with_exposed_ports(9200) as container:
    url = f"http://{{container.get_container_host_ip()}}:{{container.get_exposed_port(9200)}}"
    end = time.monotonic() + 240
    while not services.answers(url):
        assert time.monotonic() < end, container.get_logs()
        time.sleep(0.5)
    rows = zipf_rows(100, 20, 500, seed=1)
    client = opensearchpy.OpenSearch([url], timeout=60)
    with ElasticsearchStore("contained", client=client, replicas=0) as store:
        store.create(500)
        assert store.upsert(rows, list(range(100))).count == 100
        assert store.search(rows[7], 1)[0].id == 7
        assert store.rollover() == "contained-000002"
        assert store.count() == 100
    print(services.version_of(url))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_that_testcontainers_started(tmp_path, request):
    pytest.importorskip("testcontainers")
    with container_engine(tmp_path) as engine:
        image = engine.opensearch_image()
        engine.check_ports(image)
        # testcontainers reads its settings when it is imported, so it gets a process of its own.
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT.format(image=image)],
            env=environment_with(engine.environment),
            capture_output=True,
            text=True,
            timeout=500,
            cwd="/",  # in the repository, the folder vdr_db/ hides the library that is installed
        )
    assert done.returncode == 0, done.stderr[-4000:]
    note_real_server(request, f"{done.stdout.strip()} in a container of {engine.tool}")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_our_image_is_built_and_answers(tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    files.chmod(0o777)  # the image runs as a user of its own
    texts = [{"_id": "1", "text": "a cat sleeps"}, {"_id": "2", "text": "rockets fly"}]
    (files / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    with container_engine(tmp_path) as engine:
        engine.library_image(IMAGE)
        try:
            demo = engine.output("run", "--rm", "--network=none", IMAGE, "demo")
            mounted = ["run", "--rm", "--network=none", f"--volume={files}:/data", IMAGE]
            engine.output(*mounted, "index", "texts.jsonl", "--store", "texts")
            found = engine.output(*mounted, "search", "kitten", "--store", "texts", "--json")
        finally:
            engine.run("image", "rm", "--force", IMAGE, check=False)
    assert "nDCG@10" in demo, demo
    assert json.loads(found)["hits"][0]["id"] == "1", found


def environment_with(more):
    path = os.pathsep.join(part for part in sys.path if part)
    return {**os.environ, "PYTHONPATH": path, **more}
