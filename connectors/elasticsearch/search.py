"""Reads an index of ours: by query, many queries at once, vectors and text together, or by id."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from vdr_db.connectors.base import Hit, Id, Record
from vdr_db.connectors.elasticsearch.bodies import (
    document_id,
    fuse_ranks,
    id_of,
    query_scale,
    read_features,
    row_query,
    search_body,
    text_query,
)
from vdr_db.connectors.elasticsearch.filters import filter_query
from vdr_db.connectors.elasticsearch.index import VersionedIndex
from vdr_db.connectors.elasticsearch.transport import Transport, busy, error_reason, refusal
from vdr_db.errors import ConfigError, StoreUnavailable, require
from vdr_db.filters import Filter, parse_filter
from vdr_db.sparse import SparseRows

__all__ = ["Fusion", "Searcher", "as_query"]

Fusion = Literal["rrf", "sum"]

_PAGE = 1000
_SEARCHES_AT_ONCE = 64


def as_query(filter: Filter | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A filter in any of its forms as an Elasticsearch query."""
    if filter is None:
        return None
    return filter_query(filter if isinstance(filter, Filter) else parse_filter(filter))


class Searcher:
    """Reads `index`; searches use at most `query_top_k` tokens of each query."""

    def __init__(
        self, transport: Transport, index: VersionedIndex, query_top_k: int | None
    ) -> None:
        """Sends through `transport`."""
        self._transport = transport
        self._index = index
        self._query_top_k = query_top_k

    def rows(
        self, rows: SparseRows, limit: int, filter: Filter | Mapping[str, Any] | None, offset: int
    ) -> list[list[Hit]]:
        """The best documents of each row; no request is made for rows without entries."""
        tree = as_query(filter)
        result: list[list[Hit]] = [[] for _ in range(len(rows))]
        numbers, bodies, scales = [], [], []
        for number, row in enumerate(rows):
            query, scale = self._row_query(row)
            if query is not None:
                numbers.append(number)
                scales.append(scale)
                bodies.append(search_body(query, limit=limit, offset=offset, filter=tree))
        for number, hits in zip(numbers, self._run(bodies, scales), strict=True):
            result[number] = hits
        return result

    def hybrid(
        self,
        row: SparseRows,
        text: str,
        text_field: str,
        limit: int,
        filter: Filter | Mapping[str, Any] | None,
        *,
        fusion: Fusion,
        text_weight: float,
        depth: int,
        rank_constant: int,
    ) -> list[Hit]:
        """The best documents by vector and BM25; see `ElasticsearchStore.search_with_text`."""
        if fusion not in ("rrf", "sum"):
            raise ConfigError(f"`fusion` must be 'rrf' or 'sum', got {fusion!r}.")
        meta = self._index.made()
        if text_field not in meta.text_fields:
            raise ConfigError(
                f"{self._index.where} has no text field {text_field!r}, only "
                f"{list(meta.text_fields)}; name it in `text_fields` when the index is made."
            )
        vector, scale = self._row_query(row)
        tree = as_query(filter)
        if fusion == "sum":
            clauses = [text_query(text, text_field, boost=text_weight * scale)]
            clauses += [] if vector is None else [vector]
            both = {"bool": {"should": clauses, "minimum_should_match": 1}}
            return self._run([search_body(both, limit=limit, filter=tree)], [scale])[0]
        sides = [text_query(text, text_field)] + ([] if vector is None else [vector])
        bodies = [search_body(side, limit=max(depth, limit), filter=tree) for side in sides]
        rankings = self._run(bodies, [1.0] * len(bodies))
        return fuse_ranks(rankings, constant=rank_constant, limit=limit)

    def get(self, ids: Sequence[Id], with_rows: bool) -> list[Record]:
        """The documents of checked ids, in their order."""
        meta = self._index.made()
        source = ["payload", meta.field] if with_rows else ["payload"]
        records = []
        for start in range(0, len(ids), _PAGE):
            part = ids[start : start + _PAGE]
            docs = [{"_id": document_id(id), "_source": source} for id in part]
            answer = self._transport.call("POST", f"/{self._index.path}/_mget", {"docs": docs}).body
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
        """All ids, or those the filter keeps, each page behind the last id of the one before."""
        tree = as_query(filter)
        query = {"match_all": {}} if tree is None else {"bool": {"filter": [tree]}}
        after: list[Any] | None = None
        while True:
            body: dict[str, Any] = {
                "query": query,
                "size": _PAGE,
                "sort": [{"order": "asc"}],
                "_source": False,
                "track_total_hits": False,
            }
            if after is not None:
                body["search_after"] = after
            reply = self._transport.call("POST", f"/{self._index.path}/_search", body)
            hits = reply.body["hits"]["hits"]
            yield from (id_of(hit["sort"][0]) for hit in hits)
            if len(hits) < _PAGE:
                return
            after = hits[-1]["sort"]

    def _row_query(self, row: SparseRows) -> tuple[dict[str, Any] | None, float]:
        """Query and scale of one row; no query for a row without entries."""
        if self._query_top_k is not None:
            row = row.topk(self._query_top_k)
        ids, weights = row.row(0)
        if not ids.size:
            return None, 1.0
        meta, scale = self._index.made(), query_scale(weights)
        return row_query(ids, weights, field=meta.field, kind=meta.kind, scale=scale), scale

    def _run(self, bodies: Sequence[dict[str, Any]], scales: Sequence[float]) -> list[list[Hit]]:
        answers: list[Any] = []
        if len(bodies) == 1:
            # Some hits of some shards would look like all hits.
            params = {"allow_partial_search_results": "false"}
            path = f"/{self._index.path}/_search"
            answers = [self._transport.call("POST", path, bodies[0], params=params).body]
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
            responses = self._transport.once("POST", path, body).body["responses"]
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

        self._transport.retrier.call(ask)
        return answers
