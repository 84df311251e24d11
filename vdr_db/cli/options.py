"""Options that several commands share: model, store, fields, images, slices."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, get_args

from vdr_db.checkpoints.assets import ASSETS, DEFAULT_MODEL, SHIPPED
from vdr_db.errors import ConfigError
from vdr_db.towers.interface import Precision

if TYPE_CHECKING:
    from vdr_db.connectors.collections.collection import Mode
    from vdr_db.connectors.passages import Passages
    from vdr_db.readers import Fields

__all__ = [
    "DEFAULT_COLLECTION",
    "DEFAULT_MODEL",
    "MODES",
    "THUMBNAIL_PX",
    "add_collection_options",
    "add_field_options",
    "add_image_options",
    "add_model_options",
    "add_passage_options",
    "add_run_options",
    "add_store_options",
    "add_thumbnail_option",
    "fields_of",
    "passages_of",
]

DEFAULT_COLLECTION = "texts"

MODES: tuple[Mode, ...] = ("full", "alpha", "beta")
"""How queries and documents are represented."""

THUMBNAIL_PX = 64
"""Longest side of the small copies of `--thumbnails`."""


def add_model_options(
    parser: argparse.ArgumentParser, *, default: str | None, shown: str | None = None
) -> None:
    """What `--model` and others say about it; `shown` tells what no name stands for."""
    shown = shown or default or "the one the collection was made with"
    parser.add_argument(
        "--model",
        default=default,
        metavar="NAME_OR_FOLDER",
        help=f"model folder, hub id, or one of {', '.join([*SHIPPED, *ASSETS])} (default: {shown})",
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="float32",
        help="of the model; lower ones are faster and change vectors a little (default: float32)",
    )
    parser.add_argument(
        "--k", type=int, metavar="N", help="weights kept per text (default: model's)"
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens of a text that are read, special ones included (default: model's)",
    )


def add_store_options(
    parser: argparse.ArgumentParser, *, required: bool = True, otherwise: str = ""
) -> None:
    """`--store`, `--collection` and `--api-key-env`; `otherwise` says what goes without."""
    parser.add_argument(
        "--store",
        required=required,
        metavar="ADDRESS",
        help="folder of an embedded Qdrant (made when missing), http(s)://HOST:PORT of a Qdrant, "
        "elasticsearch+http(s)://HOST:PORT or opensearch+http(s)://HOST:PORT"
        + (f" (default: {otherwise})" if otherwise else ""),
    )
    add_collection_options(parser)


def add_collection_options(parser: argparse.ArgumentParser) -> None:
    """`--collection` and `--api-key-env`."""
    parser.add_argument(
        "--collection",
        metavar="NAME",
        help=f"name of the collection (default: the one a folder holds, else {DEFAULT_COLLECTION})",
    )
    parser.add_argument(
        "--api-key-env",
        metavar="NAME",
        help="environment variable that holds the key of a server (default: VDR_DB_API_KEY, or "
        "that of the store, such as VDR_DB_QDRANT_API_KEY); docs/stores.md has users and TLS",
    )


def add_field_options(parser: argparse.ArgumentParser) -> None:
    """`--format` and the names of fields."""
    parser.add_argument(
        "--format",
        choices=["jsonl", "csv", "tsv", "text", "beir"],
        help="of the input (default: by its name; jsonl for -)",
    )
    parser.add_argument("--id-field", help="field of the id (default: _id or id, else FILE:LINE)")
    parser.add_argument(
        "--text-field",
        action="append",
        default=[],
        help="field of the text, may be repeated (default: title and text)",
    )
    parser.add_argument(
        "--payload-field",
        action="append",
        help="field kept beside the text, may be repeated (default: all)",
    )
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        type=_column,
        metavar="NAME=KIND",
        help="kind of a column of CSV or TSV: int, float, bool or text; may be repeated "
        "(default: what every cell of the file reads as)",
    )
    parser.add_argument(
        "--delimiter",
        metavar="CHARACTER",
        help="between cells of CSV (default: comma, or semicolon or tab where the header has none)",
    )


def fields_of(arguments: argparse.Namespace) -> Fields:
    """The fields that `add_field_options` read."""
    from vdr_db.readers import Fields

    payload = arguments.payload_field
    return Fields(
        id=arguments.id_field,
        text=tuple(arguments.text_field),
        payload=None if payload is None else tuple(payload),
        kinds=tuple(arguments.column),
        delimiter=arguments.delimiter,
    )


def _column(text: str) -> tuple[str, str]:
    from vdr_db.readers import Kind

    name, is_named, kind = text.rpartition("=")
    if not is_named or kind not in get_args(Kind):
        raise argparse.ArgumentTypeError(
            f"expected NAME=KIND with a kind of {', '.join(get_args(Kind))}, got {text!r}"
        )
    return name, kind


def add_image_options(parser: argparse._ActionsContainer) -> None:
    """`--images` and `--thumbnails`."""
    parser.add_argument(
        "--images",
        metavar="FOLDER",
        help="instead of texts, the images in this folder and below; their ids are their paths in "
        "it; a --model must be one that reads images",
    )
    parser.add_argument(
        "--thumbnails",
        action="store_true",
        help=f"keep a small copy of each image ({THUMBNAIL_PX} pixels, about 1.7 KB) beside its "
        "vector, for result pages and terminals where the file is not there",
    )


def add_passage_options(parser: argparse._ActionsContainer) -> None:
    """`--passages` and how they are cut."""
    parser.add_argument(
        "--passages",
        action="store_true",
        help="cut texts into passages, in a collection that is new; the parts of one text are "
        "found, shown and counted as one document",
    )
    parser.add_argument(
        "--passage-tokens",
        type=int,
        metavar="N",
        help="tokens of a passage at most (default: 128)",
    )
    parser.add_argument(
        "--passage-overlap",
        type=int,
        metavar="N",
        help="tokens that neighbours share at most (default: 16)",
    )


def passages_of(arguments: argparse.Namespace) -> Passages | None:
    """The passages that `add_passage_options` read; without options those of the collection."""
    given = {
        "tokens": getattr(arguments, "passage_tokens", None),
        "overlap": getattr(arguments, "passage_overlap", None),
    }
    numbers = {name: number for name, number in given.items() if number is not None}
    if not getattr(arguments, "passages", False):
        if numbers:
            raise ConfigError("--passage-tokens and --passage-overlap go with --passages.")
        return None
    from vdr_db.connectors.passages import Passages

    return Passages(**numbers)


def add_thumbnail_option(parser: argparse.ArgumentParser) -> None:
    """`--no-thumbnails`."""
    parser.add_argument(
        "--no-thumbnails",
        action="store_true",
        help="no small copies of images; they are shown where the terminal can (docs/seeing.md)",
    )


def add_run_options(parser: argparse._ActionsContainer) -> None:
    """`--slice`, `--max-errors` and `--progress` of runs over large inputs."""
    parser.add_argument(
        "--slice",
        default="0/1",
        metavar="K/N",
        help="take part K of N, from 0; auto: from torchrun's or SLURM's environment",
    )
    parser.add_argument(
        "--max-errors",
        type=int,
        metavar="N",
        help="refused documents that are too many (default: 100, or 1 %% of the input)",
    )
    parser.add_argument(
        "--progress", choices=["auto", "bar", "log", "json", "none"], default="auto"
    )
