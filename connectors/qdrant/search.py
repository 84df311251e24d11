"""How a collection of Qdrant is read: searches, documents by id and by page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vdr_db.connectors.base import Hit, Id, Page, Record, checked_page, page_token
from vdr_db.connectors.fusion import checked_weight, paged
from vdr_db.connectors.ids import checked_ids, id_order
from vdr_db.connectors.qdrant.documents import (
    checked_fusion,
    checked_nearest,
    hits_of,
    id_of,
    point_of_text,
    record_of,
    shown,
)
from vdr_db.connectors.qdrant.engine import ID_FIELD, HybridQuery, PointId, Stored
from vdr_db.connectors.qdrant.existing import point_of
from vdr_db.connectors.qdrant.lifecycle import CollectionLifecycle
from vdr_db.connectors.qdrant.server import ServerEngine
from vdr_db.connectors.renamed import renamed
from vdr_db.connectors.store import TRUSTED_S
from vdr_db.connectors.validation import DOCUMENT_FIELD, checked_query
from vdr_db.sparse import SparseRows

__all__ = ["POINTS_AT_ONCE", "CollectionReader"]

POINTS_AT_ONCE = 1000
RANK_CONSTANT = 2
"""What Qdrant uses for its own fusion when a request names none; it counts ranks from 0."""


class CollectionReader(CollectionLifecycle):
    """The half of `QdrantStore` that reads."""

    def search_with_dense(
        self,
        row: SparseRows,
        vector: Any,
        limit: int = 10,
        filter: Any = None,
        offset: int = 0,
        *,
        using: str | None = None,
        depth: int = 100,
        rank_constant: int | None = None,
        dense_weight: float = 1.0,
    ) -> list[Hit]:
        """The best documents by sparse and dense vector together: reciprocal rank fusion (RRF).

        Args:
            row: The sparse query, one row.
            vector: The dense query, `[size]`.
            limit: Hits wanted.
            filter: Conditions on payloads, for both sides.
            offset: Hits to leave out at the start.
            using: Name of the dense vector; needed when there are several.
            depth: Hits of each side that the fusion looks at; those below follow after them.
            rank_constant: Larger values give the first ranks less weight; `None` is Qdrant's, 2.
            dense_weight: Weight of the dense ranking, where the sparse one has 1.

        Raises:
            ConfigError: There is no such dense vector, or a number is impossible.
            ShapeError: A query has another shape.
        """
        limit, offset = checked_page(limit, offset)
        depth, rank_constant = checked_fusion(depth, rank_constant)
        made = self._made()
        self._look_again(TRUSTED_S)
        query = checked_query(row, made.width, self._where, single=True)
        using, numbers = checked_nearest(vector, using, made.dense, self._where)
        asked = HybridQuery(query, using, numbers, filter)
        weights = [1.0, checked_weight("dense_weight", dense_weight)]

        def rankings(count: int) -> list[list[tuple[tuple[Id, PointId], float]]]:
            answers = self._engine.rankings(asked, count)
            return [[((id_of(one), one.point), one.score) for one in answer] for answer in answers]

        page = paged(
            rankings,
            RANK_CONSTANT if rank_constant is None else rank_constant,
            lambda one: id_order(one[0]),
            depth=depth,
            limit=limit,
            offset=offset,
            weights=weights if query.nnz else weights[1:],
        )
        records = self._engine.retrieve([point for (_, point), _ in page], False)
        payloads = {one.point: shown(one.payload) for one in records}
        # One that was deleted meanwhile is not there any more.
        return [Hit(id, x, payloads[point]) for (id, point), x in page if point in payloads]

    search_hybrid = renamed("search_hybrid", search_with_dense)

    def search_groups(
        self, row: SparseRows, group_by: str, limit: int = 10, size: int = 3, filter: Any = None
    ) -> list[tuple[Any, list[Hit]]]:
        """The best values of a payload field, each with its best documents; on a server.

        Args:
            row: The query, one row.
            group_by: A payload field, such as the document that passages belong to.
            limit: Values wanted.
            size: Documents of each at most.
            filter: Conditions on payloads.

        Raises:
            ConfigError: The collection is embedded.
        """
        limit, _ = checked_page(limit, 0)
        size, _ = checked_page(size, 0)
        query = checked_query(row, self._made_width(), self._where, single=True)
        engine = self._server()
        if not query.nnz:
            return []
        found = engine.groups(query, group_by, limit, size, filter)
        return [(value, hits_of(points)) for value, points in found]

    def search_documents(
        self, rows: SparseRows, limit: int, filter: Any = None
    ) -> list[list[Hit]] | None:
        """The best passages of the best documents; see `Store.search_documents`."""
        if not isinstance(self._engine, ServerEngine):
            return None
        self._look_again(TRUSTED_S)
        queries = checked_query(rows, self._made_width(), self._where)
        return [
            [hits[0] for _, hits in self.search_groups(row, DOCUMENT_FIELD, limit, 1, filter)]
            for row in queries
        ]

    def get(self, ids: Sequence[Id], with_rows: bool = False) -> list[Record]:
        """The documents of these ids in this order; unknown ids are left out."""
        made = self._made()
        width = made.width
        wanted = [point_of(made, id) for id in checked_ids(ids)]
        found: dict[PointId, Stored] = {}
        for start in range(0, len(wanted), POINTS_AT_ONCE):
            page = self._engine.retrieve(wanted[start : start + POINTS_AT_ONCE], with_rows)
            found.update((stored.point, stored) for stored in page)
        return [
            record_of(found[point], width if with_rows else None)
            for point in wanted
            if point in found
        ]

    def ids(self, filter: Any = None) -> Iterator[Id]:
        """All ids, or those the filter keeps, in the order of the points.

        Documents written meanwhile may be missed.
        """
        self._made()
        after: PointId | None = None
        while True:
            self._check_open()
            page, after = self._engine.scroll(after, POINTS_AT_ONCE, [ID_FIELD], filter)
            for stored in page:
                yield id_of(stored)
            if after is None:
                return

    def scroll(self, limit: int = 100, filter: Any = None, after: str | None = None) -> Page:
        """Documents in the order of the points; see `Store.scroll`."""
        self._made()
        limit, _ = checked_page(limit, 0)
        start = None if after is None else page_token(after, point_of_text, self._where)
        stored, following = self._engine.scroll(start, limit, None, filter)
        records = [record_of(one, None) for one in stored]
        return Page(records, None if following is None else str(following))

    def count(self, filter: Any = None) -> int:
        """Number of documents, of those the filter keeps when one is given."""
        self._check_open()
        return 0 if self._manifest is None else self._engine.count(filter)

    def _hits(self, queries: SparseRows, limit: int, offset: int, filter: Any) -> list[list[Hit]]:
        return list(map(hits_of, self._engine.search(queries, limit, offset, filter)))
