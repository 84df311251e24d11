"""The explanations of a text and of an image, through their encoders."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Literal

import numpy as np

from vdr_db.errors import ConfigError, InputError
from vdr_db.explain.attribution import (
    MOST_DIMENSIONS,
    Attribution,
    heaviest,
    text_attribution,
)
from vdr_db.explain.explanation import Explanation, ShownImage
from vdr_db.explain.own import own_part
from vdr_db.explain.spans import token_spans
from vdr_db.explain.words import matched_words
from vdr_db.sparse import SparseRows

if TYPE_CHECKING:
    from vdr_db.encoders.image import ImageEncoder
    from vdr_db.encoders.text import SparseEncoder
    from vdr_db.images.reading import ImageSource

__all__ = ["explain_image", "explain_text"]

SAME_IMAGE = 0.98
"""Cosine from which a file counts as the image that was stored: room for an 8-bit index."""


def explain_image(
    encoder: ImageEncoder,
    image: ImageSource,
    *,
    heading: str = "image",
    most: int = MOST_DIMENSIONS,
    expected: SparseRows | None = None,
) -> Explanation:
    """What an image's vector says, and where on the image each word fires.

    The image in the explanation is what the model sees: cut to a square and scaled.

    The `most` heaviest dimensions are followed back to patches. With the row it was stored with,
    `expected`, that is the explanation's, and an image with another vector is refused.

    Raises:
        InputError: It cannot be read, or is not the image that was stored.
        ConfigError: The patches of the model are no square.
        MissingExtraError: Pillow is not installed.
    """
    from vdr_db.images.reading import read_image

    encoded = encoder.encode_images([image])
    if encoded.refused:
        raise InputError(f"the image cannot be read: {encoded.refused[0]}.")
    row = encoded.rows
    if expected is not None:
        if _cosine(row, expected) < SAME_IMAGE:
            raise InputError(f"{encoded.names[0]} is not the image that was stored.")
        row = expected
    ids = heaviest(row, most)
    per_patch = encoder.patch_weights(image, ids)
    side = math.isqrt(per_patch.shape[0])
    if side * side != per_patch.shape[0]:
        raise ConfigError(
            f"the patches of a model must form a square, got {per_patch.shape[0]} of them; use "
            "`Attribution.of_patches` with the grid of this model."
        )
    seen = encoder.preprocessing.square(read_image(image).image)
    file = io.BytesIO()
    seen.save(file, "PNG")
    return Explanation.of_image(
        encoder.vocabulary,
        row,
        ShownImage(file.getvalue(), "image/png", *seen.size),
        attribution=Attribution.of_patches(per_patch, ids, (side, side)),
        heading=heading,
    )


def _cosine(row: SparseRows, other: SparseRows) -> float:
    norms = [float(np.linalg.norm(one.values)) for one in (row, other)]
    return float(row.dot(other)[0, 0]) / (norms[0] * norms[1]) if min(norms) > 0 else 0.0


def explain_text(
    encoder: SparseEncoder,
    text: str,
    *,
    side: Literal["document", "query"] = "document",
    heading: str = "",
    row: SparseRows | None = None,
    follow: bool = True,
) -> Explanation:
    """The explanation of a text, whose heading is its side by default.

    Its vector is made unless the `row` is there already; to `follow` weights back to tokens runs
    the model once more.
    """
    if row is None:
        encode = encoder.encode_documents if side == "document" else encoder.encode_queries
        row = encode([text])
    own, _ = token_spans(encoder, text)
    has_towers = hasattr(encoder, "tower")  # TokenQueries have none
    return Explanation(
        heading or side,
        text,
        matched_words(encoder.vocabulary, own, row.to_dicts()[0]),
        row.nnz,
        encoder.vocabulary,
        text_attribution(encoder, text, side=side, row=row) if follow and has_towers else None,
        own=own_part(encoder, text, side, row),
    )
