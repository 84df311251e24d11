"""Encoders that people would use instead of ours, built from the same folder for `bench_peers.py`.

Each arm says how far its vectors may be from ours in fp32 and still count as the same work done.
A package that is not installed is an ImportError of the arm that needs it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_scan import flags
from peer_models import MINI, MeanScores

from vdr_db import SparseEncoder, SparseRows
from vdr_db.encoders.export import export

WIDTH = 30522
BATCH = 8
Dense = np.ndarray[Any, np.dtype[np.float32]]
Encode = Callable[[Sequence[str]], object]
"""Vectors of texts in the type of the library; `dense` makes arrays of them."""


@dataclass(frozen=True)
class Tolerance:
    """How far vectors may be from ours in fp32.

    Attributes:
        overlap: Least share of the 128 largest dimensions that both have, mean over texts.
        weight: Largest difference of a weight, as a share of the largest weight of all texts.
    """

    overlap: float
    weight: float


EXACT = Tolerance(0.999, 1e-4)
BF16 = Tolerance(0.95, 0.1)  # weights of `vdr-mini` near 0 are steep
INT8 = Tolerance(0.85, 0.3)


@dataclass(frozen=True)
class Source:
    """What arms are built from.

    Attributes:
        folder: The model.
        scratch: Where graphs are written.
        texts: Documents that calibrate static int8; none of them is measured.
        threads: Of every arm.
    """

    folder: Path
    scratch: Path
    texts: Sequence[str]
    threads: int

    def path(self, name: str) -> Path:
        """A path of this model in the scratch folder."""
        return self.scratch / f"{self.folder.name}.{name}"


@dataclass(frozen=True)
class Arm:
    """One way to encode.

    Attributes:
        name: As in the results.
        dtype: Of its products.
        tolerance: See there.
        build: Makes the functions for documents and for queries.
        opens_mean: Whether it opens a head on the mean of a text, or is given one.
    """

    name: str
    dtype: str
    tolerance: Tolerance
    build: Callable[[Source], tuple[Encode, Encode]]
    opens_mean: bool = True


class Scores(torch.nn.Module):
    """The whole of SPLADE as a module: ids `[1, L]` of one text to its weights `[1, V]`.

    Args:
        folder: The model.
        max_first: Whether the maximum over tokens comes before log(1 + relu): the same numbers for
            less work, which published code does not do.
    """

    def __init__(self, folder: Path, *, max_first: bool = False) -> None:
        super().__init__()
        from transformers import BertForMaskedLM

        self.model = BertForMaskedLM.from_pretrained(folder, attn_implementation="eager").eval()
        self.max_first = max_first

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Weights of all dimensions."""
        logits = self.model(input_ids=input_ids).logits
        if self.max_first:
            return torch.log1p(torch.relu(logits.amax(1)))
        return torch.log1p(torch.relu(logits)).amax(1)


def scores(folder: Path, *, max_first: bool = False) -> torch.nn.Module:
    """The whole of a model as a module."""
    if folder.name == MINI:
        return MeanScores(folder)
    return Scores(folder, max_first=max_first)


def eager(source: Source) -> tuple[Encode, Encode]:
    """The model of transformers as it is."""
    return by_torch(source, scores(source.folder))


def dense(vectors: Any) -> Dense:
    """Vectors of any library as an array `[texts, V]`."""
    if isinstance(vectors, SparseRows):
        return vectors.to_scipy().toarray()
    if isinstance(vectors, torch.Tensor):
        return vectors.to_dense().float().numpy()
    if isinstance(vectors, np.ndarray):
        return vectors
    rows = np.zeros((len(vectors), WIDTH), np.float32)
    for row, vector in zip(rows, vectors, strict=True):
        row[vector.indices] = vector.values
    return rows


def ours(source: Source, **options: Any) -> tuple[Encode, Encode]:
    """This library; all dimensions with a weight."""
    folder, is_mini = source.folder, source.folder.name == MINI
    if options["runtime"] != "torch":
        options |= {"threads": source.threads}
        folder = folder if is_mini else source.path("ours")
        if not folder.exists():
            export(source.folder, folder)
    encoder = SparseEncoder.from_pretrained(
        folder, device="cpu", k=None, own_weights=False, **options
    )
    if is_mini:  # others have its documents' side alone
        return encoder.encode_documents, encoder.encode_documents
    return encoder.encode_documents, encoder.encode_queries


def sentence_transformers(source: Source) -> tuple[Encode, Encode]:
    """Its sparse encoder with torch."""
    return theirs(source.folder)


def theirs(folder: Path, **options: Any) -> tuple[Encode, Encode]:
    """Its sparse encoder of a folder."""
    from sentence_transformers import SparseEncoder as Theirs

    encoder = Theirs(str(folder), device="cpu", **options)
    settings = {"batch_size": BATCH, "show_progress_bar": False}
    return (
        lambda texts: encoder.encode_document(list(texts), **settings),
        lambda texts: encoder.encode_query(list(texts), **settings),
    )


def sentence_transformers_onnx(source: Source, *, is_int8: bool) -> tuple[Encode, Encode]:
    """Its route by optimum's ONNX Runtime, in fp32 or with its dynamic int8."""
    import optimum.onnxruntime  # noqa: F401 - the package that is missing, by its name
    from onnxruntime import SessionOptions
    from sentence_transformers import SparseEncoder as Theirs
    from sentence_transformers.backend import export_dynamic_quantized_onnx_model

    folder = source.path("st-onnx")
    options = SessionOptions()
    options.intra_op_num_threads = source.threads
    if not folder.exists():
        shutil.copytree(source.folder, folder)
        exported = Theirs(str(folder), device="cpu", backend="onnx")
        exported.save_pretrained(str(folder))
        kind = "avx512_vnni" if "avx512_vnni" in flags() else "avx2"
        export_dynamic_quantized_onnx_model(exported, kind, str(folder), file_suffix="int8")
    file = "onnx/model_int8.onnx" if is_int8 else "onnx/model.onnx"
    return theirs(
        folder, backend="onnx", model_kwargs={"file_name": file, "session_options": options}
    )


def sentence_transformers_openvino(source: Source) -> tuple[Encode, Encode]:
    """Its route by optimum's OpenVINO with its static int8."""
    import optimum.intel.openvino  # noqa: F401 - the package that is missing, by its name
    from sentence_transformers import SparseEncoder as Theirs
    from sentence_transformers.backend import export_static_quantized_openvino_model

    folder, calibration = source.path("st-openvino"), source.path("calibration")
    limits = {"INFERENCE_NUM_THREADS": str(source.threads)}
    shutil.copytree(source.folder, folder)
    exported = Theirs(
        str(folder), device="cpu", backend="openvino", model_kwargs={"ov_config": limits}
    )
    exported.save_pretrained(str(folder))
    calibration.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in source.texts)
    (calibration / "train.jsonl").write_text(lines, encoding="utf-8")
    export_static_quantized_openvino_model(
        exported,
        None,
        str(folder),
        dataset_name=str(calibration),
        dataset_config_name="default",
        dataset_split="train",
        column_name="text",
        file_suffix="int8",
    )
    file = "openvino/openvino_model_int8.xml"
    options = {"file_name": file, "ov_config": limits}
    return theirs(folder, backend="openvino", model_kwargs=options)


def fastembed(source: Source) -> tuple[Encode, Encode]:
    """Its SPLADE class on a local folder; the graph ends with the logits, as it wants them."""
    from fastembed import SparseTextEmbedding

    folder = source.path("fastembed")
    shutil.copytree(source.folder, folder)
    model = Scores(source.folder).model
    ids = torch.tensor([[101, 2000, 102], [101, 2001, 102]])
    names = ["input_ids", "attention_mask", "token_type_ids"]
    torch.onnx.export(
        model,
        (ids, torch.ones_like(ids), torch.zeros_like(ids)),
        str(folder / "model.onnx"),
        input_names=names,
        output_names=["logits"],
        dynamic_axes={name: {0: "B", 1: "L"} for name in [*names, "logits"]},
        opset_version=17,
        dynamo=False,
    )
    specials = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    (folder / "special_tokens_map.json").write_text(json.dumps(specials), encoding="utf-8")
    encoder = SparseTextEmbedding(
        "prithivida/Splade_PP_en_v1", specific_model_path=str(folder), threads=source.threads
    )
    return (
        lambda texts: list(encoder.embed(texts, batch_size=BATCH)),
        lambda texts: list(encoder.query_embed(texts)),
    )


def tokenized(folder: Path) -> Callable[[str], list[int]]:
    """Token ids of a text with special tokens, at most 512."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(512)
    return lambda text: tokenizer.encode(text).ids  # type: ignore[no-any-return]


def one_by_one(
    folder: Path, run: Callable[[np.ndarray[Any, np.dtype[np.int64]]], Dense]
) -> tuple[Encode, Encode]:
    """Encodes a text at a time, which is faster than padded batches on a CPU."""
    ids_of = tokenized(folder)

    def encode(texts: Sequence[str]) -> Dense:
        return np.concatenate([run(np.array([ids_of(text)])) for text in texts])

    return encode, encode


def compiled(source: Source) -> tuple[Encode, Encode]:
    """The model of transformers through torch.compile."""
    module = torch.compile(scores(source.folder), dynamic=True)
    return by_torch(source, module)


def by_torch(
    source: Source, module: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[Encode, Encode]:
    """A module, a text at a time."""

    def run(ids: np.ndarray[Any, np.dtype[np.int64]]) -> Dense:
        with torch.inference_mode():
            return module(torch.from_numpy(ids)).numpy()

    return one_by_one(source.folder, run)


def graph_of(source: Source, *, max_first: bool) -> Path:
    """The module as an ONNX graph."""
    path = source.path(f"{max_first}.onnx")
    if not path.exists():
        torch.onnx.export(
            scores(source.folder, max_first=max_first),
            (torch.tensor([[101, 2000, 102]]),),
            str(path),
            input_names=["input_ids"],
            dynamic_axes={"input_ids": {0: "B", 1: "L"}},
            opset_version=17,
            dynamo=False,
        )
    return path


def onnx_runtime(
    source: Source, *, is_int8: bool, max_first: bool = False
) -> tuple[Encode, Encode]:
    """Exported, fused by ONNX Runtime's own optimizer for BERT, and perhaps quantized."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers.optimizer import optimize_model

    fused, small = (source.path(f"{kind}{max_first}.onnx") for kind in ("fused", "int8"))
    if not fused.exists():
        graph = str(graph_of(source, max_first=max_first))
        optimize_model(graph, model_type="bert").save_model_to_file(str(fused))
    if is_int8:
        reduced = "vnni" not in flags()  # pairs of products saturate without it
        quantize_dynamic(
            fused,
            small,
            per_channel=True,
            weight_type=QuantType.QInt8,
            reduce_range=reduced,
            extra_options={"DefaultTensorType": 1},  # fp32, where shapes behind fusions are unknown
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = source.threads
    session = onnxruntime.InferenceSession(str(small if is_int8 else fused), options)
    return one_by_one(source.folder, lambda ids: session.run(None, {"input_ids": ids})[0])


def openvino(source: Source, *, precision: str, max_first: bool = False) -> tuple[Encode, Encode]:
    """The same graph by OpenVINO; int8 is NNCF's, calibrated."""
    import openvino as ov

    core = ov.Core()
    model = core.read_model(graph_of(source, max_first=max_first))
    if precision == "int8":
        import nncf

        ids_of = tokenized(source.folder)
        samples = [np.array([ids_of(text)]) for text in source.texts]
        model = nncf.quantize(
            model,
            nncf.Dataset(samples),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(samples),
        )
    settings = {
        "INFERENCE_NUM_THREADS": source.threads,
        "INFERENCE_PRECISION_HINT": "f32" if precision == "int8" else precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    found = core.compile_model(model, "CPU", settings)
    return one_by_one(source.folder, lambda ids: found([ids])[0].copy())


ARMS = (
    Arm("vdr_db fp32", "float32", EXACT, partial(ours, runtime="torch", backend="cpu")),
    Arm("vdr_db scan", "float32", EXACT, partial(ours, runtime="torch", backend="cpu-int8")),
    Arm("vdr_db onnx fp32", "float32", EXACT, partial(ours, runtime="onnx", backend="cpu")),
    Arm("vdr_db onnx scan", "float32", EXACT, partial(ours, runtime="onnx", backend="cpu-int8")),
    Arm("vdr_db bfloat16", "bfloat16", BF16, partial(ours, runtime="torch", precision="bfloat16")),
    Arm(
        "vdr_db onnx int8",
        "int8",
        INT8,
        partial(ours, runtime="onnx", precision="int8", backend="cpu-int8"),
    ),
    Arm(
        "vdr_db openvino bfloat16",
        "bfloat16",
        BF16,
        partial(ours, runtime="openvino", precision="bfloat16", backend="cpu-int8"),
    ),
    Arm("transformers", "float32", EXACT, eager),
    Arm("sentence-transformers", "float32", EXACT, sentence_transformers, opens_mean=False),
    Arm(
        "sentence-transformers onnx",
        "float32",
        EXACT,
        partial(sentence_transformers_onnx, is_int8=False),
        opens_mean=False,
    ),
    Arm(
        "sentence-transformers onnx int8",
        "int8",
        INT8,
        partial(sentence_transformers_onnx, is_int8=True),
        opens_mean=False,
    ),
    Arm(
        "sentence-transformers openvino int8",
        "int8",
        INT8,
        sentence_transformers_openvino,
        opens_mean=False,
    ),
    Arm("fastembed", "float32", EXACT, fastembed, opens_mean=False),
    Arm("torch.compile", "float32", EXACT, compiled),
    *(
        Arm(f"onnxruntime fused{name}", dtype, bound, partial(onnx_runtime, **options))
        for name, dtype, bound, options in (
            ("", "float32", EXACT, {"is_int8": False}),
            (" max first", "float32", EXACT, {"is_int8": False, "max_first": True}),
            (" int8", "int8", INT8, {"is_int8": True}),
            (" int8 max first", "int8", INT8, {"is_int8": True, "max_first": True}),
        )
    ),
    *(
        Arm(f"openvino{name}", dtype, bound, partial(openvino, **options))
        for name, dtype, bound, options in (
            ("", "float32", EXACT, {"precision": "f32"}),
            (" bfloat16", "bfloat16", BF16, {"precision": "bf16"}),
            (" int8", "int8", INT8, {"precision": "int8"}),
            (" int8 max first", "int8", INT8, {"precision": "int8", "max_first": True}),
        )
    ),
)
"""Ours in fp32 first: the others are compared with it."""
