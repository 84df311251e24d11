"""Small pictures: kept in payloads, and shown by terminals, decoded back to their pixels."""

from __future__ import annotations

import base64
import io
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from terminal import Screen, terminal

from vdr_db.cli.images import Canvas, canvas_of, draw, picture_of
from vdr_db.cli.main import main
from vdr_db.errors import ConfigError

pytest.importorskip("torch")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("rich")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="terminals of POSIX")

COLOURS = np.array([[(220, 30, 40), (30, 160, 60)], [(40, 70, 210), (240, 200, 20)]], np.uint8)
"""Of the four quarters of a picture."""

TRUE_COLOUR = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
WAYS = {
    "kitty": {"TERM": "xterm-kitty", "COLORTERM": "truecolor", "KITTY_WINDOW_ID": "1"},
    "iterm2": {**TRUE_COLOUR, "TERM_PROGRAM": "iTerm.app"},
    "sixel": {"TERM": "foot", "COLORTERM": "truecolor"},
    "blocks": TRUE_COLOUR,
}


def quarters(width: int, height: int) -> np.ndarray:
    return COLOURS.repeat(height // 2, axis=0).repeat(width // 2, axis=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from image_folders import write_cross_modal

    return write_cross_modal(tmp_path_factory.mktemp("thumbnails") / "model", topk=60)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    Image.fromarray(quarters(64, 48)).save(folder / "wide.png")
    Image.fromarray(quarters(30, 60)).save(folder / "high.png")
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory, model, pictures):
    """Two images whose files are there, two whose files are gone, and a text."""
    from vdr_db import CrossModalEncoder
    from vdr_db.connectors import VDRQdrant

    folder = tmp_path_factory.mktemp("store") / "store"
    encoder = CrossModalEncoder.from_pretrained(model, device="cpu")
    encoder.model = encoder.text.model = encoder.image.model = str(model)
    gone = folder.parent / "gone"
    gone.mkdir()
    for name in ("wide.png", "high.png"):
        (gone / name).write_bytes((pictures / name).read_bytes())
    with VDRQdrant("texts", encoder, path=folder) as made:
        made.add_texts(["the green sea and the sun"], ids=["text"])
        made.add_images(pictures)
        ids = ["wide, kept small", "high, kept small"]
        files = [gone / "wide.png", gone / "high.png"]
        made.add_images(files, ids, thumbnail_px=48)
    for file in files:
        file.unlink()
    return folder


def search(monkeypatch, store, pictures, *more: str, **variables: str) -> Screen:
    command = ["search", "--image", str(pictures / "wide.png"), "--store", str(store)]
    with terminal(monkeypatch, **variables) as written:
        assert main([*command, "--device", "cpu", *more]) == 0
    return Screen.of(bytes(written))


# In payloads


def test_a_thumbnail_is_a_small_jpeg_in_the_payload(store, model):
    from vdr_db import CrossModalEncoder
    from vdr_db.connectors import VDRQdrant

    encoder = CrossModalEncoder.from_pretrained(model, device="cpu")
    encoder.model = encoder.text.model = encoder.image.model = str(model)
    with VDRQdrant("texts", encoder, path=store) as opened:
        records = opened.get(["wide, kept small", "high, kept small", "wide.png", "text"])
    small = {record.id: record.payload.get("thumbnail", "") for record in records}
    assert small["wide.png"] == small["text"] == "", "none unless it is asked for"
    for id, size in (("wide, kept small", (48, 36)), ("high, kept small", (24, 48))):
        head, _, data = small[id].partition(",")
        assert head == "data:image/jpeg;base64"
        assert len(small[id]) < 2500
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert (image.format, image.size) == ("JPEG", size)
            shown = np.asarray(image.convert("RGB"))
        assert_quarters(shown, tolerance=12)


def test_thumbnails_of_photographs_are_as_small_as_the_help_says():
    from image_folders import pixels

    from vdr_db.images.thumbnails import thumbnail_address

    for seed in range(8):
        photograph = Image.fromarray(pixels(640, 480, seed=seed))
        assert len(thumbnail_address(photograph, 64)) < 3000


def test_impossible_thumbnails_are_refused(model, pictures):
    from vdr_db import CrossModalEncoder
    from vdr_db.connectors import Collection, MemoryStore

    encoder = CrossModalEncoder.from_pretrained(model, device="cpu")
    for value in (0, 7, 257, True, 64.0):
        with pytest.raises(ConfigError, match="`thumbnail_px` must be None or an integer in"):
            encoder.encode_images(pictures, thumbnail_px=value)
    result = encoder.encode_images([pictures / "wide.png", b"broken"], thumbnail_px=16)
    assert result.thumbnails[0].startswith("data:image/jpeg")
    assert result.thumbnails[1] == ""
    assert encoder.encode_images(pictures).thumbnails == ()
    with Collection(MemoryStore(), encoder) as own:
        own.add_images(pictures, payloads=[{"thumbnail": "mine"}, None], thumbnail_px=16)
        first, second = own.get(["high.png", "wide.png"])
        assert first.payload["thumbnail"] == "mine"
        assert second.payload["thumbnail"].startswith("data:image/jpeg")


def test_only_images_and_small_pictures_are_opened(tmp_path, pictures):
    file = str(pictures / "wide.png")
    assert picture_of({"modality": "image", "image": file}).size == (64, 48)
    assert picture_of({"image": file}) is None, "a text with a field of that name"
    assert picture_of({"modality": "image", "image": str(tmp_path / "none.png")}) is None
    assert picture_of({"modality": "image", "image": b"x"}) is None
    assert picture_of({"thumbnail": "data:image/png;base64,AAAA"}) is None
    assert picture_of({"thumbnail": "/etc/passwd"}) is None
    assert picture_of({}) is None


# In terminals


def assert_quarters(shown: np.ndarray, *, tolerance: int) -> None:
    """The four quarters of a picture have their colours, away from where they meet."""
    height, width = shown.shape[:2]
    for row in (0, 1):
        for column in (0, 1):
            part = shown[
                (2 * row + 1) * height // 4 - height // 10 : (2 * row + 1) * height // 4 + 1,
                (2 * column + 1) * width // 4 - width // 10 : (2 * column + 1) * width // 4 + 1,
                :3,
            ]
            difference = np.abs(part.astype(int) - COLOURS[row, column].astype(int))
            assert difference.size
            assert difference.max() <= tolerance, (row, column, part[0, 0])


@pytest.mark.parametrize("way", ["kitty", "iterm2"])
def test_pictures_arrive_pixel_for_pixel(monkeypatch, store, pictures, way):
    screen = search(monkeypatch, store, pictures, **WAYS[way])
    assert [shown.way for shown in screen.pictures] == [way] * 4
    lines = screen.text()
    rows_of = {
        name: next(i for i, line in enumerate(lines) if f" {name}" in line)
        for name in ("wide.png", "high.png", "wide, kept small", "high, kept small")
    }
    by_row = {shown.row: shown for shown in screen.pictures}
    assert sorted(by_row) == sorted(rows_of.values()), "each beside the text of its hit"
    for name, size in (("wide.png", (64, 48)), ("high.png", (30, 60))):
        shown = by_row[rows_of[name]]
        width, height = size
        side = max(size)
        assert shown.pixels.shape == (side, side, 4), "a square is not stretched"
        left, top = (side - width) // 2, (side - height) // 2
        inside = shown.pixels[top : top + height, left : left + width]
        assert (inside[..., :3] == quarters(width, height)).all()
        assert (inside[..., 3] == 255).all()
        assert (shown.pixels[..., 3] > 0).sum() == width * height, "clear around it"
    for name in ("wide", "high"):
        shown = by_row[rows_of[f"{name}, kept small"]]
        filled = shown.pixels[(shown.pixels[..., 3] > 0).any(axis=1)]
        filled = filled[:, (filled[..., 3] > 0).any(axis=0)]
        assert max(filled.shape) == 48
        assert_quarters(filled, tolerance=12)
    # Nothing is written over a picture, and pictures are not over each other.
    columns, rows = screen.pictures[0].size
    for shown in screen.pictures:
        assert (shown.column, shown.size) == (0, (columns, rows))
        covered = {(shown.row + r, c) for r in range(rows) for c in range(columns)}
        assert not covered & set(screen.cells)
    starts = sorted(by_row)
    assert all(after - before >= rows for before, after in itertools.pairwise(starts))
    assert max(map(len, lines)) <= 110


def test_sixels_arrive(monkeypatch, store, pictures):
    screen = search(monkeypatch, store, pictures, **WAYS["sixel"])
    assert [shown.way for shown in screen.pictures] == ["sixel"] * 4
    sizes = sorted(shown.pixels.shape[:2] for shown in screen.pictures)
    assert sizes == [(72, 96), (72, 96), (96, 48), (96, 48)], "8 by 16 pixels in a cell"
    for shown in screen.pictures:
        assert_quarters(shown.pixels, tolerance=14)


def test_half_blocks_are_the_picture(monkeypatch, store, pictures):
    screen = search(monkeypatch, store, pictures, **WAYS["blocks"])
    assert not screen.pictures
    lines = screen.text()
    for name, size in (("wide.png", (16, 12)), ("high.png", (8, 16))):
        row = next(i for i, line in enumerate(lines) if f" {name}" in line)
        pixels = screen.blocks(row, 16, 8)
        filled = pixels[(pixels[..., 3] > 0).any(axis=1)]
        filled = filled[:, (filled[..., 3] > 0).any(axis=0)]
        assert filled.shape == (size[1], size[0], 4)
        assert (filled[..., 3] == 255).all()
        assert_quarters(filled, tolerance=4)  # bicubic scaling overshoots at edges
    assert sum("▀" in line for line in lines) >= 4 * 6
    assert any("words that matched" in line for line in lines)


def test_an_odd_height_ends_in_half_a_cell():
    drawing = draw(Canvas("blocks", 4, 2), Image.new("RGB", (4, 3), (1, 2, 3)))
    screen = Screen.of("\r\n".join(drawing.lines).encode())
    pixels = screen.blocks(0, 4, 2)
    assert (pixels[..., 3] > 0).sum() == 12
    assert {tuple(pixel) for pixel in pixels[pixels[..., 3] > 0]} == {(1, 2, 3, 255)}
    low = draw(Canvas("blocks", 4, 3), Image.new("RGB", (4, 1), (9, 8, 7)))
    pixels = Screen.of("\r\n".join(low.lines).encode()).blocks(0, 4, 3)
    assert (pixels[..., 3] > 0).any(axis=1).sum() == 1


@pytest.mark.parametrize(
    ("more", "variables"),
    [
        ((), {**WAYS["kitty"], "NO_COLOR": "1"}),
        (("--no-thumbnails",), WAYS["kitty"]),
        (("--no-thumbnails",), WAYS["blocks"]),
        ((), {"TERM": "dumb", "COLORTERM": "truecolor"}),
        ((), {"TERM": "xterm-256color"}),
        (("--json",), WAYS["kitty"]),
    ],
)
def test_nothing_is_shown_where_it_is_not_wanted(monkeypatch, store, pictures, more, variables):
    screen = search(monkeypatch, store, pictures, *more, **variables)
    assert not screen.pictures
    assert not {"▀", "▄"} & {letter for letter, _, _ in screen.cells.values()}
    assert any("wide.png" in line for line in screen.text())


def test_a_narrow_terminal_keeps_its_room_for_words(monkeypatch, store, pictures):
    screen = search(monkeypatch, store, pictures, **WAYS["kitty"])
    assert screen.pictures
    command = ["search", "--image", str(pictures / "wide.png"), "--store", str(store)]
    with terminal(monkeypatch, columns=70, **WAYS["kitty"]) as written:
        assert main([*command, "--device", "cpu"]) == 0
    screen = Screen.of(bytes(written))
    assert not screen.pictures
    assert max(map(len, screen.text())) <= 70


def test_no_escape_reaches_a_pipe(store, pictures):
    command = [sys.executable, "-m", "vdr_db.cli", "search", "--image", "wide.png"]
    done = subprocess.run(
        [*command, "--store", str(store), "--device", "cpu"],
        capture_output=True,
        cwd=pictures,
        env={**os.environ, **WAYS["kitty"]},
        check=True,
    )
    assert b"\x1b" not in done.stdout
    assert b"wide.png" in done.stdout


def test_explain_shows_the_image(monkeypatch, store, model, pictures):
    file = str(pictures / "wide.png")
    with terminal(monkeypatch, **WAYS["kitty"]) as written:
        assert main(["explain", "--image", file, "--model", str(model), "--device", "cpu"]) == 0
        place = ["--store", str(store), "--device", "cpu"]
        assert main(["explain", "--image", file, "high.png", *place]) == 0
        assert main(["explain", "--image", file, "high.png", *place, "--no-thumbnails"]) == 0
    screen = Screen.of(bytes(written))
    heights = [int((shown.pixels[..., 3] > 0).any(axis=1).sum()) for shown in screen.pictures]
    assert heights == [48, 48, 60], "the image; then query and hit"
    for shown in screen.pictures:
        assert not {(shown.row + r, c) for r in range(6) for c in range(12)} & set(screen.cells)


@pytest.mark.parametrize(
    ("variables", "way"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "3"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "foot-extra"}, "sixel"),
        ({"TERM": "mlterm"}, "sixel"),
        ({"TERM": "xterm-256color", "COLORTERM": "24bit"}, "blocks"),
        ({"TERM": "tmux-256color", "TMUX": "x", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "screen", "LC_TERMINAL": "iTerm2", "COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "xterm-kitty", "NO_COLOR": ""}, "kitty"),
        ({"TERM": "xterm-kitty", "NO_COLOR": "0"}, None),
        ({"TERM": "dumb", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "vt100"}, None),
        ({}, None),
    ],
)
def test_what_a_terminal_can_do_is_read_from_its_variables(variables, way):
    found = canvas_of(variables, is_terminal=True)
    assert (found.way if found else None) == way
    assert canvas_of(variables, is_terminal=False) is None


def test_the_command_keeps_thumbnails_when_asked(tmp_path, model, pictures, capsys):
    from vdr_db.connectors import VDRQdrant

    index = ["index", "--images", str(pictures), "--model", str(model), "--device", "cpu"]
    for name, more in (("with", ["--thumbnails"]), ("without", [])):
        place = str(tmp_path / name)
        assert main([*index, "--store", place, *more]) == 0
        with VDRQdrant("texts", path=Path(place)) as opened:
            (record,) = opened.get(["wide.png"])
        assert ("thumbnail" in record.payload) == (name == "with")
    texts = tmp_path / "texts.txt"
    texts.write_text("a text\n")
    assert main(["index", str(texts), "--store", str(tmp_path / "t"), "--thumbnails"]) == 2
    assert "a text has no picture" in capsys.readouterr().err
