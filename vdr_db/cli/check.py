"""`vdr-db check`: whether a store or a spool still holds what was put in."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from vdr_db.cli.exits import DONE, STORE_FAILED
from vdr_db.cli.options import add_collection_options
from vdr_db.cli.show import show_json
from vdr_db.cli.stores import opened
from vdr_db.errors import StoreError, StoreUnavailable

if TYPE_CHECKING:
    from vdr_db.ingest.checking import CheckReport

__all__ = ["add_arguments", "run_command"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `check`."""
    parser.add_argument(
        "store", metavar="STORE", help="address of a store, or the folder of a spool"
    )
    add_collection_options(parser)
    parser.add_argument(
        "--ledger",
        metavar="FILE",
        help="of the ingest that wrote it: compares counts and rows with what was acknowledged",
    )
    parser.add_argument(
        "--remove-leftovers",
        action="store_true",
        help="delete what killed rebuilds left; on Qdrant, run no rebuild elsewhere meanwhile",
    )


def run_command(arguments: argparse.Namespace) -> int:
    """Carries out `vdr-db check`; 3 when something is wrong."""
    from vdr_db.ingest.checking import (
        CheckReport,
        check_files,
        check_spool,
        check_store,
        is_spool,
    )

    report, place = CheckReport(), Path(arguments.store)
    if is_spool(place):
        report = check_spool(place)
    else:
        expected = check_files(place, report) if place.is_dir() else None
        if not report.problems:
            try:
                with opened(arguments) as collection:
                    check_store(
                        collection.store,
                        report,
                        expected=expected,
                        ledger=arguments.ledger,
                        remove_leftovers=arguments.remove_leftovers,
                    )
            except StoreUnavailable:
                raise
            except StoreError as error:
                report.problems.append(str(error))
    if arguments.json:
        show_json(asdict(report))
    else:
        _show(report)
    return STORE_FAILED if report.problems else DONE


def _show(report: CheckReport) -> None:
    lines = [f"{report.rows:,} documents, {report.checked:,} checked"]
    lines += [f"note: {one}" for one in report.remarks]
    lines += [
        f"{'removed' if name in report.removed else 'left over'}: {name}, {why}"
        for name, why in report.leftovers.items()
    ]
    if report.leftovers and not report.removed:
        lines.append("--remove-leftovers deletes what is left over")
    lines += [f"damaged: {one}" for one in report.problems]
    if report.problems:
        lines.append("restore it from a backup, or build it again")
    sys.stdout.write("\n".join(lines) + "\n")
