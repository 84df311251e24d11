"""How well the models rank: nDCG@10, Recall@100, MRR@10 on BEIR folders, with BM25 beside them.

    python benchmarks/bench_quality.py demo FOLDER... --out benchmarks/results/quality.csv

`demo` in place of a folder stands for the sample of Debian packages that comes with the library.
`MODEL@N` reads N tokens of a text. Rows of mode alpha have bags of tokens for queries, those of
mode beta for documents. Quality does not vary from run to run: median, p20 and p80 are one number.
Times are measured by the other files of this folder.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from measure import Row, rows_of, write_csv

from vdr_db.cli.demo import unpack_sample
from vdr_db.encoders.text import SparseEncoder
from vdr_db.evaluation.quality import Quality, TestCollection, evaluate_bm25, evaluate_modes

MODELS = ("vdr-tiny", "tiny-splade@256")
METRICS = {
    "ndcg_10": "ndcg_10",
    "recall_100": "recall_100",
    "mrr_10": "mrr_10",
    "document_nonzeros": "document_nonzeros (weights/text)",
    "query_nonzeros": "query_nonzeros (weights/text)",
    "flops": "flops (products/pair)",
}
"""Attribute of `Quality` -> name and unit in the result file."""


def quality_rows(
    collection: TestCollection, quality: Quality, *, length: int | None = None
) -> Iterator[Row]:
    """One row for each metric that the ranker has."""
    shape = f"{collection.name} N={len(collection.documents)} Q={len(collection.queries)}"
    if length is not None:
        shape += f" L={length}"
    name = quality.ranker
    if quality.mode not in (None, "full"):
        name += f" {quality.mode}"
    for attribute, label in METRICS.items():
        value = getattr(quality, attribute)
        if value is not None:
            yield from rows_of("evaluate", name, shape, "float32", {label: [value]})


def load(model: str) -> SparseEncoder:
    """A model by name or folder, with `@N` for the tokens of a text that are read."""
    name, _, length = model.partition("@")
    encoder = SparseEncoder.from_pretrained(name, max_length=int(length) if length else None)
    encoder.model = Path(name).name
    return encoder


def collections(folders: list[str], scratch: str) -> Iterator[tuple[TestCollection, Path]]:
    """The collections to search, and where they lie."""
    for folder in folders:
        place = unpack_sample(Path(scratch) / "debian") if folder == "demo" else Path(folder)
        yield TestCollection.load(place), place


def main() -> None:
    """Evaluates every folder and writes the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="MODEL")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    encoders = [load(model) for model in arguments.models]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for collection, _ in collections(arguments.folders, scratch):
            for encoder in encoders:
                length = encoder.document_entry.max_length
                for quality in evaluate_modes(collection, encoder):
                    rows += quality_rows(collection, quality, length=length)
                    sys.stderr.write(
                        f"{collection.name}: {quality.ranker} {quality.mode} "
                        f"nDCG@10 {quality.ndcg_10:.3f}\n"
                    )
            rows += quality_rows(collection, evaluate_bm25(collection))
    write_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
