"""Stamps: whatever changes a vector is in them, and nothing else keeps a collection shut."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from image_folders import write_cross_modal  # noqa: E402
from model_folders import change_json, write_bert  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from vdr_db import CrossModalEncoder, EncoderStamp, SparseEncoder  # noqa: E402
from vdr_db.checkpoints.digests import weight_digests  # noqa: E402
from vdr_db.checkpoints.identity import settings_of_parts  # noqa: E402
from vdr_db.cli.main import main  # noqa: E402
from vdr_db.connectors import Collection, MemoryStore, QdrantStore  # noqa: E402
from vdr_db.connectors.probes import PROBES  # noqa: E402
from vdr_db.encoders.export import export  # noqa: E402
from vdr_db.encoders.stamps import read_stamp  # noqa: E402
from vdr_db.encoders.token_queries import TokenQueries  # noqa: E402
from vdr_db.errors import StoreMismatch  # noqa: E402
from vdr_db.ingest import RecordSource, ingest  # noqa: E402
from vdr_db.readers import Record  # noqa: E402

TEXTS = ["the cat paints a blue book", "theory of light"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with graphs, whose collection is made once."""
    root = tmp_path_factory.mktemp("stamps")
    export(write_bert(root / "source"), root / "model")
    return root / "model"


def load(folder, runtime="onnx", **options):
    return SparseEncoder.from_pretrained(folder, runtime=runtime, **options)


def made_with(encoder):
    store = MemoryStore()
    Collection(store, encoder).add_texts(TEXTS)
    return store


def settings(**changes):
    return lambda folder: change_json(folder / "vdr_db.json", **changes)


def side(name, **changes):
    def edit(folder):
        told = json.loads((folder / "vdr_db.json").read_text())
        change_json(folder / "vdr_db.json", **{name: {**told[name], **changes}})

    return edit


def config(**changes):
    return lambda folder: change_json(folder / "config.json", **changes)


def tokenizer(change):
    def edit(folder):
        told = json.loads((folder / "tokenizer.json").read_text())
        change(told)
        (folder / "tokenizer.json").write_text(json.dumps(told))

    return edit


def weights(folder):
    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name] + np.float32(0.01)}, folder / "model.safetensors")
    change_json(folder / "vdr_db.json", digests=None)


def one_added(told):
    new = {"id": told["model"]["vocab"]["cat"], "content": "cat", "special": False}
    told["added_tokens"].append({**told["added_tokens"][0], **new})


EDITS = {
    "norm": settings(norm=True),
    "lexical": settings(lexical=True),
    "activation": settings(activation="double_log1p_relu"),
    "query activation": settings(query_activation="none"),
    "vocabulary": settings(vocabulary="from_999"),
    "prompt of documents": side("document", prompt="passage: "),
    "prompt of queries": side("query", prompt="query: "),
    "k of documents": side("document", k=7),
    "k of queries": side("query", k=7),
    "length of documents": side("document", max_length=9),
    "length of queries": side("query", max_length=9),
    "activation of layers": config(hidden_act="relu"),
    "eps": config(layer_norm_eps=1e-3),
    "heads": config(num_attention_heads=2),
    "normalizer": tokenizer(lambda told: told["normalizer"].update(lowercase=False)),
    "pre-tokenizer": tokenizer(lambda told: told.update(pre_tokenizer={"type": "Whitespace"})),
    "post-processor": tokenizer(lambda told: told["post_processor"].update(sep=["[CLS]", 101])),
    "longest word": tokenizer(lambda told: told["model"].update(max_input_chars_per_word=5)),
    "an added token": tokenizer(one_added),
    "side that is cut": lambda folder: change_json(
        folder / "tokenizer_config.json", truncation_side="left"
    ),
    "special tokens as text": lambda folder: change_json(
        folder / "tokenizer_config.json", split_special_tokens=True
    ),
    "weights": weights,
}


@pytest.mark.parametrize("name", EDITS)
def test_every_edit_of_a_model_folder_is_refused(saved, tmp_path, name):
    store = made_with(load(saved))
    folder = tmp_path / "edited"
    shutil.copytree(saved, folder)
    EDITS[name](folder)
    stamp = read_stamp(folder)
    assert store.stamp.difference(stamp), "told by the folder alone"
    # Graphs have some settings within, so that only the torch runtime follows an edit.
    for runtime in ("auto", "torch"):
        encoder = load(folder, runtime)
        assert encoder.stamp() == replace(stamp, model=encoder.model)
        with pytest.raises(StoreMismatch, match="cannot be opened"):
            Collection(store, encoder)


def test_an_option_that_comes_later_is_covered_without_a_word():
    table = np.array([0.5, 0.25], np.float32)
    before = settings_of_parts({"norm": True, "own_weights": None})
    assert before == settings_of_parts({"norm": True}), "what is unset is as if it were not there"
    after = settings_of_parts({"norm": True, "own_weights": {"table": table, "scale": 2.0}})
    assert set(after) - set(before) == {"own_weights.table", "own_weights.scale"}
    other = settings_of_parts({"norm": True, "own_weights": {"table": table + 1, "scale": 2.0}})
    assert after["own_weights.table"] != other["own_weights.table"]


def test_what_may_differ_is_named_and_allowed_on_purpose(saved):
    store = made_with(load(saved))
    for options in ({"k": 9}, {"query_k": 9}, {"max_length": 12}, {"k": 9, "max_length": 12}):
        chosen = load(saved, **options)
        Collection(store, chosen).search("cat")
        Collection(made_with(chosen), load(saved)).search("cat")
        unasked = load(saved, **options)
        unasked.asked = ()
        named = next(iter(options))
        with pytest.raises(StoreMismatch, match=f"differs on purpose where `{named}=` is passed"):
            Collection(store, unasked)
    with pytest.raises(StoreMismatch, match="lexical"):
        Collection(store, load(saved, lexical=True))


@pytest.mark.parametrize(("name", "option"), [("k", "--k"), ("max_length", "--max-length")])
def test_the_command_allows_the_same_on_purpose(saved, tmp_path, capsys, name, option):
    texts, other = tmp_path / "texts.jsonl", tmp_path / "other"
    texts.write_text('{"id": "a", "text": "the cat paints"}\n')
    store = ["--store", str(tmp_path / "store")]
    assert main(["index", str(texts), *store, "--model", str(saved)]) == 0
    shutil.copytree(saved, other)
    side("document", **{name: 9})(other)
    asked = ["search", "cat", *store, "--model", str(other)]
    capsys.readouterr()
    assert main(asked) == 3
    assert f"`{name}=`" in capsys.readouterr().err
    assert main([*asked, option, "9"]) == 0


@pytest.mark.parametrize("runtime", ["onnx", "torch"])
def test_a_folder_tells_the_stamp_of_both_runtimes(saved, runtime):
    assert read_stamp(saved) == load(saved, runtime).stamp()
    assert EncoderStamp.from_dict(json.loads(json.dumps(read_stamp(saved).to_dict()))) == (
        read_stamp(saved)
    )
    shipped = CrossModalEncoder.from_pretrained("vdr-mini", runtime=runtime)
    assert read_stamp("vdr-mini") == shipped.stamp()


def test_text_and_image_part_are_apart(tmp_path):
    both = CrossModalEncoder.from_pretrained(write_cross_modal(tmp_path / "m"), device="cpu")
    texts, images = both.text, both.image.stamp()
    assert both.stamp().image == images
    for maker, opener in ((both, texts), (texts, both), (both, both)):
        store = made_with(maker)
        Collection(store, opener).search("cat")
    other = replace(both.stamp(), image=replace(images, weights="0" * 64))
    with pytest.raises(StoreMismatch, match="images: weights digest"):
        made_with(both).create(both.vocabulary.size, other)


def test_a_side_without_a_model_compares_its_tokenizer(saved, tmp_path):
    stamp = made_with(load(saved)).stamp
    for known in (stamp, None):
        queries = TokenQueries.from_pretrained(saved, stamp=known)
        assert stamp.difference(queries.stamp()) == []
    folder = tmp_path / "edited"
    shutil.copytree(saved, folder)
    EDITS["normalizer"](folder)
    for known in (stamp, None):
        queries = TokenQueries.from_pretrained(folder, stamp=known)
        (reason,) = stamp.difference(queries.stamp())
        assert "tokenizer.normalizer.lowercase" in reason


OLD = {
    "model",
    "tokenizer",
    "vocabulary",
    "head",
    "activation",
    "revision",
    "weights",
    "k",
    "library_version",
}


def test_collections_with_old_stamps_open_with_a_notice(saved, tmp_path):
    encoder = load(saved)
    old = encoder.stamp().as_before()
    assert set(old.to_dict()) == OLD, "as version 0.1 wrote it"
    with QdrantStore("documents", path=tmp_path / "c") as store:
        store.create(encoder.vocabulary.size, old)
        store.upsert(encoder.encode_documents(TEXTS), ["a", "b"])
    with QdrantStore("documents", path=tmp_path / "c") as store:
        with pytest.warns(UserWarning, match=r"made by vdr-db 0\.1.*are not compared"):
            collection = Collection(store, encoder)
        assert collection.search("cat")[0].id == "a"
        with pytest.raises(StoreMismatch, match="weights digest"):
            store.create(encoder.vocabulary.size, replace(encoder.stamp(), weights="0" * 64))


def test_an_old_stamp_of_texts_and_images_is_put_together_again(tmp_path):
    both = CrossModalEncoder.from_pretrained(write_cross_modal(tmp_path / "m"), device="cpu")
    old = both.stamp().as_before()
    assert (set(old.to_dict()), old.head) == (OLD, "vdr+image")
    assert old.difference(both.stamp()) == []
    assert old.difference(both.text.stamp()), "as it was"
    other = replace(both.stamp(), image=replace(both.image.stamp(), weights="0" * 64))
    assert "weights digest" in old.difference(other)[0]


def test_an_ingest_encodes_the_probes_once_for_each_side(saved, monkeypatch):
    encoder, seen = load(saved), []
    for name in ("encode_documents", "encode_queries"):
        encode = getattr(encoder, name)

        def watched(texts, *, name=name, encode=encode, **options):
            seen.append((name, list(texts) == list(PROBES)))
            return encode(texts, **options)

        monkeypatch.setattr(encoder, name, watched)
    store, documents = MemoryStore(), ("encode_documents", False)
    records = [Record("a", TEXTS[0], {}, "")]
    ingest(RecordSource(records), store, encoder=encoder)
    assert seen == [("encode_documents", True), ("encode_queries", True), documents]
    seen.clear()
    ingest(RecordSource(records), store, encoder=encoder)
    assert seen == [("encode_documents", True), documents], "compared with those that are kept"


def test_an_encoder_that_makes_other_vectors_is_found_out(saved, monkeypatch):
    store, encoder = made_with(load(saved)), load(saved)
    assert set(store.stamp.probes) == {"document float32", "query float32"}
    Collection(store, load(saved, "torch")).search("cat")
    tower, made = encoder.tower("document"), type(encoder.tower("document")).scores
    monkeypatch.setattr(tower, "scores", lambda *args: made(tower, *args) * np.float32(1.004))
    collection = Collection(store, encoder)
    for use in (collection.search, lambda text: collection.add_texts([text])):
        with pytest.raises(StoreMismatch, match="makes other vectors than those in"):
            use("cat")
    monkeypatch.setattr(tower, "scores", lambda *args: made(tower, *args) * np.float32(1.00001))
    assert collection.search("cat"), "rounding"
    half = load(saved, "torch", device="cpu", precision="bfloat16")
    Collection(store, half).search("cat")  # nothing is known in that precision


def test_weights_near_the_kth_do_not_count(saved):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = made_with(load(saved, k=5))
    Collection(store, load(saved, k=5)).search("cat")
    Collection(store, load(saved, k=3)).search("cat")
    Collection(store, load(saved, k=50)).search("cat")


def test_the_digest_that_a_folder_tells_is_that_of_its_weights(saved, tmp_path, monkeypatch):
    told = json.loads((saved / "vdr_db.json").read_text())["weights"]
    assert [load(saved, "torch").stamp().weights] == list(told.values())
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    change_json(folder / "vdr_db.json", weights=None)
    assert load(folder).stamp() == replace(load(saved).stamp(), model=str(folder))
    # Told for these places only: with other weights it is worked out, whatever the folder says.
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    change_json(folder / "vdr_db.json", weights=told, digests=weight_digests(folder))
    changed = load(folder).stamp().weights
    assert changed != load(saved).stamp().weights
    assert changed == load(folder, "torch").stamp().weights
    monkeypatch.setattr("vdr_db.encoders.base.digest", lambda weights: pytest.fail("read them all"))
    load(saved).stamp()


def test_a_collection_takes_the_encoder_that_its_stamp_names_and_no_other(saved, tmp_path):
    store, encoder = made_with(load(saved)), load(saved)
    collection = Collection(store)
    collection.use_encoder(encoder)
    assert collection.search(TEXTS[0])[0].payload["text"] == TEXTS[0]
    shutil.copytree(saved, tmp_path / "other")
    weights(tmp_path / "other")
    with pytest.raises(StoreMismatch, match="weights digest"):
        collection.use_encoder(load(tmp_path / "other", "torch"))
    assert collection.encoder is encoder
