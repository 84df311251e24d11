"""`vdr-db`: encode, index, ingest, load, search, explain, serve, evaluate, info, demo.

Results go to stdout (`--json`: one JSON object a line), progress and remarks to stderr.

Exit codes: 0 done; 1 nothing was found; 2 wrong use, input or model; 3 the store failed or refused
something; 4 an optional package is missing; 130 stopped by Ctrl-C; 141 the reader of the output has
gone. `--debug` shows the traceback of an error.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from vdr_db.cli.show import say
from vdr_db.errors import MissingExtraError, StoreError, VdrError
from vdr_db.version import __version__

__all__ = ["main"]

DONE, NOTHING_FOUND, WRONG_INPUT, STORE_FAILED, EXTRA_MISSING = range(5)
INTERRUPTED, OUTPUT_CLOSED = 130, 141

COMMANDS = {
    "encode": "texts to sparse vectors",
    "index": "texts or images to a searchable collection",
    "ingest": "large inputs to a collection, resumed after any kill",
    "load": "what `encode --spool` wrote, to a collection",
    "search": "the texts of a collection that match a query, and why",
    "explain": "why a document matches a query, or what a text or an image says as words",
    "serve": "a collection as a web page and a JSON API",
    "evaluate": "nDCG, recall and MRR of a model on a BEIR folder, BM25 beside it",
    "train": "a model from a configuration: CPU, GPU, or several with torchrun",
    "mine": "hard negatives for training examples",
    "info": "versions, device, and what a model or a collection is",
    "demo": "1,500 real documents, real queries, measured: see it work",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments after the program's name; None takes the process's own.

    Returns:
        The exit code, see above.
    """
    arguments = make_parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without these letters shows "?"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("default", category=UserWarning, module=r"vdr_db\.")
            warnings.showwarning = _show_warning
            code: int = arguments.run(arguments)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        say("vdr-db: stopped")
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more on exit; give it somewhere to flush to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OUTPUT_CLOSED
    except (VdrError, OSError) as error:
        if arguments.debug:
            raise
        say(f"vdr-db: {error}")
        if isinstance(error, MissingExtraError):
            return EXTRA_MISSING
        return STORE_FAILED if isinstance(error, StoreError) else WRONG_INPUT


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `run` of its result carries the command out."""
    from vdr_db.cli import (
        demo,
        encode,
        evaluate,
        explain,
        index,
        info,
        ingest,
        search,
        serve,
        train,
    )

    parser = argparse.ArgumentParser(
        prog="vdr-db",
        description="Learned sparse retrieval: text to weighted words to an index that says why.",
        epilog="Exit codes: 0 done, 1 nothing found, 2 wrong use or input, 3 store, "
        "4 missing package, 130 stopped.",
    )
    parser.add_argument("--version", action="version", version=f"vdr-db {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    parts: dict[
        str,
        tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]],
    ] = {
        "encode": (encode.add_arguments, encode.run_command),
        "index": (index.add_arguments, index.run_command),
        "ingest": (ingest.add_ingest_arguments, ingest.run_ingest),
        "load": (ingest.add_load_arguments, ingest.run_load),
        "search": (search.add_search_arguments, search.run_search),
        "explain": (explain.add_arguments, explain.run_command),
        "serve": (serve.add_arguments, serve.run_command),
        "evaluate": (evaluate.add_arguments, evaluate.run_command),
        "train": (train.add_train_arguments, train.run_train),
        "mine": (train.add_mine_arguments, train.run_mine),
        "info": (info.add_arguments, info.run_command),
        "demo": (demo.add_arguments, demo.run_command),
    }
    for name, (add_arguments, run) in parts.items():
        command = commands.add_parser(name, help=COMMANDS[name], description=COMMANDS[name] + ".")
        add_arguments(command)
        command.add_argument("--json", action="store_true", help="one JSON object a line")
        command.add_argument("--debug", action="store_true", help="show tracebacks")
        command.set_defaults(run=run)
    return parser


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    say(f"vdr-db: {message}")


if __name__ == "__main__":
    sys.exit(main())
