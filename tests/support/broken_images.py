"""Files that look like pictures and are none, in every way such files are broken."""

from __future__ import annotations

import io
import zlib

import pytest
from image_folders import pixels
from tiny_png import chunk, png_of

pytest.importorskip("PIL.Image")
from PIL import Image

PICTURE = pixels(40, 30)
"""A good one."""


def encoded(image, form, **options):
    """The file a picture becomes; skips the test where this Pillow does not write it."""
    Image.init()
    if form not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {form}")
    target = io.BytesIO()
    image.save(target, form, **options)
    return target.getvalue()


def png(width, height, content=b""):
    return png_of(width, height, 8, 2, zlib.compress(content))


def broken_contents():
    """Name → bytes that are no good picture."""
    good = {form: encoded(Image.fromarray(PICTURE), form) for form in ("PNG", "JPEG", "GIF")}
    good |= {form: encoded(Image.fromarray(PICTURE), form) for form in ("WEBP", "TIFF", "BMP")}
    middle = len(good["PNG"]) // 2
    flipped = bytearray(good["PNG"])
    flipped[middle] ^= 0xFF
    many_words = good["PNG"][:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 27)))
    return {
        "empty.png": b"",
        "zeros.png": bytes(1000),
        "text.jpg": b"I am a text file with the wrong name.\n" * 10,
        "page.html.png": b"<!doctype html><html><body>404</body></html>",
        "drawing.png": b'<svg xmlns="http://www.w3.org/2000/svg"></svg>',
        "only_magic.png": good["PNG"][:8],
        "only_header.png": good["PNG"][:33],
        "cut.png": good["PNG"][:middle],
        "flipped.png": bytes(flipped),
        "no_pixels.png": png(64, 64),
        "zero_wide.png": png(0, 64),
        "bomb.png": png(60_000, 60_000),
        "bigger_bomb.png": png(2**31 - 1, 2**31 - 1),
        "wide_bomb.png": png(2**30, 1),
        "long_text.png": many_words + good["PNG"][33:],
        "cut.jpg": good["JPEG"][: len(good["JPEG"]) // 2],
        "only_magic.jpg": good["JPEG"][:3],
        "cut.gif": good["GIF"][:40],
        "cut.webp": good["WEBP"][: len(good["WEBP"]) // 2],
        "cut.tiff": good["TIFF"][:200],
        "cut.bmp": good["BMP"][:60],
        "page.eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "archive.png": b"PK\x03\x04" + bytes(100),
    }
