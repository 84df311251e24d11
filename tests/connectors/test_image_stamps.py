"""Images that come to a collection of texts: their encoder is written down, and compared then."""

from __future__ import annotations

import asyncio
import contextlib
import json

import numpy as np
import pytest
import services
from search_servers import note_real_server, remove_indices

from vdr_db.connectors import (
    AsyncVDRElasticsearch,
    AsyncVDRQdrant,
    Collection,
    MemoryStore,
    VDRElasticsearch,
    VDRQdrant,
)
from vdr_db.connectors.qdrant.server import ServerEngine
from vdr_db.errors import StoreMismatch

pytest.importorskip("torch")

TEXTS = ["the cat paints", "a blue book"]
IMAGES = [np.full((30, 40, 3), 90, np.uint8), np.full((30, 40, 3), 200, np.uint8)]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """A model of texts and images, and one with the same texts and other images."""
    from image_folders import write_cross_modal

    from vdr_db import CrossModalEncoder

    folder = tmp_path_factory.mktemp("models")
    places = [write_cross_modal(folder / str(seed), seed=seed) for seed in (0, 1)]
    one, other = (CrossModalEncoder.from_pretrained(place, device="cpu") for place in places)
    return one, CrossModalEncoder(one.text, other.image, model="other")


class Places:
    """One collection after another under one name: opens it anew each time."""

    def __init__(self, kind, options):
        self.kind, self.options = kind, options
        self.name = services.unique_name()

    def open(self, encoder):
        if self.kind == "memory":
            return Collection(self.options["store"], encoder)
        kind = VDRQdrant if "qdrant" in self.kind else VDRElasticsearch
        return kind(self.name, encoder, **self.options)

    def open_async(self, encoder):
        kind = AsyncVDRQdrant if "qdrant" in self.kind else AsyncVDRElasticsearch
        return kind(self.name, encoder, **self.options)


KINDS = ["memory", "qdrant folder", "qdrant", "old qdrant", "stand-in", "OpenSearch"]


@pytest.fixture(params=KINDS)
def places(request, tmp_path, monkeypatch):
    kind = request.param
    with contextlib.ExitStack() as closing:
        if kind == "memory":
            options = {"store": closing.enter_context(MemoryStore())}
        elif kind == "qdrant folder":
            options = {"path": tmp_path / "c"}
        elif kind == "old qdrant":  # which keeps no metadata with a collection
            client = pytest.importorskip("qdrant_client").QdrantClient(":memory:")
            monkeypatch.setattr(ServerEngine, "_version", lambda self: (1, 15))
            options = {"client": client}
        elif kind == "qdrant":
            pytest.importorskip("qdrant_client")
            from qdrant_contract_server import QdrantContractServer

            server = closing.enter_context(QdrantContractServer(tmp_path / "server"))
            options = {"url": server.url, "prefer_grpc": False, "versioned": True}
        else:
            kinds = {"stand-in": "noida_server", "OpenSearch": "opensearch_server"}
            server = request.getfixturevalue(kinds[kind])
            if server.is_real:
                note_real_server(request, server.name)
            options = {**server.options(), "replicas": 0}
        yield (made := Places(kind, options))
        if kind in ("stand-in", "OpenSearch"):
            with made.open(None) as last:
                remove_indices(last.store)


def shared(place):
    """Keeps a store in memory open from one collection to the next."""
    return contextlib.nullcontext(place) if isinstance(place.store, MemoryStore) else place


def test_images_that_come_later_are_written_down_and_compared(places, encoders):
    both, others = encoders
    with shared(places.open(both.text)) as texts:
        texts.add_texts(TEXTS, ids=[0, 1])
        assert texts.store.stamp.image is None
    # No image is in: any encoder of images may come, and looking leaves no trace.
    for either in (both, others):
        with shared(places.open(either)) as opened:
            assert opened.search("cat")
            opened.add_texts(["the cat"], ids=[2])
            assert opened.store.stamp.image is None
    with shared(places.open(both)) as opened:
        opened.add_images(IMAGES, ids=["dark", "bright"])
        assert opened.store.stamp.image == both.image.stamp()
        opened.add_images(IMAGES[:1], ids=["again"])
    with shared(places.open(both)) as opened:
        stamp = opened.store.stamp
        assert stamp.image == both.image.stamp()
        assert stamp.model == both.model, "the name that opens texts and images"
        assert set(stamp.probes) == {"document float32", "query float32"}, "of texts, as before"
        assert opened.count() == 6
        assert opened.search_by_image(IMAGES[0], limit=1, filter={"modality": "image"})
    with pytest.raises(StoreMismatch, match="images: weights digest"):
        places.open(others)
    with shared(places.open(both.text)) as texts:
        texts.add_texts(["a book"], ids=[3])
        assert texts.store.stamp.image == both.image.stamp()


def test_a_handle_from_before_the_images_is_refused(places, encoders):
    if places.kind == "qdrant folder":
        pytest.skip("a folder is open once")
    both, others = encoders
    with shared(places.open(both.text)) as texts:
        texts.add_texts(TEXTS, ids=[0, 1])
    with contextlib.ExitStack() as closing:
        first, second, reader = (
            closing.enter_context(shared(places.open(one))) for one in (both, others, both.text)
        )
        first.add_images(IMAGES[:1], ids=["dark"])
        with pytest.raises(StoreMismatch, match="images: weights digest"):
            second.add_images(IMAGES[1:], ids=["bright"])
        reader.add_texts(["a book"], ids=[2])
        assert reader.count() == 4
        if places.kind in ("qdrant", "stand-in", "OpenSearch"):
            reader.rollover()
            with shared(places.open(both)) as opened:
                assert opened.store.stamp.image == both.image.stamp()


def test_the_asynchronous_collection_writes_it_down_too(places, encoders):
    if places.kind in ("memory", "old qdrant"):
        pytest.skip("has no asynchronous class, or client, of its own")
    both, others = encoders

    async def main():
        async with places.open_async(both.text) as texts:
            await texts.add_texts(TEXTS, ids=[0, 1])
        async with places.open_async(both) as opened:
            await opened.add_images(IMAGES, ids=["dark", "bright"])
        with pytest.raises(StoreMismatch, match="images: weights digest"):
            async with places.open_async(others) as opened:
                await opened.count()

    asyncio.run(main())
    with places.open(both) as opened:
        assert opened.store.stamp.image == both.image.stamp()


def test_an_ingest_of_images_and_a_loaded_spool_write_it_down(encoders, tmp_path):
    from PIL import Image

    from vdr_db.ingest import ImageFolderSource, encode_to_spool, ingest
    from vdr_db.ingest.spool_source import SpoolSource

    both, others = encoders
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(IMAGES[0]).save(folder / "a.png")
    with MemoryStore() as store:
        Collection(store, both.text).add_texts(TEXTS, ids=[0, 1])
        assert ingest(ImageFolderSource(folder), store, encoder=both).is_complete
        assert store.stamp.image == both.image.stamp()
        with pytest.raises(StoreMismatch, match="images: weights digest"):
            ingest(ImageFolderSource(folder), store, encoder=others)
    pytest.importorskip("pyarrow")
    encode_to_spool(ImageFolderSource(folder), tmp_path / "spool", encoder=both)
    with MemoryStore() as store:
        Collection(store, both.text).add_texts(TEXTS, ids=[0, 1])
        assert ingest(SpoolSource(tmp_path / "spool"), store).is_complete
        assert store.stamp.image == both.image.stamp()


def test_loading_keeps_what_was_written_down_meanwhile(encoders, request):
    both, _ = encoders
    server = request.getfixturevalue("noida_server")
    options = {**server.options(), "replicas": 0}
    name = services.unique_name()
    with (
        VDRElasticsearch(name, both.text, **options) as texts,
        VDRElasticsearch(name, both, **options) as images,
    ):
        texts.add_texts(TEXTS, ids=[0, 1])
        with texts.loading():
            images.add_images(IMAGES, ids=["dark", "bright"])
            texts.add_texts(["a book"], ids=[2])
        with VDRElasticsearch(name, both, **options) as opened:
            assert opened.store.stamp.image == both.image.stamp()
            assert opened.store._index.state().work is None
        remove_indices(texts.store)


def test_the_commands_name_the_model_of_both(tmp_path, encoders, capsys):
    from PIL import Image

    from vdr_db.cli.main import main

    both, _ = encoders
    model, images = tmp_path / "model", tmp_path / "images"
    both.save_pretrained(model)
    images.mkdir()
    Image.fromarray(IMAGES[0]).save(images / "a.png")
    notes = tmp_path / "notes.txt"
    notes.write_text("\n".join(TEXTS))
    place = ["--store", str(tmp_path / "c"), "--device", "cpu"]
    assert main(["index", str(notes), *place, "--model", str(model / "text")]) == 0
    assert main(["index", "--images", str(images), *place, "--model", str(model)]) == 0
    capsys.readouterr()
    found = main(["search", "--image", str(images / "a.png"), *place, "--json", "--limit", "3"])
    assert found == 0, "by the model that the collection names"
    assert json.loads(capsys.readouterr().out.splitlines()[0])
