"""Small copies of images as text, so that they fit into a payload beside a vector."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

from vdr_db.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["LARGEST_PX", "checked_thumbnail_px", "thumbnail_address"]

LARGEST_PX = 256
"""A larger copy has no place in a payload."""

QUALITY = 75
"""Of JPEG. At 64 pixels an image takes about 1.7 KB as text, at most 2.4 KB of 147 pictograms and
3 photographs; as PNG it takes three to seven times as much."""


def checked_thumbnail_px(value: int | None) -> int | None:
    """The value, if it can be the longest side of a thumbnail or None for no thumbnails.

    Raises:
        ConfigError: It is no integer in [8, 256].
    """
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (is_int and 8 <= value <= LARGEST_PX):
        raise ConfigError(
            f"`thumbnail_px` must be None or an integer in [8, {LARGEST_PX}], got {value!r}; 64 "
            "is enough to recognise an image."
        )
    return value


def thumbnail_address(image: Image, side: int) -> str:
    """A small copy of an image in mode RGB as a `data:` address of a JPEG.

    Its longest side becomes `side` pixels; a smaller image stays as large as it is.
    """
    small = image.copy()
    small.thumbnail((side, side))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
