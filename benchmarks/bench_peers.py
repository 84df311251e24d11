"""Documents and single queries of one model by what people would use instead, on one CPU thread.

    python benchmarks/bench_peers.py BEIR_FOLDER --out benchmarks/results/peers_cpu.csv

The tiny SPLADE, and bodies of the sizes of MiniLM and of BERT-base with random weights, in one
process and round by round in turn: ours in fp32, ours with the int8 scan, sentence-transformers,
torch.compile of the model of transformers, and ONNX Runtime with its own fusions, in fp32 and with
dynamic int8. An arm is timed only where its vectors agree with ours: fp32 within `CLOSE` of each
weight, int8 in `LEAST_OVERLAP` of the dimensions; the overlap stands in the file. What counts is
processor time, and the ratio to ours in fp32 within a round. Random heads do not separate columns,
so the scan is not shown at its best on the two larger sizes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_scan import flags
from measure import Row, rows_of, write_csv

from vdr_db import SparseEncoder
from vdr_db.checkpoints.assets import fetch
from vdr_db.readers import BeirFolder

SIZES: dict[str, dict[str, int]] = {
    "tiny-splade": {},
    "minilm-random": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "bert-base-random": {},
}
CLOSE = 1e-3
LEAST_OVERLAP = 0.9
OURS = "vdr_db"
Dense = np.ndarray[Any, np.dtype[np.float32]]
Encode = Callable[[Sequence[str]], Dense]
"""Weights `[N, V]` of texts."""


def model_folder(name: str, scratch: Path) -> Path:
    """Folder of a model; the larger ones are made up, with the tokenizer of the small one."""
    tiny = fetch("tiny-splade")
    if name == "tiny-splade":
        return tiny
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(vocab_size=30522, **SIZES[name])
    BertForMaskedLM(config).save_pretrained(scratch / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / file, scratch / name / file)
    return scratch / name


class Scores(torch.nn.Module):
    """The whole of SPLADE as a module: ids of one text to its weights `[1, V]`."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import BertForMaskedLM

        self.model = BertForMaskedLM.from_pretrained(folder, attn_implementation="eager").eval()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Maximum over tokens, then log(1 + relu)."""
        logits = self.model(input_ids=input_ids).logits
        return torch.log1p(torch.relu(logits)).amax(1)


def tokenized(folder: Path) -> Callable[[str], list[int]]:
    """Token ids of a text with special tokens, at most 512."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(512)
    return lambda text: tokenizer.encode(text).ids  # type: ignore[no-any-return]


def ours(folder: Path, backend: Any) -> Encode:
    """This library; k as saved, which is all dimensions with a weight."""
    encoder = SparseEncoder.from_pretrained(folder, device="cpu", backend=backend)
    return lambda texts: encoder.encode_documents(texts).to_scipy().toarray()


def sentence_transformers(folder: Path) -> Encode:
    """Its sparse encoder with torch."""
    from sentence_transformers import SparseEncoder as Theirs

    encoder = Theirs(str(folder), device="cpu")
    return lambda texts: encoder.encode_document(list(texts)).to_dense().numpy()


def compiled(folder: Path) -> Encode:
    """The model of transformers through torch.compile, a text at a time."""
    module, ids_of = torch.compile(Scores(folder), dynamic=True), tokenized(folder)

    def encode(texts: Sequence[str]) -> Dense:
        with torch.inference_mode():
            return np.concatenate([module(torch.tensor([ids_of(t)])).numpy() for t in texts])

    return encode


def onnx_runtime(folder: Path, scratch: Path, *, is_int8: bool) -> Encode:
    """Exported, fused by ONNX Runtime's own optimizer for BERT, and perhaps quantized."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers.optimizer import optimize_model

    plain, fused, small = (scratch / f"{folder.name}.{kind}.onnx" for kind in ("p", "f", "q"))
    if not fused.exists():
        torch.onnx.export(
            Scores(folder),
            (torch.tensor([[101, 2000, 102]]),),
            str(plain),
            input_names=["input_ids"],
            dynamic_axes={"input_ids": {0: "B", 1: "L"}},
            opset_version=17,
            dynamo=False,
        )
        optimize_model(str(plain), model_type="bert").save_model_to_file(str(fused))
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
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(small if is_int8 else fused), options)
    ids_of = tokenized(folder)

    def encode(texts: Sequence[str]) -> Dense:
        found = [session.run(None, {"input_ids": np.array([ids_of(t)])})[0] for t in texts]
        return np.concatenate(found)

    return encode


def arms_of(folder: Path, scratch: Path) -> Iterator[tuple[str, Encode, bool]]:
    """Name, function and whether int8 changes its vectors, of each arm; ours in fp32 first."""
    yield f"{OURS} fp32", ours(folder, "cpu"), False
    yield f"{OURS} scan", ours(folder, "cpu-int8"), False
    yield "sentence-transformers", sentence_transformers(folder), False
    yield "torch.compile", compiled(folder), False
    yield "onnxruntime fused", onnx_runtime(folder, scratch, is_int8=False), False
    yield "onnxruntime fused int8", onnx_runtime(folder, scratch, is_int8=True), True


def overlap(ours: Dense, theirs: Dense, k: int = 128) -> float:
    """Share of the k largest dimensions that both have, mean over texts."""
    shares = []
    for mine, other in zip(ours, theirs, strict=True):
        count = min(k, int((mine > 0).sum()))
        kept = [set(np.argsort(-row, kind="stable")[:count].tolist()) for row in (mine, other)]
        shares.append(len(kept[0] & kept[1]) / max(count, 1))
    return float(np.mean(shares))


def agrees(ours: Dense, theirs: Dense, *, is_int8: bool) -> bool:
    """Whether an arm computes the same, within what was stated."""
    if is_int8:
        return overlap(ours, theirs) >= LEAST_OVERLAP
    return bool(np.abs(ours - theirs).max() <= CLOSE)


def compare(
    name: str, folder: Path, scratch: Path, texts: dict[str, list[str]], rounds: int
) -> list[Row]:
    """All arms that agree, documents together and queries one by one."""
    shape, rows = f"{name} {flags()} threads={torch.get_num_threads()}", []
    arms: dict[str, Encode] = {}
    wanted: Dense | None = None
    for arm, encode, is_int8 in arms_of(folder, scratch):
        found = encode(texts["documents"][:8])
        if wanted is None:
            wanted = found
        share = overlap(wanted, found)
        rows += rows_of("encode", arm, shape, "float32", {"overlap (share)": [share]})
        if agrees(wanted, found, is_int8=is_int8):
            arms[arm] = encode
        else:
            print(f"{shape}: the vectors of {arm} differ, so it is not timed (overlap {share:.3f})")
    for side, some in texts.items():
        batches = [some] if side == "documents" else [[text] for text in some]
        spent: dict[str, list[float]] = {arm: [] for arm in arms}
        for _ in range(rounds):
            for arm, encode in arms.items():
                start = time.process_time()
                for batch in batches:
                    encode(batch)
                spent[arm].append(1000 * (time.process_time() - start) / len(some))
        for arm, found_ms in spent.items():
            ratios = [one / own for one, own in zip(found_ms, spent[f"{OURS} fp32"], strict=True)]
            samples = {"processor_time (ms)": found_ms, "time_to_ours_fp32 (x)": ratios}
            rows += rows_of(side, arm, shape, "float32", samples)
    return rows


def main() -> None:
    """Compares, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="BEIR folder")
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    collection = BeirFolder(arguments.folder)
    texts = {
        "documents": [one.text for one in islice(collection.documents(), arguments.documents)],
        "queries": [one.text for one in islice(collection.queries(), arguments.queries)],
    }
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.models:
            folder = model_folder(name, Path(scratch))
            rows += compare(name, folder, Path(scratch), texts, arguments.rounds)
    for row in rows:
        sys.stdout.write(f"{row.op:<10} {row.backend:<24} {row.shape} {row.metric} {row.median}\n")
    if arguments.out:
        write_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
