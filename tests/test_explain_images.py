"""Images as words: reports of an image, of a text query against it, and of an image query."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from chromium import ABSENT, DESKTOP, OVERLAPS, PHONE, Browser, find_chromium
from html_page import Page

from vdr_db.cli.main import main
from vdr_db.errors import InputError
from vdr_db.explain import (
    explain_image,
    is_image,
    match_of,
    match_of_image,
    report_html,
    save_html,
    save_png,
    shared_words,
    shares_of,
    shares_svg,
    thumbnail_of,
)
from vdr_db.explain.numbers import decimals_for
from vdr_db.sparse import SparseRows

pytest.importorskip("torch")
Image = pytest.importorskip("PIL.Image")

QUERY = "the green sea and the sun"


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_splade_folder):
    """A tiny cross-modal model with BERT's words: 49 patches, random weights."""
    from image_folders import VIT, write_cross_modal
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_splade_folder / "tokenizer.json"))
    vit = {**VIT, "resolution": 56}
    folder = tmp_path_factory.mktemp("images") / "model"
    return write_cross_modal(folder, tokenizer=tokenizer, topk=2000, vit=vit)


@pytest.fixture(scope="module")
def encoder(model):
    from vdr_db import CrossModalEncoder

    made = CrossModalEncoder.from_pretrained(model, device="cpu")
    made.model = made.text.model = made.image.model = str(model)
    return made


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    from image_folders import pixels

    folder = tmp_path_factory.mktemp("pictures")
    for i, size in enumerate([(80, 60), (60, 80), (64, 64)]):
        Image.fromarray(pixels(*size, seed=i)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory, encoder, pictures):
    """Texts; images whose files are there, gone (with and without a thumbnail), and changed."""
    from vdr_db.connectors import VDRQdrant

    folder = tmp_path_factory.mktemp("store")
    for name in ("gone", "bare", "changed"):
        (folder / f"{name}.png").write_bytes((pictures / "0.png").read_bytes())
    with VDRQdrant("texts", encoder, path=folder / "store") as made:
        made.add_texts([QUERY, "a blue book"], ids=["text", 7])
        made.add_images(pictures)
        made.add_images([folder / "gone.png"], ["gone"], thumbnail_px=48)
        made.add_images([folder / "bare.png"], ["bare"])
        made.add_images([folder / "changed.png"], ["changed"], thumbnail_px=32)
    (folder / "gone.png").unlink()
    (folder / "bare.png").unlink()
    noise = np.random.default_rng(0).integers(0, 255, (50, 50, 3), np.uint8)
    Image.fromarray(noise).save(folder / "changed.png")
    return folder / "store"


@pytest.fixture
def collection(store, encoder):
    from vdr_db.connectors import VDRQdrant

    with VDRQdrant("texts", encoder, path=store) as opened:
        yield opened


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if find_chromium() is None:
        pytest.skip(ABSENT)
    opened = Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


# Matches


def text_query(collection, encoder, id, **options):
    return match_of(collection, encoder.text, QUERY, id, images=encoder.image, **options)


def test_a_text_query_against_an_image(collection, encoder, pictures):
    match = text_query(collection, encoder, "0.png", open_files=True)
    (hit,) = [hit for hit in collection.search(QUERY, 10) if hit.id == "0.png"]
    assert match.score == pytest.approx(hit.score, rel=1e-5)
    assert sum(reason.product for reason in match.reasons) == pytest.approx(match.score)
    image = match.document
    assert (image.heading, image.text, image.is_image) == ("image", "", True)
    assert image.attribution.grid == (7, 7)
    row = encoder.encode_images([pictures / "0.png"]).rows.to_dicts()[0]
    found = [row[id] for id in image.attribution.ids.tolist()]
    np.testing.assert_allclose(image.attribution.weights.max(axis=0), found, rtol=1e-3)
    # What counts is at the patches its words come from.
    totals = image.attribution.totals_of(match.shares())
    best = image.attribution.best
    for share, position in (
        (match.shares().get(int(id), 0.0), p)
        for id, p in zip(image.attribution.ids, best, strict=True)
    ):
        assert share <= totals[position] + 1e-9
    followed = set(image.attribution.ids.tolist())
    expected = sum(share for id, share in match.shares().items() if id in followed)
    assert totals.sum() == pytest.approx(expected)
    drawn = shares_svg(image.attribution, image.image, match.shares())
    assert drawn.count("<rect") == (totals > 0).sum() > 0


def test_an_image_query_against_a_text_and_an_image(collection, encoder, pictures):
    for id, kind in (("text", "document"), ("1.png", "image"), (7, "document")):
        match = match_of_image(collection, encoder, pictures / "0.png", id, open_files=True)
        (hit,) = [hit for hit in collection.search_by_image(pictures / "0.png", 10) if hit.id == id]
        assert match.score == pytest.approx(hit.score, rel=1e-5)
        assert (match.query.heading, match.document.heading) == ("query", kind)
        assert match.query.attribution.grid == (7, 7)
        assert match.query.image is not None
        page = report_html(match)
        Page(page)
        assert page.count("<figure><svg") - page.count("small-maps") >= 1
    with pytest.raises(InputError):
        match_of_image(collection, encoder, pictures / "0.png", "nobody")
    with pytest.raises(InputError, match="cannot be read"):
        match_of_image(collection, encoder, pictures / "no.png", "text")


def test_without_its_file_an_image_is_its_thumbnail_or_its_words(collection, encoder):
    for id, has_thumbnail in (("gone", True), ("bare", False), ("changed", True)):
        match = text_query(collection, encoder, id, open_files=True)
        assert match.document.image is None, "another picture would explain nothing"
        assert match.document.attribution is None
        assert bool(match.document.thumbnail) == has_thumbnail
        assert match.document.words
        page = report_html(match)
        assert page.count("<img ") == (2 if has_thumbnail else 0)
    # Files that payloads name are opened only where that is allowed.
    match = text_query(collection, encoder, "0.png")
    assert (match.document.image, match.document.thumbnail) == (None, "")


def test_thumbnails_of_payloads_are_checked():
    good = "data:image/png;base64,AAAA"
    assert thumbnail_of({"thumbnail": good}) == good
    for bad in (
        "http://x/y.png",
        'data:image/png;base64,AA"onerror',
        "data:text/html;base64,AA",
        "data:image/svg+xml;base64,AAAA",
        3,
        None,
        good + "\n",
    ):
        assert thumbnail_of({"thumbnail": bad}) == ""
    assert is_image({"modality": "image"})
    assert not is_image({"image": "x.png"})


def test_numbers_of_any_size_can_be_read():
    assert [decimals_for(x, usual=2) for x in (0.0, 22.0, 1.0, 0.5, 0.02, 3e-4)] == [
        2, 2, 2, 3, 4, 6]  # fmt: skip
    assert decimals_for(float("inf"), usual=3) == 3
    assert decimals_for(1e-300, usual=3) == 9


def test_small_products_are_not_shown_as_zero(collection, encoder):
    match = text_query(collection, encoder, "0.png")
    assert match.reasons[0].product < 0.001
    page = report_html(match)
    table = page[page.index("<table>") : page.index("</table>")]
    numbers = [float(number) for number in re.findall(r'"number">([\d.]+)<', table)]
    assert numbers
    assert min(numbers) > 0
    shown = numbers[2]
    assert shown == pytest.approx(match.reasons[0].product, rel=0.01)


def test_words_of_two_sides_are_found_in_one_place(encoder):
    texts = encoder.text
    one, other = texts.encode_queries([QUERY, "green water"])[0], texts.encode_documents([QUERY])
    shares = shares_of(one, other)
    assert sum(shares.values()) == pytest.approx(float(one.dot(other)[0, 0]), rel=1e-6)
    assert shares_of(one, None) == {}
    words = shared_words(texts, [QUERY, QUERY, ""], shares)
    assert sum(share for _, share in words) == pytest.approx(sum(shares.values()))
    # A piece at the end of the query is not joined to one at the beginning of the text.
    vocabulary = texts.vocabulary
    cal, ories = vocabulary.id("cal"), vocabulary.id("##ories")
    pieces = {cal: 2.0, ories: 1.0}

    class Halves:
        def __init__(self, vocabulary):
            self.vocabulary = vocabulary

        def token_ids(self, text):
            return {"a": [cal], "b": [ories], "both": [cal, ories]}[text]

    assert shared_words(Halves(vocabulary), ["a", "b"], pieces) == [("cal", 2.0), ("##ories", 1.0)]
    assert shared_words(Halves(vocabulary), ["both"], pieces) == [("calories", 3.0)]

    class Names:
        vocabulary = type("V", (), {"token": staticmethod(lambda id: f"t{id}")})

    assert shared_words(Names(), ["a"], {1: 0.5, 2: 2.0}) == [("t2", 2.0), ("t1", 0.5)]


def test_an_image_that_is_not_the_stored_one_is_refused(encoder, pictures):
    stored = encoder.encode_images([pictures / "0.png"]).rows
    explanation = explain_image(encoder.image, pictures / "0.png", expected=stored)
    assert explanation.nonzeros == stored.nnz
    nothing = SparseRows.empty(1, stored.width)
    with pytest.raises(InputError, match="not the image that was stored"):
        explain_image(encoder.image, pictures / "0.png", expected=nothing)


# The command


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_the_command_shows_an_image_as_words(capsys, model, encoder, pictures, tmp_path):
    file, page = pictures / "0.png", tmp_path / "image.html"
    place = ("--model", model, "--device", "cpu")
    code, out, err = run(capsys, "explain", "--image", file, *place, "--html", page, "--json")
    assert code == 0
    assert f"{page}: written" in err
    told = json.loads(out)
    row = encoder.encode_images([file]).rows
    (best,) = row.top_terms(1, encoder.vocabulary)[0]
    assert told["words"][0] == [best[0], pytest.approx(best[1], rel=1e-5)]
    assert [len(line) for line in told["patches"]] == [7] * 7
    (most,) = {max(patch["weight"] for line in told["patches"] for patch in line)}
    assert most == pytest.approx(best[1], rel=1e-3)
    text = page.read_text("utf-8")
    assert "<h1>What 0.png says</h1>" in text
    assert "which word fires on which patch" in text
    assert text.count('class="cloud"') == 1
    assert text.count('<svg class="bar"') == 12
    assert "model model" in text
    code, out, _ = run(capsys, "explain", "--image", file, *place)
    lines = out.splitlines()
    assert lines[0].strip() == "0.png"
    at = next(i for i, line in enumerate(lines) if "strongest word of each patch" in line)
    assert len(lines[at + 1 :]) == 7
    narrow, _, _ = run(capsys, "explain", "--image", file, *place, "--k", "1", "--json")
    assert narrow == 0


def test_the_command_explains_both_directions(capsys, model, store, pictures, tmp_path):
    place = ("--store", store, "--device", "cpu")
    for arguments in (
        (QUERY, "0.png"),
        ("--image", pictures / "1.png", "text"),
        ("--image", pictures / "1.png", "7"),
        ("--image", pictures / "1.png", "gone"),
    ):
        page = tmp_path / "why.html"
        code, out, err = run(capsys, "explain", *arguments, *place, "--html", page, "--json")
        assert code == 0, err
        told = json.loads(out)
        products = [t["query_weight"] * t["document_weight"] for t in told["terms"]]
        assert told["score"] == pytest.approx(sum(products), rel=1e-5)
        text = page.read_text("utf-8")
        assert "The score, word by word" in text
        assert re.search(r'<div class="columns"><div><table>.*?</table></div><div><figure>', text)
        assert ("the image 1.png" in text) == (arguments[0] == "--image")
        code, out, err = run(capsys, "explain", *arguments, *place)
        assert "0.000 " not in out.splitlines()[-1]
    # Without a collection: a text against an image.
    file = pictures / "0.png"
    page = tmp_path / "pair.html"
    pair = ("explain", QUERY, "--image", file, "--model", model, "--device", "cpu")
    code, out, _ = run(capsys, *pair, "--html", page, "--json")
    assert (code, json.loads(out)["id"]) == (0, "0.png")
    assert "Why 0.png matches “the green sea and the sun”" in page.read_text("utf-8")


def test_the_command_says_what_is_wrong(capsys, model, store, pictures, tmp_path):
    from model_folders import write_bert

    file = pictures / "0.png"
    texts = write_bert(tmp_path / "texts")
    cpu = ("--device", "cpu")
    fix = r"needs a model that reads images, and .* reads texts only; pass --model"
    for arguments in (
        ("--image", file, "--model", texts),
        (QUERY, "--image", file, "--model", texts),
    ):
        code, out, err = run(capsys, "explain", *arguments, *cpu)
        assert (code, out) == (2, "")
        assert re.search(fix, err), err
    for arguments in (("--image", file), (QUERY, "--image", file)):  # by the shipped model
        code, out, err = run(capsys, "explain", *arguments, *cpu)
        assert (code, bool(out), "vdr-db:" in err) == (0, True, False), err
    note = tmp_path / "note.txt"
    note.write_text("the green sea\n")
    place = ("--store", tmp_path / "of texts", *cpu)
    assert run(capsys, "index", note, *place, "--model", texts)[0] == 0
    for more in ((), ("note.txt:1",)):
        code, _, err = run(capsys, "explain", "--image", file, *more, *place)
        assert (code, bool(re.search(fix, err))) == (2, True), err
    for arguments, told in (
        ((), "Pass what to explain"),
        (("a", "b", "--image", file, "--store", store), "one of the two"),
        (("a", "b", "--image", file), "pass --store"),
        (("--image", tmp_path / "no.png", "--model", model), "no such file"),
        (("--image", note, "--model", model), "no image of a known format"),
        ((QUERY, "--image", note, "--model", model), "no image of a known format"),
        (("--image", file, "nobody", "--store", store), "no document with the id"),
    ):
        code, _, err = run(capsys, "explain", *arguments, *cpu)
        assert (code, told in err) == (2, True), err


# Looked at


@pytest.fixture(scope="module")
def shown(encoder, store, pictures):
    from vdr_db.connectors import VDRQdrant

    with VDRQdrant("texts", encoder, path=store) as opened:
        return {
            "image alone": [explain_image(encoder.image, pictures / "0.png")],
            "text to image": text_query(opened, encoder, "0.png", open_files=True),
            "thumbnail": text_query(opened, encoder, "gone"),
            "image to text": match_of_image(opened, encoder, pictures / "1.png", "text"),
            "image to image": match_of_image(
                opened, encoder, pictures / "1.png", "2.png", open_files=True
            ),
        }


def keep(path: Path) -> None:
    """Copies a picture to where somebody can look at it, when asked to."""
    if folder := os.environ.get("VDR_DB_KEEP_SCREENSHOTS"):
        Path(folder, path.name).write_bytes(path.read_bytes())


KINDS = {"image alone": 7, "text to image": 8, "thumbnail": 2, "image to text": 8,
         "image to image": 16}  # fmt: skip
"""Pictures of each report: a map of patches with six small ones, the score's, thumbnails."""


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("kind", KINDS)
def test_reports_of_images_look_right_in_a_browser(browser, size, kind, shown, tmp_path):
    page = tmp_path / "report.html"
    save_html(page, shown[kind], title=kind)
    browser.resize(size)
    browser.open(page.as_uri())
    name = f"{kind.replace(' ', '_')}_{'phone' if size == PHONE else 'desktop'}.png"
    keep(browser.screenshot(tmp_path / name))
    browser.assert_readable()
    assert browser.run(OVERLAPS) == 0
    assert browser.run("document.querySelectorAll('img, svg.patch-map').length") == KINDS[kind]
    side = "document.querySelector('.reasons figure')?.getBoundingClientRect()"
    table = "document.querySelector('.reasons table')?.getBoundingClientRect()"
    if kind != "image alone":
        beside = browser.run(f"{side}.left >= {table}.right - 1")
        below = browser.run(f"{side}.top >= {table}.bottom - 1")
        assert (beside, below) == ((True, False) if size == DESKTOP else (False, True))
    if kind in ("image alone", "text to image", "image to image"):
        letters = browser.run(
            "Math.min(...[...document.querySelectorAll('.patch-word')].map(word => "
            "word.getBoundingClientRect().height))"
        )
        assert letters >= 6
        fits = browser.run(
            "(() => { const svg = document.querySelector('.patches svg');"
            "const step = svg.getBoundingClientRect().width / 7;"
            "return Math.max(...[...svg.querySelectorAll('.patch-word')].map(word => "
            "word.getBoundingClientRect().width / step)); })()"
        )
        assert fits <= 1.08, "words stay on their patches"


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_reports(kind, shown, tmp_path):
    pytest.importorskip("wordcloud")
    path = tmp_path / f"{kind.replace(' ', '_')}.png"
    save_png(path, shown[kind], title=kind)
    with Image.open(path) as opened:
        assert opened.width == 1440
        assert len(opened.convert("L").getcolors()) > 50
    keep(path)
