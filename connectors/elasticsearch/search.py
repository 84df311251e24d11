"""Reads an index of ours: by query, many queries at once, vectors and text together, or by id."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any, Literal

import numpy as np

from vdr_db.connectors.base import Hit, Id, Page, Record, checked_page, page_token
from vdr_db.connectors.elasticsearch.bodies import (
    document_id,
    highlighting,
    query_scale,
    read_features,
    read_sort_key,
    row_query,
    search_body,
    text_query,
)
from vdr_db.connectors.elasticsearch.filters import filter_query
from vdr_db.connectors.elasticsearch.lifecycle import IndexLifecycle
from vdr_db.connectors.elasticsearch.transport import busy, error_reason, refusal
from vdr_db.connectors.fusion import checked_weight, fused
from vdr_db.connectors.ids import checked_ids, id_of, id_order
from vdr_db.connectors.renamed import renamed
from vdr_db.connectors.store import TRUSTED_S
from vdr_db.connectors.validation import checked_query
from vdr_db.errors import ConfigError, StoreError, StoreUnavailable, require
from vdr_db.failure import Failure
from vdr_db.filters import Filter, parse_filter
from vdr_db.sparse import SparseRows

__all__ = ["IndexReader"]

Fusion = Literal["rrf", "sum"]

_PAGE = 1000
# How servers tell `index.max_result_window`, and what it is unless they do.
_WINDOW = re.compile(r"size must be less than or equal to: \[(\d+)\]")
_USUAL_WINDOW = 10_000
# Errors of single documents that no waiting helps against; full pools and lost shards pass.
_LASTING = ("index_closed", "index_not_found", "illegal_argument", "security")
_SEARCHES_AT_ONCE = 64


def as_query(filter: Filter | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A filter in any of its forms as an Elasticsearch query."""
    if filter is None:
        return None
    return filter_query(parse_filter(filter))


class IndexReader(IndexLifecycle):
    """The part of `ElasticsearchStore` that reads; `query_top_k` tokens of each query at most."""

    query_top_k: int | None
    _window = _USUAL_WINDOW

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
        highlight: bool = False,
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
            text_weight: Weight of BM25, or of its ranking, where the vector's is 1.
            depth: Hits of each side that fusion by ranks looks at.
            rank_constant: Larger values give the first ranks less weight.
            highlight: Ask for `Hit.highlights`, of hits by vector alone too.

        Raises:
            ConfigError: The field is not indexed as text, or an option is impossible.
        """
        limit, _ = checked_page(limit, 0)
        row = checked_query(row, self._made_width(), self._where, single=True)
        self._look_again(TRUSTED_S)
        text_weight = checked_weight("text_weight", text_weight)
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
        marks = highlighting(sides[0], text_field) if highlight else {}
        if fusion == "sum":
            sides[0] = text_query(text, text_field, boost=text_weight * scale)
            both = {"bool": {"should": sides, "minimum_should_match": 1}}
            body = search_body(both, limit=limit, filter=tree)
            return self._run([{**body, **marks}], [scale])[0]
        most = max(depth, limit)
        bodies = [{**search_body(side, limit=most, filter=tree), **marks} for side in sides]
        rankings = self._run(bodies, [1.0] * len(bodies))
        hits = {hit.id: hit for ranking in rankings for hit in ranking}
        # The constant of the paper counts ranks from 1.
        found = [[hit.id for hit in one] for one in rankings]
        weights = [text_weight, 1.0][: len(found)]
        scores = fused(found, rank_constant + 1, id_order, weights)
        return [replace(hits[id], score=scores[id]) for id in islice(scores, limit)]

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
            for id, document in zip(part, self._documents(docs), strict=True):
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
        body = self._in_order(as_query(filter), False)
        return (id_of(hit["sort"][0]) for hit in self._paged(body, _PAGE))

    def scroll(
        self,
        limit: int = 100,
        filter: Filter | Mapping[str, Any] | None = None,
        after: str | None = None,
    ) -> Page:
        """Documents in the order of `ids`; see `Store.scroll`."""
        self._made_width()
        limit, _ = checked_page(limit, 0)
        body = self._in_order(as_query(filter), ["payload"])
        if after is not None:
            body["search_after"] = [page_token(after, read_sort_key, self._where)]
        hits = list(islice(self._paged(body, limit + 1), limit + 1))
        records = [
            Record(id_of(hit["sort"][0]), (hit.get("_source") or {}).get("payload") or {})
            for hit in hits[:limit]
        ]
        return Page(records, hits[limit - 1]["sort"][0] if len(hits) > limit else None)

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

    def search_documents(
        self, rows: SparseRows, limit: int, filter: Any = None
    ) -> list[list[Hit]] | None:
        """The best passages of the best documents; see `Store.search_documents`."""
        self._look_again(TRUSTED_S)
        queries = checked_query(rows, self._made_width(), self._where)
        asked = np.flatnonzero(queries.counts)
        if limit > self._window or not asked.size:
            return None
        tree = as_query(filter)
        native, scales = zip(*map(self._row_query, queries[asked]), strict=True)
        bodies = [search_body(q, limit=limit, filter=tree, is_grouped=True) for q in native]
        try:
            answers = self._answers_at_once(bodies)
        except StoreError as error:
            self._learn_window(error)
            return None
        found: list[list[Hit]] = [[] for _ in range(len(queries))]
        for i, hits, scale in zip(asked.tolist(), answers, scales, strict=True):
            found[i] = [_hit(hit, scale) for hit in hits]
        return found

    def _in_order(self, tree: dict[str, Any] | None, source: Any) -> dict[str, Any]:
        """A search for all that a query keeps, in the order of their ids."""
        return {
            "query": {"match_all": {}} if tree is None else {"bool": {"filter": [tree]}},
            "sort": [{"order": "asc"}],
            "_source": source,
            "track_total_hits": False,
        }

    def _found(self, body: dict[str, Any]) -> list[Any]:
        """The hits of a search, page by page when they lie beyond the server's window."""
        start, end = body["from"], body["from"] + body["size"]
        if end <= self._window:
            try:
                return self._page(body)
            except StoreError as error:
                self._learn_window(error)
        return list(islice(self._paged({**body, "from": 0}, end), start, end))

    def _paged(self, body: dict[str, Any], size: int) -> Iterator[Any]:
        """All hits of a search, each page behind the last hit of the one before."""
        while True:
            body = {**body, "size": min(size, self._window)}
            try:
                hits = self._page(body)
            except StoreError as error:
                self._learn_window(error)
                continue
            yield from hits
            if len(hits) < body["size"]:
                return
            body["search_after"] = hits[-1]["sort"]

    def _page(self, body: Mapping[str, Any]) -> list[Any]:
        # Some hits of some shards would look like all hits.
        params = {"allow_partial_search_results": "false"}
        answer = self.transport.call("POST", f"/{self._index.path}/_search", body, params=params)
        hits: list[Any] = answer.body["hits"]["hits"]
        return hits

    def _learn_window(self, error: StoreError) -> None:
        """Takes a smaller window from the server's refusal of a larger one, or raises it."""
        told = _WINDOW.search(str(error))
        if told is None or int(told[1]) >= self._window:
            raise error
        self._window = int(told[1])

    def _documents(self, docs: list[dict[str, Any]]) -> list[Any]:
        """The answer for each document; an error of one is no "not there"."""

        def ask() -> list[Any]:
            found: list[Any] = self.transport.once(
                "POST", f"/{self._index.path}/_mget", {"docs": docs}
            ).body["docs"]
            for document in found:
                if error := document.get("error"):
                    raise self._item_error(error)
            return found

        return self.transport.retrier.call(ask)

    def _item_error(self, error: Any) -> StoreError:
        """What it means that one document cannot be read."""
        reason = f"{self._where}: {error_reason({'error': error})}"
        if isinstance(error, Mapping) and str(error.get("type", "")).startswith(_LASTING):
            return refusal(400, reason)
        return StoreUnavailable(reason, failure=Failure("transient", reason))

    def _row_query(self, row: SparseRows) -> tuple[dict[str, Any], float]:
        """Query and scale of one row that has entries."""
        if self.query_top_k is not None:
            row = row.topk(self.query_top_k)
        ids, weights = row.row(0)
        meta, scale = self._index.made(), query_scale(weights)
        return row_query(ids, weights, field=meta.field, kind=meta.kind, scale=scale), scale

    def _run(self, bodies: Sequence[dict[str, Any]], scales: Sequence[float]) -> list[list[Hit]]:
        return [
            [_hit(hit, scale) for hit in hits]
            for hits, scale in zip(self._answers(bodies), scales, strict=True)
        ]

    def _answers(self, bodies: Sequence[dict[str, Any]]) -> list[list[Any]]:
        """The hits of each search as the server gives them."""
        if len(bodies) == 1 or bodies[0]["from"] + bodies[0]["size"] > self._window:
            return list(map(self._found, bodies))
        return self._answers_at_once(bodies)

    def _answers_at_once(self, bodies: Sequence[dict[str, Any]]) -> list[list[Any]]:
        answers: list[list[Any]] = []
        for start in range(0, len(bodies), _SEARCHES_AT_ONCE):
            part = self._run_many(bodies[start : start + _SEARCHES_AT_ONCE])
            answers += [answer["hits"]["hits"] for answer in part]
        return answers

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


def _hit(hit: Any, scale: float) -> Hit:
    """A hit of a search that is sorted by score and id."""
    score, key = hit["sort"]
    payload = (hit.get("_source") or {}).get("payload") or {}
    marked = tuple(chain.from_iterable(hit.get("highlight", {}).values()))
    return Hit(id_of(key), float(score) / scale, payload, highlights=marked)
