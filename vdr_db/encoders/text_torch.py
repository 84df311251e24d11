"""Batches of texts through a tower of torch: one by one, or overlapping on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from vdr_db.encoders.batching import PackedBatch
from vdr_db.encoders.rows import lexical_columns
from vdr_db.encoders.selection import to_sparse_rows
from vdr_db.encoders.text_cuda import (
    DeviceQueue,
    Outcome,
    QueryGraphs,
    encode_batches,
    outcome_of,
)
from vdr_db.kernels import Activation, Backend, Pooled
from vdr_db.sparse import SparseRows
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.text import Tower

__all__ = ["TextScoring", "queue_on"]


def queue_on(device: torch.device) -> DeviceQueue | None:
    """Where batches may overlap; None where they run one by one."""
    return DeviceQueue(device) if device.type == "cuda" else None


@dataclass(frozen=True)
class TextScoring:
    """Which tower scores texts, and what is kept of the scores.

    Attributes:
        tower: Body and head.
        vocabulary: Of the head.
        k: Columns kept of each row, or None for all with a weight.
        activation: Turns scores into weights.
        norm: Whether rows have L2 norm 1 before selection.
        backend: Of the kernels.
        lexical: The own tokens of a batch, kept in any case; None where there are none.
        graphs: Replays small batches on a GPU; None for none.
    """

    tower: Tower
    vocabulary: Vocabulary
    k: int | None
    activation: Activation
    norm: bool
    backend: Backend
    lexical: Callable[[PackedBatch], SparseRows | None]
    graphs: QueryGraphs | None = None

    def rows_of(self, batches: Iterable[PackedBatch]) -> Iterator[tuple[PackedBatch, SparseRows]]:
        """Batches with their rows, in order; on a GPU they overlap.

        Args:
            batches: Each made when it is asked for.

        Raises:
            ConfigError: A weight is not finite; the message names the text.
        """
        with self.tower.evaluating():
            queue = queue_on(self.tower.device)
            if queue is not None:
                yield from self._overlapping(batches, queue)
            else:
                for batch in batches:
                    yield batch, self._rows(batch)

    def _overlapping(
        self, batches: Iterable[PackedBatch], queue: DeviceQueue
    ) -> Iterator[tuple[PackedBatch, SparseRows]]:
        graphs = self.graphs

        def score(batch: PackedBatch) -> Outcome:
            size = None if graphs is None else graphs.size_of(batch, queue.device)
            if graphs is not None and size is not None:
                return graphs.score(batch, size, queue)
            return self.outcome(batch, queue)

        yield from encode_batches(batches, score, queue, self.vocabulary)

    def outcome(self, batch: PackedBatch, queue: DeviceQueue) -> Outcome:
        """Queues the computation of one batch, from token ids to an untrimmed selection."""
        logits = self._logits(batch, queue.upload)
        lexical, forced = self.lexical(batch), None
        if lexical is not None:
            indptr, columns = lexical_columns(lexical, self.vocabulary)
            forced = (queue.upload(indptr), queue.upload(columns))
        return outcome_of(logits, self.k, self.activation, self.norm, self.backend, forced)

    def _logits(self, batch: PackedBatch, upload: Callable[[npt.NDArray[Any]], Tensor]) -> Tensor:
        pooled: Pooled = self.tower(
            upload(batch.input_ids),
            upload(batch.position_ids),
            upload(batch.cu_seqlens),
            batch.runs,
            backend=self.backend,
        )
        return pooled.logits[: len(batch.texts)]

    def _rows(self, batch: PackedBatch) -> SparseRows:
        device = self.tower.device
        return to_sparse_rows(
            self._logits(batch, lambda x: torch.from_numpy(x).to(device, non_blocking=True)),
            self.vocabulary,
            k=self.k,
            activation=self.activation,
            norm=self.norm,
            lexical=self.lexical(batch),
            backend=self.backend,
            name=lambda row: f"text {int(batch.texts[row])}",
        )
