"""Towers that weigh a text's own tokens and add none: bge-m3's sparse vectors, uniCOIL.

One linear layer gives each position a number; the weight of a token is the largest, not below 0,
over the positions where it stands.

Source: Chen et al., "BGE M3-Embedding", 2024; Lin and Ma, "A Few Brief Notes on DeepImpact, COIL,
and a Conceptual Framework for Information Retrieval Techniques", 2021.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vdr_db.errors import ConfigError
from vdr_db.kernels import Backend, Pooled
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.families import BodyConfig
from vdr_db.towers.packing import Run, TextItem
from vdr_db.towers.text_body import Body, Linear, Padding, Ragged, packing_is_exact
from vdr_db.towers.torch_text import TorchTextTower

__all__ = ["TokenWeights", "WeigherTower"]

_MOST_STATES = 1 << 28
"""Numbers in the states of a text that is explained: 1 GB."""


class TokenWeights(nn.Module):
    """One number for each position, and which tokens may have a weight.

    Attributes:
        vocabulary: Which columns there are.
        linear: From a hidden state to its number.
        dropped: Token ids without a weight.
    """

    name = "token_weights"

    def __init__(self, config: BodyConfig, vocabulary: Vocabulary, dropped: Iterable[int]) -> None:
        """Builds the layer on the meta device.

        Args:
            config: Of the body.
            vocabulary: Which columns there are.
            dropped: Token ids without a weight, such as those of [CLS] and [PAD].
        """
        super().__init__()
        self.vocabulary = vocabulary
        self.linear = Linear(1, config.hidden_size)
        columns = vocabulary.id_to_column.astype("int64").copy()
        self.dropped = sorted(dropped)
        columns[self.dropped] = -1
        self.register_buffer("columns", torch.from_numpy(columns), persistent=False)


class WeigherTower(TorchTextTower):
    """A body and weights of its texts' own tokens.

    Attributes:
        body: From token ids to hidden states.
        head: The weights.
    """

    def __init__(self, body: Body, head: TokenWeights) -> None:
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
    def constants(self) -> dict[str, list[int]]:
        """Token ids without a weight."""
        return {"dropped": self.head.dropped}

    @property
    def packs_exactly(self) -> bool:
        """Whether a text has the same bits in any batch; where it has not, texts go one by one."""
        return self.device.type != "cpu" or packing_is_exact(self.config, self.dtype)

    def matrix(self) -> Tensor:
        """Nothing of its own: positions know their columns."""
        return torch.eye(self.head.vocabulary.columns, device=self.device)

    def rows(self, columns: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """A one in the place of each column, `[D, V]`."""
        found = np.zeros((columns.size, self.head.vocabulary.columns), np.float32)
        found[np.arange(columns.size), columns] = 1.0
        return found

    def states(self, item: TextItem) -> npt.NDArray[np.float32]:
        """The number of each position in the column of its token, `[P, V]`.

        Raises:
            ConfigError: The text is too long to be explained so.
        """
        width = self.head.vocabulary.columns
        length = len(item.input_ids)
        if length * width > _MOST_STATES:
            raise ConfigError(
                f"a text to explain must have at most {_MOST_STATES // width} tokens for a head "
                f"of token weights, got {length}; cut it."
            )
        ids, positions, _, runs = self.alone(item)
        with self.evaluating():
            weights, columns = self._weights(ids, positions, runs, None)
        found = np.zeros((length, width), np.float32)
        kept = columns[:length].cpu().numpy() >= 0
        values = weights[:length].float().cpu().numpy()
        found[np.flatnonzero(kept), columns[:length].cpu().numpy()[kept]] = values[kept]
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
        """Weight of each text and column, `[B, V]` float32; as `towers.text.Tower.forward`.

        Raises:
            ConfigError: The positions are asked for, or padding is to take part.
        """
        if return_argmax or any(run.kept < run.length for run in runs):
            raise ConfigError(
                "`compatibility` must be None for a head of token weights, and it is not trained "
                "here; use FlagEmbedding for that."
            )
        if layout is None:
            layout = self.body.layout(runs, cu_seqlens, device=input_ids.device)
        weights, columns = self._weights(input_ids, position_ids, runs, layout)
        texts = len(cu_seqlens) - 1
        lengths = cu_seqlens.diff().long()
        owners = torch.arange(texts, device=weights.device).repeat_interleave(
            lengths, output_size=weights.shape[0]
        )
        kept = columns >= 0
        logits = weights.new_zeros(texts * self.head.vocabulary.columns)
        places = owners[kept] * self.head.vocabulary.columns + columns[kept]
        logits.scatter_reduce_(0, places, weights[kept], "amax")
        return Pooled(logits.view(texts, -1), None)

    def _weights(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        runs: Sequence[Run],
        layout: Padding | Ragged | None,
    ) -> tuple[Tensor, Tensor]:
        """Number `[T]` float32 and column `[T]` of each position, −1 for one without a weight."""
        hidden = self.body(input_ids, position_ids, runs, layout)
        # a product with one row is taken apart by size of the batch, a sum of each row is not
        layer = self.head.linear
        assert layer.bias is not None
        weights = (hidden.float() * layer.weight.float()).sum(1) + layer.bias.float()
        return weights.relu(), self.head.get_buffer("columns")[input_ids]
