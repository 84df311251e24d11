"""`vdr-db index`, `ingest` and `load`: texts or images to a collection, bad rows told apart.

`ingest` and `load` remember in a ledger what is stored and resume after any kill; `index` is the
same without a ledger, for inputs that are quickly written again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdr_db.cli.exits import DONE, STORE_FAILED
from vdr_db.cli.options import (
    DEFAULT_IMAGE_MODEL,
    DEFAULT_MODEL,
    add_field_options,
    add_image_options,
    add_model_options,
    add_run_options,
    add_store_options,
)
from vdr_db.cli.outcome import exit_code_of
from vdr_db.cli.show import progress, say, say_truncated, show_json
from vdr_db.cli.stores import Place, is_url, open_source, place_of
from vdr_db.errors import ConfigError

if TYPE_CHECKING:
    from tqdm import tqdm

    from vdr_db.connectors.base import Documents
    from vdr_db.connectors.collections.vdr_qdrant import VDRQdrant
    from vdr_db.encoders.cross_modal import CrossModalEncoder
    from vdr_db.encoders.text import SparseEncoder
    from vdr_db.ingest import (
        FileSource,
        ImageFolderSource,
        IngestOptions,
        IngestReport,
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

_KEY_VARIABLE = "VDR_DB_API_KEY"
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
        "one when it is written and checked",
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
        help="JSONL, CSV, TSV, text (.gz too) or Parquet file, folder of such, BEIR folder, or - "
        "for standard input",
    )
    add_image_options(parser)
    add_store_options(parser)
    add_field_options(parser)
    shown = f"{DEFAULT_MODEL}, {DEFAULT_IMAGE_MODEL} with --images"
    add_model_options(parser, default=None, shown=shown)
    parser.add_argument(
        "--tokens",
        action="store_true",
        help="keep the tokens of each text without running the model (search mode beta)",
    )


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
    parser.add_argument(
        "--api-key-env",
        default=_KEY_VARIABLE,
        metavar="NAME",
        help=f"environment variable that holds the key of a server (default: {_KEY_VARIABLE})",
    )


def run_index(arguments: argparse.Namespace) -> int:
    """Carries out `vdr-db index`; documents with known ids are replaced, so it can be repeated."""
    from vdr_db.ingest import IngestOptions, ingest

    place = place_of(arguments.store)
    source, encoder = open_source(arguments, arguments.sources, place=place, unique=True)
    what = "texts" if arguments.images is None else "images"
    # There is no ledger to take up again, so nothing that is wrong with single rows ends the run.
    options = IngestOptions(is_verified=False, max_errors=sys.maxsize)
    start = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(prefix="vdr-db-index-") as scratch,
        _opened(arguments, encoder, place) as collection,
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
    store = arguments.store if is_url(arguments.store) else Path(arguments.store)
    say(
        f"{store}, collection {arguments.collection!r}: {written:,} {what} written in "
        f"{time.perf_counter() - start:.1f} s, {refused:,} refused, {total:,} {in_all} in all"
    )
    say_truncated(report.totals.truncated)
    return STORE_FAILED if refused else DONE


def run_ingest(arguments: argparse.Namespace) -> int:
    """Carries out `vdr-db ingest`; the same command again resumes."""
    place = _place_with_key(arguments)
    source, encoder = open_source(arguments, arguments.sources, place=place)
    with _opened(arguments, encoder, place, versioned=arguments.versioned) as collection:
        return _write(arguments, source, collection)


def run_load(arguments: argparse.Namespace) -> int:
    """Carries out `vdr-db load`; the same command again resumes."""
    from vdr_db.ingest import Slice, SpoolSource

    source = SpoolSource(
        arguments.spool, slice=Slice.parse(arguments.slice), is_partial=arguments.partial
    )
    with _opened(arguments, None, _place_with_key(arguments)) as collection:
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


def _place_with_key(arguments: argparse.Namespace) -> Place:
    place = place_of(arguments.store)
    if "url" in place:
        place["api_key"] = os.environ.get(arguments.api_key_env)
    return place


def _opened(
    arguments: argparse.Namespace,
    encoder: SparseEncoder | CrossModalEncoder | None,
    place: Place,
    *,
    versioned: bool = False,
) -> VDRQdrant:
    from vdr_db.connectors.collections.vdr_qdrant import VDRQdrant

    documents: Documents | None = "tokens" if getattr(arguments, "tokens", False) else None
    options: dict[str, Any] = {"versioned": True} if versioned else {}
    return VDRQdrant(arguments.collection, encoder, documents=documents, **place, **options)


def _write(
    arguments: argparse.Namespace,
    source: FileSource | ImageFolderSource | SpoolSource,
    collection: VDRQdrant,
) -> int:
    from vdr_db.ingest import Stop, ingest, ingest_versioned, stop_on_signals

    is_versioned = getattr(arguments, "versioned", False)
    if is_versioned and (arguments.ledger or arguments.restart or arguments.no_verify):
        raise ConfigError(
            "--versioned begins anew every time and is checked: leave out --ledger, --restart and "
            "--no-verify."
        )
    if arguments.no_ledger and arguments.ledger:
        raise ConfigError("Pass --ledger or --no-ledger, one of the two.")
    run: Callable[..., IngestReport] = ingest_versioned
    if not is_versioned:
        ledger = arguments.ledger
        if ledger is None and source.is_rereadable and not arguments.no_ledger:
            ledger = _default_ledger(arguments)
        run = partial(ingest, ledger=ledger)
    with stop_on_signals(Stop()) as stop:
        report = run(
            source,
            collection,
            options=_options_of(arguments),
            quarantine=arguments.quarantine,
            progress=arguments.progress,
            stop=stop,
        )
    return exit_code_of(report, arguments, f"collection {arguments.collection!r}")


def _options_of(arguments: argparse.Namespace) -> IngestOptions:
    from vdr_db.ingest import IngestOptions

    skip = "existing" if arguments.skip_existing else None
    return IngestOptions(
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

    if is_url(arguments.store):
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
