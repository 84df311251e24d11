"""Own weights: the formula, stems, selection with them in every path, folders, and alpha mode."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folders import bert_tokens, change_json, write_bert
from oracles import ACTIVATIONS

from vdr_db import SparseEncoder, TokenQueries
from vdr_db.connectors import VDRQdrant
from vdr_db.encoders.export import export
from vdr_db.encoders.rows import row_of
from vdr_db.errors import ConfigError, StoreMismatch
from vdr_db.kernels.plain import activate
from vdr_db.sparse import SparseRows
from vdr_db.text.own_weights import OwnWeights, joined, stem_table
from vdr_db.text.tokenization import TokenizedTexts
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.static import StaticTower

GENERAL = ["the cat", "the cats and the book", "a blue book", "the sea", "light on the sea"]
TEXTS = ["cats painting books of cats", "the blue sea " * 9, "", "cat", "of heavy theory"]
NUMBERS = {"query_factor": 1.06, "document_factor": 0.32, "k1": 1.1, "b": 0.6, "mean_length": 7.0}


def tokenized(texts):
    bounds = np.cumsum([0, *map(len, texts)])
    return TokenizedTexts(np.array([id for text in texts for id in text], np.int32), bounds)


def table(size=11):
    canon = np.array([-1, 1, 1, 3, 3, 3, 6, 7, 8, 9, -1], np.int32)
    return OwnWeights(canon, np.linspace(0, 5, size).astype(np.float32), **NUMBERS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def own(folder):
    bare = SparseEncoder.from_pretrained(folder)
    return OwnWeights.fitted(bare.tokenizer, bare.vocabulary, GENERAL, **NUMBERS)


@pytest.fixture(scope="module")
def exported(folder, own, tmp_path_factory):
    """A folder with own weights and graphs, k 12 and 5, that both runtimes read."""
    place = tmp_path_factory.mktemp("exported")
    SparseEncoder.from_pretrained(folder, own_weights=own, k=12, query_k=5).save_pretrained(
        place / "model"
    )
    export(place / "model", place / "graphs")
    return place / "graphs"


def test_a_card_names_the_library_that_can_open_it(exported):
    assert 'library_name: "vdr-db"' in (exported / "README.md").read_text("utf-8")


# The formula


@given(st.lists(st.lists(st.integers(0, 10), max_size=12), max_size=4))
def test_rows_follow_the_formula(texts):
    own = table()
    for side in ("document", "query"):
        expected = []
        for text in texts:
            counts = Counter(int(own.canon[id]) for id in text if own.canon[id] >= 0)
            row = {}
            for id, count in counts.items():
                if side == "query":
                    row[id] = 1.06 * count
                    continue
                shift = 1.1 * (1 - 0.6 + 0.6 * len(text) / 7.0)
                weight = 0.32 * float(own.idf[id]) * count * 2.1 / (count + shift)
                if weight > 0:
                    row[id] = weight
            expected.append(row)
        found = own.rows(side, tokenized(texts)).to_dicts()
        assert [row.keys() for row in found] == [row.keys() for row in expected]
        for mine, other in zip(found, expected, strict=True):
            assert mine == pytest.approx(other, rel=1e-6)


def test_words_of_one_stem_count_as_one():
    tokens = ["[PAD]", "cat", "the", "cats", "##s", "running", "run", "7", "run!"]
    canon = stem_table(Vocabulary(tokens, special_ids=[0]))
    assert canon.tolist() == [-1, 1, 2, 1, 4, 5, 5, 7, 8]
    marked = ["\u2581run", "run", "\u2581running", "\u2581Runs"]
    assert stem_table(Vocabulary(marked)).tolist() == [0, 1, 0, 0]


def test_the_table_knows_how_rare_a_word_is(own, folder):
    vocabulary = SparseEncoder.from_pretrained(folder).vocabulary
    the, book, cats = (vocabulary.id(word) for word in ("the", "book", "cats"))
    assert own.canon[cats] == vocabulary.id("cat")
    for id, count in ((the, 4), (book, 2)):
        assert own.idf[id] == pytest.approx(math.log1p((5 - count + 0.5) / (count + 0.5)))
    assert all(own.canon[id] == -1 for id in vocabulary.special_ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b": 1.5}, "b in"),
        ({"query_factor": 0.0}, "above 0"),
        ({"k1": math.nan}, "above 0"),
        ({"idf": np.array([-1.0] * 11, np.float32)}, "not negative"),
        ({"idf": np.zeros(3, np.float32)}, "one number for each token"),
        ({"canon": np.full(11, 11, np.int32)}, "below 11"),
    ],
)
def test_impossible_tables_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        OwnWeights(**{"canon": table().canon, "idf": table().idf, **NUMBERS, **changes})


# Selection


@st.composite
def choices(draw):
    width = draw(st.integers(1, 30))
    numbers = st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 1.5, 4.0])
    logits = draw(st.lists(numbers, min_size=width, max_size=width))
    weights = draw(st.dictionaries(st.integers(0, width - 1), st.sampled_from([0.5, 1.0, 3.0])))
    return logits, weights, draw(st.integers(1, width)), draw(st.sampled_from([*ACTIVATIONS]))


@settings(max_examples=200)
@given(choices())
def test_the_largest_sums_are_kept(choice):
    logits, weights, k, activation = choice
    sums = {}
    for column, logit in enumerate(logits):
        total = max(ACTIVATIONS[activation](logit), 0.0) + weights.get(column, 0.0)
        if total > 0:
            sums[column] = total
    expected = dict(sorted(sums.items(), key=lambda item: (-item[1], item[0]))[:k])

    vocabulary = Vocabulary([f"t{i}" for i in range(len(logits))])
    own = SparseRows.from_dicts([weights], len(logits))
    forced = np.array(sorted(weights), np.int32)
    row = row_of(
        np.array(logits, np.float32), vocabulary, k=k, activation=activation, lexical=forced
    )
    found = joined(row, own, k).to_dicts()[0]
    assert found == pytest.approx(expected, rel=1e-6)


def dense_oracle(folder, own, texts, side, k, lexical, **options):
    """The model's weights of all columns, own weights added, the k largest: in float64."""
    whole = SparseEncoder.from_pretrained(folder, own_weights=False, k=None, **options)
    rows = (whole.encode_documents if side == "document" else whole.encode_queries)(texts)
    tokens = whole.tokenizer.encode(texts)
    added = own.rows(side, tokens)
    bags = whole.vocabulary.bag_of_tokens(tokens.input_ids, tokens.cu_seqlens)
    found = []
    for one, two, bag in zip(rows.to_dicts(), added.to_dicts(), bags.to_dicts(), strict=True):
        total = {id: one.get(id, 0.0) + two.get(id, 0.0) for id in one.keys() | two.keys()}
        ranked = sorted(total, key=lambda id: (-np.float32(total[id]), id))
        kept = {*ranked[:k], *(bag.keys() & total.keys() if lexical else ())}
        found.append({id: total[id] for id in kept})
    return found


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
@pytest.mark.parametrize("lexical", [False, True])
def test_encoders_add_them_before_they_choose(exported, own, runtime, lexical):
    encoder = SparseEncoder.from_pretrained(exported, runtime=runtime, lexical=lexical)
    assert (encoder.document_entry.k, encoder.query_entry.k) == (12, 5)
    for side, encode in (
        ("document", encoder.encode_documents),
        ("query", encoder.encode_queries),
    ):
        k = 12 if side == "document" else 5
        expected = dense_oracle(exported, own, TEXTS, side, k, lexical, runtime=runtime)
        found = encode(TEXTS)
        assert [row.keys() for row in found.to_dicts()] == [row.keys() for row in expected]
        for mine, other in zip(found.to_dicts(), expected, strict=True):
            assert mine == pytest.approx(other, rel=1e-5)
        assert SparseRows.concat([encode([text]) for text in TEXTS]) == found, "one by one"


def test_kernels_of_every_backend_choose_alike(exported):
    found = [
        SparseEncoder.from_pretrained(exported, backend=backend).encode_documents(TEXTS)
        for backend in ("reference", "cpu")
    ]
    assert found[0].allclose(found[1], rtol=1e-5)


def test_static_sides_have_them_too(folder, own):
    bare = SparseEncoder.from_pretrained(folder)
    weights = np.linspace(0, 1, bare.vocabulary.size).astype(np.float32)
    options = {
        **{name: getattr(bare, name) for name in ("tokenizer", "vocabulary", "activation")},
        **{name: getattr(bare, name) for name in ("document_entry", "query_entry")},
        "document_tower": bare.document_tower,
        "query_tower": StaticTower(weights),
    }
    plain = SparseEncoder(**options).encode_queries(TEXTS).to_dicts()
    added = own.rows("query", bare.tokenizer.encode(TEXTS)).to_dicts()
    found = SparseEncoder(**options, own_weights=own).encode_queries(TEXTS).to_dicts()
    for mine, one, two in zip(found, plain, added, strict=True):
        total = {id: one.get(id, 0) + two.get(id, 0) for id in one.keys() | two.keys()}
        assert mine == pytest.approx(total, rel=1e-6)


# Folders


def test_they_are_saved_with_the_model(folder, own, exported):
    first = SparseEncoder.from_pretrained(folder, own_weights=own, k=12, query_k=5)
    again = SparseEncoder.from_pretrained(exported, runtime="torch")
    assert again.own_weights.numbers() == pytest.approx(own.numbers())
    assert again.encode_documents(TEXTS) == first.encode_documents(TEXTS)
    assert again.stamp().weights == first.stamp().weights
    without = SparseEncoder.from_pretrained(exported, own_weights=False, runtime="torch")
    assert without.own_weights is None
    assert without.stamp().weights != first.stamp().weights
    half = SparseEncoder.from_pretrained(exported, precision="bfloat16")
    assert half.stamp().weights == first.stamp().weights
    assert not (exported / "modules.json").exists()
    assert "sentence_transformers" not in (exported / "README.md").read_text()


def test_damaged_tables_are_named(exported, own, tmp_path):
    from shutil import copytree

    copytree(exported, tmp_path / "m")
    change_json(tmp_path / "m" / "vdr_db.json", own_weights={**own.numbers(), "b": 7.0})
    with pytest.raises(ConfigError, match="b in"):
        SparseEncoder.from_pretrained(tmp_path / "m")
    change_json(tmp_path / "m" / "vdr_db.json", own_weights=own.numbers())
    (tmp_path / "m" / "own_weights.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match="must hold the tables"):
        SparseEncoder.from_pretrained(tmp_path / "m")


def test_what_they_cannot_be_added_to_is_refused(folder, own):
    with pytest.raises(ConfigError, match="one entry for each of"):
        SparseEncoder.from_pretrained(folder, own_weights=table())
    bare = SparseEncoder.from_pretrained(folder)
    parts = {
        **{name: getattr(bare, name) for name in ("tokenizer", "vocabulary", "activation")},
        **{name: getattr(bare, name) for name in ("document_entry", "query_entry")},
        "document_tower": bare.document_tower,
        "query_tower": bare.query_tower,
    }
    with pytest.raises(ConfigError, match="norm 1"):
        SparseEncoder(**parts, own_weights=own, norm=True)


# Alpha mode


def test_queries_of_own_weights_need_no_model(exported, own):
    encoder = SparseEncoder.from_pretrained(exported)
    queries = TokenQueries.from_pretrained(exported)
    expected = own.rows("query", encoder.tokenizer.encode(TEXTS))
    assert queries.encode_queries(TEXTS) == encoder.bag_of_tokens(TEXTS, "query") == expected
    bags = own.rows("document", encoder.tokenizer.encode(TEXTS))
    assert encoder.bag_of_tokens(TEXTS) == bags
    with VDRQdrant("a", encoder, path=":memory:") as notes:
        notes.add_texts(TEXTS[:2] + TEXTS[3:], ids=[1, 2, 3, 4])
        hits = notes.search("painting", mode="alpha")
        document = encoder.encode_documents(TEXTS[:1])
        score = float(encoder.bag_of_tokens(["painting"], "query").dot(document)[0, 0])
        assert (hits[0].id, hits[0].score) == (1, pytest.approx(score, rel=1e-5))


def test_collections_tell_encoders_with_and_without_apart(exported):
    encoder = SparseEncoder.from_pretrained(exported)
    with VDRQdrant("a", encoder, path=":memory:") as notes:
        notes.add_texts(TEXTS[:1])
        other = SparseEncoder.from_pretrained(exported, own_weights=False)
        notes._encoding = type(notes._encoding)(other)
        with pytest.raises(StoreMismatch, match="weights"):
            notes._check_fit()


def test_the_vocabulary_of_the_fixtures_has_plurals():
    assert {"cat", "cats"} <= {*bert_tokens()}, "the tests above would show nothing"
    assert activate(np.float32([-1.0]), "log1p_relu")[0] == 0


# Explanations


def test_explanations_tell_own_words_and_the_model_apart(exported, own):
    from vdr_db.explain import match_of

    encoder = SparseEncoder.from_pretrained(exported, k=100)
    query = "cats and books"
    with VDRQdrant("a", encoder, path=":memory:") as notes:
        notes.add_texts(TEXTS[:1], ids=[1])
        match = match_of(notes, encoder, query, 1)
        asked, read = (
            own.rows(side, encoder.tokenizer.encode([text])).to_dicts()[0]
            for side, text in (("query", query), ("document", TEXTS[0]))
        )
        kept = [encoder.encode_queries([query]), encoder.encode_documents(TEXTS[:1])]
        shared = asked.keys() & read.keys() & {*kept[0].indices} & {*kept[1].indices}
        assert shared, "the two texts have words in common"
        expected = sum(asked[id] * read[id] for id in shared)
        assert match.own_score == pytest.approx(expected, rel=1e-5)
        assert match.score > match.own_score
        bags = match_of(notes, encoder, query, 1, mode="alpha")
        assert bags.query.own == pytest.approx(asked)
        words = {place.label: dict(place.words) for place in match.document.fired()}
        assert words
        page = save_html_text(match)
    assert "own words" in page
    bare = SparseEncoder.from_pretrained(exported, own_weights=False, k=100)
    with VDRQdrant("a", bare, path=":memory:") as notes:
        notes.add_texts(TEXTS[:1], ids=[1])
        match = match_of(notes, bare, query, 1)
        assert match.own_score == 0
        assert "own words" not in save_html_text(match)


def save_html_text(match):
    from vdr_db.explain.report import report_html

    return report_html(match, title="x")


def test_the_command_tells_them_apart(exported, tmp_path, capsys):
    from vdr_db.cli.main import main

    (tmp_path / "notes.jsonl").write_text(json.dumps({"id": "a", "text": TEXTS[0]}) + "\n")
    store = ["--store", str(tmp_path / "s")]
    model = ["--model", str(exported), "--k", "100"]
    assert main(["index", str(tmp_path / "notes.jsonl"), *store, *model]) == 0
    capsys.readouterr()
    assert main(["explain", "cats and books", "a", *store, *model, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["own"] < found["score"]
    assert main(["explain", "cats and books", "a", *store, *model]) == 0
    assert "own words" in capsys.readouterr().out


def test_the_shipped_model_knows_words_that_are_not_there():
    encoder = SparseEncoder.from_pretrained("vdr-mini", runtime="onnx")
    assert encoder.own_weights is not None
    document = encoder.encode_documents(["The doctor gave him pills against the pain."])
    others = encoder.encode_documents(["A parser reads the source text of a program."])
    query = encoder.encode_queries(["medication"])
    assert query.dot(document)[0, 0] > query.dot(others)[0, 0]
    assert document.counts[0] <= 256
