"""`vdr-db index`: texts from files to a searchable collection."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vdr_db.cli_encode import BATCH, in_batches
from vdr_db.cli_model import (
    DEFAULT_MODEL,
    add_field_options,
    add_model_options,
    add_store_options,
    fields_of,
    load_model,
)
from vdr_db.cli_search import is_url, place_of
from vdr_db.cli_show import progress, say, show_json
from vdr_db.errors import RejectedRows
from vdr_db.readers import Record, read_records

if TYPE_CHECKING:
    from vdr_db.connectors.base import Documents

__all__ = ["add_arguments", "run_command"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `index`."""
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="JSONL, CSV, TSV or text file (.gz too), BEIR folder, or - for standard input",
    )
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
    from vdr_db.cli import DONE, STORE_FAILED
    from vdr_db.connectors import VDRQdrant

    fields = fields_of(arguments)

    def records() -> Iterator[Record]:
        for source in arguments.sources:
            yield from read_records(source, format=arguments.format, fields=fields, unique=True)

    encoder = load_model(arguments)
    place = place_of(arguments.store)
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
    name = arguments.store if is_url(arguments.store) else Path(arguments.store)
    if arguments.json:
        show_json({"written": written - refused, "refused": refused, "texts": total})
    say(
        f"{name}, collection {arguments.collection!r}: {written - refused:,} texts written in "
        f"{seconds:.1f} s, {total:,} in all"
    )
    if encoder.truncated:
        say(f"{encoder.truncated:,} of them were longer than the model reads and were cut")
    return STORE_FAILED if refused else DONE
