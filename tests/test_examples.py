"""The scripts of `examples/`, as a person runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import services
from search_servers import note_real_server

EXAMPLES = Path(__file__).parents[1] / "examples"
RUN = {
    "hybrid_search", "images", "ingest", "langchain_rag", "own_model", "quickstart",
}  # fmt: skip


def run(name, folder, *arguments):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def opensearch(opensearch_url, request):
    """Address of the real OpenSearch, without what the scripts make there."""
    note_real_server(request, services.version_of(opensearch_url))
    yield f"opensearch+{opensearch_url}"
    import opensearchpy

    with opensearchpy.OpenSearch([opensearch_url]) as client:
        client.indices.delete(index="parts-*,notes-*")


def test_every_script_has_its_test():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == RUN


def test_quickstart(tmp_path):
    told = run("quickstart", tmp_path).splitlines()
    assert [line.split(" (")[0] for line in told[:3]] == [
        "medicine: clinic",
        "classical music: concert",
        "watering flowers: garden",
    ]
    assert told[3] == "of 2025 and later: ['garden']"


def test_ingest_goes_on(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"_id": i, "text": f"note {i}"}) + "\n" for i in range(3)))
    for told in ("3 written, 0 refused", "0 written, 0 refused"):
        assert told in run("ingest", tmp_path, "store", "notes", "corpus.jsonl")
    assert (tmp_path / "notes.ledger").exists()


def test_ingest_and_hybrid_search_on_a_server(tmp_path, opensearch):
    (tmp_path / "corpus.jsonl").write_text('{"_id": "a", "text": "a note"}\n')
    assert "1 written, 0 refused" in run("ingest", tmp_path, opensearch, "notes", "corpus.jsonl")
    told = run("hybrid_search", tmp_path, opensearch).splitlines()
    assert told[0].endswith("with BM25 ['ax-771', 'ax-770']")
    assert "['fluid'" in told[1]
    assert "['bulb'" in told[2]


def test_langchain_rag(tmp_path):
    pytest.importorskip("langchain_core", reason="langchain-core is not installed")
    assert run("langchain_rag", tmp_path).startswith("[brakes] Bleed the brakes")


def test_images(tmp_path):
    found, nearest = run("images", tmp_path).splitlines()
    assert found.startswith("images for 'circle': ['")
    assert "nearest to circle.png: ['circle.png'" in nearest


def test_own_model(tmp_path):
    told = run("own_model", tmp_path).splitlines()
    after = [line.split(", after ")[1] for line in told]
    for words, line in zip(("hardware", "build"), after, strict=True):
        assert words in line
    assert "hardware" not in told[0].split(", after ")[0]
    assert (tmp_path / "own" / "model").is_dir()
