"""What is settled so far, and when it becomes durable.

Writers report to the journal; a checkpoint makes a consistent state durable in this order:
the store's `flush`, the quarantine file, the ledger. A kill between two of them repeats work, it
never loses any.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from vdr_db.ingest.batches import Piece
from vdr_db.ingest.ledger import Ledger, Ranges, Sampled
from vdr_db.ingest.options import IngestOptions
from vdr_db.ingest.quarantine import Quarantine, Refusal, check_refusals
from vdr_db.ingest.report import Totals

__all__ = ["Journal"]

_SAMPLE = 64  # documents
_LONGEST_REASON_KEY = 80


class Journal:
    """Collects outcomes from all threads and commits them.

    Args:
        totals: Running totals to add to.
        flush: The store's barrier: when it returns, acknowledged writes are safe.
        ledger: Where settled numbers go; `None` keeps them for this run only.
        quarantine: Where refusals go; `None` keeps them for this run only.
        options: When to stop for refusals, over all runs of the ledger, and when to commit.
    """

    def __init__(
        self,
        totals: Totals,
        flush: Callable[[], object],
        *,
        ledger: Ledger | None,
        quarantine: Quarantine | None,
        options: IngestOptions,
    ) -> None:
        self.totals = totals
        self.reasons: Counter[str] = Counter()
        self.refused_ids: set[int | str] = set() if quarantine is None else set(quarantine.ids)
        self.checkpoint_s = 0.0
        self._flush = flush
        self._ledger = ledger
        self._quarantine = quarantine
        self._options = options
        self._lock = threading.Lock()
        self._committing = threading.Lock()
        self._settled = ledger.settled.copy() if ledger else Ranges()
        self._before: dict[str, int] = dict(ledger.counters) if ledger else {}
        self._sample = list(ledger.sample) if ledger else []
        self._slot_of = {one.id: slot for slot, one in enumerate(self._sample)}
        self._seen = max(self._before.get("acknowledged", 0), len(self._sample))
        self._chance = random.Random(len(self._settled))
        self._pending: list[Refusal] = []
        self._uncommitted = 0
        self._last_commit = time.monotonic()

    @property
    def acknowledged_in_total(self) -> int:
        """Acknowledged documents of this run and those before."""
        return self._before.get("acknowledged", 0) + self.totals.acknowledged

    @property
    def refused_in_total(self) -> int:
        """Refused documents of this run and those before."""
        return self._before.get("refused", 0) + self.totals.refused

    @property
    def sample(self) -> list[Sampled]:
        """A random sample of what was acknowledged, with the vectors that were written."""
        return list(self._sample)

    def acknowledged(self, piece: Piece) -> None:
        """The store has confirmed all records of the piece."""
        with self._lock:
            self._settled.update(piece.numbers)
            self.totals.acknowledged += len(piece)
            self._uncommitted += len(piece)
            for i, id in enumerate(piece.ids):
                self._seen += 1
                slot = self._slot_of.get(id)
                if slot is None:
                    slot = len(self._sample)
                    if slot >= _SAMPLE:
                        slot = int(self._chance.random() * self._seen)
                        if slot >= _SAMPLE:
                            continue
                        del self._slot_of[self._sample[slot].id]
                    self._slot_of[id] = slot
                indices, weights = piece.rows.row(i)
                self._sample[slot : slot + 1] = [Sampled(id, indices.copy(), weights.copy())]

    def refused(self, refusals: Sequence[Refusal]) -> None:
        """Records that will not be stored; an `InputError` for one too many."""
        with self._lock:
            self._settled.update(sorted(one.number for one in refusals))
            self._pending.extend(refusals)
            self.totals.refused += len(refusals)
            self._uncommitted += len(refusals)
            for one in refusals:
                self.reasons[one.reason[:_LONGEST_REASON_KEY]] += 1
                self.refused_ids.add(one.id)
            refused = self.refused_in_total
        check_refusals(refused, self._options.max_errors, self.totals.read, refusals[-1])

    def skipped(self, numbers: Iterable[int]) -> None:
        """Records that need no writing."""
        with self._lock:
            before = len(self._settled)
            self._settled.update(sorted(numbers))
            self._uncommitted += len(self._settled) - before

    def checkpoint_if_due(self) -> None:
        """Commits when enough documents or seconds have passed since the last commit."""
        waited_s = time.monotonic() - self._last_commit
        options = self._options
        is_due = (
            self._uncommitted >= options.checkpoint_documents or waited_s >= options.checkpoint_s
        )
        if is_due and self._uncommitted and self._committing.acquire(blocking=False):
            try:
                self._commit(is_complete=False)
            finally:
                self._committing.release()

    def checkpoint(self, *, is_complete: bool = False) -> None:
        """Commits now; `StoreUnavailable` if store, quarantine or ledger cannot be written."""
        with self._committing:
            self._commit(is_complete=is_complete)

    def _commit(self, *, is_complete: bool) -> None:
        began = time.monotonic()
        with self._lock:
            settled = self._settled.copy()
            sample = list(self._sample)
            pending = list(self._pending)
            counters = {
                "acknowledged": self.acknowledged_in_total,
                "refused": self.refused_in_total,
            }
            for name in ("existing", "unchanged", "repeated"):
                counters[name] = self._before.get(name, 0) + getattr(self.totals, name)
            committed = self._uncommitted
        self._flush()
        if self._quarantine is not None:
            self._quarantine.append(pending)
        if self._ledger is not None:
            self._ledger.commit(settled, counters, sample, is_complete=is_complete)
        with self._lock:
            del self._pending[: len(pending)]
            self._uncommitted -= committed
        self._last_commit = time.monotonic()
        self.checkpoint_s += self._last_commit - began
