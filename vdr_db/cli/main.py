"""`vdr-db`: texts to vectors to a store, asked, explained and checked; `COMMANDS` lists them.

Results go to stdout (`--json`: one JSON object a line), progress and remarks to stderr.

Exit codes: 0 done; 1 nothing was found; 2 wrong use, input or model; 3 the store failed or refused
something; 4 an optional package is missing; 70 a fault of ours; 130 stopped by Ctrl-C; 141 the
reader of the output has gone. `--debug` shows the traceback of an error.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from vdr_db.cli.exits import (
    EXTRA_MISSING,
    FAULT_OF_OURS,
    INTERRUPTED,
    OUTPUT_CLOSED,
    STORE_FAILED,
    WRONG_INPUT,
)
from vdr_db.cli.show import say, show_log
from vdr_db.errors import MissingExtraError, StoreError, VdrError
from vdr_db.version import __version__

__all__ = ["COMMANDS", "main", "make_parser"]


@dataclass(frozen=True)
class Command:
    """A command; its file is imported when it is asked for.

    Attributes:
        summary: What it is for.
        module: Its file, in `vdr_db.cli`.
        arguments: The function there that adds its options to a parser.
        function: The one that carries it out and returns the exit code.
    """

    summary: str
    module: str
    arguments: str = "add_arguments"
    function: str = "run_command"

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Adds its options; `run` of what the parser gives carries it out."""
        place: Any = import_module(f"vdr_db.cli.{self.module}")
        getattr(place, self.arguments)(parser)
        parser.set_defaults(run=getattr(place, self.function))


COMMANDS = {
    "encode": Command("texts to sparse vectors", "encode"),
    "index": Command(
        "texts or images to a searchable collection", "ingest", "add_index_arguments", "run_index"
    ),
    "ingest": Command(
        "large inputs to a collection, resumed after any kill",
        "ingest",
        "add_ingest_arguments",
        "run_ingest",
    ),
    "load": Command(
        "what `encode --spool` wrote, to a collection", "ingest", "add_load_arguments", "run_load"
    ),
    "search": Command("the texts of a collection that match a query, and why", "search"),
    "explain": Command(
        "why a document matches a query, or what a text or an image says as words", "explain"
    ),
    "serve": Command("a collection as a web page and a JSON API", "serve"),
    "evaluate": Command(
        "nDCG, recall and MRR of a model on a BEIR folder, BM25 beside it", "evaluate"
    ),
    "train": Command(
        "a model from a configuration: CPU, GPU, or several with torchrun",
        "train",
        "add_train_arguments",
        "run_train",
    ),
    "mine": Command(
        "hard negatives for training examples", "train", "add_mine_arguments", "run_mine"
    ),
    "export": Command("a model folder that runs without torch", "export"),
    "check": Command("whether a store or a spool still holds what was put in", "check"),
    "info": Command("versions, device, and what a model or a collection is", "info"),
    "demo": Command("real documents, real queries, measured: see it work", "demo"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command of `argv`, or of the process's own arguments; returns the exit code."""
    _replace_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without these letters shows "?"
    debug = False
    try:
        try:
            given = sys.argv[1:] if argv is None else argv
            asked = next((one for one in given if not one.startswith("-")), "")
            arguments = make_parser(asked).parse_args(given)
        finally:
            sys.stdout.flush()  # of `--help`, whose reader may have gone
        debug = arguments.debug
        if getattr(arguments, "progress", None) in ("auto", "log"):
            show_log("vdr_db.ingest")
        with warnings.catch_warnings():
            warnings.filterwarnings("default", category=UserWarning)
            warnings.showwarning = _show_warning
            code: int = arguments.run(arguments)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        say("vdr-db: stopped")
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more on exit; give it somewhere to flush to.
        if not isinstance(sys.stdout, _ClosedOutput):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OUTPUT_CLOSED
    except (VdrError, OSError) as error:
        if debug:
            raise
        say(f"vdr-db: {error}")
        if isinstance(error, MissingExtraError):
            return EXTRA_MISSING
        return STORE_FAILED if isinstance(error, StoreError) else WRONG_INPUT
    except Exception as error:
        if debug:
            raise
        told = "".join(traceback.format_exception(error)).rstrip()
        say(
            f"{told}\nvdr-db: this is a fault of vdr-db {__version__}, not of yours: please report "
            "it with the lines above and the command."
        )
        return FAULT_OF_OURS


def make_parser(asked: str) -> argparse.ArgumentParser:
    """The parser of all commands, with the options of the one that is asked for.

    `run` of its result carries the command out.
    """
    parser = argparse.ArgumentParser(
        prog="vdr-db",
        description="Learned sparse retrieval: text to weighted words to an index that says why.",
        epilog="Exit codes: 0 done, 1 nothing found, 2 wrong use or input, 3 store, "
        "4 missing package, 70 a fault of vdr-db, 130 stopped.",
    )
    parser.add_argument("--version", action="version", version=f"vdr-db {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=command.summary, description=f"{command.summary}.")
        if name == asked:
            command.add_to(own)
        own.add_argument("--json", action="store_true", help="one JSON object a line")
        own.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


class _ClosedOutput(io.StringIO):
    """Stands for a standard output that was closed: its reader has gone from the start."""

    def write(self, text: str, /) -> int:
        raise BrokenPipeError


def _replace_closed_streams() -> None:
    """Lets commands run whose standard streams the caller has closed (`2>&-`).

    The descriptors are opened again first, or the next file would get their numbers and with them
    what is written to stderr.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = _ClosedOutput()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, until the end


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    say(f"vdr-db: {message}")


if __name__ == "__main__":
    sys.exit(main())
