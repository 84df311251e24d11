"""Long texts are cut at sentences, into parts that cover them and that the model reads whole."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vdr_db import SparseEncoder
from vdr_db.checkpoints.assets import fetch
from vdr_db.cli.demo import unpack_sample
from vdr_db.connectors import Passages
from vdr_db.connectors.passages import PassageRows, checked_passages
from vdr_db.errors import ConfigError
from vdr_db.evaluation.quality import TestCollection
from vdr_db.sparse import SparseRows
from vdr_db.text.passages import passage_spans


def offsets_of(text):
    return [match.span() for match in re.finditer(r"\w+|[^\w\s]", text)]


def tokens_in(offsets, span):
    return sum(span[0] <= start and stop <= span[1] for start, stop in offsets)


texts = st.lists(
    st.sampled_from(["word", "a", "longer words", "!", ". ", "? ", "\n", " ", "日本。", "x" * 30]),
    max_size=120,
).map(" ".join)


@given(texts, st.integers(1, 12), st.data())
def test_passages_cover_a_text_and_none_is_too_long(text, tokens, data):
    overlap = data.draw(st.integers(0, tokens // 2))
    offsets = offsets_of(text)
    spans = passage_spans(text, offsets, tokens=tokens, overlap=overlap)
    assert (spans[0][0], spans[-1][1]) == (0, len(text))
    for one, other in pairwise(spans):
        assert one[0] < other[0] <= one[1] < other[1]
        assert tokens_in(offsets, (other[0], one[1])) <= overlap
    assert all(tokens_in(offsets, span) <= tokens for span in spans)


def test_a_passage_ends_with_a_sentence_and_the_next_begins_with_one():
    text = "One two three. Four five six! Seven eight nine? Ten eleven twelve."
    spans = passage_spans(text, offsets_of(text), tokens=8, overlap=4)
    assert [text[a:b].strip() for a, b in spans] == [
        "One two three. Four five six!",
        "Four five six! Seven eight nine?",
        "Seven eight nine? Ten eleven twelve.",
    ]


def test_a_sentence_that_is_too_long_is_cut_between_words():
    text = " ".join(f"word{i}" for i in range(20))
    spans = passage_spans(text, offsets_of(text), tokens=8, overlap=2)
    assert all(text[a:b].strip().startswith("word") for a, b in spans)
    assert [text[a:b].split()[0] for a, b in spans] == ["word0", "word6", "word12"]


def test_without_offsets_each_character_counts_as_a_token():
    spans = passage_spans("これは本です。それも本です。", None, tokens=7, overlap=0)
    assert spans == [(0, 7), (7, 14)]


@pytest.fixture(scope="module")
def encoder():
    return SparseEncoder.from_pretrained("vdr-mini", max_length=16)


@settings(max_examples=60)
@given(st.text(max_size=200), st.integers(1, 40))
def test_the_model_reads_every_passage_to_its_end(encoder, text, tokens):
    (spans,) = encoder.cut_passages([text], tokens=tokens, overlap=tokens // 4)
    own = encoder.frame("document").own
    assert max(len(encoder.token_ids(text[a:b])) for a, b in spans) <= own
    assert spans[0][0] == 0
    assert spans[-1][1] == len(text)


def test_impossible_passages_are_refused_by_name():
    with pytest.raises(ConfigError, match="`overlap` must be at most half of `tokens`, got 6 of 8"):
        Passages(8, 6)
    with pytest.raises(ConfigError, match="`tokens` must be an integer of at least 1, got 0"):
        Passages(0)
    with pytest.raises(TypeError, match=r"must be True or Passages\(...\), got 64"):
        checked_passages(64)
    assert checked_passages(True) == Passages()
    assert checked_passages(False) is None
    assert Passages(np.int64(64), np.int32(8)) == Passages(64, 8)


def test_rows_of_documents_are_taken_by_document():
    rows = SparseRows.from_dicts([{i: float(i)} for i in range(1, 7)], 10)
    found = PassageRows(rows, np.array([0, 2, 3, 6]), [(0, i) for i in range(6)])
    assert len(found) == 3
    assert found.counts.tolist() == [2, 1, 3]
    last = found[[2, 0]]
    assert last.rows.to_dicts() == [{4: 4.0}, {5: 5.0}, {6: 6.0}, {1: 1.0}, {2: 2.0}]
    assert last.bounds.tolist() == [0, 3, 5]
    assert last.spans == [(0, 3), (0, 4), (0, 5), (0, 0), (0, 1)]
    assert found[np.array([False, True, False])].rows.to_dicts() == [{3: 3.0}]
    assert found[1:].bounds.tolist() == [0, 1, 4]
    both = PassageRows.concat([found[:1], found[1:]])
    assert both.rows == rows
    assert both.bounds.tolist() == found.bounds.tolist()


@pytest.mark.filterwarnings("ignore:.*were cut")
@pytest.mark.parametrize(
    ("model", "least"),
    [("tiny-splade", 0.95), pytest.param("vdr-mini", 0.85, marks=pytest.mark.slow)],
)
def test_answers_at_the_end_of_long_documents_are_found(tmp_path, model, least):
    """What `benchmarks/bench_passages.py` measures, small, with the same bars.

    A mean over the ends of two texts in one passage says less of either than a maximum: `vdr-mini`
    falls short of the bar.
    """
    path = [*sys.path]
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    try:
        import bench_passages as bench
    finally:
        sys.path[:] = path
    encoder = SparseEncoder.from_pretrained(fetch(model), max_length=128)
    whole = TestCollection.load(unpack_sample(tmp_path / "debian"))
    made = bench.long_documents([replace(whole, queries=whole.queries[:16])], 40)
    assert all(
        len(text) >= 10 * len(parts[-1]) for text, parts in zip(made.texts, made.parts, strict=True)
    )
    kinds = bench.kinds_of(made)
    assert len(made.ids) >= 36
    cut, _ = bench.recall_10(made, encoder, *kinds["cut"])
    texts, _ = bench.recall_10(made, encoder, *kinds["texts"])
    passages, _ = bench.recall_10(made, encoder, made.texts, made.ids, Passages())
    assert passages >= 2 * cut
    assert passages >= least * texts
