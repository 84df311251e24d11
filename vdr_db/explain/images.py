"""The portrait of an image through its encoder: which word fires on which patch."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

import numpy as np

from vdr_db.errors import ConfigError, InputError
from vdr_db.explain.evidence import MOST_DIMENSIONS, Evidence
from vdr_db.explain.portrait import Picture, Portrait, portrait_of_image

if TYPE_CHECKING:
    from vdr_db.image_encoder import ImageEncoder
    from vdr_db.image_reading import ImageSource

__all__ = ["image_portrait"]


def image_portrait(
    encoder: ImageEncoder,
    image: ImageSource,
    *,
    heading: str = "image",
    most: int = MOST_DIMENSIONS,
) -> Portrait:
    """What an image's vector says, and where on the image each word fires.

    The picture in the portrait is what the model sees: cut to a square and scaled.

    Args:
        encoder: What made, or makes, the vector.
        image: A path, the bytes of a file, a PIL image or an array.
        heading: What it is called.
        most: Dimensions to follow back to patches, the heaviest.

    Raises:
        InputError: It cannot be read.
        ConfigError: The patches of the model are no square.
        MissingExtraError: Pillow is not installed.
    """
    from vdr_db.image_reading import ImageLimits, read_picture

    encoded = encoder.encode_images([image])
    if encoded.refused:
        raise InputError(f"the image cannot be read: {encoded.refused[0]}.")
    ids, weights = encoded.rows.row(0)
    heaviest = ids[np.lexsort((ids, -weights))[:most]]
    per_patch = encoder.patch_weights(image, heaviest)
    side = math.isqrt(per_patch.shape[0])
    if side * side != per_patch.shape[0]:
        raise ConfigError(
            f"the patches of a model must form a square, got {per_patch.shape[0]} of them; use "
            "`Evidence.of_patches` with the grid of this model."
        )
    seen = encoder.preprocessing.square(read_picture(image, ImageLimits()).image)
    file = io.BytesIO()
    seen.save(file, "PNG")
    return portrait_of_image(
        encoder.vocabulary,
        encoded.rows,
        Picture(file.getvalue(), "image/png", *seen.size),
        evidence=Evidence.of_patches(per_patch, heaviest, (side, side)),
        heading=heading,
    )
