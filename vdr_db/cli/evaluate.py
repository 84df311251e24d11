"""`vdr-db evaluate`: a model's ranking of a BEIR folder, measured, with BM25 beside it.

`--mode` adds the modes without a model on one side, `--sweep k` measures over k, `--head vdr` puts
a new, untrained VDR head on a masked language model: the baseline BERT_raw.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from vdr_db.cli.exits import DONE
from vdr_db.cli.options import DEFAULT_MODEL, MODES, add_model_options, add_store_options
from vdr_db.cli.show import say, show_json, show_quality
from vdr_db.cli.stores import load_model, open_store
from vdr_db.cli.sweep import ks_of, plot_sweeps, show_sweep
from vdr_db.errors import ConfigError, require

if TYPE_CHECKING:
    from vdr_db.encoders.text import SparseEncoder
    from vdr_db.evaluation.quality import Mode, Quality, TestCollection
    from vdr_db.evaluation.sweep import SweepPoint

__all__ = ["add_arguments", "run_command"]

ALL_MODES = "all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `evaluate`."""
    parser.add_argument("folder", nargs="+", metavar="FOLDER", help="folder in BEIR layout")
    add_model_options(parser, default=DEFAULT_MODEL)
    add_store_options(
        parser,
        required=False,
        otherwise="an embedded one, gone afterwards; a collection with documents is searched as "
        "it is, another one is filled",
    )
    parser.add_argument(
        "--head",
        choices=["vdr"],
        help="put a new, untrained VDR head on a masked language model (baseline BERT_raw)",
    )
    parser.add_argument("--split", help="judgements to use (default: test, or the only one)")
    parser.add_argument(
        "--mode",
        choices=[*MODES, ALL_MODES],
        default="full",
        help="full: query and documents encoded (default); alpha: query as bag of tokens; "
        "beta: documents as bags of tokens; all: one row each",
    )
    parser.add_argument(
        "--sweep", choices=["k"], help="measure every pair of query k and document k, encoded once"
    )
    for side in ("query", "document"):
        parser.add_argument(
            f"--{side}-ks",
            type=ks_of,
            metavar="K,K,...",
            help="of the sweep (default: 8, 16, ... 256, and 768); 0 keeps a text's own tokens",
        )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="drawing of the sweep, say .png")
    parser.add_argument(
        "--keep-identical",
        action="store_true",
        help="keep hits that have the id of their query, which are left out otherwise as in BEIR",
    )
    parser.add_argument("--no-bm25", action="store_true", help="leave BM25 out")


def run_command(arguments: argparse.Namespace) -> int:
    """Carries out `vdr-db evaluate`."""
    from vdr_db.evaluation.quality import TestCollection, evaluate_bm25, evaluate_modes
    from vdr_db.evaluation.sweep import DEFAULT_KS, sweep_k

    _check(arguments)
    collections = [
        TestCollection.load(folder, split=arguments.split, keeps_identical=arguments.keep_identical)
        for folder in arguments.folder
    ]
    for collection in collections:
        _say_oddities(collection)
    encoder = load_model(arguments, head=arguments.head)
    if arguments.head:
        _name_as_raw(encoder)
    modes = MODES if arguments.mode == ALL_MODES else [arguments.mode]
    sweeps = []
    for collection in collections:
        say(f"{collection.name}: encoding {len(collection.documents):,} documents")
        measured: list[Quality] = []
        points: list[SweepPoint] = []
        if arguments.sweep:
            points = sweep_k(
                collection,
                encoder,
                query_ks=arguments.query_ks or DEFAULT_KS,
                document_ks=arguments.document_ks or DEFAULT_KS,
                modes=modes,
            )
        elif arguments.store:
            measured = _measure_in_store(arguments, collection, encoder, modes)
        else:
            measured = evaluate_modes(collection, encoder, modes)
        bm25 = None if arguments.no_bm25 else evaluate_bm25(collection)
        measured += [] if bm25 is None else [bm25]
        sweeps.append((collection.name, points, bm25))
        if arguments.json:
            counts = {
                "collection": collection.name,
                "documents": len(collection.documents),
                "queries": len(collection.queries),
            }
            for point in points:
                show_json({**counts, "ranker": encoder.model, **asdict(point)})
            for quality in measured:
                values = asdict(quality)
                del values["ndcg_10_of"]  # the means are enough here
                show_json({**counts, **values})
        elif arguments.sweep:
            show_sweep(collection, encoder.model, points, bm25)
        else:
            show_quality(collection, measured)
    if arguments.plot:
        plot_sweeps(sweeps, arguments.plot)
    return DONE


def _measure_in_store(
    arguments: argparse.Namespace,
    collection: TestCollection,
    encoder: SparseEncoder,
    modes: Sequence[Mode],
) -> list[Quality]:
    """The measurements in the collection of `--store`, which is filled when it holds nothing."""
    from vdr_db.evaluation.quality import evaluate_store

    documents = "tokens" if modes == ["beta"] else None
    with open_store(arguments, encoder, documents=documents) as store:
        count = store.count()
        if count:
            say(f"{collection.name}: searching the {count:,} documents of {arguments.store}")
        return evaluate_store(collection, encoder, store, modes, is_filled=count > 0)


def _say_oddities(collection: TestCollection) -> None:
    """What of a collection bears on its figures and is easily overlooked."""
    if collection.identical and not collection.keeps_identical:
        say(
            f"{collection.name}: {collection.identical:,} queries have the id of a document, which "
            "is left out of their hits as in BEIR (--keep-identical keeps it)"
        )
    if collection.missing_documents:
        say(
            f"{collection.name}: {collection.missing_documents:,} judgements are of documents that "
            "are not in the corpus; relevant ones count as not found, as in BEIR"
        )
    if collection.missing_queries:
        say(
            f"{collection.name}: {collection.missing_queries:,} judged queries are not in "
            "queries.jsonl and left out"
        )


def _check(arguments: argparse.Namespace) -> None:
    """Refuses options that cannot be meant together, before anything is loaded."""
    require("rich", "cli")
    if not arguments.no_bm25:
        require("bm25s", "cli")
        require("Stemmer", "cli")
    if arguments.store and (arguments.sweep or arguments.mode == ALL_MODES or arguments.folder[1:]):
        raise ConfigError(
            "--store holds the documents of one FOLDER in one kind: leave out --sweep, further "
            "folders and --mode all."
        )
    if arguments.sweep:
        if arguments.k is not None:
            raise ConfigError(
                "--k is one k, and --sweep k measures many; name them with --query-ks and "
                "--document-ks."
            )
        if arguments.plot:
            require("matplotlib", "train")
            if not arguments.plot.absolute().parent.is_dir():
                raise ConfigError(f"--plot must lie in a folder that exists, got {arguments.plot}.")
        return
    for option in ("query_ks", "document_ks", "plot"):
        if getattr(arguments, option) is not None:
            raise ConfigError(f"--{option.replace('_', '-')} belongs to --sweep k; add that.")


def _name_as_raw(encoder: SparseEncoder) -> None:
    """Marks the model's name, after a look at whether its head is new."""
    head = encoder.document_tower.head
    weight, bias = head.get_parameter("norm.weight"), head.get_parameter("norm.bias")
    if not (bool((weight == 1).all()) and bool((bias == 0).all())):
        raise ConfigError(
            f"--head vdr puts a new head on a masked language model, but {encoder.model} has a "
            "trained VDR head; leave --head out to measure that."
        )
    encoder.model += " raw"
