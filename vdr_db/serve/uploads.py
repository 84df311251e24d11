"""Uploaded images as queries, through an image encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vdr_db.budget import BUDGET, Budget
from vdr_db.errors import ConfigError, InputError
from vdr_db.sparse import SparseRows

if TYPE_CHECKING:
    from vdr_db.encoders.image import ImageEncoder
    from vdr_db.encoders.text import SparseEncoder

__all__ = ["ImageUploads", "UnreadableUpload"]


class UnreadableUpload(InputError):
    """An uploaded image cannot be read; what is said may be told to whoever sent it."""


class ImageUploads:
    """An image encoder beside the text encoder of a collection.

    Raises:
        ConfigError: They have different vocabularies, so images and texts share no dimension.
    """

    def __init__(
        self, images: ImageEncoder, texts: SparseEncoder, *, budget: Budget = BUDGET
    ) -> None:
        if images.vocabulary.fingerprint != texts.vocabulary.fingerprint:
            raise ConfigError(
                f"the image encoder must have the tokens of the collection's model, got "
                f"{images.vocabulary.size} against {texts.vocabulary.size} ids or other texts; "
                "take an image encoder that was trained with this text encoder."
            )
        self.images = images
        self.max_pixels = budget.upload_pixels

    def encode_images(self, images: Sequence[bytes]) -> SparseRows:
        """One row for each image.

        Raises:
            UnreadableUpload: A file is no image that can be read.
        """
        # One after the other: how many are decoded at once is for the service to say.
        encoded = self.images.encode_images(list(images), max_pixels=self.max_pixels, threads=1)
        if encoded.refused:
            place, reason = next(iter(encoded.refused.items()))
            raise UnreadableUpload(f"image {place} cannot be read: {reason}.")
        return encoded.rows
