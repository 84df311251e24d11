"""The portrait of an image through its encoder: which word fires on which patch."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

import numpy as np

from vdr_db.errors import ConfigError, InputError
from vdr_db.explain.attribution import MOST_DIMENSIONS, Evidence
from vdr_db.explain.explanation import Match, Picture, Portrait, join_match, portrait_of_image
from vdr_db.explain.records import portrait_of_record
from vdr_db.sparse import SparseRows

if TYPE_CHECKING:
    from vdr_db.connectors.base import Id
    from vdr_db.connectors.collections.collection import Collection
    from vdr_db.encoders.cross_modal import CrossModalEncoder
    from vdr_db.encoders.image import ImageEncoder
    from vdr_db.images.reading import ImageSource

__all__ = ["image_portrait", "match_of_image"]

SAME_IMAGE = 0.98
"""Cosine from which a file counts as the image that was stored: room for an 8-bit index."""


def image_portrait(
    encoder: ImageEncoder,
    image: ImageSource,
    *,
    heading: str = "image",
    most: int = MOST_DIMENSIONS,
    expected: SparseRows | None = None,
) -> Portrait:
    """What an image's vector says, and where on the image each word fires.

    The picture in the portrait is what the model sees: cut to a square and scaled.

    Args:
        encoder: What made, or makes, the vector.
        image: A path, the bytes of a file, a PIL image or an array.
        heading: What it is called.
        most: Dimensions to follow back to patches, the heaviest.
        expected: The vector it was stored with, one row, which is then the portrait's; an image
            whose vector is another one is refused.

    Raises:
        InputError: It cannot be read, or is not the image that was stored.
        ConfigError: The patches of the model are no square.
        MissingExtraError: Pillow is not installed.
    """
    from vdr_db.images.reading import ImageLimits, read_picture

    encoded = encoder.encode_images([image])
    if encoded.refused:
        raise InputError(f"the image cannot be read: {encoded.refused[0]}.")
    row = encoded.rows
    if expected is not None:
        if _cosine(row, expected) < SAME_IMAGE:
            raise InputError(f"{encoded.names[0]} is not the image that was stored.")
        row = expected
    ids, weights = row.row(0)
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
        row,
        Picture(file.getvalue(), "image/png", *seen.size),
        evidence=Evidence.of_patches(per_patch, heaviest, (side, side)),
        heading=heading,
    )


def match_of_image(
    collection: Collection,
    encoder: CrossModalEncoder,
    image: ImageSource,
    id: Id,
    *,
    follow: bool = True,
    open_files: bool = False,
) -> Match:
    """Why a document, a text or an image, matches an image.

    Args:
        collection: Holds the document.
        encoder: The collection's.
        image: The query: a path, the bytes of a file, a PIL image or an array.
        id: Of the document.
        follow: Whether to follow weights back to tokens and patches.
        open_files: As in `match_of`.

    Raises:
        InputError: The image cannot be read, or there is no document with this id.
    """
    query = image_portrait(encoder.image, image, heading="query")
    row = encoder.encode_images([image]).rows
    terms = collection.explain(row, id)
    (record,) = collection.get([id], with_rows=True)
    document = portrait_of_record(
        encoder.text,
        record,
        text_key=collection.text_key,
        follow=follow and collection.documents != "tokens",
        images=encoder.image,
        open_files=open_files,
    )
    return join_match(encoder.text, query, document, terms, id)


def _cosine(row: SparseRows, other: SparseRows) -> float:
    norms = [float(np.linalg.norm(one.values)) for one in (row, other)]
    return float(row.dot(other)[0, 0]) / (norms[0] * norms[1]) if min(norms) > 0 else 0.0
