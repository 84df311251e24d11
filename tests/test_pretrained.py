"""Model folders: others' against their own libraries, ours there and back, and names on the hub."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from model_folders import (
    bert_tokenizer,
    bert_tokens,
    change_json,
    write_bert,
    write_distilbert,
    write_roberta,
    write_sentence_transformers,
    write_upstream,
)
from safetensors.torch import load_file, save_file

from vdr_db.checkpoints import locate, saving
from vdr_db.encoders.text import SparseEncoder
from vdr_db.errors import ConfigError, MissingExtraError

TEXTS = ["the cat paints a blue book", "dog", "theory of light, running!", "a b c d e f g"]
WRITERS = {"bert": write_bert, "distilbert": write_distilbert, "roberta": write_roberta}

# transformers draws a progress bar and warns about its own plans; neither is about our code
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def dense(encoder: SparseEncoder, texts: list[str] = TEXTS) -> np.ndarray:
    return encoder.encode_documents(texts).to_scipy().toarray()


def by_transformers(folder, texts: list[str] = TEXTS) -> np.ndarray:
    """log(1 + relu) of the largest logit, by the library the folder was made for."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    rows = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt", truncation=False, padding=False)
        with torch.no_grad():
            logits = model(inputs["input_ids"], inputs["attention_mask"]).logits[0]
        rows.append(logits.amax(0).relu().log1p().numpy())
    return np.stack(rows)


# Hugging Face folders


@pytest.mark.parametrize("family", WRITERS)
def test_masked_language_models_give_what_transformers_gives(tmp_path, family):
    folder = WRITERS[family](tmp_path / family)
    encoder = SparseEncoder.from_pretrained(folder)
    np.testing.assert_allclose(dense(encoder), by_transformers(folder), atol=1e-5)


def test_old_norm_names_and_a_decoder_of_its_own_load(tmp_path):
    folder = write_bert(tmp_path / "old", old_norm_names=True, tied=False)
    assert any(name.endswith("LayerNorm.gamma") for name in load_file(folder / "model.safetensors"))
    encoder = SparseEncoder.from_pretrained(folder)
    assert "head.decoder.weight" in encoder.document_tower.state_dict()
    np.testing.assert_allclose(dense(encoder), by_transformers(folder), atol=1e-5)


def test_a_decoder_that_repeats_the_embeddings_is_tied(tmp_path):
    folder = write_bert(tmp_path / "m")
    known = SparseEncoder.from_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    word = tensors["bert.embeddings.word_embeddings.weight"]
    tensors["cls.predictions.decoder.weight"] = word.clone()
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    save_file(tensors, folder / "model.safetensors")
    encoder = SparseEncoder.from_pretrained(folder)
    assert "head.decoder.weight" not in encoder.document_tower.state_dict()
    assert encoder.stamp().weights == known.stamp().weights


def test_embeddings_may_stand_under_the_decoders_name_only(tmp_path):
    folder = write_bert(tmp_path / "m")
    known = dense(SparseEncoder.from_pretrained(folder))
    tensors = load_file(folder / "model.safetensors")
    word = tensors.pop("bert.embeddings.word_embeddings.weight")
    tensors["cls.predictions.decoder.weight"] = word
    save_file(tensors, folder / "model.safetensors")
    assert np.array_equal(dense(SparseEncoder.from_pretrained(folder)), known)


def test_old_bin_files_and_shards_load(tmp_path):
    folder = write_bert(tmp_path / "m")
    known = dense(SparseEncoder.from_pretrained(folder))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert np.array_equal(dense(SparseEncoder.from_pretrained(folder)), known)
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert np.array_equal(dense(SparseEncoder.from_pretrained(folder)), known)
    (folder / "pytorch_model.bin").unlink()
    names = sorted(tensors)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert np.array_equal(dense(SparseEncoder.from_pretrained(folder)), known)
    (folder / "two.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks two\.safetensors"):
        SparseEncoder.from_pretrained(folder)


def test_half_precision_files_load_as_float32(tmp_path):
    folder = write_bert(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t.half() for n, t in tensors.items()}, folder / "model.safetensors")
    encoder = SparseEncoder.from_pretrained(folder)
    assert encoder.dtype == torch.float32
    half = SparseEncoder.from_pretrained(folder, dtype="float16")
    assert half.stamp().weights == encoder.stamp().weights


def test_a_tokenizer_of_vocabulary_files_loads(tmp_path):
    folder = write_bert(tmp_path / "m")
    known = dense(SparseEncoder.from_pretrained(folder))
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(bert_tokens()) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert np.array_equal(dense(SparseEncoder.from_pretrained(folder)), known)


def test_a_tokenizer_may_be_handed_in(tmp_path):
    from transformers import AutoTokenizer

    whole, bare = write_bert(tmp_path / "whole"), write_bert(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    known = dense(SparseEncoder.from_pretrained(whole))
    for tokenizer in (whole, str(whole), bert_tokenizer(), AutoTokenizer.from_pretrained(whole)):
        encoder = SparseEncoder.from_pretrained(bare, tokenizer=tokenizer)
        assert np.array_equal(dense(encoder), known)
    with pytest.raises(ConfigError, match="`tokenizer` must be a folder"):
        SparseEncoder.from_pretrained(bare, tokenizer=3)
    with pytest.raises(ConfigError, match=r"must hold a tokenizer \(tokenizer.json or vocab.txt\)"):
        SparseEncoder.from_pretrained(bare)


def test_a_new_vdr_head_starts_from_a_body_alone_too(tmp_path):
    folder = write_bert(tmp_path / "m")
    known = SparseEncoder.from_pretrained(folder, head="vdr", k=9)
    assert (known.activation, known.vocabulary.kind) == ("elu1p", "from_999")
    assert torch.equal(known.document_tower.head.norm.weight, torch.ones(32))
    tensors = load_file(folder / "model.safetensors")
    body = {n.removeprefix("bert."): t for n, t in tensors.items() if n.startswith("bert.")}
    save_file(body, folder / "model.safetensors")
    assert dense(SparseEncoder.from_pretrained(folder, head="vdr", k=9)).astype(bool).sum() == 36
    with pytest.raises(ConfigError, match="got a body without its head"):
        SparseEncoder.from_pretrained(folder)


def test_a_model_padded_beyond_its_tokenizer_loads(tmp_path):
    folder = write_bert(tmp_path / "m")
    known = dense(SparseEncoder.from_pretrained(folder))
    tensors = load_file(folder / "model.safetensors")
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        tensors[name] = torch.cat([tensors[name], torch.full_like(tensors[name][:8], 9.0)])
    save_file(tensors, folder / "model.safetensors")
    change_json(folder / "config.json", vocab_size=1136)
    assert np.array_equal(dense(SparseEncoder.from_pretrained(folder)), known)


# sentence-transformers folders


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"activation": "log1p_relu", "k": None, "max_length": 40}),
        ({"settings": {"max_active_dims": 12}}, {"k": 12}),
        ({"transformer": {"max_seq_length": 9}}, {"max_length": 9}),
        ({"transformer": {"document_length": 9, "query_length": 5}}, {"max_length": 9}),
        ({"pooling": {"activation_function": "log1p_relu"}}, {"activation": "double_log1p_relu"}),
        (
            {
                "types": (
                    "sentence_transformers.sparse_encoder.models.MLMTransformer.MLMTransformer",
                    "sentence_transformers.sparse_encoder.models.SpladePooling.SpladePooling",
                )
            },
            {"activation": "log1p_relu"},
        ),
    ],
    ids=str,
)
def test_sparse_encoder_folders_are_read_as_they_say(tmp_path, options, expected):
    encoder = SparseEncoder.from_pretrained(write_sentence_transformers(tmp_path / "m", **options))
    entry = encoder.document_entry
    found = {"activation": encoder.activation, "k": entry.k, "max_length": entry.max_length}
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"settings": {"max_active_dims": 12}},
        {"pooling": {"activation_function": "log1p_relu"}},
        {"settings": {"prompts": {"query": "the book ", "document": "of "}}},
        {"transformer": {"max_seq_length": 6}},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*were cut")
def test_sparse_encoders_give_what_sentence_transformers_gives(tmp_path, options):
    peer_library = pytest.importorskip("sentence_transformers")
    folder = write_sentence_transformers(tmp_path / "m", **options)
    ours = SparseEncoder.from_pretrained(folder)
    peer = peer_library.SparseEncoder(str(folder), device="cpu")
    for side in ("query", "document"):
        encode = ours.encode_queries if side == "query" else ours.encode_documents
        theirs = getattr(peer, f"encode_{side}")(TEXTS, convert_to_sparse_tensor=False)
        np.testing.assert_allclose(encode(TEXTS).to_scipy().toarray(), theirs.numpy(), atol=1e-5)


def test_folders_saved_by_sentence_transformers_load(tmp_path):
    peer_library = pytest.importorskip("sentence_transformers")
    peer = peer_library.SparseEncoder(str(write_bert(tmp_path / "m")), device="cpu")
    peer.max_active_dims = 17
    peer.save_pretrained(str(tmp_path / "saved"))
    encoder = SparseEncoder.from_pretrained(tmp_path / "saved")
    assert encoder.document_entry.k == 17
    theirs = peer.encode_document(TEXTS, convert_to_sparse_tensor=False).numpy()
    np.testing.assert_allclose(dense(encoder), theirs, atol=1e-5)


def test_prompts_are_put_before_texts_and_do_not_make_them_full(tmp_path):
    folder = write_sentence_transformers(
        tmp_path / "m", settings={"prompts": {"document": "the book "}}
    )
    encoder = SparseEncoder.from_pretrained(folder)
    plain = SparseEncoder.from_pretrained(write_bert(tmp_path / "plain"))
    expected = plain.encode_documents(["the book of cats"])
    assert encoder.encode_documents(["of cats", ""])[0] == expected
    assert encoder.encode_documents([""]).nnz == 0
    assert encoder.encode_queries(["of cats"]) == plain.encode_queries(["of cats"])
    assert encoder.bag_of_tokens(["of cats"]) == plain.bag_of_tokens(["of cats"])


def test_lower_casing_that_only_the_folder_asks_for(tmp_path):
    folder = write_sentence_transformers(tmp_path / "m", transformer={"do_lower_case": True})
    file = folder / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings["normalizer"]["lowercase"] = False
    file.write_text(json.dumps(settings))
    encoder = SparseEncoder.from_pretrained(folder)
    assert encoder.token_ids("CAT") == encoder.token_ids("cat")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pooling": {"pooling_strategy": "sum"}},
            "`pooling_strategy` .* must be 'max', got 'sum'",
        ),
        ({"pooling": {"activation_function": "gelu"}}, "`activation_function` .* got 'gelu'"),
        ({"transformer": {"transformer_task": "feature-extraction"}}, "must be for 'fill-mask'"),
        ({"types": ("a.Router", "a.SpladePooling")}, r"got \['a.Router', 'a.SpladePooling'\]"),
        ({"types": ("a.Transformer", "a.Pooling")}, r"got \['a.Transformer', 'a.Pooling'\]"),
        ({"types": ("a.Transformer", "a.SpladePooling", "a.Normalize")}, "'a.Normalize'"),
        (
            {"transformer": {"processing_kwargs": {"text": {"add_special_tokens": False}}}},
            "true|True",
        ),
        ({"transformer": {"novelty": 1}}, "known keys only, got 'novelty'"),
        ({"settings": {"model_type": "CrossEncoder"}}, "must be 'SparseEncoder', got 'CrossEnc"),
    ],
    ids=str,
)
def test_sparse_encoders_of_other_kinds_are_refused(tmp_path, options, message):
    folder = write_sentence_transformers(tmp_path / "m", **options)
    with pytest.raises(ConfigError, match=message):
        SparseEncoder.from_pretrained(folder)


# Our own folders


@pytest.mark.parametrize(
    ("write", "options"),
    [
        (write_bert, {}),
        (lambda folder: write_bert(folder, tied=False), {"k": 5, "query_k": 3}),
        (write_distilbert, {"max_length": 20}),
        (write_roberta, {"activation": "double_log1p_relu"}),
        (write_bert, {"head": "vdr", "k": 9, "lexical": True, "vocabulary": "ascii_from_999"}),
        (write_bert, {"dtype": "bfloat16"}),
        (lambda folder: write_upstream(folder, kind="vdr_crossmodal_text"), {}),
        (
            lambda folder: write_sentence_transformers(
                folder, settings={"prompts": {"query": "a "}}
            ),
            {},
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*were cut")
def test_an_encoder_comes_back_as_it_was_saved(tmp_path, write, options):
    encoder = SparseEncoder.from_pretrained(write(tmp_path / "m"), **options)
    encoder.save_pretrained(tmp_path / "saved")
    modes = {file.stat().st_mode & 0o444 for file in (tmp_path / "saved").iterdir()}
    assert modes == {0o444}, "anyone may read all of it"
    dtype = {"dtype": encoder.dtype}
    back = SparseEncoder.from_pretrained(tmp_path / "saved", **dtype)
    assert back.encode_documents(TEXTS) == encoder.encode_documents(TEXTS)
    assert back.encode_queries(TEXTS) == encoder.encode_queries(TEXTS)
    assert back.is_shared == encoder.is_shared
    for name in ("activation", "norm", "lexical", "document_entry", "query_entry"):
        assert getattr(back, name) == getattr(encoder, name)
    if encoder.dtype == torch.float32:
        assert encoder.stamp().difference(back.stamp()) == []


@pytest.mark.parametrize("family", WRITERS)
def test_transformers_opens_a_saved_masked_language_model(tmp_path, family):
    encoder = SparseEncoder.from_pretrained(WRITERS[family](tmp_path / "m"))
    encoder.save_pretrained(tmp_path / "saved")
    np.testing.assert_allclose(dense(encoder), by_transformers(tmp_path / "saved"), atol=1e-5)


def test_saving_replaces_an_encoder_and_nothing_else(tmp_path):
    first = SparseEncoder.from_pretrained(write_bert(tmp_path / "a", seed=1))
    second = SparseEncoder.from_pretrained(write_bert(tmp_path / "b", seed=2))
    target = tmp_path / "deep" / "saved"
    first.save_pretrained(target)
    second.save_pretrained(target)
    assert dense(SparseEncoder.from_pretrained(target)).tolist() == dense(second).tolist()
    assert [p.name for p in target.parent.iterdir()] == ["saved"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for other in (tmp_path / "mine", tmp_path / "file", tmp_path / "a"):
        with pytest.raises(ConfigError, match="must be free, empty or an encoder saved before"):
            first.save_pretrained(other)
    (tmp_path / "empty").mkdir()
    first.save_pretrained(tmp_path / "empty")


def test_a_failed_save_leaves_the_old_encoder_whole(tmp_path, monkeypatch):
    encoder = SparseEncoder.from_pretrained(write_bert(tmp_path / "m"))
    target = tmp_path / "saved"
    encoder.save_pretrained(target)
    known = dense(SparseEncoder.from_pretrained(target))

    def full(tensors, file):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "save_weights", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        encoder.save_pretrained(target)
    with pytest.raises(ConfigError, match="No space left on device"):
        encoder.save_pretrained(tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "saved"]
    assert np.array_equal(dense(SparseEncoder.from_pretrained(target)), known)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    encoder = SparseEncoder.from_pretrained(write_bert(tmp_path / "m"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/saved cannot be written"):
        encoder.save_pretrained(tmp_path / "file" / "saved")


def test_a_folder_of_another_version_is_refused(tmp_path):
    SparseEncoder.from_pretrained(write_bert(tmp_path / "m")).save_pretrained(tmp_path / "s")
    change_json(tmp_path / "s" / "vdr_db.json", format=99)
    with pytest.raises(ConfigError, match="must have format 1 to 3, got 99"):
        SparseEncoder.from_pretrained(tmp_path / "s")
    (tmp_path / "s" / "vdr_db.json").write_text('{"format": 1}')
    with pytest.raises(ConfigError, match="must hold the settings `save_pretrained` writes"):
        SparseEncoder.from_pretrained(tmp_path / "s")


# Names on the hub


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "a path where nothing is"),
        ("/no/such/folder", "a path where nothing is"),
        ("a/b/c", "a path where nothing is"),
        ("", "a path where nothing is"),
    ],
)
def test_a_path_where_nothing_is_is_not_looked_up(monkeypatch, name, message):
    monkeypatch.setattr(locate, "_download", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(ConfigError, match=message):
        SparseEncoder.from_pretrained(name)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="got a file"):
        SparseEncoder.from_pretrained(tmp_path / "file")


class Hub:
    """Stands in for `huggingface_hub`: serves folders by id and notes what was asked for."""

    def __init__(self, models):
        self.models = models
        self.asked = []

    def snapshot_download(self, name, revision, allow_patterns):
        self.asked.append((name, revision, allow_patterns))
        if name not in self.models:
            raise OSError("no such model")
        return str(self.models[name])


@pytest.fixture
def hub(monkeypatch):
    hub = Hub({})
    monkeypatch.setattr(locate, "require", lambda module, extra: hub)
    return hub


def test_a_name_is_fetched_without_code_and_stamped_with_its_revision(tmp_path, hub):
    hub.models["some/model"] = write_bert(tmp_path / "0123abc")
    encoder = SparseEncoder.from_pretrained("some/model", revision="main")
    assert (encoder.stamp().model, encoder.stamp().revision) == ("some/model", "0123abc")
    ((name, revision, patterns),) = hub.asked
    assert (name, revision) == ("some/model", "main")
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in patterns)


def test_bin_files_are_fetched_only_where_there_is_nothing_better(tmp_path, hub):
    hub.models["old/model"] = write_upstream(tmp_path / "m", file="bin")
    SparseEncoder.from_pretrained("old/model")
    assert [any(p.endswith(".bin") for p in patterns) for _, _, patterns in hub.asked] == [
        False,
        True,
    ]


def test_a_name_that_is_not_there_is_said_plainly(hub):
    with pytest.raises(ConfigError, match="'not/there' is no folder here and cannot be had"):
        SparseEncoder.from_pretrained("not/there")


def test_a_missing_hub_package_names_the_extra(monkeypatch):
    def absent(module, extra):
        raise MissingExtraError(f"`{module}` ... pip install 'vdr-db[{extra}]'")

    monkeypatch.setattr(locate, "require", absent)
    with pytest.raises(MissingExtraError, match=r"vdr-db\[torch\]"):
        SparseEncoder.from_pretrained("some/model")


def test_loading_leaves_the_folder_alone(tmp_path):
    folder = write_bert(tmp_path / "m")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    encoder = SparseEncoder.from_pretrained(folder)
    shutil.rmtree(folder)  # and needs it no more
    assert encoder.encode_documents(TEXTS).nnz
    assert "model.safetensors" in before
