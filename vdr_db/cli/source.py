"""What commands read, files of texts or a folder of images, and the model for it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vdr_db.cli.options import fields_of, load_cross_modal, load_model
from vdr_db.errors import ConfigError

if TYPE_CHECKING:
    from vdr_db.encoders.cross_modal import CrossModalEncoder
    from vdr_db.encoders.text import SparseEncoder
    from vdr_db.ingest import FileSource, ImageFolderSource

__all__ = ["THUMBNAIL_PX", "add_image_options", "load_model_for_texts", "open_source"]

THUMBNAIL_PX = 64
"""Longest side of the small copies of `--thumbnails`."""


def add_image_options(parser: Any) -> None:
    """`--images` and `--thumbnails`."""
    parser.add_argument(
        "--images",
        metavar="FOLDER",
        help="instead of texts, the images in this folder and below; their ids are their paths in "
        "it; needs a --model that reads images",
    )
    parser.add_argument(
        "--thumbnails",
        action="store_true",
        help=f"keep a small copy of each image ({THUMBNAIL_PX} pixels, about 1.7 KB) beside its "
        "vector, for result pages and terminals where the file is not there",
    )


def open_source(
    arguments: argparse.Namespace,
    paths: Sequence[str],
    *,
    place: Mapping[str, Any] | None = None,
) -> tuple[FileSource | ImageFolderSource, SparseEncoder | CrossModalEncoder]:
    """What the command reads, and the model that reads it, for a store at a place."""
    from vdr_db.ingest import FileSource, ImageFolderSource, Slice

    if bool(paths) == (arguments.images is not None):
        raise ConfigError("Pass files of texts or --images FOLDER, one of the two.")
    slice = Slice.parse(arguments.slice)
    digest = getattr(arguments, "digest", False)
    if arguments.images is not None:
        if getattr(arguments, "tokens", False):
            raise ConfigError("--tokens is for texts: an image has no tokens.")
        px = THUMBNAIL_PX if arguments.thumbnails else None
        images = ImageFolderSource(arguments.images, slice=slice, thumbnail_px=px, digest=digest)
        return images, load_cross_modal(arguments)
    if arguments.thumbnails:
        raise ConfigError("--thumbnails is for --images FOLDER: a text has no picture.")
    files = FileSource(
        paths, format=arguments.format, fields=fields_of(arguments), slice=slice, digest=digest
    )
    return files, load_model_for_texts(arguments, place)


def load_model_for_texts(
    arguments: argparse.Namespace, place: Mapping[str, Any] | None
) -> SparseEncoder | CrossModalEncoder:
    """The model of `--model`; the whole of it where the collection has images too.

    Args:
        arguments: Of the command.
        place: `path` or `url` of the store, or `None` when there is none.
    """
    from vdr_db.connectors.qdrant.store import QdrantStore

    is_there = place is not None and (os.path.exists(place["path"]) if "path" in place else True)
    if is_there:
        with QdrantStore(arguments.collection, **(place or {})) as store:
            stamp = store.stamp
        if stamp is not None and stamp.head.endswith("+image"):
            return load_cross_modal(arguments)
    return load_model(arguments)
