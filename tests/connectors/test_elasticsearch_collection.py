"""`VDRElasticsearch`: texts go in, texts with reasons come out."""

from __future__ import annotations

import pytest
import services
from search_servers import remove_indices
from store_samples import WORDS, WordEncoder

from vdr_db.connectors.base import Store
from vdr_db.connectors.collections.collection import Collection
from vdr_db.connectors.collections.elasticsearch import VDRElasticsearch
from vdr_db.connectors.retry import RetryPolicy
from vdr_db.errors import StoreMismatch

TEXTS = ["Einstein published the theory", "a theory of chess", "chess is a game", ""]
IDS = ["einstein", 1, "1", 4]
"""One text has no token, two ids differ in type only."""


@pytest.fixture
def open_collection(server):
    opened = []

    def open_one(index=None, encoder=None, **options):
        options.setdefault("retry", RetryPolicy(base_s=0.001))
        collection = VDRElasticsearch(
            index or services.unique_name(), encoder, replicas=0, **server.options(), **options
        )
        opened.append(collection)
        return collection

    yield open_one
    for collection in opened:
        remove_indices(collection.store)
        collection.close()


def test_texts_are_found_and_explained(open_collection):
    articles = open_collection(encoder=WordEncoder())
    store: Store = articles.store
    assert store.width is None
    assert articles.add_texts(TEXTS, ids=IDS, payloads=[{"n": n} for n in range(4)]) == IDS
    assert articles.count() == 4
    hits = articles.search("Einstein published", limit=2)
    assert hits[0].id == "einstein"
    assert hits[0].payload == {"n": 0, "text": TEXTS[0]}
    terms = articles.explain("Einstein published", "einstein")
    assert sum(term.product for term in terms) == pytest.approx(hits[0].score, rel=2**-8)
    assert [term.product for term in terms] == sorted((t.product for t in terms), reverse=True)
    assert [hit.id for hit in articles.search("chess", filter={"n": 2})] == ["1"]
    assert [len(found) for found in articles.search_batch(["chess", "zzz"], 5)] == [2, 0]
    assert list(articles.ids({"n": {"gte": 1}})) == [1, 4, "1"]
    assert articles.delete(filter={"n": {"gt": 2}}) == 1
    assert articles.delete(["1"]) == 1
    assert [record.id for record in articles.get([1, "1"])] == [1]


def test_text_and_vector_together(open_collection):
    articles = open_collection(encoder=WordEncoder(), text_fields=["text"])
    articles.create()
    with articles.loading():
        articles.add_texts(TEXTS, ids=IDS)
    found = articles.search_with_text("Einstein published", 3)
    assert found[0].id == "einstein"
    assert articles.search_with_text("chess", 3, {"text": TEXTS[2]}, fusion="sum")[0].id == "1"


def test_a_rebuild_may_change_the_encoder(open_collection):
    articles = open_collection(encoder=WordEncoder())
    articles.add_texts(TEXTS, ids=IDS)
    articles.create_template()
    other = WordEncoder(tokens=(*WORDS, "more"))
    with articles.rebuild(other, expected=2) as fresh:
        assert isinstance(fresh, Collection)
        fresh.add_texts(TEXTS[:2], ids=IDS[:2])
    assert articles.encoder is other
    assert articles.count() == 2
    assert articles.search("Einstein")[0].id == "einstein"
    assert articles.rollover().endswith("-000003")
    name = articles.store.name
    with pytest.raises(StoreMismatch):
        open_collection(name, WordEncoder())
    assert open_collection(name, WordEncoder(tokens=(*WORDS, "more"))).count() == 2
