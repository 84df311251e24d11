"""`ingest`: from a source of texts, or of ready rows, into a store, so that nothing is lost.

```
source → window → encoder (caller's thread) → queue bounded in bytes → writers → acknowledged
                                                           checkpoint: flush, quarantine, ledger
```

What holds, whatever is killed when: a record that the ledger calls settled is in the store or in
the quarantine; running the same ingest again settles the rest; a record is never stored twice,
because writes are upserts under the caller's id.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any, cast

from vdr_db.connectors.base import Documents, Store
from vdr_db.connectors.documents import documents_of
from vdr_db.connectors.encoder import Encoder, ImageReader, Target
from vdr_db.connectors.passages import PassageRows, checked_passages, encode_passages
from vdr_db.connectors.probes import check_probes, with_probes
from vdr_db.connectors.retry import Retrier, RetryPolicy, Stopped
from vdr_db.errors import ConfigError, InputError, StoreMismatch, StoreUnavailable
from vdr_db.ingest.batches import BatchLimit
from vdr_db.ingest.images import encoding_of
from vdr_db.ingest.journal import Journal
from vdr_db.ingest.ledger import Ledger, Ranges
from vdr_db.ingest.options import IngestOptions
from vdr_db.ingest.preparation import Preparation, comparable_stamp
from vdr_db.ingest.progress import Progress, ProgressKind, choose_progress
from vdr_db.ingest.quarantine import Quarantine
from vdr_db.ingest.report import IngestReport, Totals, Verification, truncated_of
from vdr_db.ingest.source import Block, FileSource, RecordSource, Source, Window
from vdr_db.ingest.stop import Stop
from vdr_db.ingest.verify import missing_ids, verify
from vdr_db.ingest.writers import WriterPool
from vdr_db.readers import Record
from vdr_db.sparse import SparseRows
from vdr_db.stamp import EncoderStamp

__all__ = ["as_source", "ingest"]


def ingest(
    source: Source | Sequence[str | os.PathLike[str]] | Iterable[Record],
    target: Target,
    *,
    encoder: Encoder | ImageReader | None = None,
    options: IngestOptions | None = None,
    ledger: str | os.PathLike[str] | None = None,
    quarantine: str | os.PathLike[str] | None = None,
    progress: Progress | ProgressKind = "none",
    stop: Stop | None = None,
) -> IngestReport:
    """Writes all documents of a source into a store, and resumes where an earlier run ended.

    Args:
        source: Paths of files (see `FileSource`), an iterable of `Record`, or any `Source`, such as
            an `ImageFolderSource`.
        target: A store, or a collection such as `VDRQdrant`.
        encoder: What turns texts into rows; `None` takes the collection's. Sources with ready rows
            need none.
        options: How to run; see `IngestOptions`.
        ledger: File that remembers what is settled; needed to resume. One ledger belongs to one
            input, encoder and store.
        quarantine: File that takes refused documents; by default the ledger's name with
            `.quarantine.jsonl`, nothing without a ledger.
        progress: Who is told how far it is: a kind, or any `Progress`.
        stop: Lets another thread or a signal handler end the run early.

    Returns:
        What was done. `is_interrupted` tells a run that was stopped on request.

    Raises:
        ConfigError: Options contradict each other, or the ledger belongs to another run.
        StoreMismatch: The store holds another encoder's vectors, or lost acknowledged documents.
        StoreUnavailable: Store, ledger or quarantine cannot be written, after all retries.
        InputError: A line of the input cannot be read, or too many documents were refused.
        KeyboardInterrupt: `stop` was requested twice.

    In every case what was acknowledged before is committed, and the same call resumes.
    """
    options = options or IngestOptions()
    reporter = choose_progress(progress) if isinstance(progress, str) else progress
    run = _Run(as_source(source), target, encoder, options, reporter, stop or Stop())
    with ExitStack() as closing:
        opened = None
        if ledger is not None:
            opened = Ledger(os.fspath(ledger), run.description(), restart=options.restart)
            closing.callback(opened.close)
            quarantine = quarantine or opened.quarantine
        refusals = None
        if quarantine is not None:
            is_resumed = opened is not None and opened.is_resumed
            refusals = Quarantine(os.fspath(quarantine), restart=not is_resumed)
        return run.run(opened, refusals)


def as_source(
    source: Source | Sequence[str | os.PathLike[str]] | Iterable[Record],
) -> Source:
    """What `ingest` accepts, as a source."""
    if hasattr(source, "blocks"):
        return cast("Source", source)
    if isinstance(source, (str, os.PathLike)):
        raise TypeError(f"`source` must be a sequence of paths, got one; write [{source!r}]")
    if isinstance(source, Sequence) and all(isinstance(p, (str, os.PathLike)) for p in source):
        return FileSource(source)
    records = cast("Iterable[Record]", source)
    return RecordSource((lambda: records) if isinstance(records, Sequence) else records)


class _Run:
    """One run of an ingest, seen from the thread that reads and encodes."""

    def __init__(
        self,
        source: Source,
        target: Target,
        encoder: Encoder | ImageReader | None,
        options: IngestOptions,
        reporter: Progress,
        stop: Stop,
    ) -> None:
        self._source = source
        self._store = cast("Store", getattr(target, "store", target))
        self._encoder = encoder
        if encoder is None and getattr(source, "width", None) is None:
            # Only for texts and images: a collection may load its model when it is asked for it,
            # and rows made earlier may be of another model than its usual one.
            usual = getattr(target, "encoder", None)
            reads = "encoder_with_images" if hasattr(source, "encoding") else "encoder"
            self._encoder = getattr(target, reads, usual)
        self._options = options
        self._reporter = reporter
        self._stop = stop
        self._totals = Totals()
        self._truncated_before = truncated_of(self._encoder)
        self._seconds = dict.fromkeys(("read", "encode", "blocked"), 0.0)
        self._stamp, self._width = self._identity()
        self._documents: Documents = (
            getattr(source, "documents", None)
            or options.documents
            or getattr(target, "documents", None)
            or "encoded"
        )
        self._images = encoding_of(source, self._encoder, self._documents)
        # Rows made earlier bring their texts in their payloads, images have none.
        keeps_text = getattr(source, "has_texts", True)
        if keeps_text and options.keeps_text is None:
            keeps_text = getattr(target, "store_text", True)
        elif options.keeps_text is False:
            keeps_text = False
        self._text_key = getattr(target, "text_key", "text") if keeps_text else None
        # Makes the collection, or checks that it was made for this encoder.
        brings_rows = getattr(self._source, "width", None) is not None
        stamp, makes = self._stamp, None if brings_rows else self._encoder
        if makes is not None and self._store.width is None:
            stamp = with_probes(makes, stamp)
        self._store.create(
            self._width,
            stamp,
            documents=self._documents,
            passages=checked_passages(options.passages),
        )
        if stamp is not None and (brings_rows or self._images is not None):
            self._store.record_images(stamp)
        kept = self._store.stamp
        # A collection that was made just now keeps the probes of this very encoder.
        if makes is not None and self._documents == "encoded" and kept is not stamp:
            check_probes(makes, kept, "document", repr(self._store))
        if kept is not None and kept.is_old and self._stamp is not None:
            # Fingerprints of the documents that are there are made of what was known then.
            self._stamp = self._stamp.as_before()
        self._kind = type(self._store).__name__
        self._passages = self._store.passages
        self._options = replace(options, passages=self._passages)
        self._name = getattr(self._store, "name", None)
        self._store = documents_of(self._store, self._text_key)

    def _identity(self) -> tuple[EncoderStamp | None, int]:
        """Stamp and width of the rows, from a source of ready rows or from the encoder."""
        width = getattr(self._source, "width", None)
        if width is not None:
            return getattr(self._source, "stamp", None), int(width)
        if self._encoder is None:
            raise ConfigError(
                "texts need an encoder, got none; pass `encoder=` or a collection that has one."
            )
        return self._encoder.stamp(), int(self._encoder.vocabulary.size)

    def description(self) -> Mapping[str, Any]:
        """What the ledger must agree on before it is resumed."""
        if self._source.description is None:
            raise ConfigError(
                "a ledger needs an input that can be recognised and read again, got a stream; "
                "ingest from files, name a `RecordSource` by `identity=`, or leave the ledger out "
                "and use skip='existing'."
            )
        options = self._options
        return {
            "input": self._source.description,
            "encoder": comparable_stamp(self._stamp),
            "policy": {
                **({} if self._passages is None else {"passages": self._passages.to_dict()}),
                "documents": self._documents,
                "text_key": self._text_key,
                "has_fingerprint": options.has_fingerprint,
                "empty": options.empty,
            },
            "store": {
                "kind": self._kind,
                "name": self._name,
            },
        }

    def run(self, ledger: Ledger | None, quarantine: Quarantine | None) -> IngestReport:
        """Everything between the opened files and the report."""
        began = time.monotonic()
        options = self._options
        writers = options.writers or int(getattr(self._store, "concurrent_writers", 1))
        documents = options.batch_documents or (1024 if writers == 1 else 256)
        self._journal = Journal(
            self._totals,
            self._flush,
            ledger=ledger,
            quarantine=quarantine,
            options=options,
        )
        self._pool = WriterPool(
            self._store.upsert,
            writers=writers,
            limit=BatchLimit(documents, options.batch_bytes),
            queue_bytes=options.queue_bytes,
            policy=options.retry,
            on_acknowledged=self._journal.acknowledged,
            on_refused=self._journal.refused,
            after_write=self._journal.checkpoint_if_due,
        )
        self._calls = Retrier(options.retry, stop=self._pool.aborting, seed=-1)
        self._flushes = Retrier(options.retry, stop=self._pool.aborting, seed=-2)
        try:
            if ledger is not None and ledger.is_resumed:
                self._check_store_still_holds(ledger)
            settled = Ranges() if ledger is None else ledger.settled
            is_interrupted = not self._feed(settled, documents)
            self._pool.drain(self._tick)
            self._journal.checkpoint(is_complete=not is_interrupted)
            self._pool.close(abort=False)
            verification = None
            if options.is_verified and not is_interrupted:
                verification = self._verify()
        except BaseException as raised:
            # A wait that a writer's failure ended says less than that failure.
            error = self._pool.failure or raised if isinstance(raised, Stopped) else raised
            self._pool.close(abort=True)
            self._keep_what_is_acknowledged(error)
            self._reporter.update(self._totals, is_last=True)
            if type(error) in (StoreUnavailable, InputError):
                raise type(error)(self._explained(error, ledger)) from error
            raise error from error.__cause__
        self._tick()
        self._reporter.update(self._totals, is_last=True)
        return IngestReport(
            totals=self._totals,
            acknowledged_in_total=self._journal.acknowledged_in_total,
            refused_in_total=self._journal.refused_in_total,
            reasons=dict(self._journal.reasons.most_common()),
            is_complete=not is_interrupted,
            is_interrupted=is_interrupted,
            verification=verification,
            seconds={
                "total": time.monotonic() - began,
                **self._seconds,
                "write": self._pool.write_s,
                "checkpoint": self._journal.checkpoint_s,
            },
            ledger=None if ledger is None else str(ledger.path),
            quarantine=None if quarantine is None else str(quarantine.path),
        )

    def _feed(self, settled: Ranges, documents: int) -> bool:
        """Reads, encodes and submits; whether the input came to its end."""
        window = Window()
        prepare = self._preparation()
        for block in self._timed_blocks(settled, window):
            self._totals.resumed += block.resumed
            self._totals.read += block.resumed + len(block.records)
            self._tick()
            if self._stop.is_requested:
                return False
            if not block.records:
                continue
            began = time.monotonic()
            prepared = prepare(block)
            took_s = time.monotonic() - began
            self._seconds["encode"] += took_s
            window.took(len(block.records), took_s)
            prepared.count(self._totals)
            self._totals.truncated = truncated_of(self._encoder) - self._truncated_before
            self._journal.skipped(prepared.skipped)
            if prepared.refused:
                self._journal.refused(prepared.refused)
            began = time.monotonic()
            self._pool.submit_in_parts(prepared.piece, prepared.nbytes, documents, self._tick)
            self._seconds["blocked"] += time.monotonic() - began
        return True

    def _timed_blocks(self, settled: Ranges, window: Window) -> Iterator[Block]:
        blocks = self._source.blocks(settled, window)
        while True:
            began = time.monotonic()
            try:
                block = next(blocks, None)
            except InputError:
                self._pool.drain(self._tick)  # what was read before the broken line is stored
                raise
            self._seconds["read"] += time.monotonic() - began
            if block is None:
                return
            yield block

    def _preparation(self) -> Preparation:
        encoder = self._encoder
        encode: Callable[[list[str]], SparseRows | PassageRows] | None = None
        if encoder is not None and self._images is None:
            encoder = cast("Encoder", encoder)  # of texts: that of images alone has `_images`
            is_bag = self._documents == "tokens"
            whole = encoder.bag_of_tokens if is_bag else encoder.encode_documents
            encode, passages = whole, self._passages
            if passages is not None:
                encode = lambda texts: encode_passages(whole, encoder, texts, passages)  # noqa: E731
        return Preparation(
            encode=encode,
            stamp=self._stamp,
            width=self._width,
            text_key=self._text_key,
            options=self._options,
            stored=self._stored,
            images=self._images,
            thumbnail_px=getattr(self._source, "thumbnail_px", None),
        )

    def _tick(self) -> None:
        retriers = (self._pool, self._calls, self._flushes)
        self._totals.retries = sum(one.retries for one in retriers)
        self._totals.splits = self._pool.splits
        self._totals.queued_bytes = self._pool.queued_bytes
        self._reporter.update(self._totals)
        if self._stop.is_urgent:
            raise KeyboardInterrupt

    def _flush(self) -> None:
        # At the end of a failed run, one try decides.
        is_failed = self._pool.aborting.is_set()
        retrier = Retrier(RetryPolicy(tries=1)) if is_failed else self._flushes
        retrier.call(self._store.flush, "flushing the store")

    def _stored(self, ids: Sequence[int | str]) -> dict[int | str, dict[str, Any]]:
        # An id that is being written now is not what the store will hold in a moment.
        in_flight = self._pool.ids_in_flight(ids)
        records = self._calls.call(lambda: self._store.get(ids), "fetching documents")
        return {one.id: one.payload or {} for one in records if one.id not in in_flight}

    def _check_store_still_holds(self, ledger: Ledger) -> None:
        missing = missing_ids(self._store, (one.id for one in ledger.sample), self._calls.call)
        if missing:
            raise StoreMismatch(
                f"the ledger {ledger.path} says that {ledger.counters.get('acknowledged', 0)} "
                f"documents are stored, but {len(missing)} of {len(ledger.sample)} sampled ones "
                f"are not in the store ({missing[0]!r}); this is another store, or it was emptied: "
                "open the right one, or restart to write everything again."
            )

    def _verify(self) -> Verification:
        def all_ids() -> Iterator[int | str]:
            for block in self._source.blocks(Ranges(), Window(documents=1024)):
                yield from (record.id for record in block.records)

        # Ids left out for their empty vectors are not written down anywhere, so a count that is
        # short because records share an id could not be told from a loss.
        is_guess = self._options.empty == "skip"
        return verify(
            self._store,
            self._journal.sample,
            least_count=0 if is_guess else self._journal.acknowledged_in_total,
            width=self._width,
            call=self._calls.call,
            refused=self._journal.refused_ids,
            all_ids=all_ids if self._source.is_rereadable else None,
        )

    def _keep_what_is_acknowledged(self, error: BaseException) -> None:
        # After a panic nothing more is asked of the engine; the last checkpoint stands.
        is_broken = not isinstance(
            error, (StoreUnavailable, StoreMismatch, InputError, ConfigError, KeyboardInterrupt)
        )
        if not is_broken:
            with suppress(Exception):  # the first error is the one to report
                self._journal.checkpoint()

    def _explained(self, error: BaseException, ledger: Ledger | None) -> str:
        """What went wrong, what is safe, and how to go on."""
        kept = self._journal.acknowledged_in_total
        how = (
            "there is no ledger, so run again with skip='existing'"
            if ledger is None
            else f"the ledger {ledger.path} knows them, so run the same again to resume"
        )
        return f"{error} {kept} documents are acknowledged; {how}."
