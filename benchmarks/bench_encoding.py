"""Encoding end to end: `SparseEncoder` against the one of sentence-transformers, on one CPU.

    python benchmarks/bench_encoding.py BEIR_FOLDER --out benchmarks/results/encoding_cpu.csv

Same model, same texts, float32, defaults of both libraries. Speed: both in one process, round by
round in turn, wall time and processor time of each round. Memory: a process of its own for each,
the highest resident size from its start to its end. Difference: the largest over all weights of all
texts. Two models: the tiny SPLADE on 1,000 texts, and one of BERT-base's size with random weights
on 100. With random weights nearly half of all weights are above zero, the worst case for both.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from measure import Row, resident, rows_of, write_csv

OURS, PEER = "vdr_db", "sentence-transformers"
TEXTS = {"tiny-splade": 1000, "bert-base-random": 100}
LARGEST_DIFFERENCE = 1e-5


def main() -> int:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="BEIR folder whose documents are encoded")
    parser.add_argument("--rounds", type=int, default=3, help="of each model (default: 3)")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--models", nargs="+", default=list(TEXTS), choices=list(TEXTS))
    parser.add_argument("--out", type=Path, help="CSV file to write; rows are printed in any case")
    parser.add_argument("--worker", nargs=2, metavar=("LIBRARY", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments, *arguments.worker)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.models:
            folder = model_folder(name, Path(scratch))
            texts = read_texts(arguments.folder, TEXTS[name])
            rows += compare_speed(name, folder, texts, arguments.rounds, arguments.threads)
            rows += compare_memory(name, folder, arguments)
    for row in rows:
        print(row.backend, row.shape, row.metric, row.median, row.unit, f"[{row.p20}, {row.p80}]")
    if arguments.out:
        write_csv(arguments.out, rows)
    return 0


def read_texts(folder: Path, count: int) -> list[str]:
    """The first documents of a BEIR folder."""
    from vdr_db.readers import BeirFolder

    return [record.text for record in islice(BeirFolder(folder).documents(), count)]


def model_folder(name: str, scratch: Path) -> Path:
    """Folder of a model; the large one is made up, with the tokenizer of the small one."""
    from vdr_db.checkpoints.assets import fetch

    tiny = fetch("tiny-splade")
    if name == "tiny-splade":
        return tiny
    import torch
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=30522)).save_pretrained(scratch / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / file, scratch / name / file)
    return scratch / name


def encoder_of(library: str, folder: Path) -> Callable[[list[str]], Any]:
    """A library's encode method on a model, with its defaults."""
    if library == OURS:
        from vdr_db import SparseEncoder

        return SparseEncoder.from_pretrained(folder, device="cpu").encode_documents
    import sentence_transformers

    return sentence_transformers.SparseEncoder(str(folder), device="cpu").encode_document


def difference(ours: Any, theirs: Any) -> float:
    """Largest difference of two sets of vectors, a row at a time."""
    dense = theirs.to_dense().numpy()
    scattered = np.zeros(dense.shape[1], np.float32)
    largest = 0.0
    for i, row in enumerate(dense):
        ids, weights = ours.row(i)
        scattered[ids] = weights
        largest = max(largest, float(np.abs(scattered - row).max()))
        scattered[ids] = 0
    return largest


def compare_speed(
    name: str, folder: Path, texts: list[str], rounds: int, threads: int | None
) -> list[Row]:
    """Both libraries in turn, and the largest difference of their weights.

    Raises:
        SystemExit: The vectors differ: then there is nothing to time.
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    encoders = {library: encoder_of(library, folder) for library in (OURS, PEER)}
    few = difference(*(encode(texts[:32]) for encode in encoders.values()))
    if few > LARGEST_DIFFERENCE:
        raise SystemExit(f"vectors of {name} differ by {few}: nothing is timed")
    vectors = {}
    wall: dict[str, list[float]] = {library: [] for library in encoders}
    processor: dict[str, list[float]] = {library: [] for library in encoders}
    for _ in range(rounds):
        for library, encode in encoders.items():
            start, start_processor = time.perf_counter(), time.process_time()
            vectors[library] = encode(texts)
            wall[library].append(time.perf_counter() - start)
            processor[library].append(time.process_time() - start_processor)
    shape = f"{name} N={len(texts)}"
    rows = []
    for library in encoders:
        samples = {
            "texts_per_second (1/s)": [len(texts) / spent for spent in wall[library]],
            "texts_per_processor_second (1/s)": [len(texts) / s for s in processor[library]],
        }
        rows += rows_of("encode", library, shape, "float32", samples)
    ratios = {
        f"{metric} (x)": [theirs / ours for ours, theirs in zip(*pair, strict=True)]
        for metric, pair in (
            ("speedup", (wall[OURS], wall[PEER])),
            ("speedup_by_processor_time", (processor[OURS], processor[PEER])),
        )
    }
    ratios["max_difference (weight)"] = [difference(vectors[OURS], vectors[PEER])]
    return rows + rows_of("encode", OURS, shape, "float32", ratios)


def compare_memory(name: str, folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """Highest resident size of a process that loads the model and encodes the texts."""
    shape = f"{name} N={TEXTS[name]}"
    rows = []
    peaks = []
    for library in (OURS, PEER):
        command = [sys.executable, __file__, str(arguments.folder)]
        command += ["--worker", library, f"{name}={folder}"]
        command += ["--threads", str(arguments.threads)] if arguments.threads else []
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        samples = {
            "peak_resident (MB)": [found["peak"]],
            "resident_before_encoding (MB)": [found["before"]],
        }
        rows += rows_of("encode", library, shape, "float32", samples)
        peaks.append(found["peak"])
    ratio = {"peak_resident_ratio (x)": [peaks[0] / peaks[1]]}
    return rows + rows_of("encode", OURS, shape, "float32", ratio)


def work(arguments: argparse.Namespace, library: str, model: str) -> int:
    """The process whose memory is measured."""
    name, _, folder = model.partition("=")
    texts = read_texts(arguments.folder, TEXTS[name])
    encode = encoder_of(library, Path(folder))
    if arguments.threads:
        import torch

        torch.set_num_threads(arguments.threads)
    before = resident("VmHWM") / 1e6
    encode(texts)
    print(json.dumps({"before": before, "peak": resident("VmHWM") / 1e6}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
