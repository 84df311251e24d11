"""What every store speaks: ids, hits, records, and the `Store` protocol."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

from vdr_db.connectors.passages import Passages
from vdr_db.counts import counted
from vdr_db.errors import InputError, StoreMismatch
from vdr_db.sparse import SparseRows
from vdr_db.stamp import REPLACED, EncoderStamp

__all__ = [
    "BatchLimits",
    "Documents",
    "EmptyRows",
    "Hit",
    "Id",
    "Page",
    "Passage",
    "Payload",
    "Record",
    "Store",
    "Term",
    "Written",
    "check_stamp",
    "check_width",
    "checked_page",
    "differences",
    "next_version",
    "page_token",
]

Id: TypeAlias = int | str
"""A document id: an unsigned 64-bit integer or a string. `1` and `"1"` are different documents."""

Token = TypeVar("Token")

Payload: TypeAlias = dict[str, Any]
"""What is stored beside a vector: JSON types only."""

Documents: TypeAlias = Literal["encoded", "tokens"]
"""What the document side of a collection is: vectors of a model, or bags of tokens."""

EmptyRows: TypeAlias = Literal["store", "skip", "error"]
"""What becomes of a row without entries: kept but never found, left out and counted, refused."""


@dataclass(frozen=True)
class Passage:
    """A part of a document.

    Attributes:
        number: Its place among the passages of the document, from 0.
        count: Passages of the document.
        start: Its first character in the text of the document.
        stop: The first character after it.
    """

    number: int
    count: int
    start: int
    stop: int


@dataclass(frozen=True)
class Hit:
    """One search result.

    Attributes:
        id: The caller's id.
        score: Inner product of query and document, up to the precision of the store.
        payload: What was stored with the document; with `passage`, its text is that of the passage.
        passage: The passage that matches best, in a collection of passages.
        highlights: Parts of its text with the words of the query in `<em>`, where they were asked
            for.
    """

    id: Id
    score: float
    payload: Payload = field(default_factory=dict)
    passage: Passage | None = None
    highlights: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """One stored document.

    Attributes:
        id: The caller's id.
        payload: What was stored with the document.
        row: Its vector, one row, when it was asked for; of a document in passages, its first's.
    """

    id: Id
    payload: Payload = field(default_factory=dict)
    row: SparseRows | None = None


@dataclass(frozen=True)
class Page:
    """Documents in the order of the store, a part at a time.

    Attributes:
        records: The documents.
        next: What `scroll` takes as `after` for the next page, a text; `None` at the end.
    """

    records: list[Record]
    next: str | None = None


@dataclass(frozen=True)
class Term:
    """What one token adds to a score.

    Attributes:
        token: Text of the token, or its id as text when no vocabulary is known.
        id: Token id.
        query_weight: Weight in the query.
        document_weight: Weight in the document.
        product: Both multiplied; the products of all terms add up to the score.
    """

    token: str
    id: int
    query_weight: float
    document_weight: float
    product: float


@dataclass(frozen=True)
class Written:
    """What a write did.

    Attributes:
        count: Rows written.
        empty: How many of them have no entries, so that no search finds them.
        skipped: Ids of empty rows that were left out because the caller asked for it.
    """

    count: int
    empty: int = 0
    skipped: tuple[Id, ...] = ()


@dataclass(frozen=True)
class BatchLimits:
    """How much a store takes in one request.

    Attributes:
        rows: Rows at most.
        bytes: Estimated bytes at most; a single larger row still goes alone, up to `row_bytes`.
        row_bytes: Estimated bytes of one row at most; larger ones are refused.
    """

    rows: int
    bytes: int
    row_bytes: int


class Store(Protocol):
    """A collection of sparse vectors with ids and payloads.

    A store is opened by its constructor and made by `create`, once; `width` is `None` before. All
    rows of a store have one width, the vocabulary size.
    """

    @property
    def width(self) -> int | None:
        """Width of all rows, `None` while the collection is not made."""

    @property
    def stamp(self) -> EncoderStamp | None:
        """The encoder the collection was made for, as far as known."""

    @property
    def documents(self) -> Documents:
        """What the document side is."""

    @property
    def passages(self) -> Passages | None:
        """How its documents are cut; `None` where each row is a document."""

    def create(
        self,
        width: int,
        stamp: EncoderStamp | None = None,
        *,
        documents: Documents = "encoded",
        passages: Passages | None = None,
    ) -> None:
        """Makes the collection; one that is there is checked against the arguments instead.

        With `passages` each row is a passage: `vdr_db.connectors.documents.DocumentView` writes
        and reads its documents.

        Raises:
            StoreMismatch: It is there with another width, encoder or kind of documents, or with
                other passages than these.
        """

    def record_images(self, stamp: EncoderStamp) -> None:
        """Writes down the encoder of the images that are about to come.

        Once that is known it is compared, as the one of texts is. What the store holds of an
        encoder that is not known stays so, and a stamp without an image part changes nothing.

        Raises:
            StoreMismatch: It was made for another encoder, or its images are of another one.
        """

    def upsert(
        self,
        rows: SparseRows,
        ids: Sequence[Id],
        payloads: Sequence[Mapping[str, Any] | None] | None = None,
        *,
        empty: EmptyRows = "store",
    ) -> Written:
        """Writes rows; a row whose id is there replaces vector and payload.

        When it returns, the rows are found by searches and survive the death of this process.

        Raises:
            InputError: Ids are unusable or repeated, or sizes disagree; nothing is written.
            RejectedRows: Some rows cannot be stored; all others are written.
        """

    def search(
        self,
        row: SparseRows,
        limit: int = 10,
        filter: Any = None,
        offset: int = 0,
        *,
        min_score: float | None = None,
    ) -> list[Hit]:
        """The best documents by inner product, best first, equal scores by ascending id.

        A document that shares no token with the query is no hit, so fewer than `limit` may come;
        nor is one with a score below `min_score`.
        """

    def search_batch(
        self,
        rows: SparseRows,
        limit: int = 10,
        filter: Any = None,
        offset: int = 0,
        *,
        min_score: float | None = None,
    ) -> list[list[Hit]]:
        """`search` for each row."""

    def get(self, ids: Sequence[Id], with_rows: bool = False) -> list[Record]:
        """The documents of these ids in this order; unknown ids are left out."""

    def ids(self, filter: Any = None) -> Iterator[Id]:
        """All ids, of documents the filter keeps when one is given, in the order of the store."""

    def scroll(self, limit: int = 100, filter: Any = None, after: str | None = None) -> Page:
        """Documents in the order of `ids`, from where the page ended that `after` comes from."""

    def count(self, filter: Any = None) -> int:
        """Number of documents, of those the filter keeps when one is given."""

    def update_payloads(self, ids: Sequence[Id], payloads: Sequence[Mapping[str, Any]]) -> int:
        """Sets fields of payloads and leaves all else; returns how many documents were there.

        Raises:
            InputError: Ids are unusable or repeated, sizes disagree, or a payload is unusable.
        """

    def delete(self, ids: Sequence[Id]) -> int:
        """Removes documents; returns how many were there."""

    def search_documents(
        self, rows: SparseRows, limit: int, filter: Any = None
    ) -> list[list[Hit]] | None:
        """For each row the best passage of each of the best documents, in a collection of passages.

        `None` where the engine does not group; fewer may come than there are.
        """

    def flush(self) -> None:
        """Makes everything written survive a loss of power."""

    def optimize(self) -> None:
        """Reorganises the index after much was written; searches are right with and without."""

    def close(self) -> None:
        """Releases the store; a second call does nothing."""

    def __enter__(self) -> Store: ...

    def __exit__(self, *_: Any) -> None: ...


def check_width(rows: SparseRows, width: int, where: str) -> None:
    """Refuses rows over another vocabulary."""
    if rows.width != width:
        raise InputError(
            f"{where} holds rows of width {width}, got width {rows.width}; "
            "encode with the model the collection was made for."
        )


def check_stamp(
    where: str,
    stored: tuple[int, EncoderStamp | None, Documents],
    wanted: tuple[int, EncoderStamp | None, Documents],
) -> None:
    """Refuses a collection that has another width, encoder or kind of documents than is wanted."""
    stamp = stored[1]
    reasons = differences(stored, wanted)
    if not reasons and stamp is not None and stamp.is_old and wanted[1] and not wanted[1].is_old:
        warnings.warn(
            f"{where} was made by vdr-db {stamp.library_version or 'of earlier'}, which wrote down "
            "weights, words, head and activation of the model alone: lengths, prompts, norms and "
            "the like are not compared; build it again to have that.",
            UserWarning,
            stacklevel=2,
        )
    if not reasons:
        return
    made_for = "" if stamp is None else f", made for {stamp.model!r},"
    opened_with = "" if wanted[1] is None else f" with {wanted[1].model!r}"
    way = "use the model it was made for, or another collection."
    if stamp is not None and stamp.model in REPLACED:
        way = (
            f"{stamp.model!r} is not shipped any more: encode again with {REPLACED[stamp.model]!r} "
            "into a new collection (another name or folder; on a server `rebuild`, or "
            "`vdr-db ingest --versioned`), or pass a folder that holds the old weights as model."
        )
    raise StoreMismatch(
        f"{where}{made_for} cannot be opened{opened_with}: {'; '.join(reasons)}; {way}"
    )


def page_token(after: str, read: Callable[[str], Token], where: str) -> Token:
    """What a store wrote as `Page.next`, as `read` reads it; anything else is an `InputError`."""
    try:
        return read(after)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"`after` must be the `next` of a page of {where}, got {after!r}; leave it out for the "
            "first page."
        ) from error


def differences(
    stored: tuple[int, EncoderStamp | None, Documents],
    wanted: tuple[int, EncoderStamp | None, Documents],
) -> list[str]:
    """Why a collection is not the one that is wanted; empty when it is."""
    width, stamp, documents = stored
    reasons = []
    if stamp is not None and wanted[1] is not None:
        reasons += stamp.difference(wanted[1])
    if width != wanted[0]:
        reasons.append(f"vocabulary size {width} (store) against {wanted[0]} (encoder)")
    if documents != wanted[2]:
        reasons.append(f"documents {documents!r} (store) against {wanted[2]!r} (asked for)")
    return reasons


def next_version(name: str, taken: Iterable[str]) -> str:
    """The name `name-000001` of the next index or collection behind the alias `name`."""
    pattern = re.compile(re.escape(name) + r"-(\d{6})")
    numbers = [int(match[1]) for one in taken if (match := pattern.fullmatch(one))]
    return f"{name}-{max(numbers, default=0) + 1:06d}"


def checked_page(limit: int, offset: int) -> tuple[int, int]:
    """Both as `int`; a page that cannot be is a `ConfigError`."""
    return counted("limit", limit), counted("offset", offset, least=0)
