"""`vdr-db info`: versions, device, and what a model or a collection is."""

from __future__ import annotations

import argparse
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdr_db.checkpoints.assets import SHIPPED, cache_folder
from vdr_db.cli.exits import DONE
from vdr_db.cli.options import add_model_options, add_store_options
from vdr_db.cli.show import say, show_json
from vdr_db.cli.stores import load_model, opened
from vdr_db.errors import ConfigError
from vdr_db.version import __version__

if TYPE_CHECKING:
    from vdr_db.connectors import Collection

__all__ = ["add_arguments", "run_command"]

SAMPLED, MOST_FOREIGN = 200, 0.1
"""Texts of a collection that are looked at, and the share of foreign pieces that is told.

In BERT's English vocabulary English prose has 1 to 9 % of such pieces (formulas), other languages
in Latin letters 11 to 25 %, other scripts 100 %."""
PACKAGES = (
    "numpy",
    "torch",
    "triton",
    "transformers",
    "qdrant-edge-py",
    "qdrant-client",
    "elasticsearch",
    "opensearch-py",
    "bm25s",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `info`."""
    add_model_options(parser, default=None)
    add_store_options(parser, required=False)


def run_command(arguments: argparse.Namespace) -> int:
    """Carries out `vdr-db info`."""
    facts: dict[str, Any] = {"vdr-db": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    facts["device"] = _device()
    facts["model cache"] = str(cache_folder())
    if arguments.model:
        from vdr_db.checkpoints.describe import describe_model

        facts["folder"] = describe_model(arguments.model)
        if "refused" not in facts["folder"]:
            facts["model"] = _loaded(arguments, facts["folder"])
    if arguments.store:
        with opened(arguments) as collection:
            stamp = collection.store.stamp
            facts["collection"] = {
                "name": arguments.collection,
                "server": str(collection.server) if collection.server else None,
                "texts": collection.count(),
                "passages": passages.to_dict() if (passages := collection.store.passages) else None,
                "made with": stamp.to_dict() if stamp else None,
            }
            if stamp is not None:
                _warn_of_languages(collection, stamp.model)
    if arguments.json:
        show_json(facts)
    else:
        _show(facts, indent="")
    return DONE


def _loaded(arguments: argparse.Namespace, folder: dict[str, Any]) -> dict[str, Any]:
    """What a model is once its weights are there; why not, into `folder`."""
    try:
        encoder = load_model(arguments)
    except ConfigError as error:
        folder["refused"] = str(error)
        return {}
    return {**encoder.stamp().to_dict(), "columns": encoder.vocabulary.columns}


def _warn_of_languages(collection: Collection, model: str) -> None:
    """Says it where a collection's texts fall into pieces that the model knows little of."""
    from vdr_db.encoders.token_queries import TokenQueries

    if model not in SHIPPED and not Path(model).is_dir():
        return  # nothing is fetched for a hint
    records = collection.get(list(islice(collection.ids(), SAMPLED)))
    texts = [text for r in records if isinstance(text := r.payload.get(collection.text_key), str)]
    try:
        tokens = TokenQueries.from_pretrained(model)
    except ConfigError:  # another folder of that name: what it would say is not known
        return
    share = tokens.vocabulary.foreign_share(tokens.tokenizer.encode(texts).input_ids)
    if share > MOST_FOREIGN:
        say(
            f"{share:.0%} of the word pieces of {len(texts)} texts are unknown to {model!r} or "
            "single letters: these texts are in a language that the model was not made for; encode "
            "them with one that was (--model)."
        )


def _device() -> str | None:
    try:
        import torch
    except ModuleNotFoundError:
        return None
    if torch.cuda.is_available():
        return f"cuda, {torch.cuda.get_device_name()}"
    return f"cpu, {torch.get_num_threads()} threads"


def _show(facts: dict[str, Any], indent: str) -> None:
    width = max(len(name) for name in facts) + 2
    for name, value in facts.items():
        if isinstance(value, dict):
            sys.stdout.write(f"{indent}{name}\n")
            _show(value, indent + "  ")
        else:
            shown = "not installed" if value is None and not indent else value
            sys.stdout.write(f"{indent}{name:<{width}}{'–' if shown is None else shown}\n")
