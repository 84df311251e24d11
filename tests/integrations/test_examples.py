"""The examples of docs/integrations.md run, and find the right text."""

from __future__ import annotations

import os
import re
from contextlib import closing
from pathlib import Path

import pytest

from vdr_db.checkpoints.assets import DEFAULT_MODEL

# The Python double of Qdrant says so of every index that a framework asks for.
pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")

DOCS = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")
SECTIONS = {
    title: re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    for title, text in re.findall(r"^#+ (.+)\n((?:(?!^#).*\n?)*)", DOCS, re.MULTILINE)
}
os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")


@pytest.fixture(scope="module")
def beginning():
    names = {}
    exec(SECTIONS["Other frameworks"][0], names)
    assert names["model"] == DEFAULT_MODEL
    return names


def run(code, names):
    """Runs an example; gives the value of its last line."""
    lines = code.rstrip().splitlines()
    exec("\n".join(lines[:-1]), names)
    return eval(lines[-1], names)


def need(*packages):
    for package in packages:
        pytest.importorskip(package, reason=f"{package} is not installed")


def test_every_section_has_its_test():
    assert list(SECTIONS) == [
        "Other frameworks", "LangChain", "Elasticsearch's `VectorStore`", "LlamaIndex", "Haystack",
        "sentence-transformers",
    ]  # fmt: skip
    assert [len(blocks) for blocks in SECTIONS.values()] == [1, 2, 1, 1, 1, 1]


def test_langchain(beginning):
    need("langchain_core", "langchain_qdrant", "qdrant_edge")
    names = dict(beginning)
    ((found, score),) = run(SECTIONS["LangChain"][0], names)
    assert found.page_content == names["texts"][0]
    assert score > 0
    names["store"].client.close()
    id, score, words = run(SECTIONS["LangChain"][1], names)
    with closing(names["notes"]):
        assert (id, len(words) > 0) == ("clinic", True)
        assert names["best"].metadata["year"] == 2024
        assert score > 0


def test_elasticsearch(beginning, stand_in):
    need("elasticsearch.helpers.vectorstore")
    names = dict(beginning)
    (code,) = SECTIONS["Elasticsearch's `VectorStore`"]
    # The stand-in is slow on many clauses.
    code = code.replace("http://localhost:9200", stand_in.url)
    code = code.replace("VDRRetrievalStrategy()", "VDRRetrievalStrategy(query_top_k=16)")
    (hit,) = run(code, names)
    with closing(names["client"]) as client:
        assert hit["_id"] == "clinic"
        client.indices.delete(index="notes")


def test_llamaindex(beginning):
    need("llama_index.core", "llama_index.vector_stores.qdrant")
    names = dict(beginning)
    found = run(SECTIONS["LlamaIndex"][0], names)
    assert found[0].text == names["texts"][0]
    names["store"].client.close()


def test_haystack(beginning):
    need("haystack", "haystack_integrations.document_stores.qdrant")
    names = dict(beginning)
    found = run(SECTIONS["Haystack"][0], names)
    assert found[0].content == names["texts"][0]
    names["store"].close()


def test_semantic_search(beginning):
    need("qdrant_client")
    names = dict(beginning)
    exec(SECTIONS["sentence-transformers"][0], names)
    assert names["results"][0][0]["corpus_id"] == 0
    assert names["again"][0][0] == names["results"][0][0]
    names["index"][0].close()
