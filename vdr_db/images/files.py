"""Which files are images, by their names; nothing is opened here."""

from __future__ import annotations

import os
from collections.abc import Iterator

from vdr_db.errors import InputError

__all__ = ["IMAGE_SUFFIXES", "PLUGIN_SUFFIXES", "has_image_suffix", "list_images", "walk_images"]

PLUGIN_SUFFIXES = (".heic", ".heics", ".heif", ".heifs", ".hif", ".jxl")
"""Of images that Pillow reads with a plug-in only; without it each of them is refused by name."""

IMAGE_SUFFIXES = (
    *(".apng", ".avif", ".bmp", ".dib", ".gif", ".ico", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp"),
    *PLUGIN_SUFFIXES,
)
"""Ends of the names of files that `ImageEncoder` reads, in lower case."""


def has_image_suffix(name: str) -> bool:
    """Whether a file name ends like an image's."""
    # Most texts are long and no names; only the end is looked at.
    return name[-6:].lower().endswith(IMAGE_SUFFIXES)


def list_images(folder: str | os.PathLike[str]) -> list[str]:
    """Paths of the images in a folder and below, relative to it, with `/`, in sorted order.

    Files and folders whose names begin with a dot are passed over, and links to folders are not
    followed.

    Raises:
        InputError: It is no folder, cannot be read, or holds no image.
    """
    found = list(walk_images(folder))
    if not found:
        raise InputError(
            f"{os.fspath(folder)} must hold images (files that end in "
            f"{', '.join(IMAGE_SUFFIXES)}), got none."
        )
    return found


def walk_images(folder: str | os.PathLike[str]) -> Iterator[str]:
    """What `list_images` lists, in the same order; only one folder's names are held at a time.

    Raises:
        InputError: It is no folder, or cannot be read.
    """
    root = os.fspath(folder)
    if not os.path.isdir(root):
        raise InputError(f"images must come from a folder, got {root!r}, which is none.")
    return _walk(root, "")


def _walk(root: str, within: str) -> Iterator[str]:
    try:
        with os.scandir(os.path.join(root, within)) as entries:
            # Whole paths are sorted by their characters, in which a folder's name ends in "/".
            names = sorted(
                f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name
                for entry in entries
                if not entry.name.startswith(".")
            )
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}.") from error
    for name in names:
        if name.endswith("/"):
            yield from _walk(root, within + name)
        elif has_image_suffix(name):
            yield within + name
