"""A body and its head: from packed token ids to one score for each text and column."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vdr_db.towers.families import BodyConfig
from vdr_db.towers.packing import Run
from vdr_db.towers.text_body import Body, Padding, Ragged, packing_is_exact
from vdr_db.towers.text_head import Head
from vdr_db.towers.torch_text import ProjectedTower

__all__ = ["Tower"]


class Tower(ProjectedTower):
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

    def plain_matrix(self) -> Tensor:
        """The vocabulary matrix without a head's scales, `[V, H]`."""
        return self.head.plain_matrix(self.body.embeddings.word.weight)

    def bias_rows(self) -> Tensor | None:
        """What is added to the score of each column, `[V]`, or None."""
        return self.head.bias_rows()

    def packed_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        runs: Sequence[Run],
        *,
        layout: Padding | Ragged | None = None,
    ) -> tuple[Tensor, Tensor]:
        """States after the head's transform, and where those of each text begin."""
        if layout is None:
            layout = self.body.layout(runs, cu_seqlens, device=input_ids.device)
        hidden = self.body(input_ids, position_ids, runs, layout)
        return self.head.read(hidden, cu_seqlens)
