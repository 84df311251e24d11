"""Hard negatives: documents that a ranker puts high for a query, and that do not answer it.

The ranker is BM25, or a model through the embedded store. What it finds best may answer the query
without being listed, so the first `skip` hits can be left out. Texts of the query's own positives
always are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from vdr_db.encoders.text import SparseEncoder
from vdr_db.errors import ConfigError, InputError, require
from vdr_db.training.examples import Example

__all__ = ["Bm25Ranker", "ModelRanker", "Ranker", "arrange", "mine", "write_scored"]

BM25_K1, BM25_B = 1.2, 0.75
BATCH = 256
"""Queries ranked at once."""


class Ranker(Protocol):
    """Ranks a fixed list of documents."""

    def rank(self, queries: Sequence[str], depth: int) -> list[list[tuple[int, float]]]:
        """Best documents of each query as (number, score), best first, at most `depth`."""


class Bm25Ranker:
    """BM25 over stemmed words, by `bm25s`."""

    def __init__(self, documents: Sequence[str]) -> None:
        """Indexes the documents.

        Raises:
            MissingExtraError: `bm25s` or `PyStemmer` is not installed.
        """
        self._bm25s = require("bm25s", "cli")
        self._stemmer = require("Stemmer", "cli").Stemmer("english")
        self._count = len(documents)
        self._index = self._bm25s.BM25(k1=BM25_K1, b=BM25_B)
        self._index.index(self._tokens(documents), show_progress=False)

    def rank(self, queries: Sequence[str], depth: int) -> list[list[tuple[int, float]]]:
        """Hits with a score above 0."""
        depth = min(depth, self._count)
        found, scores = self._index.retrieve(
            self._tokens(queries), k=depth, show_progress=False, sorted=True
        )
        return [
            [(int(i), float(s)) for i, s in zip(row, values, strict=True) if s > 0]
            for row, values in zip(found, scores, strict=True)
        ]

    def _tokens(self, texts: Sequence[str]) -> object:
        return self._bm25s.tokenize(
            list(texts), stemmer=self._stemmer, stopwords="en", show_progress=False
        )


class ModelRanker:
    """A sparse encoder through the embedded store."""

    def __init__(self, documents: Sequence[str], encoder: SparseEncoder) -> None:
        """Encodes and stores the documents in a temporary collection."""
        from vdr_db.connectors import VDRQdrant

        self._store = VDRQdrant("negatives", encoder=encoder, path=":memory:")
        self._store.add_texts(documents, ids=list(range(len(documents))))

    def rank(self, queries: Sequence[str], depth: int) -> list[list[tuple[int, float]]]:
        """Hits of the model."""
        found = self._store.search_batch(list(queries), limit=depth)
        return [[(int(hit.id), float(hit.score)) for hit in hits] for hits in found]


def mine(
    examples: Sequence[Example],
    make_ranker: Callable[[Sequence[str]], Ranker],
    *,
    count: int,
    depth: int = 50,
    skip: int = 0,
    with_scores: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Example]:
    """Examples with the hardest negatives among all examples' documents.

    Args:
        examples: Queries and positives; negatives they have are documents too.
        make_ranker: Makes a ranker of the documents.
        count: Negatives of each query.
        depth: How many hits are looked at.
        skip: How many of the best hits are left out.
        with_scores: Keep the ranker's scores as a teacher's; the positive's is 0 where it is not
            among the hits.
        progress: Called with queries done and queries in all.

    Yields:
        The examples in order; those with fewer than `count` hits have fewer negatives.

    Raises:
        ConfigError: `count`, `depth` or `skip` is impossible.
        InputError: There is no example.
    """
    if count < 1 or skip < 0 or depth < count + skip:
        raise ConfigError(
            "`count` must be at least 1 and `depth` at least `count` + `skip`, got "
            f"count={count}, depth={depth}, skip={skip}."
        )
    if not examples:
        raise InputError("mining needs at least one example, got none.")
    texts = [text for item in examples for text in (*item.positives, *item.negatives)]
    documents = list(dict.fromkeys(texts))
    ranker = make_ranker(documents)
    for start in range(0, len(examples), BATCH):
        part = examples[start : start + BATCH]
        hits = ranker.rank([item.query for item in part], depth)
        for item, found in zip(part, hits, strict=True):
            ranked = [(documents[i], score) for i, score in found]
            wrong = [hit for hit in ranked[skip:] if hit[0] not in item.positives][:count]
            scores = None
            if with_scores:
                of_positive = dict(ranked).get(item.positives[0], 0.0)
                scores = (of_positive, *(score for _, score in wrong))
            yield replace(item, negatives=tuple(text for text, _ in wrong), scores=scores)
        if progress is not None:
            progress(start + len(part), len(examples))


def arrange(examples: Sequence[Example], group: int, *, seed: int = 0) -> list[Example]:
    """Examples in an order in which neighbours are hard for each other.

    Each group is a random example and the examples whose positives are its negatives, hardest
    first. Read in file order (`data.buffer: 0`, `data.bucket: 1`), every batch holds hard negatives
    that cost nothing: they are other queries' positives.

    Args:
        examples: Mined ones.
        group: Examples of a group, at least 2.
        seed: Of the order.

    Returns:
        Every example once.
    """
    if group < 2:
        raise ConfigError(f"`group` must be at least 2, got {group}.")
    owner: dict[str, int] = {}
    for i, example in enumerate(examples):
        owner.setdefault(example.positives[0], i)
    taken = np.zeros(len(examples), bool)
    order: list[int] = []
    for first in np.random.default_rng(seed).permutation(len(examples)).tolist():
        if taken[first]:
            continue
        members = [first]
        for negative in examples[first].negatives:
            near = owner.get(negative, first)
            if len(members) < group and not taken[near] and near not in members:
                members.append(near)
        taken[members] = True
        order += members
    return [examples[i] for i in order]


def write_scored(examples: Iterable[Example], path: Path) -> int:
    """Writes examples in the format `scored`; returns how many.

    Raises:
        ConfigError: The file cannot be written.
    """
    written = 0
    try:
        with open(path, "w", encoding="utf-8") as file:
            for example in examples:
                row = asdict(example)
                del row["source"]
                if example.scores is None:
                    del row["scores"]
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                written += 1
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}; choose another place.") from error
    return written
