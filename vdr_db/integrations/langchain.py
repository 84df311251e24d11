"""LangChain: sparse embeddings for its Qdrant store, and a retriever over collections of ours.

`docs/integrations.md` has an example; for LangChain's Elasticsearch store see
`vdr_db.integrations.elasticsearch`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from vdr_db.connectors.base import Hit, Payload
from vdr_db.connectors.collections.collection import Collection, Mode
from vdr_db.errors import ConfigError, StoreError, require
from vdr_db.explain.records import is_image
from vdr_db.explain.words import shared_words, shares_of
from vdr_db.integrations.sides import TextSides, id_weight_lists
from vdr_db.sparse import SparseRows

require("langchain_core", "langchain")
require("langchain_qdrant", "langchain")

from langchain_core.callbacks import CallbackManagerForRetrieverRun  # noqa: E402
from langchain_core.documents import Document  # noqa: E402
from langchain_core.retrievers import BaseRetriever  # noqa: E402
from langchain_qdrant import SparseEmbeddings, SparseVector  # noqa: E402

__all__ = ["VDRRetriever", "VDRSparseEmbeddings"]


class VDRSparseEmbeddings(TextSides, SparseEmbeddings):  # type: ignore[misc]
    """An encoder as the `sparse_embedding` of `langchain_qdrant.QdrantVectorStore`.

    A text without any token has an empty vector, which no search finds. Arguments and errors are
    those of `TextSides`.
    """

    def embed_documents(self, texts: list[str]) -> list[SparseVector]:
        """Vectors of documents, in their order."""
        return _vectors(self.document_rows(texts))

    def embed_query(self, text: str) -> SparseVector:
        """The vector of a query."""
        return _vectors(self.query_rows([text]))[0]


class VDRRetriever(BaseRetriever):  # type: ignore[misc]
    """The best documents of a `VDRQdrant` or `VDRElasticsearch` collection, with the reasons.

    Each document has its id (as text), its text, and as metadata the payload, the score, and the
    words it shares with the query: word → share of the score, largest first. A document without a
    text, such as an image, has an empty one. `limit`, `filter` and
    `mode` can also be given for one call: `retriever.invoke(query, limit=3)`.

    Attributes:
        collection: Where to search; opened with an encoder.
        limit: Documents wanted.
        filter: Conditions on payloads, see `vdr_db.filters`.
        mode: How the query is represented, see `Mode`.
        words: Matched words told at most. Above 0 it takes a second request, for the vectors of the
            hits; 0 does without.
        score_key: Metadata field of the score.
        words_key: Metadata field of the matched words.
    """

    collection: Collection
    limit: int = 10
    filter: Any = None
    mode: Mode | None = None
    words: int = 10
    score_key: str = "score"
    words_key: str = "matched_words"

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> VDRRetriever:
        """A copy; it asks the same collection, which is open once."""
        copied: VDRRetriever = super().__deepcopy__(
            {**(memo or {}), id(self.collection): self.collection}
        )
        return copied

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        limit: int | None = None,
        filter: Any = None,
        mode: Mode | None = None,
    ) -> list[Document]:
        encoder = self.collection.encoder
        if encoder is None:
            raise ConfigError("the retriever needs an encoder; open its collection with encoder=.")
        mode = self.mode if mode is None else mode
        row = TextSides(encoder, mode="full" if mode is None else mode).query_rows([query])
        hits = self.collection.search(
            row,
            self.limit if limit is None else limit,
            self.filter if filter is None else filter,
            mode=mode,
        )
        shares = self._shares(row, hits) if self.words > 0 else [None] * len(hits)
        return [self._document(query, hit, share) for hit, share in zip(hits, shares, strict=True)]

    def _shares(self, query: SparseRows, hits: Sequence[Hit]) -> list[dict[int, float] | None]:
        """For each hit, token id → what it adds to the score."""
        try:
            records = self.collection.records_of(hits)
        except StoreError as error:
            if type(error) is not StoreError:
                raise
            raise StoreError(
                f"matched words need the vectors of the hits ({error}) Pass words=0 to do without."
            ) from error
        found = {record.id: record.row for record in records}
        return [shares_of(query, found.get(hit.id)) for hit in hits]

    def _document(self, query: str, hit: Hit, shares: Mapping[int, float] | None) -> Document:
        metadata: Payload = dict(hit.payload)
        text = metadata.pop(self.collection.text_key, None)
        if not isinstance(text, str):
            if not is_image(hit.payload):
                warnings.warn(
                    f"document {hit.id!r} has no text in the payload field "
                    f"{self.collection.text_key!r} and comes without; add texts with "
                    "store_text=True, or open the collection with the `text_key` it was filled "
                    "with.",
                    stacklevel=2,
                )
            text = ""
        told: Payload = {self.score_key: hit.score}
        encoder = self.collection.encoder
        if shares is not None and encoder is not None:
            words = shared_words(encoder, [query, text], shares)
            told[self.words_key] = dict(words[: self.words])
        for name, option in ((self.score_key, "score_key"), (self.words_key, "words_key")):
            if name in told and name in metadata:
                raise ConfigError(
                    f"document {hit.id!r} has a payload field {name!r} of its own; pass another "
                    f"`{option}` to the retriever."
                )
        return Document(id=str(hit.id), page_content=text, metadata={**metadata, **told})


def _vectors(rows: SparseRows) -> list[SparseVector]:
    return [SparseVector(indices=ids, values=weights) for ids, weights in id_weight_lists(rows)]
