"""A side without a model: one fixed weight for each token, such as its IDF; nothing needs torch.

Source: Geng et al., "Towards Competitive Search Relevance For Inference-Free Learned Sparse
Retrievers", 2024; `SparseStaticEmbedding` of sentence-transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vdr_db.sparse import SparseRows
from vdr_db.text.tokenization import TokenizedTexts
from vdr_db.towers.packing import TextItem

__all__ = ["StaticSizes", "StaticTower"]


@dataclass(frozen=True)
class StaticSizes:
    """Sizes of a side without a model, by the names that bodies have.

    Attributes:
        vocab_size: Token ids there are.
        max_length: Most tokens of a text; no position is looked up, so nearly without end.
        pad_id: Never used.
        first_position: Never used.
    """

    vocab_size: int
    max_length: int = (1 << 31) - 1
    pad_id: int = 0
    first_position: int = 0

    @property
    def hidden_size(self) -> int:
        """Width of a token's state: one for each token."""
        return self.vocab_size


class StaticTower:
    """Static weights of the tokens of a text.

    Attributes:
        weights: `[size]` float32 by token id, none negative.
        config: Sizes.
        head_name: Name in stamps and files.
        packs_exactly: A text's weights depend on no other text.
    """

    head_name = "static"
    packs_exactly = True

    def __init__(self, weights: npt.NDArray[np.float32]) -> None:
        self.weights = weights
        self.config = StaticSizes(weights.size)

    def named_parameters(self) -> list[tuple[str, npt.NDArray[np.float32]]]:
        """The weights under their name."""
        return [("weight", self.weights)]

    def rows_of(self, tokens: TokenizedTexts) -> SparseRows:
        """Weights of the tokens of each text; how often a token stands there does not matter.

        Args:
            tokens: Texts as they count, cut and with their prompts.
        """
        owners = np.repeat(np.arange(tokens.lengths.size), tokens.lengths)
        kept = self.weights[tokens.input_ids] > 0
        size = self.weights.size
        keys = np.unique(owners[kept] * size + tokens.input_ids[kept])
        indptr = np.zeros(tokens.lengths.size + 1, np.int64)
        np.cumsum(np.bincount(keys // size, minlength=tokens.lengths.size), out=indptr[1:])
        ids = keys % size
        return SparseRows(indptr, ids.astype(np.int32), self.weights[ids], size)

    def gated(self, rows: SparseRows, tokens: TokenizedTexts) -> SparseRows:
        """Rows times the static weights of their texts' tokens: all other weights are gone.

        Args:
            rows: One for each text.
            tokens: The texts as the model read them, special tokens included.
        """
        size = self.weights.size
        gates = self.rows_of(tokens)
        ours, theirs = (
            np.repeat(np.arange(len(found)), np.diff(found.indptr)) * size + found.indices
            for found in (rows, gates)
        )
        _, mine, his = np.intersect1d(ours, theirs, assume_unique=True, return_indices=True)
        values = rows.values[mine] * gates.values[his]
        indptr = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(np.bincount(ours[mine] // size, minlength=len(rows)), out=indptr[1:])
        return SparseRows(indptr, rows.indices[mine], values, size)

    def states(self, item: TextItem) -> npt.NDArray[np.float32]:
        """A one for each token of a text in its own column, `[P, size]`."""
        states = np.zeros((item.input_ids.size, self.weights.size), np.float32)
        states[np.arange(item.input_ids.size), item.input_ids] = 1.0
        return states

    def rows(self, columns: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """The weight of each column in its own place, `[D, size]`."""
        found = np.zeros((columns.size, self.weights.size), np.float32)
        found[np.arange(columns.size), columns] = self.weights[columns]
        return found

    def bias(self, columns: npt.NDArray[np.int64]) -> None:
        """Nothing is added."""
