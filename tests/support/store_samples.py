"""What tests of stores share: an encoder without a model, rows, payloads, filters, comparisons."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from vdr_db.connectors import Hit, MemoryStore, QdrantStore, Store
from vdr_db.sparse import SparseRows
from vdr_db.stamp import EncoderStamp
from vdr_db.text.vocabulary import Vocabulary

WIDTH = 40
TEXT = (
    "who came up with relativity einstein published the theory in 1905 chess is a game of kings "
    "and go stones paris capital france light travels fast"
)
WORDS = ("[PAD]", *TEXT.split())


class WordEncoder:
    """Every known word is a token, and earlier words of a text weigh more.

    `calls` holds the sizes of the batches it was asked to encode.
    """

    def __init__(self, model: str = "words", *, tokens: Sequence[str] = WORDS) -> None:
        self.vocabulary = Vocabulary(tokens, special_ids=[0])
        self.model = model
        self.calls: list[int] = []

    def stamp(self) -> EncoderStamp:
        return EncoderStamp(
            model=self.model,
            tokenizer=self.vocabulary.fingerprint,
            vocabulary=self.vocabulary.kind,
            head="mlm",
            activation="log1p_relu",
        )

    def _ids(self, text: str) -> list[int]:
        words = re.findall(r"\w+", text.lower())
        return [self.vocabulary.id(word) for word in words if word in self.vocabulary.tokens]

    def encode_documents(self, texts: Sequence[str]) -> SparseRows:
        assert not isinstance(texts, str)
        self.calls.append(len(texts))
        rows: list[dict[int, float]] = []
        for text in texts:
            row: dict[int, float] = {}
            for place, id in enumerate(self._ids(text)):
                row[id] = max(row.get(id, 0.0), 2.0 / (1 + place) + 0.5)
            rows.append(row)
        return SparseRows.from_dicts(rows, self.vocabulary.size)

    def encode_queries(self, texts: Sequence[str]) -> SparseRows:
        return self.encode_documents(texts)

    def bag_of_tokens(self, texts: Sequence[str], side: str = "document") -> SparseRows:
        assert not isinstance(texts, str)
        rows = [dict.fromkeys(self._ids(text), 1.0) for text in texts]
        return SparseRows.from_dicts(rows, self.vocabulary.size)


def row(weights: Mapping[int, float], width: int = WIDTH) -> SparseRows:
    """One row."""
    return SparseRows.from_dicts([weights], width)


def rows(count: int, *, nnz: int = 4, width: int = WIDTH, seed: int = 0) -> SparseRows:
    """Random rows with ties among their weights."""
    random = np.random.default_rng(seed)
    return SparseRows.from_dicts(
        [
            {int(i): float(random.integers(1, 9)) / 4 for i in random.choice(width, nnz, False)}
            for _ in range(count)
        ],
        width,
    )


def opened(kind: str, **options: Any) -> AbstractContextManager[Store]:
    """A new store of a kind: `memory`, `edge` (embedded engine) or `client` (its Python double)."""
    store: Any
    if kind == "memory":
        store = MemoryStore()
    elif kind == "edge":
        store = QdrantStore("documents", path=":memory:", **options)
    else:
        client = pytest.importorskip("qdrant_client").QdrantClient(":memory:")
        store = QdrantStore("documents", client=client)
    return store


weights = st.floats(2.0**-10, 2.0**10, width=32)
some_rows = st.lists(
    st.dictionaries(st.integers(0, WIDTH - 1), weights, max_size=10), min_size=0, max_size=12
).map(lambda dicts: SparseRows.from_dicts(dicts, WIDTH))
some_ids = st.one_of(
    st.integers(0, 2**64 - 1), st.text(min_size=1, max_size=20), st.uuids().map(str)
)

# Neighbours that are one float64.
BIG = (2**53, 2**53 + 1, -(2**53) - 1, 2**60 + 1, 2**60 + 2, 2**60 + 130)
_times = st.sampled_from(
    ["2020-01-01", "2020-01-01T10:00:00Z", "2020-01-01 12:00:00+02:00", "2021-05-05T00:00:00.25Z"]
)
_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([0.5, 1.0, -2.0, *BIG, float(2**53)]),
    st.sampled_from(["a", "b", "1", ""]),
    _times,
)
_values = st.one_of(_scalars, st.lists(_scalars, max_size=3))
payloads = st.dictionaries(
    st.sampled_from(["x", "y", "odd name", "a.b", "not"]),
    st.one_of(
        _values,
        st.dictionaries(st.sampled_from(["x", "z"]), _values, max_size=2),
        st.lists(st.dictionaries(st.just("z"), _values, max_size=1), max_size=2),
    ),
    max_size=4,
)
_keys = st.sampled_from(
    ["x", "y", "x.z", "x.x", "x[].z", '"odd name"', '"a.b"', '"not"', "missing"]
)
_wanted = _scalars.filter(lambda value: value is not None)
_ranges = st.one_of(
    st.dictionaries(
        st.sampled_from(["gt", "gte", "lt", "lte"]),
        st.one_of(st.integers(-3, 3), st.sampled_from([0.5, *BIG, float(2**53)])),
        min_size=1,
        max_size=2,
    ),
    st.dictionaries(st.sampled_from(["gt", "gte", "lt", "lte"]), _times, min_size=1, max_size=2),
)
_conditions = st.one_of(
    st.dictionaries(_keys, st.one_of(_wanted, st.lists(_wanted, max_size=3), _ranges), max_size=2),
    st.dictionaries(st.sampled_from(["x", "y", "x.z", "missing"]), st.none(), max_size=1),
)
filters = st.recursive(
    _conditions,
    lambda inner: st.one_of(
        inner.map(lambda one: {"not": one}),
        st.lists(inner, max_size=3).map(lambda several: {"any": several}),
        st.lists(inner, max_size=3).map(lambda several: {"all": several}),
    ),
    max_leaves=4,
)


def assert_same_hits(
    found: Sequence[Hit], exact: Sequence[Hit], limit: int, *, rel: float = 1e-6
) -> None:
    """Hits equal the exact ones in number and score, and in order up to equal scores.

    Args:
        found: What a store answered.
        exact: All hits of the oracle.
        limit: How many were asked for.
        rel: Relative difference of scores that counts as equal.
    """
    assert len(found) == min(limit, len(exact))
    score_of = {hit.id: hit.score for hit in exact}
    assert len({hit.id for hit in found}) == len(found)
    for hit, best in zip(found, exact, strict=False):
        assert hit.score == pytest.approx(best.score, rel=rel)
        assert hit.score == pytest.approx(score_of[hit.id], rel=rel)
