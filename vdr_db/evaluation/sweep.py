"""Quality and cost over k, the weights kept of a query and of a document, from one encoding.

Texts are encoded once, at the largest k; a smaller k keeps the largest weights of each row, which
is what encoding with that k gives. Each pair is searched as in `vdr_db.evaluation.quality`.

k = 0 keeps a text's own tokens with the weights the model gives them. In mode alpha the query is a
bag of tokens with weight 1, in beta the document.

Source: Zhou et al. 2024, Retrieval-based Disentangled Representation Learning, appendix, tables 4
(text) and 5 (images).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from vdr_db.connectors.collections.collection import Mode
from vdr_db.errors import ConfigError
from vdr_db.evaluation.metrics import flops, mean_nonzeros
from vdr_db.evaluation.quality import MODES, TestCollection, fill, means, opened, search
from vdr_db.sparse import SparseRows

if TYPE_CHECKING:
    from vdr_db.encoders.text import SparseEncoder

__all__ = ["DEFAULT_KS", "SweepPoint", "sweep_k"]

DEFAULT_KS = (8, 16, 32, 64, 128, 256, 768)


@dataclass(frozen=True)
class SweepPoint:
    """What was measured for one pair of query and document k.

    Attributes:
        mode: `"full"`, `"alpha"` or `"beta"`.
        query_k: Weights kept of a query, 0 for its own tokens; None for a bag of tokens.
        document_k: The same of a document.
        ndcg_10: Mean nDCG@10.
        recall_100: Mean Recall@100.
        mrr_10: Mean reciprocal rank within 10.
        query_nonzeros: Mean weights in a query vector, less than k where a text has no more.
        document_nonzeros: Mean weights in a document vector.
        flops: Expected multiplications for one query against one document.
        search_ms: Milliseconds a query, mean.
    """

    mode: Mode
    query_k: int | None
    document_k: int | None
    ndcg_10: float
    recall_100: float
    mrr_10: float
    query_nonzeros: float
    document_nonzeros: float
    flops: float
    search_ms: float


def sweep_k(
    collection: TestCollection,
    encoder: SparseEncoder,
    *,
    query_ks: Sequence[int] = DEFAULT_KS,
    document_ks: Sequence[int] = DEFAULT_KS,
    modes: Sequence[Mode] = ("full",),
) -> list[SweepPoint]:
    """Measures every pair of a query k and a document k.

    The model's own k, and whether it keeps a text's own tokens in any case, do not count.

    The mode `"full"` pairs the two; `"alpha"` pairs bags of tokens with `document_ks`, `"beta"`
    `query_ks` with bags of tokens.

    Returns:
        One point a pair: by document k, then query k, bags of tokens last.

    Raises:
        ConfigError: A k is negative or there is none, or a mode is unknown.
    """
    for name, ks in (("query_ks", query_ks), ("document_ks", document_ks)):
        if not ks or min(ks) < 0:
            raise ConfigError(f"`{name}` must be some numbers from 0 on, got {list(ks)}.")
    if not modes or not set(modes) <= set(MODES):
        raise ConfigError(f"`modes` must be some of {list(MODES)}, got {list(modes)}.")
    queries: dict[int | None, SparseRows] = {}
    documents: dict[int | None, SparseRows] = {}
    if set(modes) != {"alpha"}:
        queries.update(_levels(encoder, "query", collection.query_texts, query_ks))
    if set(modes) != {"beta"}:
        documents.update(_levels(encoder, "document", collection.document_texts, document_ks))
    if "alpha" in modes:
        queries[None] = encoder.bag_of_tokens(collection.query_texts, "query")
    if "beta" in modes:
        documents[None] = encoder.bag_of_tokens(collection.document_texts)
    points = []
    for document_k, document_rows in documents.items():
        with opened(encoder, tokens=document_k is None) as store:
            fill(store, collection, document_rows)
            for query_k, query_rows in queries.items():
                # Two bags of tokens are no mode: no model takes part.
                mode: Mode = "alpha" if query_k is None else "full"
                if document_k is None:
                    mode = "beta"
                if mode not in modes or (query_k is None and document_k is None):
                    continue
                run, search_ms = search(store, collection, query_rows)
                points.append(
                    SweepPoint(
                        mode,
                        query_k,
                        document_k,
                        *means(run, collection),
                        mean_nonzeros(query_rows),
                        mean_nonzeros(document_rows),
                        flops(query_rows, document_rows),
                        search_ms,
                    )
                )
    return points


def _levels(
    encoder: SparseEncoder, side: Literal["query", "document"], texts: list[str], ks: Sequence[int]
) -> dict[int | None, SparseRows]:
    """Rows of each k, ascending."""
    largest = min(max(max(ks), 1), encoder.vocabulary.columns)
    wide = copy.copy(encoder)
    # Own tokens come on top of the k largest, so they change no prefix of a row sorted by weight.
    wide.lexical = 0 in ks
    if side == "query":
        wide.query_entry = replace(encoder.query_entry, k=largest)
        rows = wide.encode_queries(texts)
    else:
        wide.document_entry = replace(encoder.document_entry, k=largest)
        rows = wide.encode_documents(texts, show_progress=sys.stderr.isatty())
    encoder.truncated = wide.truncated  # so that it warns no second time
    levels: dict[int | None, SparseRows] = {}
    for k in sorted(set(ks)):
        levels[k] = rows.topk(k) if k else _among(rows, encoder.bag_of_tokens(texts, side))
    return levels


def _among(rows: SparseRows, kept: SparseRows) -> SparseRows:
    """The entries of each row whose token the same row of `kept` has."""
    row_of, row_of_kept = (np.repeat(np.arange(len(one)), one.counts) for one in (rows, kept))
    places, kept_places = (
        row_of * rows.width + rows.indices,
        row_of_kept * rows.width + kept.indices,
    )
    chosen = np.isin(places, kept_places, assume_unique=True)
    counts = np.bincount(row_of[chosen], minlength=len(rows))
    indptr = np.concatenate([[0], np.cumsum(counts)])
    return SparseRows(indptr, rows.indices[chosen], rows.values[chosen], rows.width)
