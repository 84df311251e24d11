"""How well the models rank: nDCG@10, Recall@100, MRR@10 on BEIR folders, with BM25 beside them.

    python benchmarks/bench_quality.py --max-length 256 FOLDER... > \
        benchmarks/results/quality.csv

`demo` in place of a folder stands for the sample of Debian packages that comes with the library.
Quality does not vary from run to run, so median, p20 and p80 are one number. Times are
measured by the other files of this folder.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from vdr_db.cli_evaluate import Quality, TestCollection, evaluate_bm25, evaluate_model
from vdr_db.cli_model import DEFAULT_MODEL, add_model_options, load_model
from vdr_db.demo import unpack_sample

COLUMNS = (
    "op",
    "backend",
    "shape",
    "dtype",
    "metric",
    "unit",
    "median",
    "p20",
    "p80",
    "device",
    "torch",
    "commit",
    "date",
)
UNITS = {
    "ndcg_10": "",
    "recall_100": "",
    "mrr_10": "",
    "document_nonzeros": "weights/text",
    "query_nonzeros": "weights/text",
    "flops": "products/pair",
}


def rows(
    collection: TestCollection, quality: Quality, length: int | None, dtype: str, device: str
) -> Iterator[list[str]]:
    """One row for each metric that the ranker has."""
    shape = f"{collection.name} N={len(collection.documents)} Q={len(collection.queries)}"
    if length is not None:
        shape += f" L={length}"
    for metric, unit in UNITS.items():
        value = getattr(quality, metric)
        if value is not None:
            shown = f"{value:.5g}"
            yield [
                "evaluate",
                quality.ranker,
                shape,
                dtype,
                metric,
                unit,
                *(shown, shown, shown),
                device,
                torch.__version__,
                _commit(),
                datetime.date.today().isoformat(),
            ]


def main() -> None:
    """Evaluates every folder and writes the rows to stdout."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    add_model_options(parser, default=DEFAULT_MODEL)
    arguments = parser.parse_args()
    encoder = load_model(arguments)
    device = _device_name(encoder.device)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(COLUMNS)
    with tempfile.TemporaryDirectory() as scratch:
        for folder in arguments.folders:
            place = folder
            if folder == "demo":
                place = str(unpack_sample(Path(scratch) / "debian"))
            collection = TestCollection.load(place)
            dtype = str(encoder.dtype).removeprefix("torch.")
            length = encoder.document_entry.max_length
            ours = evaluate_model(collection, encoder)
            writer.writerows(rows(collection, ours, length, dtype, device))
            writer.writerows(rows(collection, evaluate_bm25(collection), None, "float32", device))
            sys.stdout.flush()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return done.stdout.strip() or "none"


if __name__ == "__main__":
    main()
