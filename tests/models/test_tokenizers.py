"""Tokenizers of model folders against transformers, which every published model was made with."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
from model_folders import bert_tokens, change_json, write_bert, write_roberta
from transformers import AutoTokenizer

from vdr_db.checkpoints import tokenizers
from vdr_db.checkpoints.tokenizers import read_tokenizer, tokenizer_of
from vdr_db.encoders.text import SparseEncoder
from vdr_db.errors import ConfigError

TEXTS = [
    "The CAT paints a blue book",
    "Café Ω 语语 é ß naïve",
    "theory of light, running!",
    "blue cat  blue",
    "[MASK] cat <mask> blue",
    "",
    "  ",
    "dogs\tand\nseas",
]
CLASSES = ["BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer", "PreTrainedTokenizerFast"]

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def framed(folder) -> list[list[int]]:
    """Ids with special tokens, as our encoder frames them."""
    tokenizer = read_tokenizer(folder)
    tokens = tokenizer.encode(TEXTS)
    bounds = tokens.cu_seqlens
    return [
        [*tokenizer.prefix_ids, *tokens.input_ids[a:b].tolist(), *tokenizer.suffix_ids]
        for a, b in pairwise(bounds)
    ]


def agrees_with_transformers(folder) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    assert framed(folder) == theirs(TEXTS)["input_ids"]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"strip_accents": True, "do_lower_case": False},
        {"tokenize_chinese_chars": False},
        {"cls_token": "[SEP]"},
        {"cls_token": {"__type": "AddedToken", "content": "[MASK]", "lstrip": False}},
        {"sep_token": "dog"},
        {"additional_special_tokens": ["cat"]},
        {"mask_token": None},
        {"model_max_length": 5, "truncation_side": "left"},
    ],
    ids=str,
)
def test_settings_beside_a_word_piece_tokenizer_are_applied(tmp_path, name, changes):
    folder = write_bert(tmp_path / "m")
    change_json(folder / "tokenizer_config.json", tokenizer_class=name, **changes)
    agrees_with_transformers(folder)


@pytest.mark.parametrize("name", ["RobertaTokenizer", "PreTrainedTokenizerFast", None])
@pytest.mark.parametrize(
    "changes",
    [{}, {"add_prefix_space": True}, {"cls_token": "<mask>"}, {"eos_token": "<pad>"}],
    ids=str,
)
def test_settings_beside_a_byte_level_tokenizer_are_applied(tmp_path, name, changes):
    folder = write_roberta(tmp_path / "m")
    change_json(folder / "tokenizer_config.json", tokenizer_class=name, **changes)
    agrees_with_transformers(folder)


def test_usual_folders_need_no_transformers(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizers, "_by_transformers", lambda _: pytest.fail("asked"))
    for write, name in (
        (write_bert, "BertTokenizer"),
        (write_bert, "PreTrainedTokenizerFast"),
        (write_roberta, "RobertaTokenizer"),
    ):
        folder = write(tmp_path / name)
        change_json(folder / "tokenizer_config.json", tokenizer_class=name)
        read_tokenizer(folder)


def test_a_special_tokens_map_counts_where_added_tokens_stand_nowhere(tmp_path):
    folder = write_bert(tmp_path / "m")
    change_json(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    (folder / "special_tokens_map.json").write_text(json.dumps({"cls_token": "[MASK]"}))
    agrees_with_transformers(folder)


def test_vocab_txt_alone_is_a_tokenizer(tmp_path):
    folder = write_bert(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(bert_tokens()) + "\n")
    for lower in (True, False):
        settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": lower}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        agrees_with_transformers(folder)


def test_unknown_settings_are_refused_by_name(tmp_path):
    folder = write_bert(tmp_path / "m")
    change_json(folder / "tokenizer_config.json", novel_normalizer=True)
    with pytest.raises(ConfigError, match="known keys only, got 'novel_normalizer'"):
        read_tokenizer(folder)
    change_json(folder / "tokenizer_config.json", truncation_side="middle")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["novel_normalizer"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="must be 'left' or 'right', got 'middle'"):
        read_tokenizer(folder)


@pytest.fixture(scope="module")
def japanese(tmp_path_factory):
    """A BERT over Japanese words, cut by MeCab."""
    pytest.importorskip("fugashi")
    pytest.importorskip("unidic_lite")
    folder = write_bert(tmp_path_factory.mktemp("japanese") / "m")
    (folder / "tokenizer.json").unlink()
    tokens = bert_tokens()
    tokens[1000:1008] = ["東京", "に", "行く", "青い", "猫", "が", "好き", "##です"]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    settings = {
        "tokenizer_class": "BertJapaneseTokenizer",
        "do_lower_case": False,
        "word_tokenizer_type": "mecab",
        "subword_tokenizer_type": "wordpiece",
        "mecab_kwargs": {"mecab_dic": "unidic_lite"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


JAPANESE = ["東京に行く", "青い猫が好き", "猫"]


def test_japanese_tokenizers_give_what_transformers_gives(tmp_path, japanese):
    theirs = AutoTokenizer.from_pretrained(japanese)
    ours = read_tokenizer(japanese)
    tokens = ours.encode(JAPANESE)
    own = np.concatenate([theirs.encode(t, add_special_tokens=False) for t in JAPANESE])
    assert tokens.input_ids.tolist() == own.tolist()
    assert theirs.unk_token_id not in own
    # a tokenizer.json beside it is not what such a model was trained with
    dummy = tmp_path / "dummy"
    shutil.copytree(japanese, dummy)
    shutil.copy(write_bert(tmp_path / "m") / "tokenizer.json", dummy)
    assert read_tokenizer(dummy).encode(JAPANESE).input_ids.tolist() == own.tolist()
    handed = tokenizer_of(theirs)
    assert handed.encode(JAPANESE).input_ids.tolist() == own.tolist()
    encoder = SparseEncoder.from_pretrained(japanese)
    encoder.save_pretrained(tmp_path / "saved")
    back = SparseEncoder.from_pretrained(tmp_path / "saved")
    assert back.encode_documents(JAPANESE) == encoder.encode_documents(JAPANESE)


def test_special_tokens_in_a_text_are_text_in_bags_of_tokens(tmp_path):
    encoder = SparseEncoder.from_pretrained(write_bert(tmp_path / "m"))
    mask = encoder.vocabulary.id("[MASK]")
    assert encoder.token_ids("[MASK] cat")[0] == mask
    assert encoder.bag_of_tokens(["[MASK] cat"]) == encoder.bag_of_tokens(["[ MASK ] cat"])
    change_json(tmp_path / "m" / "tokenizer_config.json", split_special_tokens=True)
    plain = SparseEncoder.from_pretrained(tmp_path / "m")
    assert mask not in plain.token_ids("[MASK] cat")
    assert plain.encode_documents(["[MASK] cat"]) == encoder.encode_documents(["[ MASK ] cat"])


def test_long_texts_lose_their_first_tokens_where_the_folder_says_so(tmp_path):
    folder = write_bert(tmp_path / "m")
    change_json(folder / "tokenizer_config.json", truncation_side="left", model_max_length=5)
    encoder = SparseEncoder.from_pretrained(folder)
    with pytest.warns(UserWarning, match="were cut"):
        rows = encoder.encode_documents(["dog dog the blue book", "cat"])
    assert rows[0] == encoder.encode_documents(["the blue book"])[0]
    assert encoder.bag_of_tokens(["dog dog the blue book"]) == encoder.bag_of_tokens(
        ["the blue book"]
    )


def test_one_word_texts_are_not_empty_behind_a_prompt_that_ends_in_a_space(tmp_path):
    folder = write_roberta(tmp_path / "m")
    plain = SparseEncoder.from_pretrained(folder)
    encoder = SparseEncoder.from_pretrained(folder)
    object.__setattr__(encoder.query_entry, "prompt", "a ")
    assert len(encoder.token_ids("a blue")) == len(encoder.token_ids("a ")), "the case at hand"
    assert encoder.encode_queries(["blue"]) == plain.encode_queries(["a blue"])
    assert encoder.encode_queries([""]).nnz == 0
