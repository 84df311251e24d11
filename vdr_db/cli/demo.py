"""`vdr-db demo`: real documents into an embedded Qdrant, real queries out of it, measured.

The documents are descriptions of Debian packages; people have tagged the packages by topic, which
gives queries and judgements (see `data/debian_sample.LICENSE.md`).
"""

from __future__ import annotations

import argparse
import importlib.util
import tarfile
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

from vdr_db.cli.exits import DONE
from vdr_db.cli.options import DEFAULT_MODEL, add_model_options, add_store_options
from vdr_db.cli.show import say, show_hits, show_json, show_quality, show_text
from vdr_db.cli.stores import load_model, open_store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vdr_db.evaluation.quality import TestCollection
    from vdr_db.explain.hits import HitView

__all__ = ["QUERIES", "SAMPLE", "add_arguments", "run_command", "unpack_sample"]

SAMPLE = "debian_sample.tar.gz"
DOCUMENTS = 250
"""Of the sample, at most: as many as one core encodes while somebody waits."""
PARTS = ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")
SERVER_COLLECTION = "debian"
QUERIES = (
    "take a picture of myself",
    "burn a movie to a disc",
    "watch the network traffic of my computer",
    "get back files that I deleted",
)
"""What the demo asks when nobody asks anything else."""
IMAGE_QUERY = "music"
HITS = 3


def unpack_sample(folder: Path) -> Path:
    """Writes the sample to `folder` in BEIR layout and returns the folder."""
    with (
        as_file(files("vdr_db") / "data" / SAMPLE) as path,
        tarfile.open(path, "r:gz") as archive,
    ):
        for part in PARTS:
            stream = archive.extractfile(part)
            if stream is None:
                raise FileNotFoundError(f"{SAMPLE} lacks {part}; install the package again.")
            target = folder / part
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(stream.read())
    return folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `demo`."""
    parser.add_argument("queries", nargs="*", metavar="QUERY", help="ask this instead")
    add_store_options(parser, required=False, otherwise="a temporary folder, removed at the end")
    add_model_options(parser, default=DEFAULT_MODEL)


def run_command(arguments: argparse.Namespace) -> int:
    """Carries out `vdr-db demo`."""
    from vdr_db.connectors.address import parse_address
    from vdr_db.evaluation.quality import TestCollection, evaluate_bm25, evaluate_model
    from vdr_db.explain.hits import find_hits

    has_bm25 = all(importlib.util.find_spec(name) for name in ("bm25s", "Stemmer"))
    start = time.perf_counter()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vdr-db-demo-")))
        sample = _part_of(TestCollection.load(unpack_sample(scratch / "debian")))
        say(f"loading the model {arguments.model}")
        encoder = load_model(arguments)
        say(f"encoding and indexing {len(sample.documents):,} descriptions of Debian packages")
        asked, arguments.store = arguments.store, arguments.store or str(scratch / "store")
        if arguments.collection is None and not parse_address(arguments.store).is_embedded:
            arguments.collection = SERVER_COLLECTION
        packages = stack.enter_context(open_store(arguments, encoder))
        measured = [evaluate_model(sample, encoder, store=packages)]
        if has_bm25:
            measured.append(evaluate_bm25(sample))
        for query in arguments.queries or QUERIES:
            began = time.perf_counter()
            hits = find_hits(packages, encoder, query, limit=HITS)
            took_ms = 1000 * (time.perf_counter() - began)
            caption = f"{len(hits)} best of {packages.count():,}, {took_ms:.0f} ms\n"
            _show_found(query, hits, caption, as_json=arguments.json)
        if not arguments.queries:
            _show_images(scratch, as_json=arguments.json)
        if arguments.json:
            for quality in measured:
                show_json({"collection": sample.name, **asdict(quality)})
        else:
            show_quality(sample, measured)
            if not has_bm25:
                say("BM25 is left out; pip install 'vdr-db[cli]' measures it beside the model")
            name = arguments.collection
            show_text(_closing_words(asked, name, time.perf_counter() - start))
    return DONE


def _part_of(sample: TestCollection) -> TestCollection:
    """Documents from all over the sample, and the queries that are about one of them."""
    step = -(-len(sample.documents) // DOCUMENTS)
    documents = sample.documents[step // 3 :: step]  # of the sixths, the one that answers `QUERIES`
    ids = {document.id for document in documents}
    judgements = {
        query: found
        for query, grades in sample.judgements.items()
        if (found := {id: grade for id, grade in grades.items() if id in ids})
    }
    queries = [query for query in sample.queries if query.id in judgements]
    return replace(sample, documents=documents, queries=queries, judgements=judgements)


def _show_images(scratch: Path, *, as_json: bool) -> None:
    """A text that finds an image, in a collection of both."""
    from vdr_db import CrossModalEncoder
    from vdr_db.cli.pictograms import write_pictograms
    from vdr_db.connectors import VDRQdrant
    from vdr_db.explain.hits import find_hits

    encoder = CrossModalEncoder.from_pretrained(DEFAULT_MODEL)
    with VDRQdrant("icons", encoder, path=scratch / "icons") as icons:
        icons.add_images(write_pictograms(scratch / "pictograms"))
        icons.add_texts(["A ballad is a song that tells a story."], ids=["ballad"])
        hits = find_hits(icons, encoder.text, IMAGE_QUERY, limit=HITS)
        caption = f"{len(hits)} best of {icons.count()} pictograms and texts, by {encoder.model}\n"
        _show_found(IMAGE_QUERY, hits, caption, as_json=as_json)


def _show_found(query: str, hits: Sequence[HitView], caption: str, *, as_json: bool) -> None:
    if as_json:
        found = [{"id": hit.id, "score": hit.score, "words": hit.words} for hit in hits]
        show_json({"query": query, "hits": found})
    else:
        show_hits(hits, title=query, caption=caption)


def _closing_words(store: str | None, collection: str, seconds: float) -> str:
    lines = ["", f"{seconds:.0f} s in all. What to type next:", ""]
    if store is None:
        store = "demo.qdrant"
        lines.append(f"  vdr-db demo --store {store}    keeps the collection, then:")
    where = f"--store {store}"
    if "://" in store:
        where += f" --collection {collection}"
    lines += [
        f'  vdr-db search "make music" {where}',
        f'  vdr-db explain "make music" komposter {where}',
        '  vdr-db encode "any text"           the words a text is found by',
        "  vdr-db index FILE.jsonl --store my.qdrant",
    ]
    return "\n".join(lines)
