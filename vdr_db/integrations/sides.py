"""The two sides of a search as frameworks ask for them: texts in, ids and weights in lists out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, get_args

from vdr_db.connectors.collections.collection import Mode
from vdr_db.errors import ConfigError
from vdr_db.sparse import SparseRows

__all__ = ["TextEncoder", "checked_mode", "document_rows", "id_weight_lists", "query_rows"]


class TextEncoder(Protocol):
    """What an adapter needs of an encoder; `vdr_db.SparseEncoder` is one."""

    def encode_documents(self, texts: Sequence[str], /) -> SparseRows:
        """Vectors of documents."""

    def encode_queries(self, texts: Sequence[str], /) -> SparseRows:
        """Vectors of queries."""

    def bag_of_tokens(self, texts: Sequence[str], /) -> SparseRows:
        """Token sets with weight 1."""


def checked_mode(mode: Mode) -> Mode:
    """The mode, if there is such a one.

    Raises:
        ConfigError: There is not.
    """
    if mode not in get_args(Mode):
        raise ConfigError(f"`mode` must be 'full', 'alpha' or 'beta', got {mode!r}.")
    return mode


def document_rows(encoder: TextEncoder, texts: Sequence[str], mode: Mode = "full") -> SparseRows:
    """Documents as `mode` stores them: bags of tokens in beta, else encoded."""
    if checked_mode(mode) == "beta":
        return encoder.bag_of_tokens(texts)
    return encoder.encode_documents(texts)


def query_rows(encoder: TextEncoder, texts: Sequence[str], mode: Mode = "full") -> SparseRows:
    """Queries as `mode` asks them: bags of tokens in alpha, else encoded."""
    if checked_mode(mode) == "alpha":
        return encoder.bag_of_tokens(texts)
    return encoder.encode_queries(texts)


def id_weight_lists(rows: SparseRows) -> Iterator[tuple[list[int], list[float]]]:
    """Token ids and weights of each row as lists of Python numbers."""
    for i in range(len(rows)):
        ids, weights = rows.row(i)
        yield ids.tolist(), weights.tolist()
