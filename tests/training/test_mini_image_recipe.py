"""`scripts/train_mini_image.py`: its stages, and the folder it makes of a text model and images."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from shape_pictures import write_shapes
from stem_weights import published_weights
from training_curves import SCRIPTS, recipe

from vdr_db import CrossModalEncoder, SparseEncoder
from vdr_db.checkpoints.assets import fetch
from vdr_db.connectors import VDRQdrant
from vdr_db.encoders.stamps import read_stamp
from vdr_db.errors import ConfigError
from vdr_db.towers.stored import header_digest
from vdr_db.training.image_settings import ImageConfig
from vdr_db.training.images.data import read_pairs
from vdr_db.training.images.task import ImageTask
from vdr_db.training.images.vectors import TextSide, kept_columns
from vdr_db.training.trainer import Trainer

SMALL = {
    "image.size": "64",
    "image.hidden_size": "64",
    "image.intermediate_size": "64",
    "image.views": "0",
    "run.steps": "3",
    "run.batch_size": "8",
    "run.threads": "1",
    "optimiser.warmup_steps": "1",
}


@pytest.fixture(scope="module")
def script():
    return recipe("train_mini_image")


@pytest.fixture(scope="module")
def made(script, tmp_path_factory):
    """A text model with images beside it, after a few steps of both stages, and their pairs."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "pairs").mkdir()
    for name, each in (("train", 2), ("validation", 1)):
        write_shapes(folder / "pairs", name, each=each)
    torch.save(published_weights(), folder / "stem.pth")
    shutil.copy(SCRIPTS / script.SETTINGS, folder / script.SETTINGS)
    shutil.copytree(fetch("vdr-mini"), folder / "model", ignore=shutil.ignore_patterns("image"))
    own = {**SMALL, "model.start": str(folder / "model"), "image.cache": str(folder / "states")}
    stages = {"warm": script.WARM_UP, "run": {"image.start": str(folder / "warm" / "model")}}
    for name, changes in stages.items():
        Trainer(ImageTask(script.configured(folder, changes | own)), folder / name).run()
    watched = read_pairs(folder / "pairs" / "validation.jsonl")
    script.add_images(folder / "run" / "model", folder / "model", watched)
    return folder, watched


def test_every_stage_loads_and_differs_where_it_says(script, tmp_path):
    shutil.copy(SCRIPTS / script.SETTINGS, tmp_path / script.SETTINGS)
    main = script.configured(tmp_path, {})
    warm = script.configured(tmp_path, script.WARM_UP)
    dense = script.configured(tmp_path, script.DENSE)
    assert main.loss.objective == "vdr"
    assert warm.loss.objective == dense.loss.objective == "dpr"
    stages = (warm, main, dense)
    assert [stage.image.as_one_patch for stage in stages] == [True, True, True]
    assert [stage.image.train_text for stage in stages] == [False, False, False]
    # The baseline has the same body, data and batches.
    assert dense.data == main.data
    assert dense.run.batch_size == main.run.batch_size
    assert dense.model == main.model
    assert dense.optimiser == main.optimiser
    for name in ("body", "size", "hidden_size", "layers", "dropout", "patch_dropout", "views"):
        assert getattr(dense.image, name) == getattr(main.image, name)


def test_one_folder_opens_for_texts_and_for_both(made):
    folder, watched = made
    alone = SparseEncoder.from_pretrained("vdr-mini", device="cpu")
    texts = SparseEncoder.from_pretrained(folder / "model", device="cpu")
    both = CrossModalEncoder.from_pretrained(folder / "model", device="cpu")
    given = ["a blue sun", "a heavy book"]
    for name in ("encode_documents", "encode_queries", "bag_of_tokens"):
        assert getattr(both, name)(given) == getattr(texts, name)(given)
        assert getattr(both, name)(given) == getattr(alone, name)(given)
    stamp = both.stamp()
    assert alone.stamp().difference(stamp) == stamp.difference(alone.stamp()) == []
    assert stamp.image is not None
    assert read_stamp(folder / "model") == stamp

    by_torch = CrossModalEncoder.from_pretrained(folder / "model", device="cpu", runtime="torch")
    assert by_torch.stamp() == stamp
    images = [pair.image for pair in watched[:3]]
    rows, other = both.encode_images(images).rows, by_torch.encode_images(images).rows
    np.testing.assert_allclose(rows.to_scipy().toarray(), other.to_scipy().toarray(), rtol=1e-3)
    ids = rows[0].indices[:5]
    weights = [one.image.patch_weights(images[0], ids) for one in (both, by_torch)]
    np.testing.assert_allclose(*weights, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(weights[0].max(0), rows[0].values[:5], rtol=1e-3)


def test_only_words_that_texts_keep_get_rows(made):
    folder, _ = made
    stored = load_file(folder / "model" / "image" / "model.safetensors")
    both = CrossModalEncoder.from_pretrained(folder / "model", device="cpu", runtime="torch")
    pairs = read_pairs(folder / "pairs" / "train.jsonl")
    columns = kept_columns(TextSide(both, ImageConfig()), pairs).numpy()
    held = both.vocabulary.column_to_id[columns]
    assert "head.projection" not in stored
    np.testing.assert_array_equal(stored["head.own_ids"], held)
    assert both.is_tied
    words = both.text.query_tower.body.embeddings.word.weight.detach().numpy()
    kept = both.image.tower.matrix().detach().numpy()
    assert (kept[columns] != words[held]).any(axis=1).all()
    others = np.setdiff1d(np.arange(both.vocabulary.columns), columns)
    np.testing.assert_array_equal(kept[others], words[both.vocabulary.column_to_id[others]])


def test_rows_are_8_bit_integers_with_a_scale_each(made):
    folder, _ = made
    stored = load_file(folder / "model" / "image" / "model.safetensors")
    trained = load_file(folder / "run" / "model" / "image" / "model.safetensors")
    rows, scales = stored["head.own_rows"], stored["head.own_scales"]
    assert rows.dtype == np.int8
    assert (np.abs(rows.astype(np.int32)).max(axis=1) == 127).all()
    gaps = np.abs(rows * scales[:, None] - trained["head.own_rows"].astype(np.float32))
    assert (gaps.max(axis=1) <= 0.5001 * scales).all()
    both = [
        CrossModalEncoder.from_pretrained(folder / "model", device="cpu", runtime=runtime)
        for runtime in ("torch", "onnx")
    ]
    columns = both[0].vocabulary.columns_of(stored["head.own_ids"])
    for encoder in both:
        found = encoder.image._main_tower.rows(columns)
        np.testing.assert_array_equal(found, rows.astype(np.float32) * scales[:, None])


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_integers_without_scales_are_refused(made, tmp_path, runtime):
    folder = shutil.copytree(made[0] / "model", tmp_path / "model")
    file = folder / "image" / "model.safetensors"
    weights = load_file(file)
    del weights["head.own_scales"]
    save_file(weights, file)
    settings = folder / "image" / "vdr_db_image.json"
    told = json.loads(settings.read_text())
    told["digests"] = None
    told["graphs"]["weights"] = [header_digest(file)]
    settings.write_text(json.dumps(told))
    with pytest.raises(ConfigError, match=r"must have `head\.own_scales`"):
        CrossModalEncoder.from_pretrained(folder, device="cpu", runtime=runtime)


def test_images_score_for_their_names_as_documents_do(made):
    folder, watched = made
    both = CrossModalEncoder.from_pretrained(folder / "model", device="cpu")
    names = [pair.texts[0] for pair in watched]
    queries = both.encode_queries(names)
    images = both.encode_images([pair.image for pair in watched]).rows
    own = [np.diagonal(queries.dot(rows)) for rows in (images, both.encode_documents(names))]
    assert own[0].mean() == pytest.approx(own[1].mean(), rel=0.01)
    saved = json.loads((folder / "model/image/vdr_db_image.json").read_text())
    assert both.image.scale == saved["scale"]


def test_texts_and_images_go_into_one_collection(made):
    folder, watched = made
    with VDRQdrant("x", encoder=folder / "model", path=":memory:") as both:
        both.add_images([pair.image for pair in watched])
        both.add_texts(["A sonata is music for one or two players."], ids=["sonata"])
        assert both.search("sonata", limit=1)[0].id == "sonata"
        assert len(both.search("blue sun", limit=3, filter={"modality": "image"})) == 3


def test_the_card_names_what_a_stage_changes(script):
    assert script.listed({"run.steps": "5", "image.dense": "heads"}) == (
        "`run.steps: 5`, `image.dense: heads`"
    )
