"""`vdr-db serve`: a collection as a web page and a JSON API."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from vdr_db.cli.exits import DONE, INTERRUPTED, STORE_FAILED, WRONG_INPUT
from vdr_db.cli.options import add_model_options, add_store_options
from vdr_db.cli.show import say, show_json
from vdr_db.cli.stores import open_with_model, opened
from vdr_db.errors import ConfigError, StoreError, VdrError

if TYPE_CHECKING:
    from vdr_db.encoders.image import ImageEncoder
    from vdr_db.serve import Address

__all__ = ["add_arguments", "run_command"]

HOST, PORT = "127.0.0.1", 8000
KEY = "VDR_DB_SERVE_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `serve`."""
    add_store_options(parser)
    add_model_options(parser, default=None)
    parser.add_argument(
        "--mode",
        choices=["full", "alpha"],
        help="full: the model reads the query (default); alpha: its tokens are taken as they are, "
        "which needs no model here and no torch",
    )
    parser.add_argument(
        "--host",
        default=HOST,
        help=f"address to listen on (default: {HOST}, this machine only); ${KEY} is the API key "
        "that requests must bring",
    )
    parser.add_argument("--port", type=int, default=PORT, help=f"(default: {PORT}; 0: any free)")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="host name browsers may ask for, besides localhost and addresses; may be repeated",
    )
    parser.add_argument(
        "--facet",
        action="append",
        metavar="FIELD",
        help="payload field to narrow results by, such as metadata.section; may be repeated "
        "(default: fields with few values)",
    )
    parser.add_argument(
        "--writes", action="store_true", help="offer /documents, which stores and removes texts"
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes; only with a server's store"
    )
    parser.add_argument(
        "--access-log", action="store_true", help="a line of JSON on stderr for each request"
    )
    parser.add_argument(
        "--image-model",
        metavar="NAME_OR_FOLDER",
        help="image encoder of the same vocabulary, to search by uploaded images (default: "
        "that of the collection's model, where it reads images)",
    )


def run_command(arguments: argparse.Namespace) -> int:
    """Carries out `vdr-db serve`; 0 after SIGTERM, 130 after Ctrl-C."""
    from vdr_db.connectors.address import parse_address
    from vdr_db.serve import listen, serve_many

    is_folder = parse_address(arguments.store).is_embedded
    if arguments.workers < 1 or (arguments.workers > 1 and is_folder):
        raise ConfigError(
            f"--workers must be 1 for a folder, which one process opens, got {arguments.workers}; "
            "name a server's store for more."
        )
    address = listen(arguments.host, arguments.port)
    with address.socket:
        if arguments.writes and KEY not in os.environ and not address.is_loopback:
            raise ConfigError(f"--writes on {arguments.host} lets everybody write; set ${KEY}.")

        def started(documents: int) -> None:
            if arguments.json:
                show_json({"url": address.url, "documents": documents})
                sys.stdout.flush()
            say(f"{documents:,} documents at {address.url} (Ctrl-C stops)")
            if KEY not in os.environ and not address.is_loopback:
                say(
                    f"vdr-db: every machine that reaches this one can search; set ${KEY} to ask "
                    "for a key"
                )

        if arguments.workers == 1:
            code, was_interrupted = DONE, _serve(arguments, address, started)
        else:
            with opened(arguments) as collection:
                documents = collection.count()
            code, was_interrupted = serve_many(
                partial(_work, arguments),
                address,
                arguments.workers,
                started=lambda: started(documents),
            )
    say("vdr-db: stopped")
    return INTERRUPTED if was_interrupted else code


def _work(arguments: argparse.Namespace, address: Address) -> None:
    """What one of several processes does."""
    try:
        _serve(arguments, address, lambda documents: None)
    except VdrError as error:
        say(f"vdr-db: {error}")
        sys.exit(STORE_FAILED if isinstance(error, StoreError) else WRONG_INPUT)


def _serve(arguments: argparse.Namespace, address: Address, started: Callable[[int], None]) -> bool:
    """Serves with this process; returns whether it was Ctrl-C that ended it."""
    from vdr_db.serve import ImageUploads, SearchService, make_app, serve

    if arguments.access_log:
        _log_access()
    collection, encoder = open_with_model(arguments)
    with collection:
        images = None
        reads: ImageEncoder | None = getattr(collection.encoder, "image", None)
        if arguments.image_model:
            reads = _load_image_model(arguments)
        if reads is not None:
            images = ImageUploads(reads, encoder)
        service = SearchService(collection, encoder, facets=arguments.facet, images=images)
        documents = collection.count()
        app = make_app(
            service,
            hosts=arguments.allow_host,
            api_key=os.environ.get(KEY),
            writes=arguments.writes,
        )
        return serve(app, address, started=lambda: started(documents))


def _log_access() -> None:
    from vdr_db.serve.watch import ACCESS_LOG

    log = logging.getLogger(ACCESS_LOG)
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)
    log.propagate = False


def _load_image_model(arguments: argparse.Namespace) -> ImageEncoder:
    from vdr_db.encoders.image import ImageEncoder

    return ImageEncoder.from_pretrained(arguments.image_model, device=arguments.device)
