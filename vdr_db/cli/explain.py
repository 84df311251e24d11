"""`vdr-db explain`: why a document matches a query, or what a text or an image says as words."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from vdr_db.cli.exits import DONE, NOTHING_FOUND
from vdr_db.cli.images import image_payload, show_image
from vdr_db.cli.options import (
    DEFAULT_MODEL,
    add_model_options,
    add_store_options,
    add_thumbnail_option,
)
from vdr_db.cli.show import say, show_explanation, show_json, show_patches, show_vectors
from vdr_db.cli.stores import load_cross_modal, load_model, open_with_model, opened
from vdr_db.errors import ConfigError, InputError, RejectedRows, require

if TYPE_CHECKING:
    from vdr_db.connectors import Collection
    from vdr_db.encoders.cross_modal import CrossModalEncoder
    from vdr_db.encoders.image import ImageEncoder
    from vdr_db.encoders.text import SparseEncoder
    from vdr_db.explain import Explanation, Match

__all__ = ["add_arguments", "run_command"]

SHOWN_WORDS = 30
TOP = 20  # tokens of a match that are shown; the others are summed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `explain`."""
    parser.add_argument(
        "query", metavar="QUERY", nargs="?", help="a query; or any text, when no ID follows"
    )
    parser.add_argument(
        "id", metavar="ID", nargs="?", help="id of a document of the collection (needs --store)"
    )
    parser.add_argument(
        "--image",
        metavar="FILE",
        help="an image: alone, what it says as words; with --store and ID, as the query instead "
        "of QUERY; with QUERY and no --store, why it matches that",
    )
    add_store_options(parser, required=False)
    add_model_options(parser, default=None)
    parser.add_argument(
        "--top",
        type=int,
        default=TOP,
        metavar="N",
        help=f"tokens of a match that are shown, 0 for all (default: {TOP}); --json has all",
    )
    parser.add_argument(
        "--html", metavar="FILE", help="write a report: words, weights, positions or patches"
    )
    parser.add_argument("--png", metavar="FILE", help="write the same as an image")
    add_thumbnail_option(parser)


def run_command(arguments: argparse.Namespace) -> int:
    """Carries out `vdr-db explain`; 1 when the two share no token, or there is no weight."""
    query, id = arguments.query, arguments.id
    if arguments.image is None and query is None:
        raise ConfigError("Pass what to explain: a QUERY or text, or --image FILE.")
    if arguments.image is not None and arguments.store is not None:
        if id is not None:
            raise ConfigError("Pass --image FILE or QUERY as the query for the ID, one of the two.")
        query, id = None, query
    if id is not None and arguments.store is None:
        raise ConfigError("An ID is of a collection; pass --store, or leave the ID out.")
    if not arguments.json:
        require("rich", "cli")
    if arguments.png:
        for module in ("matplotlib", "wordcloud"):
            require(module, "images")
    if arguments.image is None:
        return _explain_text(arguments) if id is None else _explain_match(arguments, query, id)
    if id is not None:
        return _explain_match(arguments, Path(arguments.image), id)
    return _explain_image(arguments) if query is None else _explain_pair(arguments, query)


def _explain_match(arguments: argparse.Namespace, query: str | Path, id: str) -> int:
    """Why a document of a collection matches a text or an image."""
    collection, encoder = open_with_model(arguments)
    with collection:
        if isinstance(query, Path) and not hasattr(collection.encoder, "encode_images"):
            _refuse_text_model(encoder.model)
        known = _known_id(collection, id)
        asked = f"the image {query.name}" if isinstance(query, Path) else f"“{query}”"
        title = f"Why {known} matches {asked}"
        return _show_match(arguments, collection, encoder, query, known, title)


def _explain_pair(arguments: argparse.Namespace, query: str) -> int:
    """Why an image matches a text, without a collection."""
    from vdr_db.connectors import Collection, MemoryStore

    with _naming_the_fix(arguments.model or DEFAULT_MODEL):
        encoder = load_cross_modal(arguments, name=DEFAULT_MODEL)
    file = Path(arguments.image)
    with Collection(MemoryStore(), encoder) as collection:
        try:
            (id,) = collection.add_images([file], ids=[file.name])
        except RejectedRows as error:
            raise InputError(f"The image cannot be read: {error.reasons[0]}.") from error
        title = f"Why {file.name} matches “{query}”"
        return _show_match(arguments, collection, encoder.text, query, id, title)


def _show_match(
    arguments: argparse.Namespace,
    collection: Collection,
    encoder: SparseEncoder,
    query: str | Path,
    id: int | str,
    title: str,
) -> int:
    from vdr_db.explain import match_of, match_of_image

    asked = query if isinstance(query, str) else collection.encode_query_image(query)
    terms = collection.explain(asked, id)
    if arguments.html or arguments.png:
        # Whoever asks with an image has a model of both; that was checked before.
        both = cast("CrossModalEncoder", collection.encoder)
        if isinstance(query, str):
            images: ImageEncoder | None = getattr(both, "image", None)
            match = match_of(collection, encoder, query, id, images=images, open_files=True)
        else:
            match = match_of_image(collection, both, query, id, open_files=True)
        _write(arguments, match, title, encoder.model)
    score = sum(term.product for term in terms)
    own = _own_score(collection, encoder, query, id) if isinstance(query, str) else None
    if arguments.json:
        shares = {} if own is None else {"own": own}
        found = {"id": id, "score": score, **shares, "terms": [asdict(term) for term in terms]}
        show_json(found)
    else:
        if not arguments.no_thumbnails:
            if isinstance(query, Path):
                show_image(image_payload(query))
            show_image(collection.get([id])[0].payload)
        show_explanation(
            [(term.token, term.query_weight, term.document_weight) for term in terms],
            score,
            limit=arguments.top,
            own=own,
        )
    return DONE if terms else NOTHING_FOUND


def _own_score(
    collection: Collection, encoder: SparseEncoder, query: str, id: int | str
) -> float | None:
    """What of the score is that of own words; None for a model without own weights."""
    from vdr_db.explain.own import own_part, own_score

    (record,) = collection.get([id], with_rows=True)
    if encoder.own_weights is None or record.row is None:
        return None
    text = str(record.payload.get(collection.text_key) or "")
    asked = own_part(encoder, query, "query", encoder.encode_queries([query]))
    return own_score(asked, own_part(encoder, text, "document", record.row))


def _explain_text(arguments: argparse.Namespace) -> int:
    """What a text says on its own, as a document of the collection's model or of the usual one."""
    from vdr_db.explain import explain_text

    if arguments.store is None:
        encoder = load_model(arguments, name=DEFAULT_MODEL)
    else:
        collection, encoder = open_with_model(arguments)
        collection.close()
    explanation = explain_text(encoder, arguments.query, heading="text")
    _write(arguments, [explanation], "What the vector says", encoder.model)
    if arguments.json:
        fired = [
            {"word": place.label, "special": place.is_special, "fires": list(place.words)}
            for place in explanation.fired()
        ]
        show_json({"text": explanation.text, "words": list(explanation.words), "positions": fired})
    else:
        show_vectors([(explanation.text, explanation.words)], SHOWN_WORDS)
    return DONE if explanation.words else NOTHING_FOUND


def _explain_image(arguments: argparse.Namespace) -> int:
    """What an image says on its own, as words and patch by patch."""
    from vdr_db.explain import explain_image

    file = Path(arguments.image)
    encoder = _load_image_encoder(arguments)
    explanation = explain_image(encoder, file)
    _write(arguments, [explanation], f"What {file.name} says", encoder.model)
    patches = _patches(explanation)
    if arguments.json:
        show_json({"image": str(file), "words": list(explanation.words), "patches": patches})
    else:
        if not arguments.no_thumbnails:
            show_image(image_payload(file))
        show_vectors([(file.name, explanation.words)], SHOWN_WORDS)
        show_patches([[patch["word"] for patch in row] for row in patches])
    return DONE if explanation.words else NOTHING_FOUND


def _patches(explanation: Explanation) -> list[list[dict[str, Any]]]:
    """Strongest word and its weight of each patch, row by row; no word where nothing fires."""
    attribution = explanation.attribution
    if attribution is None or attribution.grid is None:
        return []
    rows, columns = attribution.grid
    strongest = attribution.strongest()
    token = explanation.vocabulary.token
    named = [{"word": "", "weight": 0.0} for _ in range(rows * columns)]
    for place, (id, weight) in strongest.items():
        named[place] = {"word": token(id), "weight": weight}
    return [named[row * columns : (row + 1) * columns] for row in range(rows)]


def _load_image_encoder(arguments: argparse.Namespace) -> ImageEncoder:
    """The image encoder of `--model`, which may have no text side, or of the collection's model."""
    if arguments.store is not None and arguments.model is None:
        with opened(arguments) as collection:
            stamp = collection.store.stamp
        arguments.model = stamp.model if stamp else None
    name = arguments.model or DEFAULT_MODEL
    with _naming_the_fix(name):
        from vdr_db.encoders.image import ImageEncoder

        options = {} if arguments.k is None else {"k": arguments.k}
        return ImageEncoder.from_pretrained(name, device=arguments.device, **options)


@contextmanager
def _naming_the_fix(model: str) -> Iterator[None]:
    """Says of a model that lacks an image encoder what to do about it."""
    try:
        yield
    except ConfigError as error:
        if "must hold an image encoder" not in str(error):
            raise
        _refuse_text_model(model, error)


def _refuse_text_model(model: str, error: ConfigError | None = None) -> NoReturn:
    raise ConfigError(
        f"An image needs a model that reads images, and {model!r} reads texts only; pass --model "
        f"NAME_OR_FOLDER of a cross-modal model, such as {DEFAULT_MODEL} for pictograms or "
        "vsearch/vdr-cross-modal."
    ) from error


def _write(
    arguments: argparse.Namespace, shown: Match | Sequence[Explanation], title: str, model: str
) -> None:
    """Writes what `--html` and `--png` ask for."""
    from vdr_db.explain import save_html, save_png

    if arguments.html:
        facts = {"model": Path(model or "unnamed").name}
        save_html(arguments.html, shown, title=title, facts=facts)
        say(f"{arguments.html}: written")
    if arguments.png:
        save_png(arguments.png, shown, title=title)
        say(f"{arguments.png}: written")


def _known_id(collection: Collection, given: str) -> int | str:
    """The id as the collection has it: a command line cannot tell 12 from "12"."""
    candidates: Sequence[int | str] = [given]
    if given.isascii() and given.isdigit():
        candidates = [given, int(given)]
    for candidate in candidates:
        if collection.get([candidate]):
            return candidate
    raise InputError(f"The collection holds no document with the id {given!r}.")
