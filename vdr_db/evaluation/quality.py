"""How well a model ranks a test collection, in every mode, and how well BM25 does.

The path is the one a user takes: encode, write to an embedded Qdrant, search. Only judged queries
are asked. `vdr_db.evaluation.sweep` does the same for many k.

| mode  | query         | documents      |
|-------|---------------|----------------|
| full  | encoded       | encoded        |
| alpha | bag of tokens | encoded        |
| beta  | encoded       | bags of tokens |
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, get_args

from vdr_db.connectors.base import Documents
from vdr_db.connectors.collections.collection import Mode
from vdr_db.errors import ConfigError, InputError, require
from vdr_db.evaluation.metrics import flops, mean, mean_nonzeros, ndcg, recall, reciprocal_rank
from vdr_db.readers import BeirFolder, Record
from vdr_db.sparse import SparseRows

if TYPE_CHECKING:
    from vdr_db.connectors import Collection, VDRQdrant
    from vdr_db.encoders.text import Side, SparseEncoder

__all__ = [
    "MODES",
    "Mode",
    "Quality",
    "TestCollection",
    "Timer",
    "evaluate_bm25",
    "evaluate_model",
    "evaluate_modes",
    "evaluate_store",
    "fill",
    "means",
    "ndcg_of",
    "opened",
    "search",
]

MODES: tuple[Mode, ...] = get_args(Mode)

DEPTH = 100
"""Hits of each query that are measured; Recall@100 needs so many. One more is asked for, since the
one with the query's own id is left out."""
BM25_K1, BM25_B = 1.2, 0.75
# Words as they are written, one letter or more; bm25s' own pattern drops single letters.
BM25_WORD = r"(?u)\b\w+\b"
Run: TypeAlias = dict[str, list[tuple[str, float]]]


@dataclass(frozen=True)
class TestCollection:
    """Documents, the queries that are judged, and their judgements.

    Attributes:
        name: Name of the folder.
        documents: The whole corpus.
        queries: Queries with at least one relevant document.
        judgements: Query id -> document id -> grade.
        keeps_identical: Whether a document that has the id of the query is a hit like any other.
            BEIR leaves it out: there the two are one text.
        missing_documents: Judged documents, counted for each query, that the corpus lacks. As in
            BEIR they stay in the judgements, so that a relevant one counts as not found.
        missing_queries: Judged queries that are not there, and left out.
    """

    __test__ = False  # not a test, whatever pytest makes of the name

    name: str
    documents: Sequence[Record]
    queries: Sequence[Record]
    judgements: dict[str, dict[str, int]]
    keeps_identical: bool = False
    missing_documents: int = 0
    missing_queries: int = 0

    @classmethod
    def load(
        cls, folder: str | Path, *, split: str | None = None, keeps_identical: bool = False
    ) -> TestCollection:
        """Reads a BEIR folder into memory, with the judgements of a split.

        Without one, `test` is taken, or the only split there is.

        Raises:
            InputError: A file is missing or wrong, or no query has a relevant document.
        """
        reader = BeirFolder(folder, split=split)
        judgements = reader.judgements()
        everything = list(reader.queries())
        queries = [
            query
            for query in everything
            if any(grade > 0 for grade in judgements.get(str(query.id), {}).values())
        ]
        documents = list(reader.documents())
        if not queries or not documents:
            raise InputError(
                f"{folder}: expected documents and queries with a relevant document, got "
                f"{len(documents)} documents and {len(queries)} such queries; "
                "queries.jsonl and qrels must use the same ids."
            )
        known = {str(document.id) for document in documents}
        judged = [set(judgements[str(query.id)]) for query in queries]
        return cls(
            Path(folder).resolve().name,
            documents,
            queries,
            judgements,
            keeps_identical,
            sum(len(ids - known) for ids in judged),
            len(set(judgements) - {str(query.id) for query in everything}),
        )

    @property
    def identical(self) -> int:
        """Queries that have the id of a document."""
        known = {str(document.id) for document in self.documents}
        return sum(str(query.id) in known for query in self.queries)

    @property
    def document_texts(self) -> list[str]:
        """Texts of all documents."""
        return [document.text for document in self.documents]

    @property
    def query_texts(self) -> list[str]:
        """Texts of the judged queries."""
        return [query.text for query in self.queries]


@dataclass(frozen=True)
class Quality:
    """What was measured of one ranker on one collection.

    Attributes:
        ranker: Name of the model, or `"BM25"`.
        mode: `"full"`, `"alpha"` or `"beta"`; None for BM25.
        ndcg_10: Mean nDCG@10.
        recall_100: Mean Recall@100.
        mrr_10: Mean reciprocal rank within 10.
        document_nonzeros: Mean weights in a document vector; None for BM25.
        query_nonzeros: Mean weights in a query vector; None for BM25.
        flops: Expected multiplications for one query against one document; None for BM25.
        encode_documents_s: Seconds from texts to vectors or token sets; for BM25 to words.
        encode_queries_s: The same for the queries.
        index_s: Seconds to write the vectors to the store and make them searchable.
        search_ms: Milliseconds a query, once encoded, mean.
        ndcg_10_of: Query id -> nDCG@10.
    """

    ranker: str
    mode: Mode | None
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
    ndcg_10_of: Mapping[str, float] = field(default_factory=dict, repr=False)


def evaluate_model(
    collection: TestCollection, encoder: SparseEncoder, *, store: Collection | None = None
) -> Quality:
    """Encodes, indexes and searches a collection with a model.

    Without a `store` to write to, an embedded collection is made and removed afterwards.
    """
    if store is not None:
        return evaluate_store(collection, encoder, store, ["full"])[0]
    return evaluate_modes(collection, encoder, ["full"])[0]


def evaluate_store(
    collection: TestCollection,
    encoder: SparseEncoder,
    store: Collection,
    modes: Sequence[Mode],
    *,
    is_filled: bool = False,
) -> list[Quality]:
    """The same for modes whose documents are alike, in a store of any kind.

    Args:
        collection: What to search.
        encoder: The model.
        store: Where to write to.
        modes: `"beta"` alone, or others.
        is_filled: Search what the store holds, and write nothing.
    """
    return _Vectors(collection, encoder).searched(store, modes, is_filled=is_filled)


def evaluate_modes(
    collection: TestCollection, encoder: SparseEncoder, modes: Sequence[Mode] = MODES
) -> list[Quality]:
    """The same for several modes; texts are encoded once, and modes share an index where they can.

    Returns:
        What was measured, in the order of `MODES`.

    Raises:
        ConfigError: A mode is unknown.
    """
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown or not modes:
        raise ConfigError(f"`modes` must be some of {list(MODES)}, got {list(modes)}.")
    vectors = _Vectors(collection, encoder)
    measured: list[Quality] = []
    encoded: list[Mode] = [mode for mode in MODES if mode in modes and mode != "beta"]
    if encoded:
        with opened(encoder) as store:
            measured += vectors.searched(store, encoded)
    if "beta" in modes:
        with opened(encoder, tokens=True) as store:
            measured += vectors.searched(store, ["beta"])
    return measured


def evaluate_bm25(collection: TestCollection) -> Quality:
    """BM25 over English word stems (k1 1.2, b 0.75, Lucene's variant, no stop words).

    Raises:
        InputError: No document has a word.
        MissingExtraError: `bm25s` or `PyStemmer` is not installed.
    """
    bm25s = require("bm25s", "cli")
    stemmer = require("Stemmer", "cli").Stemmer("english")

    options = {"stopwords": None, "stemmer": stemmer, "token_pattern": BM25_WORD}
    words = partial(bm25s.tokenize, **options, show_progress=False)
    timer = Timer()
    documents = words(collection.document_texts)
    if not documents.vocab:
        raise InputError(f"{collection.name}: no document has a word that BM25 could find.")
    encode_documents_s = timer.lap()
    queries = words(collection.query_texts)
    encode_queries_s = timer.lap()
    index = bm25s.BM25(k1=BM25_K1, b=BM25_B, method="lucene")
    index.index(documents, show_progress=False)
    index_s = timer.lap()
    depth = min(DEPTH + 1, len(collection.documents))
    found, scores = index.retrieve(queries, k=depth, show_progress=False)
    search_s = timer.lap()
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
        None,
        *means(run, collection),
        None,
        None,
        None,
        encode_documents_s,
        encode_queries_s,
        index_s,
        1000 * search_s / len(collection.queries),
        ndcg_of(run, collection),
    )


# Steps, shared with `vdr_db.evaluation.sweep`


class Timer:
    """Seconds since the lap before."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call, or since the start."""
        now = time.perf_counter()
        passed, self._start = now - self._start, now
        return passed


@contextmanager
def opened(encoder: SparseEncoder, *, tokens: bool = False) -> Iterator[VDRQdrant]:
    """An embedded collection that is gone afterwards; with `tokens`, one for mode beta."""
    from vdr_db.connectors import VDRQdrant

    documents: Documents = "tokens" if tokens else "encoded"
    with VDRQdrant("evaluate", encoder, path=":memory:", documents=documents) as store:
        yield store


def fill(store: Collection, collection: TestCollection, rows: SparseRows) -> float:
    """Writes the documents' vectors and texts; returns seconds until they can be searched."""
    timer = Timer()
    ids = [document.id for document in collection.documents]
    payloads = [{**document.payload, "text": document.text} for document in collection.documents]
    store.add_rows(rows, ids=ids, payloads=payloads)
    store.flush()
    return timer.lap()


def search(store: Collection, collection: TestCollection, rows: SparseRows) -> tuple[Run, float]:
    """Hits of every query, `{query id: [(document id, score)]}`, and milliseconds a query."""
    timer = Timer()
    hits = store.search_batch(rows, limit=DEPTH + 1)
    search_s = timer.lap()
    run = {
        str(query.id): [(str(hit.id), float(hit.score)) for hit in found]
        for query, found in zip(collection.queries, hits, strict=True)
    }
    return run, 1000 * search_s / len(rows)


def means(run: Run, collection: TestCollection) -> tuple[float, float, float]:
    """Mean nDCG@10, Recall@100 and MRR@10 over the judged queries."""
    run, judgements = _judged(run, collection)
    return (
        mean(ndcg(run, judgements, cutoff=10)),
        mean(recall(run, judgements, cutoff=DEPTH)),
        mean(reciprocal_rank(run, judgements, cutoff=10)),
    )


def ndcg_of(run: Run, collection: TestCollection) -> dict[str, float]:
    """nDCG@10 of each judged query."""
    return ndcg(*_judged(run, collection), cutoff=10)


def _judged(run: Run, collection: TestCollection) -> tuple[Run, dict[str, dict[str, int]]]:
    """Hits that count, and the judgements of the queries that are asked."""
    if not collection.keeps_identical:
        run = {query: [hit for hit in hits if hit[0] != query] for query, hits in run.items()}
    asked = (str(query.id) for query in collection.queries)
    return run, {query: collection.judgements[query] for query in asked}


class _Vectors:
    """Rows of a collection, each kind made once, with the seconds it took."""

    def __init__(self, collection: TestCollection, encoder: SparseEncoder) -> None:
        self._collection, self._encoder = collection, encoder
        self._made: dict[tuple[str, bool], tuple[SparseRows, float]] = {}

    def searched(
        self, store: Collection, modes: Sequence[Mode], *, is_filled: bool = False
    ) -> list[Quality]:
        """Fills a store, unless it is, and measures modes whose documents are alike."""
        collection = self._collection
        documents, encode_documents_s, index_s = None, 0.0, 0.0
        if not is_filled:
            documents, encode_documents_s = self._rows("document", tokens="beta" in modes)
        measured = []
        for i, mode in enumerate(modes):
            queries, encode_queries_s = self._rows("query", tokens=mode == "alpha")
            if i == 0 and documents is not None:
                index_s = fill(store, collection, documents)
            run, search_ms = search(store, collection, queries)
            measured.append(
                Quality(
                    self._encoder.model,
                    mode,
                    *means(run, collection),
                    None if documents is None else mean_nonzeros(documents),
                    mean_nonzeros(queries),
                    None if documents is None else flops(queries, documents),
                    encode_documents_s,
                    encode_queries_s,
                    index_s,
                    search_ms,
                    ndcg_of(run, collection),
                )
            )
        return measured

    def _rows(self, side: Side, *, tokens: bool) -> tuple[SparseRows, float]:
        if (side, tokens) not in self._made:
            is_document = side == "document"
            texts = self._collection.document_texts if is_document else self._collection.query_texts
            timer = Timer()
            if tokens:
                rows = self._encoder.bag_of_tokens(texts, side)
            elif is_document:
                rows = self._encoder.encode_documents(texts, show_progress=sys.stderr.isatty())
            else:
                rows = self._encoder.encode_queries(texts)
            self._made[side, tokens] = rows, timer.lap()
        return self._made[side, tokens]
