"""A body and its head: from packed token ids to one score for each text and column."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vdr_db.kernels import Backend, Pooled, project_pool
from vdr_db.towers.families import BodyConfig
from vdr_db.towers.packing import ROW_MULTIPLE, Run, TextItem
from vdr_db.towers.text_body import Body, Padding, Ragged, packing_is_exact
from vdr_db.towers.text_head import Head
from vdr_db.towers.torch_tower import TorchTower

__all__ = ["Tower"]


class Tower(TorchTower):
    """A body and its head.

    Attributes:
        body: From token ids to hidden states.
        head: From hidden states to scores.
    """

    def __init__(self, body: Body, head: Head) -> None:
        """Takes the parts over."""
        super().__init__()
        self.body = body
        self.head = head

    @property
    def config(self) -> BodyConfig:
        """Sizes and constants of the body."""
        return self.body.config

    @property
    def head_name(self) -> str:
        """Name of the head in stamps and files."""
        return self.head.name

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.body.embeddings.word.weight.device  # without a walk through all modules

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and the hidden states."""
        return self.body.embeddings.word.weight.dtype

    @property
    def packs_exactly(self) -> bool:
        """Whether a text has the same bits in any batch; where it has not, texts go one by one.

        Not asked of a GPU, which picks its matrix kernels by the size of a batch anyway.
        """
        return self.device.type != "cpu" or packing_is_exact(self.config, self.dtype)

    def matrix(self) -> Tensor:
        """The vocabulary matrix, `[V, H]`."""
        return self.head.matrix(self.body.embeddings.word.weight)

    def bias_rows(self) -> Tensor | None:
        """What is added to the score of each column, `[V]`, or None."""
        return self.head.bias_rows()

    def states(self, item: TextItem) -> npt.NDArray[np.float32]:
        """States of a text's tokens after the head's transform, `[P, H]` float32."""
        ids, positions, _, runs = self._alone(item)
        with self.evaluating():
            hidden = self._hidden(ids, self.body(ids, positions, runs))
            hidden = self.head.transform(hidden[: runs[0].stop])
        found: npt.NDArray[np.float32] = hidden.float().cpu().numpy()
        return found

    def pooled(self, item: TextItem) -> npt.NDArray[np.float32]:
        """Largest score of each column over a text's tokens, `[V]` float32."""
        with self.evaluating():
            logits = self(*self._alone(item)).logits[0]
        found: npt.NDArray[np.float32] = logits.cpu().numpy()
        return found

    def _hidden(self, input_ids: Tensor, hidden: Tensor) -> Tensor:
        """Hidden states as the head reads them."""
        return self.head.with_tokens(hidden, input_ids, self.body.embeddings.word.weight)

    def _alone(self, item: TextItem) -> tuple[Tensor, Tensor, Tensor, list[Run]]:
        """A text as a batch of its own: ids, positions, bounds, runs."""
        length, rest = len(item.input_ids), -len(item.input_ids) % ROW_MULTIPLE
        runs = [Run(start=0, count=1, length=length, kept=item.kept)]
        if rest:
            runs.append(Run(start=length, count=1, length=rest, kept=rest))
        ids = np.pad(item.input_ids, (0, rest), constant_values=self.config.pad_id)
        positions = np.pad(item.position_ids, (0, rest), constant_values=self.config.first_position)
        bounds = np.array([0, *(run.stop for run in runs)], np.int32)
        device = self.device
        packed = [torch.from_numpy(part).to(device) for part in (ids, positions, bounds)]
        return packed[0], packed[1], packed[2], runs

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
            self.packed_states(input_ids, position_ids, cu_seqlens, runs, layout=layout),
            cu_seqlens,
            self.matrix(),
            self.bias_rows(),
            backend=backend,
            return_argmax=return_argmax,
            max_length=longest,
        )

    def packed_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        runs: Sequence[Run],
        *,
        layout: Padding | Ragged | None = None,
    ) -> Tensor:
        """States of all tokens after the head's transform, `[T, H]`; arguments as in `forward`."""
        if layout is None:
            layout = self.body.layout(runs, cu_seqlens, device=input_ids.device)
        hidden = self._hidden(input_ids, self.body(input_ids, position_ids, runs, layout))
        states: Tensor = self.head.transform(hidden)
        return states
