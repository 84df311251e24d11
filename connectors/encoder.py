"""What collections, ingest and bridges need of an encoder; `vdr_db.SparseEncoder` is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias

from vdr_db.connectors.base import Store
from vdr_db.connectors.images import EncodeImages
from vdr_db.sparse import SparseRows
from vdr_db.stamp import EncoderStamp

__all__ = ["Encoder", "HoldsStore", "ImageReader", "Target"]


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

    def bag_of_tokens(
        self, texts: Sequence[str], /, side: Literal["document", "query"] = "document"
    ) -> SparseRows:
        """Token sets with weight 1, or with the own weights of a side."""


class ImageReader(Protocol):
    """What ingest needs of an encoder of images alone; `vdr_db.ImageEncoder` is one."""

    @property
    def vocabulary(self) -> _Tokens:
        """Names of the token ids."""

    @property
    def encode_images(self) -> EncodeImages:
        """Vectors of images."""

    def stamp(self) -> EncoderStamp:
        """Identity of the encoder."""


class HoldsStore(Protocol):
    """A collection: a store, and what is known of how its documents are kept."""

    @property
    def store(self) -> Store:
        """Where documents go."""


Target: TypeAlias = Store | HoldsStore
"""What can be written to: a store, or a collection."""
