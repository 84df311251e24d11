"""`encode_to_spool`: from a source of texts or images to Parquet parts, without any store."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import cast

from vdr_db.connectors.encoder import Encoder, ImageReader
from vdr_db.connectors.qdrant.folder_lock import FolderLock
from vdr_db.errors import ConfigError
from vdr_db.ingest.images import encoding_of
from vdr_db.ingest.options import IngestOptions
from vdr_db.ingest.pipeline import as_source
from vdr_db.ingest.preparation import Preparation, comparable_stamp
from vdr_db.ingest.progress import Progress, ProgressKind, choose_progress
from vdr_db.ingest.quarantine import Quarantine, Refusal, check_refusals
from vdr_db.ingest.report import IngestReport, Totals, truncated_of
from vdr_db.ingest.source import Slice, Source, Window
from vdr_db.ingest.spool import SpoolWriter
from vdr_db.ingest.stop import Stop

__all__ = ["encode_to_spool"]


def encode_to_spool(
    source: Source | Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    encoder: Encoder | ImageReader,
    options: IngestOptions | None = None,
    part_rows: int = 65536,
    progress: Progress | ProgressKind = "none",
    stop: Stop | None = None,
) -> IngestReport:
    """Encodes a source, or a slice of it, into a spool folder; resumes after the last whole part.

    A finished part is what an acknowledgement is for a store: it is on disk, whole, under its name.
    Slices of one input may be encoded into one folder at the same time, on one machine or many.

    Args:
        source: Paths of files, or a source with a description, such as an `ImageFolderSource`; its
            slice names the parts.
        folder: The spool; made when missing.
        encoder: What turns texts, or images, into rows.
        options: Of these count `documents`, `keeps_text`, `has_fingerprint`, `empty`, `max_errors`
            and `restart`.
        part_rows: Rows of a part: what a kill repeats at most, and what a loader takes at a time.
        progress: Who is told how far it is.
        stop: Lets another thread or a signal handler end the run after the open part.

    Returns:
        What was done; `acknowledged` counts rows in finished parts.

    Raises:
        ConfigError: The folder holds parts of another run, or the source cannot be recognised.
        InputError: A line cannot be read, or too many documents were refused.
        StoreUnavailable: The folder cannot be written, or another process encodes this slice.
        MissingExtraError: pyarrow is not installed.
    """
    options = options or IngestOptions()
    reporter = choose_progress(progress) if isinstance(progress, str) else progress
    origin, stop = as_source(source), stop or Stop()
    if origin.description is None:
        raise ConfigError(
            "a spool needs an input that can be recognised and read again, got a stream; "
            "encode files, or name a `RecordSource` by `identity=`."
        )
    if options.passages is not None:
        raise ConfigError(
            "a spool holds one row for each document; ingest into the store to cut texts into "
            "passages."
        )
    stamp, width = encoder.stamp(), int(encoder.vocabulary.size)
    documents = options.documents or "encoded"
    images = encoding_of(origin, encoder, documents)
    keeps_text = options.keeps_text is not False and images is None
    description = {
        "input": origin.description,
        "encoder": comparable_stamp(stamp),
        "policy": {
            "documents": documents,
            "keeps_text": keeps_text,
            "has_fingerprint": options.has_fingerprint,
            "empty": options.empty,
        },
    }
    slice = getattr(origin, "slice", Slice())
    os.makedirs(folder, exist_ok=True)
    with ExitStack() as closing:
        name = f".lock-{slice.k:05d}-of-{slice.n:05d}"
        lock = FolderLock(Path(folder, name), f"slice {slice} of the spool {folder}")
        closing.callback(lock.release)
        writer = SpoolWriter(
            folder,
            slice,
            description,
            width=width,
            stamp=stamp,
            documents=documents,
            part_rows=part_rows,
            restart=options.restart,
        )
        closing.callback(writer.close)
        quarantine = Quarantine(writer.quarantine, restart=not len(writer.settled))
        encode = None
        if images is None:
            of_texts = cast("Encoder", encoder)
            encode = of_texts.bag_of_tokens if documents == "tokens" else of_texts.encode_documents
        prepare = Preparation(
            encode=encode,
            stamp=stamp,
            width=width,
            text_key="text" if keeps_text else None,
            options=options,
            images=images,
            thumbnail_px=getattr(origin, "thumbnail_px", None),
        )
        before = truncated_of(encoder)
        report = _encode(origin, writer, quarantine, prepare, options, reporter, stop)
        report.totals.truncated = truncated_of(encoder) - before
        return report


def _encode(
    source: Source,
    writer: SpoolWriter,
    quarantine: Quarantine,
    prepare: Preparation,
    options: IngestOptions,
    reporter: Progress,
    stop: Stop,
) -> IngestReport:
    began = time.monotonic()
    totals, window = Totals(), Window()
    earlier_rows = writer.rows
    is_interrupted = False
    waiting: list[Refusal] = []
    for block in source.blocks(writer.settled.copy(), window):
        totals.resumed += block.resumed
        totals.read += block.resumed + len(block.records)
        reporter.update(totals)
        if stop.is_urgent:
            raise KeyboardInterrupt
        if stop.is_requested:
            is_interrupted = True
            break
        if not block.records:
            continue
        window_began = time.monotonic()
        prepared = prepare(block)
        window.took(len(block.records), time.monotonic() - window_began)
        prepared.count(totals)
        totals.refused += len(prepared.refused)
        waiting.extend(prepared.refused)
        refused = len(quarantine) + len(waiting)
        check_refusals(refused, options.max_errors, totals.read, waiting[-1] if waiting else None)
        writer.skip([*prepared.skipped, *(one.number for one in prepared.refused)])
        writer.write(prepared.piece)
        if writer.is_full:
            quarantine.append(waiting)
            waiting = []
            writer.finish_part()
            totals.acknowledged = writer.rows - earlier_rows
    quarantine.append(waiting)
    writer.finish_part()
    if not is_interrupted:
        writer.complete(read=totals.read, refused=len(quarantine))
    totals.acknowledged = writer.rows - earlier_rows
    reporter.update(totals, is_last=True)
    return IngestReport(
        totals=totals,
        acknowledged_in_total=writer.rows,
        refused_in_total=len(quarantine),
        is_complete=not is_interrupted,
        is_interrupted=is_interrupted,
        seconds={"total": time.monotonic() - began},
        quarantine=str(quarantine.path),
    )
