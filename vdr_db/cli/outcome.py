"""The end of a resumable run, as people see it: counts, refusals, checks, and how to go on."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import TYPE_CHECKING

from vdr_db.cli.exits import DONE, INTERRUPTED, STORE_FAILED
from vdr_db.cli.show import say, say_truncated, show_json

if TYPE_CHECKING:
    from vdr_db.ingest import IngestReport

__all__ = ["exit_code_of"]


def exit_code_of(report: IngestReport, arguments: argparse.Namespace, where: str) -> int:
    """Shows what a run came to; the exit code of its command."""
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
    if report.is_interrupted and report.ledger is None and hasattr(arguments, "ledger"):
        say("vdr-db: stopped without a ledger; the same command begins anew")
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


def _resume_command() -> str:
    """This command without --restart, which would begin again, and without secrets."""
    from vdr_db.connectors.failures import redact

    words = [word for word in sys.argv[1:] if word != "--restart"]
    return redact(shlex.join(["vdr-db", *words]))
