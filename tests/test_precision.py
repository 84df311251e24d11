"""Bodies in lower precision: what is rounded, what is not, and what is refused."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_folders import write_cross_modal
from model_folders import write_bert
from onnx import helper, numpy_helper
from processor import needs_bfloat16

from vdr_db import CrossModalEncoder, SparseEncoder, SparseRows
from vdr_db.checkpoints.assets import fetch
from vdr_db.cli.main import main
from vdr_db.connectors import Collection, MemoryStore
from vdr_db.encoders.export import export
from vdr_db.errors import ConfigError
from vdr_db.kernels.cpu.messages import field, fields
from vdr_db.kernels.cpu.sessions import opened
from vdr_db.towers.onnx_int8 import weight_files, with_integers

TEXTS = [
    "who came up with relativity",
    "",
    "a quiet harbour at dawn, fishing boats and gulls",
    "compilers turn source text into machine code " * 12,
    "relativity",
]


def load(model="vdr-mini", **options):
    return SparseEncoder.from_pretrained(fetch(model), device="cpu", **options)


@pytest.fixture(scope="module")
def rounded():
    return load(precision="int8", threads=1)


# Messages

VALUES = st.one_of(st.integers(0, (1 << 63) - 1), st.binary(max_size=300))


@given(st.lists(st.tuples(st.integers(1, 1000), VALUES), max_size=8))
def test_fields_come_back_from_bytes(written):
    message = b"".join(field(number, value) for number, value in written)
    assert list(fields(message)) == written


@pytest.mark.parametrize("message", [field(7, b"abc")[:-1], b"\x08", b"\x08\xff", b"\x0d1234"])
def test_cut_off_and_other_messages_are_refused(message):
    with pytest.raises(ValueError, match="got"):
        list(fields(message))


# Linear layers


def linear_graph(weight, bias):
    """`Gemm` as the graphs of bodies have it, with its weights in the graph."""
    parts = {"w": weight} | ({} if bias is None else {"b": bias})
    rows, columns = weight.shape
    values = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["P", size])
        for name, size in (("x", columns), ("y", rows))
    ]
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", *parts], ["y"], transB=1)],
        "linear",
        values[:1],
        values[1:],
        initializer=[numpy_helper.from_array(array, name) for name, array in parts.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def by_definition(x, weight, bias):
    """The formula of `onnx_int8` in float64, with fp32 scales as they are stored."""
    offset = x.min(1, keepdims=True)
    scale = np.maximum((x.max(1, keepdims=True) - offset) * np.float32(1 / 255), np.float32(1e-30))
    codes = np.clip(np.rint((x - offset) / scale), 0, 255)
    step = np.maximum(np.abs(weight).max(1, keepdims=True) * np.float32(1 / 127), np.float32(1e-30))
    rounded = np.rint(weight / step) * step.astype(np.float64)
    return (codes * scale.astype(np.float64) + offset) @ rounded.T + (0 if bias is None else bias)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 1 << 30), st.sampled_from([1, 3, 17]), st.sampled_from([8, 96]), st.booleans()
)
def test_linear_layers_round_rows_and_weights_as_they_say(seed, rows, columns, has_bias):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((24, columns)).astype(np.float32)
    weight[3] = 0
    weight[4, 0] = 50
    bias = rng.standard_normal(24).astype(np.float32) if has_bias else None
    x = rng.standard_normal((rows, columns)).astype(np.float32)
    x[0, 0] = 30
    x[-1] = rng.choice([0.0, 2.5, -1e4, 1e-36])
    found = []
    for is_signed in (True, False):
        session = opened(with_integers(linear_graph(weight, bias), is_signed=is_signed), 1)
        found.append(session.run(None, {"x": x})[0])
        for row in range(rows):
            alone = session.run(None, {"x": x[row : row + 1]})[0][0]
            np.testing.assert_array_equal(alone, found[-1][row])
    np.testing.assert_array_equal(found[0], found[1])
    wanted = by_definition(x, weight, bias)
    sizes = np.abs(x).max() * np.abs(weight).sum(1).max()
    np.testing.assert_allclose(found[0], wanted, atol=1e-6 * float(sizes) + 1e-6)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_files_may_be_links_as_in_caches_of_the_hub(tmp_path, precision):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for file in filter(Path.is_file, fetch("vdr-mini").iterdir()):
        blob = blobs / hashlib.sha256(file.name.encode()).hexdigest()
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    texts = ["a cat is laying next to a blue book"]
    options = {"precision": precision, "runtime": "onnx"}
    linked, shipped = (
        SparseEncoder.from_pretrained(model, **options).encode_documents(texts)
        for model in (snapshot, "vdr-mini")
    )
    assert linked == shipped


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors"])
def test_graphs_do_not_lead_out_of_their_folder(tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(fetch("vdr-mini"), folder)
    shutil.copyfile(folder / "model.safetensors", tmp_path / "model.safetensors")
    told = json.loads((folder / "vdr_db.json").read_text("utf-8"))
    del told["digests"]  # as whoever changed the graphs would
    (folder / "vdr_db.json").write_text(json.dumps(told), "utf-8")
    place = name if name.startswith("..") else str(tmp_path / name[1:])
    for graph in folder.glob("*.onnx"):
        told = graph.read_bytes()
        moved = dict.fromkeys(weight_files(told), place)
        graph.write_bytes(with_integers(told, is_signed=True, moved=moved))
    encoder = SparseEncoder.from_pretrained(folder, precision="int8", runtime="onnx")
    with pytest.raises(ConfigError, match="its weights must lie beside it, got"):
        encoder.encode_documents(["a cat"])


# Vectors


LOWER = [
    {"precision": "int8"},
    {"precision": "bfloat16", "runtime": "torch"},
    pytest.param({"precision": "bfloat16", "runtime": "openvino"}, marks=needs_bfloat16),
]


@pytest.mark.parametrize("options", LOWER, ids=str)
def test_a_vector_depends_on_its_text_alone(options):
    encoder = load(**options)
    together = encoder.encode_documents(TEXTS)
    assert SparseRows.concat([encoder.encode_documents([text]) for text in TEXTS]) == together
    order = np.array([3, 1, 4, 0, 2])
    assert encoder.encode_documents([TEXTS[i] for i in order]) == together[order]
    for backend in ("cpu", "cpu-int8"):
        assert load(**options, backend=backend).encode_documents(TEXTS) == together


@pytest.mark.parametrize("options", LOWER, ids=str)
def test_nearly_all_columns_stay(options):
    wanted, encoder = load().encode_documents(TEXTS), load(**options)
    found = encoder.encode_documents(TEXTS)
    kept = [
        np.isin(row.indices, other.indices).mean()
        for row, other in zip(wanted, found, strict=True)
        if len(row.indices)
    ]
    assert np.mean(kept) > (0.95 if options["precision"] == "int8" else 0.97)
    assert found != wanted, "it is another precision"
    # Scores are float32 whatever the body is, so that no two columns are equal by rounding.
    assert (found.values.view(np.uint32) & 0xFFFF != 0).mean() > 0.9, "below bfloat16"
    precision = options["precision"]
    assert encoder.precision == precision
    assert f", {precision} on cpu" in repr(encoder)


def test_int8_reads_weights_of_half_precision(tmp_path):
    export(write_bert(tmp_path / "source"), tmp_path / "half", dtype="float16")
    export(tmp_path / "half", tmp_path / "whole")
    vectors = [
        SparseEncoder.from_pretrained(tmp_path / name, precision="int8").encode_queries(TEXTS[:3])
        for name in ("half", "whole")
    ]
    assert vectors[0] == vectors[1]
    assert len(vectors[0].values)


def test_a_rounded_encoder_is_sent_to_other_processes(rounded):
    copy = pickle.loads(pickle.dumps(rounded))
    assert copy.encode_queries(TEXTS) == rounded.encode_queries(TEXTS)


def test_texts_of_a_model_of_both_are_rounded():
    both = CrossModalEncoder.from_pretrained(fetch("vdr-mini"), precision="int8")
    assert (both.text.precision, both.image.precision) == ("int8", "float32")


def test_collections_know_vectors_by_their_precision(rounded):
    assert rounded.stamp() == load().stamp()
    with Collection(MemoryStore(), rounded) as collection:
        collection.add_texts(TEXTS[::2], ids=["a", "b", "c"])
        assert set(collection.store.stamp.probes) == {"document int8", "query int8"}
        assert collection.search("relativity")[0].id in "ac"
        assert Collection(collection.store, load()).search("harbour")[0].id == "b"


# Asking for it


def test_older_names_still_work():
    with pytest.warns(FutureWarning, match="now called precision='bfloat16'"):
        assert load(dtype=torch.bfloat16, runtime="torch").precision == "bfloat16"
    with pytest.warns(FutureWarning, match="now called precision='float32'"):
        assert load(dtype="float32").precision == "float32"
    assert load(dtype="float64").precision == "float64"


def test_what_cannot_be_is_refused_by_name(tmp_path):
    folder = write_bert(tmp_path / "m")
    for options, said in (
        ({"precision": "half"}, "`precision` must be one of"),
        ({"precision": "int8", "dtype": "float16"}, "one of `precision` and `dtype` must be left"),
        ({"precision": "int8", "runtime": "torch"}, "runtime='torch', got 'int8'"),
        ({"precision": "int8", "runtime": "openvino"}, "runtime='openvino', got 'int8'"),
        ({"precision": "int8", "device": "meta"}, "`device` must be None or 'cpu'"),
        (
            {"precision": "bfloat16", "runtime": "onnx"},
            r"must be .*, got 'bfloat16', which vdr-db\[openvino\]",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            SparseEncoder.from_pretrained(fetch("vdr-mini"), **options)
    with pytest.raises(ConfigError, match=r"holds no ONNX graphs; .* `vdr-db export"):
        SparseEncoder.from_pretrained(folder, precision="int8")
    with pytest.raises(ConfigError, match="must be one of"):
        CrossModalEncoder.from_pretrained(write_cross_modal(tmp_path / "c"), precision="int4")


def test_commands_take_a_precision(tmp_path, capsys, rounded):
    file = tmp_path / "texts.txt"
    file.write_text(TEXTS[0] + "\n")
    assert main(["encode", "--input", str(file), "--precision", "int8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[0])
    wanted = rounded.encode_documents(TEXTS[:1])[0]
    assert str(found).count(",") >= wanted.indices.size
