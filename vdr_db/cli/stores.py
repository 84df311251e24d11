"""What commands open: a collection, the model for it, files of texts or a folder of images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vdr_db.cli.options import (
    DEFAULT_COLLECTION,
    DEFAULT_MODEL,
    THUMBNAIL_PX,
    fields_of,
)
from vdr_db.connectors.collections.encoding import has_images
from vdr_db.errors import ConfigError, StoreUnavailable

if TYPE_CHECKING:
    from vdr_db.connectors import VDRElasticsearch, VDRQdrant
    from vdr_db.encoders.cross_modal import CrossModalEncoder
    from vdr_db.encoders.text import SparseEncoder
    from vdr_db.ingest import FileSource, ImageFolderSource
    from vdr_db.stamp import EncoderStamp

__all__ = [
    "load_cross_modal",
    "load_model",
    "open_source",
    "open_store",
    "open_with_model",
    "opened",
]


def load_model(
    arguments: argparse.Namespace, *, name: str | None = None, head: str | None = None
) -> SparseEncoder:
    """The model of `--model`, or `name` where that was not given; `head` for a new head."""
    from vdr_db import SparseEncoder

    chosen, options = _asked_for(arguments, name)
    return SparseEncoder.from_pretrained(chosen, head=head, **options)


def load_cross_modal(
    arguments: argparse.Namespace, *, name: str | None = None
) -> CrossModalEncoder:
    """The model of texts and images of `--model`, or `name` where that was not given."""
    from vdr_db import CrossModalEncoder

    chosen, options = _asked_for(arguments, name)
    encoder = CrossModalEncoder.from_pretrained(chosen, **options)
    encoder.model = encoder.text.model = encoder.image.model = chosen  # not its parts' folders
    return encoder


def open_store(
    arguments: argparse.Namespace,
    encoder: SparseEncoder | CrossModalEncoder | None = None,
    **options: Any,
) -> VDRQdrant | VDRElasticsearch:
    """The collection of `--store` and `--collection`, whether or not it is made already.

    Without `--collection` that is the one a folder holds. `arguments.collection` has its name then.

    Args:
        arguments: Of the command.
        encoder: Of texts, or of texts and images.
        options: More options of the collection.
    """
    from vdr_db.connectors.address import Access, parse_address
    from vdr_db.connectors.collections.opening import held_name, open_collection

    where = parse_address(arguments.store)
    name = arguments.collection or held_name(where) or DEFAULT_COLLECTION
    arguments.collection = name
    access = None
    if where.product is not None:
        access = Access.from_environment(where.product, key=arguments.api_key_env)
    return open_collection(arguments.store, name, encoder, access=access, **options)


def opened(arguments: argparse.Namespace) -> VDRQdrant | VDRElasticsearch:
    """The collection of `--store` and `--collection`, which must be there."""
    store = arguments.store
    if "://" not in store and not Path(store).exists():
        raise StoreUnavailable(f"There is no store at {store}; make one with `vdr-db index`.")
    collection = open_store(arguments)
    if collection.store.width is None:
        collection.close()
        raise StoreUnavailable(
            f"{store} holds no collection {arguments.collection!r}; make it with `vdr-db index`, "
            "or name another."
        )
    return collection


def stamp_of(arguments: argparse.Namespace) -> EncoderStamp | None:
    """The encoder that the collection was made with, `None` where there is none yet."""
    with open_store(arguments) as collection:
        return collection.store.stamp


def open_with_model(
    arguments: argparse.Namespace, *, texts_only: bool = False
) -> tuple[VDRQdrant | VDRElasticsearch, SparseEncoder]:
    """The collection, and the model of `--model` or else the one it was made with.

    Where the collection has images too, or `--image` asks, the collection has the whole model, and
    its text side comes here. With `texts_only` and no `--image` the part of images is not loaded.
    With `--mode alpha` nothing of the model but its tokenizer is read.
    """
    collection = opened(arguments)
    try:
        whole, texts = _model_for(arguments, collection.store.stamp, texts_only=texts_only)
        collection.use_encoder(whole)
    except BaseException:
        collection.close()
        raise
    return collection, texts


def _model_for(
    arguments: argparse.Namespace, stamp: EncoderStamp | None, *, texts_only: bool
) -> tuple[SparseEncoder | CrossModalEncoder, SparseEncoder]:
    """The model for a collection with that stamp, and its text side; see `open_with_model`."""
    made_with = stamp.model if stamp else None
    if getattr(arguments, "mode", None) == "alpha" and not getattr(arguments, "image", None):
        from vdr_db.encoders.token_queries import TokenQueries

        name, options = _asked_for(arguments, made_with)
        length = options["max_length"]
        queries = cast(
            "SparseEncoder", TokenQueries.from_pretrained(name, stamp=stamp, max_length=length)
        )
        return queries, queries
    if _needs_images(arguments, stamp, texts_only=texts_only):
        both = load_cross_modal(arguments, name=made_with)
        return both, both.text
    encoder = load_model(arguments, name=made_with)
    return encoder, encoder


def open_source(
    arguments: argparse.Namespace, paths: Sequence[str], *, unique: bool = False
) -> tuple[FileSource | ImageFolderSource, SparseEncoder | CrossModalEncoder]:
    """What the command reads, and the model that reads it, which fits the collection.

    Args:
        arguments: Of the command.
        paths: Files of texts; none where `--images` is given.
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
        return images, load_cross_modal(arguments, name=DEFAULT_MODEL)
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
    stamp = stamp_of(arguments) if getattr(arguments, "store", None) else None
    name = stamp.model if stamp is not None and stamp.reads_images else DEFAULT_MODEL
    if _needs_images(arguments, stamp, texts_only=True):
        return files, load_cross_modal(arguments, name=name)
    return files, load_model(arguments, name=name)


def _needs_images(
    arguments: argparse.Namespace, stamp: EncoderStamp | None, *, texts_only: bool
) -> bool:
    """Whether the encoder of images is asked for, or has to be there for a comparison."""
    if stamp is not None and stamp.reads_images:
        # Stamps of earlier versions hold both parts in one.
        return not texts_only or bool(getattr(arguments, "image", None)) or stamp.image is None
    made_with = "" if stamp is None else stamp.model
    return bool(getattr(arguments, "image", None)) and has_images(arguments.model or made_with)


def _asked_for(arguments: argparse.Namespace, name: str | None) -> tuple[str, dict[str, Any]]:
    """Name or folder of a model, and options for loading it."""
    chosen = arguments.model or name
    if chosen is None:
        raise ConfigError("The collection does not say which model made it; pass --model.")
    told = ("device", "precision", "max_length")
    options: dict[str, Any] = {name: getattr(arguments, name) for name in told}
    if arguments.k is not None:
        options["k"] = arguments.k
    return chosen, options
