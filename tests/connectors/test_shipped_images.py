"""Texts and images with the model that is shipped: by default, without a download, in one store."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vdr_db import CrossModalEncoder, SparseEncoder
from vdr_db.checkpoints.assets import DEFAULT_MODEL
from vdr_db.cli.main import main
from vdr_db.cli.pictograms import write_pictograms
from vdr_db.connectors import VDRQdrant
from vdr_db.errors import ConfigError, StoreMismatch
from vdr_db.ingest import ImageFolderSource, ingest
from vdr_db.stamp import EncoderStamp

QUERIES = {"music": "note.png", "love": "heart.png", "sun": "sun.png", "house": "house.png"}
SONATA = "A sonata is music for one or two players."
REPLACED = json.loads(
    (Path(__file__).parents[1] / "data" / "replaced_stamps.json").read_text("utf-8")
)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    return write_pictograms(tmp_path_factory.mktemp("drawings"))


@pytest.fixture(autouse=True)
def _no_model_of_the_environment(monkeypatch):
    monkeypatch.delenv("VDR_DB_MODEL", raising=False)


def test_texts_and_images_in_one_collection(drawings):
    with VDRQdrant("x", path=":memory:") as both:
        both.add_texts([SONATA], ids=["sonata"])
        assert both.store.stamp.image is None
        both.add_images(drawings)
        assert both.store.stamp.image is not None
        for query, name in QUERIES.items():
            (first, *_) = both.search(query, limit=1, filter={"modality": "image"})
            assert first.id == name, query
        assert both.search("sonata", limit=1)[0].id == "sonata"
        note_of = both.search_by_image(drawings / "note.png", filter={"modality": "image"})
        assert note_of[0].id == "note.png"


def test_texts_alone_load_no_part_of_images(drawings, tmp_path):
    with VDRQdrant("x", path=tmp_path) as both:
        both.add_images(drawings)
    code = f"""
import sys
from vdr_db.connectors import VDRQdrant
with VDRQdrant("x", path={str(tmp_path)!r}) as both:
    both.add_texts([{SONATA!r}], ids=["sonata"])
    print(both.search("sonata", limit=1)[0].id, type(both.encoder).__name__)
    print("vdr_db.encoders.image" in sys.modules)
    both.search_by_image({str(drawings / "note.png")!r})
    print(type(both.encoder).__name__, type(both.encoder.text).__name__)
"""
    # elsewhere, since the folder vdr_db/ of the repository hides the library that is installed
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = ["sonata SparseEncoder", "False", "CrossModalEncoder SparseEncoder"]
    assert done.stdout.splitlines() == expected


def test_images_of_another_encoder_are_refused_when_images_come(drawings, tmp_path):
    with VDRQdrant("x", path=":memory:") as both:
        both.add_images(drawings)
        known = both.store.stamp
        other = replace(known, image=replace(known.image, weights="other"))
    with VDRQdrant("x", path=tmp_path) as both:
        both.store.create(30522, other, documents="encoded")
        both.add_texts([SONATA], ids=["sonata"])
        with pytest.raises(StoreMismatch, match="images: weights digest 'other'"):
            both.add_images(drawings)
        assert both.search("sonata")[0].id == "sonata", "texts go on"


def test_its_text_side_is_that_of_the_text_model():
    both = CrossModalEncoder.from_pretrained(DEFAULT_MODEL, device="cpu")
    alone = SparseEncoder.from_pretrained(DEFAULT_MODEL, device="cpu")
    texts = ["two eighth notes", "a house with a garden"]
    assert both.encode_queries(texts) == alone.encode_queries(texts)
    assert both.model == DEFAULT_MODEL


def test_a_folder_of_images_into_a_collection_of_no_named_model(drawings):
    with VDRQdrant("x", path=":memory:") as both:
        assert ingest(ImageFolderSource(drawings), both).totals.acknowledged == len(QUERIES)
        assert both.search("music", limit=1)[0].id == "note.png"


def test_a_model_of_texts_is_told_which_reads_images(drawings, tiny_splade):
    with (
        VDRQdrant("x", tiny_splade, path=":memory:") as texts,
        pytest.raises(ConfigError, match="encoder='vdr-mini'"),
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


def test_a_collection_of_texts_is_searched_by_an_image(drawings, tmp_path, capsys):
    place = ["--store", str(tmp_path / "texts"), "--device", "cpu"]
    note = tmp_path / "note.txt"
    note.write_text("a piece of music for two violins\n")
    assert main(["index", str(note), *place]) == 0
    capsys.readouterr()
    assert main(["search", "--image", str(drawings / "note.png"), *place, "--json"]) == 0
    assert "music" in capsys.readouterr().out


@pytest.mark.parametrize("name", REPLACED)
def test_a_collection_of_a_model_that_left_says_how_to_go_on(name, tmp_path, capsys):
    with VDRQdrant("old", path=tmp_path) as old:
        stamp = EncoderStamp.from_dict(REPLACED[name])
        old.store.create(30522, stamp, documents="encoded")
    with VDRQdrant("old", path=tmp_path) as old:
        with pytest.raises(StoreMismatch, match=f"{name}' is not shipped any more: encode again"):
            old.add_texts([SONATA])
        with pytest.raises(StoreMismatch, match="a folder that holds the old weights"):
            old.search("sonata")
    assert main(["search", "sonata", "--store", str(tmp_path), "--collection", "old"]) == 2
    assert "encode again" in capsys.readouterr().err
