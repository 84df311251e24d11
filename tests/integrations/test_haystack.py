"""The components by themselves, and in Haystack's own pipelines and Qdrant store."""

from __future__ import annotations

import os

import pytest
from store_samples import WordEncoder

from vdr_db.errors import ConfigError

# A test run reports to nobody.
os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")
haystack = pytest.importorskip(
    "haystack", reason="Haystack is not installed; run: pip install 'vdr-db[haystack]'"
)

from vdr_db.integrations.haystack import (  # noqa: E402
    VDRSparseDocumentEmbedder,
    VDRSparseTextEmbedder,
)

# The Python double of Qdrant says so of every index that a framework asks for.
pytestmark = pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")

TEXTS = ["Einstein published the theory", "a theory of chess", "chess is a game", ""]
QUESTION = "theory of chess"
OURS = ["vdr_db.integrations.haystack"]


def as_dict(embedding):
    return dict(zip(embedding.indices, embedding.values, strict=True))


def documents():
    return [haystack.Document(content=text, meta={"n": n}) for n, text in enumerate(TEXTS)]


def test_embeddings_are_the_rows_of_the_encoder():
    encoder = WordEncoder()
    given = documents()
    made = VDRSparseDocumentEmbedder(encoder=encoder).run(documents=given)["documents"]
    assert [as_dict(d.sparse_embedding) for d in made] == encoder.encode_documents(TEXTS).to_dicts()
    assert [(d.id, d.content, d.meta) for d in made] == [(d.id, d.content, d.meta) for d in given]
    assert [document.sparse_embedding for document in given] == [None] * 4
    (query,) = VDRSparseTextEmbedder(encoder=encoder).run(text=QUESTION).values()
    assert as_dict(query) == encoder.encode_queries([QUESTION]).to_dicts()[0]
    assert {type(number) for number in query.indices} == {int}
    assert {type(number) for number in query.values} == {float}
    assert VDRSparseDocumentEmbedder(encoder=encoder).run(documents=[]) == {"documents": []}


def test_modes_choose_the_side_of_the_tokens():
    encoder = WordEncoder()
    (bag,) = encoder.bag_of_tokens([QUESTION]).to_dicts()
    alpha = VDRSparseTextEmbedder(encoder=encoder, mode="alpha").run(text=QUESTION)
    assert as_dict(alpha["sparse_embedding"]) == bag
    given = [haystack.Document(content=QUESTION)]
    beta = VDRSparseDocumentEmbedder(encoder=encoder, mode="beta").run(documents=given)
    assert as_dict(beta["documents"][0].sparse_embedding) == bag


def test_metadata_goes_before_the_text():
    embedder = VDRSparseDocumentEmbedder(
        encoder=WordEncoder(), meta_fields_to_embed=["title", "none", "missing"],
        embedding_separator=" ",
    )  # fmt: skip
    given = [
        haystack.Document(content="is a game", meta={"title": "chess", "none": None}),
        haystack.Document(content=None, meta={"title": "chess"}),
    ]
    made = embedder.run(documents=given)["documents"]
    expected = WordEncoder().encode_documents(["chess is a game", "chess"]).to_dicts()
    assert [as_dict(document.sparse_embedding) for document in made] == expected


def test_a_pipeline_finds_by_inner_product():
    why = "the Qdrant store of Haystack is not installed; run: pip install qdrant-haystack"
    pytest.importorskip("haystack_integrations.document_stores.qdrant", reason=why)
    from haystack.components.writers import DocumentWriter
    from haystack_integrations.components.retrievers.qdrant import QdrantSparseEmbeddingRetriever
    from haystack_integrations.document_stores.qdrant import QdrantDocumentStore

    encoder = WordEncoder()
    store = QdrantDocumentStore(":memory:", use_sparse_embeddings=True, progress_bar=False)
    indexing = haystack.Pipeline()
    indexing.add_component("embedder", VDRSparseDocumentEmbedder(encoder=encoder))
    indexing.add_component("writer", DocumentWriter(store))
    indexing.connect("embedder.documents", "writer.documents")
    assert indexing.run({"embedder": {"documents": documents()}})["writer"] == {
        "documents_written": 4
    }
    search = haystack.Pipeline()
    search.add_component("embedder", VDRSparseTextEmbedder(encoder=encoder))
    search.add_component(
        "retriever", QdrantSparseEmbeddingRetriever(document_store=store, scale_score=False)
    )
    search.connect("embedder.sparse_embedding", "retriever.query_sparse_embedding")
    found = search.run({"embedder": {"text": QUESTION}})["retriever"]["documents"]
    exact = encoder.encode_queries([QUESTION]).dot(encoder.encode_documents(TEXTS))[0]
    assert [document.content for document in found] == [TEXTS[1], TEXTS[2], TEXTS[0]]
    for document in found:
        assert document.score == pytest.approx(exact[document.meta["n"]], rel=1e-6)
    store.close()


def test_a_saved_pipeline_comes_back(tiny_splade_folder, tiny_splade):
    pipeline = haystack.Pipeline()
    options = {"device": "cpu", "query_k": 3}
    pipeline.add_component("text", VDRSparseTextEmbedder(str(tiny_splade_folder), options=options))
    embedder = VDRSparseDocumentEmbedder(
        str(tiny_splade_folder), mode="beta", meta_fields_to_embed=["title"]
    )
    pipeline.add_component("documents", embedder)
    text = pipeline.dumps()
    loaded = haystack.Pipeline.loads(text, allowed_modules=OURS)
    assert loaded.dumps() == text
    assert loaded.get_component("documents").meta_fields_to_embed == ["title"]
    assert loaded.get_component("text").encoder is None
    query = loaded.get_component("text")
    query.warm_up()
    assert query.encoder is not None
    made = as_dict(query.run(text="the cat sat on the mat")["sparse_embedding"])
    whole = tiny_splade.encode_queries(["the cat sat on the mat"]).topk(3)
    assert made == pytest.approx(whole.to_dicts()[0], rel=1e-6)


def test_a_component_loads_its_model_once(monkeypatch):
    import vdr_db

    loaded = []

    class Encoder(WordEncoder):
        @classmethod
        def from_pretrained(cls, name, **options):
            loaded.append((name, options))
            return cls()

    monkeypatch.setitem(vdr_db.__dict__, "SparseEncoder", Encoder)
    embedder = VDRSparseTextEmbedder("folder", options={"k": 4})
    assert loaded == []
    embedder.run(text="chess")
    embedder.warm_up()
    embedder.run(text="chess")
    assert loaded == [("folder", {"k": 4})]


@pytest.mark.parametrize("make", [VDRSparseTextEmbedder, VDRSparseDocumentEmbedder])
def test_impossible_things_are_refused(make):
    with pytest.raises(ConfigError, match="exactly one of `model`"):
        make()
    with pytest.raises(ConfigError, match="exactly one of `model`"):
        make("folder", encoder=WordEncoder())
    with pytest.raises(ConfigError, match="`options` are for loading"):
        make(encoder=WordEncoder(), options={"k": 3})
    with pytest.raises(ConfigError, match="got 'gamma'"):
        make("folder", mode="gamma")
    with pytest.raises(ConfigError, match="made of an encoder object cannot be saved"):
        make(encoder=WordEncoder()).to_dict()


def test_wrong_inputs_are_type_errors():
    text = VDRSparseTextEmbedder(encoder=WordEncoder())
    embedder = VDRSparseDocumentEmbedder(encoder=WordEncoder())
    with pytest.raises(TypeError, match="one string, got list"):
        text.run(text=["chess"])
    for wrong in ("chess", ["chess"], haystack.Document(content="chess")):
        with pytest.raises(TypeError, match="list of haystack Documents"):
            embedder.run(documents=wrong)
    with pytest.raises(TypeError, match=r"pass \['title'\]"):
        VDRSparseDocumentEmbedder("folder", meta_fields_to_embed="title")
