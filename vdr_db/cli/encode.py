"""`vdr-db encode`: texts to sparse vectors, shown, as JSON lines, or as an `.npz`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from vdr_db.cli.options import (
    DEFAULT_MODEL,
    add_field_options,
    add_image_options,
    add_model_options,
    add_run_options,
    fields_of,
)
from vdr_db.cli.outcome import exit_code_of
from vdr_db.cli.show import progress, say, say_truncated, show_vectors
from vdr_db.cli.stores import load_model, open_source
from vdr_db.errors import ConfigError
from vdr_db.readers import Record, read_records
from vdr_db.sparse import SparseRows

if TYPE_CHECKING:
    from vdr_db.encoders.text import SparseEncoder

__all__ = ["add_arguments", "run_command"]

BATCH = 1024
"""Texts encoded at a time: enough to sort them by length, few enough to see progress."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `encode`."""
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="texts; or use --input")
    parser.add_argument("--input", metavar="FILE", help="file of texts, - for standard input")
    add_field_options(parser)
    add_model_options(parser, default=None, shown=DEFAULT_MODEL)
    parser.add_argument("--queries", action="store_true", help="encode as queries, not documents")
    parser.add_argument("--top", type=int, default=16, help="words shown per text (default: 16)")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help=".jsonl: id, and token -> weight, a line each; .npz: SparseRows, in input order",
    )
    group = parser.add_argument_group(
        "spool", "encode files (named in place of texts), or images, for a later `vdr-db load`"
    )
    add_image_options(group)
    group.add_argument("--spool", metavar="FOLDER", help="write Parquet parts there; resumes")
    group.add_argument(
        "--part-rows", type=int, default=65536, metavar="N", help="rows of a part (default: 65536)"
    )
    group.add_argument("--restart", action="store_true", help="encode this slice from its start")
    add_run_options(group)


def run_command(arguments: argparse.Namespace) -> int:
    """Carries out `vdr-db encode`."""
    if arguments.spool is not None:
        return _run_spool(arguments)
    if arguments.images is not None or arguments.thumbnails:
        raise ConfigError("--images FOLDER and --thumbnails go with --spool FOLDER.")
    if bool(arguments.texts) == (arguments.input is not None):
        raise ConfigError("Pass texts or --input FILE, one of the two.")
    out = arguments.out
    if out is not None and not out.endswith((".npz", ".jsonl")):
        raise ConfigError(f"--out must end in .npz or .jsonl, got {out!r}.")
    if arguments.input is None:
        records: Iterable[Record] = (Record(i, text) for i, text in enumerate(arguments.texts))
    else:
        records = read_records(
            arguments.input, format=arguments.format, fields=fields_of(arguments)
        )
    encoder = load_model(arguments, name=DEFAULT_MODEL)
    encode = encoder.encode_queries if arguments.queries else encoder.encode_documents
    parts: list[SparseRows] = []
    count = nonzeros = 0
    stream = open(out, "w", encoding="utf-8") if out and out.endswith(".jsonl") else sys.stdout  # noqa: SIM115, closed below
    try:
        with progress(None, "texts", "encode") as bar:
            for batch in _in_batches(records, BATCH):
                rows = encode([record.text for record in batch])
                count, nonzeros = count + len(rows), nonzeros + rows.nnz
                if out and out.endswith(".npz"):
                    parts.append(rows)
                elif out or arguments.json:
                    for line in _json_lines(batch, rows, encoder):
                        stream.write(line)
                else:
                    show_vectors(_shown(batch, rows, encoder), arguments.top)
                bar.update(len(batch))
    finally:
        if stream is not sys.stdout:
            stream.close()
    if out and out.endswith(".npz"):
        whole = SparseRows.concat(parts) if parts else SparseRows.empty(0, encoder.vocabulary.size)
        whole.save(out)
    if out:
        mean = nonzeros / count if count else 0.0
        say(f"{out}: {count:,} texts, {mean:.1f} weights each")
    say_truncated(encoder.truncated)
    return 0


def _run_spool(arguments: argparse.Namespace) -> int:
    """Carries out `vdr-db encode --spool`; the same command again resumes."""
    from vdr_db.ingest import IngestOptions, Stop, encode_to_spool, stop_on_signals

    paths = [*arguments.texts, *([arguments.input] if arguments.input else [])]
    source, encoder = open_source(arguments, paths)
    options = IngestOptions(restart=arguments.restart, max_errors=arguments.max_errors)
    with stop_on_signals(Stop()) as stop:
        report = encode_to_spool(
            source,
            arguments.spool,
            encoder=encoder,
            options=options,
            part_rows=arguments.part_rows,
            progress=arguments.progress,
            stop=stop,
        )
    return exit_code_of(report, arguments, f"spool {arguments.spool}, slice {source.slice}")


def _in_batches(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    """Lists of `size` records, the last one shorter."""
    iterator = iter(records)
    while batch := list(islice(iterator, size)):
        yield batch


def _json_lines(batch: Sequence[Record], rows: SparseRows, encoder: SparseEncoder) -> Iterator[str]:
    for record, terms in zip(batch, rows.to_dicts(), strict=True):
        heaviest = sorted(terms.items(), key=lambda term: (-term[1], term[0]))
        weights = {encoder.vocabulary.token(id): round(weight, 6) for id, weight in heaviest}
        yield json.dumps({"id": record.id, "weights": weights}, ensure_ascii=False) + "\n"


def _shown(
    batch: Sequence[Record], rows: SparseRows, encoder: SparseEncoder
) -> list[tuple[str, list[tuple[str, float]]]]:
    return [
        (
            record.text,
            encoder.vocabulary.merge_word_pieces(encoder.token_ids(record.text), terms),
        )
        for record, terms in zip(batch, rows.to_dicts(), strict=True)
    ]
