"""`VDRQdrant`: what users hold, a `Collection` in Qdrant."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vdr_db.connectors.base import Documents
from vdr_db.connectors.collection import Collection, Encoder
from vdr_db.connectors.qdrant import QdrantStore

if TYPE_CHECKING:
    from vdr_db.connectors.qdrant_engine import Datatype, IndexKind

__all__ = ["VDRQdrant"]


class VDRQdrant(Collection):
    """A `Collection` in Qdrant: embedded in a folder, in memory, or on a server.

    Exactly one of `path`, `url` and `client` is needed.

    Args:
        collection: Name of the collection.
        encoder: Makes vectors of texts; without one, only rows can be added and searched.
        path: Folder of its own for the collection, or `":memory:"`.
        url: Address of a server.
        client: A ready `qdrant_client.QdrantClient`.
        api_key: For `url`.
        documents: `"tokens"` keeps bags of tokens instead of encoded documents (mode beta).
        store_text: Keep each text in its payload.
        text_key: Payload field of the text.
        datatype: `"float32"` (default), `"float16"` or `"uint8"`: how the index keeps weights.
        payload_indexes: Payload key → kind of index, for faster filters; see `QdrantStore`.
        options: More options of `QdrantStore`.

    Raises:
        ConfigError: The options contradict each other.
        StoreMismatch: The place holds something else, or the collection is of another encoder.
        StoreUnavailable: It cannot be reached, or another process has it open.
    """

    def __init__(
        self,
        collection: str,
        encoder: Encoder | None = None,
        *,
        path: str | os.PathLike[str] | None = None,
        url: str | None = None,
        client: Any = None,
        api_key: str | None = None,
        documents: Documents | None = None,
        store_text: bool = True,
        text_key: str = "text",
        datatype: Datatype | None = None,
        payload_indexes: Mapping[str, IndexKind] | None = None,
        **options: Any,
    ) -> None:
        store = QdrantStore(
            collection,
            path=path,
            url=url,
            client=client,
            api_key=api_key,
            datatype=datatype,
            payload_indexes=payload_indexes,
            **options,
        )
        try:
            super().__init__(
                store, encoder, documents=documents, store_text=store_text, text_key=text_key
            )
        except BaseException:
            store.close()
            raise

    def __enter__(self) -> VDRQdrant:
        """The collection itself."""
        return self
