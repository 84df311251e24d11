"""`vdr-db search` and `vdr-db explain`: what matches a query, and which words made it match."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdr_db.cli_model import add_model_options, add_store_options, load_model
from vdr_db.cli_show import HitView, show_explanation, show_hits, show_json
from vdr_db.errors import ConfigError, InputError, StoreUnavailable, require

if TYPE_CHECKING:
    from vdr_db.connectors import VDRQdrant
    from vdr_db.connectors.collection import Mode
    from vdr_db.encoder import SparseEncoder
    from vdr_db.vocabulary import Vocabulary

__all__ = [
    "add_explain_arguments",
    "add_search_arguments",
    "find",
    "is_url",
    "matched_words",
    "open_with_model",
    "opened",
    "place_of",
    "run_explain",
    "run_search",
]


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `search`."""
    parser.add_argument("queries", nargs="+", metavar="QUERY", help="what to look for")
    add_store_options(parser)
    add_model_options(parser, default=None)
    parser.add_argument("--limit", type=int, default=5, help="hits per query (default: 5)")
    parser.add_argument(
        "--filter", metavar="JSON", help="""on the payload, such as '{"section": "games"}'"""
    )
    parser.add_argument(
        "--mode",
        choices=["full", "alpha", "beta"],
        help="full: the model reads query and texts (default); alpha: the query's tokens are taken "
        "as they are; beta: the texts' are (default for a collection indexed with --tokens)",
    )


def add_explain_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `explain`."""
    parser.add_argument("query", metavar="QUERY")
    parser.add_argument("id", metavar="ID", help="id of the text")
    add_store_options(parser)
    add_model_options(parser, default=None)


def is_url(store: str) -> bool:
    """Whether `--store` names a server, not a folder."""
    return store.startswith(("http://", "https://"))


def place_of(store: str) -> dict[str, Any]:
    """Where `VDRQdrant` finds the store of `--store`."""
    return {"url" if is_url(store) else "path": store}


def opened(arguments: argparse.Namespace, *, encoder: SparseEncoder | None) -> VDRQdrant:
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
    """The collection, and the model of `--model` or else the one it was made with."""
    made_with = None
    if arguments.model is None:
        with opened(arguments, encoder=None) as collection:
            stamp = collection.store.stamp
            made_with = stamp.model if stamp else None
    encoder = load_model(arguments, name=made_with)
    return opened(arguments, encoder=encoder), encoder


def run_search(arguments: argparse.Namespace) -> int:
    """Carries out `vdr-db search`; 1 when no query found anything."""
    from vdr_db.cli import DONE, NOTHING_FOUND

    if not arguments.json:
        require("rich", "cli")
    keep = _parsed_filter(arguments.filter)
    any_found = False
    collection, encoder = open_with_model(arguments)
    with collection:
        texts = collection.count()
        for query in arguments.queries:
            hits = find(
                collection,
                encoder,
                query,
                limit=arguments.limit,
                filter=keep,
                mode=arguments.mode,
            )
            any_found = any_found or bool(hits)
            if arguments.json:
                found = [{**asdict(view), "payload": payload} for view, payload in hits]
                for hit in found:
                    hit.pop("title"), hit.pop("text")
                show_json({"query": query, "hits": found})
                continue
            caption = f"{len(hits)} best of {texts:,}"
            show_hits([view for view, _ in hits], title=query, caption=caption)
    return DONE if any_found else NOTHING_FOUND


def run_explain(arguments: argparse.Namespace) -> int:
    """Carries out `vdr-db explain`; 1 when query and text share no token."""
    from vdr_db.cli import DONE, NOTHING_FOUND

    if not arguments.json:
        require("rich", "cli")
    collection, _ = open_with_model(arguments)
    with collection:
        id = _known_id(collection, arguments.id)
        terms = collection.explain(arguments.query, id)
    score = sum(term.product for term in terms)
    if arguments.json:
        show_json({"id": id, "score": score, "terms": [asdict(term) for term in terms]})
    else:
        show_explanation(
            [(term.token, term.query_weight, term.document_weight) for term in terms], score
        )
    return DONE if terms else NOTHING_FOUND


def find(
    collection: VDRQdrant,
    encoder: SparseEncoder,
    query: str,
    *,
    limit: int,
    filter: Any = None,
    mode: Mode | None = None,
) -> list[tuple[HitView, dict[str, Any]]]:
    """Hits of one query with the words that matched, and their payloads.

    Args:
        collection: Where to search.
        encoder: The collection's.
        query: What to look for.
        limit: Hits at most.
        filter: On the payload.
        mode: How the query is represented; None for the collection's usual one.
    """
    encode = encoder.bag_of_tokens if mode == "alpha" else encoder.encode_queries
    row = encode([query])
    hits = collection.search(row, limit=limit, filter=filter, mode=mode)
    records = {
        record.id: record for record in collection.get([hit.id for hit in hits], with_rows=True)
    }
    own = encoder.token_ids(query)
    wanted = row.to_dicts()[0]
    views = []
    for hit in hits:
        payload = dict(hit.payload)
        title, body = str(payload.get("title") or ""), str(payload.get("text") or "")
        found = records[hit.id].row if hit.id in records else None
        weights = found.to_dicts()[0] if found is not None else {}
        products = {id: wanted[id] * weights[id] for id in wanted.keys() & weights.keys()}
        words = matched_words(encoder.vocabulary, [*own, *encoder.token_ids(body)], products)
        views.append((HitView(hit.id, hit.score, title, body, words), payload))
    return views


def matched_words(
    vocabulary: Vocabulary, text_ids: Sequence[int], products: Mapping[int, float]
) -> list[tuple[str, float]]:
    """Words both sides carry, with their share of the score, heaviest first.

    Pieces become a word only if each of them matched: `cal ##ories` against `cal ##ife` is a match
    of `cal`, not of `calories`.

    Args:
        vocabulary: Of the encoder.
        text_ids: Token ids of the texts whose words are looked for.
        products: Token id -> share of the score.
    """
    # A special token parts what stands left and right of it, as a piece without a match must.
    gap = sorted(vocabulary.special_ids)[:1]
    kept: list[int] = []
    for id in text_ids:
        kept += [id] if id in products else gap
    return vocabulary.merge_word_pieces(kept, products)


def _parsed_filter(given: str | None) -> Any:
    if given is None:
        return None
    try:
        return json.loads(given)
    except ValueError as error:
        raise ConfigError(f"--filter must be JSON, got {given!r}: {error}.") from error


def _known_id(collection: VDRQdrant, given: str) -> int | str:
    """The id as the collection has it: a command line cannot tell 12 from "12"."""
    candidates: Sequence[int | str] = [given]
    if given.isascii() and given.isdigit():
        candidates = [given, int(given)]
    for candidate in candidates:
        if collection.get([candidate]):
            return candidate
    raise InputError(f"The collection holds no text with the id {given!r}.")
