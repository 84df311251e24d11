"""The explanation of a stored document: a text, or an image with what can still be seen of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vdr_db.connectors.images import IMAGE, IMAGE_KEY, MODALITY_KEY, THUMBNAIL_KEY
from vdr_db.errors import InputError
from vdr_db.explain.explanation import Explanation
from vdr_db.explain.items import explain_image, explain_text
from vdr_db.explain.words import vector_words

if TYPE_CHECKING:
    from vdr_db.connectors.base import Record
    from vdr_db.encoders.image import ImageEncoder
    from vdr_db.encoders.text import SparseEncoder
    from vdr_db.sparse import SparseRows

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

    Args:
        encoder: The collection's, of texts.
        record: The document with its vector.
        text_key: Payload field of the text.
        follow: Whether to follow weights back to tokens or patches, which runs the model.
        images: The collection's image encoder, to follow the weights of an image.
        open_files: Whether the file that the payload of an image names may be opened. Where it
            may not, is gone, or holds another image by now, the small image of the payload is
            shown.

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
        seen = _seen_again(images, path, row)
        if seen is not None:
            return seen
    return Explanation(
        "image",
        "",
        vector_words(encoder.vocabulary, [], row.to_dicts()[0]),
        row.nnz,
        encoder.vocabulary,
        thumbnail=thumbnail_of(record.payload),
    )


def _seen_again(images: ImageEncoder, path: str, row: SparseRows) -> Explanation | None:
    """The explanation out of the file, or None where that is not the stored image any more."""
    try:
        return explain_image(images, path, expected=row)
    except InputError:
        return None
