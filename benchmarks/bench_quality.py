"""How well the models rank: nDCG@10, Recall@100, MRR@10 on BEIR folders, with BM25 beside them.

    python benchmarks/bench_quality.py demo FOLDER... --out benchmarks/results/quality.csv

Beside each, the difference of its nDCG@10 from BM25's and the paired bootstrap interval of that
(95 %, 10,000 draws of queries). `--dense FOLDER` adds two ceilings: a sentence encoder with mean
pooling, such as all-MiniLM-L6-v2, and z(BM25) + 1.5 z(dense), z over the documents of a query.

`demo` in place of a folder stands for the sample of Debian packages that comes with the library.
`MODEL@N` reads N tokens of a text. Rows of mode alpha have bags of tokens for queries, those of
mode beta for documents. Quality does not vary from run to run: median, p20 and p80 are one number.
Times are measured by the other files of this folder.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import bm25s
import numpy as np
import numpy.typing as npt
import Stemmer
import torch
from measure import Row, rows_of, write_csv

from vdr_db.cli.demo import unpack_sample
from vdr_db.encoders.text import SparseEncoder
from vdr_db.evaluation.metrics import paired_interval
from vdr_db.evaluation.quality import (
    BM25_B,
    BM25_K1,
    BM25_WORD,
    DEPTH,
    Quality,
    TestCollection,
    evaluate_bm25,
    evaluate_modes,
    means,
    ndcg_of,
)
from vdr_db.training.teachers import DenseTeacher

MODELS = ("vdr-mini", "tiny-splade@256")
DENSE_LENGTH, DENSE_SHARE = 256, 1.5
"""Tokens of a text that the dense encoder reads, and its weight beside BM25."""
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


def difference_rows(collection: TestCollection, quality: Quality, bm25: Quality) -> list[Row]:
    """The difference from BM25 with its interval, said and as rows."""
    found = paired_interval(quality.ndcg_10_of, bm25.ndcg_10_of)
    names = ("ndcg_10 - BM25", "ndcg_10 - BM25 low", "ndcg_10 - BM25 high")
    shape = f"{collection.name} N={len(collection.documents)} Q={len(collection.queries)}"
    name = " ".join(part for part in (quality.ranker, quality.mode) if part not in (None, "full"))
    difference, low, high = found
    print(
        f"{collection.name}: {name} nDCG@10 {quality.ndcg_10:.3f}, BM25 {bm25.ndcg_10:.3f}, "
        f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]",
        flush=True,
    )
    samples = {label: [value] for label, value in zip(names, found, strict=True)}
    return rows_of("evaluate", name, shape, "float32", samples)


def ceilings(collection: TestCollection, folder: str) -> Iterator[Quality]:
    """The dense encoder alone, and with BM25."""
    teacher = DenseTeacher(folder, 1.0, torch.device("cpu"), DENSE_LENGTH)
    documents = teacher.documents(collection.document_texts)
    dense = (teacher.queries(collection.query_texts) @ documents.T).double().numpy()
    lexical = bm25_scores(collection)
    both = standardised(lexical) + DENSE_SHARE * standardised(dense)
    for name, scores in ((Path(folder).name, dense), (f"BM25 + {Path(folder).name}", both)):
        run = {
            str(query.id): [
                (str(collection.documents[i].id), float(row[i]))
                for i in np.argsort(-row, kind="stable")[: DEPTH + 1]
            ]
            for query, row in zip(collection.queries, scores, strict=True)
        }
        values = (*means(run, collection), None, None, None, 0.0, 0.0, 0.0, 0.0)
        yield Quality(name, None, *values, ndcg_of(run, collection))


def bm25_scores(collection: TestCollection) -> npt.NDArray[np.float64]:
    """`[Q, N]`, by the same words and constants as `evaluate_bm25`."""
    options = {"stopwords": None, "token_pattern": BM25_WORD, "show_progress": False}
    stemmer = Stemmer.Stemmer("english")
    words = partial(bm25s.tokenize, stemmer=stemmer, return_ids=False, **options)
    index = bm25s.BM25(k1=BM25_K1, b=BM25_B, method="lucene")
    index.index(words(collection.document_texts), show_progress=False)
    asked = words(collection.query_texts)
    return np.array([index.get_scores(query) for query in asked], np.float64)


def standardised(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Mean 0 and deviation 1 over the documents of each query."""
    deviation = scores.std(axis=1, keepdims=True)
    return (scores - scores.mean(axis=1, keepdims=True)) / np.maximum(deviation, 1e-12)


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
    parser.add_argument("--dense", metavar="FOLDER", help="a sentence encoder, for the ceilings")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    encoders = [load(model) for model in arguments.models]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for collection, _ in collections(arguments.folders, scratch):
            bm25 = evaluate_bm25(collection)
            for encoder in encoders:
                length = encoder.document_entry.max_length
                for quality in evaluate_modes(collection, encoder):
                    rows += quality_rows(collection, quality, length=length)
                    rows += difference_rows(collection, quality, bm25)
            rows += quality_rows(collection, bm25)
            for quality in ceilings(collection, arguments.dense) if arguments.dense else ():
                rows += quality_rows(collection, quality)
                rows += difference_rows(collection, quality, bm25)
    write_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
