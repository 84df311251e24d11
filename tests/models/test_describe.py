"""`vdr-db info --model` says what a folder is, what it took, and what it refused."""

from __future__ import annotations

import json

import hub_layouts as hub
import pytest

from vdr_db.checkpoints.describe import describe_model
from vdr_db.cli.main import main

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def test_a_folder_is_described_without_its_weights(tmp_path):
    folder = hub.ROWS["8 opensearch doc-v3-distill"](tmp_path / "m")
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    said = describe_model(folder)
    assert said["layout"] == "sentence-transformers"
    assert said["documents"] == "distilbert by this library, k=9, double_log1p_relu"
    assert said["queries"].startswith("static weights of query_0_SparseStaticEmbedding, k=9")
    taken = said["keys taken"]
    assert "max_active_dims" in taken["config_sentence_transformers.json"]
    assert "n_layers" in taken["document_0_MLMTransformer/config.json"]
    assert "mask_token" in taken["query_0_SparseStaticEmbedding/tokenizer_config.json"]


@pytest.mark.parametrize("name", ["12 splade-v3-lexical", "16 splade-code", "17 Mistral-SPLADE"])
def test_sides_are_named(tmp_path, name):
    said = describe_model(hub.ROWS[name](tmp_path / "m"))
    expected = {
        "12 splade-v3-lexical": "bert by this library, own tokens only",
        "16 splade-code": "qwen3 by transformers, both directions",
        "17 Mistral-SPLADE": "an adapter's base model by transformers, as an adapter",
    }
    assert said["queries"].startswith(expected[name])


def test_info_shows_what_was_refused(tmp_path, capsys):
    folder = hub.write_bert(tmp_path / "m")
    assert main(["info", "--model", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["folder"]["layout"] == "Hugging Face"
    assert facts["model"]["head"] == "mlm"
    hub.change_json(folder / "config.json", is_decoder=True)
    assert main(["info", "--model", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert "`is_decoder`" in facts["folder"]["refused"]
    assert "model" not in facts
