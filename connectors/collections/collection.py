"""`Collection`: an encoder and a store, so that texts go in and texts with reasons come out."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from vdr_db.connectors.base import Documents, EmptyRows, Id, Store, Written
from vdr_db.connectors.collections.encoding import (
    AnyEncoder,
    Encoder,
    Encoding,
    Mode,
)
from vdr_db.connectors.collections.reading import Reading
from vdr_db.connectors.collections.writing import write
from vdr_db.connectors.ids import checked_ids
from vdr_db.connectors.images import image_batches
from vdr_db.connectors.passages import Passages, checked_passages
from vdr_db.connectors.texts import text_batches
from vdr_db.errors import ConfigError
from vdr_db.sparse import SparseRows

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Collection", "Encoder", "Mode"]


class Collection(Reading):
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
        encoder: Makes vectors of texts; the name or folder of a model is loaded when it is first
            needed. Without one, `add_rows` and searches by row still work.
        documents: `"tokens"` keeps bags of tokens instead of encoded documents (mode beta).
        store_text: Keep each text in its payload.
        text_key: Payload field of the text.

    Raises:
        StoreMismatch: The store was made for another encoder or kind of documents. An encoder that
            is only named is compared when it is loaded.
    """

    _has_default_model = False
    # What writes documents with more than texts and rows tell, instead of the store's own.
    _upsert: Callable[..., Written] | None = None

    def __init__(
        self,
        store: Store,
        encoder: AnyEncoder | None = None,
        *,
        documents: Documents | None = None,
        store_text: bool = True,
        text_key: str = "text",
    ) -> None:
        if documents not in (None, "encoded", "tokens"):
            raise ConfigError(f"`documents` must be 'encoded' or 'tokens', got {documents!r}.")
        self.store = store
        self.store_text = store_text
        self.text_key = text_key
        self._documents: Documents = documents or store.documents
        self._encoding = Encoding(
            encoder, default=self._has_default_model, check=self._check_fit, store=store
        )
        self._check_fit()

    @property
    def encoder(self) -> Encoder | None:
        """Makes vectors of texts; one that is only named is loaded now, for texts."""
        return self._encoding.get()

    @property
    def encoder_with_images(self) -> Encoder | None:
        """The same; of one that is only named the part of images is loaded, too, if it has one."""
        return self._encoding.with_images()

    def use_encoder(self, encoder: Encoder) -> None:
        """Takes another encoder from now on, such as the one that `store.stamp` names.

        Raises:
            StoreMismatch: The store holds vectors of another one; the encoder stays what it was.
        """
        self._encoding.use(encoder)

    @property
    def documents(self) -> Documents:
        """What the document side is."""
        return self._documents

    def __repr__(self) -> str:
        """Store and model, without secrets."""
        return f"{type(self).__name__}({self.store!r}, {self._encoding.model})"

    # Writing

    def add_texts(
        self,
        texts: Iterable[str],
        ids: Iterable[Id] | None = None,
        payloads: Iterable[Mapping[str, Any] | None] | None = None,
        *,
        batch_size: int = 512,
        empty: EmptyRows = "store",
        passages: bool | Passages | None = None,
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
            passages: Cuts texts into passages, `True` or `Passages(...)`, in a collection that is
                made by this call. It stays so: later calls need not say it again, and a collection
                that was made without takes none.

        Returns:
            The id of every text in order, skipped ones left out.

        Raises:
            TypeError: One string came instead of several, or a text is not a string.
            ShapeError: Texts, ids and payloads are not equally many. Sequences are compared before
                anything is written; iterators are found out at their end.
            InputError: An id is unusable or given twice, two payloads fight for one text without an
                id, or a payload has another value in the field of the text.
            RejectedRows: Some texts could not be stored; all others are written.
            StoreMismatch: The collection is there with other passages.
        """
        self._encoding.need("add_texts")
        batches = text_batches(
            lambda batch: self._encoding.passages(batch, self._documents, self.store.passages),
            texts,
            ids,
            payloads,
            size=batch_size,
            text_key=self.text_key if self.store_text else None,
        )
        self._create(self._encoding.width, checked_passages(passages))
        upsert = self._upsert or self._view.upsert
        total = len(texts) if isinstance(texts, Sized) else None
        return write(batches, upsert, empty, total=total)

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
        if not isinstance(rows, SparseRows):
            raise TypeError(
                f"`rows` must be SparseRows, got {type(rows).__name__}; "
                "make them with SparseRows.from_dicts, from_scipy or from_torch"
            )
        checked = checked_ids(ids)
        encoder = self._encoding.named
        self._create(rows.width if encoder is None else encoder.vocabulary.size)
        upsert = self._upsert or self._view.upsert
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
        encode = self._encoding.images("add_images")
        if self._documents == "tokens":
            raise ConfigError(
                "a collection of bags of tokens takes no images, which have no tokens; build one "
                "with documents='encoded'."
            )

        batches = image_batches(
            encode, images, ids, payloads, size=batch_size, thumbnail_px=thumbnail_px
        )
        self._create(self._encoding.width)
        stamp = self._encoding.stamp()
        if stamp is not None:
            self.store.record_images(stamp)
        total = len(images) if isinstance(images, (list, tuple)) else None
        return write(batches, self._view.upsert, empty, total=total, unit="image")

    # Life

    def close(self) -> None:
        """Closes the store; a second call does nothing."""
        self.store.close()

    @contextmanager
    def _rebuilt(
        self,
        rebuild: Callable[..., AbstractContextManager[Store]],
        encoder: AnyEncoder | None,
        **options: object,
    ) -> Iterator[Self]:
        """A collection like this one in what `rebuild` of the store gives, for a new encoder."""
        fresh = copy.copy(self)
        if encoder is not None:
            fresh._encoding = Encoding(encoder)
            fresh._encoding.get()
        width, stamp = fresh._encoding.width, fresh._encoding.new_stamp()
        with rebuild(width=width, stamp=stamp, **options) as fresh.store:
            yield fresh
        self._encoding = fresh._encoding

    def __enter__(self) -> Self:
        """The collection itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the store."""
        self.close()

    def _check_fit(self) -> None:
        """Compares a store that is made already with the encoder and the kind of documents."""
        if self.store.width is not None:
            width = self._encoding.width or self.store.width
            self.store.create(width, self._encoding.stamp(), documents=self._documents)

    def _create(self, width: int | None, passages: Passages | None = None) -> None:
        with self._encoding.turn:
            if self.store.width is None or passages is not None:
                made = width or self.store.width
                assert made is not None
                fresh = self.store.width is None
                stamp = self._encoding.new_stamp() if fresh else self._encoding.stamp()
                self.store.create(made, stamp, documents=self._documents, passages=passages)
