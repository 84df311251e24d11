"""Documents in passages: found once, shown by the passage that matches, replaced and gone whole."""

from __future__ import annotations

import asyncio
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_servers import on_opensearch
from store_samples import WIDTH, WordEncoder, opened, row

from vdr_db.connectors import (
    AsyncCollection,
    Collection,
    MemoryStore,
    Passage,
    Passages,
    QdrantStore,
    VDRQdrant,
)
from vdr_db.connectors.documents import DocumentView
from vdr_db.connectors.passages import PassageRows
from vdr_db.connectors.validation import COUNT_FIELD, DOCUMENT_FIELD, NUMBER_FIELD
from vdr_db.errors import ConfigError, InputError, RejectedRows, StoreMismatch
from vdr_db.sparse import SparseRows
from vdr_db.text.passages import passage_spans

# The double of the client keeps no payload indexes and warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")
KINDS = ["memory", "edge", "client", "OpenSearch"]
CUT = Passages(6, 2)


class CuttingEncoder(WordEncoder):
    def cut_passages(self, texts, *, tokens, overlap):
        return [
            passage_spans(
                text,
                [match.span() for match in re.finditer(r"\w+", text)],
                tokens=tokens,
                overlap=overlap,
            )
            for text in texts
        ]


RELATIVITY = (
    "Paris is the capital of france. Chess is a game of kings. Go is a game of stones. "
    "Einstein published the theory in 1905."
)
GAMES = "Chess is a game. Chess and go. Kings and stones. Light travels fast."


@pytest.fixture(params=KINDS)
def store(request):
    if request.param == "OpenSearch":
        with on_opensearch(request) as store:
            yield store
        return
    with opened(request.param) as store:
        yield store


@pytest.fixture
def articles(store):
    collection = Collection(store, CuttingEncoder())
    collection.add_texts(
        [RELATIVITY, GAMES, "stones"],
        ids=["a", 7, "s"],
        payloads=[{"year": 1905}, {"year": 2000}, None],
        passages=CUT,
    )
    return collection


def points_of(store):
    """Document → numbers of its passages."""
    found = {}
    for record in store.get(list(store.ids())):
        found.setdefault(record.payload[DOCUMENT_FIELD], []).append(record.payload[NUMBER_FIELD])
    return {name: sorted(numbers) for name, numbers in found.items()}


def test_a_document_is_found_once_by_its_best_passage(articles):
    hits = articles.search("einstein published the theory", limit=3)
    assert hits[0].id == "a"
    assert len({hit.id for hit in hits}) == len(hits)
    best = hits[0].passage
    assert RELATIVITY[best.start : best.stop] == hits[0].payload["text"]
    assert hits[0].payload["text"] == "Einstein published the theory in 1905."
    assert hits[0].payload == {"year": 1905, "text": hits[0].payload["text"]}
    assert (best.number, best.count) == (len(points_of(articles.store)["1a"]) - 1, best.number + 1)


def test_documents_are_counted_fetched_and_filtered_as_wholes(articles):
    assert articles.count() == 3
    assert articles.store.count() > 6
    assert sorted(map(str, articles.ids())) == ["7", "a", "s"]
    assert articles.count({"year": {"gte": 1950}}) == 1
    assert list(articles.ids({"year": 1905})) == ["a"]
    record, games = articles.get(["a", 7, "unknown"])
    assert (record.payload["text"], games.payload["text"]) == (RELATIVITY, GAMES)
    assert [hit.id for hit in articles.search("chess", filter={"year": 2000})] == [7]
    first, second = articles.search("chess game", limit=2)
    assert articles.search("chess game", limit=1, offset=1) == [second]
    batch = articles.search_batch(["chess game", "stones", "unknownword"], limit=2)
    assert batch[0] == [first, second]
    assert batch[2] == []


def test_documents_are_paged_changed_and_cut_off_as_wholes(articles):
    whole = {record.id: record for record in articles.get(list(articles.ids()))}
    pages = [page := articles.scroll(1)]
    while page.next is not None:
        pages.append(page := articles.scroll(1, after=page.next))
    listed = [record for page in pages for record in page.records]
    assert {record.id: record.payload for record in listed} == {
        id: record.payload for id, record in whole.items()
    }
    id = listed[0].id
    assert articles.update_payloads([id, "nobody"], [{"seen": True}] * 2) == 1
    assert articles.count({"seen": True}) == 1
    assert articles.get([id])[0].payload == {**whole[id].payload, "seen": True}
    hits = articles.search("chess stones einstein", limit=5)
    least = hits[0].score
    wanted = [hit for hit in hits if hit.score >= least]
    assert 0 < len(wanted) < len(hits)
    assert articles.search("chess stones einstein", limit=5, min_score=least) == wanted
    assert articles.search_batch(["chess stones einstein"], 5, offset=1) == [hits[1:]]


def test_a_score_is_explained_on_the_passage_that_made_it(articles):
    (hit,) = articles.search("theory of relativity", limit=1)
    terms = articles.explain("theory of relativity", hit.id)
    assert sum(term.product for term in terms) == pytest.approx(hit.score, rel=0.01)
    (record,) = articles.records_of([hit])
    assert record.payload["text"] == hit.payload["text"]
    query = articles.encoder.encode_queries(["theory of relativity"])
    assert float(record.row.dot(query)[0, 0]) == pytest.approx(hit.score, rel=0.01)
    with pytest.raises(InputError, match="no document with the id 'b'"):
        articles.explain("theory", "b")


@pytest.mark.parametrize("text", ["Chess.", GAMES, "", RELATIVITY + " " + GAMES])
def test_a_new_text_leaves_nothing_of_the_old_one(articles, text):
    articles.add_texts([text], ids=["a"])
    assert articles.count() == 3
    expected = len(CuttingEncoder().cut_passages([text], tokens=6, overlap=2)[0])
    assert points_of(articles.store)["1a"] == list(range(expected))
    assert articles.get(["a"])[0].payload["text"] == text
    found = articles.search("einstein theory", limit=5)
    assert ("a" in [hit.id for hit in found]) == ("Einstein" in text)


def test_a_document_goes_with_all_its_passages(articles):
    assert articles.delete(["a", "unknown"]) == 1
    assert set(points_of(articles.store)) == {f"{0}{7:020d}", "1s"}
    assert articles.delete(filter={"year": 2000}) == 1
    assert set(points_of(articles.store)) == {"1s"}
    assert articles.count() == 1


def test_what_was_cut_short_in_a_write_goes_with_the_next_one(articles):
    """A kill between two requests leaves passages without a first one, or old ones beyond it."""
    view = DocumentView(articles.store)
    rows = SparseRows.from_dicts([{i: 1.0} for i in range(1, 5)], articles.store.width)
    parts = PassageRows(rows, np.array([0, 4]), [(i, i + 1) for i in range(4)])
    view.upsert(parts, ["torn"], [{"text": "abcd"}])
    articles.store.delete(["torn"])
    assert points_of(articles.store)["1torn"] == [1, 2, 3]
    assert view.get(["torn"]) == []
    view.upsert(parts[:1], ["a"], [{"text": "abcd"}])
    view.upsert(SparseRows.from_dicts([{1: 1.0}], rows.width), ["torn"], [{"text": "e"}])
    assert points_of(articles.store)["1torn"] == [0]
    assert points_of(articles.store)["1a"] == [0, 1, 2, 3]


def test_several_passages_can_add_up(articles):
    plain = {hit.id: hit for hit in articles.search("chess game stones", limit=3)}
    both = articles.search("chess game stones", limit=3, best_passages=2)
    query = articles.encoder.encode_queries(["chess game stones"])
    for hit in both:
        count = plain[hit.id].passage.count
        names = articles.store.get(list(articles.store.ids()), True)
        own = [r.row for r in names if r.payload[DOCUMENT_FIELD].endswith(str(hit.id))]
        assert len(own) == count
        scores = sorted(SparseRows.concat(own).dot(query)[:, 0])
        assert hit.score == pytest.approx(sum(scores[-2:]), rel=0.01)
        assert hit.passage == plain[hit.id].passage


weights = st.dictionaries(st.integers(0, 11), st.floats(0.25, 8, width=16), min_size=1, max_size=5)


@settings(max_examples=40)
@given(
    st.lists(st.lists(weights, min_size=1, max_size=6), min_size=1, max_size=12),
    weights,
    st.integers(1, 8),
    st.integers(1, 3),
)
def test_documents_are_ranked_as_their_passages_say(documents, query, limit, best):
    """Against scores worked out by hand, where nothing groups and where the client does."""
    bounds = np.concatenate(([0], np.cumsum([len(one) for one in documents])))
    rows = SparseRows.from_dicts([one for some in documents for one in some], WIDTH)
    parts = PassageRows(rows, bounds, [(0, 0)] * len(rows))
    asked = row(query)
    scores = rows.dot(asked)[:, 0]
    totals = [sum(sorted(scores[a:b][scores[a:b] > 0])[-best:]) for a, b in pairwise(bounds)]
    wanted = sorted((total for total in totals if total > 0), reverse=True)[:limit]
    for kind in ("memory", "client"):
        with opened(kind) as store:
            store.create(WIDTH, passages=CUT)
            view = DocumentView(store)
            view.upsert(parts, range(len(documents)))
            hits = view.search(asked, limit, best=best)
            assert [hit.score for hit in hits] == pytest.approx(wanted, rel=1e-5)
            for hit in hits:
                assert hit.score == pytest.approx(totals[hit.id], rel=1e-5)


def test_an_engine_that_gives_up_grouping_is_asked_in_another_way(monkeypatch):
    with opened("client") as store:
        store.create(WIDTH, passages=CUT)
        view = DocumentView(store)
        rows = SparseRows.from_dicts([{1: 9.0 - i / 10} for i in range(40)], WIDTH)
        view.upsert(PassageRows(rows, np.array([0, 38, 39, 40]), [(0, 0)] * 40), [1, 2, 3])
        monkeypatch.setattr(store, "search_groups", lambda *_, **__: [])
        assert [hit.id for hit in view.search(row({1: 1.0}), 3)] == [1, 2, 3]


def test_a_collection_keeps_to_what_it_was_made_with(store):
    whole = Collection(store, CuttingEncoder())
    whole.add_texts([RELATIVITY], ids=["a"])
    with pytest.raises(StoreMismatch, match="holds whole documents, not passages of"):
        whole.add_texts([GAMES], ids=["b"], passages=True)
    assert whole.store.passages is None
    (hit,) = whole.search("einstein")
    assert (hit.payload["text"], hit.passage) == (RELATIVITY, None)
    with pytest.raises(ConfigError, match="`best_passages` is of a collection of passages"):
        whole.search("einstein", best_passages=2)


def test_other_passages_than_those_of_the_collection_are_refused(articles):
    with pytest.raises(StoreMismatch, match=r"holds passages of .* build another collection"):
        articles.add_texts([GAMES], ids=["b"], passages=Passages(12, 2))
    assert articles.store.passages == CUT


def test_the_folder_remembers_its_passages(tmp_path):
    with VDRQdrant("a", CuttingEncoder(), path=tmp_path / "a") as first:
        first.add_texts([RELATIVITY], ids=["a"], passages=CUT)
        points = first.store.count()
    with VDRQdrant("a", CuttingEncoder(), path=tmp_path / "a") as again:
        assert again.store.passages == CUT
        again.add_texts([RELATIVITY], ids=["b"])
        assert again.store.count() == 2 * points
        assert again.count() == 2
        assert again.search("einstein", limit=1)[0].passage == Passage(
            points - 1, points, RELATIVITY.index("Einstein"), len(RELATIVITY)
        )


def test_rows_and_documents_of_one_passage_live_in_the_same_collection(articles):
    rows = articles.encoder.encode_documents(["einstein einstein"])
    articles.add_rows(rows, ["row"], [{"text": "einstein einstein"}])
    (record,) = articles.get(["row"])
    assert record.payload["text"] == "einstein einstein"
    hits = articles.search("einstein", limit=2)
    assert {hit.id for hit in hits} == {"a", "row"}


def test_nothing_stays_of_a_document_with_a_passage_that_cannot_be_stored(articles, monkeypatch):
    upsert = articles.store.upsert

    def refusing(rows, ids, payloads=None, **more):
        bad = [i for i, one in enumerate(payloads) if one[NUMBER_FIELD] == 1]
        good = np.setdiff1d(np.arange(len(ids)), bad)
        upsert(rows[good], [ids[i] for i in good], [payloads[i] for i in good], **more)
        raise RejectedRows([ids[i] for i in bad], ["too bad"] * len(bad))

    monkeypatch.setattr(articles.store, "upsert", refusing)
    with pytest.raises(RejectedRows) as refused:
        articles.add_texts([GAMES, "go"], ids=["a", "whole"])
    assert (refused.value.ids, refused.value.reasons) == (["a"], ["too bad"])
    assert "1a" not in points_of(articles.store)
    assert points_of(articles.store)["1whole"] == [0]


def test_texts_without_tokens_follow_the_policy_for_empty_rows(articles):
    assert articles.add_texts(["", "go"], ids=["e", "g"], empty="skip") == ["g"]
    with pytest.raises(RejectedRows):
        articles.add_texts(["", "go"], ids=["e", "h"], empty="error")
    assert [record.id for record in articles.get(["e", "g", "h"])] == ["g", "h"]


def test_ids_and_fields_of_passages_are_not_taken():
    with Collection(MemoryStore(), CuttingEncoder()) as articles:
        with pytest.raises(InputError, match="ids that start with '_vdr_passage:'"):
            articles.add_texts(["go"], ids=["_vdr_passage:1:x"], passages=CUT)
        with pytest.raises(InputError, match=f"'{COUNT_FIELD}' belongs to the library"):
            articles.add_texts(["go"], ids=["a"], payloads=[{COUNT_FIELD: 3}])


def test_an_encoder_that_cannot_cut_is_named():
    with (
        Collection(MemoryStore(), WordEncoder()) as articles,
        pytest.raises(ConfigError, match="got WordEncoder without `cut_passages`"),
    ):
        articles.add_texts(["go"], ids=["a"], passages=True)


def test_dense_vectors_are_of_whole_documents():
    with (
        QdrantStore("c", path=":memory:", dense={"title": 4}) as store,
        pytest.raises(ConfigError, match="dense vectors are of whole documents"),
    ):
        store.create(WIDTH, passages=CUT)


def test_an_event_loop_sees_the_same_documents():
    async def main():
        collection = Collection(MemoryStore(), CuttingEncoder())
        async with AsyncCollection(collection) as articles:
            await articles.add_texts([RELATIVITY, GAMES], ids=["a", "g"], passages=CUT)
            hits = await articles.search("einstein", limit=2)
            records = await articles.records_of(hits)
            return hits, records, await articles.count(), [id async for id in articles.ids()]

    hits, records, count, ids = asyncio.run(main())
    assert [hit.id for hit in hits] == ["a"]
    assert records[0].payload["text"] == hits[0].payload["text"]
    assert (count, ids) == (2, ["a", "g"])
