"""`vdr-db serve`: a collection as a web page and a JSON API."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from vdr_db.cli.exits import DONE, INTERRUPTED
from vdr_db.cli.options import add_model_options, add_store_options
from vdr_db.cli.show import say, show_json
from vdr_db.cli.stores import open_with_model

if TYPE_CHECKING:
    from vdr_db.encoders.image import ImageEncoder

__all__ = ["add_arguments", "run_command"]

HOST, PORT = "127.0.0.1", 8000


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
        help=f"address to listen on (default: {HOST}, this machine only); there is no password",
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
        "--image-model",
        metavar="NAME_OR_FOLDER",
        help="image encoder of the same vocabulary, to search by uploaded images (default: "
        "that of the collection's model, where it reads images)",
    )


def run_command(arguments: argparse.Namespace) -> int:
    """Carries out `vdr-db serve`; 0 after SIGTERM, 130 after Ctrl-C."""
    from vdr_db.serve import ImageUploads, SearchService, listen, make_app, serve

    address = listen(arguments.host, arguments.port)
    with address.socket:
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

            def started() -> None:
                if arguments.json:
                    show_json({"url": address.url, "documents": documents})
                    sys.stdout.flush()
                say(f"{documents:,} documents at {address.url} (Ctrl-C stops)")
                if not address.is_loopback:
                    say(
                        "vdr-db: every machine that reaches this one can search; nobody is asked "
                        "for a password"
                    )

            app = make_app(service, hosts=arguments.allow_host)
            was_interrupted = serve(app, address, started=started)
    say("vdr-db: stopped")
    return INTERRUPTED if was_interrupted else DONE


def _load_image_model(arguments: argparse.Namespace) -> ImageEncoder:
    from vdr_db.encoders.image import ImageEncoder

    return ImageEncoder.from_pretrained(arguments.image_model, device=arguments.device)
