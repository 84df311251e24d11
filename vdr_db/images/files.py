"""Which files are images, by their names; nothing is opened here."""

from __future__ import annotations

import os
from pathlib import Path

from vdr_db.errors import InputError

__all__ = ["IMAGE_SUFFIXES", "PLUGIN_SUFFIXES", "has_image_suffix", "list_images"]

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
    root = Path(folder)
    if not root.is_dir():
        raise InputError(
            f"images must come from a folder, got {os.fspath(folder)!r}, which is none."
        )
    found: list[str] = []
    for here, folders, files in os.walk(root, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            (Path(here) / name).relative_to(root).as_posix()
            for name in files
            if has_image_suffix(name) and not name.startswith(".")
        ]
    if not found:
        raise InputError(
            f"{root} must hold images (files that end in {', '.join(IMAGE_SUFFIXES)}), got none."
        )
    return sorted(found)


def _refuse(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be read: {error.strerror}.") from error
