"""Every kind of sparse model of the hub gives the vectors of the library it was published with."""

from __future__ import annotations

import warnings

import hub_layouts as hub
import numpy as np
import pytest
import torch
from hub_texts import TEXTS, dense

from vdr_db.encoders.text import SparseEncoder
from vdr_db.errors import ConfigError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*cannot run on packed texts"),
    pytest.mark.filterwarnings("ignore:.*merge"),
]


def theirs(folder, side: str, texts: list[str] = TEXTS) -> np.ndarray:
    """Vectors by sentence-transformers, each text alone: padding is none of their matter."""
    from sentence_transformers import SparseEncoder as Peer

    peer = Peer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    encode = peer.encode_query if side == "query" else peer.encode_document
    return np.vstack([encode([t], convert_to_sparse_tensor=False).numpy() for t in texts])


@pytest.mark.parametrize("name", hub.ROWS)
def test_a_published_model_gives_its_own_vectors(tmp_path, name):
    folder = hub.ROWS[name](tmp_path / "m")
    encoder = SparseEncoder.from_pretrained(folder, device="cpu")
    for side in ("query", "document"):
        encode = encoder.encode_queries if side == "query" else encoder.encode_documents
        rows = encode(TEXTS)
        gap = np.abs(dense(rows) - theirs(folder, side)).max()
        assert gap <= (0.0 if encoder.side(side).static else 1e-5)
        assert rows.nnz > len(TEXTS)
        # alone, in a batch and in another order: the same bits
        assert all(encode([text]) == rows[i] for i, text in enumerate(TEXTS))
        assert encode(TEXTS[::-1]) == rows[[4, 3, 2, 1, 0]]


def of_transformers(folder, model, texts: list[str] = TEXTS) -> list:
    """What a model of transformers gives for each text alone: its tokens and its output."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            output = model(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        found.append((tokenizer, inputs["input_ids"][0].tolist(), output))
    return found


@pytest.mark.parametrize("factor", [None, 2.0])
def test_gte_of_remote_code_gives_what_the_native_class_gives(tmp_path, factor):
    """Row 13; with fixed NTK scaling the native class gets its frequencies by hand."""
    from transformers import GteConfig, GteForMaskedLM

    folder = hub.splade(hub.write_gte_as_published)(tmp_path / "m")
    hub.change_json(
        folder / "config.json", rope_scaling=factor and {"type": "ntk", "factor": factor}
    )
    encoder = SparseEncoder.from_pretrained(folder, device="cpu")
    rope = {"rope_type": "default", "rope_theta": 20000.0}
    sizes = {**hub.SIZES, "vocab_size": encoder.vocabulary.size, "type_vocab_size": 1}
    model = hub.shaken(GteForMaskedLM(GteConfig(**sizes, rope_parameters=rope)))
    if factor is not None:
        steps = torch.arange(0, 8, 2).float() / 8
        frequencies = 1.0 / (20000.0 * factor) ** steps / factor ** (2 / 8)
        model.gte.rotary_emb.inv_freq = frequencies
    rows = encoder.encode_documents(TEXTS)
    for i, (_, _, output) in enumerate(of_transformers(folder, model)):
        expected = output.logits[0].amax(0).relu().log1p().numpy()
        np.testing.assert_allclose(dense(rows[i])[0], expected, atol=1e-5)


@pytest.mark.parametrize("modules", [True, False])
def test_bge_m3_weighs_the_tokens_of_a_text(tmp_path, modules):
    """Row 14: the largest weight of each own token, none for special ones."""
    from transformers import AutoModel

    folder = hub.write_bge(tmp_path / "m")
    if not modules:
        (folder / "modules.json").unlink()
    encoder = SparseEncoder.from_pretrained(folder, device="cpu")
    head = torch.load(folder / "sparse_linear.pt")
    model = AutoModel.from_pretrained(folder).eval()
    rows = encoder.encode_documents(TEXTS)
    assert encoder.encode_queries(TEXTS) == rows
    for i, (tokenizer, ids, output) in enumerate(of_transformers(folder, model)):
        hidden = output.last_hidden_state[0]
        weights = torch.relu(hidden @ head["weight"][0] + head["bias"]).tolist()
        expected: dict[int, float] = {}
        for id, weight in zip(ids, weights, strict=True):
            if weight > 0 and id not in tokenizer.all_special_ids:
                expected[id] = max(weight, expected.get(id, 0.0))
        found = rows[i].to_dicts()[0]
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, abs=1e-5)
        assert encoder.encode_documents([TEXTS[i]]) == rows[i]


def test_unicoil_keeps_all_but_the_first_token(tmp_path):
    from transformers import BertModel

    folder = hub.write_unicoil(tmp_path / "m")
    encoder = SparseEncoder.from_pretrained(folder, device="cpu")
    tensors = hub.load_file(folder / "model.safetensors")
    model = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    rows = encoder.encode_documents(TEXTS)
    for i, (tokenizer, ids, output) in enumerate(of_transformers(folder, model)):
        hidden = output.last_hidden_state[0]
        weights = torch.relu(hidden @ tensors["tok_proj.weight"][0] + tensors["tok_proj.bias"])
        expected: dict[int, float] = {}
        for id, weight in zip(ids, weights.tolist(), strict=True):
            if weight > 0 and id != tokenizer.cls_token_id:
                expected[id] = max(weight, expected.get(id, 0.0))
        assert rows[i].to_dicts()[0] == pytest.approx(expected, abs=1e-5)


def test_an_idf_beside_a_model_weighs_its_queries(tmp_path):
    """opensearch doc-v1 before it had modules."""
    import json

    folder = hub.write_bert(tmp_path / "m")
    plain = SparseEncoder.from_pretrained(folder, device="cpu")
    idf = {"blue": 3.5, "dog": 2.25, "of": 0.0, "no such word": 1.5}
    (folder / "idf.json").write_text(json.dumps(idf))
    encoder = SparseEncoder.from_pretrained(folder, device="cpu")
    assert encoder.encode_documents(TEXTS) == plain.encode_documents(TEXTS)
    id = encoder.vocabulary.id
    found = encoder.encode_queries(["blue dog of blue", "語 the"]).to_dicts()
    assert found == [{id("blue"): 3.5, id("dog"): 2.25}, {id("[UNK]"): 1.5}]
    assert encoder.encode_queries(["", " "]).nnz == 0


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: (folder / "stopwords.txt").write_text("the"), "holds BM42"),
        (lambda folder: (folder / "minicoil.model.npy").write_text(""), "holds miniCOIL"),
    ],
)
def test_vectors_whose_dimensions_are_no_tokens_are_refused_by_name(tmp_path, write, message):
    """Row 21."""
    folder = hub.write_bert(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    write(folder)
    with pytest.raises(ConfigError, match=message):
        SparseEncoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("Transformer", "Pooling", "SparseAutoEncoder"), "CSR head"),
        (("Transformer", "Pooling", "Normalize"), r"got \['Transformer', 'Pooling', 'Normalize'\]"),
        (("MLMTransformer", "ClusteredSplade"), "ClusteredSplade"),
    ],
)
def test_heads_of_other_kinds_are_refused_by_name(tmp_path, names, message):
    """Row 22."""
    folder = hub.write_modules(hub.write_bert(tmp_path / "m"), *names)
    with pytest.raises(ConfigError, match=message):
        SparseEncoder.from_pretrained(folder)


def test_dense_models_are_named_as_such(tmp_path):
    from transformers import AutoConfig, AutoModel

    for kind, config in (("bert", hub.SIZES), ("modernbert", hub.MODERNBERT)):
        folder = tmp_path / kind
        made = AutoConfig.for_model(kind, vocab_size=1128, **config)
        AutoModel.from_config(made).save_pretrained(folder)
        hub.add_bert_words(folder)
        with pytest.raises(ConfigError, match="body without its head"):
            SparseEncoder.from_pretrained(folder)


def test_remote_code_is_never_run(tmp_path):
    folder = hub.write_model(tmp_path / "m", "modernbert", **hub.MODERNBERT)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    auto = {"AutoConfig": "evil.Config", "AutoModelForMaskedLM": "evil.Model"}
    hub.change_json(folder / "config.json", model_type="evil", auto_map=auto)
    with pytest.raises(ConfigError, match="code that comes with a model is never run"):
        SparseEncoder.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_padded_families_say_so(tmp_path):
    folder = hub.ROWS["18 MPNet"](tmp_path / "m")
    with pytest.warns(UserWarning, match="MPNetForMaskedLM cannot run on packed texts"):
        SparseEncoder.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        SparseEncoder.from_pretrained(hub.ROWS["19 ELECTRA"](tmp_path / "e"))
