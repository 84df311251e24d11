"""A collection of nothing but a name: where it is, which model it has, and what that costs."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
import services
from search_servers import remove_indices
from store_samples import WordEncoder, row

from vdr_db.connectors import AsyncVDRQdrant, Collection, MemoryStore, VDRElasticsearch, VDRQdrant
from vdr_db.connectors.address import Server
from vdr_db.connectors.collections import encoding
from vdr_db.errors import ConfigError, StoreMismatch

VARIABLES = (
    *("VDR_DB_QDRANT_URL", "VDR_DB_QDRANT_API_KEY", "VDR_DB_MODEL"),
    *("VDR_DB_ELASTICSEARCH_URL", "VDR_DB_ELASTICSEARCH_API_KEY"),
)
TEXTS = ["a cat sleeps", "rockets fly"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty working directory, and nothing in the environment."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_name_is_enough(place):
    with VDRQdrant("articles") as articles:
        assert repr(articles).endswith(f"in {place}/articles.qdrant), vdr-mini)")
        assert articles.count() == 0
        assert list(place.iterdir()) == [], "nothing is made by looking"
        ids = articles.add_texts(TEXTS)
        assert articles.search("kitten")[0].payload["text"] == "a cat sleeps"
        assert articles.explain("cat", ids[0])[0].token == "cat"
    assert (place / "articles.qdrant").is_dir()

    async def main():
        async with AsyncVDRQdrant("articles") as articles:
            return await articles.search("kitten", 1)

    assert asyncio.run(main())[0].payload["text"] == "a cat sleeps"


def test_opening_and_looking_load_no_model(place):
    code = """
import sys
from vdr_db.connectors import VDRQdrant
with VDRQdrant("articles") as articles:
    articles.count(), repr(articles)
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"], done.stderr


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("my articles", "my%20articles.qdrant"),
        ("../up", "..%2Fup.qdrant"),
        ("a:b\0c%", "a%3Ab%00c%25.qdrant"),
        ("Статьи", "Статьи.qdrant"),
        ("a\ud800", "a%ED%A0%80.qdrant"),
    ],
)
def test_any_name_is_a_folder_here(place, name, folder):
    with VDRQdrant(name, WordEncoder()) as articles:
        articles.add_texts(["chess"], ["a"])
    assert [path.name for path in place.iterdir()] == [folder]
    with VDRQdrant(name, WordEncoder()) as articles:
        assert articles.search("chess")[0].id == "a"
    with pytest.raises(ConfigError, match="must be a name"):
        VDRQdrant("")


def test_the_server_of_the_environment(place, monkeypatch):
    pytest.importorskip("qdrant_client")
    from qdrant_contract_server import QdrantContractServer

    with QdrantContractServer(place / "server") as server:
        server.api_key = "a-secret-key-4711"
        monkeypatch.setenv("VDR_DB_QDRANT_URL", server.url)
        monkeypatch.setenv("VDR_DB_QDRANT_API_KEY", server.api_key)
        options = {"client_options": {"grpc_port": server.grpc_port}}
        with pytest.warns(UserWarning, match="Api key is used with an insecure"):
            opened = VDRQdrant("articles", WordEncoder(), **options)
        with opened as articles:
            articles.add_texts(["chess"], ["a"])
            assert articles.search("chess")[0].id == "a"
            assert server.url in repr(articles)
            assert "4711" not in repr(articles)
        assert sorted(path.name for path in place.iterdir()) == ["server"]
        # Its key goes nowhere else, and a folder that is named wins.
        with VDRQdrant("other", WordEncoder(), path="here") as articles:
            assert "here" in repr(articles)


def test_elasticsearch_of_the_environment(stand_in, monkeypatch):
    monkeypatch.setenv("VDR_DB_ELASTICSEARCH_URL", stand_in.url)
    name = services.unique_name()
    with VDRElasticsearch(name, WordEncoder(), replicas=0) as articles:
        articles.add_texts(["chess"], ["a"])
        assert articles.search("chess")[0].id == "a"
        assert repr(articles) == f"VDRElasticsearch({name!r} at {stand_in.url}, words)"
        remove_indices(articles.store)


def test_elasticsearch_is_at_home_by_default(monkeypatch):
    asked = []

    class Stopped(Exception):
        pass

    def connect(**options):
        asked.append(options)
        raise Stopped

    monkeypatch.setattr("vdr_db.connectors.elasticsearch.store.connect", connect)
    monkeypatch.setattr(
        "vdr_db.connectors.collections.elasticsearch.ask",
        lambda url, *_: Server("elasticsearch", "9.4.3", url),
    )
    monkeypatch.setenv("VDR_DB_ELASTICSEARCH_API_KEY", "key")
    with pytest.raises(Stopped):
        VDRElasticsearch("articles")
    with pytest.raises(Stopped):
        VDRElasticsearch("articles", url="http://elsewhere:9200")
    assert [(one["url"], one["api_key"]) for one in asked] == [
        (["http://localhost:9200"], "key"),
        (["http://elsewhere:9200"], None),
    ]


def test_a_model_by_its_name(place, monkeypatch):
    loaded = []
    load = encoding.load_encoder
    monkeypatch.setattr(
        encoding, "load_encoder", lambda name, **_: (loaded.append(name), load("vdr-mini"))[1]
    )
    monkeypatch.setenv("VDR_DB_MODEL", "the/model of the environment")
    with VDRQdrant("a", path=":memory:") as first, VDRQdrant("b", place, path=":memory:") as second:
        assert "the/model of the environment" in repr(first)
        assert str(place) in repr(second)
        assert loaded == []
        for collection in (first, second):
            collection.add_texts(TEXTS)
            collection.search("cat")
        assert loaded == ["the/model of the environment", str(place)], "once each"
        assert second.encoder.vocabulary.size == second.store.width
    with Collection(MemoryStore(), "a name") as exact:
        exact.add_texts(TEXTS, [1, 2])
        assert exact.search("kitten")[0].id == 1


def test_a_model_that_is_not_there_is_told_when_it_is_needed(monkeypatch):
    with VDRQdrant("articles", "no/such folder") as articles:
        assert articles.count() == 0
        with pytest.raises(ConfigError, match="no/such folder"):
            articles.add_texts(TEXTS)


def test_rows_need_no_model(place):
    with VDRQdrant("rows") as rows:
        rows.add_rows(row({1: 1.0}, width=7), ["a"])
        assert rows.search(row({1: 2.0}, width=7))[0].id == "a"
        assert rows.explain(row({1: 2.0}, width=7), "a")[0].token == "1"
        with pytest.raises(StoreMismatch, match="vocabulary size 7"):
            rows.search("cat")
