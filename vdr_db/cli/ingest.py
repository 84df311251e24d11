"""`vdr-db index`, `ingest` and `load`: texts or images to a collection, bad rows told apart.

`ingest` and `load` remember in a ledger what is stored and resume after any kill; `index` is the
same without a ledger, for inputs that are quickly written again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdr_db.cli.exits import DONE, STORE_FAILED
from vdr_db.cli.options import (
    DEFAULT_MODEL,
    add_field_options,
    add_image_options,
    add_model_options,
    add_passage_options,
    add_run_options,
    add_store_options,
    passages_of,
)
from vdr_db.cli.outcome import exit_code_of
from vdr_db.cli.show import progress, say, say_truncated, show_json
from vdr_db.cli.stores import open_source, open_store
from vdr_db.connectors.address import parse_address
from vdr_db.errors import ConfigError

if TYPE_CHECKING:
    from tqdm import tqdm

    from vdr_db.connectors import VDRElasticsearch, VDRQdrant
    from vdr_db.encoders.cross_modal import CrossModalEncoder
    from vdr_db.encoders.text import SparseEncoder
    from vdr_db.ingest import (
        FileSource,
        ImageFolderSource,
        IngestOptions,
        SpoolSource,
    )
    from vdr_db.ingest.report import Totals

__all__ = [
    "add_index_arguments",
    "add_ingest_arguments",
    "add_load_arguments",
    "run_index",
    "run_ingest",
    "run_load",
]

_MIB = 1 << 20
SHOWN_REFUSALS = 20
"""Refused documents that `index` names; the rest is counted."""


def add_index_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `index`."""
    _add_source_options(parser)
    parser.add_argument(
        "--quarantine",
        metavar="FILE",
        help="refused documents, JSON lines (default: they are told on stderr)",
    )


def add_ingest_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `ingest`."""
    _add_source_options(parser)
    _add_writing_options(parser)
    parser.add_argument(
        "--digest",
        action="store_true",
        help="know input files by SHA-256, not by name, size and time",
    )
    parser.add_argument(
        "--empty",
        choices=["store", "skip", "error"],
        default="store",
        help="what becomes of texts without any weight (default: store)",
    )
    parser.add_argument(
        "--versioned",
        action="store_true",
        help="on a server: write everything into a new collection, and let --collection mean that "
        "one when it is written and checked; the same command again goes on after a kill",
    )


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `load`."""
    parser.add_argument("spool", metavar="FOLDER", help="what `encode --spool` wrote")
    add_store_options(parser)
    _add_writing_options(parser)
    parser.add_argument(
        "--partial", action="store_true", help="load finished slices although others are missing"
    )


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="JSONL, CSV, TSV, text (.gz and .zst too) or Parquet file, folder of such, BEIR "
        "folder, or - for standard input",
    )
    add_image_options(parser)
    add_store_options(parser)
    add_field_options(parser)
    add_model_options(parser, default=None, shown=DEFAULT_MODEL)
    parser.add_argument(
        "--tokens",
        action="store_true",
        help="keep the tokens of each text without running the model (search mode beta)",
    )
    add_passage_options(parser)


def _add_writing_options(parser: argparse.ArgumentParser) -> None:
    add_run_options(parser)
    parser.add_argument(
        "--ledger", metavar="FILE", help="what is stored so far (default: STORE.ledger)"
    )
    parser.add_argument("--no-ledger", action="store_true", help="do not remember; cannot resume")
    parser.add_argument("--quarantine", metavar="FILE", help="refused documents, JSON lines")
    parser.add_argument("--restart", action="store_true", help="forget the ledger, write all again")
    skip = parser.add_mutually_exclusive_group()
    skip.add_argument("--skip-existing", action="store_true", help="leave out ids that are stored")
    skip.add_argument(
        "--skip-unchanged", action="store_true", help="leave out what is stored just the same"
    )
    parser.add_argument("--writers", type=int, metavar="N", help="concurrent writes")
    parser.add_argument("--batch", type=int, metavar="N", help="documents of a request at most")
    parser.add_argument(
        "--queue-mib", type=int, default=64, metavar="N", help="memory between encoder and store"
    )
    parser.add_argument("--no-verify", action="store_true", help="skip the checks at the end")


def run_index(arguments: argparse.Namespace) -> int:
    """Carries out `vdr-db index`; documents with known ids are replaced, so it can be repeated."""
    from vdr_db.ingest import IngestOptions, ingest

    source, encoder = open_source(arguments, arguments.sources, unique=True)
    what = "texts" if arguments.images is None else "images"
    # There is no ledger to take up again, so nothing that is wrong with single rows ends the run.
    options = IngestOptions(
        is_verified=False, max_errors=sys.maxsize, passages=passages_of(arguments)
    )
    start = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(prefix="vdr-db-index-") as scratch,
        _opened(arguments, encoder) as collection,
        progress(None, what, "index") as bar,
    ):
        quarantine = Path(arguments.quarantine or Path(scratch, "refused.jsonl"))
        told = _Told(bar)
        try:
            report = ingest(
                source, collection, options=options, quarantine=quarantine, progress=told
            )
        except KeyboardInterrupt:
            say(f"vdr-db: {told.written:,} {what} are stored; run it again to go on.")
            raise
        total = collection.count()
        if report.totals.refused:
            _say_refused(quarantine, is_kept=arguments.quarantine is not None)
    written, refused = report.totals.acknowledged, report.totals.refused
    in_all = "texts" if arguments.images is None else "documents"
    if arguments.json:
        show_json({"written": written, "refused": refused, in_all: total})
    took_s = time.perf_counter() - start
    say(
        f"{arguments.store}, collection {arguments.collection!r}: {written:,} {what} written in "
        f"{took_s:.1f} s, {refused:,} refused, {total:,} {in_all} in all"
    )
    say_truncated(report.totals.truncated)
    return STORE_FAILED if refused else DONE


def run_ingest(arguments: argparse.Namespace) -> int:
    """Carries out `vdr-db ingest`; the same command again resumes."""
    source, encoder = open_source(arguments, arguments.sources)
    with _opened(arguments, encoder) as collection:
        return _write(arguments, source, collection)


def run_load(arguments: argparse.Namespace) -> int:
    """Carries out `vdr-db load`; the same command again resumes."""
    from vdr_db.ingest import Slice, SpoolSource

    source = SpoolSource(
        arguments.spool, slice=Slice.parse(arguments.slice), is_partial=arguments.partial
    )
    with open_store(arguments) as collection:
        return _write(arguments, source, collection)


class _Told:
    """What an ingest has told last of how far it is, and a bar of it."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self._bar = bar
        self.written = 0

    def update(self, totals: Totals, *, is_last: bool = False) -> None:
        self.written = totals.acknowledged
        self._bar.update(totals.acknowledged + totals.refused - self._bar.n)


def _say_refused(quarantine: Path, *, is_kept: bool) -> None:
    """Where each refused document was read and why, up to `SHOWN_REFUSALS` of them."""
    with open(quarantine, encoding="utf-8") as lines:
        refused = [json.loads(line) for line in lines]
    for one in refused[:SHOWN_REFUSALS]:
        reason = one["reason"].removeprefix("not encoded: ")
        say(f"vdr-db: {one['source'] or one['id']}: {reason}")
    if is_kept:
        say(f"  all refused: {quarantine}")
    elif len(refused) > SHOWN_REFUSALS:
        say(f"  and {len(refused) - SHOWN_REFUSALS:,} more; --quarantine FILE keeps them all")


def _opened(
    arguments: argparse.Namespace, encoder: SparseEncoder | CrossModalEncoder
) -> VDRQdrant | VDRElasticsearch:
    options: dict[str, Any] = {"documents": "tokens" if arguments.tokens else None}
    if getattr(arguments, "versioned", False):
        where = parse_address(arguments.store)
        if where.is_embedded:
            raise ConfigError(
                "--versioned needs a server, where a name can move from one collection to another; "
                "build another folder beside an embedded one."
            )
        if where.product == "qdrant":
            options["versioned"] = True  # an index is always behind an alias
    return open_store(arguments, encoder, **options)


def _write(
    arguments: argparse.Namespace,
    source: FileSource | ImageFolderSource | SpoolSource,
    collection: VDRQdrant | VDRElasticsearch,
) -> int:
    from vdr_db.ingest import Stop, ingest, ingest_versioned, stop_on_signals

    is_versioned = getattr(arguments, "versioned", False)
    if is_versioned and arguments.no_verify:
        raise ConfigError("--versioned is checked before it is used: leave out --no-verify.")
    if arguments.no_ledger and arguments.ledger:
        raise ConfigError("Pass --ledger or --no-ledger, one of the two.")
    ledger = arguments.ledger
    if ledger is None and source.is_rereadable and not arguments.no_ledger:
        ledger = _default_ledger(arguments)
    run = ingest_versioned if is_versioned else ingest
    with stop_on_signals(Stop()) as stop:
        report = run(
            source,
            collection,
            options=_options_of(arguments),
            ledger=ledger,
            quarantine=arguments.quarantine,
            progress=arguments.progress,
            stop=stop,
        )
    return exit_code_of(report, arguments, f"collection {arguments.collection!r}")


def _options_of(arguments: argparse.Namespace) -> IngestOptions:
    from vdr_db.ingest import IngestOptions

    skip = "existing" if arguments.skip_existing else None
    return IngestOptions(
        passages=passages_of(arguments),
        skip="unchanged" if arguments.skip_unchanged else skip,  # type: ignore[arg-type]
        empty=getattr(arguments, "empty", "store"),
        writers=arguments.writers,
        batch_documents=arguments.batch,
        queue_bytes=arguments.queue_mib * _MIB,
        max_errors=arguments.max_errors,
        is_verified=not arguments.no_verify,
        restart=arguments.restart,
    )


def _default_ledger(arguments: argparse.Namespace) -> str:
    """Beside the folder of an embedded store, else in the working folder; one for each slice."""
    from vdr_db.ingest import Slice

    if not parse_address(arguments.store).is_embedded:
        # A name may hold anything; a path separator in it must not lead elsewhere.
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in arguments.collection)
        stem = Path(name.lstrip(".") or "collection")
    else:
        stem = Path(arguments.store)
    slice = Slice.parse(arguments.slice)
    part = "" if slice.n == 1 else f".{slice.k}-of-{slice.n}"
    # Texts and images may go into one collection, and a ledger belongs to one input.
    kind = "" if getattr(arguments, "images", None) is None else ".images"
    return str(stem.with_name(f"{stem.name}{kind}{part}.ledger"))
