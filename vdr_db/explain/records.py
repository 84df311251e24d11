"""The explanation of a stored document: a text, or an image with what can still be seen of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vdr_db.connectors.images import IMAGE, IMAGE_KEY, MODALITY_KEY, THUMBNAIL_KEY
from vdr_db.errors import InputError
from vdr_db.explain.explanation import Explanation
from vdr_db.explain.items import explain_image, explain_text
from vdr_db.explain.words import matched_words

if TYPE_CHECKING:
    from vdr_db.connectors.base import Record
    from vdr_db.encoders.image import ImageEncoder
    from vdr_db.encoders.text import SparseEncoder

__all__ = ["explain_record", "is_image", "thumbnail_of"]

# Nothing but the bytes of a small image: the address stands in pages that people open.
_THUMBNAIL = re.compile(r"data:image/(?:png|jpeg|webp|gif);base64,[A-Za-z0-9+/]{1,200000}={0,2}")


def is_image(payload: Mapping[str, Any]) -> bool:
    """Whether a document was added as an image."""
    return payload.get(MODALITY_KEY) == IMAGE


def thumbnail_of(payload: Mapping[str, Any]) -> str:
    """The small image in a payload as a `data:` address, or `""` where there is no usable one."""
    found = payload.get(THUMBNAIL_KEY)
    return found if isinstance(found, str) and _THUMBNAIL.fullmatch(found) else ""


def explain_record(
    encoder: SparseEncoder,
    record: Record,
    *,
    text_key: str = "text",
    follow: bool = True,
    images: ImageEncoder | None = None,
    open_files: bool = False,
) -> Explanation:
    """The explanation of a stored document.

    Arguments are those of `make_match`. Where the file of an image may not be opened, is gone, or
    holds another image by now, the small image of the payload is shown.

    Raises:
        InputError: The record came without its vector.
    """
    row = record.row
    if row is None:
        raise InputError(f"the record {record.id!r} must have its vector; get it with_rows=True.")
    if not is_image(record.payload):
        text = str(record.payload.get(text_key) or "")
        return explain_text(encoder, text, row=row, follow=follow and bool(text))
    path = record.payload.get(IMAGE_KEY)
    if open_files and images is not None and isinstance(path, str):
        with suppress(InputError):
            return explain_image(images, path, expected=row)
    return Explanation(
        "image",
        "",
        matched_words(encoder.vocabulary, [], row.to_dicts()[0]),
        row.nnz,
        encoder.vocabulary,
        thumbnail=thumbnail_of(record.payload),
    )
