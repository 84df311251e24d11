"""The runtime without torch against torch: every body and head, both shipped sides, no torch."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from graph_samples import CLOSE, FOLDERS, TEXTS, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from image_folders import VIT, pixels, write_cross_modal
from model_folders import change_json, write_bert
from stem_weights import published_weights

from vdr_db import CrossModalEncoder, ImageEncoder, SparseEncoder
from vdr_db.checkpoints.assets import fetch
from vdr_db.encoders.export import export
from vdr_db.errors import ConfigError
from vdr_db.explain.attribution import text_attribution
from vdr_db.kernels import ACTIVATIONS, plain, reference
from vdr_db.towers.image_body import VIT_ACTIVATIONS
from vdr_db.towers.image_config import ACTIVATIONS as IMAGE_ACTIVATIONS
from vdr_db.towers.image_config import HybridConfig
from vdr_db.towers.image_hybrid import HybridBody
from vdr_db.towers.image_stem import fold_norms


def both(folder, kind=SparseEncoder, **options):
    return (
        kind.from_pretrained(folder, runtime="onnx", **options),
        kind.from_pretrained(folder, runtime="torch", **options),
    )


HALVES = ("float16", "bfloat16")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float32") for name in FOLDERS),
        *((name, dtype) for name in ("bert", "vdr, ASCII tokens") for dtype in HALVES),
    ],
)
def test_every_body_and_head_agrees_with_torch(tmp_path, name, dtype):
    write, options = FOLDERS[name]
    write(tmp_path / "source", **options)
    export(tmp_path / "source", tmp_path / "model", dtype=dtype)
    onnx, by_torch = both(tmp_path / "model")
    assert onnx.stamp() == by_torch.stamp()
    with pytest.warns(UserWarning, match="were cut"):
        documents = onnx.encode_documents(TEXTS)
    with pytest.warns(UserWarning, match="were cut"):
        assert_close(documents, by_torch.encode_documents(TEXTS))
    assert_close(onnx.encode_queries(TEXTS), by_torch.encode_queries(TEXTS))
    for encoder in (onnx, by_torch):
        encoder.lexical, encoder.norm = True, True
    assert_close(onnx.encode_queries(TEXTS), by_torch.encode_queries(TEXTS))
    for column in (0, 3):
        columns = np.array([column])
        assert np.array_equal(onnx.tower("query").rows(columns), by_torch.query_tower.rows(columns))


def test_a_vector_depends_on_its_text_alone(tmp_path):
    export(write_bert(tmp_path / "source"), tmp_path / "model")
    encoder = SparseEncoder.from_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match="were cut"):
        together = encoder.encode_documents(TEXTS)
    for i, text in enumerate(TEXTS):
        assert encoder.encode_documents([text]) == together[i]
    order = [4, 2, 0, 5, 1, 3]
    assert encoder.encode_documents([TEXTS[i] for i in order]) == together[np.array(order)]


def test_the_shipped_model_agrees_with_torch(sample_texts):
    texts = sample_texts
    onnx, by_torch = both(fetch("vdr-mini"))
    assert onnx.stamp() == by_torch.stamp()
    assert_close(onnx.encode_documents(texts), by_torch.encode_documents(texts))
    assert_close(onnx.encode_queries(texts[:20]), by_torch.encode_queries(texts[:20]))
    mine, other = (text_attribution(encoder, texts[0]) for encoder in (onnx, by_torch))
    np.testing.assert_allclose(mine.weights, other.weights, atol=CLOSE)


@pytest.fixture(scope="module")
def sample_texts(tmp_path_factory):
    """Real descriptions, from the library's own sample."""
    from vdr_db.cli.demo import unpack_sample
    from vdr_db.evaluation.quality import TestCollection

    sample = TestCollection.load(unpack_sample(tmp_path_factory.mktemp("sample")))
    return [document.text for document in sample.documents[:60]]


# Images


def images(side, count=3):
    return [pixels(side, side + 5, seed=i) for i in range(count)]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_images_of_a_vision_transformer_agree_with_torch(tmp_path, dtype):
    write_cross_modal(tmp_path / "source")
    CrossModalEncoder.from_pretrained(tmp_path / "source").save_pretrained(tmp_path / "own")
    export(tmp_path / "own", tmp_path / "model", dtype=dtype)
    onnx, by_torch = both(tmp_path / "model", CrossModalEncoder)
    assert onnx.stamp() == by_torch.stamp()
    given = images(VIT["resolution"])
    mine, other = onnx.encode_images(given).rows, by_torch.encode_images(given).rows
    assert_close(mine, other)
    assert_close(onnx.encode_queries(TEXTS[:3]), by_torch.encode_queries(TEXTS[:3]))
    ids = mine[0].indices[:5]
    weights = [one.image.patch_weights(given[0], ids) for one in (onnx, by_torch)]
    np.testing.assert_allclose(*weights, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(weights[0].max(0), mine[0].values[:5], rtol=1e-4)


@pytest.mark.parametrize("is_tied", [False, True])
def test_images_of_a_hybrid_agree_with_torch(tmp_path, is_tied):
    """The projection lies in the image's own file, or is the matrix of the text side."""
    write_cross_modal(tmp_path / "source")
    encoder = CrossModalEncoder.from_pretrained(tmp_path / "source")
    columns = encoder.vocabulary.columns
    generator = torch.Generator().manual_seed(0)
    body = HybridBody(
        HybridConfig(
            image_size=64,
            patch_size=32,
            hidden_size=16,
            layers=2,
            heads=2,
            intermediate_size=24,
            output_size=32,
            contrast=0.7,
        )
    )
    shapes = {name: p.shape for name, p in body.named_parameters()}
    state = {
        name: torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 0.1)
        + ("norm.weight" in name)
        for name, shape in shapes.items()
    }
    stem = {f"stem.{name}": value for name, value in fold_norms(published_weights()).items()}
    body.load_state_dict({**state, **stem}, strict=True, assign=True)
    from vdr_db.towers.image import ImageHead, ImageTower

    head = ImageHead(32, columns)
    matrix = encoder.text.document_tower.matrix().detach().clone()
    projection = matrix if is_tied else torch.randn(matrix.shape, generator=generator)
    head.load_state_dict(
        {"norm.weight": torch.ones(32), "norm.bias": torch.zeros(32), "projection": projection},
        assign=True,
    )
    preprocessing = encoder.image.preprocessing.__class__(size=64)
    image = ImageEncoder(
        tower=ImageTower(body, head).eval(),
        tokenizer=encoder.text.tokenizer,
        vocabulary=encoder.vocabulary,
        preprocessing=preprocessing,
        k=20,
    )
    CrossModalEncoder(encoder.text, image).save_pretrained(tmp_path / "own")
    export(tmp_path / "own", tmp_path / "model")
    onnx, by_torch = both(tmp_path / "model", CrossModalEncoder)
    given = images(64)
    assert_close(onnx.encode_images(given).rows, by_torch.encode_images(given).rows)
    assert onnx.is_tied == by_torch.is_tied == is_tied
    assert onnx.stamp() == by_torch.stamp()


def test_names_of_activations_are_those_of_the_bodies():
    assert set(IMAGE_ACTIVATIONS) == set(VIT_ACTIVATIONS)


# Which runtime


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    export(write_bert(folder / "source"), folder / "model")
    return folder


def runtime_of(encoder):
    return "torch" if isinstance(encoder.dtype, torch.dtype) else "onnx"


def test_the_runtime_is_chosen_by_folder_and_options(exported):
    def chosen(folder=exported / "model", **options):
        return runtime_of(SparseEncoder.from_pretrained(folder, **options))

    has_gpu = torch.cuda.is_available()
    assert chosen() == ("torch" if has_gpu else "onnx")
    assert chosen(device="cpu") == "onnx"
    assert chosen(device="cpu", precision="float32", k=3, max_length=9) == "onnx"
    assert chosen(device="cpu", runtime="torch") == "torch"
    assert chosen(folder=exported / "source", device="cpu") == "torch"
    assert chosen(device="cpu", backend="reference") == "torch"
    assert chosen(device="cpu", backend="cpu-int8") == chosen(device="cpu", backend="cpu") == "onnx"
    assert chosen(device="cpu", compatibility="max_length") == "torch"
    for options, said in (
        ({"dtype": "float16"}, "`dtype` must be None or 'float32', got 'float16'"),
        ({"precision": "bfloat16"}, "'float32' or 'int8' on ONNX Runtime, got 'bfloat16'"),
        ({"device": "meta"}, "`device` must be None or 'cpu', got 'meta'"),
        ({"backend": "reference"}, "`backend` must be left alone"),
        ({"compatibility": "longest"}, "`compatibility` must be left alone"),
        ({"vocabulary": "from_999"}, "`vocabulary` must be 'all'"),
    ):
        with pytest.raises(ConfigError, match="cannot run on ONNX Runtime") as raised:
            chosen(runtime="onnx", **options)
        assert said in str(raised.value)
        assert "vdr-db export" in str(raised.value)
    with pytest.raises(ConfigError, match="holds no ONNX graphs"):
        chosen(folder=exported / "source", runtime="onnx")
    with pytest.raises(ConfigError, match="`runtime` must be one of"):
        chosen(runtime="tensorrt")


def test_graphs_of_other_weights_are_not_run(exported, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(exported / "model", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {f"{name}": value.half() for name, value in weights.items()}, folder / "model.safetensors"
    )
    change_json(folder / "vdr_db.json", digests=None)
    assert runtime_of(SparseEncoder.from_pretrained(folder, device="cpu")) == "torch"
    with pytest.raises(ConfigError, match="are not those that its graphs were written for"):
        SparseEncoder.from_pretrained(folder, runtime="onnx")
    folder = shutil.copytree(exported / "model", tmp_path / "broken")
    (graph,) = folder.glob("*.onnx")
    graph.write_bytes(b"no graph")
    with pytest.raises(ConfigError, match=r"bert\.onnx is damaged or was changed"):
        SparseEncoder.from_pretrained(folder, runtime="onnx")
    change_json(folder / "vdr_db.json", digests=None)
    encoder = SparseEncoder.from_pretrained(folder, runtime="onnx")
    with pytest.raises(ConfigError, match="cannot be used by ONNX Runtime"):
        encoder.encode_documents(["cat"])
    change_json(folder / "vdr_db.json", graphs=None)
    with pytest.raises(ConfigError, match="holds no ONNX graphs"):
        SparseEncoder.from_pretrained(folder, runtime="onnx")


def test_what_needs_torch_says_so(exported, tmp_path):
    encoder = SparseEncoder.from_pretrained(exported / "model", runtime="onnx")
    for ask in (
        lambda: encoder.document_tower,
        lambda: encoder.query_tower,
        encoder.named_tensors,
        lambda: encoder.save_pretrained(tmp_path / "copy"),
    ):
        with pytest.raises(ConfigError, match="load it with runtime='torch'"):
            ask()
    assert not (tmp_path / "copy").exists()
    assert (str(encoder.device), encoder.device.type) == ("cpu", "cpu")


def test_it_is_sent_to_other_processes(exported):
    encoder = SparseEncoder.from_pretrained(exported / "model", runtime="onnx", threads=1)
    before = encoder.encode_documents(TEXTS[:2])
    assert pickle.loads(pickle.dumps(encoder)).encode_documents(TEXTS[:2]) == before


def test_not_finite_weights_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_bert(tmp_path / "source")
    weights = load_file(folder / "model.safetensors")
    weights["cls.predictions.bias"][3] = float("nan")
    save_file(weights, folder / "model.safetensors")
    export(folder, tmp_path / "model")
    encoder = SparseEncoder.from_pretrained(tmp_path / "model", runtime="onnx")
    with pytest.raises(ConfigError, match="the vector of text 0 must be finite"):
        encoder.encode_documents(["cat"])


# NumPy against the specification


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, -200.0, np.nan, np.inf, -np.inf, 1e-30]),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from(ACTIVATIONS),
    st.data(),
)
def test_selection_is_that_of_the_specification(values, activation, data):
    V = len(values)
    k = data.draw(st.one_of(st.none(), st.integers(1, V)))
    own = data.draw(st.one_of(st.none(), st.lists(st.integers(0, V - 1), max_size=4)))
    logits = np.array(values, np.float32)
    lexical = None if own is None else (torch.tensor([0, len(own)]), torch.tensor(own).int())
    wanted = reference.select_topk(
        torch.from_numpy(logits)[None], k, activation=activation, lexical=lexical
    )
    columns, weights = plain.select_topk(
        logits, k, activation=activation, lexical=None if own is None else np.array(own, np.int32)
    )
    assert columns.tolist() == wanted.columns.tolist()
    np.testing.assert_allclose(weights, wanted.weights.numpy(), rtol=1e-6)


# Without torch

QUICKSTART = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from vdr_db.connectors import VDRQdrant
c = VDRQdrant("articles")
c.add_texts(["a cat sleeps", "rockets fly"])
print(c.search("kitten")[0].payload["text"])
print(len(c.explain("kitten", c.search("kitten")[0].id)))
"""


def test_the_first_lines_work_without_torch(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", QUICKSTART],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("a cat sleeps\n")
    assert (tmp_path / "articles.qdrant").is_dir()


def test_a_folder_without_graphs_and_no_torch_names_both_ways(tmp_path):
    folder = write_bert(tmp_path / "source")
    code = (
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
        f"from vdr_db import SparseEncoder; SparseEncoder.from_pretrained({str(folder)!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    said = done.stderr.splitlines()[-1]
    assert "MissingExtraError" in said
    assert "pip install 'vdr-db[torch]'" in said
    assert "vdr-db export" in said


def test_the_settings_name_the_weights_of_the_graphs(exported):
    saved = json.loads((exported / "model" / "vdr_db.json").read_text())
    assert set(saved["graphs"]) == {"vocabulary", "weights"}
