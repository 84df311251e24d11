"""What a collection needs of an encoder, and how queries and documents are represented."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias

from vdr_db.connectors.base import Documents
from vdr_db.errors import ConfigError
from vdr_db.sparse import SparseRows
from vdr_db.stamp import EncoderStamp

__all__ = ["Encoder", "Mode", "checked_mode", "query_rows", "text_encoder"]

Mode: TypeAlias = Literal["full", "alpha", "beta"]
"""How query and documents are represented.

| mode  | query            | documents        | model is needed            |
|-------|------------------|------------------|----------------------------|
| full  | encoded          | encoded          | for queries and documents  |
| alpha | bag of tokens    | encoded          | for documents only         |
| beta  | encoded          | bags of tokens   | for queries only           |
"""


class _Tokens(Protocol):
    @property
    def size(self) -> int: ...

    def token(self, token_id: int, /) -> str: ...


class Encoder(Protocol):
    """What a collection needs of an encoder; `vdr_db.SparseEncoder` is one."""

    @property
    def vocabulary(self) -> _Tokens:
        """Names of the token ids."""

    def stamp(self) -> EncoderStamp:
        """Identity of the encoder."""

    def encode_documents(self, texts: Sequence[str], /) -> SparseRows:
        """Vectors of documents."""

    def encode_queries(self, texts: Sequence[str], /) -> SparseRows:
        """Vectors of queries."""

    def bag_of_tokens(self, texts: Sequence[str], /) -> SparseRows:
        """Token sets with weight 1."""


def text_encoder(encoder: Encoder | None, what: str) -> Encoder:
    """The encoder, for work with texts.

    Raises:
        ConfigError: There is none, or it reads images only.
    """
    if encoder is None:
        raise ConfigError(
            f"`{what}` with texts needs an encoder; open the collection with encoder=..., or "
            "use SparseRows."
        )
    if not hasattr(encoder, "encode_queries"):
        raise ConfigError(
            f"`{what}` with texts needs an encoder that reads texts, got "
            f"{type(encoder).__name__}; open the collection with a vdr_db.CrossModalEncoder."
        )
    return encoder


def checked_mode(mode: Mode | None, documents: Documents) -> Mode:
    """The mode of a search, `None` for what is usual with such documents.

    Raises:
        ConfigError: The mode does not fit the documents.
    """
    usual: Mode = "beta" if documents == "tokens" else "full"
    mode = usual if mode is None else mode
    if mode not in ("full", "alpha", "beta"):
        raise ConfigError(f"`mode` must be 'full', 'alpha' or 'beta', got {mode!r}.")
    if (mode == "beta") != (documents == "tokens"):
        held = "bags of tokens" if documents == "tokens" else "encoded documents"
        raise ConfigError(
            f"mode {mode!r} cannot be searched in a collection of {held}; "
            f"use mode {usual!r}, or build a collection with another `documents`."
        )
    return mode


def query_rows(
    encoder: Encoder | None, queries: str | Sequence[str] | SparseRows, mode: Mode
) -> SparseRows:
    """Queries as rows; rows stay as they are.

    Raises:
        ConfigError: There is no encoder for texts.
        TypeError: A query is neither.
    """
    if isinstance(queries, SparseRows):
        return queries
    encoder = text_encoder(encoder, "search")
    texts = [queries] if isinstance(queries, str) else queries
    if not isinstance(texts, Sequence):
        raise TypeError(f"queries must be strings or SparseRows, got {type(texts).__name__}")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"queries must be strings, got {type(text).__name__}: {text!r}")
    return encoder.bag_of_tokens(texts) if mode == "alpha" else encoder.encode_queries(texts)
