"""The search calls of sentence-transformers' sparse encoders, on the stores of this library.

`docs/integrations.md` has an example.

Arguments and results are those of `sentence_transformers.sparse_encoder.search_engines`. What
happens in between is different: vectors are checked before a server sees them, requests are batched
by bytes and repeated after failures, all queries travel together, Elasticsearch scores by the inner
product and keeps every token apart, and an index that is not asked for is removed at the end.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from typing import Any, TypeAlias

from vdr_db.connectors.base import Store
from vdr_db.connectors.collections.collection import Collection, Encoder
from vdr_db.connectors.feed import refuse_string
from vdr_db.errors import ConfigError, require
from vdr_db.sparse import SparseRows

__all__ = ["Results", "Vectors", "semantic_search_elasticsearch", "semantic_search_qdrant"]

Vectors: TypeAlias = Any
"""`SparseRows`, a torch tensor `[N, V]` or `[V]` (sparse or dense), or texts with an encoder."""

Results: TypeAlias = list[list[dict[str, Any]]]
"""For each query its hits, best first: `{"corpus_id": position in the corpus, "score": float}`."""


def semantic_search_qdrant(
    query_embeddings: Vectors,
    corpus_embeddings: Vectors | None = None,
    corpus_index: tuple[Any, str] | Collection | None = None,
    top_k: int = 10,
    output_index: bool = False,
    *,
    encoder: Encoder | None = None,
    **kwargs: Any,
) -> tuple[Results, float] | tuple[Results, float, tuple[Any, str] | Collection]:
    """Searches a corpus in Qdrant.

    Args:
        query_embeddings: The queries.
        corpus_embeddings: The documents, when there is no `corpus_index`; they are written to a new
            collection.
        corpus_index: `(QdrantClient, collection name)` of an earlier call or of any collection made
            by this library, or an open `VDRQdrant`; a `corpus_id` is the id there.
        top_k: Hits wanted for each query; fewer come when fewer share a token with it.
        output_index: Keep the new collection, and return it in the third place.
        encoder: Makes vectors where texts are given instead.
        kwargs: Arguments of `QdrantClient` for the new collection; without an address it is the
            server at localhost:6333.

    Returns:
        The hits, the seconds that searching took, and the index if it was asked for.

    Raises:
        ConfigError: There is neither corpus nor index, or texts come without an encoder.
        TypeError: Vectors come in another form.
        InputError: Weights are negative or not finite, or queries and corpus differ in width.
        StoreMismatch: The collection was not made by this library, or by another encoder.
        StoreUnavailable: The server cannot be reached.
    """
    from vdr_db.connectors.qdrant.store import QdrantStore

    if kwargs.keys().isdisjoint({"url", "host", "location", "path"}):
        kwargs["url"] = "http://localhost:6333"
    return _search(
        query_embeddings,
        corpus_embeddings,
        corpus_index,
        top_k,
        output_index,
        encoder,
        connect=lambda: require("qdrant_client", "qdrant").QdrantClient(**kwargs),
        open_store=lambda client, name: QdrantStore(name, client=client),
        remove=lambda client, name: client.delete_collection(name),
    )


def semantic_search_elasticsearch(
    query_embeddings_decoded: Vectors,
    corpus_embeddings_decoded: Vectors | None = None,
    corpus_index: tuple[Any, str] | Collection | None = None,
    top_k: int = 10,
    output_index: bool = False,
    *,
    encoder: Encoder | None = None,
    **kwargs: Any,
) -> tuple[Results, float] | tuple[Results, float, tuple[Any, str] | Collection]:
    """Searches a corpus in Elasticsearch, as `semantic_search_qdrant` does in Qdrant.

    The first two arguments keep their names, but nothing needs to be decoded: pass the vectors.
    The client of a `corpus_index` may be one of OpenSearch; `kwargs` are arguments of
    `Elasticsearch`, and without an address it is the server at localhost:9200.
    """
    from vdr_db.connectors.elasticsearch.store import ElasticsearchStore

    if kwargs.keys().isdisjoint({"hosts", "cloud_id"}):
        kwargs["hosts"] = "http://localhost:9200"

    def remove(client: Any, name: str) -> None:
        # The name is an alias, and only an index can be deleted.
        for index in client.indices.get(index=name):
            client.indices.delete(index=index)

    return _search(
        query_embeddings_decoded,
        corpus_embeddings_decoded,
        corpus_index,
        top_k,
        output_index,
        encoder,
        connect=lambda: require("elasticsearch", "elasticsearch").Elasticsearch(**kwargs),
        open_store=lambda client, name: ElasticsearchStore(name, client=client),
        remove=remove,
    )


def _search(
    queries: Vectors,
    corpus: Vectors | None,
    index: tuple[Any, str] | Collection | None,
    limit: int,
    keeps_index: bool,
    encoder: Encoder | None,
    *,
    connect: Callable[[], Any],
    open_store: Callable[[Any, str], Store],
    remove: Callable[[Any, str], None],
) -> tuple[Results, float] | tuple[Results, float, tuple[Any, str] | Collection]:
    def encoded(texts: Sequence[str], name: str) -> SparseRows:
        # An open collection may load its encoder when it is first asked for.
        chosen = index.encoder if encoder is None and isinstance(index, Collection) else encoder
        if chosen is None:
            raise ConfigError(f"the {name} are texts; pass encoder=... to make vectors of them.")
        return (chosen.encode_queries if name == "queries" else chosen.encode_documents)(texts)

    query_rows = _rows(queries, encoded, "queries")
    with ExitStack() as stack:
        if isinstance(index, Collection):
            collection = index
        elif index is not None:
            client, name = _pair(index)
            collection = Collection(open_store(client, name), encoder)
            stack.callback(collection.close)
        else:
            if corpus is None:
                raise ConfigError("give the vectors of the corpus, or `corpus_index`.")
            rows = _rows(corpus, encoded, "corpus")
            client, name = index = connect(), f"sparse-{uuid.uuid4().hex}"
            stack.callback(client.close)
            collection = Collection(open_store(client, name), encoder)

            def remove_index(_: object, error: BaseException | None, __: object) -> None:
                """Removes the new index; after a failure as far as it goes."""
                with suppress(Exception) if error else nullcontext():
                    remove(client, name)

            stack.push(remove_index)
            collection.add_rows(rows, range(len(rows)))
        started = time.perf_counter()
        found = collection.search_batch(query_rows, limit)
        seconds = time.perf_counter() - started
        results = [[{"corpus_id": hit.id, "score": hit.score} for hit in hits] for hits in found]
        if not keeps_index:
            return results, seconds
        stack.pop_all()
        return results, seconds, index


def _pair(index: Any) -> tuple[Any, str]:
    if isinstance(index, tuple) and len(index) == 2 and isinstance(index[1], str):
        return index
    raise TypeError(
        f"`corpus_index` must be (client, name) or an open collection, got {type(index).__name__}"
    )


def _rows(
    values: Vectors, encode: Callable[[Sequence[str], str], SparseRows], name: str
) -> SparseRows:
    if isinstance(values, SparseRows):
        return values
    refuse_string(values, name)
    if hasattr(values, "layout") and hasattr(values, "ndim"):
        return SparseRows.from_torch(values.unsqueeze(0) if values.ndim == 1 else values)
    if isinstance(values, Sequence) and all(isinstance(value, str) for value in values):
        return encode(values, name)
    raise TypeError(
        f"{name} must be SparseRows, a torch tensor or texts, got {type(values).__name__}; pass "
        "the vectors as they were encoded, not decoded to tokens"
    )
