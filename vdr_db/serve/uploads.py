"""Uploaded images as queries, through an image encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vdr_db.errors import ConfigError, InputError
from vdr_db.sparse import SparseRows

if TYPE_CHECKING:
    from vdr_db.encoders.image import ImageEncoder
    from vdr_db.encoders.text import SparseEncoder

__all__ = ["ImageUploads"]

MAX_PIXELS = 50_000_000
"""Of an uploaded image; a small file can hold a very large one."""


class ImageUploads:
    """An image encoder beside the text encoder of a collection.

    Raises:
        ConfigError: They have different vocabularies, so images and texts share no dimension.
    """

    def __init__(self, images: ImageEncoder, texts: SparseEncoder) -> None:
        if images.vocabulary.fingerprint != texts.vocabulary.fingerprint:
            raise ConfigError(
                f"the image encoder must have the tokens of the collection's model, got "
                f"{images.vocabulary.size} against {texts.vocabulary.size} ids or other texts; "
                "take an image encoder that was trained with this text encoder."
            )
        self.images = images

    def encode_images(self, images: Sequence[bytes]) -> SparseRows:
        """One row for each image.

        Raises:
            InputError: A file is no image that can be read.
        """
        encoded = self.images.encode_images(list(images), max_pixels=MAX_PIXELS)
        if encoded.refused:
            place, reason = next(iter(encoded.refused.items()))
            raise InputError(f"image {place} cannot be read: {reason}.")
        return encoded.rows
