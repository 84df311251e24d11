"""`vdr-db ingest` and `load`, and `encode --spool`: large inputs, resumed after any kill."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdr_db.cli.options import (
    DEFAULT_MODEL,
    add_field_options,
    add_model_options,
    add_store_options,
)
from vdr_db.cli.show import say, show_json
from vdr_db.cli.source import add_image_options, open_source
from vdr_db.errors import ConfigError

if TYPE_CHECKING:
    from vdr_db.connectors.base import Documents
    from vdr_db.connectors.collections.vdr_qdrant import VDRQdrant
    from vdr_db.ingest import IngestOptions, IngestReport

__all__ = [
    "add_ingest_arguments",
    "add_load_arguments",
    "add_spool_arguments",
    "run_ingest",
    "run_load",
    "run_spool",
    "say_truncated",
]

_KEY_VARIABLE = "VDR_DB_API_KEY"
_MIB = 1 << 20


def add_ingest_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `ingest`."""
    parser.add_argument(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="JSONL, CSV, TSV, text (.gz too) or Parquet file, folder of such, BEIR folder, or - ",
    )
    add_image_options(parser)
    add_store_options(parser)
    add_field_options(parser)
    add_model_options(parser, default=DEFAULT_MODEL)
    _add_slice(parser)
    _add_writing_options(parser)
    parser.add_argument(
        "--tokens", action="store_true", help="keep tokens, do not run the model (mode beta)"
    )
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
    _add_slice(parser)
    _add_writing_options(parser)
    parser.add_argument(
        "--partial", action="store_true", help="load finished slices although others are missing"
    )


def add_spool_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that turn `encode` into the writer of a spool."""
    group = parser.add_argument_group(
        "spool", "encode files (named in place of texts), or images, for a later `vdr-db load`"
    )
    add_image_options(group)
    group.add_argument("--spool", metavar="FOLDER", help="write Parquet parts there; resumes")
    _add_slice(group)
    group.add_argument(
        "--part-rows", type=int, default=65536, metavar="N", help="rows of a part (default: 65536)"
    )
    group.add_argument("--restart", action="store_true", help="encode this slice from its start")
    group.add_argument("--max-errors", type=int, metavar="N", help=_MAX_ERRORS_HELP)
    group.add_argument("--progress", choices=["auto", "bar", "log", "json", "none"], default="auto")


_MAX_ERRORS_HELP = "refused documents that are too many (default: 100, or 1 %% of the input)"


def _add_slice(parser: Any) -> None:
    parser.add_argument(
        "--slice",
        default="0/1",
        metavar="K/N",
        help="take part K of N, from 0; auto: from torchrun's or SLURM's environment",
    )


def _add_writing_options(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("--max-errors", type=int, metavar="N", help=_MAX_ERRORS_HELP)
    parser.add_argument("--no-verify", action="store_true", help="skip the checks at the end")
    parser.add_argument(
        "--progress", choices=["auto", "bar", "log", "json", "none"], default="auto"
    )
    parser.add_argument(
        "--api-key-env",
        default=_KEY_VARIABLE,
        metavar="NAME",
        help=f"environment variable that holds the key of a server (default: {_KEY_VARIABLE})",
    )


def run_ingest(arguments: argparse.Namespace) -> int:
    """Carries out `vdr-db ingest`; the same command again resumes."""
    source, encoder = open_source(arguments, arguments.sources, place=_place(arguments))
    with _opened(arguments, encoder) as collection:
        return _write(arguments, source, collection, source.is_rereadable)


def run_load(arguments: argparse.Namespace) -> int:
    """Carries out `vdr-db load`; the same command again resumes."""
    from vdr_db.ingest import Slice, SpoolSource

    source = SpoolSource(
        arguments.spool, slice=Slice.parse(arguments.slice), is_partial=arguments.partial
    )
    with _opened(arguments, None) as collection:
        return _write(arguments, source, collection, True)


def run_spool(arguments: argparse.Namespace) -> int:
    """Carries out `vdr-db encode --spool`; the same command again resumes."""
    from vdr_db.ingest import IngestOptions, Stop, encode_to_spool, stop_on_signals

    paths = [*arguments.texts, *([arguments.input] if arguments.input else [])]
    source, encoder = open_source(arguments, paths)
    options = IngestOptions(restart=arguments.restart, max_errors=arguments.max_errors)
    with stop_on_signals(Stop()) as stop:
        report = encode_to_spool(
            source,
            arguments.spool,
            encoder=encoder,
            options=options,
            part_rows=arguments.part_rows,
            progress=arguments.progress,
            stop=stop,
        )
    return _told(arguments, report, f"spool {arguments.spool}, slice {source.slice}")


def _place(arguments: argparse.Namespace) -> dict[str, Any]:
    from vdr_db.cli.search import is_url

    if not is_url(arguments.store):
        return {"path": arguments.store}
    return {"url": arguments.store, "api_key": os.environ.get(arguments.api_key_env)}


def _opened(arguments: argparse.Namespace, encoder: Any) -> VDRQdrant:
    from vdr_db.connectors.collections.vdr_qdrant import VDRQdrant

    documents: Documents | None = "tokens" if getattr(arguments, "tokens", False) else None
    options: dict[str, Any] = {"versioned": True} if getattr(arguments, "versioned", False) else {}
    return VDRQdrant(
        arguments.collection, encoder, documents=documents, **_place(arguments), **options
    )


def _write(
    arguments: argparse.Namespace, source: Any, collection: VDRQdrant, can_resume: bool
) -> int:
    from vdr_db.ingest import Stop, ingest, stop_on_signals

    if getattr(arguments, "versioned", False):
        return _write_version(arguments, source, collection)
    if arguments.no_ledger and arguments.ledger:
        raise ConfigError("Pass --ledger or --no-ledger, one of the two.")
    ledger = arguments.ledger
    if ledger is None and can_resume and not arguments.no_ledger:
        ledger = _default_ledger(arguments)
    with stop_on_signals(Stop()) as stop:
        report = ingest(
            source,
            collection,
            options=_options_of(arguments),
            ledger=ledger,
            quarantine=arguments.quarantine,
            progress=arguments.progress,
            stop=stop,
        )
    return _told(arguments, report, f"collection {arguments.collection!r}")


def _write_version(arguments: argparse.Namespace, source: Any, collection: VDRQdrant) -> int:
    from vdr_db.ingest import Stop, ingest_versioned, stop_on_signals

    if arguments.ledger or arguments.restart or arguments.no_verify:
        raise ConfigError(
            "--versioned begins anew every time and is checked: leave out --ledger, --restart and "
            "--no-verify."
        )
    with stop_on_signals(Stop()) as stop:
        report = ingest_versioned(
            source,
            collection,
            options=_options_of(arguments),
            quarantine=arguments.quarantine,
            progress=arguments.progress,
            stop=stop,
        )
    return _told(arguments, report, f"collection {arguments.collection!r}")


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
    from vdr_db.cli.search import is_url
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


def _told(arguments: argparse.Namespace, report: IngestReport, where: str) -> int:
    """Shows the report; the exit code."""
    from vdr_db.cli.main import DONE, INTERRUPTED, STORE_FAILED

    totals = report.totals
    what = _what(arguments)
    if arguments.json:
        show_json(report.to_dict())
    skipped = totals.resumed + totals.existing + totals.unchanged
    say(
        f"{where}: {totals.acknowledged:,} {what} written in {report.seconds['total']:.1f} s "
        f"({report.documents_per_second:,.0f}/s), {skipped:,} skipped, "
        f"{totals.refused:,} refused, {totals.retries:,} retries"
    )
    for reason, count in list(report.reasons.items())[:5]:
        say(f"  refused {count:,}: {reason}")
    if totals.refused and report.quarantine:
        say(f"  all refused {what}: {report.quarantine}")
    say_truncated(totals.truncated)
    if report.verification is not None:
        for problem in report.verification.problems:
            say(f"  check failed: {problem}")
    if report.is_interrupted and getattr(arguments, "versioned", False):
        say("vdr-db: stopped; what was there before is in use as it was")
        return INTERRUPTED
    if report.is_interrupted:
        say(f"vdr-db: stopped, nothing written is lost; go on with: {_resume_command()}")
        return INTERRUPTED
    is_verified = report.verification is None or report.verification.is_passed
    return DONE if is_verified and not totals.refused else STORE_FAILED


def _what(arguments: argparse.Namespace) -> str:
    if not hasattr(arguments, "images"):
        return "documents"  # a spool may hold either
    return "texts" if arguments.images is None else "images"


def say_truncated(count: int) -> None:
    """Says once, at the end of a command, how many texts were longer than the model reads."""
    if count:
        say(f"{count:,} texts were longer than the model reads and were cut (--max-length)")


def _resume_command() -> str:
    """This command without --restart, which would begin again, and without secrets."""
    from vdr_db.connectors.failures import redact

    words = [word for word in sys.argv[1:] if word != "--restart"]
    return redact(shlex.join(["vdr-db", *words]))
