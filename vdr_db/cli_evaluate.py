"""`vdr-db evaluate`: a model's ranking of a BEIR folder, measured, with BM25 beside it.

The path is the one a user takes: encode, write to an embedded Qdrant, search. Only judged queries
are asked.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdr_db.cli_model import DEFAULT_MODEL, add_model_options, load_model
from vdr_db.cli_show import say, show_comparison, show_json
from vdr_db.errors import InputError, require
from vdr_db.evaluation import flops, mean, mean_nonzeros, ndcg, recall, reciprocal_rank
from vdr_db.readers import BeirFolder, Record

if TYPE_CHECKING:
    from vdr_db.connectors import VDRQdrant
    from vdr_db.encoder import SparseEncoder

__all__ = ["Quality", "TestCollection", "evaluate_bm25", "evaluate_model", "show_quality"]

DEPTH = 100
"""Hits asked for each query; Recall@100 needs so many."""
BM25_K1, BM25_B = 1.2, 0.75
# Words as they are written, one letter or more; bm25s' own pattern drops single letters.
BM25_WORD = r"(?u)\b\w+\b"


@dataclass(frozen=True)
class TestCollection:
    """Documents, the queries that are judged, and their judgements.

    Attributes:
        name: Name of the folder.
        documents: The whole corpus.
        queries: Queries with at least one relevant document.
        judgements: Query id -> document id -> grade.
    """

    __test__ = False  # not a test, whatever pytest makes of the name

    name: str
    documents: Sequence[Record]
    queries: Sequence[Record]
    judgements: dict[str, dict[str, int]]

    @classmethod
    def load(cls, folder: str | Path, *, split: str | None = None) -> TestCollection:
        """Reads a BEIR folder into memory.

        Raises:
            InputError: A file is missing or wrong, or no query has a relevant document.
        """
        reader = BeirFolder(folder, split=split)
        judgements = reader.judgements()
        queries = [
            query
            for query in reader.queries()
            if any(grade > 0 for grade in judgements.get(str(query.id), {}).values())
        ]
        documents = list(reader.documents())
        if not queries or not documents:
            raise InputError(
                f"{folder}: expected documents and queries with a relevant document, got "
                f"{len(documents)} documents and {len(queries)} such queries; "
                "queries.jsonl and qrels must use the same ids."
            )
        name = Path(folder).resolve().name
        return cls(name, documents, queries, judgements)


@dataclass(frozen=True)
class Quality:
    """What was measured of one ranker on one collection.

    Attributes:
        ranker: Name of the model, or `"BM25"`.
        ndcg_10: Mean nDCG@10.
        recall_100: Mean Recall@100.
        mrr_10: Mean reciprocal rank within 10.
        document_nonzeros: Mean weights in a document vector; None for BM25.
        query_nonzeros: Mean weights in a query vector; None for BM25.
        flops: Expected multiplications for one query against one document; None for BM25.
        encode_documents_s: Seconds from texts to vectors; for BM25 to words.
        encode_queries_s: The same for the queries.
        index_s: Seconds to write the vectors to the store and make them searchable.
        search_ms: Milliseconds a query, once encoded, mean.
    """

    ranker: str
    ndcg_10: float
    recall_100: float
    mrr_10: float
    document_nonzeros: float | None
    query_nonzeros: float | None
    flops: float | None
    encode_documents_s: float
    encode_queries_s: float
    index_s: float
    search_ms: float


def evaluate_model(
    collection: TestCollection, encoder: SparseEncoder, *, store: VDRQdrant | None = None
) -> Quality:
    """Encodes, indexes and searches a collection with a model.

    Args:
        collection: What to search.
        encoder: The model.
        store: Where to write to; None makes an embedded collection and removes it afterwards.

    Returns:
        What was measured.
    """
    if store is None:
        from vdr_db.connectors import VDRQdrant

        with VDRQdrant("evaluate", encoder, path=":memory:") as embedded:
            return evaluate_model(collection, encoder, store=embedded)
    clock = _Clock()
    bar = sys.stderr.isatty()
    documents = encoder.encode_documents(
        [document.text for document in collection.documents], show_progress=bar
    )
    encode_documents_s = clock.lap()
    queries = encoder.encode_queries([query.text for query in collection.queries])
    encode_queries_s = clock.lap()
    ids = [document.id for document in collection.documents]
    payloads = [{**document.payload, "text": document.text} for document in collection.documents]
    store.add_rows(documents, ids=ids, payloads=payloads)
    store.flush()
    index_s = clock.lap()
    hits = store.search_batch(queries, limit=DEPTH)
    search_s = clock.lap()
    run = {
        str(query.id): [(str(hit.id), float(hit.score)) for hit in found]
        for query, found in zip(collection.queries, hits, strict=True)
    }
    return Quality(
        encoder.model,
        *_means(run, collection),
        mean_nonzeros(documents),
        mean_nonzeros(queries),
        flops(queries, documents),
        encode_documents_s,
        encode_queries_s,
        index_s,
        1000 * search_s / len(queries),
    )


def evaluate_bm25(collection: TestCollection) -> Quality:
    """BM25 over English word stems (k1 1.2, b 0.75, Lucene's variant, no stop words).

    Raises:
        InputError: No document has a word.
        MissingExtraError: `bm25s` or `PyStemmer` is not installed.
    """
    bm25s = require("bm25s", "cli")
    stemmer = require("Stemmer", "cli").Stemmer("english")

    def words(records: Sequence[Record]) -> Any:
        return bm25s.tokenize(
            [record.text for record in records],
            stopwords=None,
            stemmer=stemmer,
            token_pattern=BM25_WORD,
            show_progress=False,
        )

    clock = _Clock()
    documents = words(collection.documents)
    if not documents.vocab:
        raise InputError(f"{collection.name}: no document has a word that BM25 could find.")
    encode_documents_s = clock.lap()
    queries = words(collection.queries)
    encode_queries_s = clock.lap()
    index = bm25s.BM25(k1=BM25_K1, b=BM25_B, method="lucene")
    index.index(documents, show_progress=False)
    index_s = clock.lap()
    depth = min(DEPTH, len(collection.documents))
    found, scores = index.retrieve(queries, k=depth, show_progress=False)
    search_s = clock.lap()
    run = {
        str(query.id): [
            (str(collection.documents[int(i)].id), float(score))
            for i, score in zip(found[row], scores[row], strict=True)
            if score > 0  # it fills up with documents that share no word
        ]
        for row, query in enumerate(collection.queries)
    }
    return Quality(
        "BM25",
        *_means(run, collection),
        None,
        None,
        None,
        encode_documents_s,
        encode_queries_s,
        index_s,
        1000 * search_s / len(collection.queries),
    )


def show_quality(collection: TestCollection, measured: Sequence[Quality]) -> None:
    """The measurements as a table on stdout."""
    rows = [
        {
            "ranked by": Path(quality.ranker).name,
            "nDCG@10": f"{quality.ndcg_10:.3f}",
            "R@100": f"{quality.recall_100:.3f}",
            "MRR@10": f"{quality.mrr_10:.3f}",
            "weights/doc": _one_digit(quality.document_nonzeros),
            "/query": _one_digit(quality.query_nonzeros),
            "encode": f"{quality.encode_documents_s + quality.encode_queries_s:.1f} s",
            "index": f"{quality.index_s:.1f} s",
            "search": f"{quality.search_ms:.1f} ms",
        }
        for quality in measured
    ]
    title = (
        f"{collection.name}: {len(collection.documents):,} documents, "
        f"{len(collection.queries):,} judged queries"
    )
    show_comparison(list(rows[0]), rows, title)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `evaluate`."""
    parser.add_argument("folder", nargs="+", metavar="FOLDER", help="folder in BEIR layout")
    add_model_options(parser, default=DEFAULT_MODEL)
    parser.add_argument("--split", help="judgements to use (default: test, or the only one)")
    parser.add_argument("--no-bm25", action="store_true", help="leave BM25 out")


def run_command(arguments: argparse.Namespace) -> int:
    """Carries out `vdr-db evaluate`."""
    require("rich", "cli")
    if not arguments.no_bm25:
        require("bm25s", "cli")
        require("Stemmer", "cli")
    collections = [
        TestCollection.load(folder, split=arguments.split) for folder in arguments.folder
    ]
    encoder = load_model(arguments)
    for collection in collections:
        say(f"{collection.name}: encoding {len(collection.documents):,} documents")
        measured = [evaluate_model(collection, encoder)]
        if not arguments.no_bm25:
            measured.append(evaluate_bm25(collection))
        if arguments.json:
            counts = {
                "collection": collection.name,
                "documents": len(collection.documents),
                "queries": len(collection.queries),
            }
            for quality in measured:
                show_json({**counts, **asdict(quality)})
        else:
            show_quality(collection, measured)
    return 0


class _Clock:
    """Seconds since the lap before."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call, or since the start."""
        now = time.perf_counter()
        passed, self._start = now - self._start, now
        return passed


def _means(
    run: dict[str, list[tuple[str, float]]], collection: TestCollection
) -> tuple[float, float, float]:
    judgements = {
        str(query.id): collection.judgements[str(query.id)] for query in collection.queries
    }
    return (
        mean(ndcg(run, judgements, cutoff=10)),
        mean(recall(run, judgements, cutoff=DEPTH)),
        mean(reciprocal_rank(run, judgements, cutoff=10)),
    )


def _one_digit(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"
