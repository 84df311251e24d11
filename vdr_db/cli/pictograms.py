"""Four pictograms for `vdr-db demo`, drawn here: a note, a heart, a sun and a house."""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw

__all__ = ["write_pictograms"]

SIDE = 160


def note(draw: ImageDraw.ImageDraw) -> None:
    """A note."""
    for x in (34, 100):
        draw.ellipse((x - 22, 104, x + 16, 136), fill="black")
        draw.rectangle((x + 8, 34, x + 16, 120), fill="black")
    draw.polygon([(42, 34), (116, 18), (116, 40), (42, 56)], fill="black")


def heart(draw: ImageDraw.ImageDraw) -> None:
    """A heart."""
    draw.ellipse((16, 24, 84, 92), fill="#dd2e44")
    draw.ellipse((76, 24, 144, 92), fill="#dd2e44")
    draw.polygon([(23, 78), (137, 78), (80, 146)], fill="#dd2e44")


def sun(draw: ImageDraw.ImageDraw) -> None:
    """A sun."""
    for i in range(12):
        turn = math.pi * i / 6
        end = (80 + 74 * math.cos(turn), 80 + 74 * math.sin(turn))
        draw.line([(80, 80), end], fill="#ffac33", width=8)
    draw.ellipse((36, 36, 124, 124), fill="#ffcc4d", outline="#ffac33", width=4)


def house(draw: ImageDraw.ImageDraw) -> None:
    """A house."""
    draw.rectangle((34, 74, 126, 146), fill="#ffe8b6", outline="#662113", width=3)
    draw.polygon([(14, 80), (80, 16), (146, 80)], fill="#a0041e")
    draw.rectangle((68, 100, 94, 146), fill="#662113")
    draw.rectangle((42, 90, 62, 110), fill="#55acee")


def write_pictograms(folder: Path) -> Path:
    """Writes them as PNG files into a folder, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    for drawing in (note, heart, sun, house):
        image = Image.new("RGB", (SIDE, SIDE), "white")
        drawing(ImageDraw.Draw(image))
        image.save(folder / f"{drawing.__name__}.png")
    return folder
