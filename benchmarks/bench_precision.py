"""What a lower precision of the body costs and saves: kept columns, nDCG@10 and time, one thread.

    python benchmarks/bench_precision.py BEIR_FOLDER --out benchmarks/results/precision_cpu.csv

The shipped models, and one of the size of BERT-base with random weights, by every precision and
runtime that has it, each with the way through its head that it chooses. Overlap: share of the
columns of a float32 vector that the other has too, mean over documents. Times: processor time of
documents in one call and of queries one by one, all arms in turn within a round; `time` is the
ratio to float32 on ONNX Runtime in the same round. Random weights have no nDCG.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from bench_scan import encoded, flags
from measure import Row, rows_of, write_csv
from peer_models import BASE, model_folder

from vdr_db import SparseEncoder, SparseRows
from vdr_db.encoders.export import export
from vdr_db.evaluation.quality import TestCollection, evaluate_model

MODELS = ("vdr-mini", BASE)
ARMS = {
    "float32 onnx": {"runtime": "onnx", "threads": 1},
    "int8 onnx": {"precision": "int8", "threads": 1},
    "float32 torch": {"runtime": "torch"},
    "bfloat16 torch": {"precision": "bfloat16", "runtime": "torch"},
    "bfloat16 openvino": {"precision": "bfloat16", "runtime": "openvino", "threads": 1},
}
"""Name -> options of `from_pretrained`; the first is what others are compared with."""
FIRST = next(iter(ARMS))
WARM = 5
"""Rounds of queries that do not count: the first 2,048 tokens of a side are never scanned."""


def overlap(wanted: SparseRows, found: SparseRows) -> list[float]:
    """Share of the columns of each vector that the other has too."""
    return [
        float(np.isin(row.indices, other.indices).mean())
        for row, other in zip(wanted, found, strict=True)
        if row.indices.size
    ]


def timed(
    encoders: dict[str, SparseEncoder], side: str, texts: list[str], rounds: int, shape: str
) -> list[Row]:
    """Overlap, and processor time of all arms in turn, once each has chosen how it computes."""
    vectors = {name: encoded(one, side, texts) for name, one in encoders.items()}
    spent: dict[str, list[float]] = {name: [] for name in encoders}
    warm = 1 if side == "documents" else WARM
    for _ in range(rounds + warm):
        for name, encoder in encoders.items():
            start = time.process_time()
            encoded(encoder, side, texts)
            spent[name].append(1000 * (time.process_time() - start) / len(texts))
    rows: list[Row] = []
    for name, found in spent.items():
        ratios = [one / first for one, first in zip(found, spent[FIRST], strict=True)]
        samples = {
            "overlap (share)": [float(np.mean(overlap(vectors[FIRST], vectors[name])))],
            "processor_time (ms)": found[warm:],
            "time (x)": ratios[warm:],
        }
        rows += rows_of(side, name, shape, name.partition(" ")[0], samples)
    return rows


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="BEIR folder with judgements")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--documents", type=int, default=40, help="that are timed")
    parser.add_argument("--queries", type=int, default=20, help="that are timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    collection = TestCollection.load(arguments.folder)
    texts = {
        "documents": [one.text for one in collection.documents],
        "queries": [one.text for one in collection.queries],
    }
    for side, count in (("documents", arguments.documents), ("queries", arguments.queries)):
        texts[side] = texts[side][:: max(1, len(texts[side]) // count)][:count]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in arguments.models:
            place = model
            if model == BASE:
                place = str(Path(scratch) / "exported")
                export(model_folder(model, Path(scratch), texts["documents"]), place)
            encoders = {
                name: SparseEncoder.from_pretrained(place, device="cpu", **options)  # type: ignore[arg-type]
                for name, options in ARMS.items()
            }
            shape = f"{model} {collection.name} {flags()} threads=1"
            for side, some in texts.items():
                share = 1 if model != BASE else 4
                rows += timed(encoders, side, some[::share], arguments.rounds, shape)
            # float32 on torch ranks as on ONNX Runtime: the vectors are the same up to rounding.
            for name in (
                (FIRST, "int8 onnx", "bfloat16 torch", "bfloat16 openvino") if model != BASE else ()
            ):
                quality = evaluate_model(collection, encoders[name])
                samples = {"ndcg_10": [quality.ndcg_10]}
                rows += rows_of("evaluate", name, shape, name.partition(" ")[0], samples)
            if arguments.out:
                write_csv(arguments.out, rows)
            print(model, "done", flush=True)
    for row in rows:
        print(row.op, row.backend, row.shape, row.metric, row.median, row.unit)


if __name__ == "__main__":
    main()
