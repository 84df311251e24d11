"""Encoders, adapters and retrievers travel: pickled, copied, sent to a spawned process."""

from __future__ import annotations

import copy
import multiprocessing
import pickle

import numpy as np
import pytest

from vdr_db.connectors import Collection, MemoryStore
from vdr_db.integrations.llamaindex import sparse_doc_fn, sparse_query_fn
from vdr_db.integrations.sides import TextSides

TEXTS = ["The tallest animal on land is a giraffe.", "hot water on green leaves", ""]
WAYS = {"pickle": lambda value: pickle.loads(pickle.dumps(value)), "copy": copy.deepcopy}


@pytest.fixture(params=WAYS)
def travel(request):
    return WAYS[request.param]


def assert_same_bits(one, other):
    assert one.indptr.tolist() == other.indptr.tolist()
    assert one.indices.tolist() == other.indices.tolist()
    assert one.values.tobytes() == other.values.tobytes()


def test_an_encoder_of_texts_travels(tiny_splade, travel):
    other = travel(tiny_splade)
    assert other is not tiny_splade
    assert_same_bits(other.encode_documents(TEXTS), tiny_splade.encode_documents(TEXTS))
    assert_same_bits(other.encode_queries(TEXTS), tiny_splade.encode_queries(TEXTS))
    assert other.stamp() == tiny_splade.stamp()


def test_an_encoder_of_images_travels(tmp_path, travel):
    pytest.importorskip("PIL")
    from image_folders import pixels, write_cross_modal

    from vdr_db import CrossModalEncoder

    encoder = CrossModalEncoder.from_pretrained(write_cross_modal(tmp_path / "m"), device="cpu")
    images = [pixels(40, 30, seed=1)]
    other = travel(encoder)
    assert_same_bits(other.encode_images(images).rows, encoder.encode_images(images).rows)
    assert_same_bits(other.encode_queries(["tea", ""]), encoder.encode_queries(["tea", ""]))


def test_functions_of_llamaindex_travel(tiny_splade, travel):
    for make in (sparse_doc_fn, sparse_query_fn):
        function = make(tiny_splade)
        assert travel(function)(TEXTS) == function(TEXTS)


def test_adapters_of_langchain_travel(tiny_splade, travel):
    pytest.importorskip("langchain_core")
    pytest.importorskip("langchain_qdrant")
    from vdr_db.integrations.langchain import VDRRetriever, VDRSparseEmbeddings

    embeddings = VDRSparseEmbeddings(tiny_splade)
    assert travel(embeddings).embed_documents(TEXTS) == embeddings.embed_documents(TEXTS)
    articles = Collection(MemoryStore(), tiny_splade)
    articles.add_texts(TEXTS, ids=[1, 2, 3])
    retriever = VDRRetriever(collection=articles)
    assert travel(retriever).invoke("tea leaves") == retriever.invoke("tea leaves")


def test_a_copied_retriever_asks_the_same_store(tiny_splade):
    pytest.importorskip("langchain_core")
    pytest.importorskip("langchain_qdrant")
    from vdr_db.connectors import VDRQdrant
    from vdr_db.integrations.langchain import VDRRetriever

    with VDRQdrant("articles", tiny_splade, path=":memory:") as articles:
        articles.add_texts(TEXTS, ids=[1, 2, 3])
        retriever = VDRRetriever(collection=articles, limit=2)
        other = copy.deepcopy(retriever)
        assert other is not retriever
        assert (other.collection, other.limit) == (articles, 2)
        assert other.invoke("tea leaves") == retriever.invoke("tea leaves")


def test_adapters_of_elasticsearch_and_haystack_travel(tiny_splade, travel):
    pytest.importorskip("elasticsearch.helpers.vectorstore")
    from vdr_db.integrations.elasticsearch import VDREmbeddingService

    service = VDREmbeddingService(tiny_splade)
    assert travel(service).embed_documents(TEXTS) == service.embed_documents(TEXTS)
    pytest.importorskip("haystack")
    from vdr_db.integrations.haystack import VDRSparseTextEmbedder

    embedder = VDRSparseTextEmbedder(encoder=tiny_splade)
    assert travel(embedder).run(text=TEXTS[0]) == embedder.run(text=TEXTS[0])


def test_a_spawned_process_encodes_the_same_bits(tiny_splade):
    sides = TextSides(tiny_splade)
    expected = sides.document_rows(TEXTS)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        rows = pool.apply(sides.document_rows, (TEXTS,))
    assert_same_bits(rows, expected)
    assert np.isfinite(rows.values).all()
