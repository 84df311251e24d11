"""Whether what a caller passes are texts at all, before any of them is tokenized."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from vdr_db.errors import InputError
from vdr_db.images.files import has_image_suffix
from vdr_db.warning import warn_caller

__all__ = ["checked_texts"]


def checked_texts(texts: Iterable[str]) -> list[str]:
    """The texts as a list.

    Raises:
        TypeError: One text came instead of a sequence of texts, or nothing that can be walked.
        InputError: An item is not a text, or holds half of a surrogate pair.
    """
    if isinstance(texts, (str, bytes)):
        raise TypeError(
            f"`texts` must be a list of texts, got one {type(texts).__name__}; pass [text]"
        )
    if isinstance(texts, Mapping) or not isinstance(texts, Iterable):
        raise TypeError(f"`texts` must be a list of texts, got {type(texts).__name__}")
    checked = list(texts)
    for i, text in enumerate(checked):
        if not isinstance(text, str):
            raise InputError(
                f"every text must be a str, got {type(text).__name__} at index {i}; "
                "leave missing texts out or pass an empty one, and give images to an image encoder."
            )
        if has_image_suffix(text) and (_is_address(text) or _is_file(text)):
            what = "address" if _is_address(text) else "path"
            warn_caller(
                f"text {i} is the {what} of an image ({text!r}); a text encoder reads the name, "
                "not the image: use ImageEncoder or CrossModalEncoder.encode_images for that, and "
                "`search_by_image` of a collection, with the file."
            )
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f"text {i} holds a lone surrogate (U+{ord(text[error.start]):04X} at character "
                    f"{error.start}), which is half a character and no text; decode its source "
                    "as UTF-8 or drop the half with text.encode('utf-8', 'ignore').decode()."
                ) from error
    return checked


def _is_address(text: str) -> bool:
    return text.startswith(("http://", "https://", "file://")) and not any(map(str.isspace, text))


def _is_file(name: str) -> bool:
    try:
        return os.path.isfile(name)
    except ValueError:  # a zero byte is no part of any name
        return False
