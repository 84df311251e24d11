"""Towers as others see them: states, rows and biases without torch, and what plans without it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from model_folders import write_bert, write_distilbert, write_roberta, write_upstream

from vdr_db import ImageEncoder, SparseEncoder
from vdr_db.checkpoints.assets import fetch
from vdr_db.checkpoints.plan import Compatibility
from vdr_db.images.preprocessing import Preprocessing
from vdr_db.kernels import activate
from vdr_db.towers.image import ImageHead, ImageTower
from vdr_db.towers.image_body import VitBody, VitConfig

WITHOUT_TORCH = """
import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "triton"):
            raise ImportError(f"{name} is imported")

sys.meta_path.insert(0, Refused())
"""
PLANNING = [
    "vdr_db.stamp",
    "vdr_db.version",
    *(f"vdr_db.text.{name}" for name in ("tokenization", "vocabulary")),
    *(f"vdr_db.images.{name}" for name in ("batches", "files", "preprocessing", "reading")),
    *(f"vdr_db.towers.{name}" for name in ("families", "interface", "packing")),
    *(f"vdr_db.checkpoints.{name}" for name in ("assets", "folders", "layouts", "locate", "plan")),
    *(f"vdr_db.checkpoints.{name}" for name in ("text", "upstream", "weights")),
    *(f"vdr_db.encoders.{name}" for name in ("base", "batching", "checks", "cross_modal", "image")),
    "vdr_db.encoders.text",
]


def without_torch(code: str) -> str:
    command = [sys.executable, "-c", WITHOUT_TORCH + code]
    # not in the repository, where the folder vdr_db/ hides the library that is installed
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_plans_is_imported_without_torch():
    without_torch("\n".join(f"import {name}" for name in PLANNING))
    code = "from vdr_db.kernels import ACTIVATIONS, BACKENDS, Activation, Backend; print(BACKENDS)"
    assert "triton" in without_torch(code)
    with pytest.raises(AssertionError, match="torch is imported"):
        without_torch("import vdr_db.towers.text")


@pytest.mark.parametrize("kind", ["own", "upstream", "hugging face"])
def test_a_folder_is_planned_and_its_texts_are_batched_without_torch(tmp_path, kind):
    if kind == "own":
        folder = fetch("vdr-mini")
    else:
        folder = (write_upstream if kind == "upstream" else write_bert)(tmp_path / "m")
    code = f"""
from pathlib import Path
import numpy as np
from vdr_db.checkpoints.layouts import read_plan
from vdr_db.checkpoints.locate import find_tokenizer, locate_model
from vdr_db.checkpoints.weights import Checkpoint
from vdr_db.encoders.batching import Frame, packed_batches, plan_texts
folder, _ = locate_model({str(folder)!r}, None)
plan = read_plan(folder)
config = plan.family.body_config(plan.document.config)
words = find_tokenizer((folder,), None)
frame = Frame(words.prefix_ids, words.suffix_ids, config.pad_id, config.first_position, False, 8)
tokens = words.encode(["the cat", "a dog and a book", ""])
options = dict(is_empty=tokens.lengths == 0, tokens=100, rows=10)
batches, empty = plan_texts(tokens.lengths, frame, None, **options)
(batch,) = packed_batches(tokens, batches, frame, None)
print(batch.texts.tolist(), empty.tolist(), len(Checkpoint(folder).names) > 10)
"""
    assert without_torch(code).split("\n")[0] == "[1, 0] [2] True"


def weights_of(tower, item, columns, activation):
    """What each position alone would give, by the interface alone."""
    scores = tower.states(item) @ tower.rows(columns).T
    bias = tower.bias(columns)
    scores = scores if bias is None else scores + bias
    return activate(torch.from_numpy(scores), activation).numpy()


FOLDERS = {
    "bert": (write_bert, {}),
    "distilbert": (write_distilbert, {}),
    "roberta": (write_roberta, {}),
    "vdr": (write_bert, {"head": "vdr", "k": 12, "vocabulary": "ascii_from_999"}),
    "upstream": (write_upstream, {}),
    "padded": (write_upstream, {"compatibility": "max_length"}),
}


@pytest.mark.parametrize("side", ["document", "query"])
@pytest.mark.parametrize("name", FOLDERS)
def test_the_largest_weight_over_positions_is_the_vector(tmp_path, name, side):
    write, options = FOLDERS[name]
    encoder = SparseEncoder.from_pretrained(write(tmp_path / "m"), device="cpu", **options)
    encode = encoder.encode_documents if side == "document" else encoder.encode_queries
    tower = encoder.document_tower if side == "document" else encoder.query_tower
    text = "the dog read"
    ids, weights = encode([text]).row(0)
    item = encoder.item(side, text)
    columns = encoder.vocabulary.id_to_column[ids].astype(np.int64)
    states = tower.states(item)
    assert states.shape == (len(item.input_ids), tower.config.hidden_size)
    assert states.dtype == np.float32
    if name == "padded":
        assert len(item.input_ids) == encoder.frame(side).max_length > item.kept
    found = weights_of(tower, item, columns, encoder.activation).max(axis=0)
    np.testing.assert_allclose(found, weights, rtol=1e-5, atol=1e-6)


def test_the_largest_weight_over_patches_is_the_vector():
    words = SparseEncoder.from_pretrained("vdr-mini", device="cpu")
    config = VitConfig(32, 16, hidden_size=32, layers=1, heads=2, intermediate_size=48)
    tower = ImageTower(VitBody(config), ImageHead(32, words.vocabulary.columns))
    generator = torch.Generator().manual_seed(3)
    tower.load_state_dict(
        {n: 0.1 * torch.randn(p.shape, generator=generator) for n, p in tower.named_parameters()},
        assign=True,
    )
    encoder = ImageEncoder(
        tower=tower.eval(),
        tokenizer=words.tokenizer,
        vocabulary=words.vocabulary,
        preprocessing=Preprocessing(size=32),
        k=20,
        norm=False,
    )
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    ids, weights = encoder.encode_images([pixels]).rows.row(0)
    columns = encoder.vocabulary.id_to_column[ids].astype(np.int64)
    assert (tower.config.patches, tower.head_name, tower.bias(columns)) == (4, "image", None)
    per_patch = encoder.patch_weights(pixels, ids)
    assert per_patch.shape == (4, 20)
    np.testing.assert_allclose(per_patch.max(axis=0), weights, rtol=1e-5, atol=1e-6)


def test_states_are_those_of_encoding_in_the_middle_of_training(tmp_path):
    encoder = SparseEncoder.from_pretrained(write_bert(tmp_path / "m"), device="cpu")
    tower, item = encoder.document_tower, encoder.item("document", "the cat")
    expected = tower.states(item)
    tower.train()
    assert np.array_equal(tower.states(item), expected)
    assert tower.training
    assert torch.is_grad_enabled()


def test_an_item_of_a_batch_is_the_text_alone(tmp_path):
    folder = write_bert(tmp_path / "m")
    mode = Compatibility("max_length")
    for options in ({}, {"compatibility": mode}):
        encoder = SparseEncoder.from_pretrained(folder, device="cpu", **options)
        one = encoder.item("document", "the dog")
        assert one.kept == 4
        length = 4 if not options else encoder.frame("document").max_length
        assert len(one.input_ids) == len(one.position_ids) == length
