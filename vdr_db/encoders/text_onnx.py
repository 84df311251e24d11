"""Texts through a tower of ONNX Runtime, one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from vdr_db.encoders.batching import PackedBatch
from vdr_db.encoders.rows import lexical_columns, row_of
from vdr_db.kernels import Activation
from vdr_db.sparse import SparseRows
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.onnx import OnnxTextTower

__all__ = ["OnnxScoring"]


@dataclass(frozen=True)
class OnnxScoring:
    """Which tower scores texts, and what is kept of the scores.

    Attributes:
        tower: Body and head.
        vocabulary: Of the head.
        k: Columns kept of each row, or None for all with a weight.
        activation: Turns scores into weights.
        norm: Whether rows have L2 norm 1 before selection.
        lexical: The own tokens of a batch, kept in any case; None where there are none.
    """

    tower: OnnxTextTower
    vocabulary: Vocabulary
    k: int | None
    activation: Activation
    norm: bool
    lexical: Callable[[PackedBatch], SparseRows | None]

    def rows_of(self, batches: Iterable[PackedBatch]) -> Iterator[tuple[PackedBatch, SparseRows]]:
        """Batches with their rows, in order.

        Raises:
            ConfigError: A weight is not finite; the message names the text.
        """
        for batch in batches:
            bounds, columns = np.zeros(len(batch.texts) + 1, np.int64), np.zeros(0, np.int32)
            own = self.lexical(batch)
            if own is not None:
                bounds, columns = lexical_columns(own, self.vocabulary)
            rows = [
                row_of(
                    self.tower.pooled(batch.item(place)),
                    self.vocabulary,
                    k=self.k,
                    activation=self.activation,
                    norm=self.norm,
                    lexical=None if own is None else columns[bounds[place] : bounds[place + 1]],
                    name=f"text {text}",
                )
                for place, text in enumerate(batch.texts)
            ]
            yield batch, SparseRows.concat(rows)
