"""From whatever a caller passes to images ready for a model, read a few batches ahead.

    folder, paths, bytes, arrays -> names -> read, decode, scale in threads -> `PreparedImage`

Reading and scaling take as long as a small model does, and neither holds Python's lock, so threads
do them while earlier images are encoded. A bounded number waits, whatever the number of images.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vdr_db.budget import Budget
from vdr_db.errors import InputError
from vdr_db.images.files import list_images
from vdr_db.images.preprocessing import Preprocessing
from vdr_db.images.reading import ImageSource, check_kind, read_image
from vdr_db.images.thumbnails import thumbnail_address

__all__ = ["PreparedImage", "image_batches", "named_images", "prepared_images"]


@dataclass(frozen=True)
class PreparedImage:
    """An image as a model reads it, or the reason why there is none.

    Attributes:
        name: What it is called.
        pixels: `[3, size, size]` float32, or None where it could not be read.
        digest: SHA-256 (hex) of its content, or `""`.
        reason: One sentence on why it could not be read, or `""`.
        thumbnail: A small copy as a `data:` address, or `""` where none was asked for.
    """

    name: str
    pixels: npt.NDArray[np.float32] | None
    digest: str = ""
    reason: str = ""
    thumbnail: str = ""


def named_images(
    images: str | os.PathLike[str] | Iterable[ImageSource],
) -> Iterable[tuple[ImageSource, str]]:
    """Images of a folder, or several, with their names; an empty name is found out later.

    Raises:
        TypeError: One image came instead of several.
        InputError: A text came; or the folder holds no image.
    """
    if isinstance(images, (str, os.PathLike)):
        folder = Path(images)
        if folder.is_dir():
            return [(folder / name, name) for name in list_images(folder)]
        check_kind(images, 0)
        raise TypeError(
            f"`images` must be a folder or a list of images, got one; pass [{images!r}]"
        )
    is_one = isinstance(images, (bytes, bytearray, memoryview, Mapping)) or (
        isinstance(images, np.ndarray) and images.ndim < 4
    )
    if is_one or not isinstance(images, Iterable):
        raise TypeError(
            f"`images` must be a folder or a list of images, got {'one ' if is_one else ''}"
            f"{type(images).__name__}; pass [image]"
        )
    if isinstance(images, Sequence):
        return [(image, "") for image in images]
    return ((image, "") for image in images)


def prepared_images(
    sources: Iterable[tuple[ImageSource, str]],
    preprocessing: Preprocessing,
    budget: Budget,
    *,
    workers: int,
    ahead: int,
    thumbnail_px: int | None = None,
) -> Iterator[PreparedImage]:
    """Images in order, read and scaled in threads.

    At most `ahead` of them are read before they are asked for. The longest side of a small copy
    is `thumbnail_px`; None makes none.

    Raises:
        TypeError: An item is no image at all.
        InputError: An item is a text.
    """

    def prepare(source: ImageSource, name: str) -> PreparedImage:
        try:
            loaded = read_image(source, budget)
        except InputError as error:
            return PreparedImage(name, None, reason=str(error))
        small = "" if thumbnail_px is None else thumbnail_address(loaded.image, thumbnail_px)
        return PreparedImage(
            name, preprocessing.apply(loaded.image), loaded.digest, thumbnail=small
        )

    pool = ThreadPoolExecutor(workers, thread_name_prefix="vdr-db-images")
    waiting: deque[Future[PreparedImage]] = deque()
    try:
        for index, (source, name) in enumerate(sources):
            waiting.append(pool.submit(prepare, source, name or check_kind(source, index)))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def image_batches(items: Iterable[PreparedImage], size: int) -> Iterator[list[PreparedImage]]:
    """Lists of `size` images; the last one may be shorter."""
    waiting = iter(items)
    while batch := list(islice(waiting, size)):
        yield batch
