"""`vdr-db search`: what matches a query, and which words made it match."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vdr_db.cli.exits import DONE, NOTHING_FOUND
from vdr_db.cli.images import can_show_images, half_blocks, small_image
from vdr_db.cli.options import MODES, add_model_options, add_store_options, add_thumbnail_option
from vdr_db.cli.show import show_hits, show_json
from vdr_db.cli.stores import open_with_model
from vdr_db.errors import ConfigError, require

__all__ = ["add_arguments", "run_command"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `search`."""
    parser.add_argument("queries", nargs="*", metavar="QUERY", help="what to look for")
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="an image to look for, may be repeated; for collections of a model that reads images",
    )
    add_store_options(parser)
    add_model_options(parser, default=None)
    parser.add_argument("--limit", type=int, default=5, help="hits per query (default: 5)")
    parser.add_argument(
        "--filter", metavar="JSON", help="""on the payload, such as '{"section": "games"}'"""
    )
    parser.add_argument("--min-score", type=float, metavar="S", help="leave out weaker hits")
    add_thumbnail_option(parser)
    parser.add_argument(
        "--mode",
        choices=MODES,
        help="full: the model reads query and texts (default); alpha: the query's tokens are taken "
        "as they are; beta: the texts' are (default for a collection indexed with --tokens)",
    )


def run_command(arguments: argparse.Namespace) -> int:
    """Carries out `vdr-db search`; 1 when no query found anything."""
    from vdr_db.explain.hits import find_hits

    if not arguments.queries and not arguments.image:
        raise ConfigError("Pass what to look for: QUERY or --image FILE.")
    if not arguments.json:
        require("rich", "cli")
    keep = _parsed_filter(arguments.filter)
    any_found = False
    collection, encoder = open_with_model(arguments, texts_only=True)
    with collection:
        texts = collection.count()
        for query in [*arguments.queries, *map(Path, arguments.image)]:
            hits = find_hits(
                collection,
                encoder,
                query,
                limit=arguments.limit,
                filter=keep,
                mode=arguments.mode if isinstance(query, str) else None,
                min_score=arguments.min_score,
            )
            any_found = any_found or bool(hits)
            if arguments.json:
                found = [
                    {
                        "id": hit.id,
                        "score": hit.score,
                        "words": hit.words,
                        "payload": hit.payload,
                        **({} if hit.passage is None else {"passage": asdict(hit.passage)}),
                    }
                    for hit in hits
                ]
                show_json({"query": str(query), "hits": found})
                continue
            images = []
            if not arguments.no_thumbnails and can_show_images():
                small = [small_image(hit.payload) for hit in hits]
                images = [None if image is None else half_blocks(image) for image in small]
            caption = f"{len(hits)} best of {texts:,}"
            show_hits(hits, title=str(query), caption=caption, images=images)
    return DONE if any_found else NOTHING_FOUND


def _parsed_filter(given: str | None) -> Any:
    if given is None:
        return None
    try:
        return json.loads(given)
    except ValueError as error:
        raise ConfigError(f"--filter must be JSON, got {given!r}: {error}.") from error
