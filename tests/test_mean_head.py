"""The head `mean`: its formula, both runtimes, two heads over one body, and training of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from model_folders import write_bert

from vdr_db import SparseEncoder
from vdr_db.encoders.export import export
from vdr_db.towers.text import Tower
from vdr_db.towers.text_head import make_head

TEXTS = ["cats painting books of cats", "the blue sea " * 9, "", "cat", "of heavy theory"]


def with_heads(folder, *, seed=0, own_query=True):
    """The body of a folder under heads with random weights."""
    bare = SparseEncoder.from_pretrained(folder, head="vdr", k=12)
    chance = torch.Generator().manual_seed(seed)
    body, towers = bare.document_tower.body, []
    for _ in range(2 if own_query else 1):
        head = make_head("mean", body.config, bare.vocabulary, tied=True)
        head.to_empty(device="cpu")
        width = body.config.hidden_size
        for name, weight in head.named_parameters():
            drawn = torch.randn(weight.shape, generator=chance)
            spread = width**-0.5 if name == "dense.weight" else 0.5
            weight.data = spread * drawn + (1.0 if name in ("scale", "norm.weight") else 0.0)
        head.columns = torch.from_numpy(bare.vocabulary.column_to_id.astype(np.int64))
        towers.append(Tower(body, head).eval())
    return SparseEncoder(
        document_tower=towers[0],
        query_tower=towers[-1],
        tokenizer=bare.tokenizer,
        vocabulary=bare.vocabulary,
        activation="log1p_relu",
        document_entry=bare.document_entry,
        query_entry=bare.query_entry,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def encoder(folder):
    return with_heads(folder)


@pytest.fixture(scope="module")
def exported(encoder, tmp_path_factory):
    place = tmp_path_factory.mktemp("exported")
    encoder.save_pretrained(place / "model")
    export(place / "model", place / "graphs")
    return place / "graphs"


@pytest.mark.parametrize("side", ["document", "query"])
def test_scores_follow_the_formula(encoder, side):
    tower = encoder.tower(side)
    item = encoder.item(side, "cats of the blue sea")
    ids, positions, _, runs = tower.alone(item)
    with torch.no_grad():
        hidden = tower.body(ids, positions, runs)[: len(item.input_ids)].double()
        words = tower.body.embeddings.word.weight.double()
        head = {name: weight.double() for name, weight in tower.head.named_parameters()}
        x = head["dense.weight"] @ hidden.mean(0) + head["dense.bias"]
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        u = head["norm.weight"] * x + head["norm.bias"]
        scores = torch.stack(
            [
                u @ (scale.clamp(min=0) * word)
                for scale, word in zip(head["scale"], words, strict=True)
            ]
        )
        scores = scores + head["bias"]
    chosen = torch.from_numpy(encoder.vocabulary.column_to_id.astype(np.int64))
    np.testing.assert_allclose(tower.pooled(item), scores[chosen].numpy(), rtol=1e-4, atol=1e-4)


def test_one_body_is_written_once(encoder, exported, tmp_path):
    from safetensors import safe_open

    with safe_open(exported / "model.safetensors", "np") as file:
        names = list(file.keys())
    assert sum(name.endswith("word_embeddings.weight") for name in names) == 1
    assert {"document.scale", "query.scale"} <= {*names}
    again = SparseEncoder.from_pretrained(exported, runtime="torch")
    assert again.document_tower.body is again.query_tower.body
    assert not again.is_shared
    assert again.encode_documents(TEXTS) == encoder.encode_documents(TEXTS)
    assert again.encode_queries(TEXTS) == encoder.encode_queries(TEXTS)
    assert again.encode_queries(TEXTS) != again.encode_documents(TEXTS)
    assert again.stamp().weights == encoder.stamp().weights
    half = SparseEncoder.from_pretrained(exported, dtype="float16")
    half.save_pretrained(tmp_path / "half")
    assert SparseEncoder.from_pretrained(tmp_path / "half").document_entry == half.document_entry


def test_both_runtimes_agree(exported):
    torch_side = SparseEncoder.from_pretrained(exported, runtime="torch")
    onnx_side = SparseEncoder.from_pretrained(exported, runtime="onnx")
    assert onnx_side.stamp() == torch_side.stamp()
    for name in ("encode_documents", "encode_queries"):
        found = [getattr(side, name)(TEXTS) for side in (torch_side, onnx_side)]
        assert found[0].allclose(found[1], rtol=1e-4, atol=1e-5)
    columns = np.array([0, 3, 7])
    for side in ("document", "query"):
        ours, theirs = torch_side.tower(side), onnx_side.tower(side)
        np.testing.assert_array_equal(ours.rows(columns), theirs.rows(columns))
        np.testing.assert_array_equal(ours.bias(columns), theirs.bias(columns))
        item = torch_side.item(side, TEXTS[0])
        np.testing.assert_allclose(ours.states(item), theirs.states(item), rtol=1e-4, atol=1e-5)


def test_a_shared_tower_is_saved_too(folder, tmp_path):
    encoder = with_heads(folder, own_query=False)
    encoder.save_pretrained(tmp_path / "m")
    export(tmp_path / "m", tmp_path / "graphs")
    again = SparseEncoder.from_pretrained(tmp_path / "graphs", runtime="onnx")
    assert again.is_shared
    assert again.encode_documents(TEXTS).allclose(encoder.encode_documents(TEXTS), rtol=1e-4)


def test_rows_follow_weights_that_learn(folder):
    encoder = with_heads(folder, own_query=False)
    tower = encoder.document_tower
    before = tower.matrix().clone()
    with torch.no_grad():
        tower.head.scale.mul_(2)
    torch.testing.assert_close(tower.matrix(), 2 * before)
    tower.matrix().sum().backward()
    assert tower.head.scale.grad is not None
    assert tower.body.embeddings.word.weight.grad is not None
