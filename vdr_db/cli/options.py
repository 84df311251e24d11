"""Options that several commands share (model, store, fields), and what they open."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from vdr_db.checkpoints.assets import ASSETS, DEFAULT_MODEL, SHIPPED
from vdr_db.errors import ConfigError
from vdr_db.readers import Fields

if TYPE_CHECKING:
    from vdr_db.encoders.cross_modal import CrossModalEncoder
    from vdr_db.encoders.text import SparseEncoder

__all__ = [
    "DEFAULT_COLLECTION",
    "DEFAULT_MODEL",
    "add_field_options",
    "add_model_options",
    "add_store_options",
    "fields_of",
    "load_cross_modal",
    "load_model",
]

DEFAULT_COLLECTION = "texts"


def add_model_options(parser: argparse.ArgumentParser, *, default: str | None) -> None:
    """`--model`, `--device`, `--k` and `--max-length`."""
    shown = default or "the one the collection was made with"
    parser.add_argument(
        "--model",
        default=default,
        metavar="NAME_OR_FOLDER",
        help=f"model folder, hub id, or one of {', '.join([*SHIPPED, *ASSETS])} (default: {shown})",
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    parser.add_argument(
        "--k", type=int, metavar="N", help="weights kept per text (default: model's)"
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens of a text that are read, special ones included (default: model's)",
    )


def add_store_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """`--store` and `--collection`."""
    parser.add_argument(
        "--store",
        required=required,
        metavar="FOLDER_OR_URL",
        help="folder of an embedded Qdrant (made when missing), or http(s)://... of a server",
    )
    parser.add_argument(
        "--collection",
        default=DEFAULT_COLLECTION,
        help=f"name of the collection (default: {DEFAULT_COLLECTION}); a folder holds one",
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


def fields_of(arguments: argparse.Namespace) -> Fields:
    """The fields that `add_field_options` read."""
    payload = arguments.payload_field
    return Fields(
        id=arguments.id_field,
        text=tuple(arguments.text_field),
        payload=None if payload is None else tuple(payload),
    )


def load_model(
    arguments: argparse.Namespace, *, name: str | None = None, head: str | None = None
) -> SparseEncoder:
    """The model of `--model`, or `name` where that was not given; `head` for one with a new head.

    Raises:
        ConfigError: The model cannot be found or is damaged.
        MissingExtraError: torch or transformers is not installed.
    """
    from vdr_db import SparseEncoder

    chosen, options = _asked_for(arguments, name)
    return SparseEncoder.from_pretrained(chosen, head=head, **options)


def load_cross_modal(
    arguments: argparse.Namespace, *, name: str | None = None
) -> CrossModalEncoder:
    """The model of texts and images of `--model`, or `name` where that was not given.

    Raises:
        ConfigError: The model cannot be found, is damaged, or reads no images.
        MissingExtraError: torch or transformers is not installed.
    """
    from vdr_db import CrossModalEncoder

    chosen, options = _asked_for(arguments, name)
    encoder = CrossModalEncoder.from_pretrained(chosen, **options)
    encoder.model = encoder.text.model = encoder.image.model = chosen  # not its parts' folders
    return encoder


def _asked_for(arguments: argparse.Namespace, name: str | None) -> tuple[str, dict[str, Any]]:
    """Name or folder of a model, and options for loading it."""
    chosen = arguments.model or name
    if chosen is None:
        raise ConfigError("The collection does not say which model made it; pass --model.")
    options: dict[str, Any] = {"device": arguments.device, "max_length": arguments.max_length}
    if arguments.k is not None:
        options["k"] = arguments.k
    return chosen, options
