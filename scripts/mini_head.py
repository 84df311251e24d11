"""The head of `train_mini.py`, side by side, and how it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from mini_texts import Means, Texts
from torch import Tensor, nn

from vdr_db.encoders.text import SparseEncoder
from vdr_db.text.own_weights import OwnWeights

KEPT = {"document": 256, "query": 128}
"""Weights of a text."""
FACTORS = {"document": 1.0, "query": 12.0}
"""Factors of own weights that training starts with: a query's own words outweigh what the model
adds to it; what it adds to a document weighs as much as the document's own words."""
SHARPNESS = 200.0
"""Scores are this times a cosine: weights of a text then differ little, as log(1 + x) has it."""


@dataclass
class Words:
    """Word embeddings, centred, and the map that makes their directions alike.

    Attributes:
        all: `[size, H]` of all tokens.
        matrix: `[V, H]` of the columns.
        whitening: `[H, H]`, symmetric; unit rows of the matrix times this have the same spread in
            every direction.
    """

    all: Tensor
    matrix: Tensor
    whitening: Tensor

    @classmethod
    def of(cls, encoder: SparseEncoder) -> Self:
        """Of the body of an encoder."""
        words = encoder.document_tower.body.embeddings.word.weight.detach()
        words = words - words.mean(0)
        matrix = words[torch.from_numpy(encoder.vocabulary.column_to_id.astype(np.int64))]
        unit = nn.functional.normalize(matrix, dim=1)
        values, directions = torch.linalg.eigh(torch.cov(unit.T))
        stretched = values.rsqrt() / values.reciprocal().mean().sqrt()  # lengths stay, on average
        return cls(words, matrix, directions @ torch.diag(stretched) @ directions.T)


class Side(nn.Module):
    """The head of one side, as `vdr_db.towers.text_head.MeanHead` computes it."""

    def __init__(self, name: str, turn: Tensor, texts: Means, words: Words) -> None:
        super().__init__()
        width = turn.shape[0]
        self.words, self.k = words, KEPT[name]
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        matrix = words.whitening @ turn.T
        self.dense.weight.data = matrix
        self.dense.bias.data = -matrix @ texts.means.mean(0)
        # learned in units of where they start, so that one rate fits all
        self.unit_scale = SHARPNESS / width**0.5 / (words.matrix @ words.whitening).norm(dim=1)
        self.scale = nn.Parameter(torch.ones(len(words.matrix)))
        self.bias = nn.Parameter(torch.zeros(len(words.matrix)))
        self.log_factor = nn.Parameter(torch.tensor(FACTORS[name]).log())
        self.limit = 0.0
        with torch.no_grad():
            found = self.scores(texts.means[:: max(1, len(texts.means) // 400)])
            self.limit = found.topk(self.k, dim=1).values[:, -1].mean().item()

    @property
    def factor(self) -> Tensor:
        """Of own weights."""
        return self.log_factor.exp()

    def weights(self) -> dict[str, Tensor]:
        """What the head of the model holds."""
        return {
            "dense.weight": self.dense.weight,
            "dense.bias": self.dense.bias,
            "norm.weight": self.norm.weight,
            "norm.bias": self.norm.bias,
            "scale": self.scale * self.unit_scale,
            "bias": self.bias * SHARPNESS / self.dense.in_features**0.5 - self.limit,
        }

    def scores(self, means: Tensor) -> Tensor:
        """`[B, V]`, before activation."""
        head = self.weights()
        return self.norm(self.dense(means)) @ self.words.matrix.T * head["scale"] + head["bias"]

    def forward(self, means: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors `[B, V]` of which k carry weights: with own weights, and of the head alone."""
        alone = torch.log1p(self.scores(means).relu())
        return self._cut(alone + self.factor * own), self._cut(alone)

    def _cut(self, weights: Tensor) -> Tensor:
        least = weights.detach().topk(self.k, dim=1).values[:, -1:]
        return torch.where(weights.detach() >= least, weights, torch.zeros(()))


def turned(encoder: SparseEncoder, words: Words, texts: Means, own: OwnWeights) -> Tensor:
    """The turn of texts' means that brings them nearest to their words: `[H, H]`, orthogonal.

    A turn keeps all angles, so that texts which are near for the body have columns in common, and
    the columns are words that such texts hold (orthogonal Procrustes, Schoenemann, 1966).
    """
    idf = torch.from_numpy(own.idf[np.maximum(own.canon, 0)])
    idf[sorted(encoder.vocabulary.special_ids)] = 0
    rows = nn.functional.normalize(words.all @ words.whitening, dim=1)
    said = texts.sums(idf, rows)
    pairs = [nn.functional.normalize(x - x.mean(0), dim=1) for x in (texts.means, said)]
    left, _, right = torch.linalg.svd(pairs[0].T @ pairs[1])
    return left @ right


def started(
    encoder: SparseEncoder, words: Words, texts: dict[str, Texts], own: OwnWeights
) -> nn.ModuleDict:
    """Both sides as they start."""
    turn = turned(encoder, words, texts["document"].read, own)
    return nn.ModuleDict({name: Side(name, turn, texts[name].read, words) for name in KEPT})
