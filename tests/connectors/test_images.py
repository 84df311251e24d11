"""Images in collections: written beside texts, found by texts and by images."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from store_samples import WordEncoder

from vdr_db.connectors import Collection, MemoryStore, QdrantStore, VDRQdrant
from vdr_db.errors import ConfigError, InputError, RejectedRows, ShapeError, StoreMismatch


class ImageWordEncoder(WordEncoder):
    """Reads "images" that hold words: bytes, or files of them; those with `broken` it refuses."""

    def encode_images(self, images):
        images = list(images)
        self.image_calls = [*getattr(self, "image_calls", []), len(images)]
        contents, refused = [], {}
        for i, image in enumerate(images):
            try:
                content = image if isinstance(image, bytes) else Path(image).read_bytes()
                if b"broken" in content:
                    refused[i], content = "it cannot be decoded", b""
            except OSError:
                refused[i], content = "there is no such file", b""
            contents.append(content)
        return SimpleNamespace(
            rows=self.encode_documents([content.decode() for content in contents]),
            names=[f"image {i}" for i in range(len(images))],
            digests=[
                "" if i in refused else hashlib.sha256(content).hexdigest()
                for i, content in enumerate(contents)
            ],
            refused=refused,
        )


STORES = ["memory", "edge", "stand-in", "OpenSearch"]


@contextmanager
def opened_in(request, kind, encoder):
    """A new collection: exact in memory, the embedded Qdrant, or on the Elasticsearch stand-in."""
    if kind == "memory":
        with Collection(MemoryStore(), encoder) as opened:
            yield opened
    elif kind == "edge":
        with VDRQdrant("things", encoder, path=":memory:") as opened:
            yield opened
    else:
        kinds = {"stand-in": "noida_server", "OpenSearch": "opensearch_server"}
        server = request.getfixturevalue(kinds[kind])
        import services
        from search_servers import note_real_server, remove_indices

        if server.is_real:
            note_real_server(request, server.name)

        from vdr_db.connectors import VDRElasticsearch

        name = services.unique_name()
        with VDRElasticsearch(name, encoder, replicas=0, **server.options()) as opened:
            yield opened
            remove_indices(opened.store)


@pytest.fixture(params=STORES)
def collection(request):
    with opened_in(request, request.param, ImageWordEncoder()) as opened:
        yield opened


@pytest.fixture
def folder(tmp_path):
    contents = {"chess.png": "chess kings", "b/paris.jpg": "paris france", "b/go.gif": "go stones"}
    for name, content in contents.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
    (tmp_path / "notes.txt").write_text("light")
    return tmp_path


def test_texts_and_images_find_each_other(collection):
    collection.add_texts(["chess is a game", "capital of france"], ["text chess", "text france"])
    ids = collection.add_images(
        [b"chess kings", b"paris capital"], ["chess", 7], [{"year": 1}, None]
    )
    assert ids == ["chess", 7]
    assert collection.count() == 4
    assert collection.count({"modality": "image"}) == 2
    only_images, only_texts = {"modality": "image"}, {"not": {"modality": "image"}}
    # text to image, image to text, image to image
    assert [hit.id for hit in collection.search("chess", filter=only_images)] == ["chess"]
    assert [hit.id for hit in collection.search("chess", filter=only_texts)] == ["text chess"]
    assert {hit.id for hit in collection.search("chess")} == {"chess", "text chess"}
    by_image = collection.search_by_image(b"capital", filter=only_texts)
    assert [hit.id for hit in by_image] == ["text france"]
    assert [hit.id for hit in collection.search_by_image(b"kings", filter=only_images)] == ["chess"]
    assert collection.search_by_image(b"capital", 1, offset=1) != by_image
    (record,) = collection.get(["chess"])
    assert record.payload == {"year": 1, "modality": "image"}
    terms = collection.explain("chess kings", "chess")
    score = collection.search("chess kings", filter=only_images)[0].score
    # Elasticsearch keeps 9 significant bits of a weight.
    assert sum(term.product for term in terms) == pytest.approx(score, rel=2**-7)
    assert {term.token for term in terms} == {"chess", "kings"}


def test_a_folder_is_taken_whole_and_named_by_its_paths(collection, folder):
    ids = ["b/go.gif", "b/paris.jpg", "chess.png"]
    assert collection.add_images(folder) == ids
    assert collection.add_images(str(folder), batch_size=2) == ids, "again changes nothing"
    assert collection.count() == 3
    (record,) = collection.get(["b/go.gif"])
    assert record.payload == {"modality": "image", "image": str(folder / "b/go.gif")}
    (folder / "chess.png").write_text("light")
    collection.add_images(folder)
    assert [hit.id for hit in collection.search("light")] == ["chess.png"], "a changed file"
    assert collection.add_images(folder, ids=[1, 2, 3]) == [1, 2, 3]


def test_ids_made_of_the_content(collection, folder):
    files = [folder / "chess.png", str(folder / "b/go.gif"), b"go stones"]
    ids = collection.add_images(files)
    assert ids[1] == ids[2] != ids[0]
    assert all(uuid.UUID(id).version == 5 for id in ids)
    assert collection.count() == 2
    assert collection.add_images([b"chess kings"]) == [ids[0]]
    assert collection.add_texts(["go stones"]) != [ids[1]], "a text is no image"
    with pytest.raises(InputError, match="an image occurs twice in this call with different"):
        collection.add_images([b"a", b"a"], payloads=[{"n": 1}, {"n": 2}])


def test_what_cannot_be_read_is_named_and_the_rest_is_written(collection, folder):
    (folder / "a.png").write_text("broken")
    images = [folder / "a.png", folder / "chess.png", folder / "no.png", b"broken", b"go stones"]
    with pytest.raises(RejectedRows) as caught:
        collection.add_images(images, batch_size=2)
    rejected = dict(zip(caught.value.ids, caught.value.reasons, strict=True))
    assert rejected == {
        str(folder / "a.png"): f"{folder / 'a.png'}: it cannot be decoded",
        str(folder / "no.png"): f"{folder / 'no.png'}: there is no such file",
        "image 3": "image 3: it cannot be decoded",
    }
    assert collection.count() == 2
    with pytest.raises(RejectedRows) as caught:
        collection.add_images(folder)
    assert caught.value.ids == ["a.png"]
    assert collection.count() == 2 + 3
    with pytest.raises(RejectedRows) as caught:
        collection.add_images([b"light", b"broken"], ids=["good", "bad"])
    assert caught.value.ids == ["bad"]
    assert collection.get(["good", "bad"]) == collection.get(["good"]) != []
    with pytest.raises(InputError, match=r"no\.png.* cannot be searched for|cannot be searched"):
        collection.search_by_image(folder / "no.png")


@pytest.mark.skipif(os.name != "posix", reason="file names of bytes")
def test_file_names_that_are_no_text(collection, folder):
    try:
        (folder / os.fsdecode(b"caf\xe9.png")).write_text("light")
    except OSError:
        pytest.skip("this file system has no such names")
    with pytest.raises(RejectedRows) as caught:
        collection.add_images(folder)
    assert "its name is no usable id" in caught.value.reasons[0]
    assert collection.count() == 3
    collection.add_images([folder / os.fsdecode(b"caf\xe9.png")], ids=["coffee"])
    (record,) = collection.get(["coffee"])
    assert record.payload["image"].endswith("caf\ufffd.png")


def test_generators_are_taken_a_batch_at_a_time(collection):
    ids = collection.add_images(
        (f"chess {i}".encode() for i in range(10)),
        (f"id{i}" for i in range(10)),
        ({"n": i} for i in range(10)),
        batch_size=4,
    )
    assert ids == [f"id{i}" for i in range(10)]
    assert collection.encoder.image_calls == [4, 4, 2]
    assert collection.get(["id9"])[0].payload == {"n": 9, "modality": "image"}


def test_wrong_use_is_refused(collection, folder):
    with pytest.raises(TypeError, match=r"which is no folder; pass \[image\]"):
        collection.add_images(folder / "chess.png")
    for one in (b"chess", np.zeros((4, 4, 3), np.uint8), {}, 3):
        with pytest.raises(TypeError, match=r"pass \[image\]"):
            collection.add_images(one)
    with pytest.raises(TypeError, match="`ids` must be a sequence"):
        collection.add_images([b"a"], ids="a")
    with pytest.raises(TypeError, match="`payloads` must be a sequence"):
        collection.add_images([b"a"], payloads={"n": 1})
    with pytest.raises(TypeError, match="payloads must be mappings"):
        collection.add_images([b"a"], payloads=[3])
    with pytest.raises(ShapeError, match="got 2 images, 1 ids"):
        collection.add_images([b"a", b"b"], ids=[1])
    with pytest.raises(ShapeError, match="got 3 images, 1 ids"):
        collection.add_images(folder, ids=[1])
    with pytest.raises(ShapeError, match="`ids` ended after 1"):
        collection.add_images(iter([b"a", b"b"]), ids=iter([1]))
    with pytest.raises(ShapeError, match="`payloads` goes on after the 1 images"):
        collection.add_images(iter([b"a"]), ids=[5], payloads=iter([None, None]))
    with pytest.raises(InputError, match="every id of a call must be different"):
        collection.add_images([b"a", b"b"], ids=[1, 1])
    with pytest.raises(InputError, match="again in a later batch"):
        collection.add_images([b"a", b"b"], ids=[1, 1], batch_size=1)
    with pytest.raises(InputError, match="another value in 'modality'"):
        collection.add_images([b"a"], payloads=[{"modality": "smell"}])
    with pytest.raises(ConfigError, match="`batch_size` must be"):
        collection.add_images([b"a"], batch_size=0)


def test_encoders_of_one_kind_say_what_they_lack():
    with (
        Collection(MemoryStore(), WordEncoder()) as texts,
        pytest.raises(ConfigError, match=r"reads images, got WordEncoder; .*CrossModalEncoder"),
    ):
        texts.add_images([b"a"])
    with (
        Collection(MemoryStore(), WordEncoder()) as texts,
        pytest.raises(ConfigError, match="`search_by_image` needs an encoder that reads images"),
    ):
        texts.search_by_image(b"a")
    with Collection(MemoryStore()) as rows, pytest.raises(ConfigError, match="got no encoder"):
        rows.add_images([b"a"])
    only = SimpleNamespace(
        vocabulary=WordEncoder().vocabulary,
        stamp=WordEncoder().stamp,
        encode_images=ImageWordEncoder().encode_images,
    )
    with Collection(MemoryStore(), only) as images:
        images.add_images([b"chess kings"], ids=[1])
        assert [hit.id for hit in images.search_by_image(b"chess")] == [1]
        with pytest.raises(ConfigError, match="needs an encoder that reads texts"):
            images.search("chess")
        with pytest.raises(ConfigError, match="needs an encoder that reads texts"):
            images.add_texts(["chess"])
    with (
        Collection(MemoryStore(), ImageWordEncoder(), documents="tokens") as bags,
        pytest.raises(ConfigError, match="bags of tokens takes no images"),
    ):
        bags.add_images([b"a"])


# The real encoder, real files, the command line


@pytest.fixture
def model(tmp_path):
    pytest.importorskip("torch")
    from image_folders import write_cross_modal

    return write_cross_modal(tmp_path / "model", topk=60)


@pytest.fixture
def image_files(tmp_path):
    image = pytest.importorskip("PIL.Image")
    from image_folders import pixels

    folder = tmp_path / "files"
    folder.mkdir()
    for i in range(5):
        image.fromarray(pixels(40 + i, 30, seed=i)).save(folder / f"{i}.png")
    return folder


def test_with_a_cross_modal_encoder(tmp_path, model, image_files):
    from vdr_db import CrossModalEncoder, SparseEncoder

    (image_files / "broken.png").write_bytes(b"nothing")
    encoder = CrossModalEncoder.from_pretrained(model, device="cpu")
    with VDRQdrant("images", encoder, path=tmp_path / "store") as collection:
        collection.add_texts(["the cat", "blue book"], ids=["cat", "book"])
        with pytest.raises(RejectedRows) as caught:
            collection.add_images(image_files)
        assert caught.value.ids == ["broken.png"]
        assert collection.count({"modality": "image"}) == 5
        for i in range(5):
            best = collection.search_by_image(image_files / f"{i}.png")[0]
            assert best.id == f"{i}.png"
        rows = encoder.encode_images([image_files / "3.png"]).rows
        (record,) = collection.get(["3.png"], with_rows=True)
        assert record.row.allclose(rows)
        query = encoder.encode_queries(["green sea"])
        expected = float(query.dot(rows)[0, 0])
        hits = collection.search("green sea", filter={"modality": "image"})
        assert {hit.id: hit.score for hit in hits}["3.png"] == pytest.approx(expected, rel=1e-5)
        alone = collection.search("sea", filter={"modality": "image"}, mode="alpha")
        assert isinstance(alone, list), "a bag of tokens needs no model at query time"
    text_side = SparseEncoder.from_pretrained(model, device="cpu")
    with VDRQdrant("images", text_side, path=tmp_path / "store") as collection:
        again = collection.search("green sea", filter={"modality": "image"})
        assert [hit.id for hit in again] == [hit.id for hit in hits]
    other = replace(encoder.stamp(), image=replace(encoder.image.stamp(), weights="0" * 64))
    mismatch = pytest.raises(StoreMismatch, match="images: weights digest")
    with QdrantStore("images", path=tmp_path / "store") as store, mismatch:
        store.create(encoder.vocabulary.size, other)


@pytest.mark.parametrize("kind", STORES)
def test_every_direction_ranks_as_the_model_does(request, kind, model, image_files):
    """Text → image, image → text, image → image: ids and scores of the exact dot products."""
    from vdr_db import CrossModalEncoder

    (image_files / "broken.png").write_bytes(b"nothing")
    encoder = CrossModalEncoder.from_pretrained(model, device="cpu")
    texts = ["the cat", "blue book", "green sea and water", "a small star"]
    files = [image_files / f"{i}.png" for i in range(5)]
    stored = {
        "text": (encoder.encode_documents(texts), [f"text {i}" for i in range(len(texts))]),
        "image": (encoder.encode_images(files).rows, [f"{i}.png" for i in range(5)]),
    }
    keep = {"image": {"modality": "image"}, "text": {"not": {"modality": "image"}}}
    # Weights of 9 significant bits, and an index that may keep 8 of them more.
    precision = 1e-5 if kind in ("memory", "edge") else 2**-7
    with opened_in(request, kind, encoder) as collection:
        collection.add_texts(texts, ids=stored["text"][1])
        with pytest.raises(RejectedRows) as caught:
            collection.add_images(image_files, thumbnail_px=256)
        assert caught.value.ids == ["broken.png"]
        assert collection.count(keep["image"]) == 5
        image = image_files / "2.png"
        queries = {
            "text": (encoder.encode_queries(["green sea"]), lambda **o: collection.search(
                "green sea", 10, **o)),
            "image": (encoder.encode_images([image]).rows, lambda **o: collection.search_by_image(
                image, 10, **o)),
        }  # fmt: skip
        for asked, found in (("text", "image"), ("image", "text"), ("image", "image")):
            query, search = queries[asked]
            rows, ids = stored[found]
            scores = dict(zip(ids, query.dot(rows)[0].tolist(), strict=True))
            hits = search(filter=keep[found])
            expected = {id: score for id, score in scores.items() if score > 0}
            assert {hit.id for hit in hits} == set(expected), (asked, found)
            for hit in hits:
                assert hit.score == pytest.approx(expected[hit.id], rel=precision)
                assert (hit.payload.get("modality") == "image") == (found == "image")
                terms = collection.explain(query, hit.id)
                total = sum(term.product for term in terms)
                assert total == pytest.approx(expected[hit.id], rel=precision)
            order = [scores[hit.id] for hit in hits]
            assert order == pytest.approx(sorted(order, reverse=True), rel=precision)
            if asked == found == "image":
                assert hits[0].id == "2.png"
        assert {hit.id for hit in collection.search("green sea", 20)} <= {
            *stored["text"][1], *stored["image"][1]
        }  # fmt: skip
        (record,) = collection.get(["3.png"], with_rows=True)
        assert record.payload["thumbnail"].startswith("data:image/jpeg;base64,")
        assert record.payload["image"] == str(files[3])
        exact = stored["image"][0][3].to_dicts()[0]
        kept = record.row.to_dicts()[0]
        assert kept == pytest.approx(exact, rel=precision)
        # The same file again is the same document; another one in its place replaces it.
        collection.add_images([files[3]], ids=["3.png"])
        assert collection.count(keep["image"]) == 5
        assert "thumbnail" not in collection.get(["3.png"])[0].payload
        assert collection.delete(["3.png"]) == 1
        assert collection.count(keep["image"]) == 4


def run(capsys, *arguments):
    from vdr_db.cli.main import main

    code = main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_the_command_line(tmp_path, model, image_files, capsys):
    store = tmp_path / "store"
    index = ["index", "--images", image_files, "--store", store, "--device", "cpu", "--json"]
    code, out, err = run(capsys, *index, "--model", model)
    assert (code, json.loads(out)) == (0, {"written": 5, "refused": 0, "documents": 5})
    assert "5 images written" in err
    (image_files / "broken.png").write_bytes(b"nothing")
    code, out, err = run(capsys, *index, "--model", model)
    assert (code, json.loads(out)) == (3, {"written": 5, "refused": 1, "documents": 5})
    assert "broken.png: it is no image of a known format" in err

    place = ["--store", store, "--device", "cpu", "--json"]
    code, out, _ = run(capsys, "search", "--image", image_files / "2.png", *place, "--limit", 2)
    assert code == 0
    hits = json.loads(out)["hits"]
    assert hits[0]["id"] == "2.png"
    assert hits[0]["payload"]["image"] == str(image_files / "2.png")
    assert hits[0]["words"]
    code, out, _ = run(capsys, "search", "green sea", *place, "--filter", '{"modality": "image"}')
    assert code in (0, 1)
    code, _, err = run(capsys, "search", *place)
    assert (code, "Pass what to look for" in err) == (2, True)
    code, _, err = run(capsys, "search", "--image", image_files / "broken.png", *place)
    assert (code, "cannot be searched for" in err) == (2, True)


def test_the_command_line_says_what_is_wrong(tmp_path, model, image_files, capsys):
    from model_folders import write_bert

    place = ["--store", tmp_path / "store", "--device", "cpu"]
    code, _, err = run(capsys, "index", *place)
    assert (code, "Pass files of texts or --images FOLDER" in err) == (2, True)
    code, _, err = run(
        capsys, "index", "--images", image_files, "--tokens", *place, "--model", model
    )
    assert (code, "an image has no tokens" in err) == (2, True)
    text_model = write_bert(tmp_path / "text")
    code, _, err = run(capsys, "index", "--images", image_files, *place, "--model", text_model)
    assert (code, "must hold an image encoder" in err) == (2, True)
    empty = tmp_path / "none"
    empty.mkdir()
    code, _, err = run(capsys, "index", "--images", empty, *place, "--model", model)
    assert (code, "must hold images" in err) == (2, True)


def test_a_vector_for_each_kind_in_one_collection(tmp_path):
    """Two named sparse vectors: each view finds its own kind, with no filter."""
    qdrant_client = pytest.importorskip("qdrant_client")
    from qdrant_contract_server import QdrantContractServer

    encoder = ImageWordEncoder()
    with QdrantContractServer(tmp_path / "server") as server:
        client = qdrant_client.QdrantClient(url=server.url, check_compatibility=False)
        parameters = qdrant_client.models.SparseVectorParams()
        client.create_collection(
            "photos", sparse_vectors_config={"text": parameters, "image": parameters}
        )
        texts, images = (
            VDRQdrant.from_existing("photos", encoder, client=client, adopt=True, vector_name=name)
            for name in ("text", "image")
        )
        texts.add_texts(["chess is a game", "capital of france"], ["text chess", "text france"])
        images.add_images([b"chess kings", b"paris capital"], ["chess", "paris"])
        assert [hit.id for hit in images.search("chess")] == ["chess"]
        assert [hit.id for hit in texts.search("chess")] == ["text chess"]
        assert [hit.id for hit in texts.search_by_image(b"capital")] == ["text france"]
        assert [hit.id for hit in images.search_by_image(b"kings")] == ["chess"]
        assert [hit.id for hit in images.search("capital chess game", 5)] == ["chess", "paris"]
        product = sum(term.product for term in images.explain("kings", "chess"))
        assert product == pytest.approx(images.search("kings")[0].score, rel=1e-5)
        points, _ = client.scroll("photos", limit=9, with_vectors=True)
        assert sorted(name for point in points for name in point.vector) == [
            *("image", "image", "text", "text"),
        ]
        client.close()
