"""`Vocabulary`: columns, token ids, bags of tokens and words for people."""

from __future__ import annotations

import hashlib
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdr_db import Vocabulary
from vdr_db.errors import ConfigError, InputError, ShapeError

TOKENS = ["[PAD]", "[CLS]", "gi", "##raf", "##fe", "is", "tall", "."]
SMALL = Vocabulary(TOKENS, special_ids=[0, 1])


def bert_like(size: int = 1100) -> list[str]:
    return [f"t{i}" if i % 7 else f"é{i}" for i in range(size)]


@pytest.mark.parametrize("kind", ["all", "from_999", "from_1000", "ascii_from_999"])
def test_columns_and_ids_are_inverse(kind):
    tokens = bert_like()
    vocabulary = Vocabulary(tokens, kind=kind)
    expected = {
        "all": range(1100),
        "from_999": range(999, 1100),
        "from_1000": range(1000, 1100),
        "ascii_from_999": [i for i in range(999, 1100) if i % 7],
    }[kind]
    assert vocabulary.column_to_id.tolist() == list(expected)
    assert vocabulary.columns == len(list(expected))
    for column, id in enumerate(expected):
        assert vocabulary.id_to_column[id] == column
    assert (vocabulary.id_to_column >= 0).sum() == vocabulary.columns
    assert len(vocabulary) == vocabulary.size == 1100
    assert vocabulary.first_id == (None if kind == "ascii_from_999" else next(iter(expected)))


def test_bert_vocabulary_has_the_published_columns(bert_tokenizer):
    columns = {"all": 30522, "from_999": 29523, "from_1000": 29522, "ascii_from_999": 27623}
    for kind, count in columns.items():
        assert Vocabulary.from_tokenizer(bert_tokenizer, kind).columns == count
    ascii_ids = Vocabulary.from_tokenizer(bert_tokenizer, "ascii_from_999").column_to_id
    digest = hashlib.sha256(",".join(map(str, ascii_ids.tolist())).encode()).hexdigest()
    assert digest == "d307a1822e8f269f9cae9d5819371f6eed0f83e372e5026e102d933d7d395c86"
    vocabulary = Vocabulary.from_tokenizer(bert_tokenizer, "from_999")
    assert vocabulary.token(999) == "!"
    assert vocabulary.id("the") == 1996
    assert vocabulary.id_to_column[1996] == 997


def test_fingerprint_depends_on_every_token_and_on_nothing_else():
    assert SMALL.fingerprint == Vocabulary(TOKENS, special_ids=[0]).fingerprint
    many = [f"t{i}" for i in range(1200)]
    assert Vocabulary(many).fingerprint == Vocabulary(many, kind="from_1000").fingerprint
    others = [TOKENS[:-1], [*TOKENS, "x"], [*TOKENS[:-1], "!"], ["[PAD][CLS]", "", *TOKENS[2:]]]
    prints = {Vocabulary(tokens).fingerprint for tokens in others}
    assert SMALL.fingerprint not in prints
    assert len(prints) == len(others)


@given(st.lists(st.lists(st.integers(0, 7), max_size=9), max_size=5))
def test_bag_of_tokens_is_the_set_of_kept_ids(texts):
    bounds = np.cumsum([0] + [len(text) for text in texts])
    rows = SMALL.bag_of_tokens(np.array(list(chain(*texts)), np.int64), bounds)
    assert rows.to_dicts() == [dict.fromkeys(sorted(set(text) - {0, 1}), 1.0) for text in texts]
    assert rows.width == SMALL.size


def test_bag_of_tokens_leaves_out_ids_without_a_column():
    vocabulary = Vocabulary(bert_like(), kind="from_1000")
    rows = vocabulary.bag_of_tokens([5, 999, 1000, 1000, 1099], [0, 5])
    assert rows.to_dicts() == [{1000: 1.0, 1099: 1.0}]


def test_pieces_become_words_again():
    text = [1, 2, 3, 4, 5, 6, 7]
    shown = SMALL.merge_word_pieces(text, {2: 1.0, 3: 2.0, 4: 0.5, 6: 2.0, 7: 0.25})
    assert shown == [("giraffe", 3.5), ("tall", 2.0), (".", 0.25)]
    # expansion stands alone, and a lone piece keeps its mark
    assert SMALL.merge_word_pieces([6], {2: 1.0, 3: 2.0}) == [("##raf", 2.0), ("gi", 1.0)]
    # a piece shared by two words counts once
    assert SMALL.merge_word_pieces([2, 3, 5, 3], {3: 1.0}) == [("giraf", 1.0)]
    assert SMALL.merge_word_pieces([], {}) == []


def test_byte_level_words_are_joined_at_the_leading_space():
    tokens = ["<s>", "\u0120gi", "raffe", "\u0120tall", "!", "Hi"]
    vocabulary = Vocabulary(tokens, special_ids=[0])
    shown = vocabulary.merge_word_pieces([0, 5, 1, 2, 3, 4], {1: 1.0, 2: 1.0, 3: 0.5, 4: 0.2, 5: 3})
    assert shown == [("Hi", 3), ("giraffe", 2.0), ("tall", 0.5), ("!", 0.2)]


def test_unknown_names_and_ids_are_refused():
    with pytest.raises(InputError, match=r"\[0, 8\), got 8"):
        SMALL.token(8)
    with pytest.raises(InputError, match="got -1"):
        SMALL.token(-1)
    with pytest.raises(InputError, match="'giraffe' is not a token"):
        SMALL.id("giraffe")
    with pytest.raises(ConfigError, match="'ascii'"):
        Vocabulary(TOKENS, kind="ascii")
    with pytest.raises(ConfigError, match="keeps none of the 8"):
        Vocabulary(TOKENS, kind="from_999")
    with pytest.raises(InputError, match="at least one"):
        Vocabulary([])
    with pytest.raises(InputError, match="different tokenizers"):
        Vocabulary(TOKENS, special_ids=[8])
    with pytest.raises(InputError, match="got 8"):
        SMALL.bag_of_tokens([8], [0, 1])
    with pytest.raises(ShapeError, match="end at T = 1"):
        SMALL.bag_of_tokens([5], [0, 2])


class Tokenizer:
    all_special_ids = (0,)

    def __init__(self, table: dict[str, int]) -> None:
        self.table = table

    def get_vocab(self) -> dict[str, int]:
        return self.table


def test_tokenizers_with_holes_and_shared_ids():
    vocabulary = Vocabulary.from_tokenizer(Tokenizer({"<pad>": 0, "b": 3, "a": 1}))
    assert vocabulary.tokens == ("<pad>", "a", "[id 2]", "b")
    assert vocabulary.special_ids == {0}
    with pytest.raises(InputError, match="an id of its own"):
        Vocabulary.from_tokenizer(Tokenizer({"<pad>": 0, "b": 0}))


def test_texts_of_other_languages_fall_into_letters(vdr_mini):
    words, tokenizer = vdr_mini.vocabulary, vdr_mini.tokenizer

    def share(text):
        return words.foreign_share(tokenizer.encode([text]).input_ids)

    assert share("The quick brown fox jumps over a lazy dog, 1 of 7!") == 0
    assert share("Der schnelle braune Fuchs springt über den Hund und läuft in den Wald") > 0.1
    assert share("быстрая коричневая лиса") == 1
    assert share("素早い狐 \U0001f98a") == 1
    assert share("") == share("1 + 2!") == 0
