"""Long texts are cut before they are tokenized, and keep the tokens of the whole."""

import json
import resource
import time
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folders import bert_tokenizer, roberta_tokenizer
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from vdr_db.text import tokenization
from vdr_db.text.excerpts import MARGIN, excerpt, is_local
from vdr_db.text.tokenization import TextTokenizer

WORDS = [
    *("the", "cats", "paint", "blue", "waves", "unheardofword", "don't", "3.14", "x" * 130),
    *(
        "naïve",
        "ÉTÉ",
        "e\u0301",
        "\u0301",
        "ﬁ",
        "\u00a8",
        "日本語",
        "Σ",
        "ΟΔΟΣ",
        "[MASK]",
        "[SEP]",
        "<s>",
    ),
    *(" ", "  ", "\n", "\t\t", "\u00a0", "\u3000", "\u200b", "-", "...", "!", "[MASK]", "[SEP]"),
    *("</s>", "<mask> ", "<s>"),
]
texts = st.lists(st.sampled_from(WORDS), max_size=80).map(
    lambda words: " ".join(words) if len(words) % 2 else "".join(words)
)


def wordpiece():
    return bert_tokenizer()


def byte_level():
    return roberta_tokenizer()


def spaced():
    """Words by Metaspace, composed letters."""
    made = bert_tokenizer()
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    return made


TOKENIZERS = {"wordpiece": wordpiece, "byte level": byte_level, "spaced": spaced}


@pytest.fixture
def tight(monkeypatch):
    """Excerpts of a few characters, so that short texts are long."""
    monkeypatch.setattr(tokenization, "_CHARACTERS_PER_TOKEN", 1)
    monkeypatch.setattr(tokenization, "MARGIN", 4)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_are_those_of_the_whole(tight, kind, left):
    tokenizer = TextTokenizer(
        TOKENIZERS[kind](), settings={"truncation_side": "left" if left else "right"}
    )
    assert is_local(tokenizer.backend)
    shortened = []

    @settings(max_examples=120, deadline=None)
    @given(st.lists(texts, min_size=1, max_size=3), st.integers(1, 12), st.booleans())
    def check(given_texts, most, as_text):
        chosen = np.arange(len(given_texts))
        whole = tokenizer.encode(given_texts, special_as_text=as_text)
        part = tokenizer.encode(given_texts, special_as_text=as_text, most=most)
        assert np.array_equal(part.lengths > most, whole.lengths > most)
        assert np.array_equal(np.minimum(part.lengths, most), np.minimum(whole.lengths, most))
        kept = [one.cut(chosen, most, left=left).input_ids for one in (whole, part)]
        assert np.array_equal(*kept)
        shortened.append(part.input_ids.size < whole.input_ids.size)

    check()
    assert any(shortened)  # else nothing was tried


@given(texts, st.integers(1, 50), st.booleans())
def test_an_excerpt_ends_at_white_space(text, characters, left):
    found = excerpt(text, characters, left=left)
    assert text.endswith(found) if left else text.startswith(found)
    if found != text:
        beside = text[-len(found) - 1] if left else text[len(found)]
        assert beside in " \t\n\r"
        assert len(found) >= characters - 1


def test_tokenizers_that_look_across_white_space_get_the_whole_text():
    made = bert_tokenizer()
    made.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    assert not is_local(made)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(use_regex=False)
    assert not is_local(made)
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert is_local(made)
    made.normalizer = normalizers.Replace("a b", "c")
    assert not is_local(made)
    made.normalizer = None
    made.add_tokens(["y" * (MARGIN + 1)])
    assert not is_local(made)
    state = json.loads(bert_tokenizer().to_str())
    state["pre_tokenizer"] = None
    assert not is_local(Tokenizer.from_str(json.dumps(state)))
    assert not is_local("another kind of tokenizer")


def test_twenty_megabytes_take_neither_time_nor_memory(vdr_mini):
    text = "the heart beats and the water runs " * 600_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said once for an encoder that others share
        cut = vdr_mini.truncated
        rows = vdr_mini.encode_documents([text])
    assert vdr_mini.truncated == cut + 1
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB
    assert rows == vdr_mini.encode_documents([text[: len(text) // 100]])
