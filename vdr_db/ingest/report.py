"""What an ingest did: running totals, the outcome of the checks, and the report of the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from vdr_db.connectors.encoder import Encoder, ImageReader

__all__ = ["IngestReport", "Totals", "Verification", "truncated_of"]


@dataclass
class Totals:
    """Counts of one run, growing while it runs. Records settled by earlier runs are `resumed`.

    Attributes:
        read: Records read from the input, resumed ones included.
        resumed: Records the ledger already knew as settled; they are not encoded again.
        existing: Records left out because the store had their id (`skip_existing`).
        unchanged: Records left out because the store had the same text and payload.
        encoded: Records turned into vectors.
        acknowledged: Records the store confirmed.
        refused: Records that went to the quarantine.
        repeated: Records whose id came again later in the same window; the last one is stored.
        empty: Encoded records without any weight.
        truncated: Texts longer than the encoder reads, which it has cut.
        nonzeros: Weights of all encoded records.
        retries: Calls repeated after a failure.
        splits: Batches cut in two, because they were too big or to isolate a refused row.
        queued_bytes: Estimated bytes waiting or being written now.
    """

    read: int = 0
    resumed: int = 0
    existing: int = 0
    unchanged: int = 0
    encoded: int = 0
    acknowledged: int = 0
    refused: int = 0
    repeated: int = 0
    empty: int = 0
    truncated: int = 0
    nonzeros: int = 0
    retries: int = 0
    splits: int = 0
    queued_bytes: int = 0


def truncated_of(encoder: Encoder | ImageReader | None) -> int:
    """How many texts an encoder has cut so far; 0 for one that does not count them."""
    return int(getattr(encoder, "truncated", 0))


@dataclass(frozen=True)
class Verification:
    """What the checks at the end saw.

    Attributes:
        is_passed: Whether every check held.
        count: Documents in the store.
        read_back: Documents fetched by id and compared with what was written.
        searched: Documents found again by their own vector.
        problems: One sentence for each check that failed.
    """

    is_passed: bool
    count: int
    read_back: int = 0
    searched: int = 0
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class IngestReport:
    """The outcome of an ingest.

    Attributes:
        totals: Counts of this run.
        acknowledged_in_total: Acknowledged records of this run and, with a ledger, of all runs
            before it.
        refused_in_total: The same for refused records.
        reasons: Reason → number of records refused in this run, commonest first.
        is_complete: Whether the whole input is settled.
        is_interrupted: Whether the run was asked to stop before its end.
        verification: Outcome of the checks; `None` when they were not run.
        seconds: Wall time of the stages: `total`, `read`, `encode`, `blocked` (encoder waiting for
            a full queue), `write` (summed over writers) and `checkpoint`.
        ledger: Path of the ledger, or `None`.
        quarantine: Path of the quarantine file, or `None`.
    """

    totals: Totals
    acknowledged_in_total: int
    refused_in_total: int
    reasons: Mapping[str, int] = field(default_factory=dict)
    is_complete: bool = True
    is_interrupted: bool = False
    verification: Verification | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    ledger: str | None = None
    quarantine: str | None = None

    @property
    def documents_per_second(self) -> float:
        """Acknowledged documents of this run over its wall time."""
        total = self.seconds.get("total", 0.0)
        return self.totals.acknowledged / total if total > 0 else 0.0

    @property
    def mean_nonzeros(self) -> float:
        """Mean number of weights per encoded document."""
        return self.totals.nonzeros / self.totals.encoded if self.totals.encoded else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return {
            **asdict(self),
            "documents_per_second": round(self.documents_per_second, 3),
            "mean_nonzeros": round(self.mean_nonzeros, 3),
        }
