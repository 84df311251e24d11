"""What commands open: a collection, the model for it, files of texts or a folder of images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from vdr_db.cli.options import DEFAULT_IMAGE_MODEL, DEFAULT_MODEL, THUMBNAIL_PX, fields_of
from vdr_db.errors import ConfigError, StoreUnavailable

if TYPE_CHECKING:
    from vdr_db.connectors import VDRQdrant
    from vdr_db.encoders.cross_modal import CrossModalEncoder
    from vdr_db.encoders.text import SparseEncoder
    from vdr_db.ingest import FileSource, ImageFolderSource

__all__ = [
    "Place",
    "is_url",
    "load_cross_modal",
    "load_model",
    "load_model_for_texts",
    "open_source",
    "open_with_model",
    "opened",
    "place_of",
]


class Place(TypedDict, total=False):
    """Where `VDRQdrant` finds a store: `path`, or `url` and maybe `api_key`."""

    path: str
    url: str
    api_key: str | None


def is_url(store: str) -> bool:
    """Whether `--store` names a server, not a folder."""
    return store.startswith(("http://", "https://"))


def place_of(store: str) -> Place:
    """Where `VDRQdrant` finds the store of `--store`."""
    return {"url": store} if is_url(store) else {"path": store}


def load_model(
    arguments: argparse.Namespace, *, name: str | None = None, head: str | None = None
) -> SparseEncoder:
    """The model of `--model`, or `name` where that was not given; `head` for one with a new head.

    Raises:
        ConfigError: The model cannot be found or is damaged.
        MissingExtraError: torch or transformers is not installed.
    """
    from vdr_db import SparseEncoder

    chosen, options = _asked_for(arguments, name)
    return SparseEncoder.from_pretrained(chosen, head=head, **options)


def load_cross_modal(
    arguments: argparse.Namespace, *, name: str | None = None
) -> CrossModalEncoder:
    """The model of texts and images of `--model`, or `name` where that was not given.

    Raises:
        ConfigError: The model cannot be found, is damaged, or reads no images.
        MissingExtraError: torch or transformers is not installed.
    """
    from vdr_db import CrossModalEncoder

    chosen, options = _asked_for(arguments, name)
    encoder = CrossModalEncoder.from_pretrained(chosen, **options)
    encoder.model = encoder.text.model = encoder.image.model = chosen  # not its parts' folders
    return encoder


def opened(
    arguments: argparse.Namespace, *, encoder: SparseEncoder | CrossModalEncoder | None
) -> VDRQdrant:
    """The collection of `--store` and `--collection`, which must be there.

    Raises:
        StoreUnavailable: There is no such folder or collection, or the server does not answer.
        StoreMismatch: It was made with another model.
    """
    from vdr_db.connectors import VDRQdrant

    store, name = arguments.store, arguments.collection
    if not is_url(store) and not Path(store).exists():
        raise StoreUnavailable(f"There is no store at {store}; make one with `vdr-db index`.")
    collection = VDRQdrant(name, encoder, **place_of(store))
    if collection.store.width is None:
        collection.close()
        raise StoreUnavailable(
            f"{store} holds no collection {name!r}; make it with `vdr-db index`, or name another."
        )
    return collection


def open_with_model(arguments: argparse.Namespace) -> tuple[VDRQdrant, SparseEncoder]:
    """The collection, and the model of `--model` or else the one it was made with.

    Where that reads images too, the collection has the whole of it, and its text side comes here.
    """
    with opened(arguments, encoder=None) as collection:
        stamp = collection.store.stamp
    made_with = stamp.model if stamp else None
    if stamp is not None and stamp.head.endswith("+image"):
        both = load_cross_modal(arguments, name=made_with)
        return opened(arguments, encoder=both), both.text
    encoder = load_model(arguments, name=made_with)
    return opened(arguments, encoder=encoder), encoder


def open_source(
    arguments: argparse.Namespace,
    paths: Sequence[str],
    *,
    place: Place | None = None,
    unique: bool = False,
) -> tuple[FileSource | ImageFolderSource, SparseEncoder | CrossModalEncoder]:
    """What the command reads, and the model that reads it.

    Args:
        arguments: Of the command.
        paths: Files of texts; none where `--images` is given.
        place: Of the store it is read for, `None` when there is none.
        unique: Whether a second text with the same id in a file is an error.
    """
    from vdr_db.ingest import FileSource, ImageFolderSource, Slice

    if bool(paths) == (arguments.images is not None):
        raise ConfigError("Pass files of texts or --images FOLDER, one of the two.")
    slice = Slice.parse(getattr(arguments, "slice", "0/1"))
    digest = getattr(arguments, "digest", False)
    if arguments.images is not None:
        if getattr(arguments, "tokens", False):
            raise ConfigError("--tokens is for texts: an image has no tokens.")
        px = THUMBNAIL_PX if arguments.thumbnails else None
        images = ImageFolderSource(arguments.images, slice=slice, thumbnail_px=px, digest=digest)
        return images, load_cross_modal(arguments, name=DEFAULT_IMAGE_MODEL)
    if arguments.thumbnails:
        raise ConfigError("--thumbnails is for --images FOLDER: a text has no image.")
    files = FileSource(
        paths,
        format=arguments.format,
        fields=fields_of(arguments),
        slice=slice,
        digest=digest,
        unique=unique,
    )
    return files, load_model_for_texts(arguments, place)


def load_model_for_texts(
    arguments: argparse.Namespace, place: Place | None
) -> SparseEncoder | CrossModalEncoder:
    """The model of `--model`; the whole of it where the collection has images too."""
    from vdr_db.connectors.qdrant.store import QdrantStore

    if place is not None and ("path" not in place or Path(place["path"]).exists()):
        with QdrantStore(arguments.collection, **place) as store:
            stamp = store.stamp
        if stamp is not None and stamp.head.endswith("+image"):
            return load_cross_modal(arguments, name=stamp.model)
    return load_model(arguments, name=DEFAULT_MODEL)


def _asked_for(arguments: argparse.Namespace, name: str | None) -> tuple[str, dict[str, Any]]:
    """Name or folder of a model, and options for loading it."""
    chosen = arguments.model or name
    if chosen is None:
        raise ConfigError("The collection does not say which model made it; pass --model.")
    options: dict[str, Any] = {"device": arguments.device, "max_length": arguments.max_length}
    if arguments.k is not None:
        options["k"] = arguments.k
    return chosen, options
