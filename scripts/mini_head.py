"""The head of `train_mini.py`, side by side, and how it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mini_texts import States, Texts, read_states
from torch import Tensor, nn

from vdr_db.encoders.text import SparseEncoder
from vdr_db.kernels import project_pool
from vdr_db.text.own_weights import OwnWeights

ACTIVE = {"document": 300, "query": 100}
"""Columns above 0 that biases start with."""


class Side(nn.Module):
    """The head of one side, as `vdr_db.towers.text_head.ScaledHead` computes it."""

    def __init__(self, matrix: Tensor, bias: Tensor, tokens: Tensor, scale: Tensor) -> None:
        super().__init__()
        width = matrix.shape[0]
        self.dense = nn.Linear(width, width)
        self.dense.weight.data, self.dense.bias.data = matrix.clone(), bias.clone()
        self.norm = nn.LayerNorm(width)
        self.tokens, self.scale = nn.Parameter(tokens.clone()), nn.Parameter(scale.clone())
        self.bias = nn.Parameter(torch.zeros_like(scale))
        self.factor = nn.Parameter(torch.ones(()))

    def transform(self, states: States, words: Tensor) -> Tensor:
        """`[T, H]`."""
        own = self.tokens[states.ids, None] * words[states.ids]
        found: Tensor = self.norm(self.dense(states.hidden) + own)
        return found


@dataclass
class Words:
    """Word embeddings, centred: `[size, H]` of all tokens, `[V, H]` of the columns."""

    all: Tensor
    matrix: Tensor


def centred(encoder: SparseEncoder) -> Words:
    """Word embeddings less their mean."""
    words = encoder.document_tower.body.embeddings.word.weight.detach()
    words = words - words.mean(0)
    columns = torch.from_numpy(encoder.vocabulary.column_to_id.astype(np.int64))
    return Words(words, words[columns])


def vectors(
    side: Side, states: States, own: Tensor, words: Words, k: int, columns: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Vectors `[B, V]` over some columns or all, of which k carry weights and gradients.

    Two of each text: with own weights, and of the head alone.
    """
    u = side.transform(states, words.all)
    matrix, scale, bias = words.matrix, side.scale, side.bias
    if columns is not None:
        matrix, scale, bias = matrix[columns], scale[columns], bias[columns]
        own = own[:, columns]
    with torch.no_grad():
        pooled = project_pool(u, states.bounds, matrix, return_argmax=True)
        weights = torch.log1p((pooled.logits * scale + bias).relu())
    assert pooled.argmax is not None
    found = []
    for part in (side.factor * own, None):
        whole = weights if part is None else weights + part.detach()
        chosen = whole.topk(k, dim=1).indices
        places = states.bounds[:-1, None] + pooled.argmax.gather(1, chosen)
        products = torch.linalg.vecdot(u[places], matrix[chosen])
        kept = torch.log1p((products * scale[chosen] + bias[chosen]).relu())
        if part is not None:
            kept = kept + part.gather(1, chosen)
        found.append(torch.zeros_like(weights).scatter(1, chosen, kept))
    return found[0], found[1]


def ridge(encoder: SparseEncoder, words: Tensor, folder: Path) -> tuple[Tensor, Tensor]:
    """The map of single words' states onto their unit embeddings: `[H, H]` and `[H]`."""
    names = [encoder.vocabulary.token(id) for id in range(encoder.vocabulary.size)]
    single = [
        id for id, name in enumerate(names) if name.isascii() and name.isalpha() and id > 1995
    ]
    states = read_states(encoder, [names[id] for id in single], 8, folder)
    whole = states.bounds.diff() == 3
    at = states.bounds[:-1][whole] + 1
    x, y = states.hidden[at].float(), words[states.ids[at]]
    y = nn.functional.normalize(y, dim=1)
    middle = x.mean(0)
    x = x - middle
    gram = x.T @ x
    matrix = torch.linalg.solve(gram + 0.1 * gram.diagonal().mean() * torch.eye(len(gram)), x.T @ y)
    return matrix.T.contiguous(), -(middle @ matrix)


def started(
    encoder: SparseEncoder, words: Words, texts: dict[str, Texts], own: OwnWeights, folder: Path
) -> nn.ModuleDict:
    """Both sides as they start."""
    matrix, bias = ridge(encoder, words.all, folder)
    lengths = words.all.norm(dim=1).clamp_min(1e-6)
    tokens = 1 / lengths
    tokens[sorted(encoder.vocabulary.special_ids)] = 0
    ids = torch.from_numpy(encoder.vocabulary.column_to_id.astype(np.int64))
    idf = torch.from_numpy(own.idf[own.canon[ids.numpy()]])
    scales = {"document": idf / idf.mean(), "query": torch.ones(len(ids))}
    sides = nn.ModuleDict()
    for name, scale in scales.items():
        side = Side(matrix, bias, tokens, scale / lengths[ids])
        states = texts[name].states
        count = len(states.bounds) - 1
        sample = states.take(range(0, count, max(1, count // 48)))
        with torch.no_grad():
            u = side.transform(sample, words.all)
            found = project_pool(u, sample.bounds, words.matrix).logits
            # in units of a column's own scale, so that no column starts far above another
            limit = (found / lengths[ids]).quantile(1 - ACTIVE[name] / len(ids), dim=1).mean()
            side.bias.data = -limit * scale
            side.factor.data = torch.tensor(1.0 if name == "query" else 0.35)
        sides[name] = side
    return sides
