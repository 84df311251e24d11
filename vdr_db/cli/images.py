"""Small pictures in a terminal: which way it can show them, and the bytes that do it.

What a terminal can do is read from the variables it sets for that, and nothing is asked of it: a
question would have to wait for an answer on standard input.

| way | taken when | source |
|---|---|---|
| `kitty` | `TERM` is xterm-kitty or xterm-ghostty, or `KITTY_WINDOW_ID` is set | kitty's graphics protocol |
| `iterm2` | `TERM_PROGRAM` is iTerm.app or WezTerm, or `LC_TERMINAL` is iTerm2 | iTerm2's inline images |
| `sixel` | `TERM` begins with foot or mlterm | DEC sixel graphics |
| `blocks` | `COLORTERM` is truecolor or 24bit | half blocks, two pixels in a cell |

In tmux and screen, which swallow the first three, only `blocks`. Nothing at all where stdout is no
terminal, `TERM` is dumb, or `NO_COLOR` is set (https://no-color.org).
"""  # noqa: E501

from __future__ import annotations

import argparse
import base64
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vdr_db.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Canvas",
    "Drawing",
    "add_thumbnail_option",
    "canvas_of",
    "draw",
    "image_payload",
    "picture_of",
    "show_picture",
    "terminal_canvas",
]

Way = Literal["kitty", "iterm2", "sixel", "blocks"]

SIDE_PX = 96
"""Longest side of a picture that is sent; it is shown smaller on most screens."""

KITTY_CHUNK = 4096
"""Most characters of base64 in one command of kitty's protocol."""

# Cells are about twice as high as wide, so twice as many columns as rows are a square.
CELLS: Mapping[Way, tuple[int, int]] = {
    "kitty": (12, 6),
    "iterm2": (12, 6),
    "sixel": (12, 6),
    "blocks": (16, 8),
}
CELL_PX = (8, 16)
"""Size of a cell where the terminal does not say it; sixels are measured in pixels."""

SIXEL_COLOURS = 64


@dataclass(frozen=True)
class Canvas:
    """Room for a picture in a terminal.

    Attributes:
        way: How pictures are shown.
        columns: Cells in a row.
        rows: Rows of cells.
        cell_px: Width and height of a cell in pixels.
    """

    way: Way
    columns: int
    rows: int
    cell_px: tuple[int, int] = CELL_PX


@dataclass(frozen=True)
class Drawing:
    """A picture as bytes for a terminal.

    Attributes:
        canvas: Where it fits in.
        lines: What to write into each of its rows: cells for `blocks`, else a step to the right.
        before: What to write where the first row begins, before its line.
    """

    canvas: Canvas
    lines: tuple[str, ...]
    before: str = ""


def add_thumbnail_option(parser: argparse.ArgumentParser) -> None:
    """`--no-thumbnails`."""
    parser.add_argument(
        "--no-thumbnails",
        action="store_true",
        help="no small pictures of images; they are shown where the terminal can (docs/seeing.md)",
    )


def terminal_canvas() -> Canvas | None:
    """Room for pictures on standard output, or None where it shows none."""
    if find_spec("PIL") is None:
        return None
    found = canvas_of(os.environ, is_terminal=sys.stdout.isatty())
    if found is None or found.way != "sixel":
        return found
    return Canvas(found.way, found.columns, found.rows, _cell_px(sys.stdout.fileno()))


def canvas_of(variables: Mapping[str, str], *, is_terminal: bool) -> Canvas | None:
    """Room for pictures in a terminal with these environment variables, or None.

    Args:
        variables: Of the environment.
        is_terminal: Whether the output goes to a terminal.
    """
    way = _way(variables) if is_terminal else None
    return None if way is None else Canvas(way, *CELLS[way])


def _way(variables: Mapping[str, str]) -> Way | None:
    term = variables.get("TERM", "")
    program = variables.get("TERM_PROGRAM", "")
    if variables.get("NO_COLOR") or term in ("", "dumb"):
        return None
    in_multiplexer = (
        "TMUX" in variables or "STY" in variables or term.startswith(("screen", "tmux"))
    )
    if not in_multiplexer:
        if term in ("xterm-kitty", "xterm-ghostty") or variables.get("KITTY_WINDOW_ID"):
            return "kitty"
        if program in ("iTerm.app", "WezTerm") or variables.get("LC_TERMINAL") == "iTerm2":
            return "iterm2"
        if term.startswith(("foot", "mlterm")):
            return "sixel"
    return "blocks" if variables.get("COLORTERM") in ("truecolor", "24bit") else None


def _cell_px(terminal: int) -> tuple[int, int]:
    """Pixels of a cell, as the terminal tells with its size, or the usual ones."""
    try:
        import fcntl
        import struct
        import termios

        told = fcntl.ioctl(terminal, termios.TIOCGWINSZ, bytes(8))
        rows, columns, width, height = struct.unpack("4H", told)
        cell = (width // columns, height // rows)
    except (ImportError, OSError, ZeroDivisionError):
        return CELL_PX
    return cell if min(cell) > 0 else CELL_PX


def picture_of(payload: Mapping[str, Any]) -> Image | None:
    """The small picture of a document, or None.

    Args:
        payload: The document's. Its thumbnail is taken, else the file it names, with the rights of
            whoever asks; a document that is no image has none.
    """
    from vdr_db.connectors.images import IMAGE_KEY
    from vdr_db.explain.records import is_image, thumbnail_of
    from vdr_db.images.reading import ImageLimits, read_picture

    small = thumbnail_of(payload)
    path = payload.get(IMAGE_KEY)
    sources: list[Any] = [base64.b64decode(small.partition(",")[2])] if small else []
    if is_image(payload) and isinstance(path, str):
        sources.append(path)
    for source in sources:
        try:
            picture = read_picture(source, ImageLimits()).image
        except InputError:
            continue  # a picture is a help; what was asked for does not fail for it
        picture.thumbnail((SIDE_PX, SIDE_PX))
        return picture
    return None


def image_payload(file: Path) -> dict[str, Any]:
    """What the payload of an image file would say, for pictures of files without a document."""
    from vdr_db.connectors.images import IMAGE, IMAGE_KEY, MODALITY_KEY

    return {MODALITY_KEY: IMAGE, IMAGE_KEY: str(file)}


def show_picture(payload: Mapping[str, Any]) -> None:
    """The picture of a document on standard output, where that can show it."""
    canvas = terminal_canvas()
    picture = None if canvas is None else picture_of(payload)
    if canvas is None or picture is None:
        return
    drawing = draw(canvas, picture)
    sys.stdout.write(drawing.before + "\n".join(drawing.lines) + "\n\n")


def draw(canvas: Canvas, picture: Image) -> Drawing:
    """A picture as bytes for a terminal.

    Args:
        canvas: Where.
        picture: In mode RGB.
    """
    if canvas.way == "blocks":
        return Drawing(canvas, tuple(_blocks(canvas, picture)))
    encode = _ENCODERS[canvas.way]
    # First lines are fed and taken back, so that the picture cannot scroll its own place away.
    room = "\n" * canvas.rows + f"\x1b[{canvas.rows}A"
    step = f"\x1b[{canvas.columns}C"
    return Drawing(canvas, (step,) * canvas.rows, f"{room}\x1b7{encode(canvas, picture)}\x1b8")


def _kitty(canvas: Canvas, picture: Image) -> str:
    """Transmits a PNG and shows it over the cells (a=T); C=1 keeps the cursor, q=2 silence."""
    data = base64.b64encode(_png(picture)).decode("ascii")
    chunks = [data[at : at + KITTY_CHUNK] for at in range(0, len(data), KITTY_CHUNK)]
    parts = []
    for i, chunk in enumerate(chunks):
        first = f"a=T,f=100,q=2,C=1,c={canvas.columns},r={canvas.rows}," if i == 0 else ""
        parts.append(f"\x1b_G{first}m={int(i + 1 < len(chunks))};{chunk}\x1b\\")
    return "".join(parts)


def _iterm2(canvas: Canvas, picture: Image) -> str:
    data = _png(picture)
    return (
        f"\x1b]1337;File=inline=1;size={len(data)};width={canvas.columns};height={canvas.rows};"
        f"preserveAspectRatio=1:{base64.b64encode(data).decode('ascii')}\x07"
    )


def _sixel(canvas: Canvas, picture: Image) -> str:
    """Bands of six rows; in a band each colour draws its pixels over the whole width."""
    import numpy as np
    from PIL import Image

    room = (canvas.columns * canvas.cell_px[0], canvas.rows * canvas.cell_px[1])
    scaled = _contained(picture, room)
    reduced = scaled.quantize(SIXEL_COLOURS, dither=Image.Dither.NONE)
    places = np.asarray(reduced)
    palette = reduced.getpalette() or []
    height, width = places.shape
    parts = [f'\x1bP0;1;0q"1;1;{width};{height}']
    for colour in np.unique(places).tolist():
        shares = [round(value * 100 / 255) for value in palette[3 * colour : 3 * colour + 3]]
        parts.append(f"#{colour};2;" + ";".join(map(str, shares)))
    bits = 1 << np.arange(6)
    for top in range(0, height, 6):
        band = places[top : top + 6]
        for colour in np.unique(band).tolist():
            sixels = ((band == colour) * bits[: len(band), None]).sum(axis=0)
            parts.append(f"#{colour}" + "".join(map(chr, (sixels + 63).tolist())) + "$")
        parts.append("-")
    return "".join(parts) + "\x1b\\"


_ENCODERS: Mapping[Way, Callable[[Canvas, Image], str]] = {
    "kitty": _kitty,
    "iterm2": _iterm2,
    "sixel": _sixel,
}


def _blocks(canvas: Canvas, picture: Image) -> Iterator[str]:
    """Upper half blocks: the letter's colour is the upper pixel, its ground the lower one."""
    size = (canvas.columns, 2 * canvas.rows)
    scaled = _contained(picture, size)
    left, top = ((whole - part) // 2 for whole, part in zip(size, scaled.size, strict=True))
    pixels = scaled.load()

    def colour(x: int, y: int, layer: int) -> str:
        inside = left <= x < left + scaled.width and top <= y < top + scaled.height
        if not inside:
            return ""
        red, green, blue = pixels[x - left, y - top]  # type: ignore[index, misc]
        return f"{layer};2;{red};{green};{blue}"

    for row in range(canvas.rows):
        cells = []
        for x in range(canvas.columns):
            upper, lower = colour(x, 2 * row, 38), colour(x, 2 * row + 1, 48)
            if upper:
                cells.append(f"\x1b[0;{upper}{';' if lower else ''}{lower}m▀")
            elif lower:
                cells.append(f"\x1b[0;3{lower[1:]}m▄")
            else:
                cells.append("\x1b[0m ")
        yield "".join(cells) + "\x1b[0m"


def _contained(picture: Image, room: tuple[int, int]) -> Image:
    """The picture scaled to fit into a box, its proportions kept."""
    scale = min(room[0] / picture.width, room[1] / picture.height)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    return picture.resize((size[0], size[1]))


def _png(picture: Image) -> bytes:
    """The picture in the middle of a clear square, which fills a canvas without being stretched."""
    from PIL import Image

    side = max(picture.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    file = io.BytesIO()
    square.save(file, "PNG")
    return file.getvalue()
