"""Batches of texts through a tower of torch: one by one, or overlapping on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vdr_db.encoders.batching import PackedBatch
from vdr_db.encoders.rows import lexical_columns
from vdr_db.encoders.scanning import HeadChoice, codes_of
from vdr_db.encoders.selection import to_sparse_rows
from vdr_db.encoders.text_cuda import (
    DeviceQueue,
    Outcome,
    QueryGraphs,
    encode_batches,
    outcome_of,
)
from vdr_db.kernels import Activation, Backend, Pooled, project_pool
from vdr_db.kernels.cpu.pooling import pool_columns
from vdr_db.kernels.cpu.products import exact_levels
from vdr_db.kernels.cpu.scan import Codes, encoded, scan
from vdr_db.kernels.cpu.tiles import columns_are_independent
from vdr_db.kernels.reference import compute_dtype
from vdr_db.sparse import SparseRows
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.text import Tower
from vdr_db.towers.torch_text import ProjectedTower

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
        choice: Remembers whether a scan is faster, on the CPU.
    """

    tower: Tower
    vocabulary: Vocabulary
    k: int | None
    activation: Activation
    norm: bool
    backend: Backend
    lexical: Callable[[PackedBatch], SparseRows | None]
    graphs: QueryGraphs | None = None
    choice: HeadChoice = field(default_factory=HeadChoice)

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
        """Vectors of a batch where batches do not overlap."""
        device, tower, own = self.tower.device, self.tower, self.lexical(batch)

        def upload(array: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        if device.type != "cpu" or not isinstance(tower, ProjectedTower):
            return self._selected(batch, own, self._logits(batch, upload))
        states, bounds = tower.packed_states(
            upload(batch.input_ids),
            upload(batch.position_ids),
            upload(batch.cu_seqlens),
            batch.runs,
        )
        longest = max(run.length for run in batch.runs)
        head = ScannedHead(states, bounds, tower.matrix(), tower.bias_rows())
        return self.choice.rows(
            self.backend,
            (longest, self.k, self.activation),
            tokens=len(batch.input_ids),
            weights=head.version,
            is_possible=lambda: not self.norm and head.can_scan(tower),
            plain=lambda: self._selected(
                batch, own, head.pooled(batch, longest=longest, backend=self.backend)
            ),
            scan=lambda: self._selected(batch, own, self._scanned(batch, own, head)),
        )

    def _scanned(self, batch: PackedBatch, own: SparseRows | None, head: ScannedHead) -> Tensor:
        kept = None if own is None else lexical_columns(own, self.vocabulary)
        rows = []
        for place in range(len(batch.texts)):
            always = None if kept is None else kept[1][kept[0][place] : kept[0][place + 1]]
            rows.append(
                head.scanned(self.tower, place, k=self.k, activation=self.activation, always=always)
            )
        return torch.stack(rows)

    def _selected(self, batch: PackedBatch, own: SparseRows | None, logits: Tensor) -> SparseRows:
        return to_sparse_rows(
            logits,
            self.vocabulary,
            k=self.k,
            activation=self.activation,
            norm=self.norm,
            lexical=own,
            backend=self.backend,
            name=lambda row: f"text {int(batch.texts[row])}",
        )


@dataclass(frozen=True)
class ScannedHead:
    """The head of a tower on the states of one batch, on the CPU.

    Attributes:
        states: `[R, H]`, as the matrix wants them.
        bounds: `[B + 1]`, where those of each text begin.
        matrix: `[V, H]`.
        bias: `[V]` or None.
    """

    states: Tensor
    bounds: Tensor
    matrix: Tensor
    bias: Tensor | None

    @property
    def version(self) -> object:
        """Something that changes when the weights do."""
        parts = [part for part in (self.matrix, self.bias) if part is not None]
        return [(part.data_ptr(), part._version, part.dtype, part.shape) for part in parts]

    def can_scan(self, tower: Tower) -> bool:
        """Whether scans are exact on this machine, as it is set now."""
        V, H = self.matrix.shape
        dtype = compute_dtype(self.states, self.matrix)
        return (
            dtype == torch.float32
            # Else products may be formed in bfloat16, whose rounding no bound here covers.
            and torch.get_float32_matmul_precision() == "highest"
            and exact_levels(torch.get_num_threads()) > 0
            and columns_are_independent(H, V, dtype)
            and len(self.codes(tower).scales) == V
        )

    def codes(self, tower: Tower) -> Codes:
        """The matrix in 8 bit integers."""
        bias = None if self.bias is None else self.bias.float().numpy()

        def read(rows: slice) -> npt.NDArray[np.float32]:
            found: npt.NDArray[np.float32] = self.matrix[rows].float().numpy()
            return found

        threads = torch.get_num_threads()
        return codes_of(
            tower,
            (self.version, threads),
            lambda: encoded(read, self.matrix.shape[0], bias, threads),
        )

    def pooled(self, batch: PackedBatch, *, longest: int, backend: Backend) -> Tensor:
        """All scores, `[B, V]`."""
        found = project_pool(
            *(self.states, self.bounds, self.matrix, self.bias),
            max_length=longest,
            backend=backend,
        )
        return found.logits[: len(batch.texts)]

    def scanned(
        self,
        tower: Tower,
        text: int,
        *,
        k: int | None,
        activation: Activation,
        always: npt.NDArray[np.int32] | None,
    ) -> Tensor:
        """Scores of one text, `[V]`, -inf where they are never kept."""
        states = self.states[slice(*self.bounds[text : text + 2].tolist())]

        def exact(columns: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
            chosen = torch.from_numpy(columns)
            found: npt.NDArray[np.float32] = pool_columns(
                states, self.matrix, self.bias, chosen
            ).numpy()
            return found

        scores = scan(
            self.codes(tower),
            states.float().numpy(),
            exact,
            k=k,
            activation=activation,
            always=always,
        )
        if scores is not None:
            return torch.from_numpy(scores)
        bounds = torch.tensor([0, len(states)], dtype=torch.int32)
        return project_pool(states, bounds, self.matrix, self.bias, backend="cpu").logits[0]
