"""The part of a collection that searches and tells reasons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from vdr_db.connectors.base import Documents, Hit, Id, Record, Term
from vdr_db.connectors.collections.encoding import Encoding, Mode, checked_mode
from vdr_db.connectors.collections.scores import reranked, shared_terms
from vdr_db.connectors.collections.stored import StoredDocuments
from vdr_db.connectors.documents import DocumentView
from vdr_db.connectors.feed import refuse_string
from vdr_db.counts import counted
from vdr_db.errors import ConfigError, InputError, ShapeError
from vdr_db.images.reading import ImageSource
from vdr_db.sparse import SparseRows

__all__ = ["Reading"]


class Reading(StoredDocuments):
    """What `Collection` finds in its store."""

    _documents: Documents
    _encoding: Encoding

    def search(
        self,
        query: str | SparseRows,
        limit: int = 10,
        filter: Any = None,
        *,
        offset: int = 0,
        mode: Mode | None = None,
        rerank: int | None = None,
        min_score: float | None = None,
        best_passages: int = 1,
    ) -> list[Hit]:
        """The best documents for a query, best first.

        Args:
            query: A text, or a vector of one row.
            limit: Hits wanted; fewer come when fewer documents share a token with the query.
            filter: Conditions on payloads, see `vdr_db.filters`.
            offset: Hits to leave out at the start.
            mode: How the query is represented, see `Mode`; by default `"full"`, or `"beta"` in a
                collection of bags of tokens.
            rerank: Take this many hits and order them anew by the full score, with documents
                encoded now from their stored texts. Meant for mode beta.
            min_score: Least score of a hit.
            best_passages: In a collection of passages, how many of a document add up to its score.

        Raises:
            ConfigError: The mode does not fit the collection, or a number is impossible.
        """
        row = self._query_rows(query, mode)
        search = self._search_of(best_passages)
        if rerank is None:
            return search(row, limit, filter, offset, min_score=min_score)
        rerank = counted("rerank", rerank)
        if rerank < limit + offset:
            raise ConfigError(
                f"`rerank` must be at least limit + offset = {limit + offset}, got {rerank}."
            )
        self._encoding.need("rerank")
        hits = search(row, rerank, filter)
        best = reranked(hits, row, self._encoding.documents, self.text_key)
        page = best[offset : offset + limit]
        return [hit for hit in page if min_score is None or hit.score >= min_score]

    def search_by_image(
        self, image: ImageSource, limit: int = 10, filter: Any = None, *, offset: int = 0
    ) -> list[Hit]:
        """The best documents for an image, texts and images alike, best first.

        Args:
            image: A path, the bytes of a file, a PIL image or an array.
            limit: Hits wanted.
            filter: Conditions on payloads: `{"modality": "image"}` finds images alone.
            offset: Hits to leave out at the start.

        Raises:
            ConfigError: The encoder reads no images.
            InputError: The image cannot be read.
        """
        return self.search(self.encode_query_image(image), limit, filter, offset=offset)

    def encode_query_image(self, image: ImageSource) -> SparseRows:
        """The vector of an image as a query, one row; errors as in `search_by_image`."""
        encoded = self._encoding.images("search_by_image")([image])
        if encoded.refused:
            raise InputError(f"{encoded.names[0]} cannot be searched for: {encoded.refused[0]}.")
        return encoded.rows

    def search_batch(
        self,
        queries: Sequence[str] | SparseRows,
        limit: int = 10,
        filter: Any = None,
        *,
        offset: int = 0,
        mode: Mode | None = None,
        min_score: float | None = None,
        best_passages: int = 1,
    ) -> list[list[Hit]]:
        """`search` for several queries at once, in their order.

        Raises:
            TypeError: One string came instead of several.
        """
        if not isinstance(queries, SparseRows):
            refuse_string(queries, "queries")
        rows, view = self._query_rows(queries, mode), self._view
        if isinstance(view, DocumentView):
            return view.search_batch(
                rows, limit, filter, offset, min_score=min_score, best=best_passages
            )
        self._search_of(best_passages)
        return view.search_batch(rows, limit, filter, offset, min_score=min_score)

    def records_of(self, hits: Sequence[Hit]) -> list[Record]:
        """What each hit shows, with its vector: the document, or its passage; none for lost ones.

        The vector has what makes the score; `get` has the whole text.
        """
        view = self._view
        if isinstance(view, DocumentView):
            return view.passages_of(hits)
        return view.get([hit.id for hit in hits], with_rows=True)

    def explain(self, query: str | SparseRows, id: Id, *, mode: Mode | None = None) -> list[Term]:
        """What every shared token adds to the score of a document, the largest part first.

        The products add up to the score of a search, up to the precision of the store. Of a
        document in passages it is the passage that matches best.

        Raises:
            InputError: There is no document with this id.
        """
        row = self._query_rows(query, mode)
        record = self.matched(row, id)
        if record.row is None:
            raise InputError(f"there is no vector of the document {id!r} in {self.store!r}.")
        return shared_terms(row, record.row, self._encoding.token)

    def matched(self, row: SparseRows, id: Id) -> Record:
        """What of a document matches a query of one row best, with its vector: it, or a passage.

        Raises:
            InputError: There is no document with this id.
        """
        if len(row) != 1:
            raise ShapeError(f"`explain` takes one query, got {len(row)} rows.")
        view = self._view
        if isinstance(view, DocumentView):
            found = view.best_passage(row, id)
        else:
            found = next(iter(view.get([id], with_rows=True)), None)
        if found is None:
            raise InputError(f"there is no document with the id {id!r} in {self.store!r}.")
        return found

    def _search_of(self, best_passages: int) -> Callable[..., list[Hit]]:
        view = self._view
        if isinstance(view, DocumentView):
            return partial(view.search, best=best_passages)
        if best_passages != 1:
            raise ConfigError(
                f"`best_passages` is of a collection of passages, got {best_passages!r}; add texts "
                "with passages=True to a new one."
            )
        return view.search

    def _query_rows(
        self, queries: str | Sequence[str] | SparseRows, mode: Mode | None
    ) -> SparseRows:
        return self._encoding.queries(queries, checked_mode(mode, self._documents))
