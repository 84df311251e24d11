"""Learning rate over time, and the optimiser with its groups."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from vdr_db.training.settings import OptimiserConfig, Schedule

__all__ = ["learning_rate_factor", "make_optimiser"]


def learning_rate_factor(step: int, *, total: int, warmup: int, schedule: Schedule) -> float:
    """Share of the highest learning rate that step `step` uses, in 0..1.

    Warm-up grows as (step + 1) / warmup, so that no step is wasted at 0. Afterwards, with x running
    from 0 to 1 over the rest: linear 1 - x, cosine (1 + cos(pi x)) / 2.
    Steps count from 0.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    x = min(1.0, (step - warmup) / max(1, total - warmup))
    return 1 - x if schedule == "linear" else (1 + math.cos(math.pi * x)) / 2


def make_optimiser(
    parameters: Iterable[tuple[str, nn.Parameter]], settings: OptimiserConfig
) -> torch.optim.AdamW:
    """AdamW with a group each for embeddings, other matrices, and biases and norms.

    Names of word embeddings end in `word.weight`, an image head's own in `image.head.projection`.
    Each group keeps its highest learning rate as `peak`.
    """
    groups: dict[str, list[nn.Parameter]] = {"word": [], "matrix": [], "vector": []}
    for name, parameter in parameters:
        is_word = name.endswith(("word.weight", "image.head.projection"))
        kind = "word" if is_word else "matrix" if parameter.dim() > 1 else "vector"
        groups[kind].append(parameter)
    peaks = {"word": settings.lr if settings.embedding_lr is None else settings.embedding_lr}
    return torch.optim.AdamW(
        [
            {
                "params": members,
                "lr": peaks.get(kind, settings.lr),
                "peak": peaks.get(kind, settings.lr),
                "weight_decay": 0.0 if kind == "vector" else settings.weight_decay,
            }
            for kind, members in groups.items()
            if members
        ],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
    )
