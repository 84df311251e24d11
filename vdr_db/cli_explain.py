"""`vdr-db explain`: why a text matches a query, or what the vector of a text says."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from vdr_db.cli_model import DEFAULT_MODEL, add_model_options, add_store_options, load_model
from vdr_db.cli_search import open_with_model
from vdr_db.cli_show import say, show_explanation, show_json, show_vectors
from vdr_db.errors import ConfigError, InputError, require

if TYPE_CHECKING:
    from vdr_db.connectors import VDRQdrant
    from vdr_db.encoder import SparseEncoder
    from vdr_db.explain import Match, Portrait

__all__ = ["add_arguments", "run_command"]

SHOWN_WORDS = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `explain`."""
    parser.add_argument("query", metavar="QUERY", help="or any text, when no ID follows")
    parser.add_argument(
        "id", metavar="ID", nargs="?", help="id of a text of the collection (needs --store)"
    )
    add_store_options(parser, required=False)
    add_model_options(parser, default=None)
    parser.add_argument("--html", metavar="FILE", help="write a report: words, weights, positions")
    parser.add_argument("--png", metavar="FILE", help="write the same as a picture")


def run_command(arguments: argparse.Namespace) -> int:
    """Carries out `vdr-db explain`; 1 when query and text share no token, or there is no weight."""
    if arguments.id is not None and arguments.store is None:
        raise ConfigError("An ID is of a collection; pass --store, or leave the ID out.")
    if not arguments.json:
        require("rich", "cli")
    if arguments.png:
        for module in ("matplotlib", "wordcloud"):
            require(module, "images")
    return _explain_text(arguments) if arguments.id is None else _explain_match(arguments)


def _explain_match(arguments: argparse.Namespace) -> int:
    from vdr_db.cli import DONE, NOTHING_FOUND

    collection, encoder = open_with_model(arguments)
    with collection:
        id = _known_id(collection, arguments.id)
        terms = collection.explain(arguments.query, id)
        if arguments.html or arguments.png:
            from vdr_db.explain import match_of

            match = match_of(collection, encoder, arguments.query, id)
            _write(arguments, match, f"Why {id} matches “{arguments.query}”", encoder)
    score = sum(term.product for term in terms)
    if arguments.json:
        show_json({"id": id, "score": score, "terms": [asdict(term) for term in terms]})
    else:
        show_explanation(
            [(term.token, term.query_weight, term.document_weight) for term in terms], score
        )
    return DONE if terms else NOTHING_FOUND


def _explain_text(arguments: argparse.Namespace) -> int:
    """What a text says on its own, as a document of the collection's model or of the usual one."""
    from vdr_db.cli import DONE, NOTHING_FOUND
    from vdr_db.explain import portrait_of_text

    if arguments.store is None:
        encoder = load_model(arguments, name=DEFAULT_MODEL)
    else:
        collection, encoder = open_with_model(arguments)
        collection.close()
    portrait = portrait_of_text(encoder, arguments.query, heading="text")
    _write(arguments, [portrait], "What the vector says", encoder)
    if arguments.json:
        fired = [
            {"word": place.label, "special": place.is_special, "fires": list(place.words)}
            for place in portrait.fired()
        ]
        show_json({"text": portrait.text, "words": list(portrait.words), "positions": fired})
    else:
        show_vectors([(portrait.text, portrait.words)], SHOWN_WORDS)
    return DONE if portrait.words else NOTHING_FOUND


def _write(
    arguments: argparse.Namespace,
    shown: Match | Sequence[Portrait],
    title: str,
    encoder: SparseEncoder,
) -> None:
    """Writes what `--html` and `--png` ask for."""
    from vdr_db.explain import save_html, save_png

    if arguments.html:
        name = encoder.model or "unnamed"
        save_html(arguments.html, shown, title=title, facts={"model": Path(name).name})
        say(f"{arguments.html}: written")
    if arguments.png:
        save_png(arguments.png, shown, title=title)
        say(f"{arguments.png}: written")


def _known_id(collection: VDRQdrant, given: str) -> int | str:
    """The id as the collection has it: a command line cannot tell 12 from "12"."""
    candidates: Sequence[int | str] = [given]
    if given.isascii() and given.isdigit():
        candidates = [given, int(given)]
    for candidate in candidates:
        if collection.get([candidate]):
            return candidate
    raise InputError(f"The collection holds no text with the id {given!r}.")
