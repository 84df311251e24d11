"""What a failed call of a store means, as its error carries it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["Failure", "FailureKind"]

FailureKind: TypeAlias = Literal["transient", "timeout", "too_big", "data", "setup", "fatal"]
"""What to do about a failed call; the table is in `vdr_db.connectors.failures`."""


@dataclass(frozen=True)
class Failure:
    """What one failed call of a store means.

    Attributes:
        kind: What to do about it.
        reason: One line for people, without secrets.
        retry_after_s: Seconds the server asked to wait, if it did.
        wants_split: Whether smaller requests may pass where this one did not.
        rejected: Caller's id → reason, when the store named the rows it refused.
    """

    kind: FailureKind
    reason: str
    retry_after_s: float | None = None
    wants_split: bool = False
    rejected: Mapping[int | str, str] | None = None
