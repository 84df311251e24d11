"""Folders we save open in sentence-transformers with the same vectors."""

from __future__ import annotations

import json

import hub_layouts as hub
import numpy as np
import pytest
import torch
import yaml
from hub_texts import TEXTS, dense
from model_folders import write_bert, write_roberta, write_sentence_transformers, write_upstream

from vdr_db.checkpoints.export import Card
from vdr_db.encoders.text import SparseEncoder

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*cannot run on packed texts"),
    pytest.mark.filterwarnings("ignore:.*were cut"),
]

# name -> (folder, options of `from_pretrained`, whether sentence-transformers must trust a module)
SAVED = {
    "bert": (write_bert, {}, False),
    "k": (write_bert, {"k": 7}, False),
    "roberta, twice log1p": (write_roberta, {"activation": "double_log1p_relu"}, False),
    "prompts and lengths": (
        lambda folder: write_sentence_transformers(
            folder, settings={"prompts": {"query": "the ", "document": "of "}}
        ),
        {"max_length": 12, "query_max_length": 6},
        False,
    ),
    "two k": (write_bert, {"k": 9, "query_k": 4}, True),
    "two towers": (hub.efficient_splade, {}, False),
    "static queries": (hub.ROWS["8 opensearch doc-v3-distill"], {}, False),
    "gate": (hub.splade_lexical, {}, False),
    "modernbert": (hub.ROWS["15 ModernBERT"], {}, False),
    "decoder": (hub.write_splade_code, {}, False),
    "vdr": (lambda folder: write_upstream(folder, shared=True, prefixes=("encoder_q",)), {}, True),
    "vdr, two towers": (write_upstream, {}, True),
    "vdr, cross-modal": (lambda f: write_upstream(f, kind="vdr_crossmodal_text"), {}, True),
    "lexical": (write_bert, {"lexical": True, "k": 3}, True),
    "token weights": (hub.write_bge, {}, True),
    "unicoil": (hub.write_unicoil, {}, True),
}


@pytest.mark.parametrize("name", SAVED)
def test_sentence_transformers_gives_the_same_vectors(tmp_path, name):
    from sentence_transformers import SparseEncoder as Peer

    write, options, needs_trust = SAVED[name]
    encoder = SparseEncoder.from_pretrained(write(tmp_path / "m"), device="cpu", **options)
    encoder.save_pretrained(tmp_path / "saved")
    back = SparseEncoder.from_pretrained(tmp_path / "saved", device="cpu")
    assert encoder.stamp().difference(back.stamp()) == []
    if needs_trust:
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            Peer(str(tmp_path / "saved"), device="cpu")
    dtype = {"dtype": torch.float32}
    peer = Peer(
        str(tmp_path / "saved"), device="cpu", trust_remote_code=needs_trust, model_kwargs=dtype
    )
    for side, ours, same, theirs in (
        ("query", encoder.encode_queries, back.encode_queries, peer.encode_query),
        ("document", encoder.encode_documents, back.encode_documents, peer.encode_document),
    ):
        rows = ours(TEXTS)
        assert same(TEXTS) == rows, side
        vectors = np.vstack([theirs([t], convert_to_sparse_tensor=False).numpy() for t in TEXTS])
        np.testing.assert_allclose(dense(rows), vectors, atol=2e-5, err_msg=side)


def test_cards_have_front_matter_that_the_hub_reads(tmp_path):
    encoder = SparseEncoder.from_pretrained(write_bert(tmp_path / "m"), device="cpu")
    card = Card(license="apache-2.0", base_model="a/b", datasets=["c/d"], metrics=["ndcg"])
    encoder.save_pretrained(tmp_path / "saved", card=card)
    text = (tmp_path / "saved" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    said = yaml.safe_load(front)
    assert said["library_name"] == "sentence-transformers"
    assert said["pipeline_tag"] == "feature-extraction"
    assert said["license"] == "apache-2.0"
    assert said["base_model"] == "a/b"
    assert said["datasets"] == ["c/d"]
    assert {"sparse-encoder", "splade", "vdr-db"} <= set(said["tags"])
    assert "trust_remote_code" not in body


def test_an_encoder_is_uploaded_as_it_is_saved(tmp_path, monkeypatch):
    """The hub itself is out of reach; what it is handed is looked at."""
    import huggingface_hub

    seen = {}

    def upload(*, repo_id, folder_path, **rest):
        seen["repo"] = repo_id
        seen["vectors"] = SparseEncoder.from_pretrained(folder_path).encode_documents(TEXTS)
        return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda repo_id, **_: None)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    encoder = SparseEncoder.from_pretrained(write_bert(tmp_path / "m"))
    assert encoder.push_to_hub("me/mine") == "https://hub/commit"
    assert seen == {"repo": "me/mine", "vectors": encoder.encode_documents(TEXTS)}


def test_a_folder_of_two_heads_on_one_body_loads(tmp_path):
    """Format 3 keeps what towers share once."""
    encoder = SparseEncoder.from_pretrained("vdr-mini", device="cpu", runtime="torch")
    encoder.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "vdr_db.json").read_text())["format"] == 3
    back = SparseEncoder.from_pretrained(tmp_path / "saved", device="cpu")
    assert encoder.stamp().difference(back.stamp()) == []
    assert back.encode_queries(TEXTS) == encoder.encode_queries(TEXTS)
