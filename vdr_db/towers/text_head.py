"""Heads: from hidden states to one score for each column of the vocabulary.

All heads transform the `[T, H]` hidden states, then leave the product with the vocabulary matrix
and the maximum over a text's states to `vdr_db.kernels.project_pool`, which never holds
`[T, V]`.

- `vdr`: LayerNorm (epsilon 1e-5), then the body's own word embeddings of the kept columns; no bias.
- `mlm`: dense, activation and LayerNorm of the model's masked language model, then its decoder
  with bias, tied to the word embeddings or not.
- `mean`: dense, the mean over a text's positions and LayerNorm (epsilon 1e-5), then the word
  embeddings, each times a scale of its column, with bias:
  `LayerNorm(mean(A h + a)) . (c_v w_v) + b_v`. One state stands for a text, so there is no maximum,
  and a product costs one row. For bodies that were trained to say what a text is about by the mean
  of their states, and never were a masked language model.

Source: Zhou et al., "Retrieval-based Disentangled Representation Learning with Natural Language
Supervision", ICLR 2024 (`vdr`); Formal et al., "SPLADE", SIGIR 2021 (`mlm`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vdr_db.errors import ConfigError
from vdr_db.text.vocabulary import Vocabulary
from vdr_db.towers.families import HEADS, BodyConfig
from vdr_db.towers.packing import ROW_MULTIPLE
from vdr_db.towers.text_body import ACTIVATIONS, Linear, unfilled

__all__ = ["HEADS", "Head", "MeanHead", "MlmHead", "VdrHead", "make_head"]

VDR_NORM_EPS = 1e-5
"""Epsilon of the VDR head's LayerNorm, torch's default, not the 1e-12 of BERT's own norms."""


class Head(nn.Module, ABC):
    """What stands between a body and a vector.

    Attributes:
        name: Name in stamps and files.
        vocabulary: Which columns are computed.
    """

    name: str

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        columns = torch.from_numpy(vocabulary.column_to_id.astype("int64"))
        self.register_buffer("columns", columns, persistent=False)
        self._gathered: tuple[object, Tensor] | None = None

    @abstractmethod
    def transform(self, hidden: Tensor) -> Tensor:
        """Hidden states `[T, H]` as the vocabulary matrix wants them, same shape."""

    def read(self, hidden: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """States of texts as the vocabulary matrix wants them, and where those of each begin.

        Args:
            hidden: `[T, H]`, of the body.
            cu_seqlens: `[B + 1]` integers, where texts begin.

        Returns:
            States `[R, H]`, and `[B + 1]` bounds; texts after the B-th only fill up.
        """
        return self.transform(hidden), cu_seqlens

    def matrix(self, word_embeddings: Tensor) -> Tensor:
        """Rows of the vocabulary matrix, `[V, H]`.

        Args:
            word_embeddings: `[rows, H]` of the body; at least as many rows as the tokenizer has
                ids.
        """
        return self._rows(word_embeddings)

    def plain_matrix(self, word_embeddings: Tensor) -> Tensor:
        """The same without scales of columns."""
        return self.matrix(word_embeddings)

    def bias_rows(self) -> Tensor | None:
        """Bias of each column, `[V]`, or None."""
        return None

    def _chosen(self, weight: Tensor) -> Tensor:
        first = self.vocabulary.first_id
        if first is not None:
            return weight[first : self.vocabulary.size]  # a view: no copy of the matrix
        return weight.index_select(0, self.get_buffer("columns"))

    def _rows(self, weight: Tensor, scale: Tensor | None = None) -> Tensor:
        parts = [weight] if scale is None else [weight, scale]
        is_view = scale is None and self.vocabulary.first_id is not None
        if is_view or (torch.is_grad_enabled() and any(part.requires_grad for part in parts)):
            return self._made(parts)
        # A gather copies V·H numbers; one copy serves until the matrix itself changes.
        key = [(part.data_ptr(), part._version, part.device, part.dtype) for part in parts]
        if self._gathered is None or self._gathered[0] != key:
            with torch.inference_mode(False):  # the copy may serve a later backward pass too
                self._gathered = (key, self._made([part.detach() for part in parts]))
        return self._gathered[1]

    def _made(self, parts: Sequence[Tensor]) -> Tensor:
        rows = self._chosen(parts[0])
        return rows if len(parts) == 1 else rows * self._chosen(parts[1]).relu()[:, None]


class VdrHead(Head):
    """LayerNorm, then the word embeddings of the kept columns."""

    name = "vdr"

    def __init__(self, config: BodyConfig, vocabulary: Vocabulary) -> None:
        """Builds the norm on the meta device."""
        super().__init__(vocabulary)
        self.norm = nn.LayerNorm(config.hidden_size, eps=VDR_NORM_EPS, device="meta")

    def transform(self, hidden: Tensor) -> Tensor:
        """Normalised hidden states, `[T, H]`."""
        return self.norm(hidden)  # type: ignore[no-any-return]


class MlmHead(Head):
    """The transform, decoder and bias of a masked language model."""

    name = "mlm"

    def __init__(self, config: BodyConfig, vocabulary: Vocabulary, *, tied: bool) -> None:
        """Builds the parts on the meta device.

        Args:
            config: Of the body.
            vocabulary: Which columns are computed.
            tied: Whether the decoder is the body's word embeddings.

        Raises:
            ConfigError: The activation is unknown.
        """
        super().__init__(vocabulary)
        if config.head_activation not in ACTIVATIONS:
            raise ConfigError(
                f"the activation of the MLM head must be one of {sorted(ACTIVATIONS)}, got "
                f"{config.head_activation!r}; models with another one are not supported."
            )
        width = config.hidden_size
        self.dense = Linear(width, width)
        self.activation = ACTIVATIONS[config.head_activation]
        self.norm = nn.LayerNorm(width, eps=config.norm_eps, device="meta")
        self.decoder = None if tied else Linear(config.vocab_size, width, bias=False)
        self.bias = unfilled(config.vocab_size)

    def transform(self, hidden: Tensor) -> Tensor:
        """Hidden states after dense, activation and norm, `[T, H]`."""
        return self.norm(self.activation(self.dense(hidden)))  # type: ignore[no-any-return]

    def matrix(self, word_embeddings: Tensor) -> Tensor:
        """Rows of the decoder, `[V, H]`."""
        return self._rows(word_embeddings if self.decoder is None else self.decoder.weight)

    def bias_rows(self) -> Tensor:
        """Bias of the kept columns, `[V]`."""
        return self._chosen(self.bias)


class MeanHead(Head):
    """The mean of what dense makes of a text's states, then a norm; scaled word embeddings."""

    name = "mean"

    def __init__(self, config: BodyConfig, vocabulary: Vocabulary) -> None:
        """Builds the parts on the meta device."""
        super().__init__(vocabulary)
        width = config.hidden_size
        self.dense = Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=VDR_NORM_EPS, device="meta")
        self.scale = unfilled(config.vocab_size)
        self.bias = unfilled(config.vocab_size)

    def transform(self, hidden: Tensor) -> Tensor:
        """A text's mean after the norm."""
        return self.norm(hidden)  # type: ignore[no-any-return]

    def read(self, hidden: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """One state for each text; on a CPU in whole multiples, see `ROW_MULTIPLE`."""
        # dense before the mean: its products then are those of a body, the same in any batch
        means = torch.segment_reduce(
            self.dense(hidden).float(), "mean", offsets=cu_seqlens, unsafe=True
        )
        states = self.transform(means.to(hidden.dtype))
        rest = -len(states) % ROW_MULTIPLE if states.device.type == "cpu" else 0
        states = F.pad(states, (0, 0, 0, rest))
        bounds = torch.arange(len(states) + 1, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
        return states, bounds

    def matrix(self, word_embeddings: Tensor) -> Tensor:
        """Word embeddings, each times its scale, `[V, H]`."""
        return self._rows(word_embeddings, self.scale)  # what is below 0 counts as 0

    def plain_matrix(self, word_embeddings: Tensor) -> Tensor:
        """Word embeddings as they are, `[V, H]`."""
        return self._chosen(word_embeddings)

    def bias_rows(self) -> Tensor:
        """Bias of the kept columns, `[V]`."""
        return self._chosen(self.bias)


def make_head(name: str, config: BodyConfig, vocabulary: Vocabulary, *, tied: bool) -> Head:
    """A head on the meta device, by name.

    Args:
        name: One of `HEADS`.
        config: Of the body.
        vocabulary: Which columns are computed.
        tied: Whether the decoder of an `mlm` head is the body's word embeddings.

    Raises:
        ConfigError: The name is unknown, or the model has fewer rows than the tokenizer has ids.
    """
    if name not in HEADS:
        raise ConfigError(f"`head` must be one of {list(HEADS)}, got {name!r}.")
    if config.vocab_size < vocabulary.size:
        raise ConfigError(
            f"the model must have a row for each of the tokenizer's {vocabulary.size} ids, got "
            f"{config.vocab_size} rows; tokenizer and model do not belong together."
        )
    if name == "vdr":
        return VdrHead(config, vocabulary)
    if name == "mean":
        return MeanHead(config, vocabulary)
    return MlmHead(config, vocabulary, tied=tied)
