"""The stages of `scripts/train_tiny_image.py` are settings that the trainer takes."""

import shutil

import pytest
from training_curves import SCRIPTS, recipe

from vdr_db import CrossModalEncoder, SparseEncoder


@pytest.fixture(scope="module")
def script():
    return recipe("train_tiny_image")


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


def test_a_text_side_that_is_shipped_is_not_written_twice(script, tmp_path):
    both = CrossModalEncoder.from_pretrained("vdr-tiny-image", device="cpu", runtime="torch")
    both.save_pretrained(tmp_path / "model")
    whole = SparseEncoder.from_pretrained(tmp_path / "model", device="cpu")
    script.share_text(tmp_path / "model", "vdr-tiny")
    assert {file.name for file in (tmp_path / "model/text").iterdir()} == {
        "config.json",
        "vdr_db.json",
    }
    shared = SparseEncoder.from_pretrained(tmp_path / "model", device="cpu", runtime="torch")
    texts = ["two eighth notes", "a house with a garden"]
    assert shared.encode_documents(texts) == whole.encode_documents(texts)
    assert shared.encode_queries(texts) == whole.encode_queries(texts)

    both.text.document_tower.body.embeddings.word.weight.data += 1
    both.save_pretrained(tmp_path / "moved")
    with pytest.raises(SystemExit, match="must be that of vdr-tiny"):
        script.share_text(tmp_path / "moved", "vdr-tiny")


def test_the_card_names_what_a_stage_changes(script):
    assert script.listed({"run.steps": "5", "image.dense": "heads"}) == (
        "`run.steps: 5`, `image.dense: heads`"
    )
