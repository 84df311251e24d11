"""Bodies by OpenVINO: the graphs of ONNX Runtime, the same vectors, and what only it can."""

import os
import pickle
import shutil
import subprocess
import sys
import threading
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
from graph_samples import FOLDERS, TEXTS, assert_close
from model_folders import change_json, write_bert
from processor import needs_bfloat16

from vdr_db import CrossModalEncoder, SparseEncoder
from vdr_db.checkpoints.assets import fetch
from vdr_db.connectors import Collection, MemoryStore
from vdr_db.encoders.export import export
from vdr_db.errors import ConfigError


def load(model="vdr-mini", **options):
    return SparseEncoder.from_pretrained(fetch(model), device="cpu", **options)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    export(write_bert(folder / "source"), folder / "model")
    return folder / "model"


@pytest.mark.filterwarnings("ignore:.*were cut")
@pytest.mark.parametrize("name", ["bert", "gelu_new", "distilbert", "roberta", "vdr, two towers"])
def test_bodies_and_heads_agree_with_onnx_runtime(tmp_path, name):
    write, options = FOLDERS[name]
    write(tmp_path / "source", **options)
    export(tmp_path / "source", tmp_path / "model", dtype="float16" if name == "bert" else None)
    ours, theirs = (
        SparseEncoder.from_pretrained(tmp_path / "model", runtime=runtime)
        for runtime in ("openvino", "onnx")
    )
    assert ours.stamp() == theirs.stamp()
    assert_close(ours.encode_documents(TEXTS), theirs.encode_documents(TEXTS))
    assert_close(ours.encode_queries(TEXTS), theirs.encode_queries(TEXTS))


def test_texts_and_images_of_the_shipped_model_agree_with_onnx_runtime():
    ours, theirs = (
        CrossModalEncoder.from_pretrained(fetch("vdr-mini"), runtime=runtime)
        for runtime in ("openvino", "onnx")
    )
    assert_close(ours.encode_queries(TEXTS), theirs.encode_queries(TEXTS))
    given = [np.full((40, 30, 3), shade, np.uint8) for shade in (0, 90, 255)]
    wanted, found = (one.encode_images(given).rows for one in (theirs, ours))
    for mine, other in zip(found, wanted, strict=True):
        common = np.intersect1d(mine.indices, other.indices)
        assert len(common) >= 0.98 * len(other.indices)


@needs_bfloat16
def test_bfloat16_takes_it_where_it_is_installed(exported, monkeypatch):
    by_itself = SparseEncoder.from_pretrained(exported, device="cpu", precision="bfloat16")
    asked = SparseEncoder.from_pretrained(exported, precision="bfloat16", runtime="openvino")
    assert by_itself.encode_documents(TEXTS[:2]) == asked.encode_documents(TEXTS[:2])
    both = CrossModalEncoder.from_pretrained(fetch("vdr-mini"), device="cpu", precision="bfloat16")
    assert (both.text.precision, both.image.precision) == ("bfloat16", "float32")

    def absent(name):
        raise PackageNotFoundError(name)

    for told, said in (
        (absent, "openvino is not installed"),
        (lambda name: "2026.2.1", r"openvino must be 2026\.4 or later, got 2026\.2\.1"),
    ):
        monkeypatch.setattr("vdr_db.checkpoints.text.version", told)
        on_torch = SparseEncoder.from_pretrained(exported, device="cpu", precision="bfloat16")
        assert str(on_torch.dtype) == "torch.bfloat16"
        with pytest.raises(ConfigError, match=rf"on OpenVINO: {said}, .*'vdr-db\[openvino\]'"):
            SparseEncoder.from_pretrained(exported, runtime="openvino")


@needs_bfloat16
def test_a_collection_in_bfloat16_is_searched_by_both_libraries():
    torch, here = (load(precision="bfloat16", runtime=runtime) for runtime in ("torch", "openvino"))
    with Collection(MemoryStore(), torch) as collection:
        collection.add_texts(["a quiet harbour at dawn", "compilers and linkers"], ids=["a", "b"])
        assert Collection(collection.store, here).search("harbour")[0].id == "a"


def test_weights_may_be_links_that_lead_elsewhere(exported, tmp_path):
    """As in the caches of the hub, where every file is a link to one named by its digest."""
    blobs, place = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    place.mkdir(parents=True)
    for number, file in enumerate(sorted(exported.iterdir())):
        if file.is_file():
            (blobs / str(number)).write_bytes(file.read_bytes())
            (place / file.name).symlink_to(os.path.relpath(blobs / str(number), place))
    linked, plain = (
        SparseEncoder.from_pretrained(folder, runtime="openvino") for folder in (place, exported)
    )
    assert linked.encode_documents(TEXTS[:2]) == plain.encode_documents(TEXTS[:2])


def test_threads_and_copies_have_their_own(exported):
    encoder = SparseEncoder.from_pretrained(exported, runtime="openvino", threads=1)
    wanted = encoder.encode_documents(TEXTS[:2])
    assert pickle.loads(pickle.dumps(encoder)).encode_documents(TEXTS[:2]) == wanted
    found = [None] * 4

    def encode(place):
        found[place] = encoder.encode_documents(TEXTS[:2] * 5)[:2]

    threads = [threading.Thread(target=encode, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(rows == wanted for rows in found)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="asks Linux")
def test_no_thread_is_bound_to_a_core(tmp_path):
    code = (
        "import os\n"
        "from pathlib import Path\n"
        "from vdr_db.towers.openvino import OpenvinoSession\n"
        f"graph = Path({str(fetch('vdr-mini') / 'document.onnx')!r}).resolve()\n"
        "session = OpenvinoSession(graph, 2, 'float32')\n"
        "threads = [int(name) for name in os.listdir('/proc/self/task')]\n"
        "print(*{os.sched_getaffinity(thread) == os.sched_getaffinity(0) for thread in threads})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout == "True\n"


def test_what_cannot_be_is_refused_by_name(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "broken")
    change_json(folder / "vdr_db.json", digests=None)
    (graph,) = folder.glob("*.onnx")
    graph.write_bytes(graph.read_bytes()[:-40])
    with pytest.raises(ConfigError, match=r"cannot be used by OpenVINO: .*runtime='torch'"):
        SparseEncoder.from_pretrained(folder, runtime="openvino").encode_documents(["cat"])
    with pytest.raises(ConfigError, match="cannot run on OpenVINO: `dtype` must be None"):
        SparseEncoder.from_pretrained(exported, runtime="openvino", dtype="float16")


def test_a_processor_without_bfloat16_says_so(exported, tmp_path):
    code = (
        "from vdr_db import SparseEncoder\n"
        f"encoder = SparseEncoder.from_pretrained({str(exported)!r}, precision='bfloat16')\n"
        "encoder.encode_documents(['cat'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OV_CPU_MAX_ISA": "AVX2"},
        cwd=tmp_path,
        check=False,
    )
    said = done.stderr.splitlines()[-1]
    assert "`precision` must be 'float32' for OpenVINO on this processor, got 'bfloat16'" in said
    assert "which it would compute in f32; or pass runtime='torch'." in said
