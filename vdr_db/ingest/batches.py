"""Rows on their way to a store, and how many of them go in one request."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vdr_db.connectors.passages import PassageRows
from vdr_db.ingest.quarantine import Refusal
from vdr_db.sparse import SparseRows

__all__ = ["BatchLimit", "Piece"]

_SUCCESSES_TO_GROW = 20
_STEPS_TO_MOST = 4  # a limit grows back in this many steps


@dataclass(frozen=True)
class Piece:
    """Rows on their way to the store: each with the number of its record, id, payload and source.

    `rows` are of whole documents, or of the passages of each. `wire_bytes` is `[N]` int64, the
    estimated size of each in a request.
    """

    numbers: Sequence[int]
    ids: Sequence[int | str]
    rows: SparseRows | PassageRows
    payloads: Sequence[dict[str, Any]]
    sources: Sequence[str]
    wire_bytes: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Number of records."""
        return len(self.ids)

    def __getitem__(self, part: slice) -> Piece:
        """Some of the records."""
        return Piece(
            self.numbers[part],
            self.ids[part],
            self.rows[part],
            self.payloads[part],
            self.sources[part],
            self.wire_bytes[part],
        )

    def chosen(self, which: npt.NDArray[np.int64]) -> Piece:
        """The records at these positions."""
        return Piece(
            [self.numbers[i] for i in which],
            [self.ids[i] for i in which],
            self.rows[which],
            [self.payloads[i] for i in which],
            [self.sources[i] for i in which],
            self.wire_bytes[which],
        )

    def refusal(self, i: int, reason: str) -> Refusal:
        """The refusal of record `i`."""
        return Refusal(self.numbers[i], self.ids[i], reason, self.sources[i])


class BatchLimit:
    """How large a request may be: halved when the store chokes, grown back slowly (AIMD).

    At the start and at most `documents` records; one record may exceed the `bytes` alone.
    """

    def __init__(self, documents: int, bytes: int) -> None:
        self._most = self._documents = max(1, documents)
        self._bytes = bytes
        self._successes = 0
        self._lock = threading.Lock()

    @property
    def documents(self) -> int:
        """Most records of a request now."""
        return self._documents

    def cut(self, piece: Piece) -> int:
        """How many leading records of the piece make one request, at least 1."""
        fitting = int(np.searchsorted(np.cumsum(piece.wire_bytes), self._bytes, side="right"))
        return max(1, min(self._documents, fitting, len(piece)))

    def too_big(self, documents: int) -> None:
        """A request of this many records was refused for its size."""
        self._shrink(documents // 2)

    def too_slow(self, documents: int) -> None:
        """A request of this many records was not answered in time.

        A busy server is not helped by ever more requests, so this stops at an eighth of the most.
        """
        self._shrink(max(documents // 2, self._most // 8))

    def _shrink(self, documents: int) -> None:
        with self._lock:
            self._documents = max(1, min(self._documents, documents))
            self._successes = 0

    def succeeded(self) -> None:
        """A request went through; after every 20 the limit grows by a quarter of its most."""
        with self._lock:
            self._successes += 1
            if self._successes >= _SUCCESSES_TO_GROW and self._documents < self._most:
                step = max(1, self._most // _STEPS_TO_MOST)
                self._documents = min(self._most, self._documents + step)
                self._successes = 0
