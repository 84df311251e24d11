"""`Collection`: an encoder and a store, so that texts go in and texts with reasons come out."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vdr_db.connectors.base import Documents, EmptyRows, Hit, Id, Record, Store, Term, Written
from vdr_db.connectors.collections.encoding import (
    Encoder,
    Mode,
    checked_mode,
    query_rows,
    text_encoder,
)
from vdr_db.connectors.collections.scores import shared_terms, texts_of
from vdr_db.connectors.feed import Batch, refuse_string
from vdr_db.connectors.ids import checked_ids, id_order
from vdr_db.connectors.images import (
    EncodedImages,
    encode_query_image,
    image_batches,
    image_encoding,
)
from vdr_db.connectors.texts import text_batches
from vdr_db.errors import ConfigError, InputError, RejectedRows, ShapeError
from vdr_db.sparse import SparseRows
from vdr_db.stamp import EncoderStamp

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["STOP", "Collection", "Encoder", "Mode"]

STOP: ContextVar[threading.Event | None] = ContextVar("vdr_db_stop", default=None)
"""An event that ends what is written in this context, after the batch at hand."""


class Collection:
    """Texts in a store, found by what an encoder makes of them.

    ```python
    with VDRQdrant("articles", encoder=encoder, path="articles.qdrant") as articles:
        articles.add_texts(["Einstein published the theory in 1905."], ids=["einstein"])
        articles.search("who came up with relativity", limit=10)
        articles.explain("who came up with relativity", "einstein")
    ```

    The collection is made by the first `add_texts` or `add_rows`; searching one that was never
    written is an error, so that a mistyped name does not look like an empty answer.

    Args:
        store: Where vectors are kept; it is closed with the collection.
        encoder: Makes vectors of texts. Without one, `add_rows` and searches by row still work.
        documents: `"tokens"` keeps bags of tokens instead of encoded documents (mode beta).
        store_text: Keep each text in its payload.
        text_key: Payload field of the text.

    Raises:
        StoreMismatch: The store was made for another encoder or kind of documents.
    """

    def __init__(
        self,
        store: Store,
        encoder: Encoder | None = None,
        *,
        documents: Documents | None = None,
        store_text: bool = True,
        text_key: str = "text",
    ) -> None:
        if documents not in (None, "encoded", "tokens"):
            raise ConfigError(f"`documents` must be 'encoded' or 'tokens', got {documents!r}.")
        self.store = store
        self.encoder = encoder
        self.store_text = store_text
        self.text_key = text_key
        self._known_stamp: EncoderStamp | None = None
        # Encoders expect one call at a time, and stores are made once.
        self._turn = threading.RLock()
        if store.width is not None:
            width = store.width if encoder is None else encoder.vocabulary.size
            store.create(width, self._stamp(), documents=documents or store.documents)
        self._documents: Documents = documents or store.documents

    @property
    def documents(self) -> Documents:
        """What the document side is."""
        return self._documents

    def __repr__(self) -> str:
        """Store and model, without secrets."""
        stamp = self._stamp()
        model = "no encoder" if stamp is None else stamp.model
        return f"{type(self).__name__}({self.store!r}, {model})"

    # Writing

    def add_texts(
        self,
        texts: Iterable[str],
        ids: Iterable[Id] | None = None,
        payloads: Iterable[Mapping[str, Any] | None] | None = None,
        *,
        batch_size: int = 512,
        empty: EmptyRows = "store",
    ) -> list[Id]:
        """Encodes and writes texts; a text whose id is there replaces it.

        Texts are taken `batch_size` at a time, so a generator of any length needs the memory of one
        batch (and the list of ids).

        Args:
            texts: Documents.
            ids: One for each text. Without ids, a text gets a UUID made of its content: adding it
                again changes nothing, and equal texts in one call are one document.
            payloads: One mapping (or `None`) for each text, kept beside the vector.
            batch_size: Texts encoded and written together.
            empty: What becomes of texts without any token, such as `""`: `"store"` keeps them,
                though no search finds them, `"skip"` leaves them out, `"error"` refuses them.

        Returns:
            The id of every text in order, skipped ones left out.

        Raises:
            TypeError: One string came instead of several, or a text is not a string.
            ShapeError: Texts, ids and payloads are not equally many. Sequences are compared before
                anything is written; iterators are found out at their end.
            InputError: An id is unusable or given twice, two payloads fight for one text without an
                id, or a payload has another value in the field of the text.
            RejectedRows: Some texts could not be stored; all others are written.
        """
        return self._add_texts(self.store.upsert, texts, ids, payloads, batch_size, empty)

    def _add_texts(
        self,
        upsert: Callable[..., Written],
        texts: Iterable[str],
        ids: Iterable[Id] | None,
        payloads: Iterable[Mapping[str, Any] | None] | None,
        batch_size: int,
        empty: EmptyRows,
    ) -> list[Id]:
        """`add_texts` with a store's `upsert`, to which a child class may add arguments."""
        encoder = self._need_encoder("add_texts")
        encode = encoder.bag_of_tokens if self._documents == "tokens" else encoder.encode_documents
        batches = text_batches(
            lambda batch: self._encoded(encode, batch),
            texts,
            ids,
            payloads,
            size=batch_size,
            text_key=self.text_key if self.store_text else None,
        )
        self._create(encoder.vocabulary.size)
        return self._write(batches, upsert, empty)

    def _write(
        self, batches: Iterable[Batch], upsert: Callable[..., Written], empty: EmptyRows
    ) -> list[Id]:
        """Writes all batches; returns the ids of what is there then, in order."""
        stop = STOP.get()
        written: list[Id] = []
        refused: dict[Id, str] = {}
        for batch in batches:
            refused.update(batch.refused)
            skipped: set[Id] = set()
            if batch.rows is not None:
                try:
                    report = upsert(batch.rows, batch.fresh, batch.payloads, empty=empty)
                    skipped.update(report.skipped)
                except RejectedRows as rejection:
                    refused.update(zip(rejection.ids, rejection.reasons, strict=True))
            written += [id for id in batch.ids if id not in skipped]
            if stop is not None and stop.is_set():
                raise CancelledError
        if refused:
            raise RejectedRows(list(refused), list(refused.values()))
        return written

    def add_rows(
        self,
        rows: SparseRows,
        ids: Sequence[Id],
        payloads: Sequence[Mapping[str, Any] | None] | None = None,
        *,
        empty: EmptyRows = "store",
    ) -> list[Id]:
        """Writes vectors made elsewhere; a row whose id is there replaces it.

        Args:
            rows: Vectors over the vocabulary of this collection.
            ids: One for each row.
            payloads: One mapping (or `None`) for each row.
            empty: What becomes of rows without entries; see `add_texts`.

        Returns:
            The ids in order, skipped ones left out.

        Raises:
            TypeError: `rows` is not `SparseRows`.
            ShapeError: Rows, ids and payloads are not equally many.
            InputError: An id is unusable or given twice, or the rows have another width.
            RejectedRows: Some rows could not be stored; all others are written.
        """
        return self._add_rows(self.store.upsert, rows, ids, payloads, empty)

    def _add_rows(
        self,
        upsert: Callable[..., Written],
        rows: SparseRows,
        ids: Sequence[Id],
        payloads: Sequence[Mapping[str, Any] | None] | None,
        empty: EmptyRows,
    ) -> list[Id]:
        if not isinstance(rows, SparseRows):
            raise TypeError(
                f"`rows` must be SparseRows, got {type(rows).__name__}; "
                "make them with SparseRows.from_dicts, from_scipy or from_torch"
            )
        checked = checked_ids(ids)
        self._create(rows.width if self.encoder is None else self.encoder.vocabulary.size)
        left_out = set(upsert(rows, checked, payloads, empty=empty).skipped)
        return [id for id in checked if id not in left_out]

    def add_images(
        self,
        images: str | os.PathLike[str] | Iterable[Any],
        ids: Iterable[Id] | None = None,
        payloads: Iterable[Mapping[str, Any] | None] | None = None,
        *,
        batch_size: int = 256,
        empty: EmptyRows = "store",
        thumbnail_px: int | None = None,
    ) -> list[Id]:
        """Encodes and writes images; an image whose id is there replaces it.

        The encoder must read images, as `vdr_db.CrossModalEncoder` does. Payloads get the field
        `modality`, which is `"image"`, and `image`, the path where an image came as one.

        Args:
            images: Paths, bytes of files, PIL images or arrays; or one folder.
            ids: One for each image. Without ids, images of a folder are called by their paths in
                it, and others get a UUID made of their content.
            payloads: One mapping (or `None`) for each image.
            batch_size: Images encoded and written together.
            empty: What becomes of images whose vector is empty; see `add_texts`.
            thumbnail_px: Longest side of a small JPEG that is kept in the payload field
                `thumbnail`, for pages and terminals that show hits; None keeps none. One of 64
                pixels takes about 1.7 KB.

        Returns:
            The id of every image in order, skipped ones left out.

        Raises:
            ConfigError: The encoder reads no images, or `thumbnail_px` is impossible.
            TypeError: One image came instead of several, or an item is no image at all.
            ShapeError: Images, ids and payloads are not equally many.
            InputError: An id is unusable or given twice, an item is a text, or a payload has
                another value in a field named above.
            RejectedRows: Some images could not be read or stored, with reasons; all others are
                written.
        """
        encode = image_encoding(self.encoder, "add_images")
        if self._documents == "tokens":
            raise ConfigError(
                "a collection of bags of tokens takes no images, which have no tokens; build one "
                "with documents='encoded'."
            )

        def in_turn(batch: list[Any], **options: int) -> EncodedImages:
            with self._turn:
                return encode(batch, **options)

        batches = image_batches(
            in_turn, images, ids, payloads, size=batch_size, thumbnail_px=thumbnail_px
        )
        self._create(self.encoder.vocabulary.size)  # type: ignore[union-attr]
        return self._write(batches, self.store.upsert, empty)

    def delete(self, ids: Sequence[Id]) -> int:
        """Removes documents; returns how many were there."""
        return self.store.delete(ids)

    # Reading

    def search(
        self,
        query: str | SparseRows,
        limit: int = 10,
        filter: Any = None,
        *,
        offset: int = 0,
        mode: Mode | None = None,
        rerank: int | None = None,
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

        Raises:
            ConfigError: The mode does not fit the collection, or a number is impossible.
        """
        row = self._query_rows(query, mode)
        if rerank is None:
            return self.store.search(row, limit, filter, offset)
        if rerank < limit + offset:
            raise ConfigError(
                f"`rerank` must be at least limit + offset = {limit + offset}, got {rerank}."
            )
        best = self._rerank(row, self.store.search(row, rerank, filter))
        return best[offset : offset + limit]

    def search_by_image(
        self, image: Any, limit: int = 10, filter: Any = None, *, offset: int = 0
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
        with self._turn:
            row = encode_query_image(self.encoder, image)
        return self.search(row, limit, filter, offset=offset)

    def search_batch(
        self,
        queries: Sequence[str] | SparseRows,
        limit: int = 10,
        filter: Any = None,
        *,
        mode: Mode | None = None,
    ) -> list[list[Hit]]:
        """`search` for several queries at once, in their order.

        Raises:
            TypeError: One string came instead of several.
        """
        if not isinstance(queries, SparseRows):
            refuse_string(queries, "queries")
        return self.store.search_batch(self._query_rows(queries, mode), limit, filter)

    def get(self, ids: Sequence[Id], with_rows: bool = False) -> list[Record]:
        """The documents of these ids in this order; unknown ids are left out."""
        return self.store.get(ids, with_rows)

    def ids(self) -> Iterator[Id]:
        """All ids, in the order of the store."""
        return self.store.ids()

    def count(self, filter: Any = None) -> int:
        """Number of documents, of those the filter keeps when one is given."""
        return self.store.count(filter)

    def explain(self, query: str | SparseRows, id: Id, *, mode: Mode | None = None) -> list[Term]:
        """What every shared token adds to the score of a document, the largest part first.

        The products add up to the score of a search, up to the precision of the store.

        Raises:
            InputError: There is no document with this id.
        """
        row = self._query_rows(query, mode)
        if len(row) != 1:
            raise ShapeError(f"`explain` takes one query, got {len(row)} rows.")
        records = self.store.get([id], with_rows=True)
        if not records or records[0].row is None:
            raise InputError(f"there is no document with the id {id!r} in {self.store!r}.")
        return shared_terms(row, records[0].row, self._token)

    # Life

    def flush(self) -> None:
        """Makes everything written survive a loss of power."""
        self.store.flush()

    def optimize(self) -> None:
        """Reorganises the index after much was written; searches are right with and without."""
        self.store.optimize()

    def close(self) -> None:
        """Closes the store; a second call does nothing."""
        self.store.close()

    @contextmanager
    def _rebuilt(
        self,
        rebuild: Callable[..., AbstractContextManager[Store]],
        encoder: Encoder | None,
        **options: object,
    ) -> Iterator[Self]:
        """A collection like this one in what `rebuild` of the store gives, for a new encoder."""
        used = encoder or self.encoder
        stamp = None if used is None else used.stamp()
        width = None if used is None else used.vocabulary.size
        with rebuild(width=width, stamp=stamp, **options) as target:
            fresh = copy.copy(self)
            Collection.__init__(
                fresh, target, used, store_text=self.store_text, text_key=self.text_key
            )
            yield fresh
        self.encoder, self._known_stamp = used, stamp

    def __enter__(self) -> Self:
        """The collection itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the store."""
        self.close()

    def _stamp(self) -> EncoderStamp | None:
        # Kept, because a stamp may cost a pass over the weights.
        if self._known_stamp is None and self.encoder is not None:
            self._known_stamp = self.encoder.stamp()
        return self._known_stamp

    def _create(self, width: int) -> None:
        with self._turn:
            if self.store.width is None:
                self.store.create(width, self._stamp(), documents=self._documents)

    def _need_encoder(self, what: str) -> Encoder:
        return text_encoder(self.encoder, what)

    def _encoded(
        self, encode: Callable[[Sequence[str]], SparseRows], texts: Sequence[str]
    ) -> SparseRows:
        with self._turn:
            return encode(texts)

    def _query_rows(
        self, queries: str | Sequence[str] | SparseRows, mode: Mode | None
    ) -> SparseRows:
        with self._turn:
            return query_rows(self.encoder, queries, checked_mode(mode, self._documents))

    def _rerank(self, query: SparseRows, hits: list[Hit]) -> list[Hit]:
        encoder = self._need_encoder("rerank")
        if not hits:
            return []
        texts = texts_of(hits, self.text_key)
        scores = self._encoded(encoder.encode_documents, texts).dot(query)[:, 0].tolist()
        fresh = [Hit(hit.id, score, hit.payload) for hit, score in zip(hits, scores, strict=True)]
        return sorted(fresh, key=lambda hit: (-hit.score, *id_order(hit.id)))

    def _token(self, token_id: int) -> str:
        return str(token_id) if self.encoder is None else self.encoder.vocabulary.token(token_id)
