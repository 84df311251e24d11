"""`vdr-db index`: texts from files, or images of a folder, to a searchable collection."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vdr_db.cli.encode import BATCH, in_batches
from vdr_db.cli.ingest import say_truncated
from vdr_db.cli.options import (
    DEFAULT_MODEL,
    add_field_options,
    add_model_options,
    add_store_options,
    fields_of,
    load_cross_modal,
)
from vdr_db.cli.search import is_url, place_of
from vdr_db.cli.show import progress, say, show_json
from vdr_db.cli.source import THUMBNAIL_PX, add_image_options, load_model_for_texts
from vdr_db.errors import ConfigError, RejectedRows
from vdr_db.images.files import list_images
from vdr_db.readers import Record, read_records

if TYPE_CHECKING:
    from vdr_db.connectors.base import Documents

__all__ = ["add_arguments", "run_command"]

IMAGE_BATCH = 256
"""Images encoded and written together: enough to decode ahead, few enough to see progress."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `index`."""
    parser.add_argument(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="JSONL, CSV, TSV or text file (.gz too), BEIR folder, or - for standard input",
    )
    add_image_options(parser)
    add_store_options(parser)
    add_field_options(parser)
    add_model_options(parser, default=DEFAULT_MODEL)
    parser.add_argument(
        "--tokens",
        action="store_true",
        help="keep the tokens of each text without running the model (search mode beta)",
    )


def run_command(arguments: argparse.Namespace) -> int:
    """Carries out `vdr-db index`; texts with known ids are replaced, so it can be repeated."""
    from vdr_db.cli.main import DONE, STORE_FAILED
    from vdr_db.connectors import VDRQdrant

    if bool(arguments.sources) == (arguments.images is not None):
        raise ConfigError("Pass files of texts or --images FOLDER, one of the two.")
    if arguments.images is not None:
        return _index_images(arguments)
    if arguments.thumbnails:
        raise ConfigError("--thumbnails is for --images FOLDER: a text has no picture.")
    fields = fields_of(arguments)

    def records() -> Iterator[Record]:
        for source in arguments.sources:
            yield from read_records(source, format=arguments.format, fields=fields, unique=True)

    place = place_of(arguments.store)
    encoder = load_model_for_texts(arguments, place)
    start = time.perf_counter()
    written, refused = 0, 0
    documents: Documents | None = "tokens" if arguments.tokens else None
    with VDRQdrant(arguments.collection, encoder, documents=documents, **place) as collection:
        try:
            with progress(None, "texts", "index") as bar:
                for batch in in_batches(records(), BATCH):
                    try:
                        collection.add_texts(
                            [record.text for record in batch],
                            ids=[record.id for record in batch],
                            payloads=[record.payload for record in batch],
                        )
                    except RejectedRows as error:
                        refused += len(error.ids)
                        say(f"vdr-db: {error}")
                    written += len(batch)
                    bar.update(len(batch))
        except BaseException:
            say(f"vdr-db: {written - refused:,} texts are stored; run it again to go on.")
            raise
        total = collection.count() if collection.store.width is not None else 0
    seconds = time.perf_counter() - start
    if arguments.json:
        show_json({"written": written - refused, "refused": refused, "texts": total})
    say(
        f"{_place(arguments)}: {written - refused:,} texts written in {seconds:.1f} s, "
        f"{total:,} in all"
    )
    say_truncated(encoder.truncated)
    return STORE_FAILED if refused else DONE


def _index_images(arguments: argparse.Namespace) -> int:
    from vdr_db.cli.main import DONE, STORE_FAILED
    from vdr_db.connectors import VDRQdrant

    if arguments.tokens:
        raise ConfigError("--tokens is for texts: an image has no tokens.")
    folder = Path(arguments.images)
    names = list_images(folder)
    encoder = load_cross_modal(arguments)
    start = time.perf_counter()
    done, refused = 0, 0
    with VDRQdrant(arguments.collection, encoder, **place_of(arguments.store)) as collection:
        try:
            with progress(len(names), "images", "index") as bar:
                for batch in in_batches(names, IMAGE_BATCH):
                    try:
                        collection.add_images(
                            [folder / name for name in batch],
                            ids=batch,
                            thumbnail_px=THUMBNAIL_PX if arguments.thumbnails else None,
                        )
                    except RejectedRows as error:
                        refused += len(error.ids)
                        for reason in error.reasons:
                            say(f"vdr-db: {reason}")
                    done += len(batch)
                    bar.update(len(batch))
        except BaseException:
            say(f"vdr-db: {done - refused:,} images are stored; run it again to go on.")
            raise
        total = collection.count()
    seconds = time.perf_counter() - start
    if arguments.json:
        show_json({"written": done - refused, "refused": refused, "documents": total})
    say(
        f"{_place(arguments)}: {done - refused:,} images written in {seconds:.1f} s, "
        f"{refused:,} refused, {total:,} documents in all"
    )
    return STORE_FAILED if refused else DONE


def _place(arguments: argparse.Namespace) -> str:
    name = arguments.store if is_url(arguments.store) else Path(arguments.store)
    return f"{name}, collection {arguments.collection!r}"
