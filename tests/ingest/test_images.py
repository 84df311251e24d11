"""A folder of pictures as the source of an ingest, into the real embedded store."""

from __future__ import annotations

import json
import os
from itertools import islice

import numpy as np
import pytest
from broken_images import PICTURE, broken_contents, encoded
from hashing_encoder import HashingEncoder
from hypothesis import given, settings
from hypothesis import strategies as st
from image_folders import pixels, write_cross_modal
from PIL import Image

from vdr_db import CrossModalEncoder
from vdr_db.connectors import QdrantStore, VDRQdrant
from vdr_db.connectors.memory import MemoryStore
from vdr_db.errors import ConfigError, InputError, ShapeError
from vdr_db.images.files import list_images, walk_images
from vdr_db.ingest import (
    ImageFolderSource,
    IngestOptions,
    RecordSource,
    Slice,
    SpoolSource,
    Stop,
    encode_to_spool,
    ingest,
)
from vdr_db.ingest.images import image_digest
from vdr_db.readers import Record


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return CrossModalEncoder.from_pretrained(
        write_cross_modal(tmp_path_factory.mktemp("models") / "m"), device="cpu"
    )


def write(folder, names, size=(24, 18)):
    """A different picture under each name."""
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(Image.fromarray(pixels(*size, seed=seed)), "PNG"))


@pytest.fixture
def folder(tmp_path):
    names = [f"{'birds/' if i % 2 else ''}{i:03d}.png" for i in range(60)]
    write(tmp_path / "images", names)
    return tmp_path / "images"


def dump(store):
    return {one.id: (one.payload, one.row) for one in store.get(list(store.ids()), with_rows=True)}


# Which pictures, in which order


part = st.sampled_from(
    ["a", "b", "a.png", "ab", "B", "a-b", "a.b", "ü", "Z.JPG", "c.txt", ".x", "~"]
)


@settings(max_examples=60, deadline=None)
@given(st.sets(st.lists(part, min_size=1, max_size=4).map(tuple), max_size=12))
def test_the_walk_has_the_order_of_the_list(tmp_path_factory, paths):
    root = tmp_path_factory.mktemp("tree")
    for path in sorted(paths, key=len):
        place = root.joinpath(*path)
        if any(above.is_file() for above in place.parents) or place.exists():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        place.with_name(place.name + ".png").touch() if len(path) > 2 else place.touch()
    walked = list(walk_images(root))
    try:
        assert walked == list_images(root)
    except InputError:
        assert walked == []
    sources = [list(walked[k::3]) for k in range(3)]
    if walked:
        for k in range(3):
            source = ImageFolderSource(root, slice=Slice(k, 3))
            assert [record.id for record in source.records()] == sources[k]


def test_links_to_folders_are_not_followed(tmp_path):
    write(tmp_path / "in", ["a/b.png", "c.png"])
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "in" / "c.png")
    assert list(walk_images(tmp_path / "in")) == list_images(tmp_path / "in")


def test_what_is_no_folder_of_pictures(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.png").touch()
    for place in ("a.png", "nowhere"):
        with pytest.raises(InputError, match="must come from a folder"):
            ImageFolderSource(tmp_path / place)
    with pytest.raises(InputError, match="must hold images"):
        ImageFolderSource(tmp_path / "empty")


def test_image_digest(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(bytes(3 << 20))
    import hashlib

    assert image_digest(file) == hashlib.sha256(bytes(3 << 20)).hexdigest()
    os.mkfifo(tmp_path / "pipe")
    for bad in (tmp_path / "pipe", tmp_path, tmp_path / "none", "a\0b"):
        assert image_digest(bad) == ""


# Into a store


def test_the_same_collection_as_add_images(tmp_path, folder, encoder):
    with VDRQdrant("one", encoder, path=tmp_path / "one") as direct:
        direct.add_images([folder / name for name in list_images(folder)], list_images(folder))
        expected = dump(direct.store)
    with VDRQdrant("two", encoder, path=tmp_path / "two") as collection:
        report = ingest(ImageFolderSource(folder), collection, ledger=tmp_path / "ledger")
        totals = report.totals
        assert totals.read == totals.encoded == totals.acknowledged == 60
        assert report.is_complete
        checks = report.verification
        assert checks.is_passed
        assert (checks.count, checks.read_back, checks.searched) == (60, 60, 8)
        got = dump(collection.store)
        assert all(payload.pop("_vdr_fp") for payload, _ in got.values())
        assert got == expected
        assert got["birds/001.png"][0] == {
            "modality": "image",
            "image": str(folder / "birds/001.png"),
        }
        hit = collection.search_by_image(folder / "000.png", 1)[0]
        assert hit.id == "000.png"
        # Texts go into the same collection, with a ledger of their own.
        texts = RecordSource([Record("t", "einstein")], identity="texts")
        ingest(texts, collection, ledger=tmp_path / "texts.ledger")
        assert collection.count() == 61
        assert collection.count({"modality": "image"}) == 60


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged files
def test_broken_files_are_quarantined_and_their_neighbours_stored(tmp_path, encoder):
    contents = broken_contents()
    assert len(contents) >= 20
    images = tmp_path / "images"
    images.mkdir()
    for name, content in contents.items():
        (images / name).write_bytes(content)
        write(images, [f"{name}.good.png"])
    (images / "dangling.png").symlink_to("nowhere")
    (images / "circle.png").symlink_to("circle.png")
    os.mkfifo(images / "pipe.png")
    no_text = os.fsdecode(b"\xff.png")
    (images / no_text).write_bytes(encoded(Image.fromarray(PICTURE), "PNG"))
    long = "x" * 200 + "/" + "y" * 200 + "/" + "z" * 200 + ".png"
    write(images, [long])
    bad = {*contents, "dangling.png", "circle.png", "pipe.png", no_text, long}
    good = {f"{name}.good.png" for name in contents}
    with VDRQdrant("c", encoder, path=tmp_path / "store") as collection:
        for skip in (None, "unchanged", "existing"):
            options = IngestOptions(skip=skip, restart=True)
            report = ingest(
                ImageFolderSource(images), collection, ledger=tmp_path / "l", options=options
            )
            assert report.totals.refused == len(bad)
            assert report.verification.is_passed
            assert set(collection.store.ids()) == good
            lines = (tmp_path / "l.quarantine.jsonl").read_text().splitlines()
            told = {line["id"]: line for line in map(json.loads, lines)}
            assert set(told) == bad
            for id, line in told.items():
                assert line["source"] == str(images / id)
                assert line["reason"]
        again = ingest(ImageFolderSource(images), collection, ledger=tmp_path / "l")
        assert again.totals.resumed == len(bad | good)
        assert len((tmp_path / "l.quarantine.jsonl").read_text().splitlines()) == len(bad)
    assert "no such file" in told["dangling.png"]["reason"]
    assert "device or pipe" in told["pipe.png"]["reason"]
    assert "lone surrogate" in told[no_text]["reason"]
    assert "1 to 512 bytes" in told[long]["reason"]


def test_too_many_broken_files_stop_the_ingest(tmp_path, folder):
    for i in range(5):
        (folder / f"{i}.bad.png").write_bytes(b"broken")
    with pytest.raises(InputError, match="5 documents were refused, more than the 3 allowed"):
        ingest(
            ImageFolderSource(folder),
            MemoryStore(),
            encoder=HashingEncoder(),
            options=IngestOptions(max_errors=3),
        )


def test_only_changed_pictures_are_encoded_again(tmp_path, folder, encoder):
    seen = []

    class Watched:
        def __getattr__(self, name):
            return getattr(encoder, name)

        def encode_images(self, images, **options):
            seen.extend(path.name for path in images)
            return encoder.encode_images(images, **options)

    def run(**options):
        seen.clear()
        source = ImageFolderSource(folder, thumbnail_px=options.pop("thumbnail_px", None))
        return ingest(source, store, encoder=Watched(), options=IngestOptions(**options)).totals

    with QdrantStore("c", path=tmp_path / "store") as store:
        assert run().acknowledged == 60
        assert run(skip="existing").existing == 60
        assert not seen
        assert run(skip="unchanged").unchanged == 60
        assert not seen
        # Another time is no other picture, other bytes are; a copy under a new name is new.
        os.utime(folder / "000.png", (1, 1))
        write(folder, ["new.png", "002.png"], size=(30, 30))
        totals = run(skip="unchanged")
        assert (totals.unchanged, totals.acknowledged) == (59, 2)
        assert sorted(seen) == ["002.png", "new.png"]
        assert (
            store.get(["002.png"], True)[0].row == encoder.encode_images([folder / "002.png"]).rows
        )
        assert run(skip="existing").existing == 61
        # Thumbnails are a part of what is stored.
        totals = run(skip="unchanged", thumbnail_px=32)
        assert (totals.unchanged, totals.acknowledged) == (0, 61)
        assert store.get(["002.png"])[0].payload["thumbnail"].startswith("data:image/jpeg")
        assert run(skip="unchanged", thumbnail_px=32).unchanged == 61


def test_an_interrupted_ingest_goes_on(tmp_path, folder):
    stop = Stop()

    class Watch:
        def update(self, totals, *, is_last=False):
            seen.append((totals.read, totals.encoded, totals.acknowledged))
            if totals.encoded >= 32 and not stop.is_requested:
                stop.request()

    seen = []
    store = MemoryStore()
    report = ingest(
        ImageFolderSource(folder),
        store,
        encoder=HashingEncoder(),
        ledger=tmp_path / "l",
        stop=stop,
        progress=Watch(),
    )
    assert report.is_interrupted
    assert report.totals.acknowledged == report.totals.encoded == store.count() == 32
    assert seen[-1] == (60, 32, 32)
    report = ingest(
        ImageFolderSource(folder), store, encoder=HashingEncoder(), ledger=tmp_path / "l"
    )
    assert (report.totals.resumed, report.totals.acknowledged) == (32, 28)
    assert report.verification.count == 60
    write(folder, ["later.png"])
    with pytest.raises(ConfigError, match=r"its images have changed since \(60 then, 61 now\)"):
        ingest(ImageFolderSource(folder), store, encoder=HashingEncoder(), ledger=tmp_path / "l")


def test_copies_of_a_folder_are_one_input_by_digest(tmp_path, folder):
    facts = [ImageFolderSource(folder, digest=digest).description for digest in (False, True)]
    os.utime(folder / "000.png", (1, 1))
    assert ImageFolderSource(folder).description != facts[0]
    assert ImageFolderSource(folder, digest=True).description == facts[1]
    write(folder, ["000.png"], size=(9, 9))
    assert ImageFolderSource(folder, digest=True).description != facts[1]


def test_a_picture_that_goes_while_the_ingest_runs(tmp_path, folder, encoder):
    class Removing:
        def __getattr__(self, name):
            return getattr(encoder, name)

        def encode_images(self, images, **options):
            (folder / "birds/059.png").unlink(missing_ok=True)
            return encoder.encode_images(images, **options)

    with QdrantStore("c", path=tmp_path / "store") as store:
        report = ingest(
            ImageFolderSource(folder), store, encoder=Removing(), quarantine=tmp_path / "q"
        )
        assert report.totals.refused == 1
        assert "no such file" in (tmp_path / "q").read_text()
        assert store.count() == 59
        assert report.verification.is_passed


def test_what_does_not_fit(tmp_path, folder):
    class Texts:
        vocabulary = HashingEncoder().vocabulary
        stamp = HashingEncoder().stamp
        encode_documents = HashingEncoder().encode_documents

    store = MemoryStore()
    with pytest.raises(ConfigError, match="an encoder that reads images, got Texts"):
        ingest(ImageFolderSource(folder), store, encoder=Texts())
    options = IngestOptions(documents="tokens")
    with pytest.raises(ConfigError, match="takes no images, which have no tokens"):
        ingest(ImageFolderSource(folder), store, encoder=HashingEncoder(), options=options)
    assert store.width is None, "nothing is made before the options are checked"

    class Short(HashingEncoder):
        def encode_images(self, images):
            return super().encode_images(list(islice(images, 3)))

    with pytest.raises(ShapeError, match="one row of width 30522 per image"):
        ingest(ImageFolderSource(folder), store, encoder=Short())


def test_slices_through_a_spool(tmp_path, folder, encoder):
    pytest.importorskip("pyarrow")
    (folder / "bad.png").write_bytes(b"no picture")
    direct, loaded = MemoryStore(), MemoryStore()
    ingest(ImageFolderSource(folder), direct, encoder=encoder)
    for k in range(3):
        source = ImageFolderSource(folder, slice=Slice(k, 3))
        report = encode_to_spool(source, tmp_path / "spool", encoder=encoder, part_rows=7)
        assert report.is_complete
    quarantined = [
        json.loads(line)["id"]
        for file in (tmp_path / "spool").glob("quarantine-*.jsonl")
        for line in file.read_text().splitlines()
    ]
    assert quarantined == ["bad.png"]
    report = ingest(SpoolSource(tmp_path / "spool"), loaded)
    assert report.verification.is_passed
    assert dump(loaded) == dump(direct)
    options = IngestOptions(skip="unchanged")
    again = ingest(ImageFolderSource(folder), loaded, encoder=encoder, options=options)
    assert again.totals.unchanged == 60


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_into_a_server(tmp_path, folder, encoder, protocol):
    pytest.importorskip("qdrant_client")
    from qdrant_contract_server import QdrantContractServer

    with QdrantContractServer(tmp_path / "server") as server:
        collection = VDRQdrant(
            "c",
            encoder,
            url=server.url,
            prefer_grpc=protocol == "grpc",
            client_options={"grpc_port": server.grpc_port},
        )
        with collection:
            report = ingest(ImageFolderSource(folder), collection, ledger=tmp_path / "l")
            assert report.verification.is_passed
            row = collection.get(["birds/001.png"], with_rows=True)[0].row
            expected = encoder.encode_images([folder / "birds/001.png"]).rows
            np.testing.assert_array_equal(row.indices, expected.indices)
            np.testing.assert_array_equal(row.values, expected.values)
