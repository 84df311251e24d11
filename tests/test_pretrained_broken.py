"""Model folders that are damaged, incomplete or hostile: each is refused with what is wrong."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from model_folders import (
    change_json,
    write_bert,
    write_upstream,
)
from safetensors.torch import load_file, save_file

from vdr_db.encoders.text import SparseEncoder
from vdr_db.errors import ConfigError


def test_missing_and_unexpected_weights_are_listed(tmp_path):
    folder = write_bert(tmp_path / "m", extra={"bert.novelty.weight": torch.zeros(2)})
    with pytest.raises(ConfigError, match=r"hold bert\.novelty\.weight, which"):
        SparseEncoder.from_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    gone = ["bert.encoder.layer.1.output.dense.bias", "cls.predictions.transform.dense.weight"]
    kept = {name: tensor for name, tensor in tensors.items() if name not in gone}
    kept["bert.embeddings.LayerNorm.weight"] = torch.zeros(31)
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(ConfigError) as caught:
        SparseEncoder.from_pretrained(folder)
    for name in (*gone, "bert.embeddings.LayerNorm.weight [31] instead of [32]"):
        assert name in str(caught.value)


def test_a_decoder_that_is_neither_there_nor_tied_is_missing(tmp_path):
    folder = write_bert(tmp_path / "m")
    change_json(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(ConfigError, match=r"lacks cls\.predictions\.decoder\.weight"):
        SparseEncoder.from_pretrained(folder)


def test_poolers_and_position_counters_are_tolerated(tmp_path):
    extra = {
        "bert.pooler.dense.weight": torch.zeros(32, 32),
        "bert.pooler.dense.bias": torch.zeros(32),
        "bert.embeddings.position_ids": torch.arange(40)[None],
        "cls.seq_relationship.weight": torch.zeros(2, 32),
        "cls.seq_relationship.bias": torch.zeros(2),
    }
    known = SparseEncoder.from_pretrained(write_bert(tmp_path / "m"))
    encoder = SparseEncoder.from_pretrained(write_bert(tmp_path / "more", extra=extra))
    assert encoder.stamp().weights == known.stamp().weights


@pytest.mark.parametrize("keep", [0, 5, 1000, -4])
def test_a_file_cut_short_is_named(tmp_path, keep):
    folder = write_bert(tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(
        ConfigError, match=r"model\.safetensors cannot be read as a file of weights"
    ):
        SparseEncoder.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 5, 1000, -4])
def test_a_bin_file_cut_short_is_named(tmp_path, keep):
    folder = write_upstream(tmp_path / "m", file="bin")
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin cannot be read"):
        SparseEncoder.from_pretrained(folder)


class Malicious:
    """Unpickling this would run a command."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_code_in_a_bin_file_is_not_run(tmp_path, how):
    folder = write_bert(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    content = {"weight": Malicious(tmp_path / "hacked")}
    if how == "torch":
        torch.save(content, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(content))
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin cannot be read"):
        SparseEncoder.from_pretrained(folder)
    assert not (tmp_path / "hacked").exists()


def test_a_bin_file_of_other_things_is_refused(tmp_path):
    folder = write_bert(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save([1, 2], folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="must hold a mapping of weights, got list"):
        SparseEncoder.from_pretrained(folder)
    torch.save({"step": 3}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="must hold tensors only, got int for `step`"):
        SparseEncoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "which holds a config.json, got none"),
        ("model.safetensors", r"must hold model\.safetensors or pytorch_model\.bin, got neither"),
        ("tokenizer.json", "must hold a tokenizer"),
    ],
)
def test_a_missing_file_is_named(tmp_path, file, message):
    folder = write_bert(tmp_path / "m")
    (folder / file).unlink()
    with pytest.raises(ConfigError, match=message):
        SparseEncoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", r"config\.json cannot be read as JSON"),
        ("config.json", "[]", r"config\.json must hold a JSON object, got list"),
        ("tokenizer.json", "{}", r"tokenizer\.json must be a tokenizer"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json"),
        ("modules.json", "{}", r"modules\.json must list modules|must name a masked"),
        ("model.safetensors.index.json", "{}", "got neither|must be an index"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, file, content, message):
    folder = write_bert(tmp_path / "m")
    if file.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    (folder / file).write_text(content)
    with pytest.raises(ConfigError, match=message):
        SparseEncoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "no-such"},
            r"must be one that transformers has a class for, got 'no-such'",
        ),
        ({"model_type": None}, "got None"),
        ({"position_embedding_type": "relative_key"}, "must be 'absolute' or None, got 'relat"),
        ({"is_decoder": True}, "`is_decoder` in .* must be False or None, got True"),
        ({"type_vocab_size": -1}, "no negative number of token types, got 40 and -1"),
        ({"pad_token_id": -1}, "`pad_token_id` .* must be an id in "),
        ({"novelty": 1}, "must hold known keys only, got 'novelty'"),
        ({"num_attention_heads": 5}, "must divide the hidden size 32, got 5"),
        ({"num_hidden_layers": 0}, "`layers` of the transformer must be at least 1, got 0"),
        ({"hidden_size": "32"}, "`hidden_size` in config.json must be a int, got '32'"),
        ({"hidden_act": "mish"}, "got 'mish'"),
        ({"vocab_size": 900}, "each of the tokenizer's 1128 ids, got 900 rows"),
    ],
    ids=str,
)
def test_impossible_configs_are_refused(tmp_path, changes, message):
    folder = write_bert(tmp_path / "m")
    change_json(folder / "config.json", **changes)
    with pytest.raises(ConfigError, match=message):
        SparseEncoder.from_pretrained(folder)


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "max_position_embeddings"])
@pytest.mark.parametrize("value", [1 << 40, 1 << 62])
def test_sizes_that_nothing_can_have_are_refused(tmp_path, key, value):
    folder = write_bert(tmp_path / "m")
    change_json(folder / "config.json", **{key: value})
    with pytest.raises(ConfigError):
        SparseEncoder.from_pretrained(folder, device="cpu")


def resaved(folder, change):
    """The tensors of a folder, changed."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def test_saved_weights_are_compared_with_their_digest(tmp_path):
    SparseEncoder.from_pretrained(write_bert(tmp_path / "source"), device="cpu").save_pretrained(
        tmp_path / "model"
    )
    told = json.loads((tmp_path / "model" / "vdr_db.json").read_text())["digests"]
    assert list(told) == ["model.safetensors"]
    SparseEncoder.from_pretrained(tmp_path / "model", device="cpu")
    file = tmp_path / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged or was changed: its SHA"):
        SparseEncoder.from_pretrained(tmp_path / "model", device="cpu")


def test_weights_of_whole_numbers_and_doubled_names_are_refused(tmp_path):
    folder = write_bert(tmp_path / "whole")
    resaved(
        folder, lambda t: {n: (x * 9).to(torch.int8) if "query" in n else x for n, x in t.items()}
    )
    with pytest.raises(ConfigError, match=r"query.* must be of floats, got torch\.int8"):
        SparseEncoder.from_pretrained(folder, device="cpu")
    folder = write_bert(tmp_path / "twice")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name, entry = next((n, e) for n, e in header.items() if n != "__metadata__")
    again = f",{json.dumps(name)}:{json.dumps(entry)}}}"
    text = content[8 : 8 + length].decode().rstrip()[:-1] + again
    file.write_bytes(len(text).to_bytes(8, "little") + text.encode() + content[8 + length :])
    with pytest.raises(ConfigError, match="cannot be read as a file of weights"):
        SparseEncoder.from_pretrained(folder, device="cpu")


def test_graphs_are_compared_with_their_digests(tmp_path):
    pytest.importorskip("onnx")
    from image_folders import write_cross_modal

    from vdr_db import CrossModalEncoder, ImageEncoder
    from vdr_db.encoders.export import export

    folder = tmp_path / "model"
    published = write_cross_modal(tmp_path / "source")
    CrossModalEncoder.from_pretrained(published, device="cpu").save_pretrained(tmp_path / "saved")
    export(tmp_path / "saved", folder)
    CrossModalEncoder.from_pretrained(folder, runtime="onnx")
    graphs = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*.onnx")}
    assert len(graphs) == 2, sorted(graphs)
    for name, file in graphs.items():
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        kind = ImageEncoder if "image" in name else SparseEncoder
        for load in (kind, CrossModalEncoder):
            with pytest.raises(ConfigError, match=rf"{file.name} is damaged or was changed: its"):
                load.from_pretrained(folder, runtime="onnx")
        file.unlink()
        with pytest.raises(ConfigError, match=rf"{file.name} cannot be read: there is no such"):
            kind.from_pretrained(folder, runtime="onnx")
        file.write_bytes(content)
    CrossModalEncoder.from_pretrained(folder, runtime="onnx")


def test_a_digest_of_a_device_is_refused(tmp_path):
    folder = tmp_path / "model"
    SparseEncoder.from_pretrained(write_bert(tmp_path / "s"), device="cpu").save_pretrained(folder)
    told = json.loads((folder / "vdr_db.json").read_text())
    told["digests"]["/dev/zero"] = "0"
    (folder / "vdr_db.json").write_text(json.dumps(told))
    with pytest.raises(ConfigError, match=r"/dev/zero cannot be read: there is no such file"):
        SparseEncoder.from_pretrained(folder, device="cpu")
