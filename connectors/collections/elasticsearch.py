"""`VDRElasticsearch`: what users hold, a `Collection` in Elasticsearch or OpenSearch."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TypedDict

from vdr_db.connectors.address import Access, Server, server_url
from vdr_db.connectors.asking import ask
from vdr_db.connectors.base import Documents, Hit
from vdr_db.connectors.collections.collection import Collection
from vdr_db.connectors.collections.encoding import AnyEncoder, Mode, TextOptions
from vdr_db.connectors.documents import DocumentView
from vdr_db.connectors.elasticsearch.opensearch import opensearch_client
from vdr_db.connectors.elasticsearch.search import Fusion
from vdr_db.connectors.elasticsearch.store import ElasticsearchStore
from vdr_db.connectors.qdrant.errors import shown_url
from vdr_db.connectors.renamed import renamed
from vdr_db.errors import ConfigError, StoreUnavailable

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from vdr_db.connectors.elasticsearch.bodies import FieldKind
    from vdr_db.connectors.retry import RetryPolicy

__all__ = ["ElasticsearchOptions", "VDRElasticsearch"]


class ElasticsearchOptions(TypedDict, total=False):
    """Options of `ElasticsearchStore` that `VDRElasticsearch` takes as they are."""

    client: Any
    url: str | Sequence[str] | None
    cloud_id: str | None
    api_key: str | tuple[str, str] | None
    basic_auth: tuple[str, str] | None
    kind: FieldKind
    vector_field: str
    store_vectors: bool
    query_top_k: int | None
    text_fields: Sequence[str]
    payload_types: Mapping[str, Mapping[str, Any] | str] | None
    shards: int | None
    replicas: int | None
    settings: Mapping[str, Any] | None
    max_docs: int
    max_bytes: int
    retry: RetryPolicy | None


class ElasticsearchTextOptions(ElasticsearchOptions, TextOptions, total=False):
    """`ElasticsearchOptions`, TLS, and how documents are kept."""

    ca_certs: str | None
    ssl_assert_fingerprint: str | None
    verify_certs: bool | None
    client_options: Mapping[str, Any] | None


class VDRElasticsearch(Collection):
    """A `Collection` in Elasticsearch (8.11 to 9.x) or in OpenSearch, told apart by asking.

    Without `url`, `cloud_id` and `client` it is on the server of `$VDR_DB_ELASTICSEARCH_URL` (key:
    `$VDR_DB_ELASTICSEARCH_API_KEY`), else at http://localhost:9200.

    ```python
    articles = VDRElasticsearch(
        "articles", encoder=encoder, url="https://search.example:9200", api_key=key
    )
    articles.add_texts(texts, ids=ids, payloads=payloads)
    articles.search("who came up with relativity", filter={"year": {"gte": 1900}})
    ```

    Args:
        index: Name of the alias; the index behind it is called `index-000001` and so on.
        encoder: As in `Collection`; by default the model of `$VDR_DB_MODEL`, else the shipped one.
        client: A ready `elasticsearch.Elasticsearch` or `opensearchpy.OpenSearch`.
        url: Address of one node, or of several of one cluster.
        cloud_id: Name of a hosted deployment.
        api_key: Key, or (id, key), to authenticate with.
        basic_auth: (user, password) to authenticate with.
        ca_certs: File with the certificates to trust.
        ssl_assert_fingerprint: Fingerprint of the one certificate to trust.
        verify_certs: `False` trusts anyone, for trials only.
        documents: `"tokens"` keeps bags of tokens instead of encoded documents (mode beta).
        store_text: Keep each text in its payload.
        text_key: Payload field of the text.
        client_options: More arguments of `elasticsearch.Elasticsearch`.
        access: How to be let in, instead of the credentials and TLS options above.
        server: What is known to answer at `url`, which is asked without.
        options: More options of `ElasticsearchStore`, such as `kind`, `store_vectors`,
            `query_top_k`, `text_fields`, `shards` and `replicas`.

    Raises:
        ConfigError: The options contradict each other, or client and server do not fit.
        StoreMismatch: The name holds something else, or the collection is of another encoder; a
            model that is loaded later is compared then.
        StoreUnavailable: The server cannot be reached.
        StoreError: The server does not accept the credentials.
    """

    store: ElasticsearchStore
    _has_default_model = True

    def __init__(
        self,
        index: str,
        encoder: AnyEncoder | None = None,
        *,
        ca_certs: str | None = None,
        ssl_assert_fingerprint: str | None = None,
        verify_certs: bool | None = None,
        documents: Documents | None = None,
        store_text: bool = True,
        text_key: str = "text",
        client_options: Mapping[str, Any] | None = None,
        access: Access | None = None,
        server: Server | None = None,
        **options: Unpack[ElasticsearchOptions],
    ) -> None:
        self._own_client: Any = None
        self.server = server
        tls = {
            "ca_certs": ca_certs,
            "ssl_assert_fingerprint": ssl_assert_fingerprint,
            "verify_certs": verify_certs,
        }
        given: dict[str, Any] = {name: one for name, one in tls.items() if one is not None}
        if all(options.get(place) is None for place in ("url", "cloud_id", "client")):
            options["url"] = os.environ.get("VDR_DB_ELASTICSEARCH_URL") or "http://localhost:9200"
            key = os.environ.get("VDR_DB_ELASTICSEARCH_API_KEY")
            if key and options.get("api_key") is None and options.get("basic_auth") is None:
                options["api_key"] = key
        chosen: dict[str, Any] = {**options}
        urls = options.get("url") or []
        nodes = [urls] if isinstance(urls, str) else list(urls)
        # With a fingerprint or options of its own, only the client itself knows how to connect.
        if nodes and ssl_assert_fingerprint is None and client_options is None:
            nodes = [server_url(node, "elasticsearch") for node in nodes]
            access = access or Access(
                _as_text(options.get("api_key")),
                options.get("basic_auth"),
                ca_certs,
                verify_certs is not False,
            )
            self.server = server or _ask_any(nodes, access)
            chosen["url"] = nodes
            chosen.update(api_key=options.get("api_key") or access.api_key)
            chosen.update(basic_auth=None if chosen["api_key"] else access.basic_auth)
            if self.server.product == "opensearch":
                self._own_client = opensearch_client(nodes, access)
                chosen.update(client=self._own_client, url=None, api_key=None, basic_auth=None)
                given = {}
            elif access.is_custom_tls:
                given.update(ca_certs=access.ca_certs, verify_certs=access.verify_certs)
        is_opensearch = type(chosen.get("client")).__module__.split(".")[0] == "opensearchpy"
        if is_opensearch and options.get("kind") == "sparse_vector":
            raise ConfigError(
                "OpenSearch has no field type sparse_vector; leave `kind` out, which takes "
                "rank_features."
            )
        name = (options.get("cloud_id") or "").partition(":")[0]
        self._place = ", ".join(map(shown_url, nodes)) or name or "the given client"
        merged = {**given, **(client_options or {})} or None
        store = ElasticsearchStore(index, client_options=merged, **chosen)
        try:
            super().__init__(
                store, encoder, documents=documents, store_text=store_text, text_key=text_key
            )
        except BaseException:
            store.close()
            raise

    def close(self) -> None:
        """Closes the store, and a client that was made here."""
        super().close()
        if self._own_client is not None:
            self._own_client.close()

    def __repr__(self) -> str:
        """Index, place and model, without secrets."""
        return f"VDRElasticsearch({self.store.name!r} at {self._place}, {self._encoding.model})"

    def search_with_text(
        self,
        query: str,
        limit: int = 10,
        filter: Any = None,
        *,
        mode: Mode | None = None,
        text_field: str | None = None,
        fusion: Fusion = "rrf",
        text_weight: float = 1.0,
        depth: int = 100,
        rank_constant: int = 60,
        highlight: bool = False,
    ) -> list[Hit]:
        """The best documents by vector and BM25; see `ElasticsearchStore.search_with_text`.

        `text_field` is the payload field for BM25, by default that of the text; it must be among
        the `text_fields` that the index was made with. For `mode` see `Mode`.
        """
        row = self._query_rows([query], mode)

        def search(count: int) -> list[Hit]:
            return self.store.search_with_text(
                row,
                query,
                text_field or self.text_key,
                count,
                filter,
                fusion=fusion,
                text_weight=text_weight,
                depth=depth,
                rank_constant=rank_constant,
                highlight=highlight,
            )

        view = self._view
        return view.merged(search, limit) if isinstance(view, DocumentView) else search(limit)

    search_hybrid = renamed("search_hybrid", search_with_text)

    @contextmanager
    def loading(self) -> Iterator[Self]:
        """Faster writes inside the block; see `ElasticsearchStore.loading`.

        The collection must be there: add a document first, or call `create`.
        """
        with self.store.loading():
            yield self

    def create(self, width: int | None = None) -> None:
        """Makes the index before anything is added; `width` is needed without an encoder only."""
        if width is None:
            width = self._encoding.need("create").vocabulary.size
        self._create(width)

    def rebuild(
        self,
        encoder: AnyEncoder | None = None,
        *,
        expected: int | None = None,
        keep_old: bool = False,
        into: str | None = None,
        keep_unfinished: bool = False,
    ) -> AbstractContextManager[Self]:
        """Fills a new index inside the block; the name moves to it at the end, in one step.

        ```python
        with articles.rebuild(better_encoder, expected=len(texts)) as fresh:
            fresh.add_texts(texts, ids=ids)
        ```

        Args:
            encoder: Makes the new vectors; the one of this collection without.
            expected: Documents the new index must have; with another number nothing changes.
            keep_old: Leaves the old index, without the name.
            into: Goes on with this index, which an earlier block left unfinished.
            keep_unfinished: Leaves the new index when the block fails, for a later `into`.
        """
        options = {"expected": expected, "keep_old": keep_old, "into": into}
        options["keep_unfinished"] = keep_unfinished
        return self._rebuilt(self.store.rebuild, encoder, **options)

    def rollover(self, *, keep_old: bool = False) -> str:
        """Copies everything into a new index on the server; see `ElasticsearchStore.rollover`."""
        return self.store.rollover(keep_old=keep_old)

    def create_template(self) -> str:
        """Writes a composable template; see `ElasticsearchStore.create_template`."""
        return self.store.create_template()


def _as_text(key: str | tuple[str, str] | None) -> str | None:
    """A key as its header has it."""
    return base64.b64encode(":".join(key).encode()).decode() if isinstance(key, tuple) else key


def _ask_any(nodes: Sequence[str], access: Access) -> Server:
    """What the first node that answers is."""
    *others, last = nodes
    for node in others:
        try:
            return ask(node, "elasticsearch", access)
        except StoreUnavailable:
            continue
    return ask(last, "elasticsearch", access)
