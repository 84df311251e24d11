"""Texts through a tower that is a graph, one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from vdr_db.encoders.batching import PackedBatch
from vdr_db.encoders.rows import lexical_columns, row_of
from vdr_db.encoders.scanning import HeadChoice, codes_of
from vdr_db.kernels import Activation, Backend
from vdr_db.kernels.cpu.products import exact_levels, rows_are_independent
from vdr_db.kernels.cpu.scan import Codes, scan
from vdr_db.sparse import SparseRows
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.interface import FloatArray
from vdr_db.towers.onnx import OnnxTextTower

__all__ = ["OnnxScoring"]

OwnColumns: TypeAlias = "npt.NDArray[np.int32] | None"


@dataclass(frozen=True)
class OnnxScoring:
    """Which tower scores texts, and what is kept of the scores.

    Attributes:
        tower: Body and head.
        vocabulary: Of the head.
        k: Columns kept of each row, or None for all with a weight.
        activation: Turns scores into weights.
        norm: Whether rows have L2 norm 1 before selection.
        backend: `"cpu"` computes all scores in fp32, `"cpu-int8"` scans first; the vectors are
            the same.
        lexical: The own tokens of a batch, kept in any case; None where there are none.
        choice: Remembers whether a scan is faster.
    """

    tower: OnnxTextTower
    vocabulary: Vocabulary
    k: int | None
    activation: Activation
    norm: bool
    backend: Backend
    lexical: Callable[[PackedBatch], SparseRows | None]
    choice: HeadChoice

    def rows_of(self, batches: Iterable[PackedBatch]) -> Iterator[tuple[PackedBatch, SparseRows]]:
        """Batches with their rows, in order.

        Raises:
            ConfigError: A weight is not finite; the message names the text.
        """
        for batch in batches:
            own = self._own_columns(batch)
            rows = [self._row(batch, place, columns) for place, columns in enumerate(own)]
            yield batch, SparseRows.concat(rows)

    def _row(self, batch: PackedBatch, place: int, own: OwnColumns) -> SparseRows:
        """The row of one text: its states once, then its scores by the way that is faster."""
        item = batch.item(place)
        states = self.tower.states(item)

        def kept(scores: FloatArray) -> SparseRows:
            return row_of(
                scores,
                self.vocabulary,
                k=self.k,
                activation=self.activation,
                norm=self.norm,
                lexical=own,
                name=f"text {batch.texts[place]}",
            )

        return self.choice.rows(
            self.backend,
            (len(states), self.k, self.activation),
            tokens=len(item.input_ids),
            weights=None,  # those of a file never change
            is_possible=self._can_scan,
            plain=lambda: kept(self.tower.scores(states)),
            scan=lambda: kept(self._scanned(states, own)),
        )

    def _can_scan(self) -> bool:
        threads = self.tower.threads
        if self.norm or not exact_levels(threads):  # a norm asks for all scores
            return False
        self._codes()  # not while time is measured
        return rows_are_independent(self.tower.matrix.shape[1], threads)

    def _codes(self) -> Codes:
        return codes_of(self.tower, None, self.tower.encoded)

    def _own_columns(self, batch: PackedBatch) -> list[OwnColumns]:
        own = self.lexical(batch)
        if own is None:
            return [None] * len(batch.texts)
        bounds, columns = lexical_columns(own, self.vocabulary)
        return [columns[bounds[i] : bounds[i + 1]] for i in range(len(batch.texts))]

    def _scanned(self, states: FloatArray, own: OwnColumns) -> FloatArray:
        tower = self.tower
        found = scan(
            self._codes(),
            states,
            partial(tower.scores, states),
            k=self.k,
            activation=self.activation,
            always=own,
        )
        return tower.scores(states) if found is None else found
