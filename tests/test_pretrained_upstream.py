"""Checkpoints of VDR's published code, against a forward pass written from its description.

The pass below is NumPy in float64 and takes the checkpoint's own names; it shares nothing with the
library but the file.
"""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from model_folders import UPSTREAM_SCHEMAS, bert_tokenizer, bert_tokens, write_upstream
from safetensors.torch import load_file, save_file

from vdr_db.checkpoints import text as pretrained
from vdr_db.checkpoints.plan import Compatibility
from vdr_db.encoders.text import SparseEncoder
from vdr_db.errors import ConfigError
from vdr_db.towers.families import FAMILIES

TEXTS = ["the cat paints a blue book", "dog", "heavy light!", "a of the"]
HEADS, LAYERS = 4, 2


class Checkpoint:
    """Weights of one encoder of a `Retriever`, and its forward pass."""

    def __init__(self, folder, side):
        file = folder / "model.safetensors"
        stored = load_file(file) if file.is_file() else torch.load(folder / "pytorch_model.bin")
        self.weights = {
            name.removeprefix(f"{side}."): tensor.numpy().astype(np.float64)
            for name, tensor in stored.items()
            if name.startswith(f"{side}.")
        }

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, x, name, eps):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def bert(self, ids, mask):
        """Last hidden states `[L, H]` of one text; positions outside of `mask` are not attended."""
        name = "bert_model.embeddings."
        x = self.weights[f"{name}word_embeddings.weight"][ids]
        x = x + self.weights[f"{name}position_embeddings.weight"][np.arange(len(ids))]
        x = x + self.weights[f"{name}token_type_embeddings.weight"][0]
        x = self.norm(x, f"{name}LayerNorm", 1e-12)
        for i in range(LAYERS):
            layer = f"bert_model.encoder.layer.{i}."
            q, k, v = (
                self.linear(x, f"{layer}attention.self.{part}").reshape(len(ids), HEADS, -1)
                for part in ("query", "key", "value")
            )
            scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
            scores = np.where(mask, scores, -np.inf)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            attention = scores / scores.sum(-1, keepdims=True)
            mixed = np.einsum("hqk,khd->qhd", attention, v).reshape(x.shape)
            mixed = self.linear(mixed, f"{layer}attention.output.dense")
            x = self.norm(x + mixed, f"{layer}attention.output.LayerNorm", 1e-12)
            wide = self.linear(x, f"{layer}intermediate.dense")
            wide = wide * 0.5 * (1 + np.vectorize(math.erf)(wide / math.sqrt(2)))
            wide = self.linear(wide, f"{layer}output.dense")
            x = self.norm(x + wide, f"{layer}output.LayerNorm", 1e-12)
        return x

    def embed(self, text, *, ids_kept, k, most, padded_to=None, norm=False):
        """Weights over all token ids, zero where not kept."""
        own = bert_ids(text)[: most - 2]
        ids = [101, *own, 102]
        ids += [0] * ((padded_to or len(ids)) - len(ids))
        mask = np.arange(len(ids)) < len(own) + 2
        hidden = self.norm(self.bert(np.array(ids), mask), "ln", 1e-5)
        table = self.weights["bert_model.embeddings.word_embeddings.weight"]
        scores = (hidden @ table[ids_kept].T).max(0)
        weights = np.where(scores >= 0, scores + 1, np.exp(np.minimum(scores, 0)))
        if norm:
            weights = weights / np.linalg.norm(weights)
        row = np.zeros(len(table))
        kept = np.argsort(-scores, kind="stable")[:k]
        row[np.array(ids_kept)[kept]] = weights[kept]
        return row


def bert_ids(text):
    tokenizer = bert_tokenizer()
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer.encode(text, add_special_tokens=False).ids


def by_hand(folder, side, **options):
    encoder = Checkpoint(folder, side)
    return np.stack([encoder.embed(text, **options) for text in TEXTS])


def rows(encoder, side):
    encode = encoder.encode_queries if side == "encoder_q" else encoder.encode_documents
    return encode(TEXTS).to_scipy().toarray()


FROM_999 = list(range(999, len(bert_tokens())))
ASCII = [i for i in FROM_999 if bert_tokens()[i].isascii()]


@pytest.mark.filterwarnings("ignore:.*were cut")
@pytest.mark.parametrize("file", ["safetensors", "bin"])
@pytest.mark.parametrize("schema", UPSTREAM_SCHEMAS)
def test_all_generations_load_and_give_the_right_vectors(tmp_path, schema, file):
    folder = write_upstream(tmp_path / "m", schema=schema, file=file)
    is_old = schema == "2023"
    encoder = SparseEncoder.from_pretrained(folder, **({"k": 30} if is_old else {}))
    assert encoder.vocabulary.kind == ("from_1000" if is_old else "from_999")
    assert (encoder.activation, encoder.lexical, encoder.norm) == ("elu1p", False, False)
    assert not encoder.is_shared
    columns = FROM_999[1:] if is_old else FROM_999
    for side, most in (("encoder_q", 10), ("encoder_p", 20)):
        expected = by_hand(folder, side, ids_kept=columns, k=30, most=most)
        np.testing.assert_allclose(rows(encoder, side), expected, atol=2e-5)


def test_the_old_schema_keeps_768_dimensions(tmp_path):
    folder = write_upstream(tmp_path / "m", schema="2023")
    with pytest.raises(ConfigError, match=r"\[1, 128\], got 768"):  # of a tiny vocabulary
        SparseEncoder.from_pretrained(folder)


@pytest.mark.filterwarnings("ignore:.*were cut")
@pytest.mark.parametrize("prefixes", [("encoder_q", "encoder_p"), ("encoder_q",), ("encoder_p",)])
def test_a_shared_encoder_is_loaded_once(tmp_path, prefixes):
    folder = write_upstream(tmp_path / "m", shared=True, prefixes=prefixes, file="bin")
    encoder = SparseEncoder.from_pretrained(folder)
    assert encoder.is_shared
    assert encoder.query_entry.max_length == encoder.document_entry.max_length == 20
    expected = by_hand(folder, prefixes[0], ids_kept=FROM_999, k=30, most=20)
    for side in ("encoder_q", "encoder_p"):
        np.testing.assert_allclose(rows(encoder, side), expected, atol=2e-5)


def test_one_prefix_serves_both_sides_with_their_own_lengths(tmp_path):
    encoder = SparseEncoder.from_pretrained(write_upstream(tmp_path / "m", prefixes=("encoder_p",)))
    assert encoder.is_shared
    assert (encoder.query_entry.max_length, encoder.document_entry.max_length) == (10, 20)


@pytest.mark.filterwarnings("ignore:.*were cut")
@pytest.mark.parametrize("schema", ["2024", "spring 2024"])
def test_the_text_side_of_a_cross_modal_checkpoint(tmp_path, schema):
    folder = write_upstream(tmp_path / "m", schema=schema, kind="vdr_crossmodal_text")
    config = json.loads((folder / "config.json").read_text())
    image = "vdr_cm_image" if schema == "spring 2024" else "vdr_crossmodal_image"
    config["encoder_p"] = {"type": image, "topk": 30, "resolution": 224, "layers": 12}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    texts = {name: t for name, t in tensors.items() if name.startswith("encoder_q.")}
    texts["encoder_p.proj"] = torch.zeros(len(ASCII), 32)
    texts["encoder_p.conv1.weight"] = torch.zeros(32, 3, 8, 8)
    save_file(texts, folder / "model.safetensors")
    encoder = SparseEncoder.from_pretrained(folder)
    assert (encoder.vocabulary.kind, encoder.norm) == ("ascii_from_999", True)
    expected = by_hand(folder, "encoder_q", ids_kept=ASCII, k=30, most=10, norm=True)
    np.testing.assert_allclose(rows(encoder, "encoder_q"), expected, atol=1e-6)
    assert encoder.vocabulary.columns == len(ASCII) < len(FROM_999)


# Padding in the maximum


@pytest.mark.filterwarnings("ignore:.*were cut")
@pytest.mark.parametrize("asked", ["max_length", Compatibility("max_length")])
def test_pool_padding_to_the_maximal_length(tmp_path, asked):
    folder = write_upstream(tmp_path / "m")
    encoder = SparseEncoder.from_pretrained(folder, compatibility=asked)
    expected = by_hand(folder, "encoder_p", ids_kept=FROM_999, k=30, most=20, padded_to=20)
    np.testing.assert_allclose(rows(encoder, "encoder_p"), expected, atol=2e-5)
    plain = rows(SparseEncoder.from_pretrained(folder), "encoder_p")
    assert np.abs(plain - expected).max() > 1e-2, "padding makes a difference"


@pytest.mark.parametrize("size", [1, 2, 128])
def test_pool_padding_to_the_longest_of_a_batch_in_the_given_order(tmp_path, size):
    folder = write_upstream(tmp_path / "m")
    encoder = SparseEncoder.from_pretrained(folder, compatibility=Compatibility("longest", size))
    checkpoint = Checkpoint(folder, "encoder_p")
    lengths = [len(bert_ids(text)) + 2 for text in TEXTS]
    expected = []
    for i, text in enumerate(TEXTS):
        start = i - i % size
        longest = max(lengths[start : start + size])
        expected.append(checkpoint.embed(text, ids_kept=FROM_999, k=30, most=20, padded_to=longest))
    np.testing.assert_allclose(rows(encoder, "encoder_p"), np.stack(expected), atol=2e-5)


def test_pool_padding_gives_an_empty_text_what_the_published_code_gives_it(tmp_path):
    folder = write_upstream(tmp_path / "m")
    encoder = SparseEncoder.from_pretrained(folder, compatibility="max_length")
    (row,) = encoder.encode_documents([""]).to_scipy().toarray()
    expected = Checkpoint(folder, "encoder_p").embed(
        "", ids_kept=FROM_999, k=30, most=20, padded_to=20
    )
    np.testing.assert_allclose(row, expected, atol=2e-5)
    assert SparseEncoder.from_pretrained(folder).encode_documents([""]).nnz == 0


# Settings


@pytest.mark.parametrize(("topk", "k"), [(None, 768), (-1, None), (5, 5)])
def test_topk_of_the_checkpoint(tmp_path, topk, k):
    folder = write_upstream(tmp_path / "m", topk=topk)
    if k == 768:  # more than this tiny vocabulary has
        with pytest.raises(ConfigError, match="got 768"):
            SparseEncoder.from_pretrained(folder)
        return
    assert SparseEncoder.from_pretrained(folder).document_entry.k == k


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "dpr"}, "a DPR encoder, for one, makes dense vectors"),
        ({"schema": "2023", "kind": "dpr"}, "a DPR encoder, for one, makes dense vectors"),
        ({"topk": 0}, "`topk` of encoder_q .* must be -1 or at least 1, got 0"),
        ({"pooling": "mean"}, "`pooling` of encoder_q .* must be 'max', got 'mean'"),
        ({"shift_vocab_num": 998}, "`shift_vocab_num` .* got 998"),
        ({"prefixes": ("encoder_x",)}, "must have names that start with encoder_q. or encoder_p."),
    ],
    ids=str,
)
def test_checkpoints_of_other_kinds_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        SparseEncoder.from_pretrained(write_upstream(tmp_path / "m", **options))


def test_missing_and_unexpected_weights_are_listed(tmp_path):
    folder = write_upstream(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder_p.proj"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"hold encoder_p\.proj, which"):
        SparseEncoder.from_pretrained(folder)
    for name in ("encoder_p.proj", "encoder_p.ln.bias", "encoder_q.ln.bias"):
        del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lacks encoder_p\.ln\.bias"):
        SparseEncoder.from_pretrained(folder)
    del tensors["encoder_p.bert_model.embeddings.word_embeddings.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lack encoder_p\.bert_model\.embeddings\.word_emb"):
        SparseEncoder.from_pretrained(folder)


def test_the_full_list_of_names_and_sizes(tmp_path):
    """The 199 weights of a published text encoder: 108,893,184 numbers, as its file size says."""
    names = ["ln.weight", "ln.bias"]
    names += [
        f"bert_model.embeddings.{part}"
        for part in (
            "word_embeddings.weight",
            "position_embeddings.weight",
            "token_type_embeddings.weight",
            "LayerNorm.weight",
            "LayerNorm.bias",
        )
    ]
    parts = [f"attention.self.{part}" for part in ("query", "key", "value")]
    parts += ["attention.output.dense", "attention.output.LayerNorm"]
    parts += ["intermediate.dense", "output.dense", "output.LayerNorm"]
    names += [
        f"bert_model.encoder.layer.{i}.{part}.{kind}"
        for i in range(12)
        for part in parts
        for kind in ("weight", "bias")
    ]
    family = FAMILIES["bert"]
    known = {**family.body_names(12, prefix="bert_model."), **family.head_names("vdr")}
    assert sorted(name for (name,) in known.values()) == sorted(names)
    assert len(names) == 199

    from vdr_db.text.vocabulary import Vocabulary
    from vdr_db.towers.text import Tower
    from vdr_db.towers.text_body import Body
    from vdr_db.towers.text_head import make_head

    config = family.body_config({})
    words = Vocabulary([str(i) for i in range(30522)], kind="from_999")
    tower = Tower(Body(config), make_head("vdr", config, words, tied=True))
    assert sum(p.numel() for p in tower.parameters()) == 108_893_184
    assert tower.head.norm.eps == 1e-5
    assert {m.eps for m in tower.body.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-12}
    assert words.columns == 29_523


# The tokenizer, which no published checkpoint holds


def test_the_tokenizer_comes_from_an_argument_or_by_the_models_name(tmp_path, monkeypatch):
    whole = write_upstream(tmp_path / "whole")
    bare = write_upstream(tmp_path / "bare", tokenizer=False)
    known = SparseEncoder.from_pretrained(whole).encode_documents(TEXTS)
    given = SparseEncoder.from_pretrained(bare, tokenizer=whole)
    assert given.encode_documents(TEXTS) == known
    asked = []

    def download(name, revision, patterns):
        asked.append(name)
        return whole

    monkeypatch.setattr(pretrained, "_download", download)
    assert SparseEncoder.from_pretrained(bare).encode_documents(TEXTS) == known
    assert asked == ["bert-base-uncased"]


def test_a_tokenizer_that_cannot_be_had_is_said_plainly(tmp_path, monkeypatch):
    def download(name, revision, patterns):
        raise ConfigError("no network")

    monkeypatch.setattr(pretrained, "_download", download)
    bare = write_upstream(tmp_path / "bare", tokenizer=False)
    message = re.escape("bare holds no tokenizer, and that of 'bert-base-uncased' cannot be had")
    with pytest.raises(ConfigError, match=message):
        SparseEncoder.from_pretrained(bare)
