"""Documents and single queries of one model by what people would use instead, on one CPU thread.

    pip install "sentence-transformers[onnx,openvino]" fastembed nncf "datasets<5"
    python benchmarks/bench_peers.py BEIR_FOLDER --out benchmarks/results/peers_cpu.csv

Three sizes (`peer_models.py`), all arms (`peers.py`) in one process and round by round in turn:
ours by torch and by ONNX Runtime, with and without the int8 scan, and with bodies in low precision;
sentence-transformers by torch, ONNX Runtime and OpenVINO; fastembed; torch.compile;
ONNX Runtime with its own fusions, and OpenVINO, on a graph of the whole model, which ends as
published code does or takes the maximum first. An arm whose package is missing is named and left
out. An arm is timed only where its vectors agree with ours within its own tolerance; overlap and
largest difference stand in the file. What counts is processor time, and the ratio to ours in fp32
within a round. Batches of sentence-transformers and fastembed have 8 texts; with 32 of them
fastembed took 18 GB.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import tempfile
import time
import warnings
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from bench_scan import flags
from measure import Row, rows_of, write_csv
from peer_models import BASE, MINI, TINY, model_folder
from peers import ARMS, Arm, Dense, Encode, Source, dense

from vdr_db.errors import ConfigError
from vdr_db.readers import BeirFolder

DOCUMENTS = {TINY: 24, MINI: 12, BASE: 3}
"""How many of each model; the first of the folder."""
CALIBRATION = 16
COMPARED = 8
PACKAGES = (
    *("sentence-transformers", "transformers", "onnxruntime", "optimum-onnx", "optimum-intel"),
    *("openvino", "nncf", "fastembed"),
)


def overlap(ours: Dense, theirs: Dense, k: int = 128) -> float:
    """Share of the k largest dimensions that both have, mean over texts."""
    shares = []
    for mine, other in zip(ours, theirs, strict=True):
        count = min(k, int((mine > 0).sum()))
        kept = [set(np.argsort(-row, kind="stable")[:count].tolist()) for row in (mine, other)]
        shares.append(len(kept[0] & kept[1]) / max(count, 1))
    return float(np.mean(shares))


def compared(arm: Arm, wanted: Dense, found: Dense, shape: str) -> tuple[list[Row], bool]:
    """How near vectors are to ours, and whether that is within the tolerance of the arm."""
    share = overlap(wanted, found)
    gap = float(np.abs(wanted - found).max() / wanted.max())
    rows = rows_of(
        "agreement",
        arm.name,
        shape,
        arm.dtype,
        {
            "overlap (share)": [share],
            "least overlap (share)": [arm.tolerance.overlap],
            "largest difference (of the largest weight)": [gap],
            "largest allowed (of the largest weight)": [arm.tolerance.weight],
        },
    )
    agrees = share >= arm.tolerance.overlap and gap <= arm.tolerance.weight
    print(f"{shape}: {arm.name}: overlap {share:.4f}, largest difference {gap:.2g}", flush=True)
    if not agrees:
        print(f"{shape}: {arm.name} is outside {arm.tolerance}, so it is not timed", flush=True)
    return rows, agrees


def built(source: Source, names: list[str]) -> dict[str, tuple[Arm, dict[str, Encode]]]:
    """The arms whose packages are here, and that this version of ours knows."""
    arms = {}
    for arm in ARMS:
        if arm.name not in names:
            continue
        if source.folder.name == MINI and not arm.opens_mean:
            print(f"{MINI}: {arm.name} is left out: it knows no such head", flush=True)
            continue
        try:
            documents, queries = arm.build(source)
        except (ImportError, ConfigError) as error:
            print(f"{source.folder.name}: {arm.name} is left out: {error}", flush=True)
        else:
            arms[arm.name] = arm, {"documents": documents, "queries": queries}
    return arms


def compare(
    source: Source, texts: dict[str, list[str]], names: list[str], rounds: int
) -> list[Row]:
    """All arms that agree on documents and on queries, documents together, queries one by one."""
    shape = f"{source.folder.name} {flags()} threads={source.threads}"
    arms = built(source, names)
    first = next(iter(arms))
    rows: list[Row] = []
    for side, some in texts.items():
        batches = [some] if side == "documents" else [[text] for text in some]
        checked = batches if side == "documents" else batches[:COMPARED]
        spent: dict[str, list[float]] = {}
        wanted: Dense | None = None
        for name, (arm, sides) in arms.items():
            found = np.concatenate([dense(sides[side](batch)) for batch in checked])
            wanted = found if wanted is None else wanted
            more, agrees = compared(arm, wanted, found, f"{shape} {side} n={len(some)}")
            rows += more
            if agrees:
                spent[name] = []
        for number in range(rounds):
            order = list(spent)
            for name in order[number % len(order) :] + order[: number % len(order)]:
                encode = arms[name][1][side]
                start = time.process_time()
                for batch in batches:
                    encode(batch)
                spent[name].append(1000 * (time.process_time() - start) / len(some))
        for name, found_ms in spent.items():
            ratios = [one / own for one, own in zip(found_ms, spent[first], strict=True)]
            samples = {"processor time (ms)": found_ms, "time to ours in fp32 (x)": ratios}
            at = f"{shape} {side} n={len(some)}"
            rows += rows_of(side, name, at, arms[name][0].dtype, samples)
            print(at, name, rows[-2].median, "ms", rows[-1].median, "x", flush=True)
    return rows


def versions() -> list[Row]:
    """A row for each package of the others that is installed; its version is the shape."""
    rows: list[Row] = []
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        rows += rows_of("version", name, version, "", {"installed (packages)": [1.0]})
    return rows


def main() -> None:
    """Compares, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="BEIR folder")
    parser.add_argument("--models", nargs="+", default=list(DOCUMENTS))
    parser.add_argument("--arms", nargs="+", default=[arm.name for arm in ARMS])
    parser.add_argument("--queries", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="CSV file to write; rows are printed in any case")
    parser.add_argument("--append", action="store_true", help="add to the file")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    collection = BeirFolder(arguments.folder)
    most = max(DOCUMENTS.values())
    documents = [one.text for one in islice(collection.documents(), most + CALIBRATION)]
    queries = [one.text for one in islice(collection.queries(), arguments.queries)]
    rows = [] if arguments.append else versions()
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.models:
            texts = {"documents": documents[: DOCUMENTS[name]], "queries": queries}
            folder = model_folder(name, Path(scratch), documents)
            source = Source(folder, Path(scratch), documents[most:], arguments.threads)
            rows += compare(source, texts, arguments.arms, arguments.rounds)
            if arguments.out:
                write_csv(arguments.out, rows, append=arguments.append)
                rows = [] if arguments.append else rows


if __name__ == "__main__":
    sys.exit(main())
