"""Small copies of images: in payloads, and in terminals, decoded back to their pixels."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from terminal import Screen, terminal

from vdr_db.cli.images import can_show_images, half_blocks, small_image
from vdr_db.cli.main import main
from vdr_db.errors import ConfigError

pytest.importorskip("torch")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("rich")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="terminals of POSIX")

COLOURS = np.array([[(220, 30, 40), (30, 160, 60)], [(40, 70, 210), (240, 200, 20)]], np.uint8)
"""Of the four quarters of a picture."""

HALVES = {"▀", "▄"}
TRUE_COLOUR = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}


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


def test_only_images_and_thumbnails_are_opened(tmp_path, pictures):
    file = str(pictures / "wide.png")
    assert small_image({"modality": "image", "image": file}).size == (64, 48)
    assert small_image({"image": file}) is None, "a text with a field of that name"
    assert small_image({"modality": "image", "image": str(tmp_path / "none.png")}) is None
    assert small_image({"modality": "image", "image": b"x"}) is None
    assert small_image({"thumbnail": "data:image/png;base64,AAAA"}) is None
    assert small_image({"thumbnail": "/etc/passwd"}) is None
    assert small_image({}) is None


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


def test_half_blocks_are_the_image(monkeypatch, store, pictures):
    screen = search(monkeypatch, store, pictures, **TRUE_COLOUR)
    lines = screen.text()
    sizes = {"wide.png": (16, 12), "high.png": (8, 16)}
    sizes |= {"wide, kept small": (16, 12), "high, kept small": (8, 16)}
    for name, size in sizes.items():
        row = next(i for i, line in enumerate(lines) if f" {name}" in line)
        pixels = screen.blocks(row, 16, 8)
        filled = pixels[(pixels[..., 3] > 0).any(axis=1)]
        filled = filled[:, (filled[..., 3] > 0).any(axis=0)]
        assert filled.shape == (size[1], size[0], 4)
        assert (filled[..., 3] == 255).all()
        # Bicubic scaling overshoots at edges, JPEG is not exact.
        assert_quarters(filled, tolerance=14 if "kept" in name else 4)
    assert sum("▀" in line for line in lines) >= 4 * 6
    assert any("words that matched" in line for line in lines)
    assert max(map(len, lines)) <= 110


def blocks_of(image, columns: int, rows: int) -> np.ndarray:
    from rich.console import Console

    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(half_blocks(image, columns, rows))
    return Screen.of(console.file.getvalue().replace("\n", "\r\n").encode()).blocks(
        0, columns, rows
    )


def test_an_odd_height_ends_in_half_a_cell():
    pixels = blocks_of(Image.new("RGB", (4, 3), (1, 2, 3)), 4, 2)
    assert (pixels[..., 3] > 0).sum() == 12
    assert {tuple(pixel) for pixel in pixels[pixels[..., 3] > 0]} == {(1, 2, 3, 255)}
    pixels = blocks_of(Image.new("RGB", (4, 1), (9, 8, 7)), 4, 3)
    assert (pixels[..., 3] > 0).any(axis=1).sum() == 1


@pytest.mark.parametrize(
    ("more", "variables"),
    [
        ((), {**TRUE_COLOUR, "NO_COLOR": "1"}),
        (("--no-thumbnails",), TRUE_COLOUR),
        ((), {"TERM": "dumb", "COLORTERM": "truecolor"}),
        ((), {"TERM": "xterm-256color"}),
        (("--json",), TRUE_COLOUR),
    ],
)
def test_nothing_is_shown_where_it_is_not_wanted(monkeypatch, store, pictures, more, variables):
    screen = search(monkeypatch, store, pictures, *more, **variables)
    assert not HALVES & screen.letters()
    assert any("wide.png" in line for line in screen.text())


def test_a_narrow_terminal_keeps_its_room_for_words(monkeypatch, store, pictures):
    screen = search(monkeypatch, store, pictures, **TRUE_COLOUR)
    assert HALVES & screen.letters()
    command = ["search", "--image", str(pictures / "wide.png"), "--store", str(store)]
    with terminal(monkeypatch, columns=70, **TRUE_COLOUR) as written:
        assert main([*command, "--device", "cpu"]) == 0
    screen = Screen.of(bytes(written))
    assert not HALVES & screen.letters()
    assert max(map(len, screen.text())) <= 70


def test_no_escape_reaches_a_pipe(store, pictures):
    command = [sys.executable, "-m", "vdr_db.cli", "search", "--image", "wide.png"]
    done = subprocess.run(
        [*command, "--store", str(store), "--device", "cpu"],
        capture_output=True,
        cwd=pictures,
        env={**os.environ, **TRUE_COLOUR},
        check=True,
    )
    assert b"\x1b" not in done.stdout
    assert b"wide.png" in done.stdout


def test_explain_shows_the_image(monkeypatch, store, model, pictures):
    file = str(pictures / "wide.png")
    with terminal(monkeypatch, **TRUE_COLOUR) as written:
        assert main(["explain", "--image", file, "--model", str(model), "--device", "cpu"]) == 0
        place = ["--store", str(store), "--device", "cpu"]
        assert main(["explain", "--image", file, "high.png", *place]) == 0
        assert main(["explain", "--image", file, "high.png", *place, "--no-thumbnails"]) == 0
    screen = Screen.of(bytes(written))
    rows = [i for i, line in enumerate(screen.text()) if HALVES & set(line)]
    starts = [row for row in rows if row - 1 not in rows]
    heights = []
    for row in starts:
        pixels = screen.blocks(row, 16, 8)
        heights.append(int((pixels[..., 3] > 0).any(axis=1).sum()))
    assert heights == [12, 12, 16], "the image; then query and hit"


@pytest.mark.parametrize(
    ("variables", "can"),
    [
        (TRUE_COLOUR, True),
        ({"TERM": "xterm-256color", "COLORTERM": "24bit"}, True),
        ({"TERM": "screen", "COLORTERM": "truecolor"}, True),
        ({"TERM": "xterm-kitty", "COLORTERM": "truecolor", "NO_COLOR": ""}, True),
        ({**TRUE_COLOUR, "NO_COLOR": "0"}, False),
        ({"TERM": "dumb", "COLORTERM": "truecolor"}, False),
        ({"TERM": "xterm-kitty"}, False),
        ({"TERM": "vt100"}, False),
        ({}, False),
    ],
)
def test_what_a_terminal_can_do_is_read_from_its_variables(monkeypatch, variables, can):
    with terminal(monkeypatch, **variables):
        assert can_show_images() == can
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert not can_show_images()


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
    assert "a text has no image" in capsys.readouterr().err
