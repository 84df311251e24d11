"""Small copies of images in a terminal of true colours: half blocks, two pixels in a cell.

Nothing is shown where stdout is no terminal, does not say `COLORTERM=truecolor`, is dumb, or where
`NO_COLOR` is set (https://no-color.org).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdr_db.cli.show import console
from vdr_db.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.text import Text

__all__ = ["can_show_images", "half_blocks", "image_payload", "show_image", "small_image"]

COLUMNS, ROWS = 16, 8
"""Cells of an image. They are about twice as high as wide, so that this is a square."""


def can_show_images() -> bool:
    """Whether standard output shows images."""
    out = console()
    return out.color_system == "truecolor" and not out.no_color and find_spec("PIL") is not None


def small_image(payload: Mapping[str, Any]) -> Image | None:
    """The small image of a document, or None: its thumbnail, else the file its payload names.

    The file is read with the rights of whoever asks; a document that is no image has none.
    """
    from vdr_db.connectors.images import IMAGE_KEY
    from vdr_db.explain.records import is_image, thumbnail_of
    from vdr_db.images.reading import read_image

    small = thumbnail_of(payload)
    path = payload.get(IMAGE_KEY)
    sources: list[bytes | str] = [base64.b64decode(small.partition(",")[2])] if small else []
    if is_image(payload) and isinstance(path, str):
        sources.append(path)
    for source in sources:
        try:
            return read_image(source).image
        except InputError:
            continue  # an image is a help; what was asked for does not fail for it
    return None


def half_blocks(image: Image, columns: int = COLUMNS, rows: int = ROWS) -> Text:
    """An image as lines of upper half blocks: colour of the upper pixel on that of the lower one.

    It is scaled to fit `columns` cells of `rows` lines, its proportions kept.
    """
    from PIL import ImageOps
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    padded = ImageOps.pad(image.convert("RGBA"), (columns, 2 * rows), color=(0, 0, 0, 0))

    def colour(x: int, y: int) -> Color | None:
        red, green, blue, alpha = padded.getpixel((x, y))  # type: ignore[misc]
        return Color.from_rgb(red, green, blue) if alpha else None

    lines = []
    for y in range(0, 2 * rows, 2):
        line = Text()
        for x in range(columns):
            upper, lower = colour(x, y), colour(x, y + 1)
            if upper:
                line.append("▀", Style(color=upper, bgcolor=lower))
            else:
                line.append("▄" if lower else " ", Style(color=lower))
        lines.append(line)
    return Text("\n").join(lines)


def image_payload(file: Path) -> dict[str, Any]:
    """What the payload of an image file would say, for files without a document."""
    from vdr_db.connectors.images import IMAGE, IMAGE_KEY, MODALITY_KEY

    return {MODALITY_KEY: IMAGE, IMAGE_KEY: str(file)}


def show_image(payload: Mapping[str, Any]) -> None:
    """The image of a document on standard output, where that can show it."""
    image = small_image(payload) if can_show_images() else None
    if image is not None:
        console().print(half_blocks(image), end="\n\n")
