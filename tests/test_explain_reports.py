"""Seeing: where weights come from, why a hit is a hit, and pages and drawings that show it."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from chromium import ABSENT, DESKTOP, OVERLAPS, PHONE, RIGHT_EDGES, Browser, find_chromium
from html_page import Page
from tiny_png import png

import vdr_db.explain
from vdr_db.cli.main import main
from vdr_db.errors import ConfigError, InputError, MissingExtraError, ShapeError
from vdr_db.explain import (
    Attribution,
    Explanation,
    ShownImage,
    cloud_svg,
    explain_image,
    explain_text,
    grid_svg,
    match_of,
    patches_svg,
    report_html,
    save_html,
    save_png,
    text_attribution,
    weights_by_position,
)
from vdr_db.explain.markup import clean, marked
from vdr_db.explain.spans import NOWHERE, Mark, marks, token_spans, word_groups
from vdr_db.sparse import SparseRows

NOTES = Path(__file__).parent / "data" / "notes.jsonl"
MODEL = ("--model", "tiny-splade")
TEXT = "The tallest animal on land is a giraffe. It eats leaves of orchids, café <b>au</b> lait."
HOSTILE = "<script>alert(1)</script> tea \x00 \u202e ' \" & </style> giraffe"


@pytest.fixture(scope="module")
def collection(tiny_splade):
    from vdr_db.connectors import VDRQdrant

    notes = [json.loads(line) for line in NOTES.read_text("utf-8").splitlines()]
    with VDRQdrant("notes", tiny_splade, path=":memory:") as made:
        made.add_texts([note["text"] for note in notes], ids=[note["id"] for note in notes])
        made.add_texts([HOSTILE, ""], ids=["<i>", "empty"])
        yield made


@pytest.fixture(scope="module")
def match(collection, tiny_splade):
    return match_of(collection, tiny_splade, "a tall beast eating orchids", "zoo")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if find_chromium() is None:
        pytest.skip(ABSENT)
    opened = Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


def keep(path: Path) -> None:
    """Copies a picture to where somebody can look at it, when asked to."""
    if folder := os.environ.get("VDR_DB_KEEP_SCREENSHOTS"):
        Path(folder, path.name).write_bytes(path.read_bytes())


# Where weights come from


@pytest.mark.parametrize("side", ["document", "query"])
def test_the_largest_weight_over_positions_is_the_vector(tiny_splade, side):
    encode = tiny_splade.encode_documents if side == "document" else tiny_splade.encode_queries
    row = encode([TEXT])
    attribution = text_attribution(tiny_splade, TEXT, side=side, row=row)
    weights = row.to_dicts()[0]
    assert sorted(attribution.ids.tolist()) == sorted(weights)
    expected = [weights[id] for id in attribution.ids.tolist()]
    np.testing.assert_allclose(attribution.weights.max(axis=0), expected, rtol=1e-5, atol=1e-6)
    assert expected == sorted(expected, reverse=True)
    assert attribution.totals.sum() == pytest.approx(sum(expected), rel=1e-5)
    assert text_attribution(tiny_splade, TEXT, side=side).ids.tolist() == attribution.ids.tolist()


def test_positions_are_those_of_the_kernel(tiny_splade):
    import torch

    from vdr_db.encoders.batching import pack

    attribution = text_attribution(tiny_splade, TEXT)
    tokens = tiny_splade.tokenizer.encode([TEXT])
    batch = pack(tokens, np.zeros(1, np.int64), tiny_splade.frame("document"))
    with torch.inference_mode():
        pooled = tiny_splade.document_tower(
            torch.from_numpy(batch.input_ids),
            torch.from_numpy(batch.position_ids),
            torch.from_numpy(batch.cu_seqlens),
            batch.runs,
            return_argmax=True,
        )
    columns = tiny_splade.vocabulary.id_to_column[attribution.ids]
    assert attribution.best.tolist() == pooled.argmax[0, columns].tolist()


def test_spans_are_the_words_of_the_text(tiny_splade):
    attribution = text_attribution(tiny_splade, TEXT)
    assert attribution.spans[0] == attribution.spans[-1] == NOWHERE
    assert attribution.positions[0] == "[CLS]"
    labels = [
        TEXT[attribution.spans[group[0]][0] : attribution.spans[group[-1]][1]]
        for group in word_groups(TEXT, attribution.spans)
        if attribution.spans[group[0]] != NOWHERE
    ]
    assert labels == re.findall(r"\w+|[^\w\s]", TEXT)


def test_a_word_in_pieces_is_one_word_with_one_explanation(tiny_splade):
    explanation = explain_text(tiny_splade, TEXT)
    fired = {place.label: place for place in explanation.fired()}
    assert fired["giraffe"].words[0][0] == "giraffe"
    assert dict(explanation.words)["giraffe"] == pytest.approx(
        fired["giraffe"].words[0][1], rel=1e-5
    )
    assert fired["[CLS]"].is_special
    assert not fired["giraffe"].is_special


@pytest.mark.filterwarnings("ignore:.*were cut")
def test_long_and_empty_texts(tiny_splade):
    before = tiny_splade.truncated
    attribution = text_attribution(tiny_splade, "giraffe " * 1000)
    assert tiny_splade.truncated == before + 1
    assert len(attribution.positions) == tiny_splade.frame("document").max_length
    explanation = explain_text(tiny_splade, "")
    assert (explanation.words, explanation.nonzeros) == ([], 0)
    assert "No weight at all" in report_html([explanation])
    assert report_html([explain_text(tiny_splade, " \n ")])


def test_padding_that_takes_part_is_one_position(tiny_splade_folder):
    from vdr_db.encoders.text import SparseEncoder

    encoder = SparseEncoder.from_pretrained(
        tiny_splade_folder, device="cpu", compatibility="max_length", max_length=24
    )
    attribution = text_attribution(encoder, "a giraffe")
    row = encoder.encode_documents(["a giraffe"]).to_dicts()[0]
    assert attribution.positions[-1] == "padding"
    expected = [row[id] for id in attribution.ids.tolist()]
    np.testing.assert_allclose(attribution.weights.max(axis=0), expected, rtol=1e-5, atol=1e-6)


def test_attribution_of_a_normalised_vector_has_its_weights(tiny_splade_folder):
    from vdr_db.encoders.text import SparseEncoder

    encoder = SparseEncoder.from_pretrained(tiny_splade_folder, device="cpu")
    encoder.norm = True
    row = encoder.encode_documents([TEXT])
    attribution = text_attribution(encoder, TEXT, row=row)
    expected = [row.to_dicts()[0][id] for id in attribution.ids.tolist()]
    np.testing.assert_allclose(attribution.weights.max(axis=0), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["elu1p", "log1p_relu", "double_log1p_relu", "none"])
def test_weights_by_position_are_what_the_formula_says(activation):
    import torch

    from vdr_db.kernels import activate

    states, matrix = torch.randn(3, 4), torch.randn(6, 4)
    bias, columns = torch.randn(6), [4, 0]
    rows, picked = matrix[columns].numpy(), bias[columns].numpy()
    found = weights_by_position(states.numpy(), rows, picked, activation)
    expected = activate((states @ matrix.T + bias)[:, columns], activation)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    without = weights_by_position(states.numpy(), rows, None, activation)
    np.testing.assert_allclose(
        without, activate((states @ matrix.T)[:, columns], activation), rtol=1e-5, atol=1e-6
    )


def test_wrong_sizes_are_refused(tiny_splade):
    with pytest.raises(ShapeError, match=r"\[2, 3\], got \[3, 2\]"):
        Attribution(("a", "b"), np.arange(3, dtype=np.int32), np.zeros((3, 2), np.float32))
    with pytest.raises(ShapeError, match="4 patches"):
        Attribution(("a",) * 4, np.zeros(0, np.int32), np.zeros((4, 0), np.float32), grid=(3, 2))
    with pytest.raises(ShapeError, match="`spans`"):
        Attribution(("a",), np.zeros(0, np.int32), np.zeros((1, 0), np.float32), ((0, 1), (1, 2)))
    with pytest.raises(ShapeError, match="one row, got 2"):
        text_attribution(tiny_splade, "a", row=tiny_splade.encode_documents(["a", "b"]))
    with pytest.raises(ConfigError, match="media_type"):
        ShownImage(b"", "text/html", 1, 1)
    with pytest.raises(ConfigError, match="at least one explanation"):
        report_html([])


# Why a hit is a hit


def test_reasons_add_up_to_the_score_of_the_search(collection, tiny_splade, match):
    query = match.query.text
    (hit,) = [hit for hit in collection.search(query) if hit.id == "zoo"]
    assert match.score == pytest.approx(hit.score, rel=1e-5)
    assert match.score == pytest.approx(sum(reason.product for reason in match.reasons))
    for reason in match.reasons:
        assert reason.product == pytest.approx(sum(term.product for term in reason.terms))
        for term in reason.terms:
            assert term.product == pytest.approx(term.query_weight * term.document_weight)
    products = [reason.product for reason in match.reasons]
    assert products == sorted(products, reverse=True)
    assert "tall" in [reason.word for reason in match.reasons]


def test_reasons_of_a_word_in_pieces(collection, tiny_splade):
    match = match_of(collection, tiny_splade, "giraffe", "<i>")
    (reason,) = [reason for reason in match.reasons if reason.word == "giraffe"]
    assert [term.token for term in sorted(reason.terms, key=lambda t: t.id)] != ["giraffe"]
    assert len(reason.terms) == 3


def test_marks_show_where_the_score_comes_from(match):
    found = match.document.marks(match.shares())
    text = match.document.text
    assert {text[mark.start : mark.stop] for mark in found} >= {"tallest", "eats"}
    assert sum(mark.share for mark in found) <= match.score * (1 + 1e-6)


def test_modes_and_unknown_ids(collection, tiny_splade):
    alpha = match_of(collection, tiny_splade, "tall animal", "zoo", mode="alpha")
    assert alpha.query.attribution is None
    assert alpha.score == pytest.approx(
        sum(term.product for term in collection.explain("tall animal", "zoo", mode="alpha"))
    )
    assert report_html(alpha)
    with pytest.raises(InputError):
        match_of(collection, tiny_splade, "tea", "nobody")
    empty = match_of(collection, tiny_splade, "tea", "empty")
    assert (empty.score, list(empty.reasons)) == (0.0, [])
    assert "share no word" in report_html(empty)


def test_a_collection_of_bags_can_be_explained(tiny_splade):
    from vdr_db.connectors import VDRQdrant

    with VDRQdrant("bags", tiny_splade, path=":memory:", documents="tokens") as bags:
        bags.add_texts(["hot tea"], ids=[1])
        match = match_of(bags, tiny_splade, "a hot drink", 1)
    assert match.document.attribution is None
    assert "hot" in [reason.word for reason in match.reasons]
    assert report_html(match)


# Spans and marks


def test_spans_of_hard_texts(tiny_splade):
    for text in ("", "  ", "naïve café", "日本 tea", "e\u0301tude", "a\u200bb", "👩‍🚀 x", "don't"):
        ids, spans = token_spans(tiny_splade, text)
        assert ids == tiny_splade.token_ids(text)
        assert all(0 <= start <= stop <= len(text) for start, stop in spans)
        groups = word_groups(text, spans)
        assert [position for group in groups for position in group] == list(range(len(spans)))
        found = marks(text, spans, [1.0] * len(spans))
        assert all(a.stop <= b.start for a, b in itertools.pairwise(found))
        assert re.sub("</?mark[^>]*>", "", marked(text, found)) == marked(text, [])


def test_pieces_of_a_word_become_one_mark():
    spans = [(0, 2), (2, 5), (6, 9)]
    assert marks("giraf fee", spans, [1.0, 2.0, 0.0]) == [Mark(0, 5, 3.0)]
    assert marks("giraf fee", spans, [0.0, 2.0, 1.0]) == [Mark(2, 5, 2.0), Mark(6, 9, 1.0)]
    assert marks("a-b", [(0, 1), (1, 2), (2, 3)], [1, 1, 1]) == [
        Mark(0, 1, 1),
        Mark(1, 2, 1),
        Mark(2, 3, 1),
    ]


# Pages


@pytest.mark.parametrize("id", ["zoo", "<i>", "empty"])
def test_a_report_is_one_file_without_scripts_and_escapes_everything(
    collection, tiny_splade, id, tmp_path
):
    match = match_of(collection, tiny_splade, f"{HOSTILE} tall", id)
    facts = {"model": "<model>"}
    save_html(tmp_path / "report.html", match, title=HOSTILE, facts=facts)
    page = (tmp_path / "report.html").read_text("utf-8")
    parsed = Page(page)
    assert not {"script", "link", "iframe", "object", "i", "model"} & set(parsed.tags)
    names = {name for name, _ in parsed.attributes}
    assert not {name for name in names if name.startswith("on") or name in ("src", "style")}
    assert "http:" not in page
    assert "https:" not in page
    assert not any(letter in page for letter in "\x00\u202e")
    assert page.count("</style>") == 1


def test_clean_keeps_places():
    assert len(clean(HOSTILE)) == len(HOSTILE)
    assert clean("a\u2066b\x1bc\ud800") == "a b c "


def test_a_cloud_has_whole_words_only():
    words = [("giraffe", 3.0), ("##ing", 2.0), ("##", 1.5), ("tall", 1.0)]
    cloud = cloud_svg(words, most=3)
    assert re.findall(r">([^<]+)<title>", cloud) == ["giraffe", "##", "tall"]


def test_a_cloud_has_no_overlaps_and_is_always_the_same():
    words = [(f"{'word' * (i % 4 + 1)}{i}", 3.0 / (i + 1)) for i in range(60)] + [("zero", 0.0)]
    cloud = cloud_svg(words)
    assert cloud == cloud_svg(words)
    pattern = r'x="([-\d.]+)" y="([-\d.]+)" font-size="([\d.]+)" textLength="([\d.]+)"'
    boxes = [tuple(map(float, found)) for found in re.findall(pattern, cloud)]
    assert len(boxes) == 40
    for i, (x, y, size, width) in enumerate(boxes):
        for other_x, other_y, other_size, other_width in boxes[:i]:
            apart_x = x > other_x + other_width or other_x > x + width
            apart_y = y - 0.8 * size > other_y or other_y - 0.8 * other_size > y
            assert apart_x or apart_y
    assert cloud_svg([]) == ""
    assert cloud_svg([("a", 0.0)]) == ""


def test_the_grid_names_rows_and_columns(tiny_splade):
    attribution = text_attribution(tiny_splade, "tall <b>")
    grid = grid_svg(attribution, tiny_splade.vocabulary)
    assert grid.count("<rect") == len(attribution.positions) * min(14, attribution.ids.size)
    assert ">[CLS]<" in grid
    assert ">&lt;<" in grid
    nothing = Attribution(("a",), np.zeros(0, np.int32), np.zeros((1, 0), np.float32))
    assert grid_svg(nothing, tiny_splade.vocabulary) == ""


# Images


@pytest.fixture(scope="module")
def landscape(tiny_splade):
    """Sky above grass, and weights per patch as an image encoder would give them."""
    picture = ShownImage(
        png(96, 64, lambda _x, y: (200, 225, 255) if y < 32 else (90, 160, 90)), "image/png", 96, 64
    )
    ids = [tiny_splade.vocabulary.id(word) for word in ("sky", "grass", "green")]
    weights = np.full((24, 3), 0.01, np.float32)
    weights[:12, 0] = np.linspace(2.0, 1.5, 12)
    weights[12:, 1] = np.linspace(1.8, 1.4, 12)
    weights[12:, 2] = 1.0
    attribution = Attribution.of_patches(weights, ids, (4, 6))
    row = SparseRows.from_dicts(
        [dict(zip(ids, weights.max(axis=0).tolist(), strict=True))], tiny_splade.vocabulary.size
    )
    return Explanation.of_image(tiny_splade.vocabulary, row, picture, attribution=attribution)


def test_patches_name_their_strongest_word(landscape, tiny_splade):
    attribution = landscape.attribution
    assert attribution.positions[7] == "1,1"
    assert attribution.best.tolist() == [0, 12, 12]
    strongest = {
        p: tiny_splade.vocabulary.token(id) for p, (id, _) in attribution.strongest().items()
    }
    assert strongest == {p: "sky" if p < 12 else "grass" for p in range(24)}
    drawn = patches_svg(attribution, tiny_splade.vocabulary, landscape.image)
    assert drawn.count("data:image/png;base64,") == 1 + 3
    assert drawn.count(">sky<") == 12 + 1  # and the small map
    page = report_html([landscape])
    assert "which word fires on which patch" in page
    assert "http" not in re.sub(r"Content-Security-Policy|http-equiv", "", page)


def test_the_explanation_of_an_image_encoder(tmp_path):
    pytest.importorskip("PIL")
    from image_folders import write_cross_modal

    from vdr_db.encoders.image import ImageEncoder

    encoder = ImageEncoder.from_pretrained(write_cross_modal(tmp_path / "m"), device="cpu")
    image = png(40, 30, lambda x, y: (6 * x, 8 * y, 90))
    explanation = explain_image(encoder, image)
    row = encoder.encode_images([image]).rows
    weights = row.to_dicts()[0]
    expected = [weights[id] for id in explanation.attribution.ids.tolist()]
    np.testing.assert_allclose(explanation.attribution.weights.max(axis=0), expected, rtol=1e-4)
    assert explanation.attribution.grid == (3, 3)
    assert (explanation.image.width, explanation.image.height) == (24, 24)
    assert explanation.nonzeros == row.nnz
    assert "which word fires on which patch" in report_html([explanation])
    with pytest.raises(InputError, match="cannot be read"):
        explain_image(encoder, b"no image")


# Drawings


def test_png_files(match, landscape, tiny_splade, tmp_path):
    pytest.importorskip("wordcloud")
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    hostile = explain_text(tiny_splade, f"$x$ $ \\frac {HOSTILE} 日本")
    empty = explain_text(tiny_splade, "")
    for name, shown in (("match", match), ("image", [landscape]), ("odd", [hostile, empty])):
        path = tmp_path / f"report_{name}.png"
        save_png(path, shown, title="it costs $5 or $6")
        with image.open(path) as opened:
            assert opened.width == 1440
            assert len(opened.convert("L").getcolors()) > 50
        keep(path)
    with pytest.raises(ConfigError, match="at least one explanation"):
        save_png(tmp_path / "none.png", [])


def test_drawings_need_their_extra_and_pages_do_not(match, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"vdr-db\[images\]"):
        save_png(tmp_path / "x.png", match)
    save_html(tmp_path / "x.html", match)


def test_importing_the_package_imports_no_drawing_and_no_model():
    code = (
        "import sys, vdr_db.explain;"
        "print([m for m in ('torch', 'matplotlib', 'wordcloud', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


# Names of before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Evidence", "Attribution"),
        ("Picture", "ShownImage"),
        ("Portrait", "Explanation"),
        ("image_portrait", "explain_image"),
        ("portrait_of_record", "explain_record"),
        ("portrait_of_text", "explain_text"),
        ("text_evidence", "text_attribution"),
    ],
)
def test_old_names_warn(old, new):
    with pytest.warns(DeprecationWarning, match=f"`{old}` is called `{new}`"):
        value = getattr(vdr_db.explain, old)
    assert value is getattr(vdr_db.explain, new)
    assert old not in vdr_db.explain.__all__


def test_old_names_of_functions_keep_their_arguments(landscape, tiny_splade):
    import torch

    row = SparseRows.from_dicts([{5: 1.0}], tiny_splade.vocabulary.size)
    with pytest.warns(DeprecationWarning, match=r"Explanation\.of_image"):
        make = vdr_db.explain.portrait_of_image
    made = make(tiny_splade.vocabulary, row, landscape.image, evidence=landscape.attribution)
    assert (made.image, made.attribution) == (landscape.image, landscape.attribution)
    hidden, matrix, bias = torch.randn(3, 4), torch.randn(6, 4), torch.randn(6)
    with pytest.warns(DeprecationWarning, match="weights_by_position"):
        weigh = vdr_db.explain.position_weights
    found = weigh(hidden, matrix, bias, torch.tensor([4, 0]), "none")
    np.testing.assert_allclose(found, (hidden @ matrix.T + bias)[:, [4, 0]], rtol=1e-5, atol=1e-6)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vdr_db.explain.nothing


# The command


@pytest.mark.usefixtures("tiny_splade_folder")
def test_the_command_writes_reports(capsys, tmp_path):
    place = ("--store", str(tmp_path / "notes"))
    assert main(["index", str(NOTES), *place, *MODEL]) == 0
    capsys.readouterr()
    page = tmp_path / "why.html"
    assert main(["explain", "a tall beast", "zoo", *place, "--html", str(page), "--json"]) == 0
    out, err = capsys.readouterr()
    score = json.loads(out)["score"]
    assert f"{page}: written" in err
    text = page.read_text("utf-8")
    assert "<h1>Why zoo matches “a tall beast”</h1>" in text
    assert f"{score:.3f}" in text
    assert "model tiny-splade" in text
    picture = tmp_path / "why.png"
    if pytest.importorskip("wordcloud"):
        assert main(["explain", "a tall beast", "zoo", *place, "--png", str(picture)]) == 0
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("tiny_splade_folder")
def test_the_command_explains_a_text_alone(capsys, tmp_path):
    page = tmp_path / "text.html"
    assert main(["explain", "a tall giraffe", *MODEL, "--html", str(page), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["words"][0][0] == "giraffe"
    places = {place["word"]: place["fires"] for place in told["positions"]}
    assert places["giraffe"][0][0] == "giraffe"
    assert "which words fire on which word" in page.read_text("utf-8")
    assert main(["explain", "a tall giraffe", *MODEL]) == 0
    assert "giraffe\u00a0" in capsys.readouterr().out
    assert main(["explain", "", *MODEL]) == 1
    assert main(["explain", "tea", "zoo"]) == 2
    assert "pass --store" in capsys.readouterr().err


# In a browser


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("which", ["match", "image", "hostile"])
def test_reports_look_right_in_a_browser(
    browser, size, which, match, landscape, collection, tiny_splade, tmp_path
):
    shown = {
        "match": match,
        "image": [landscape],
        "hostile": match_of(collection, tiny_splade, HOSTILE, "<i>"),
    }[which]
    page = tmp_path / "report.html"
    save_html(page, shown, title="Why zoo matches")
    browser.resize(size)
    browser.open(page.as_uri())
    name = f"report_{which}_{'phone' if size == PHONE else 'desktop'}.png"
    keep(browser.screenshot(tmp_path / name))
    browser.assert_readable()
    assert [url for url in browser.requested if not url.startswith(("file:", "data:"))] == []
    assert browser.run(OVERLAPS) == 0
    marks = browser.run("document.querySelectorAll('mark').length")
    assert (marks > 0) == (which != "image")
    if which == "match":
        assert set(browser.run(RIGHT_EDGES)) == {1}
    assert browser.run("document.querySelectorAll('script').length") == 0
