"""`Collection` and `VDRQdrant`: texts in, hits and reasons out."""

from __future__ import annotations

import datetime as dt
import tracemalloc

import pytest
from search_servers import on_opensearch
from store_samples import WORDS, WordEncoder, row

from vdr_db.connectors import Collection, Hit, MemoryStore, Term, VDRQdrant
from vdr_db.errors import (
    ConfigError,
    InputError,
    RejectedRows,
    ShapeError,
    StoreError,
    StoreMismatch,
)
from vdr_db.sparse import SparseRows

TEXTS = [
    "Einstein published the theory in 1905",
    "Chess is a game of kings",
    "Paris, capital of France",
]
IDS = ["einstein", "chess", 3]
QUESTION = "who published relativity theory"


@pytest.fixture
def encoder():
    return WordEncoder()


@pytest.fixture(params=["memory", "edge", "OpenSearch"])
def collection(request, encoder):
    if request.param == "OpenSearch":
        with on_opensearch(request) as store:
            yield Collection(store, encoder)
        return
    if request.param == "memory":
        opened = Collection(MemoryStore(), encoder)
    else:
        opened = VDRQdrant("articles", encoder, path=":memory:")
    with opened:
        yield opened


def test_texts_are_found_and_explained(collection):
    assert collection.add_texts(TEXTS, IDS, [{"year": 1905}, None, {"year": 250}]) == IDS
    assert collection.count() == 3
    (best, *rest) = collection.search(QUESTION)
    assert best.id == "einstein"
    assert best.payload == {"year": 1905, "text": TEXTS[0]}
    assert all(hit.score < best.score for hit in rest)

    terms = collection.explain(QUESTION, "einstein")
    assert all(isinstance(term, Term) for term in terms)
    assert [term.product for term in terms] == sorted((t.product for t in terms), reverse=True)
    assert sum(term.product for term in terms) == pytest.approx(best.score, rel=1e-6)
    named = {term.token: term for term in terms}
    assert {"published", "theory"} <= set(named)
    assert named["theory"].id == WORDS.index("theory")
    assert named["theory"].product == pytest.approx(
        named["theory"].query_weight * named["theory"].document_weight
    )
    assert collection.explain("chess", "einstein") == []


def test_searches(collection):
    collection.add_texts(TEXTS, IDS, [{"n": 0}, {"n": 1}, {"n": 2}])
    assert [hit.id for hit in collection.search("chess", filter={"n": {"lt": 1}})] == []
    assert [hit.id for hit in collection.search("of kings", 1)] == ["chess"]
    assert [hit.id for hit in collection.search("of kings", 1, offset=1)] == [3]
    batch = collection.search_batch(["of kings", "", QUESTION], limit=5)
    assert batch == [collection.search(q, 5) for q in ("of kings", "", QUESTION)]
    assert batch[1] == []
    vectors = collection.encoder.encode_queries(["of kings"])
    assert collection.search(vectors) == collection.search("of kings")
    assert collection.search_batch(vectors) == [collection.search("of kings")]
    assert collection.search_batch([]) == []


def test_adding_again_changes_nothing_or_replaces(collection):
    collection.add_texts(TEXTS, IDS)
    before = collection.search(QUESTION)
    collection.add_texts(TEXTS, IDS)
    assert collection.search(QUESTION) == before
    collection.add_texts(["go stones"], ["einstein"])
    assert collection.count() == 3
    assert collection.get(["einstein"])[0].payload == {"text": "go stones"}


def test_ids_made_of_the_content(collection):
    ids = collection.add_texts(["a game", "go stones", "a game"])
    assert ids[0] == ids[2] != ids[1]
    assert collection.count() == 2
    assert collection.add_texts(["go stones"]) == [ids[1]]
    assert collection.count() == 2
    with pytest.raises(InputError, match="different payloads"):
        collection.add_texts(["x", "x"], payloads=[{"n": 1}, {"n": 2}])
    with pytest.raises(InputError, match="different payloads"):
        collection.add_texts(["x", "x"], payloads=[{"n": 1}, {"n": 2}], batch_size=1)


def test_generators_are_taken_a_batch_at_a_time(collection):
    taken = 0

    def texts():
        nonlocal taken
        for i in range(10):
            taken += 1
            yield f"chess {i}"

    ids = collection.add_texts(texts(), (f"id {i}" for i in range(10)), batch_size=4)
    assert ids == [f"id {i}" for i in range(10)]
    assert collection.encoder.calls[:3] == [4, 4, 2]
    assert taken == 10
    assert collection.count() == 10


def test_memory_does_not_grow_with_the_texts(encoder):
    class Sink(MemoryStore):
        def upsert(self, rows, ids, payloads=None, *, empty="store"):
            return super().upsert(rows[:0], [])

    def peak(count: int) -> int:
        tracemalloc.start()
        with Collection(Sink(), encoder) as collection:
            long = "chess " * 200
            collection.add_texts((long for _ in range(count)), range(count), batch_size=50)
            size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(50)
    # Twenty more batches of 60 kB of text: only their ids may stay.
    assert peak(1100) < peak(100) + 400_000


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        (("a text",), TypeError, r"pass \['a text'\]"),
        ((b"a text",), TypeError, "sequence of strings"),
        ((["a", 3],), TypeError, "texts must be strings, got int"),
        ((["a", None],), TypeError, "got NoneType"),
        ((["a", "b"], ["x"]), ShapeError, "2 texts, 1 ids"),
        ((["a"], ["x", "y"]), ShapeError, "1 texts, 2 ids"),
        ((["a"], ["x"], [{}, {}]), ShapeError, "1 texts, 1 ids, 2 payloads"),
        ((["a", "b"], "xy"), TypeError, r"pass \['xy'\]"),
        ((["a", "b"], ["x", "x"]), InputError, "got 'x' twice"),
        ((["a"], [1.5]), InputError, "integers or strings"),
        ((["a"], ["x"], {"n": 1}), TypeError, r"pass \[payload\]"),
        ((["a"], ["x"], ["n"]), TypeError, "payloads must be mappings"),
        ((["a"], ["x"], [{"_vdr_id": 1}]), InputError, "belong to the library"),
        ((["a"], ["x"], [{"text": "b"}]), InputError, "another value in 'text'"),
    ],
)
def test_what_is_wrong_with_a_call(collection, arguments, error, told):
    with pytest.raises(error, match=told):
        collection.add_texts(*arguments)
    assert collection.count() == 0


def test_iterators_of_different_lengths_are_found_out(collection):
    with pytest.raises(ShapeError, match=r"`ids` ended after 3, .* first 2 texts are written"):
        collection.add_texts(iter(["a", "b", "c", "d"]), iter("xyz"), batch_size=2)
    assert collection.count() == 2
    with pytest.raises(ShapeError, match="`payloads` goes on after the 1 texts"):
        collection.add_texts(iter(["a"]), iter(["x"]), iter([{}, {}]))
    with pytest.raises(InputError, match="'x' again in a later batch"):
        collection.add_texts(iter(["a", "b"]), iter(["x", "x"]), batch_size=1)
    with pytest.raises(ConfigError, match="batch_size"):
        collection.add_texts(["a"], batch_size=0)


def test_the_rest_is_written_when_some_are_refused(collection):
    texts = ["chess", "go \ud800 stones", "paris", "light"]
    payloads = [None, None, {"when": dt.date(2020, 1, 1)}, {"n": 1}]
    with pytest.raises(RejectedRows) as caught:
        collection.add_texts(texts, ["a", "b", "c", "d"], payloads, batch_size=2)
    assert caught.value.ids == ["b", "c"]
    assert "lone surrogate" in caught.value.reasons[0]
    assert "isoformat" in caught.value.reasons[1]
    assert sorted(collection.ids()) == ["a", "d"]


def test_texts_without_tokens(collection):
    texts = ["", "   ", "😀 ∑", "chess"]
    assert collection.add_texts(texts, [0, 1, 2, 3]) == [0, 1, 2, 3]
    assert collection.count() == 4
    assert [hit.id for hit in collection.search("chess")] == [3]
    assert collection.get([2])[0].payload == {"text": "😀 ∑"}
    assert collection.search("") == []
    assert collection.explain("chess", 0) == []
    collection.delete([0, 1, 2, 3])
    assert collection.add_texts(texts, [0, 1, 2, 3], empty="skip") == [3]
    assert collection.count() == 1
    with pytest.raises(RejectedRows, match="no entries"):
        collection.add_texts(texts, [0, 1, 2, 3], empty="error")
    assert collection.count() == 1


def test_deleting_by_a_condition(collection):
    collection.add_texts(TEXTS, IDS, [{"n": 1, "s": "a"}, {"n": 2, "s": "a"}, {"n": 3}])
    assert set(collection.ids({"s": "a"})) == {"einstein", "chess"}
    assert collection.delete(filter={"s": "nowhere"}) == 0
    assert collection.delete(filter={"s": "a", "n": {"gt": 1}}) == 1
    assert set(collection.ids()) == {"einstein", 3}
    # A condition where ids are expected once deleted nothing, silently.
    for wrong in ({"s": "a"}, "einstein", b"einstein", None):
        with pytest.raises(TypeError, match=r"delete\(filter=\{field: value\}\)"):
            collection.delete(wrong)
    with pytest.raises(TypeError, match="one condition"):
        collection.delete(["einstein"], filter={"s": "a"})
    with pytest.raises(ConfigError, match="keeps every document"):
        collection.delete(filter={})
    for read in (collection.get, collection.store.get, collection.store.delete):
        with pytest.raises(TypeError, match=r"a condition goes where `filter` is"):
            read({"s": "a"})
    assert collection.count() == 2
    assert collection.delete(filter={"not": {"n": 7}}) == 2


def test_deleting_many_by_a_condition(encoder):
    with VDRQdrant("rows", encoder, path=":memory:") as rows:
        many = SparseRows.from_dicts([{i % 20: 1.0} for i in range(2500)], encoder.vocabulary.size)
        rows.add_rows(many, range(2500), [{"even": i % 2 == 0} for i in range(2500)])
        assert len(list(rows.ids({"even": False}))) == 1250
        assert rows.delete(filter={"even": True}) == 1250
        assert set(rows.ids()) == set(range(1, 2500, 2))


def test_nothing_to_add(collection):
    assert collection.add_texts([]) == []
    assert collection.count() == 0
    assert collection.search("chess") == []
    assert collection.add_texts(iter([])) == []


def test_payloads_and_texts_can_be_kept_apart(encoder):
    with Collection(MemoryStore(), encoder, store_text=False) as collection:
        collection.add_texts(["chess"], ["a"], [{"text": "other"}])
        assert collection.get(["a"])[0].payload == {"text": "other"}
    with Collection(MemoryStore(), encoder, text_key="body") as collection:
        given = {"text": "other"}
        collection.add_texts(["chess"], ["a"], [given])
        assert collection.get(["a"])[0].payload == {"text": "other", "body": "chess"}
        assert given == {"text": "other"}


def test_rows_and_records(collection):
    rows = collection.encoder.encode_documents(TEXTS)
    assert collection.add_rows(rows, IDS, [{"n": 1}, None, {}]) == IDS
    (record,) = collection.get(["chess"], with_rows=True)
    assert (record.payload, record.row) == ({}, rows[1])
    assert collection.delete(["chess", "nobody"]) == 1
    assert set(collection.ids()) == {"einstein", 3}
    with pytest.raises(TypeError, match="SparseRows"):
        collection.add_rows([{1: 1.0}], ["a"])
    with pytest.raises(InputError, match="width"):
        collection.add_rows(row({1: 1.0}, width=999), ["a"])
    empty = SparseRows.empty(1, rows.width)
    assert collection.add_rows(empty, ["nothing"], empty="skip") == []


def test_explain_refuses_what_is_not_there(collection):
    collection.add_texts(TEXTS, IDS)
    with pytest.raises(InputError, match="no document with the id 'nobody'"):
        collection.explain(QUESTION, "nobody")
    with pytest.raises(ShapeError, match="takes one query, got 2"):
        collection.explain(collection.encoder.encode_queries(["a", "b"]), "chess")


def test_one_string_for_many_is_a_type_error(collection):
    collection.add_texts(TEXTS, IDS)
    with pytest.raises(TypeError, match=r"pass \['chess'\]"):
        collection.search_batch("chess")
    with pytest.raises(TypeError, match=r"pass \['chess'\]"):
        collection.get("chess")
    with pytest.raises(TypeError, match="queries must be strings"):
        collection.search_batch(["chess", 3])
    with pytest.raises(TypeError, match="strings or SparseRows, got int"):
        collection.search(3)


def test_modes(encoder):
    with VDRQdrant("articles", encoder, path=":memory:") as encoded:
        encoded.add_texts(TEXTS, IDS)
        full, alpha = encoded.search(QUESTION), encoded.search(QUESTION, mode="alpha")
        assert full[0].id == alpha[0].id == "einstein"
        assert full[0].score != alpha[0].score
        terms = encoded.explain(QUESTION, "einstein", mode="alpha")
        assert {term.query_weight for term in terms} == {1.0}
        assert sum(term.product for term in terms) == pytest.approx(alpha[0].score, rel=1e-6)
        with pytest.raises(ConfigError, match=r"mode 'beta' cannot be searched in .* encoded"):
            encoded.search(QUESTION, mode="beta")
        with pytest.raises(ConfigError, match="'gamma'"):
            encoded.search(QUESTION, mode="gamma")
    encoder.calls.clear()
    with VDRQdrant("bags", encoder, path=":memory:", documents="tokens") as bags:
        bags.add_texts(TEXTS, IDS)
        assert encoder.calls == [], "mode beta needs no model to index"
        beta = bags.search(QUESTION)
        assert beta == bags.search(QUESTION, mode="beta")
        assert beta[0].id == "einstein"
        assert set(bags.get(["chess"], True)[0].row.values.tolist()) == {1.0}
        for mode in ("full", "alpha"):
            with pytest.raises(ConfigError, match="bags of tokens"):
                bags.search(QUESTION, mode=mode)
        again = bags.search(QUESTION, 2, rerank=3)
        assert [(hit.id, hit.score) for hit in again] == [
            (hit.id, pytest.approx(hit.score, rel=1e-6)) for hit in full[:2]
        ]
        with pytest.raises(ConfigError, match="at least limit"):
            bags.search(QUESTION, 10, rerank=3)
        assert bags.search("nothing known", 1, rerank=3) == []
    with VDRQdrant("bags", encoder, path=":memory:", documents="tokens", store_text=False) as bags:
        bags.add_texts(TEXTS, IDS)
        with pytest.raises(StoreError, match="needs the text of every hit"):
            bags.search(QUESTION, 1, rerank=3)


def test_the_encoder_of_a_collection_is_remembered(tmp_path, encoder):
    path = tmp_path / "c"
    with VDRQdrant("articles", encoder, path=path) as articles:
        assert "words" in repr(articles)
        articles.add_texts(TEXTS, IDS)
    with VDRQdrant("articles", WordEncoder("moved/elsewhere"), path=path) as articles:
        assert articles.search(QUESTION)[0].id == "einstein"
    other = WordEncoder("other", tokens=[*WORDS[:-1], "slow"])
    with pytest.raises(StoreMismatch, match=r"made for 'words'.*with 'other'.*tokenizer finger"):
        VDRQdrant("articles", other, path=path)
    with pytest.raises(StoreMismatch, match="documents 'encoded'"):
        VDRQdrant("articles", encoder, path=path, documents="tokens")
    # A refused opening leaves the folder free.
    with VDRQdrant("articles", path=path) as articles:
        assert articles.store.stamp == encoder.stamp()
        hits = articles.search(encoder.encode_queries([QUESTION]))
        assert hits[0].id == "einstein"
        assert {t.token for t in articles.explain(encoder.encode_queries(["theory"]), 3)} <= {
            str(i) for i in range(len(WORDS))
        }
        # The default model is another one, which is told when it is needed.
        for _ in range(2):
            with pytest.raises(StoreMismatch, match=r"made for 'words'.*with 'vdr-mini'"):
                articles.search(QUESTION)
        with pytest.raises(StoreMismatch, match=r"made for 'words'.*with 'vdr-mini'"):
            articles.add_texts(TEXTS)


def test_without_an_encoder(tmp_path):
    with VDRQdrant("rows", path=tmp_path / "c") as rows:
        rows.add_rows(row({1: 1.0}, width=7), ["a"])
        assert rows.store.width == 7
        assert rows.search(row({1: 2.0}, width=7)) == [Hit("a", 2.0, {})]
        assert rows.explain(row({1: 2.0}, width=7), "a") == [Term("1", 1, 2.0, 1.0, 2.0)]


def test_a_plain_collection_has_no_model_by_default():
    with Collection(MemoryStore()) as rows:
        rows.add_rows(row({1: 1.0}, width=7), ["a"])
        for use in (lambda: rows.search(QUESTION), lambda: rows.add_texts(TEXTS)):
            with pytest.raises(ConfigError, match="needs an encoder"):
                use()
        assert repr(rows).endswith("no encoder)")


def test_a_collection_never_written_is_no_empty_answer(tmp_path, encoder):
    with VDRQdrant("articles", encoder, path=tmp_path / "mistyped") as articles:
        assert articles.count() == 0
        with pytest.raises(StoreError, match="mistyped holds nothing yet"):
            articles.search(QUESTION)
    assert not (tmp_path / "mistyped").exists()


def test_close(encoder):
    collection = VDRQdrant("articles", encoder, path=":memory:")
    collection.add_texts(TEXTS, IDS)
    collection.flush()
    collection.optimize()
    collection.close()
    collection.close()
    for use in (
        lambda: collection.search("chess"),
        lambda: collection.add_texts(["x"]),
        lambda: collection.get(["x"]),
        lambda: collection.count(),
        lambda: collection.explain("chess", "chess"),
    ):
        with pytest.raises(StoreError, match="is closed"):
            use()
    assert "closed" in repr(collection)


def test_options(encoder):
    with pytest.raises(ConfigError, match=r"is enough, got \['path', 'url'\]"):
        VDRQdrant("articles", encoder, path=":memory:", url="http://x")
    with pytest.raises(ConfigError, match="'images'"):
        VDRQdrant("articles", encoder, path=":memory:", documents="images")
