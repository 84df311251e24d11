"""Means of weights: over the steps of a run, and with the weights it started from.

    mean_t = d_t mean_(t-1) + (1 - d_t) weights_t,    d_t = min(decay, (t - 1) / (t + 3))

Training goes on from the weights; what is measured and written is the mean. In the first steps it
reaches back over a quarter of them, so that nothing is left of the weights before the first.

Source: Polyak and Juditsky 1992, Acceleration of stochastic approximation by averaging; Shamir and
Zhang 2013, Stochastic gradient descent for non-smooth optimization, for the first steps
(polynomial decay, eta = 3). Wortsman et al. 2022, Robust fine-tuning of zero-shot models, equation
1, for the mean with the first weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

__all__ = ["WeightMean", "mixed_weights"]


class WeightMean:
    """Exponential moving average of weights over the steps of a run."""

    def __init__(self, tensors: Mapping[str, Tensor], decay: float) -> None:
        """Starts from weights as they are, which training changes in place.

        A step keeps `decay` of the earlier mean: a mean of about the last 1 / (1 - decay) steps.
        """
        self.tensors, self.decay = dict(tensors), decay
        self.means = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after a step; steps count from 1."""
        decay = min(self.decay, (step - 1) / (step + 3))
        for name, tensor in self.tensors.items():
            self.means[name].lerp_(tensor, 1 - decay)

    def load(self, means: Mapping[str, Tensor]) -> None:
        """Goes on from the means of a checkpoint."""
        _copy(self.means, means)

    def applied(self) -> AbstractContextManager[None]:
        """Puts the mean in place of the weights while the block runs."""
        return _replaced(self.tensors, self.means)


@contextmanager
def mixed_weights(
    tensors: Mapping[str, Tensor], first: Mapping[str, Tensor], share: float
) -> Iterator[None]:
    """Puts `share * trained + (1 - share) * first` in place of weights while the block runs."""
    if share == 1:
        yield
        return
    mixed = {
        name: torch.lerp(first[name], tensor.detach(), share) for name, tensor in tensors.items()
    }
    with _replaced(tensors, mixed):
        yield


@contextmanager
def _replaced(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Iterator[None]:
    """Puts other numbers in place while the block runs."""
    own = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    try:
        _copy(tensors, others)
        yield
    finally:
        _copy(tensors, own)


@torch.no_grad()
def _copy(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(others[name])
