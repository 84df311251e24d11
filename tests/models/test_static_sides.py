"""Sides without a model: no torch, text stays text, and cuts as the tokenizer says."""

from __future__ import annotations

import json
import subprocess
import sys

import hub_layouts as hub
import numpy as np
import pytest
from hub_texts import TEXTS

from vdr_db.encoders.text import SparseEncoder
from vdr_db.errors import ConfigError
from vdr_db.explain.attribution import text_attribution

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

WITHOUT_TORCH = """
import importlib.util, json, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else found(name, *rest)
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from vdr_db.encoders.text import SparseEncoder
from vdr_db.errors import MissingExtraError
encoder = SparseEncoder.from_pretrained(sys.argv[1])
rows = encoder.encode_queries(json.loads(sys.argv[2]))
try:
    encoder.encode_documents(["a text"])
    failed = ""
except MissingExtraError as error:
    failed = str(error)
print(json.dumps([rows.to_dicts(), encoder.stamp().to_dict(), failed]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("static") / "m"
    return hub.ROWS["8 opensearch doc-v2"](place)


@pytest.fixture(scope="module")
def encoder(folder):
    return SparseEncoder.from_pretrained(folder, device="cpu")


def test_queries_need_no_torch_and_are_those_of_one_model(folder, encoder):
    run = [sys.executable, "-c", WITHOUT_TORCH, str(folder), json.dumps(TEXTS)]
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    rows, stamp, failed = json.loads(done.stdout)
    expected = encoder.encode_queries(TEXTS).to_dicts()
    assert [{int(id): weight for id, weight in row.items()} for row in rows] == expected
    assert stamp == encoder.stamp().to_dict()
    assert "pip install 'vdr-db[torch]'" in failed


def test_special_tokens_in_a_query_are_text(encoder):
    id = encoder.vocabulary.id
    found = encoder.encode_queries(["[MASK] cat"]).to_dicts()[0]
    assert id("[MASK]") not in found
    assert encoder.encode_queries(["[MASK] cat"]) == encoder.encode_queries(["[ MASK ] cat"])
    assert encoder.token_ids("[MASK] cat")[0] == id("[MASK]"), "as documents are read"
    as_text = SparseEncoder.from_pretrained(
        encoder.model, device="cpu", special_tokens_as_text=True
    )
    assert as_text.token_ids("[MASK] cat")[0] != id("[MASK]")


def test_empty_queries_get_empty_rows_even_behind_a_prompt(tmp_path):
    folder = hub.inference_free(tmp_path / "m", hub.write_bert, prompts={"query": "blue sea "})
    encoder = SparseEncoder.from_pretrained(folder, device="cpu")
    rows = encoder.encode_queries(["", "dog", " "])
    id = encoder.vocabulary.id
    assert rows[0].nnz == rows[2].nnz == 0
    assert set(rows.to_dicts()[1]) <= {id("blue"), id("sea"), id("dog")}
    assert rows[1].nnz > 1


def test_long_queries_are_cut_without_room_for_special_tokens(tmp_path):
    folder = hub.inference_free(tmp_path / "m", hub.write_bert)
    file = folder / "query_0_SparseStaticEmbedding" / "tokenizer_config.json"
    hub.change_json(file, model_max_length=3)
    encoder = SparseEncoder.from_pretrained(folder, device="cpu")
    assert encoder.query_entry.max_length == 3
    with pytest.warns(UserWarning, match="were cut"):
        rows = encoder.encode_queries(["cat dog blue green sun"])
    assert rows == encoder.encode_queries(["cat dog blue"])


def test_the_largest_weights_are_kept(encoder):
    few = SparseEncoder.from_pretrained(encoder.model, device="cpu", query_k=2)
    for text in TEXTS:
        whole = encoder.encode_queries([text])
        assert few.encode_queries([text]) == whole.topk(2)


def test_weights_are_followed_back_to_their_tokens(encoder):
    text = "the blue sea of cats"
    row = encoder.encode_queries([text]).to_dicts()[0]
    found = text_attribution(encoder, text, side="query")
    assert dict(zip(found.ids.tolist(), found.weights.max(0).tolist(), strict=True)) == row
    for d, id in enumerate(found.ids.tolist()):
        assert found.positions[found.best[d]] == encoder.vocabulary.token(id)


def test_sides_with_other_tokens_are_refused(tmp_path):
    folder = hub.inference_free(tmp_path / "m", hub.write_bert)
    hub.write_roberta(tmp_path / "other")
    place = folder / "query_0_SparseStaticEmbedding"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place / name).write_text((tmp_path / "other" / name).read_text())
    with pytest.raises(ConfigError, match="both sides must have the same tokens"):
        SparseEncoder.from_pretrained(folder)


@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_weights_no_sparse_vector_can_hold_are_refused(tmp_path, bad):
    folder = hub.inference_free(tmp_path / "m", hub.write_bert)
    file = folder / "query_0_SparseStaticEmbedding" / "model.safetensors"
    tensors = hub.load_file(file)
    tensors["weight"][5] = bad
    hub.save_file(tensors, file)
    with pytest.raises(ConfigError, match="must be finite and not negative"):
        SparseEncoder.from_pretrained(folder)


def test_a_bag_of_plain_tokens_is_a_static_side(tmp_path):
    """splade-v3-doc without IDF: each token counts 1."""
    document = [("MLMTransformer", hub.masked_lm(hub.write_bert)), ("SpladePooling", hub.pooling())]
    query = [("SparseStaticEmbedding", lambda place: hub.write_static(place, idf=False))]
    folder = hub.write_router(tmp_path / "m", query, document)
    encoder = SparseEncoder.from_pretrained(folder, device="cpu")
    rows = encoder.encode_queries(TEXTS)
    assert np.unique(rows.values).tolist() == [1.0]
