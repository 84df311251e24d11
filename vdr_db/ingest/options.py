"""The options of an ingest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vdr_db.connectors.base import Documents, EmptyRows
from vdr_db.connectors.passages import Passages, checked_passages
from vdr_db.connectors.retry import RetryPolicy
from vdr_db.counts import counted
from vdr_db.errors import ConfigError

__all__ = ["IngestOptions"]


@dataclass(frozen=True)
class IngestOptions:
    """How an ingest runs. `None` lets the collection or the store decide.

    Attributes:
        documents: `"encoded"` takes vectors of the model, `"tokens"` bags of tokens (beta search).
        passages: Cuts texts into passages, `True` or `Passages(...)`, in a collection that the run
            makes; `None` does as the collection does.
        keeps_text: Whether payloads get the text; by default what the collection says, else yes.
        has_fingerprint: Whether payloads get `_vdr_fp`, a hash of text, payload and encoder, which
            `skip="unchanged"` compares.
        skip: `"existing"` leaves out documents whose id the store has; `"unchanged"` those it has
            with the same text, payload and encoder.
        empty: What becomes of documents whose vector has no weight: `"store"` keeps them, though no
            search finds them, `"skip"` leaves them out, `"error"` quarantines them.
        writers: Writer threads: as many as the store likes, 1 embedded and 2 for servers.
        batch_documents: Most documents of a call: 1,024 with one writer, 256 with more.
        batch_bytes: Most estimated bytes of a request: 4 MiB.
        queue_bytes: Most memory of rows waiting or being written.
        retry: Tries and waits of failed requests.
        max_errors: Refused documents that stop the ingest when exceeded; `None` stands for 100 or
            1 % of what was read, whichever is more.
        checkpoint_documents: Settled documents after which the ledger is committed.
        checkpoint_s: Seconds after which the ledger is committed.
        is_verified: Whether the store is checked at the end.
        restart: Forget ledger and quarantine of an earlier run instead of resuming.
    """

    documents: Documents | None = None
    passages: bool | Passages | None = None
    keeps_text: bool | None = None
    has_fingerprint: bool = True
    skip: Literal["existing", "unchanged"] | None = None
    empty: EmptyRows = "store"
    writers: int | None = None
    batch_documents: int | None = None
    batch_bytes: int = 4 << 20
    queue_bytes: int = 64 << 20
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    max_errors: int | None = None
    checkpoint_documents: int = 5000
    checkpoint_s: float = 5.0
    is_verified: bool = True
    restart: bool = False

    def __post_init__(self) -> None:
        """Refuses impossible options."""
        object.__setattr__(self, "passages", checked_passages(self.passages))
        for name, known in (
            ("documents", (None, "encoded", "tokens")),
            ("skip", (None, "existing", "unchanged")),
            ("empty", ("store", "skip", "error")),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"`{name}` must be one of {known}, got {getattr(self, name)!r}.")
        for name in ("batch_bytes", "queue_bytes", "checkpoint_documents", "checkpoint_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"`{name}` must be greater than 0, got {getattr(self, name)!r}.")
        for name, least in (("writers", 1), ("batch_documents", 1), ("max_errors", 0)):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, counted(name, value, least=least))
        if self.skip == "unchanged" and not self.has_fingerprint:
            raise ConfigError("`skip='unchanged'` compares fingerprints: keep `has_fingerprint`.")
