"""Encoding by two checkouts, by turns: documents and single queries, one thread.

    python benchmarks/bench_checkouts.py OLD NEW DATA --out benchmarks/results/checkouts.csv

OLD and NEW are folders of checkouts, DATA a folder in BEIR's format, whose texts are read. Each
checkout has a process of its own with the same interpreter and packages; the two take turns, and
what counts is processor time, which other programs of the machine disturb less than time on the
wall. The models have random weights, in layouts that both checkouts read, and run on torch; or
they are those of `--models`, and run as each checkout runs them by itself. Early checkouts know no
head like that of `vdr-mini`; they get its body with the head that published models have.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

from bench_cold_start import commit_of, package_path
from measure import Row, rows_of, write_csv
from peer_models import MINILM, model_folder

from vdr_db.checkpoints.assets import fetch
from vdr_db.readers import BeirFolder

DOCUMENTS, QUERIES = 32, 16
SIZES = {"2x128": (128, 2, 2), "6x384": (384, 6, 12)}
WORKER = """
import json, sys, time
import torch
torch.set_num_threads(1)
from vdr_db import SparseEncoder
documents, queries, folder, options = json.loads(sys.argv[1])
encoder = SparseEncoder.from_pretrained(folder, device="cpu", **options)
encoder.encode_documents(documents[:4])
encoder.encode_queries(queries * 8)  # past the tokens that are never scanned
print("ready", flush=True)
for line in sys.stdin:
    start = time.process_time()
    if line.strip() == "documents":
        encoder.encode_documents(documents)
    else:
        for query in queries:
            encoder.encode_queries([query])
    print(1000 * (time.process_time() - start), flush=True)
"""


def write_model(folder: Path, size: str, tokenizer: Path) -> Path:
    """A BERT with a masked-language head, of random weights."""
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    hidden, layers, heads = SIZES[size]
    words = AutoTokenizer.from_pretrained(tokenizer)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def texts_of(data: Path) -> tuple[list[str], list[str]]:
    """Some documents and queries of a collection."""
    folder = BeirFolder(data)
    documents = [record.text for record in islice(folder.documents(), DOCUMENTS)]
    return documents, [record.text for record in islice(folder.queries(), QUERIES)]


class Worker:
    """A process that encodes with one checkout."""

    def __init__(self, checkout: Path, scratch: Path, arguments: str) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(package_path(checkout, scratch)),
            "PYTHONPYCACHEPREFIX": str(scratch / "bytecode"),
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, arguments],
            env=environment,
            cwd=scratch,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if self._line() != "ready":
            raise SystemExit(f"{checkout} cannot encode")

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def milliseconds(self, what: str) -> float:
        """Processor time of one pass."""
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return float(self._line())


def measured(
    checkouts: dict[str, Path], data: Path, tokenizer: Path, rounds: int, models: list[str]
) -> list[Row]:
    """Samples of each size or model, each checkout and each kind of text."""
    documents, queries = texts_of(data)
    commits = {name: commit_of(checkout) for name, checkout in checkouts.items()}
    rows = []
    for size in models or SIZES:
        with tempfile.TemporaryDirectory() as scratch:
            folder = None if models else write_model(Path(scratch) / "model", size, tokenizer)
            workers = {}
            for name, checkout in checkouts.items():
                read = folder or folder_for(checkout, size, Path(scratch) / "models")
                given = [documents, queries, str(read), {} if models else options_of(checkout)]
                workers[name] = Worker(checkout, Path(scratch) / name, json.dumps(given))
            for what in ("documents", "queries"):
                samples: dict[str, list[float]] = {name: [] for name in checkouts}
                for turn in range(rounds):
                    for name in list(checkouts)[:: 1 if turn % 2 else -1]:
                        samples[name].append(workers[name].milliseconds(what))
                for name, commit in commits.items():
                    found = rows_of(what, name, size, "float32", {"processor (ms)": samples[name]})
                    rows += [replace(row, commit=commit) for row in found]
                ratios = [new / old for old, new in zip(*samples.values(), strict=True)]
                found = rows_of(what, "new / old", size, "float32", {"ratio (1)": ratios})
                rows += [replace(row, commit="..".join(commits.values())) for row in found]
            for worker in workers.values():
                worker.process.kill()
    for row in rows:
        print(f"{row.op:10} {row.shape:6} {row.backend:9} {row.median:8} [{row.p20}, {row.p80}]")
    return rows


def is_early(checkout: Path) -> bool:
    """Whether a checkout knows torch alone, and the heads of published models."""
    return not (checkout / "vdr_db" / "checkpoints").is_dir()


def options_of(checkout: Path) -> dict[str, str]:
    """What picks torch in a checkout."""
    return {} if is_early(checkout) else {"runtime": "torch"}


def folder_for(checkout: Path, model: str, scratch: Path) -> Path:
    """A shipped model, or its body with a head that an early checkout reads."""
    if model == "vdr-mini" and is_early(checkout):
        return model_folder(MINILM, scratch, ())
    return fetch(model)


def main() -> None:
    """Measures, prints and stores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="folder of the earlier checkout")
    parser.add_argument("new", type=Path, help="folder of the later one")
    parser.add_argument("data", type=Path, help="collection in BEIR's format")
    parser.add_argument("--models", nargs="+", default=[], help="names, instead of random weights")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="CSV")
    options = parser.parse_args()
    checkouts = {"old": options.old.resolve(), "new": options.new.resolve()}
    tokenizer = options.new / "vdr_db" / "models" / "vdr-mini"
    rows = measured(checkouts, options.data, tokenizer, options.rounds, options.models)
    if options.out is not None:
        write_csv(options.out, rows)


if __name__ == "__main__":
    main()
