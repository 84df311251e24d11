"""Reads an index of ours: by query, many queries at once, vectors and text together, or by id."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

from vdr_db.connectors.base import Hit, Id, Record, checked_page
from vdr_db.connectors.elasticsearch.bodies import (
    document_id,
    id_of,
    query_scale,
    read_features,
    row_query,
    search_body,
    text_query,
)
from vdr_db.connectors.elasticsearch.filters import filter_query
from vdr_db.connectors.elasticsearch.lifecycle import IndexLifecycle
from vdr_db.connectors.elasticsearch.transport import busy, error_reason, refusal
from vdr_db.connectors.fusion import fused
from vdr_db.connectors.ids import checked_ids, id_order
from vdr_db.connectors.renamed import renamed
from vdr_db.connectors.validation import checked_query
from vdr_db.errors import ConfigError, StoreError, StoreUnavailable, require
from vdr_db.filters import Filter, parse_filter
from vdr_db.sparse import SparseRows

__all__ = ["IndexReader"]

Fusion = Literal["rrf", "sum"]

_PAGE = 1000
_SEARCHES_AT_ONCE = 64


def as_query(filter: Filter | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A filter in any of its forms as an Elasticsearch query."""
    if filter is None:
        return None
    return filter_query(parse_filter(filter))


class IndexReader(IndexLifecycle):
    """The part of `ElasticsearchStore` that reads; `query_top_k` tokens of each query at most."""

    query_top_k: int | None

    def search_with_text(
        self,
        row: SparseRows,
        text: str,
        text_field: str,
        limit: int = 10,
        filter: Filter | Mapping[str, Any] | None = None,
        *,
        fusion: Fusion = "rrf",
        text_weight: float = 1.0,
        depth: int = 100,
        rank_constant: int = 60,
    ) -> list[Hit]:
        """The best documents by vector and BM25 together.

        Args:
            row: The query's vector.
            text: The query's text.
            text_field: A payload field that was named in `text_fields` when the index was made.
            limit: Hits wanted.
            filter: Limits both sides.
            fusion: `"rrf"` joins the two rankings by reciprocal ranks, here rather than on the
                server, where it needs a licence; `"sum"` adds `text_weight` times BM25 to the score
                in one query.
            text_weight: Weight of BM25 in a sum.
            depth: Hits of each side that fusion by ranks looks at.
            rank_constant: Larger values give the first ranks less weight.

        Raises:
            ConfigError: The field is not indexed as text, or an option is impossible.
        """
        checked_page(limit, 0)
        row = checked_query(row, self._made_width(), self._where, single=True)
        if fusion not in ("rrf", "sum"):
            raise ConfigError(f"`fusion` must be 'rrf' or 'sum', got {fusion!r}.")
        fields = self._index.made().text_fields
        if text_field not in fields:
            raise ConfigError(
                f"{self._where} has no text field {text_field!r}, only {list(fields)}; name it in "
                "`text_fields` when the index is made."
            )
        sides = [text_query(text, text_field)]
        scale = 1.0
        if row.nnz:
            vector, scale = self._row_query(row)
            sides.append(vector)
        tree = as_query(filter)
        if fusion == "sum":
            sides[0] = text_query(text, text_field, boost=text_weight * scale)
            both = {"bool": {"should": sides, "minimum_should_match": 1}}
            return self._run([search_body(both, limit=limit, filter=tree)], [scale])[0]
        bodies = [search_body(side, limit=max(depth, limit), filter=tree) for side in sides]
        rankings = self._run(bodies, [1.0] * len(bodies))
        payloads = {hit.id: hit.payload for ranking in rankings for hit in ranking}
        # The constant of the paper counts ranks from 1.
        scores = fused([[hit.id for hit in one] for one in rankings], rank_constant + 1, id_order)
        return [Hit(id, scores[id], payloads[id]) for id in islice(scores, limit)]

    search_hybrid = renamed("search_hybrid", search_with_text)

    def get(self, ids: Sequence[Id], with_rows: bool = False) -> list[Record]:
        """The documents of these ids in this order; unknown ids are left out.

        Raises:
            StoreError: `with_rows`, and the index was made with `store_vectors=False`.
        """
        self._check_open()
        meta, checked = self._index.made(), checked_ids(ids)
        if with_rows and not meta.store_vectors:
            raise StoreError(
                f"{self._where} was made with store_vectors=False, so no vectors can be read "
                "back; make the index anew with store_vectors=True to explain or copy from it."
            )
        source = ["payload", meta.field] if with_rows else ["payload"]
        records = []
        for start in range(0, len(checked), _PAGE):
            part = checked[start : start + _PAGE]
            docs = [{"_id": document_id(id), "_source": source} for id in part]
            answer = self.transport.call("POST", f"/{self._index.path}/_mget", {"docs": docs}).body
            for id, document in zip(part, answer["docs"], strict=True):
                if not document.get("found"):
                    continue
                body = document.get("_source") or {}
                row = None
                if with_rows:
                    features = read_features(body, meta.field, id)
                    row = SparseRows.from_dicts([features], meta.width)
                records.append(Record(id, body.get("payload") or {}, row))
        return records

    def ids(self, filter: Filter | Mapping[str, Any] | None = None) -> Iterator[Id]:
        """All ids, or those the filter keeps, integers first, each kind in ascending order."""
        self._made_width()
        return self._all_ids(as_query(filter))

    def count(self, filter: Filter | Mapping[str, Any] | None = None) -> int:
        """Number of documents, of those the filter keeps when one is given."""
        if self._about() is None:
            return 0
        tree = as_query(filter)
        body = {"query": {"bool": {"filter": [tree]}}} if tree is not None else None
        return int(self.transport.call("POST", f"/{self._index.path}/_count", body).body["count"])

    def _hits(self, queries: SparseRows, limit: int, offset: int, filter: Any) -> list[list[Hit]]:
        tree = as_query(filter)
        native, scales = zip(*map(self._row_query, queries), strict=True)
        bodies = [search_body(q, limit=limit, offset=offset, filter=tree) for q in native]
        return self._run(bodies, scales)

    def _all_ids(self, tree: dict[str, Any] | None) -> Iterator[Id]:
        """Each page behind the last id of the one before."""
        query = {"match_all": {}} if tree is None else {"bool": {"filter": [tree]}}
        body: dict[str, Any] = {
            "query": query,
            "size": _PAGE,
            "sort": [{"order": "asc"}],
            "_source": False,
            "track_total_hits": False,
        }
        while True:
            reply = self.transport.call("POST", f"/{self._index.path}/_search", body)
            hits = reply.body["hits"]["hits"]
            yield from (id_of(hit["sort"][0]) for hit in hits)
            if len(hits) < _PAGE:
                return
            body["search_after"] = hits[-1]["sort"]

    def _row_query(self, row: SparseRows) -> tuple[dict[str, Any], float]:
        """Query and scale of one row that has entries."""
        if self.query_top_k is not None:
            row = row.topk(self.query_top_k)
        ids, weights = row.row(0)
        meta, scale = self._index.made(), query_scale(weights)
        return row_query(ids, weights, field=meta.field, kind=meta.kind, scale=scale), scale

    def _run(self, bodies: Sequence[dict[str, Any]], scales: Sequence[float]) -> list[list[Hit]]:
        answers: list[Any] = []
        if len(bodies) == 1:
            # Some hits of some shards would look like all hits.
            params = {"allow_partial_search_results": "false"}
            path = f"/{self._index.path}/_search"
            answers = [self.transport.call("POST", path, bodies[0], params=params).body]
        else:
            for start in range(0, len(bodies), _SEARCHES_AT_ONCE):
                answers += self._run_many(bodies[start : start + _SEARCHES_AT_ONCE])
        return [
            [
                Hit(
                    id_of(hit["sort"][1]),
                    float(hit["_score"]) / scale,
                    (hit.get("_source") or {}).get("payload") or {},
                )
                for hit in answer["hits"]["hits"]
            ]
            for answer, scale in zip(answers, scales, strict=True)
        ]

    def _run_many(self, bodies: Sequence[dict[str, Any]]) -> list[Any]:
        orjson = require("orjson", "elasticsearch")
        answers: list[Any] = [None] * len(bodies)
        path = f"/{self._index.path}/_msearch"

        def ask() -> None:
            waiting = [number for number, answer in enumerate(answers) if answer is None]
            head = b'{"allow_partial_search_results":false}\n'
            body = b"".join(head + orjson.dumps(bodies[number]) + b"\n" for number in waiting)
            responses = self.transport.once("POST", path, body).body["responses"]
            passing = None
            for number, answer in zip(waiting, responses, strict=True):
                status, reason = int(answer.get("status", 200)), error_reason(answer)
                if status < 400:
                    answers[number] = answer
                elif (failure := busy(status, f"searches refused for now: {reason}")) is None:
                    raise refusal(status, f"POST {path}: {status} {reason}")
                else:
                    passing = failure
            if passing is not None:
                raise StoreUnavailable(passing.reason, failure=passing)

        self.transport.retrier.call(ask)
        return answers
