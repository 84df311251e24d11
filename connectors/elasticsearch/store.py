"""`ElasticsearchStore`: a collection of sparse rows in an Elasticsearch or OpenSearch index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from vdr_db.connectors.base import BatchLimits, Documents, EmptyRows, Id, Written
from vdr_db.connectors.elasticsearch.bodies import FieldKind, bulk_lines, delete_lines
from vdr_db.connectors.elasticsearch.bulk import BulkWriter
from vdr_db.connectors.elasticsearch.filters import refuse_nameless
from vdr_db.connectors.elasticsearch.index import IndexMeta, NewIndex, VersionedIndex
from vdr_db.connectors.elasticsearch.indices import merge_segments, refresh_index
from vdr_db.connectors.elasticsearch.search import IndexReader
from vdr_db.connectors.elasticsearch.transport import Transport, connect
from vdr_db.connectors.ids import checked_ids
from vdr_db.connectors.passages import Passages
from vdr_db.connectors.retry import Retrier, RetryPolicy
from vdr_db.connectors.store import About
from vdr_db.connectors.validation import prepare
from vdr_db.errors import ConfigError, RejectedRows, StoreError, StoreUnavailable
from vdr_db.sparse import SparseRows
from vdr_db.stamp import EncoderStamp

__all__ = ["ElasticsearchStore"]


class ElasticsearchStore(IndexReader):
    """A `Store` behind an alias, whose scores are inner products with 9-bit document weights.

    The engine cuts each document weight to 9 significant bits, so a score lies between 0 and 0.4 %
    below the exact inner product. Query weights keep their float32 value.

    Args:
        index: Name of the alias; the index itself is called `index-000001` and so on. An index made
            by this library may also be opened by its own name.
        client: A ready `elasticsearch.Elasticsearch` or `opensearchpy.OpenSearch` object, used with
            its own timeouts; or
        url: address of one node, or of several of one cluster; or
        cloud_id: name of a hosted deployment.
        api_key: Key, or (id, key), to authenticate with.
        basic_auth: (user, password) to authenticate with.
        client_options: More arguments of `elasticsearch.Elasticsearch`, such as `ca_certs`,
            `ssl_assert_fingerprint`, `client_cert` or `request_timeout` (seconds, 60 without).
        kind: Field type of a new index. `"rank_features"` works everywhere. `"sparse_vector"` needs
            8.15; its pruning of query tokens, which changes scores, is switched off.
        vector_field: Name of the vector field of a new index.
        store_vectors: Whether documents of a new index keep their vectors in `_source`. Without
            them an index is several times smaller, and these are impossible:
            `get(with_rows=True)`, `explain`, `rollover`, and whatever else reads `_source`.
        query_top_k: Sends only that many of the heaviest tokens of a query; `None` sends all. Time
            in the engine grows with the number of tokens.
        text_fields: Payload fields of a new index that `search_with_text` can search by BM25; with
            the name of an analyser for each, `{"text": "english"}`, if the standard one is not
            wanted.
        payload_types: Elasticsearch types for payload fields of a new index that other programs
            want to query by themselves, `{"year": "long"}`; our filters do not need them.
        shards: Primary shards of a new index; the server's choice without, 1 as a rule.
        replicas: Copies of each shard of a new index; the server's choice without, 1 as a rule.
            Serverless projects of Elasticsearch refuse both.
        settings: More index settings of a new index.
        max_docs: Documents in one bulk request at most.
        max_bytes: Bytes in one bulk request at most.
        retry: When and how long to try again.
    """

    concurrent_writers = 2
    """Streams of documents that a server takes at once, for an ingest."""

    def __init__(
        self,
        index: str,
        *,
        client: Any = None,
        url: str | Sequence[str] | None = None,
        cloud_id: str | None = None,
        api_key: str | tuple[str, str] | None = None,
        basic_auth: tuple[str, str] | None = None,
        client_options: Mapping[str, Any] | None = None,
        kind: FieldKind = "rank_features",
        vector_field: str = "vdr",
        store_vectors: bool = True,
        query_top_k: int | None = None,
        text_fields: Sequence[str] | Mapping[str, str | None] = (),
        payload_types: Mapping[str, Mapping[str, Any] | str] | None = None,
        shards: int | None = None,
        replicas: int | None = None,
        settings: Mapping[str, Any] | None = None,
        max_docs: int = 500,
        max_bytes: int = 8 << 20,
        retry: RetryPolicy | None = None,
    ) -> None:
        if query_top_k is not None and query_top_k < 1:
            raise ConfigError(f"`query_top_k` must be at least 1 or None, got {query_top_k}.")
        if min(max_docs, max_bytes) < 1:
            raise ConfigError(
                f"`max_docs` and `max_bytes` must be at least 1, got {max_docs} and {max_bytes}."
            )
        if isinstance(text_fields, str):
            raise TypeError(f"`text_fields` must be a sequence of names; pass [{text_fields!r}]")
        new = NewIndex(
            kind=kind,
            field=vector_field,
            store_vectors=store_vectors,
            text_fields=(
                text_fields if isinstance(text_fields, Mapping) else dict.fromkeys(text_fields)
            ),
            payload_types=payload_types,
            shards=shards,
            replicas=replicas,
            settings=settings,
        )
        own_options = (url, cloud_id, api_key, basic_auth, client_options)
        if client is not None and any(option is not None for option in own_options):
            raise ConfigError(
                "a ready `client` has its own address and credentials; give `client` or the others."
            )
        secrets: list[str] = []
        self._owns_client = client is None
        if client is None:
            client, secrets = connect(
                url=url,
                cloud_id=cloud_id,
                api_key=api_key,
                basic_auth=basic_auth,
                options=client_options or {},
            )
        self.transport = Transport(client, Retrier(retry), secrets=secrets)
        self.query_top_k = query_top_k
        self.limits = BatchLimits(rows=max_docs, bytes=max_bytes, row_bytes=max_bytes)
        self._writer = BulkWriter(self.transport, max_docs=max_docs, max_bytes=max_bytes)
        try:
            self._index = VersionedIndex(self.transport, index, new)
            self._index.put_right()
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        # The name only: addresses may hold what is nobody's business.
        return f"{type(self).__name__}({self._index.name!r})"

    @property
    def name(self) -> str:
        """The alias, or the name of an index opened by itself."""
        return self._index.name

    @property
    def passages(self) -> Passages | None:
        """How its documents are cut; `None` where each one is whole."""
        meta = self._index.meta()
        return None if meta is None else Passages.from_dict(meta.passages)

    def create(
        self,
        width: int,
        stamp: EncoderStamp | None = None,
        *,
        documents: Documents = "encoded",
        passages: Passages | None = None,
    ) -> None:
        """Makes index and alias, or checks what is there; see `Store.create`.

        Options of the constructor about new indices have no effect on an index that is there.

        Raises:
            StoreMismatch: It is there with another width, encoder or kind of documents, or it was
                not made by this library.
        """
        self._check_open()
        self._index.create(width, stamp, documents, passages)
        self._known = self._about()

    # Writing

    def upsert(
        self,
        rows: SparseRows,
        ids: Sequence[Id],
        payloads: Sequence[Mapping[str, Any] | None] | None = None,
        *,
        empty: EmptyRows = "store",
        existing: Literal["replace", "keep"] = "replace",
    ) -> Written:
        """Writes rows; see `Store.upsert`.

        Inside `loading` they are found by searches only when the block ends.

        Args:
            rows: Rows to write.
            ids: One id for each.
            payloads: One mapping or `None` for each.
            empty: What becomes of rows without entries.
            existing: `"keep"` leaves documents whose id is there, and does not count them. After a
                lost answer it cannot tell those from its own.

        Raises:
            InputError: Ids are unusable or repeated, or sizes disagree; nothing is written.
            RejectedRows: Some rows cannot be stored; all others are written.
            StoreUnavailable: The server stayed away; send the same call again.
        """
        self._look_again()
        meta = self._made()
        ready = prepare(
            rows,
            ids,
            payloads,
            width=meta.width,
            empty=empty,
            limits=self.limits,
            where=self._where,
            check=refuse_nameless,
        )
        action: Literal["index", "create"] = "index" if existing == "replace" else "create"
        count = requests = 0
        for batch in ready.batches(self.limits):
            lines = bulk_lines(
                ready.rows[batch],
                ready.ids[batch],
                ready.payloads[batch],
                action=action,
                field=meta.field,
            )
            report = self._writer.write(
                self._index.path,
                lines,
                action=action,
                require_alias=self._index.is_alias,
                refresh=batch.stop == len(ready.ids) and self._index.loader is None,
            )
            if self._index.loader is not None:
                self._index.loader()
            requests += report.requests
            count += len(report.written)
            for number, reason in report.rejected.items():
                ready.refused[ready.ids[batch.start + number]] = reason
        self._refresh(requests)
        if ready.refused:
            raise RejectedRows(list(ready.refused), list(ready.refused.values()))
        return Written(count, ready.empty, ready.skipped)

    def delete(self, ids: Sequence[Id]) -> int:
        """Removes documents; returns how many were there."""
        self._look_again()
        self._made()
        unique = list(dict.fromkeys(checked_ids(ids)))
        report = self._writer.write(
            self._index.path,
            delete_lines(unique),
            action="delete",
            require_alias=False,
            refresh=self._index.loader is None,
        )
        self._refresh(report.requests)
        if report.rejected:
            refused = [unique[number] for number in report.rejected]
            raise RejectedRows(refused, list(report.rejected.values()))
        return len(report.written)

    def flush(self) -> None:
        """Makes everything written visible, and durable under any translog setting."""
        self._made()
        refresh_index(self.transport, self.name)
        # 410: serverless projects keep all they acknowledge, and order their segments themselves.
        self.transport.call("POST", f"/{self._index.path}/_flush", allow=(410,))

    def optimize(self) -> None:
        """Merges the index to one segment, for faster searches; not while writing goes on."""
        self._made()
        merge_segments(self.transport, self.name)

    # Inside

    def _about(self) -> About | None:
        self._check_open()
        meta = self._index.meta()
        return None if meta is None else (meta.width, meta.encoder, meta.documents)

    def _about_now(self) -> About | None:
        self._index.forget()
        return self._about()

    def _write_stamp(self, stamp: EncoderStamp) -> None:
        self._index.write_stamp(stamp)

    def _made(self) -> IndexMeta:
        self._check_open()
        return self._index.made()

    def _release(self) -> None:
        self.transport.retrier.stop.set()
        if self._owns_client:
            self.transport.close()

    def _refresh(self, requests: int) -> None:
        """Makes what several requests wrote visible; the last of them refreshed its own shards."""
        if self._index.loader is None and requests > 1:
            try:
                refresh_index(self.transport, self.name)
            except StoreUnavailable:
                raise
            except StoreError:
                # Keys that may write may still not refresh. That is no failed write: the server
                # refreshes by itself, a second later as a rule.
                return
