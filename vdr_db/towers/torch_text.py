"""What towers of texts share where torch computes them: one text alone, and scores of a batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vdr_db.kernels import Backend, Pooled, project_pool
from vdr_db.towers.packing import ROW_MULTIPLE, Run, TextItem
from vdr_db.towers.text_body import Padding, Ragged
from vdr_db.towers.torch_tower import TorchTower

__all__ = ["ProjectedTower", "TextSizes", "TorchTextTower"]


class TextSizes(Protocol):
    """What fills the places of a batch behind its texts."""

    @property
    def pad_id(self) -> int:
        """Token id of padding."""

    @property
    def first_position(self) -> int:
        """Position of the first token of a text."""


class TorchTextTower(TorchTower):
    """A tower whose items are texts."""

    @property
    @abstractmethod
    def config(self) -> TextSizes:
        """Sizes and constants of the body."""

    def pooled(self, item: TextItem) -> npt.NDArray[np.float32]:
        """Largest score of each column over a text's tokens, `[V]` float32."""
        with self.evaluating():
            logits = self(*self.alone(item)).logits[0]
        found: npt.NDArray[np.float32] = logits.cpu().numpy()
        return found

    def alone(self, item: TextItem) -> tuple[Tensor, Tensor, Tensor, list[Run]]:
        """A text as a batch of its own: ids, positions, bounds, runs."""
        length, rest = len(item.input_ids), -len(item.input_ids) % ROW_MULTIPLE
        runs = [Run(start=0, count=1, length=length, kept=item.kept)]
        if rest:
            runs.append(Run(start=length, count=1, length=rest, kept=rest))
        ids = np.pad(item.input_ids, (0, rest), constant_values=self.config.pad_id)
        positions = np.pad(item.position_ids, (0, rest), constant_values=self.config.first_position)
        bounds = np.array([0, *(run.stop for run in runs)], np.int32)
        packed = [torch.from_numpy(part).to(self.device) for part in (ids, positions, bounds)]
        return packed[0], packed[1], packed[2], runs


class ProjectedTower(TorchTextTower):
    """A tower whose scores are products of states with the rows of a matrix."""

    def states(self, item: TextItem) -> npt.NDArray[np.float32]:
        """States of a text's tokens after the head's transform, `[P, H]` float32."""
        ids, positions, bounds, runs = self.alone(item)
        with self.evaluating():
            states, bounds = self.packed_states(ids, positions, bounds, runs)
        found: npt.NDArray[np.float32] = states[: int(bounds[1])].float().cpu().numpy()
        return found

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        runs: Sequence[Run],
        *,
        backend: Backend = "auto",
        return_argmax: bool = False,
        layout: Padding | Ragged | None = None,
    ) -> Pooled:
        """Scores of each text and column before activation.

        Args:
            input_ids: `[T]` int64, all texts one after the other.
            position_ids: `[T]` int64.
            cu_seqlens: `[B + 1]` integers, text b is `input_ids[cu_seqlens[b]:cu_seqlens[b + 1]]`.
            runs: The same texts in groups of equal length; not looked at where there is a layout.
            backend: Of the kernels.
            return_argmax: Whether to tell which token gave each score.
            layout: How attention goes through the texts; None lets the body decide.

        Returns:
            `logits` `[B, V]` float32, `argmax` `[B, V]` int16 (texts of up to 32,767 tokens),
            int32 or None.
        """
        longest = max((run.length for run in runs), default=None)
        if isinstance(layout, Ragged):
            longest = layout.longest
        return project_pool(
            *self.packed_states(input_ids, position_ids, cu_seqlens, runs, layout=layout),
            self.matrix(),
            self.bias_rows(),
            backend=backend,
            return_argmax=return_argmax,
            max_length=longest,
        )

    @abstractmethod
    def packed_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        runs: Sequence[Run],
        *,
        layout: Padding | Ragged | None = None,
    ) -> tuple[Tensor, Tensor]:
        """States after the head's transform, and where those of each text begin.

        Arguments as in `forward`; see `vdr_db.towers.text_head.Head.read`.
        """
