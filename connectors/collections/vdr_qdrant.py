"""`VDRQdrant`: what users hold, a `Collection` in Qdrant."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from vdr_db.connectors.address import Access, Server, server_url
from vdr_db.connectors.base import Documents, EmptyRows, Hit, Id, Written
from vdr_db.connectors.collections.collection import Collection
from vdr_db.connectors.collections.encoding import AnyEncoder, Mode, TextOptions, load_encoder
from vdr_db.connectors.feed import refuse_string
from vdr_db.connectors.ids import content_id
from vdr_db.connectors.passages import Passages
from vdr_db.connectors.qdrant.existing import Existing
from vdr_db.connectors.qdrant.store import QdrantStore
from vdr_db.connectors.renamed import renamed
from vdr_db.errors import ConfigError, ShapeError
from vdr_db.sparse import SparseRows

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from vdr_db.connectors.qdrant.engine import Datatype, DenseVector, IndexKind
    from vdr_db.connectors.qdrant.requests import IndexMemory
    from vdr_db.connectors.retry import RetryPolicy

__all__ = ["QdrantOptions", "QdrantTextOptions", "VDRQdrant", "choose_place"]

# A name of a folder is letters and digits of any script, "_", "." and "-".
_UNSAFE = re.compile(r"[^\w.-]")


class QdrantChanges(TypedDict, total=False):
    """What a rebuild may change; see `QdrantStore.rebuild`."""

    datatype: Datatype | None
    payload_indexes: Mapping[str, IndexKind] | None
    collection_options: Mapping[str, Any] | None


class QdrantOptions(QdrantChanges, total=False):
    """Options of `VDRQdrant` beside collection, encoder and documents; see `QdrantStore`."""

    path: str | os.PathLike[str] | None
    url: str | None
    client: Any
    api_key: str | None
    prefer_grpc: bool
    timeout: int
    retry: RetryPolicy | None
    full_scan_threshold: int
    index_memory: IndexMemory | None
    client_options: Mapping[str, Any] | None
    dense: Mapping[str, DenseVector | int] | None
    vector_name: str | None
    versioned: bool
    existing: Existing | None


class QdrantTextOptions(QdrantOptions, TextOptions, total=False):
    """`QdrantOptions`, and how documents are kept."""


def choose_place(collection: str, options: QdrantOptions) -> None:
    """Adds a place to options without one: the server of the environment, else a folder.

    Raises:
        ConfigError: Several places are given.
    """
    given = [place for place in ("path", "url", "client") if options.get(place) is not None]
    if len(given) > 1:
        raise ConfigError(f"one of `path`, `url` and `client` is enough, got {given}; pass one.")
    if given or not isinstance(collection, str):
        return
    if url := os.environ.get("VDR_DB_QDRANT_URL"):
        options["url"] = url
        options["api_key"] = options.get("api_key") or os.environ.get("VDR_DB_QDRANT_API_KEY")
    else:
        options["path"] = Path.cwd() / f"{_UNSAFE.sub(_quoted, collection)}.qdrant"


def _asked(options: QdrantOptions, access: Access | None) -> Server | None:
    """What answers at `url`; `None` where options say how to speak to it."""
    url = options.get("url")
    if url is None or options.get("client_options"):
        return None
    from vdr_db.connectors.asking import ask  # it takes a while to import TLS

    access = access or Access(options.get("api_key"))
    return ask(server_url(url, "qdrant"), "qdrant", access, grpc=options.get("prefer_grpc"))


def _speak(server: Server, access: Access | None, options: QdrantOptions) -> None:
    """Options for a server that was asked what it is."""
    options["url"] = server.url
    options["prefer_grpc"] = server.grpc_port is not None
    more: dict[str, Any] = {} if server.grpc_port is None else {"grpc_port": server.grpc_port}
    if access is not None:
        options["api_key"] = access.api_key
        if access.is_custom_tls:
            from vdr_db.connectors.asking import trust

            more["verify"] = trust(access)
        if access.ca_certs is not None and server.grpc_port is not None:
            more["grpc_options"] = {"root_certificates": Path(access.ca_certs).read_bytes()}
    if more:
        options["client_options"] = {**more, **(options.get("client_options") or {})}


def _quoted(unsafe: re.Match[str]) -> str:
    return quote(unsafe[0], safe="", errors="surrogatepass")


class VDRQdrant(Collection):
    """A `Collection` in Qdrant: embedded in a folder, in memory, or on a server.

    Without `path`, `url` and `client` it is on the server that `$VDR_DB_QDRANT_URL` names (key:
    `$VDR_DB_QDRANT_API_KEY`), else embedded in the folder `COLLECTION.qdrant` of the working
    directory. `AsyncVDRQdrant` is the same in an event loop.

    Args:
        collection: Name of the collection, or an alias of one.
        encoder: As in `Collection`; by default the model of `$VDR_DB_MODEL`, else the shipped one.
        path: Folder of its own for the collection, or `":memory:"`.
        url: Address of a server, which is asked whether it speaks gRPC or REST on that port; with
            `client_options` it is not asked.
        client: A ready `qdrant_client.QdrantClient`.
        api_key: For `url`.
        access: For `url`, a key with TLS options, instead of `api_key`.
        server: What is known to answer at `url`, which is asked without.
        documents: With `store_text` and `text_key` as in `Collection`.
        store_text: See there.
        text_key: See there.
        datatype: `"float32"` (default), `"float16"` or `"uint8"`: how the index keeps weights.
        payload_indexes: Payload key → kind of index, for faster filters; see `QdrantStore`.
        options: More options of `QdrantStore`, such as `dense`, `versioned`, `vector_name`,
            `index_memory` and `collection_options`.

    Raises:
        ConfigError: The options contradict each other.
        StoreMismatch: The place holds something else, or the collection is of another encoder; a
            model that is loaded later is compared then.
        StoreUnavailable: It cannot be reached, or another process has it open.
    """

    store: QdrantStore
    _has_default_model = True

    def __init__(
        self,
        collection: str,
        encoder: AnyEncoder | None = None,
        *,
        documents: Documents | None = None,
        store_text: bool = True,
        text_key: str = "text",
        access: Access | None = None,
        server: Server | None = None,
        **options: Unpack[QdrantOptions],
    ) -> None:
        choose_place(collection, options)
        self.server = server or _asked(options, access)
        if self.server is not None:
            _speak(self.server, access, options)
        store = QdrantStore(collection, **options)
        try:
            super().__init__(
                store, encoder, documents=documents, store_text=store_text, text_key=text_key
            )
        except BaseException:
            store.close()
            raise

    @classmethod
    def from_existing(
        cls,
        collection: str,
        encoder: AnyEncoder | None = None,
        *,
        adopt: bool = False,
        width: int | None = None,
        **options: Unpack[QdrantTextOptions],
    ) -> Self:
        """Opens a collection that is on a server already, and neither makes nor changes it.

        One that this library made is checked against the encoder. One that others made does not
        tell which model its vectors are of; `adopt=True` says that `encoder` is that model:

        ```python
        old = VDRQdrant.from_existing(
            "articles", encoder, url=url, adopt=True, vector_name="text-sparse",
            text_key="page_content",
        )
        ```

        Adding to an adopted collection writes points with the sparse vector (and `dense`, if
        given); a document that is there is replaced as a whole, with all its vectors.

        Args:
            collection: Its name, or an alias.
            encoder: The model that made its vectors.
            adopt: Take one that this library did not make.
            width: Vocabulary size, for one that is adopted without an encoder.
            options: `url` or `client`, `vector_name` when it has several sparse vectors, and more
                options of `VDRQdrant`.

        Raises:
            StoreError: There is no such collection.
            StoreMismatch: It is of another encoder, not described and not to be adopted, has no
                such sparse vector or several, holds larger token ids than the vocabulary, or
                multiplies its weights.
            ConfigError: It is to be adopted without encoder and width.
        """
        if width is None and encoder is not None:
            encoder = load_encoder(encoder, images=True)
            width = encoder.vocabulary.size
        options["existing"] = Existing(adopt, width, options.get("documents") or "encoded")
        return cls(collection, encoder, **options)

    def add_texts(
        self,
        texts: Iterable[str],
        ids: Iterable[Id] | None = None,
        payloads: Iterable[Mapping[str, Any] | None] | None = None,
        *,
        batch_size: int = 512,
        empty: EmptyRows = "store",
        passages: bool | Passages | None = None,
        dense: Mapping[str, Any] | None = None,
    ) -> list[Id]:
        """Encodes and writes texts; see `Collection.add_texts`.

        `dense` maps names to `[N, size]` dense vectors of the texts, for a collection that has
        such.
        """
        if dense is None:
            return super().add_texts(
                texts, ids, payloads, batch_size=batch_size, empty=empty, passages=passages
            )
        if passages:
            raise ConfigError("`dense` vectors are of whole documents; leave `passages` out.")
        refuse_string(texts, "texts")
        texts = list(texts)
        names = [content_id(text) for text in texts] if ids is None else list(ids)
        columns = {name: np.asarray(column, np.float32) for name, column in dense.items()}
        for name, column in columns.items():
            if not len(texts) == len(names) == len(column):
                raise ShapeError(
                    f"texts, ids and dense vectors must be equally many, got {len(texts)} texts, "
                    f"{len(names)} ids and {len(column)} of {name!r}."
                )
        # The first of equal texts counts, as everywhere.
        place = {id: i for i, id in reversed(list(enumerate(names)))}

        def upsert(rows: SparseRows, part: Sequence[Id], *rest: Any, **options: Any) -> Written:
            taken = [place[id] for id in part]
            picked = {name: column[taken] for name, column in columns.items()}
            return self.store.upsert(rows, part, *rest, dense=picked, **options)

        beside = copy.copy(self)
        beside._upsert = upsert
        given = None if ids is None else names
        return beside.add_texts(texts, given, payloads, batch_size=batch_size, empty=empty)

    def add_rows(
        self,
        rows: SparseRows,
        ids: Sequence[Id],
        payloads: Sequence[Mapping[str, Any] | None] | None = None,
        *,
        empty: EmptyRows = "store",
        dense: Mapping[str, Any] | None = None,
    ) -> list[Id]:
        """Writes vectors made elsewhere; see `Collection.add_rows`.

        `dense` maps names to `[N, size]` dense vectors of the same documents.
        """
        if dense is None:
            return super().add_rows(rows, ids, payloads, empty=empty)
        beside = copy.copy(self)
        beside._upsert = partial(self.store.upsert, dense=dense)
        return beside.add_rows(rows, ids, payloads, empty=empty)

    def search_with_dense(
        self,
        query: str | SparseRows,
        vector: npt.ArrayLike,
        limit: int = 10,
        filter: Any = None,
        *,
        offset: int = 0,
        mode: Mode | None = None,
        using: str | None = None,
        depth: int = 100,
        rank_constant: int | None = None,
        dense_weight: float = 1.0,
    ) -> list[Hit]:
        """The best documents by sparse and dense vector together (RRF), in one request.

        The query is a text, or a sparse vector of one row, and `vector` `[size]` is by the model of
        the dense vectors; see `QdrantStore.search_with_dense`, and `Mode`.
        """
        row = self._query_rows(query, mode)
        search = self.store.search_with_dense
        return search(
            row,
            vector,
            limit,
            filter,
            offset,
            using=using,
            depth=depth,
            rank_constant=rank_constant,
            dense_weight=dense_weight,
        )

    search_hybrid = renamed("search_hybrid", search_with_dense)

    def rebuild(
        self,
        encoder: AnyEncoder | None = None,
        *,
        expected: int | None = None,
        keep_old: bool = False,
        into: str | None = None,
        keep_unfinished: bool = False,
        **changes: Unpack[QdrantChanges],
    ) -> AbstractContextManager[Self]:
        """Fills a new collection inside the block; the name moves to it at the end, in one step.

        ```python
        with articles.rebuild(better_encoder, expected=len(texts)) as fresh:
            fresh.add_texts(texts, ids=ids)
        ```

        Other processes that have the name open read and write the new collection from then on; with
        another encoder their writes are a `StoreMismatch`, and their searches within 5 seconds.

        Args:
            encoder: Makes the new vectors; the one of this collection without.
            expected: Documents the new collection must have; with another number nothing changes.
            keep_old: Leaves the old collection, without the name.
            into: Goes on with this collection, which an earlier block left unfinished.
            keep_unfinished: Leaves the new collection when the block fails, for a later `into`.
            changes: `datatype`, `payload_indexes` or `collection_options` that change.

        Raises:
            StoreError: See `QdrantStore.rebuild`, as for the rest.
        """
        options = {"expected": expected, "keep_old": keep_old, "into": into, **changes}
        options["keep_unfinished"] = keep_unfinished
        return self._rebuilt(self.store.rebuild, encoder, **options)

    def rollover(self, *, keep_old: bool = False, **changes: Unpack[QdrantChanges]) -> str:
        """Copies everything into a new collection; see `QdrantStore.rollover`."""
        return self.store.rollover(keep_old=keep_old, **changes)
