"""The int8 scan against the fp32 head it replaces: same bits, columns left, and time.

    python benchmarks/bench_scan.py BEIR_FOLDER... --out benchmarks/results/scan_cpu.csv

For each model and runtime, on one thread. First the bits: documents of every collection, drawn
evenly, and its queries, at every k, by `backend="cpu"` and `backend="cpu-int8"`; nothing is timed
where one vector differs. Then, for each collection and k, how many columns the scan left to be
computed in fp32, for the median text and the one with the most. Last, for the model's own k, the
time of documents and of single queries by both ways in turn: processor time, and the ratio of each
round. The flags of the processor that matter stand in the column of the shape.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Row, rows_of, write_csv

from vdr_db import SparseEncoder, SparseRows
from vdr_db.checkpoints.assets import fetch
from vdr_db.kernels.cpu import scan as scans
from vdr_db.kernels.cpu.products import exact_levels
from vdr_db.readers import BeirFolder

K = (32, 128, 256, 768)
MODELS = ("vdr-mini", "tiny-splade")
FLAGS = ("avx2", "avx_vnni", "avx512_vnni", "amx_int8")


def flags() -> str:
    """Those of `FLAGS` that the processor has."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if sys.platform == "linux" else ""
    line = next((line for line in info.splitlines() if line.startswith("flags")), "")
    return "+".join(flag for flag in FLAGS if flag in line.split()) or "unknown"


class Counted:
    """Counts the columns that scans compute in fp32, and the texts they leave to the plain way."""

    def __init__(self) -> None:
        self.columns: list[int] = []
        self.plain = 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """`scan`, counted."""
        found = scans.scan(*arguments, **options)
        if found is None:
            self.plain += 1
        else:
            self.columns.append(int((found > -np.inf).sum()))
        return found


def encoders_of(model: str, runtime: str) -> dict[str, SparseEncoder]:
    """The same encoder with and without scans."""
    options = {"runtime": runtime, "device": "cpu"} | ({"threads": 1} if runtime == "onnx" else {})
    return {
        backend: SparseEncoder.from_pretrained(fetch(model), backend=backend, **options)  # type: ignore[arg-type]
        for backend in ("cpu", "cpu-int8")
    }


def with_k(encoder: SparseEncoder, k: int | None) -> SparseEncoder:
    """The encoder with another k on both sides."""
    encoder.document_entry = replace(encoder.document_entry, k=k)
    encoder.query_entry = replace(encoder.query_entry, k=k)
    return encoder


def encoded(encoder: SparseEncoder, side: str, texts: list[str]) -> SparseRows:
    """Vectors of documents, or of queries one by one."""
    if side == "documents":
        return encoder.encode_documents(texts)
    return SparseRows.concat([encoder.encode_queries([text]) for text in texts])


def left(
    both: dict[str, SparseEncoder], side: str, texts: list[str], k: int | None, shape: str
) -> Iterable[Row]:
    """Compares the vectors, and counts columns.

    Raises:
        SystemExit: A vector differs.
    """
    from vdr_db.encoders import text_onnx, text_torch

    counted = Counted()
    text_onnx.scan = text_torch.scan = counted
    vectors = [encoded(with_k(one, k), side, texts) for one in both.values()]
    text_onnx.scan = text_torch.scan = scans.scan
    if vectors[0] != vectors[1]:
        raise SystemExit(f"{shape}: vectors differ, so there is nothing to time")
    samples = {
        "same_bits (texts)": [float(len(texts))],
        "columns_left (columns)": [float(count) for count in counted.columns] or [float("nan")],
        "most_columns_left (columns)": [float(max(counted.columns, default=0))],
        "plain_way (texts)": [float(counted.plain)],
    }
    return rows_of("scan", f"{side} k={k}", shape, "float32", samples)


def timed(
    both: dict[str, SparseEncoder], side: str, texts: list[str], rounds: int, shape: str
) -> list[Row]:
    """Processor time of both ways in turn."""
    spent: dict[str, list[float]] = {name: [] for name in both}
    for _ in range(rounds):
        for name, encoder in both.items():
            start = time.process_time()
            encoded(encoder, side, texts)
            spent[name].append(1000 * (time.process_time() - start) / len(texts))
    rows: list[Row] = []
    for name, found in spent.items():
        rows += rows_of(side, name, shape, "float32", {"processor_time (ms)": found})
    ratios = [a / b for a, b in zip(spent["cpu"], spent["cpu-int8"], strict=True)]
    return rows + rows_of(side, "cpu-int8", shape, "float32", {"speedup (x)": ratios})


def main() -> None:
    """Compares, counts, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="BEIR folders")
    parser.add_argument("--documents", type=int, default=100, help="of each collection")
    parser.add_argument("--queries", type=int, default=50, help="of each collection")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    machine = f"{flags()} levels={exact_levels(1)} threads=1"
    collections = {}
    for folder in arguments.folders:
        documents = [one.text for one in BeirFolder(folder).documents()]
        queries = [one.text for one in BeirFolder(folder).queries()]
        step = max(1, len(documents) // arguments.documents)
        collections[folder.name] = {
            "documents": documents[::step][: arguments.documents],
            "queries": queries[: arguments.queries],
        }
    rows: list[Row] = []
    for model in arguments.models:
        has_graphs = any(fetch(model).glob("*.onnx"))
        for runtime in ("onnx", "torch") if has_graphs else ("torch",):
            both = encoders_of(model, runtime)
            own = both["cpu"].document_entry.k, both["cpu"].query_entry.k
            at = f"{model} {runtime} {machine}"
            for name, texts in collections.items():
                for side, some in texts.items():
                    for k in K if None not in own else (*K, None):
                        rows += left(both, side, some, k, f"{at} {name}")
                print(at, name, "same bits", flush=True)
            for one in both.values():
                one.document_entry = replace(one.document_entry, k=own[0])
                one.query_entry = replace(one.query_entry, k=own[1])
            for side in ("documents", "queries"):
                some = [text for texts in collections.values() for text in texts[side][:15]]
                rows += timed(both, side, some, arguments.rounds, f"{at} all")
            if arguments.out:
                write_csv(arguments.out, rows)
    for row in rows:
        print(row.op, row.backend, row.shape, row.metric, row.median, row.unit)


if __name__ == "__main__":
    main()
