"""ONNX Runtime against torch on one model and one thread: documents, and queries one by one.

    python benchmarks/bench_runtimes.py BEIR_FOLDER --out benchmarks/results/runtimes.csv

Both runtimes in one process, round by round in turn; what counts is processor time, and the ratio
of each round. Vectors are compared first: the kept sets of all texts, but for columns whose score
is within 2e-4 of the smallest kept one, and the largest difference of a weight. Where they differ
more, nothing is timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from measure import rows_of, write_csv

from vdr_db import SparseEncoder, SparseRows
from vdr_db.checkpoints.assets import DEFAULT_MODEL
from vdr_db.readers import BeirFolder

CLOSE = 1e-4


def compared(ours: SparseRows, theirs: SparseRows) -> tuple[int, float]:
    """How many texts keep the same columns, and the largest difference of a weight.

    Raises:
        SystemExit: A kept set differs by more than near ties, or a weight by more than `CLOSE`.
    """
    same, largest = 0, 0.0
    for mine, other in zip(ours.to_dicts(), theirs.to_dicts(), strict=True):
        same += mine.keys() == other.keys()
        lowest = min(mine.values(), default=0.0)
        ties = [({**mine, **other})[id] - lowest for id in mine.keys() ^ other.keys()]
        largest = max(
            largest, *(abs(mine[id] - other[id]) for id in mine.keys() & other.keys()), 0.0
        )
        if largest > CLOSE or any(abs(tie) > 2 * CLOSE for tie in ties):
            raise SystemExit("the runtimes give different vectors, so there is nothing to time")
    return same, largest


def main() -> None:
    """Compares, measures and prints, or writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="BEIR folder")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--documents", type=int, default=192)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    collection = BeirFolder(arguments.folder)
    texts = [one.text for one in islice(collection.documents(), arguments.documents)]
    queries = [one.text for one in islice(collection.queries(), arguments.queries)]
    encoders = {
        name: SparseEncoder.from_pretrained(arguments.model, runtime=name, threads=1, device="cpu")
        for name in ("onnx", "torch")
    }
    warnings.simplefilter("ignore")
    both = [one.encode_documents(texts) for one in encoders.values()]
    same, largest = compared(*both)
    compared(*(one.encode_queries(queries) for one in encoders.values()))
    times: dict[str, dict[str, list[float]]] = {name: {} for name in encoders}
    for _ in range(arguments.rounds):
        for name, encoder in encoders.items():
            start = time.process_time()
            encoder.encode_documents(texts)
            middle = time.process_time()
            for query in queries:
                encoder.encode_queries([query])
            end = time.process_time()
            times[name].setdefault("documents", []).append(len(texts) / (middle - start))
            times[name].setdefault("query", []).append(1000 * (end - middle) / len(queries))
    onnx, by_torch = (
        {what: np.array(found) for what, found in times[name].items()} for name in ("onnx", "torch")
    )
    shape = f"{arguments.model} {arguments.folder.name} threads=1"
    rows = []
    for name, found in times.items():
        samples = {
            "documents_per_second (1/s)": found["documents"],
            "query_processor_time (ms)": found["query"],
        }
        rows += rows_of("encode", name, shape, "float32", samples)
    ratios = {
        "documents_ratio (x)": (onnx["documents"] / by_torch["documents"]).tolist(),
        "query_ratio (x)": (by_torch["query"] / onnx["query"]).tolist(),
        "same_kept_sets (texts)": [float(same)],
        "largest_difference ()": [largest],
    }
    rows += rows_of("encode", "onnx against torch", shape, "float32", ratios)
    for row in rows:
        sys.stdout.write(f"{row.backend:<20} {row.metric:<24} {row.median:g} {row.unit}\n")
    ratio = statistics.median(ratios["query_ratio (x)"])
    sys.stdout.write(f"single queries {ratio:.2f}x\n")
    if arguments.out:
        write_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
