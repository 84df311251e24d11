"""The LangChain adapters in LangChain: its Qdrant store, its chains, its documents."""

from __future__ import annotations

import asyncio
import math
import pickle
import uuid
from contextlib import closing

import pytest
import services
from search_servers import remove_indices
from store_samples import WordEncoder

from vdr_db.connectors import Collection, MemoryStore, VDRElasticsearch, VDRQdrant
from vdr_db.connectors.retry import RetryPolicy
from vdr_db.errors import ConfigError, StoreError, StoreUnavailable

_WHY = "LangChain is not installed; run: pip install 'vdr-db[langchain]'"
pytest.importorskip("langchain_core", reason=_WHY)
langchain_qdrant = pytest.importorskip("langchain_qdrant", reason=_WHY)
qdrant_client = pytest.importorskip("qdrant_client", reason="qdrant-client is not installed")

from langchain_core.documents import Document  # noqa: E402
from langchain_core.runnables import RunnableLambda  # noqa: E402

from vdr_db.integrations.langchain import VDRRetriever, VDRSparseEmbeddings  # noqa: E402

TEXTS = [
    "Einstein published the theory in 1905",
    "chess is a game of kings",
    "Paris, the capital of France",
    "light travels fast",
]
IDS = ["einstein", "chess", "paris", 4]
QUESTION = "who came up with the theory"


@pytest.fixture
def encoder():
    return WordEncoder()


@pytest.fixture
def client():
    with closing(qdrant_client.QdrantClient(":memory:")) as client:
        yield client


def qdrant_store(client, embeddings):
    models = qdrant_client.models
    client.create_collection(
        "articles",
        vectors_config={},
        sparse_vectors_config={"langchain-sparse": models.SparseVectorParams()},
    )
    return langchain_qdrant.QdrantVectorStore(
        client,
        "articles",
        sparse_embedding=embeddings,
        retrieval_mode=langchain_qdrant.RetrievalMode.SPARSE,
    )


def test_embeddings_are_the_rows_of_the_encoder(encoder):
    embeddings = VDRSparseEmbeddings(encoder)
    assert isinstance(embeddings, langchain_qdrant.SparseEmbeddings)
    expected = encoder.encode_documents([*TEXTS, ""])
    made = embeddings.embed_documents([*TEXTS, ""])
    assert [dict(zip(v.indices, v.values, strict=True)) for v in made] == expected.to_dicts()
    assert embeddings.embed_query(TEXTS[1]) == made[1]
    assert asyncio.run(embeddings.aembed_query(TEXTS[1])) == made[1]
    assert asyncio.run(embeddings.aembed_documents([""])) == [made[-1]]
    with pytest.raises(ConfigError, match="'full', 'alpha' or 'beta', got 'gamma'"):
        VDRSparseEmbeddings(encoder, mode="gamma")


def test_modes_choose_the_side_of_the_tokens(encoder):
    alpha, beta = (VDRSparseEmbeddings(encoder, mode=mode) for mode in ("alpha", "beta"))
    assert set(alpha.embed_query(TEXTS[1]).values) == {1.0}
    assert set(alpha.embed_documents(TEXTS[:1])[0].values) != {1.0}
    assert set(beta.embed_documents(TEXTS[:1])[0].values) == {1.0}
    assert set(beta.embed_query(TEXTS[1]).values) != {1.0}


def test_the_qdrant_store_scores_inner_products(encoder, client):
    store = qdrant_store(client, VDRSparseEmbeddings(encoder))
    ids = store.add_texts(TEXTS, metadatas=[{"n": n} for n in range(4)])
    found = store.similarity_search_with_score(QUESTION, k=3)
    documents = encoder.encode_documents(TEXTS)
    exact = encoder.encode_queries([QUESTION]).dot(documents)[0]
    assert [document.page_content for document, _ in found] == [
        TEXTS[i] for i in sorted(range(4), key=lambda i: -exact[i]) if exact[i] > 0
    ]
    for document, score in found:
        assert score == pytest.approx(exact[document.metadata["n"]], rel=1e-6)
    assert uuid.UUID(found[0][0].metadata["_id"]) == uuid.UUID(ids[0])
    retriever = store.as_retriever(search_kwargs={"k": 1})
    assert [document.page_content for document in retriever.invoke("capital of France")] == [
        TEXTS[2]
    ]


def test_the_qdrant_store_opens_a_collection_of_ours(encoder, client):
    VDRQdrant("articles", encoder, client=client).add_texts(TEXTS, ids=IDS)
    store = langchain_qdrant.QdrantVectorStore(
        client,
        "articles",
        sparse_embedding=VDRSparseEmbeddings(encoder),
        retrieval_mode=langchain_qdrant.RetrievalMode.SPARSE,
        sparse_vector_name="vdr",
        content_payload_key="text",
    )
    assert [document.page_content for document in store.similarity_search("chess")] == [TEXTS[1]]


@pytest.fixture(params=["edge", "memory", "elasticsearch"])
def articles(request, encoder):
    if request.param == "edge":
        pytest.importorskip("qdrant_edge", reason="the embedded Qdrant is not installed")
        collection = VDRQdrant("articles", encoder, path=":memory:")
    elif request.param == "memory":
        collection = Collection(MemoryStore(), encoder)
    else:
        stand_in = request.getfixturevalue("stand_in")
        collection = VDRElasticsearch(
            services.unique_name(), encoder, url=stand_in.url, replicas=0,
            retry=RetryPolicy(base_s=0.001),
        )  # fmt: skip
    collection.add_texts(TEXTS, ids=IDS, payloads=[{"n": n} for n in range(4)])
    with collection:
        yield collection
        if request.param == "elasticsearch":
            remove_indices(collection.store)


def test_the_retriever_tells_id_score_metadata_and_words(encoder, articles):
    retriever = VDRRetriever(collection=articles, limit=2)
    first, second = retriever.invoke(QUESTION)
    assert isinstance(first, Document)
    assert (first.id, first.page_content) == ("einstein", TEXTS[0])
    assert set(first.metadata) == {"n", "score", "matched_words"}
    assert first.metadata["n"] == 0
    exact = encoder.encode_queries([QUESTION]).dot(encoder.encode_documents(TEXTS))[0]
    assert first.metadata["score"] == pytest.approx(exact[0], rel=2**-8)
    words = first.metadata["matched_words"]
    assert set(words) == {"the", "theory"}
    assert list(words.values()) == sorted(words.values(), reverse=True)
    assert math.fsum(words.values()) == pytest.approx(exact[0], rel=2**-8)
    assert second.page_content == TEXTS[2]
    assert [document.id for document in retriever.invoke("light travels")] == ["4"]
    assert retriever.invoke("nothing known") == []


def test_one_call_can_differ(articles):
    retriever = VDRRetriever(collection=articles)
    assert len(retriever.invoke(QUESTION)) == 2
    assert len(retriever.invoke(QUESTION, limit=1)) == 1
    assert [d.metadata["n"] for d in retriever.invoke(QUESTION, filter={"n": 2})] == [2]
    bag = retriever.invoke("Einstein the theory", mode="alpha")[0]
    full = retriever.invoke("Einstein the theory")[0]
    assert bag.metadata["score"] < full.metadata["score"]
    with pytest.raises(ConfigError, match="mode 'beta' cannot be searched"):
        retriever.invoke(QUESTION, mode="beta")


def test_the_retriever_works_in_chains_batches_and_loops(articles):
    retriever = VDRRetriever(collection=articles, filter={"n": {"lt": 3}}, words=1)
    chain = retriever | RunnableLambda(lambda found: [document.id for document in found])
    assert chain.invoke(QUESTION) == ["einstein", "paris"]
    assert chain.batch([QUESTION, "chess game", "fast"]) == [
        ["einstein", "paris"], ["chess"], [],
    ]  # fmt: skip
    assert asyncio.run(chain.ainvoke("chess game")) == ["chess"]
    assert [len(d.metadata["matched_words"]) for d in retriever.invoke(QUESTION)] == [1, 1]


def test_bags_of_tokens_are_asked_in_mode_beta(encoder):
    with Collection(MemoryStore(), encoder, documents="tokens") as articles:
        articles.add_texts(TEXTS, ids=IDS)
        best = VDRRetriever(collection=articles).invoke(QUESTION)[0]
        assert best.metadata["score"] == articles.search(QUESTION)[0].score


def test_without_words_no_vectors_are_read(encoder, monkeypatch):
    articles = Collection(MemoryStore(), encoder)
    articles.add_texts(TEXTS, ids=IDS)

    def get(ids, with_rows=False):
        raise error

    monkeypatch.setattr(articles.store, "get", get)
    quiet = VDRRetriever(collection=articles, words=0)
    assert set(quiet.invoke(QUESTION)[0].metadata) == {"score"}
    error = StoreError("no vectors can be read back.")
    with pytest.raises(StoreError, match=r"read back.*Pass words=0"):
        VDRRetriever(collection=articles).invoke(QUESTION)
    error = StoreUnavailable("gone")
    with pytest.raises(StoreUnavailable, match=r"^gone$"):
        VDRRetriever(collection=articles).invoke(QUESTION)


def test_what_cannot_be_told_is_an_error(encoder):
    with pytest.raises(ConfigError, match="needs an encoder"):
        VDRRetriever(collection=Collection(MemoryStore())).invoke(QUESTION)
    with pytest.raises(ValueError, match="Input should be an instance of Collection"):
        VDRRetriever(collection=MemoryStore())
    articles = Collection(MemoryStore(), encoder)
    articles.add_texts(TEXTS, ids=IDS, payloads=[{"score": 1.0}] * 4)
    with pytest.raises(ConfigError, match=r"payload field 'score' of its own.*`score_key`"):
        VDRRetriever(collection=articles).invoke(QUESTION)
    found = VDRRetriever(collection=articles, score_key="vdr_score").invoke(QUESTION)
    assert found[0].metadata["score"] == 1.0
    textless = Collection(MemoryStore(), encoder, store_text=False)
    textless.add_texts(TEXTS, ids=IDS)
    with pytest.warns(UserWarning, match="no text in the payload field 'text' and comes without"):
        found = VDRRetriever(collection=textless).invoke(QUESTION)
    assert [document.page_content for document in found] == [""] * len(found)


def test_one_document_without_a_text_leaves_the_others(encoder):
    articles = Collection(MemoryStore(), encoder)
    articles.add_texts(TEXTS, ids=IDS)
    row = encoder.encode_documents(["the theory of an image"])
    articles.add_rows(row, ["photo"], payloads=[{"modality": "image", "image": "photo.jpg"}])
    articles.add_rows(row, ["odd"], payloads=[{"text": 7}])
    with pytest.warns(UserWarning, match="document 'odd' has no text"):
        found = VDRRetriever(collection=articles).invoke(QUESTION)
    texts = {document.id: document.page_content for document in found}
    assert (texts["photo"], texts["odd"], texts["einstein"]) == ("", "", TEXTS[0])
    (photo,) = [document for document in found if document.id == "photo"]
    assert photo.metadata["image"] == "photo.jpg"
    assert photo.metadata["matched_words"]


def test_word_pieces_become_words_again(tiny_splade):
    articles = Collection(MemoryStore(), tiny_splade)
    articles.add_texts(["The giraffes of Masai Mara", "a recipe for bread"], ids=["zoo", "bread"])
    (best, *_) = VDRRetriever(collection=articles).invoke("giraffes")
    assert best.id == "zoo"
    words = best.metadata["matched_words"]
    assert not any(word.startswith("##") for word in list(words)[:1])
    assert "giraffes" in words or "giraffe" in words


def test_a_pickled_retriever_opens_its_collection_again(tmp_path, encoder):
    with VDRQdrant("notes", encoder, path=tmp_path / "notes") as notes:
        notes.add_texts(["chess is a game", "light travels fast"], ids=["a", "b"])
        sent = pickle.dumps(VDRRetriever(collection=notes, limit=1))
    again = pickle.loads(sent)
    with again.collection:
        assert [document.id for document in again.invoke("chess")] == ["a"]
    with (
        VDRQdrant("notes", encoder, path=":memory:") as notes,
        pytest.raises(TypeError, match="is of this process alone and cannot be pickled"),
    ):
        pickle.dumps(VDRRetriever(collection=notes))
