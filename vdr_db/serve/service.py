"""`SearchService`: one collection and its encoder, asked by many requests."""

from __future__ import annotations

import itertools
import ntpath
import posixpath
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from vdr_db.budget import BUDGET, Budget
from vdr_db.connectors.images import IMAGE_KEY, THUMBNAIL_KEY
from vdr_db.connectors.probes import check_probes
from vdr_db.errors import InputError, StoreError
from vdr_db.explain.explanation import Explanation, Match
from vdr_db.explain.hits import HitView, hit_view
from vdr_db.explain.items import explain_text
from vdr_db.explain.matches import make_match
from vdr_db.explain.spans import token_spans
from vdr_db.explain.words import matched_words, shares_of
from vdr_db.forks import renew_after_fork
from vdr_db.serve.batching import Batcher, Side
from vdr_db.serve.facets import (
    Choice,
    Facet,
    FacetCounts,
    both_filters,
    count_values,
    filter_of,
    find_facets,
    named_facets,
)
from vdr_db.sparse import SparseRows

if TYPE_CHECKING:
    from vdr_db.connectors import Collection, Hit, Id
    from vdr_db.encoders.text import SparseEncoder

__all__ = ["Found", "ImageSearch", "SearchService"]

FACET_DEPTH = 200
"""Best hits whose payloads are counted for facets."""
SAMPLE = 1000
"""Documents looked at to find out which fields are facets."""


class ImageSearch(Protocol):
    """What searching by an image needs: vectors of the bytes of image files."""

    def encode_images(self, images: Sequence[bytes], /) -> SparseRows:
        """One row for each image, over the vocabulary of the collection.

        Raises:
            InputError: A file is no image that can be read.
        """


@dataclass(frozen=True)
class Found:
    """One page of results.

    Attributes:
        hits: The hits of this page.
        counted: Hits counted: up to `FACET_DEPTH`, or to the end of this page.
        has_more: Whether there are more than were counted.
        facets: How often values occur among the best hits.
        took_ms: Time of encoding, searching and gathering.
        words: Words of the query's vector, heaviest first.
    """

    hits: Sequence[HitView]
    counted: int
    has_more: bool
    facets: Sequence[FacetCounts]
    took_ms: float
    words: Sequence[tuple[str, float]] = field(default=())


class SearchService:
    """One collection and its encoder, asked by many requests.

    Args:
        collection: What is searched; closed with the service.
        encoder: The collection's.
        facets: Payload fields to offer as facets; None finds them in a sample of the documents.
        images: Makes vectors of uploaded images; None offers no upload.
        budget: How much is given to requests.
    """

    def __init__(
        self,
        collection: Collection,
        encoder: SparseEncoder,
        *,
        facets: Sequence[str] | None = None,
        images: ImageSearch | None = None,
        budget: Budget = BUDGET,
    ) -> None:
        self.collection, self.budget = collection, budget
        check_probes(encoder, collection.store.stamp, "query", repr(collection.store))
        self.batcher = Batcher(encoder, most=budget.batch_texts)
        self.encoder = encoder
        self.images = images
        # The embedded engine is asked by one thread at a time; a search takes about a millisecond.
        self._store_lock = threading.Lock()
        renew_after_fork(self)
        sample = [
            record.payload
            for record in collection.get(list(itertools.islice(collection.ids(), SAMPLE)))
        ]
        if facets is None:
            own = (collection.text_key, "title", IMAGE_KEY, THUMBNAIL_KEY)
            self.facets = find_facets(sample, without=own)
        else:
            self.facets = named_facets(sample, facets)

    def after_fork(self) -> None:
        """A lock that a thread of the parent held is held for ever here."""
        self._store_lock = threading.Lock()

    def close(self) -> None:
        """Closes the collection, after what is going on; a second call does nothing."""
        self.batcher.close()
        with self._store_lock:
            self.collection.close()

    def info(self) -> dict[str, Any]:
        """What is served: number of texts, model, facets; no place on this machine."""
        stamp = self.collection.store.stamp or self.encoder.stamp()
        with self._store_lock:
            texts = self.collection.count()
        return {
            "texts": texts,
            "model": _model_name(stamp.model),
            "head": stamp.head,
            "activation": stamp.activation,
            "k": stamp.k,
            "documents": self.collection.documents,
            "facets": [facet.key for facet in self.facets],
            "images": self.images is not None,
        }

    def is_ready(self) -> bool:
        """Whether the store answers; other errors than its own are raised."""
        try:
            with self._store_lock:
                self.collection.count()
        except StoreError:
            return False
        return True

    def encode(self, side: Side, texts: Sequence[str]) -> Future[SparseRows]:
        """The rows of texts, encoded together with those of other requests."""
        return self.batcher.submit(side, texts)

    def refuse_long(self, side: Side, texts: Sequence[str]) -> None:
        """Looks whether texts are read to their ends.

        Raises:
            InputError: One is longer than the model reads.
        """
        own = self.encoder.frame(side).own
        for place, text in enumerate(texts):
            count = len(token_spans(self.encoder, text)[0])
            if count > own:
                raise InputError(
                    f"inputs: text {place} must have at most {own} tokens, got {count}; leave "
                    "`truncate` out to have it cut."
                )

    def encode_images(self, images: Sequence[bytes]) -> SparseRows:
        """One row for each image.

        Raises:
            InputError: Images are not read here, or one cannot be.
        """
        if self.images is None:
            raise InputError("this service reads no images; its model reads texts only.")
        return self.images.encode_images(images)

    def write(
        self,
        texts: Sequence[str],
        ids: Sequence[Id],
        payloads: Sequence[Mapping[str, Any]],
    ) -> list[Id]:
        """Stores texts, as `Collection.add_texts` does."""
        with self._store_lock:
            return self.collection.add_texts(texts, ids, payloads)

    def delete(self, ids: Sequence[Id]) -> int:
        """Removes documents; returns how many were there."""
        with self._store_lock:
            return self.collection.delete(ids)

    def search(
        self,
        query: str,
        *,
        limit: int,
        offset: int = 0,
        choices: Sequence[Choice] = (),
        filter: Mapping[str, Any] | None = None,
    ) -> Found:
        """One page of hits for a text; `filter` is that of `vdr_db.filters`."""
        start = time.perf_counter()
        row = self.encode("query", [query]).result()
        own, _ = token_spans(self.encoder, query)
        return self._found(row, own, start, limit, offset, choices, filter)

    def search_image(
        self, image: bytes, *, limit: int, filter: Mapping[str, Any] | None = None
    ) -> Found:
        """The best hits for an image.

        Raises:
            InputError: Images are not searched here, or this is none.
        """
        start = time.perf_counter()
        row = self.encode_images([image])
        return self._found(row, [], start, limit, 0, (), filter)

    def explanation(self, query: str) -> Explanation:
        """What the vector of a query says."""
        return explain_text(self.encoder, query, side="query")

    def match(self, query: str, id: Id) -> Match | None:
        """Why a document matches, or None when there is no such document."""
        row = self.encode("query", [query]).result()
        with self._store_lock:
            try:
                record = self.collection.matched(row, id)
            except InputError:
                return None
            terms = self.collection.explain(row, id)
        return make_match(
            self.encoder,
            explain_text(self.encoder, query, side="query", row=row),
            record,
            terms,
            text_key=self.collection.text_key,
            follow=self.collection.documents != "tokens",
        )

    def _found(
        self,
        row: SparseRows,
        own: Sequence[int],
        start: float,
        limit: int,
        offset: int,
        choices: Sequence[Choice],
        filter: Mapping[str, Any] | None,
    ) -> Found:
        keep = both_filters(filter, filter_of(choices))
        deep = max(FACET_DEPTH, offset + limit) + 1
        with self._store_lock:
            hits = self.collection.search(row, limit=deep, filter=keep)
            page = hits[offset : offset + limit]
            records = self.collection.records_of(page)
            counts = [self._count(facet, row, hits, choices, filter) for facet in self.facets]
        rows = {record.id: record.row for record in records}
        key = self.collection.text_key
        # Files are never read for a request, so a small copy is all there is to see of an image.
        views = [
            hit_view(self.encoder, hit, shares_of(row, rows.get(hit.id)), own, text_key=key)
            for hit in page
        ]
        return Found(
            hits=views,
            counted=min(len(hits), deep - 1),
            has_more=len(hits) == deep,
            facets=[count for count in counts if count.counts],
            took_ms=1000 * (time.perf_counter() - start),
            words=matched_words(self.encoder.vocabulary, own, row.to_dicts()[0]),
        )

    def _count(
        self,
        facet: Facet,
        row: SparseRows,
        hits: Sequence[Hit],
        choices: Sequence[Choice],
        filter: Mapping[str, Any] | None,
    ) -> FacetCounts:
        if any(choice.facet.key == facet.key for choice in choices):
            # What else could be chosen is seen without this facet's own choice.
            wider = both_filters(filter, filter_of(choices, without=facet))
            hits = self.collection.search(row, limit=FACET_DEPTH, filter=wider)
        return count_values(facet, (hit.payload for hit in hits[:FACET_DEPTH]), choices)


def _model_name(model: str) -> str:
    """The name of a model; of a folder only its last part, for places are nobody's business."""
    is_place = posixpath.isabs(model) or ntpath.isabs(model) or model.startswith((".", "~"))
    return ntpath.basename(model.rstrip("/\\")) if is_place else model
