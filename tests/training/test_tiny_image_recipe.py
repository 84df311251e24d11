"""The stages of `scripts/train_tiny_image.py` are settings that the trainer takes."""

import shutil

import pytest
from training_curves import SCRIPTS, recipe


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
    assert [stage.image.train_text for stage in stages] == [False, True, True]
    # The baseline has the same body, data and batches.
    assert dense.data == main.data
    assert dense.run.batch_size == main.run.batch_size
    assert dense.model == main.model
    assert dense.optimiser == main.optimiser
    for name in ("body", "size", "hidden_size", "layers", "dropout", "patch_dropout", "views"):
        assert getattr(dense.image, name) == getattr(main.image, name)


def test_the_card_names_what_a_stage_changes(script):
    assert script.listed({"run.steps": "5", "image.dense": "heads"}) == (
        "`run.steps: 5`, `image.dense: heads`"
    )
