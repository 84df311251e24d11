"""Batches: every text once, in bounds, and packed rows that say what the texts say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdr_db.encoders.batching import ROW_MULTIPLE, Frame, pack, plan_batches, upstream_batches
from vdr_db.text.tokenization import TokenizedTexts

BERT = Frame(
    prefix=(101,), suffix=(102,), pad_id=0, first_position=0, counts_from_pad=False, max_length=9
)
ROBERTA = Frame(
    prefix=(0,), suffix=(2,), pad_id=1, first_position=2, counts_from_pad=True, max_length=9
)
TEXTS = st.lists(st.lists(st.integers(103, 120), max_size=14), max_size=12)


def tokenized(texts: list[list[int]]) -> TokenizedTexts:
    bounds = np.cumsum([0, *map(len, texts)]).astype(np.int64)
    return TokenizedTexts(np.array([i for text in texts for i in text], np.int32), bounds)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120), st.integers(1, 9))
def test_batches_hold_every_text_once_and_stay_in_bounds(lengths, tokens, rows):
    lengths = np.array(lengths, np.int64)
    batches = plan_batches(lengths, tokens=tokens, rows=rows)
    assert sorted(i for batch in batches for i in batch) == list(range(lengths.size))
    for batch in batches:
        assert 1 <= batch.size <= rows
        assert batch.size == 1 or lengths[batch].sum() <= tokens
    in_order = [lengths[i] for batch in batches for i in batch]
    assert in_order == sorted(in_order, reverse=True)


def test_texts_of_equal_length_keep_their_order():
    (batch,) = plan_batches(np.array([3, 5, 3, 3, 5]), tokens=100, rows=100)
    assert batch.tolist() == [1, 4, 0, 2, 3]


def test_upstream_batches_keep_the_given_order():
    batches = upstream_batches(np.array([3, 5, 1, 2, 4]), 2)
    assert [batch.tolist() for batch in batches] == [[0, 1], [2, 3], [4]]


@given(TEXTS, st.sampled_from([BERT, ROBERTA]))
def test_packed_rows_are_the_texts_in_their_frame(texts, frame):
    chosen = np.arange(len(texts))
    batch = pack(tokenized(texts), chosen, frame)
    T = batch.input_ids.size
    assert T % ROW_MULTIPLE == 0
    assert batch.cu_seqlens[0] == 0
    assert batch.cu_seqlens[-1] == T
    assert len(batch.cu_seqlens) - 1 - len(texts) in (0, 1), "at most one text of filling"
    assert sorted(batch.texts) == list(range(len(texts)))
    for row, text in enumerate(batch.texts):
        span = slice(batch.cu_seqlens[row], batch.cu_seqlens[row + 1])
        expected = [*frame.prefix, *texts[text][: frame.own], *frame.suffix]
        assert batch.input_ids[span].tolist() == expected
        first = frame.first_position
        assert batch.position_ids[span].tolist() == list(range(first, first + len(expected)))


@given(TEXTS, st.none() | st.integers(1, 12))
def test_runs_cover_the_rows_without_gap_or_overlap(texts, padded_to):
    batch = pack(tokenized(texts), np.arange(len(texts)), BERT, padded_to=padded_to)
    place = 0
    bounds = []
    for run in batch.runs:
        assert run.start == place
        assert 1 <= run.kept <= run.length
        bounds += [run.start + i * run.length for i in range(run.count)]
        place = run.stop
    assert place == batch.input_ids.size
    assert [*bounds, place] == batch.cu_seqlens.tolist()


def test_equal_lengths_share_a_run():
    batch = pack(tokenized([[110] * 3, [111] * 5, [112] * 3, [113] * 3]), np.arange(4), BERT)
    assert [(run.count, run.length) for run in batch.runs[:2]] == [(1, 7), (3, 5)]


def test_padding_follows_each_text_when_asked_for():
    batch = pack(tokenized([[110], [111, 112, 113]]), np.array([0, 1]), BERT, padded_to=7)
    assert batch.input_ids[:7].tolist() == [101, 111, 112, 113, 102, 0, 0]
    assert batch.input_ids[7:14].tolist() == [101, 110, 102, 0, 0, 0, 0]
    assert [(run.length, run.kept) for run in batch.runs[:2]] == [(7, 5), (7, 3)]
    assert batch.position_ids[7:14].tolist() == list(range(7))


def test_roberta_padding_gets_no_position_of_its_own():
    batch = pack(tokenized([[110, 111]]), np.array([0]), ROBERTA, padded_to=7)
    assert batch.position_ids[:7].tolist() == [2, 3, 4, 5, 1, 1, 1]
    # the published models number a padding token inside of a text in the same way
    batch = pack(tokenized([[110, 1, 111]]), np.array([0]), ROBERTA)
    assert batch.position_ids[:5].tolist() == [2, 3, 1, 4, 5]


def test_a_cut_text_keeps_its_frame():
    batch = pack(tokenized([list(range(103, 120))]), np.array([0]), BERT)
    assert batch.input_ids[:9].tolist() == [101, *range(103, 110), 102]


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_to_pack_is_fine(count):
    batch = pack(tokenized([[]] * count), np.arange(count), BERT)
    assert len(batch.texts) == count
