"""`vdr-db search`: what matches a query, and which words made it match."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdr_db.cli.images import (
    Drawing,
    add_thumbnail_option,
    draw,
    picture_of,
    terminal_canvas,
)
from vdr_db.cli.options import (
    add_model_options,
    add_store_options,
    load_cross_modal,
    load_model,
)
from vdr_db.cli.show import HitView, show_hits, show_json
from vdr_db.errors import ConfigError, StoreUnavailable, require
from vdr_db.explain.words import shared_words, shares_of

if TYPE_CHECKING:
    from vdr_db.connectors import VDRQdrant
    from vdr_db.connectors.collections.collection import Mode
    from vdr_db.encoders.cross_modal import CrossModalEncoder
    from vdr_db.encoders.text import SparseEncoder
    from vdr_db.sparse import SparseRows

__all__ = [
    "add_search_arguments",
    "find",
    "is_url",
    "open_with_model",
    "opened",
    "place_of",
    "run_search",
]


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
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
    add_thumbnail_option(parser)
    parser.add_argument(
        "--mode",
        choices=["full", "alpha", "beta"],
        help="full: the model reads query and texts (default); alpha: the query's tokens are taken "
        "as they are; beta: the texts' are (default for a collection indexed with --tokens)",
    )


def is_url(store: str) -> bool:
    """Whether `--store` names a server, not a folder."""
    return store.startswith(("http://", "https://"))


def place_of(store: str) -> dict[str, Any]:
    """Where `VDRQdrant` finds the store of `--store`."""
    return {"url" if is_url(store) else "path": store}


def opened(
    arguments: argparse.Namespace, *, encoder: SparseEncoder | CrossModalEncoder | None
) -> VDRQdrant:
    """The collection of `--store` and `--collection`, which must be there.

    Raises:
        StoreUnavailable: There is no such folder or collection, or the server does not answer.
        StoreMismatch: It was made with another model.
    """
    from vdr_db.connectors import VDRQdrant

    store, name = arguments.store, arguments.collection
    if not is_url(store) and not Path(store).exists():
        raise StoreUnavailable(f"There is no store at {store}; make one with `vdr-db index`.")
    collection = VDRQdrant(name, encoder, **place_of(store))
    if collection.store.width is None:
        collection.close()
        raise StoreUnavailable(
            f"{store} holds no collection {name!r}; make it with `vdr-db index`, or name another."
        )
    return collection


def open_with_model(arguments: argparse.Namespace) -> tuple[VDRQdrant, SparseEncoder]:
    """The collection, and the model of `--model` or else the one it was made with.

    Where that reads images too, the collection has the whole of it, and its text side comes here.
    """
    with opened(arguments, encoder=None) as collection:
        stamp = collection.store.stamp
    made_with = stamp.model if stamp else None
    reads_images = stamp is not None and stamp.head.endswith("+image")
    if reads_images:
        both = load_cross_modal(arguments, name=made_with)
        return opened(arguments, encoder=both), both.text
    encoder = load_model(arguments, name=made_with)
    return opened(arguments, encoder=encoder), encoder


def run_search(arguments: argparse.Namespace) -> int:
    """Carries out `vdr-db search`; 1 when no query found anything."""
    from vdr_db.cli.main import DONE, NOTHING_FOUND

    if not arguments.queries and not arguments.image:
        raise ConfigError("Pass what to look for: QUERY or --image FILE.")
    if not arguments.json:
        require("rich", "cli")
    keep = _parsed_filter(arguments.filter)
    any_found = False
    collection, encoder = open_with_model(arguments)
    with collection:
        texts = collection.count()
        for query in [*arguments.queries, *map(Path, arguments.image)]:
            hits = find(
                collection,
                encoder,
                query,
                limit=arguments.limit,
                filter=keep,
                mode=arguments.mode if isinstance(query, str) else None,
            )
            any_found = any_found or bool(hits)
            if arguments.json:
                found = [{**asdict(view), "payload": payload} for view, payload in hits]
                for hit in found:
                    hit.pop("title"), hit.pop("text")
                show_json({"query": str(query), "hits": found})
                continue
            caption = f"{len(hits)} best of {texts:,}"
            drawings = [] if arguments.no_thumbnails else _drawings(payload for _, payload in hits)
            views = [view for view, _ in hits]
            show_hits(views, title=str(query), caption=caption, drawings=drawings)
    return DONE if any_found else NOTHING_FOUND


def find(
    collection: VDRQdrant,
    encoder: SparseEncoder,
    query: str | Path,
    *,
    limit: int,
    filter: Any = None,
    mode: Mode | None = None,
) -> list[tuple[HitView, dict[str, Any]]]:
    """Hits of one query with the words that matched, and their payloads.

    Args:
        collection: Where to search.
        encoder: The collection's, of texts.
        query: What to look for: a text, or the path of an image.
        limit: Hits at most.
        filter: On the payload.
        mode: How the query is represented; None for the collection's usual one.
    """
    row = _query_row(collection, encoder, query, mode)
    hits = collection.search(row, limit=limit, filter=filter, mode=mode)
    records = {
        record.id: record for record in collection.get([hit.id for hit in hits], with_rows=True)
    }
    asked = [query] if isinstance(query, str) else []
    views = []
    for hit in hits:
        payload = dict(hit.payload)
        body = str(payload.get("text") or "")
        title = str(payload.get("title") or payload.get("image") or "")
        found = records[hit.id].row if hit.id in records else None
        words = shared_words(encoder, [*asked, body], shares_of(row, found))
        views.append((HitView(hit.id, hit.score, title, body, words), payload))
    return views


def _drawings(payloads: Iterable[Mapping[str, Any]]) -> list[Drawing | None]:
    """A picture of each hit that is an image, where the terminal can show one."""
    canvas = terminal_canvas()
    if canvas is None:
        return []
    pictures = [picture_of(payload) for payload in payloads]
    return [None if picture is None else draw(canvas, picture) for picture in pictures]


def _query_row(
    collection: VDRQdrant,
    encoder: SparseEncoder,
    query: str | Path,
    mode: Mode | None,
) -> SparseRows:
    if isinstance(query, Path):
        return collection.encode_query_image(query)
    return encoder.bag_of_tokens([query]) if mode == "alpha" else encoder.encode_queries([query])


def _parsed_filter(given: str | None) -> Any:
    if given is None:
        return None
    try:
        return json.loads(given)
    except ValueError as error:
        raise ConfigError(f"--filter must be JSON, got {given!r}: {error}.") from error
