"""The sparse functions by themselves and in LlamaIndex's Qdrant store."""

from __future__ import annotations

from contextlib import closing

import pytest
from store_samples import WordEncoder

from vdr_db.errors import ConfigError
from vdr_db.integrations.llamaindex import sparse_doc_fn, sparse_query_fn

# The Python double of Qdrant says so of every index that a framework asks for.
pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")

TEXTS = ["Einstein published the theory", "a theory of chess", "chess is a game", ""]
QUESTION = "theory of chess"


def as_dicts(made):
    return [dict(zip(ids, weights, strict=True)) for ids, weights in zip(*made, strict=True)]


def test_functions_give_the_rows_of_the_encoder():
    encoder = WordEncoder()
    made = sparse_doc_fn(encoder)(TEXTS)
    assert as_dicts(made) == encoder.encode_documents(TEXTS).to_dicts()
    assert isinstance(made, tuple)
    assert {type(id) for ids in made[0] for id in ids} == {int}
    assert {type(weight) for weights in made[1] for weight in weights} == {float}
    assert sparse_query_fn(encoder)([]) == ([], [])
    bag = encoder.bag_of_tokens([QUESTION]).to_dicts()
    assert as_dicts(sparse_query_fn(encoder, mode="alpha")([QUESTION])) == bag
    assert as_dicts(sparse_doc_fn(encoder, mode="beta")([QUESTION])) == bag
    assert as_dicts(sparse_doc_fn(encoder, mode="alpha")([QUESTION])) != bag


@pytest.mark.parametrize("make", [sparse_doc_fn, sparse_query_fn])
def test_unknown_modes_are_refused_before_anything_is_stored(make):
    with pytest.raises(ConfigError, match="got 'gamma'"):
        make(WordEncoder(), mode="gamma")


@pytest.fixture
def in_llamaindex():
    """An index over the texts in LlamaIndex's store, with dense vectors that are all alike."""
    why = "LlamaIndex is not installed; run: pip install 'vdr-db[llamaindex]'"
    qdrant = pytest.importorskip("llama_index.vector_stores.qdrant", reason=why)
    core = pytest.importorskip("llama_index.core", reason=why)
    qdrant_client = pytest.importorskip("qdrant_client", reason="qdrant-client is not installed")
    encoder = WordEncoder()
    with closing(qdrant_client.QdrantClient(":memory:")) as client:
        store = qdrant.QdrantVectorStore(
            "articles",
            client=client,
            enable_hybrid=True,
            sparse_doc_fn=sparse_doc_fn(encoder),
            sparse_query_fn=sparse_query_fn(encoder),
        )
        nodes = [
            core.schema.TextNode(
                text=text, id_=f"{n:032x}", metadata={"n": n}, excluded_embed_metadata_keys=["n"]
            )
            for n, text in enumerate(TEXTS)
        ]
        yield (
            encoder,
            core.VectorStoreIndex(
                nodes,
                storage_context=core.StorageContext.from_defaults(vector_store=store),
                embed_model=core.MockEmbedding(embed_dim=2),
            ),
        )


def test_llamaindex_scores_inner_products(in_llamaindex):
    encoder, index = in_llamaindex
    exact = encoder.encode_queries([QUESTION]).dot(encoder.encode_documents(TEXTS))[0]
    found = index.as_retriever(vector_store_query_mode="sparse", similarity_top_k=4).retrieve(
        QUESTION
    )
    assert [node.text for node in found] == [TEXTS[1], TEXTS[2], TEXTS[0]]
    for node in found:
        assert node.score == pytest.approx(exact[node.metadata["n"]], rel=1e-6)


def test_hybrid_search_uses_both_sides(in_llamaindex):
    _, index = in_llamaindex
    retriever = index.as_retriever(
        vector_store_query_mode="hybrid", similarity_top_k=4, sparse_top_k=4, alpha=0.0
    )
    assert retriever.retrieve(QUESTION)[0].text == TEXTS[1]


def test_real_vectors_survive_the_way(tiny_splade):
    made = sparse_doc_fn(tiny_splade)(TEXTS)
    assert as_dicts(made) == tiny_splade.encode_documents(TEXTS).to_dicts()
    assert made[0][-1] == []
