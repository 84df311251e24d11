"""Images on their way into a collection.

Vectors of images and of texts are weights of the same tokens, so both lie in one collection, under
one vector, and any query finds either. What a document is stands in its payload: `"modality"` is
`"image"`, which a filter can ask for or leave out.

The encoder decodes and encodes; nothing here opens an image.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from vdr_db.connectors.base import Id, Payload
from vdr_db.connectors.feed import Batch, Feed
from vdr_db.connectors.ids import checked_id
from vdr_db.errors import InputError
from vdr_db.images.files import list_images
from vdr_db.sparse import SparseRows

__all__ = [
    "IMAGE",
    "IMAGE_KEY",
    "MODALITY_KEY",
    "THUMBNAIL_KEY",
    "EncodeImages",
    "EncodedImages",
    "image_batches",
]

MODALITY_KEY = "modality"
"""Payload field that says what a document is."""

IMAGE = "image"
"""Its value for images."""

IMAGE_KEY = "image"
"""Payload field of the path of an image that came as a path."""

THUMBNAIL_KEY = "thumbnail"
"""Payload field of a small copy of an image, a `data:` address, where it was asked for."""

_IMAGE_IDS = uuid.uuid5(uuid.NAMESPACE_URL, "vdr_db:image")


class EncodedImages(Protocol):
    """What `encode_images` of an encoder returns; `vdr_db.encoders.image.EncodedImages` is one."""

    @property
    def rows(self) -> SparseRows:
        """One row for each image."""

    @property
    def names(self) -> Sequence[str]:
        """What each image is called."""

    @property
    def digests(self) -> Sequence[str]:
        """SHA-256 (hex) of each image's content, `""` of a refused one."""

    @property
    def refused(self) -> Mapping[int, str]:
        """Place of each image without a vector → why."""

    @property
    def thumbnails(self) -> Sequence[str]:
        """A `data:` address of a small copy of each image, where that was asked for."""


EncodeImages: TypeAlias = Callable[..., EncodedImages]
"""`encode_images` of an encoder: images, and `thumbnail_px` where it is wanted."""


def image_batches(
    encode: EncodeImages,
    images: str | os.PathLike[str] | Iterable[Any],
    ids: Iterable[Id] | None,
    payloads: Iterable[Mapping[str, Any] | None] | None,
    *,
    size: int,
    thumbnail_px: int | None = None,
) -> Iterator[Batch]:
    """Encoded batches of at most `size` images with their ids and payloads.

    Args:
        encode: Reads and encodes images.
        images: Paths, bytes of files, PIL images or arrays; or one folder.
        ids: One for each, or `None` for paths within the folder, else ids made of the content.
        payloads: One mapping or `None` for each, or `None` for no payloads.
        size: Images of a batch.
        thumbnail_px: Longest side of a small copy in the payload, `None` for none.
    """
    sources, names = _sources(images)
    feed = Feed(sources, ids, payloads, size=size, one="an image")
    return _batches(encode, feed, names, thumbnail_px)


def _batches(
    encode: EncodeImages, feed: Feed[Any], names: list[str] | None, thumbnail_px: int | None
) -> Iterator[Batch]:
    # Left out unless it is asked for: other encoders may not have it.
    options = {} if thumbnail_px is None else {"thumbnail_px": thumbnail_px}
    for part in feed:
        whole = [_with_image(*pair) for pair in zip(part.items, part.payloads, strict=True)]
        encoded = encode(part.items, **options)
        called = [_name(image, part.start + i) for i, image in enumerate(part.items)]
        reasons = {i: f"{called[i]}: {said}" for i, said in encoded.refused.items()}
        if part.ids:
            own, fresh = part.ids, list(range(len(part.ids)))
        else:
            known = None if names is None else names[part.start : part.start + len(part.items)]
            own = _ids_of(encoded.digests, called, known, reasons)
            # Two files of equal content are one document, that of the first path.
            pathless = [{k: v for k, v in one.items() if k != IMAGE_KEY} for one in whole]
            fresh = feed.first_of_each(own, pathless)
        if thumbnail_px is not None:
            # A payload that has the field already keeps its own.
            whole = [
                {THUMBNAIL_KEY: small, **payload} if small else payload
                for payload, small in zip(whole, encoded.thumbnails, strict=True)
            ]
        kept = [i for i in fresh if i not in reasons]
        yield Batch(
            ids=own,
            fresh=[own[i] for i in kept],
            rows=encoded.rows[np.array(kept, np.int64)] if kept else None,
            payloads=[whole[i] for i in kept],
            refused={own[i]: reason for i, reason in reasons.items()},
        )


def _sources(
    images: str | os.PathLike[str] | Iterable[Any],
) -> tuple[Iterable[Any], list[str] | None]:
    """Images, and the names of those of a folder."""
    if isinstance(images, (str, os.PathLike)):
        folder = Path(images)
        if not folder.is_dir():
            raise TypeError(
                f"`images` must be a folder or a list of images, got {os.fspath(images)!r}, which "
                "is no folder; pass [image]"
            )
        names = list_images(folder)
        return [str(folder / name) for name in names], names
    is_array = hasattr(images, "shape") and len(images.shape) < 4
    if is_array or not isinstance(images, Iterable) or isinstance(images, (bytes, Mapping)):
        raise TypeError(
            f"`images` must be a folder or a list of images, got one {type(images).__name__}; "
            "pass [image]"
        )
    return images, None


def _name(image: Any, place: int) -> str:
    return os.fsdecode(image) if isinstance(image, (str, os.PathLike)) else f"image {place}"


def _with_image(image: Any, payload: Mapping[str, Any] | None) -> Payload:
    """The payload with what the document is, and where it came from if that is known."""
    joined = dict(payload or {})
    own = {MODALITY_KEY: IMAGE}
    if isinstance(image, (str, os.PathLike)):
        # A file name need not be text; the field is for people.
        own[IMAGE_KEY] = os.fsencode(image).decode("utf-8", "replace")
    for key, value in own.items():
        if joined.setdefault(key, value) != value:
            raise InputError(
                f"the payload has another value in {key!r}, which says what an image is or where "
                "it lies; rename that field."
            )
    return joined


def _ids_of(
    digests: Sequence[str],
    called: Sequence[str],
    known: Sequence[str] | None,
    reasons: dict[int, str],
) -> list[Id]:
    """Ids of images that came without: paths within a folder, else made of the content.

    What has no content because it cannot be read goes by its name, and gets a reason if even that
    is unusable.
    """
    ids: list[Id] = []
    for i, digest in enumerate(digests):
        if known is None and digest:
            ids.append(str(uuid.uuid5(_IMAGE_IDS, digest)))
            continue
        name = called[i] if known is None else known[i]
        try:
            ids.append(checked_id(name))
        except InputError as error:
            shown = os.fsencode(name).decode("utf-8", "replace")
            reasons.setdefault(i, f"{shown}: its name is no usable id ({error})")
            ids.append(shown)
    return ids
