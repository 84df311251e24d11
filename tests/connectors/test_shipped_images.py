"""The model of texts and images that is shipped: by its name, without a download, in one store."""

import json

import pytest

from vdr_db import CrossModalEncoder, SparseEncoder
from vdr_db.checkpoints.assets import DEFAULT_IMAGE_MODEL, fetch
from vdr_db.cli.main import main
from vdr_db.cli.pictograms import write_pictograms
from vdr_db.connectors import VDRQdrant
from vdr_db.errors import ConfigError

QUERIES = {"music": "note.png", "love": "heart.png", "sun": "sun.png", "house": "house.png"}


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    return write_pictograms(tmp_path_factory.mktemp("drawings"))


def test_texts_and_images_in_one_collection(drawings):
    with VDRQdrant("x", encoder="vdr-tiny-image", path=":memory:") as both:
        both.add_images(drawings)
        both.add_texts(["A sonata is music for one or two players."], ids=["sonata"])
        for query, name in QUERIES.items():
            (first, *_) = both.search(query, limit=1, filter={"modality": "image"})
            assert first.id == name, query
        assert both.search("sonata", limit=1)[0].id == "sonata"
        note_of = both.search_by_image(drawings / "note.png", filter={"modality": "image"})
        assert note_of[0].id == "note.png"


def test_its_text_side_is_that_of_the_text_model():
    folder = fetch(DEFAULT_IMAGE_MODEL)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert size <= 25e6
    assert not (folder / "text" / "model.safetensors").exists()
    both = CrossModalEncoder.from_pretrained(DEFAULT_IMAGE_MODEL, device="cpu")
    alone = SparseEncoder.from_pretrained("vdr-tiny", device="cpu", k=64, query_k=64)
    alone.norm = True
    texts = ["two eighth notes", "a house with a garden"]
    assert both.encode_queries(texts) == alone.encode_queries(texts)
    assert both.model == DEFAULT_IMAGE_MODEL


def test_a_collection_of_the_text_model_names_it(drawings):
    with (
        VDRQdrant("x", path=":memory:") as texts,
        pytest.raises(ConfigError, match="encoder='vdr-tiny-image'"),
    ):
        texts.add_images(drawings)


def test_the_commands_need_no_model(drawings, tmp_path, capsys):
    place = ["--store", str(tmp_path / "images"), "--device", "cpu"]
    assert main(["index", "--images", str(drawings), *place]) == 0
    note = tmp_path / "note.txt"
    note.write_text("a sonata for two violins\n")
    assert main(["index", str(note), *place]) == 0, "texts beside images, by the same model"
    capsys.readouterr()
    assert main(["search", "music", *place, "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ids = [hit["id"] for hit in found[0]["hits"]]
    assert "note.png" in ids
